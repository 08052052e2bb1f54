"""Verdicts: each kind at and about its thresholds, roots, what every argument changes, and power against simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from dbscale.laws import (
    DeltaCurves,
    LawError,
    NotEnoughData,
    Pairs,
    Verdict,
    delta_curves,
    delta_points,
    judge,
    make_pairs,
    noise_of,
    power,
)
from dbscale.laws.boundary import decide, equal_grid


def pairs_of(means, spread: float, x=None, **more) -> Pairs:
    """Two seeds at each x, `spread` above and below the mean: one seed's variance is 2 · spread² at every x."""
    k = len(means)
    at = np.array(x or [1000.0 * 2**i for i in range(k)])
    delta = np.concatenate([np.array(means) + spread, np.array(means) - spread])
    return make_pairs(np.tile(at, 2), delta, seed=np.repeat([0, 1], k), **more)


def half_width(spread: float, k: int, level: float = 0.9, family: int = 1) -> float:
    """Simultaneous half-width of `pairs_of`: the mean of two has stderr `spread`, with k degrees of freedom (k ≤ 5)."""
    return spread * stats.t.ppf(0.5 + level ** (1 / (k * family)) / 2, k)


# Kinds.

D = 0.005


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [
        ([0.001, -0.02], [0.02, -0.001], "crossing"),
        ([0.0, -0.02], [0.02, -0.001], "undecided"),  # 0 itself is no sign
        ([0.001, -0.02], [0.02, 0.0], "undecided"),
        ([0.001, -0.004], [0.02, -0.001], "crossing"),  # both signs, however small
        ([0.006, -0.004], [0.02, 0.02], "one_sign"),
        ([0.005, -0.004], [0.02, 0.02], "excluded"),  # δ itself is not beyond δ
        ([0.006, -0.005], [0.02, 0.02], "undecided"),  # −δ itself is not above −δ
        ([-0.02, -0.02], [-0.006, 0.004], "one_sign"),
        ([-0.02, -0.02], [-0.005, 0.004], "excluded"),
        ([-0.02, -0.02], [-0.006, 0.005], "undecided"),
        ([-0.004, -0.004], [0.004, 0.004], "excluded"),
        ([-0.004, -0.004], [0.1, 0.1], "excluded"),
        ([-0.1, -0.1], [0.1, 0.1], "undecided"),
    ],
)
def test_kinds_at_their_thresholds(low, high, kind: str) -> None:
    assert decide(np.array(low), np.array(high), D) == kind
    both = decide(np.array([low, [-1.0, -1.0]]), np.array([high, [1.0, 1.0]]), D)
    assert both.tolist() == [kind, "undecided"]


@pytest.mark.parametrize("side", [1, -1])
def test_one_sign_starts_where_the_interval_leaves_the_smallest_effect(side: int) -> None:
    half = half_width(0.01, 3)
    for edge, kind in ((1e-7, "one_sign"), (-1e-7, "excluded")):
        verdict = judge(pairs_of(side * np.array([half + D + edge, half, half]), 0.01), num_draws=20)
        assert (verdict.kind, verdict.better) == (kind, "b" if side > 0 else "a")
    for edge, kind in ((1e-7, "one_sign"), (-1e-7, "undecided")):
        verdict = judge(pairs_of(side * np.array([0.1, half - D + edge, half]), 0.01), num_draws=20)
        assert (verdict.kind, verdict.better) == (kind, "b" if side > 0 else "a")


@pytest.mark.parametrize(("side", "direction"), [(1, "b_to_a"), (-1, "a_to_b")])
def test_a_crossing_needs_both_signs_and_names_its_direction(side: int, direction: str) -> None:
    half = half_width(0.01, 3)
    for edge, kind in ((1e-7, "crossing"), (-1e-7, "undecided")):
        verdict = judge(pairs_of(side * np.array([half + edge, 0.0, -half - 1e-7]), 0.01), num_draws=20)
        assert verdict.kind == kind
    verdict = judge(pairs_of(side * np.array([0.1, 0.0, -0.1]), 0.01))
    assert (verdict.direction, verdict.better, verdict.bracket) == (direction, None, (1000, 4000))
    assert verdict.root == pytest.approx(2000, rel=0.05)
    assert verdict.interval is not None and 1000 <= verdict.interval[0] < verdict.root < verdict.interval[1] <= 4000


def test_equal_within_the_smallest_effect() -> None:
    verdict = judge(pairs_of([0.001, -0.001, 0.0], 0.0005), num_draws=20)
    assert (verdict.kind, verdict.better, verdict.root, verdict.notes) == ("excluded", None, None, ())
    small = judge(pairs_of([0.003, 0.0, 0.0], 0.0005), num_draws=20)
    assert (small.kind, small.better, small.notes) == ("excluded", "b", ("within_min_effect",))


def test_of_several_crossings_the_last_loss_of_the_gain_is_given() -> None:
    hump = judge(pairs_of([-0.1, 0.1, 0.1, -0.1, -0.1], 0.01), num_draws=50)
    assert (hump.direction, hump.bracket) == ("b_to_a", (4000, 8000)) and "several_crossings" in hump.notes
    dip = judge(pairs_of([0.1, -0.1, -0.1, 0.1, 0.1], 0.01), num_draws=50)
    assert (dip.direction, dip.bracket) == ("b_to_a", (1000, 2000)) and "several_crossings" in dip.notes
    wave = judge(pairs_of([0.1, -0.1, 0.1, -0.1, -0.1], 0.01), num_draws=50)
    assert (wave.direction, wave.bracket) == ("b_to_a", (4000, 8000))
    assert "several_crossings" not in judge(pairs_of([0.1, 0.1, 0.0, -0.1, -0.1], 0.01), num_draws=50).notes


# The root.


def test_the_root_lies_on_the_curve_between_the_points() -> None:
    verdict = judge(pairs_of([0.03, 0.01, -0.03, -0.05], 1e-5, x=[1e3, 2e3, 8e3, 1.6e4]))
    assert verdict.root == pytest.approx(2.83e3, rel=0.03)  # straight in log x: a quarter of the way from 2 to 8
    assert verdict.bracket == (2e3, 8e3)
    tight, wide = (judge(pairs_of([0.06, 0.02, -0.02, -0.06], s)) for s in (0.002, 0.01))
    (a, b), (c, d) = tight.interval, wide.interval
    assert c < a < b < d and a < 2000 * 2**0.5 < b


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize(
    ("means", "bracket", "tails"),
    [
        ([0.08, 0.01, -0.06, -0.13], (1000, 4000), (0.025, 0.05)),
        ([0.06, -0.06, -0.18], (1000, 2000), (0.05, 0.05)),
        ([0.15, 0.08, 0.01, -0.06], (2000, 8000), (0.05, 0.05)),
    ],
)
def test_an_interval_leaves_out_less_below_where_no_sign_follows_that_at_the_first_x(
    side, means, bracket, tails
) -> None:
    pairs = pairs_of(side * np.array(means), 0.01)
    verdict, curves = judge(pairs), delta_curves(pairs)
    assert verdict.bracket == bracket and verdict.interval is not None
    inside = (curves.grid >= bracket[0]) & (curves.grid <= bracket[1])
    drawn = side * curves.drawn[:, inside]
    roots = np.array([np.interp(0, -each, np.log(curves.grid[inside])) for each in drawn])  # of curves that cross once
    assert np.mean(roots < np.log(verdict.interval[0])) == pytest.approx(tails[0], abs=0.01)
    assert np.mean(roots > np.log(verdict.interval[1])) == pytest.approx(tails[1], abs=0.01)


def law(roots, slope: float = 0.02, grid=None) -> DeltaCurves:
    """Straight curves in log2 x with these roots."""
    at = np.geomspace(500, 10_000, 60) if grid is None else np.array(grid)
    drawn = -slope * (np.log2(at) - np.log2(np.array(roots, float)[:, None]))
    return DeltaCurves(at, drawn.mean(axis=0), drawn, "additive")


def test_laws_sharpen_a_root_that_the_points_support() -> None:
    pairs = pairs_of([0.1, 0.0, -0.1], 0.01)
    roots = np.geomspace(1600, 2600, 101)
    verdict = judge(pairs, law_curves=law(roots))
    assert verdict.law_root == pytest.approx(roots[50], rel=1e-6) and verdict.law_name == "additive"
    assert verdict.law_interval == pytest.approx((roots[5], roots[95]), rel=1e-6)
    at_half = judge(pairs, law_curves=law(roots), level=0.5)
    assert at_half.law_interval == pytest.approx((roots[25], roots[75]), rel=1e-6)
    free = judge(pairs)
    assert (free.root, free.interval, free.law_root) == (verdict.root, verdict.interval, None)


def test_laws_never_claim_a_root() -> None:
    roots = np.geomspace(1600, 2600, 101)
    undecided = judge(pairs_of([0.05, 0.0, -0.05], 0.03), law_curves=law(roots))
    assert (undecided.kind, undecided.law_root, undecided.law_name) == ("undecided", None, None)
    pairs = pairs_of([0.1, 0.0, -0.1], 0.01)
    outside = judge(pairs, law_curves=law(np.geomspace(500, 900, 20)))
    assert outside.law_root is None and "laws_do_not_cross" in outside.notes and "laws_disagree" not in outside.notes
    upward = judge(pairs, law_curves=law(roots, slope=-0.02))
    assert upward.law_root is None and "laws_do_not_cross" in upward.notes
    elsewhere = judge(pairs_of([0.1, 0.0, -0.1], 1e-4), law_curves=law(np.geomspace(2500, 2600, 20)))
    assert elsewhere.law_root is None and "laws_disagree" in elsewhere.notes
    # nine in ten of the laws' curves must cross in the bracket
    some = [law(np.append(roots[: 100 - n], [5000] * n)) for n in (9, 11)]
    assert [judge(pairs, law_curves=each).law_root is None for each in some] == [False, True]
    with pytest.raises(
        LawError, match=r"law_curves run from x = 1500 to 9000; they must span the bracket \(1000.0, 4000.0\)"
    ):
        judge(pairs, law_curves=law([2000], grid=[1500, 3000, 9000]))


# Arguments.


def test_every_argument_changes_the_verdict() -> None:
    pairs = pairs_of([0.04, 0.0, -0.04], 0.01)
    plain = judge(pairs)
    assert plain == judge(pairs) and plain.kind == "crossing"
    assert judge(pairs, family=4).kind == "undecided" and judge(pairs, family=4).family == 4
    strict = judge(pairs, level=0.99)
    assert strict.kind == "undecided" and strict.points[0].high > plain.points[0].high
    other, few = judge(pairs, seed=1), judge(pairs, num_draws=100)
    assert other.root != plain.root and other.root == pytest.approx(plain.root, rel=0.1)
    assert few.root != plain.root and few.points == plain.points
    harm = pairs_of([0.04, 0.0, 0.0], 0.003)
    assert [judge(harm, min_effect=d, num_draws=20).kind for d in (0.005, 0.02, 0.04)] == [
        "undecided",
        "one_sign",
        "excluded",
    ]
    noisy = judge(pairs_of([0.04, 0.0, -0.04], 0.01, test_variance=[0.01] * 6))
    assert noisy.kind == "undecided"
    curve, wide = (np.array(judge(pairs, level=v, num_draws=300).curve["high"]) for v in (0.9, 0.99))
    assert (wide > curve).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": 1.0}, "level is 1.0; it must be between 0 and 1"),
        ({"level": 0.0}, "level is 0.0"),
        ({"min_effect": -0.1}, "min_effect is -0.1; it must be finite and not negative"),
        ({"family": 0}, "family is 0; it must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, words: str) -> None:
    with pytest.raises(LawError, match=words):
        judge(pairs_of([0.1, 0.0], 0.01), **options)


def test_one_seed_and_one_x_are_refused() -> None:
    with pytest.raises(NotEnoughData, match="every pair has seed 3"):
        judge(make_pairs([1, 2, 3], [0.1, 0.0, -0.1], seed=[3, 3, 3]))
    with pytest.raises(NotEnoughData, match="every pair lies at x = 7: what changes along x needs two x or more"):
        judge(make_pairs([7, 7, 7], [0.1, 0.0, -0.1], seed=[0, 1, 2]))


def test_notes_on_the_evidence() -> None:
    full = pairs_of([0.1, 0.0, -0.1], 0.01)
    kept = full.rows(np.arange(5))  # seed 1 lacks the last x
    assert judge(kept, num_draws=20).notes == ("single_seed_points",)
    two = make_pairs(
        np.tile(full.x, 2), np.tile(full.delta, 2), seed=np.tile(full.seed, 2), student=["a"] * 6 + ["b"] * 6
    )
    verdict = judge(two.rows(np.arange(11)), num_draws=20)
    assert set(verdict.notes) == {"incomplete_pairs", "single_seed_points"}
    assert judge(two, num_draws=20).notes == ()
    assert verdict.num_seeds == 2 and judge(two, num_draws=20).points == judge(full, num_draws=20).points


def test_the_unit_of_y_and_x_does_not_matter() -> None:
    pairs = pairs_of([0.06, 0.02, -0.03, -0.06], 0.01)
    one = judge(pairs)
    other = judge(make_pairs(1e6 * pairs.x, 1e4 * pairs.delta, seed=pairs.seed), min_effect=50)
    assert other.kind == one.kind == "crossing" and other.doubt == pytest.approx(one.doubt, rel=1e-3)
    assert other.root == pytest.approx(1e6 * one.root) and other.smallest_effect == pytest.approx(
        1e4 * one.smallest_effect
    )


def test_repeats_that_agree_exactly_are_judged() -> None:
    same = judge(pairs_of([0.0, 0.0, 0.0], 0.0))
    assert (same.kind, same.better, same.smallest_effect) == ("excluded", None, 0)
    exact = judge(pairs_of([0.1, 0.0, -0.1], 0.0))
    assert exact.kind == "crossing" and exact.root == pytest.approx(2000, rel=0.01)


# Doubt, power and more seeds.


def test_doubt_is_the_octaves_of_wrong_advice() -> None:
    assert judge(pairs_of([0.1, 0.1, 0.1], 1e-4)).doubt < 0.02
    pairs = pairs_of([0.02, 0.0, -0.02], 0.01)
    curves = delta_curves(pairs, num_draws=200)
    wrong = [min(np.mean(column > 0), np.mean(column <= 0)) for column in curves.drawn.T]
    steps = np.diff(np.log2(curves.grid))
    by_hand = sum(step * (wrong[i] + wrong[i + 1]) / 2 for i, step in enumerate(steps))
    assert judge(pairs, num_draws=200).doubt == pytest.approx(by_hand)
    assert 0.6 < judge(pairs_of([0.0, 0.0, 0.0], 0.01)).doubt <= 1  # two octaves, either sign as likely


def test_the_band_holds_nine_in_ten_curves_throughout() -> None:
    pairs = pairs_of([0.02, 0.0, -0.02], 0.01)
    drawn = delta_curves(pairs).drawn
    curve = judge(pairs).curve
    inside = ((drawn >= np.array(curve["low"])) & (drawn <= np.array(curve["high"]))).all(axis=1)
    assert inside.mean() == pytest.approx(0.9, abs=0.002)
    assert curve["x"][0] == 1000 and curve["x"][-1] == 4000
    mean = np.array(curve["low"]) + np.array(curve["high"])
    assert mean / 2 == pytest.approx(np.array(curve["delta"]))


def test_the_smallest_effect_is_found_four_times_in_five() -> None:
    verdict = judge(pairs_of([0.02, 0.0, -0.02], 0.01), family=2, num_draws=20)
    critical = stats.t.ppf(0.5 + 0.9 ** (1 / 6) / 2, 3)
    assert stats.nct.sf(critical, 3, verdict.smallest_effect / 0.01) == pytest.approx(0.8, abs=1e-4)


def test_more_seeds_decide_four_times_in_five() -> None:
    pairs = pairs_of([0.06, 0.03, -0.03, -0.06], 0.03)
    verdict = judge(pairs)
    assert verdict.kind == "undecided" and verdict.more_seeds is not None and 3 <= verdict.more_seeds <= 60
    assert 0.74 <= chance_with(pairs, verdict.more_seeds) <= 0.86
    assert chance_with(pairs, verdict.more_seeds // 2) <= 0.7
    assert judge(pairs_of([0.1, 0.05, -0.05, -0.1], 0.01)).more_seeds is None  # decided already
    near = pairs_of([0.001, 0.0, 0.0, 0.001], 0.1)
    assert judge(near, min_effect=0.0001, level=0.99).more_seeds is None  # more than 1,000


def chance_with(pairs: Pairs, total: int) -> float:
    """Share of studies with `total` seeds, the two at hand among them, that decide; truths from the curve."""
    rng, x = np.random.default_rng(9), np.unique(pairs.x)
    sd = delta_points(pairs)[0].stderr * 2**0.5
    decided = []
    for truth in delta_curves(pairs, grid=x, num_draws=400, seed=4).drawn:
        new = truth + sd * rng.standard_normal((total - 2, len(x)))
        delta = np.concatenate([pairs.delta, new.ravel()])
        points = delta_points(make_pairs(np.tile(x, total), delta, seed=np.repeat(np.arange(total), len(x))))
        low, high = (np.array([getattr(p, end) for p in points]) for end in ("low_all", "high_all"))
        decided.append(decide(low, high, 0.005) != "undecided")
    return float(np.mean(decided))


def test_power_by_hand() -> None:
    noise = noise_of(upstream=0.03, finetune=0.1)
    found = power(noise, num_x=5, num_seeds=4, slope=0.02, cost_upstream=9, cost_finetune=1)
    stderr, degrees = (0.0109 / 4) ** 0.5, 7  # 4 of the prior and 3 of its own
    critical = stats.t.ppf(0.5 + 0.9**0.2 / 2, degrees)
    assert stats.nct.sf(critical, degrees, found.smallest_effect / stderr) == pytest.approx(0.8, abs=1e-4)
    assert found.width_octaves == pytest.approx(2 * stats.t.ppf(0.95, 7) * stderr / 2 / 0.02)  # half of it at the root
    assert found.finetunes_for_half == 6  # .0009 + .01/R ≤ .0109/4 from R = 5.5
    assert found.cost_of_finetunes == pytest.approx((9 + 6) / (9 + 1)) and found.best_finetunes == 10
    assert found.seeds_for_half is not None and found.cost_of_seeds == found.seeds_for_half / 4
    for seeds, halved in ((found.seeds_for_half, True), (found.seeds_for_half - 1, False)):
        freedom = min(3 + seeds, 5 * (seeds - 1))
        size = stats.t.ppf(0.5 + 0.9**0.2 / 2, freedom)
        chance = stats.nct.sf(size, freedom, found.smallest_effect / 2 / (0.0109 / seeds) ** 0.5)
        assert (chance >= 0.8) == halved


def test_every_argument_of_power_counts() -> None:
    noise = noise_of(seed=0.02, upstream=0.03, finetune=0.05)
    design = {"num_x": 5, "num_seeds": 4, "slope": 0.02}
    plain = power(noise, **design)
    finer = {"num_seeds": 6, "finetunes": 3, "num_students": 2, "num_labels": 2}
    assert all(power(noise, **(design | {n: v})).smallest_effect < plain.smallest_effect for n, v in finer.items())
    stricter = {"num_x": 7, "level": 0.95, "family": 5}
    assert all(power(noise, **(design | {n: v})).smallest_effect > plain.smallest_effect for n, v in stricter.items())
    steep = power(noise, **(design | {"slope": -0.04}))
    assert steep.width_octaves == pytest.approx(plain.width_octaves / 2)
    assert steep.chance_of_crossing > plain.chance_of_crossing
    wide = power(noise, **design, step_octaves=2)
    assert wide.chance_of_crossing == steep.chance_of_crossing and wide.width_octaves == plain.width_octaves
    assert power(noise, num_x=5, num_seeds=4).width_octaves is None
    assert power(noise, num_x=5, num_seeds=4).chance_of_crossing is None
    assert plain.cost_of_finetunes is None and plain.best_finetunes is None
    assert power(noise_of(upstream=0.1), **design).finetunes_for_half is None
    assert power(noise, num_x=5, num_seeds=600).seeds_for_half is None
    # what a seed carries along x moves the curve as a whole and is not averaged at the root
    shared, own = (power(noise_of(**{name: 0.05}), **design) for name in ("seed", "upstream"))
    assert shared.smallest_effect == own.smallest_effect and shared.width_octaves == pytest.approx(
        2 * own.width_octaves
    )
    with pytest.raises(LawError, match=r"power of 1 seed\(s\) at 5 x"):
        power(noise, num_x=5, num_seeds=1)
    with pytest.raises(LawError, match="level is 2"):
        power(noise, num_x=5, num_seeds=2, level=2)


# Fast calibration: the slow one is tests/bench/bench_verdicts.py.


def studies(truth, count: int, seeds: int, sd: float = 0.02, first: int = 0):
    """Verdicts of simulated studies: Student's t noise with a part that all x of a seed share."""
    x = np.geomspace(1e3, 3.2e4, 6)
    for number in range(count):
        rng = np.random.default_rng([first, number])
        noise = sd * np.sqrt(3 / 5) * (0.5 * rng.standard_t(5, (seeds, 1)) + 0.866 * rng.standard_t(5, (seeds, 6)))
        delta = truth(np.log2(x / 1e3)) + noise
        yield judge(make_pairs(np.tile(x, seeds), delta.ravel(), seed=np.repeat(np.arange(seeds), 6)), num_draws=200)


def test_crossings_are_found_as_often_as_power_promises_and_their_intervals_hold() -> None:
    slope = 0.02
    found = [v for v in studies(lambda o: slope * (2.5 - o), 150, seeds=3)]
    crossing = [v for v in found if v.kind == "crossing"]
    promise = power(noise_of(seed=0.01, upstream=0.01732), num_x=6, num_seeds=3, slope=slope)
    assert promise.chance_of_crossing is not None and 0.2 < promise.chance_of_crossing < 0.9
    assert len(crossing) / len(found) == pytest.approx(promise.chance_of_crossing, abs=0.1)
    root = 1e3 * 2**2.5
    held = np.mean([v.interval[0] <= root <= v.interval[1] for v in crossing])
    assert 0.82 <= held <= 0.99
    width = np.mean([np.log2(v.interval[1] / v.interval[0]) for v in crossing])
    assert promise.width_octaves is not None and 0.7 <= width / promise.width_octaves <= 1.2


@pytest.mark.parametrize("truth", [lambda o: 0 * o, lambda o: 0.06 * 2.0**-o, lambda o: 0 * o - 0.03])
def test_crossings_are_not_invented(truth) -> None:
    verdicts = list(studies(truth, 100, seeds=3))
    assert sum(v.kind == "crossing" for v in verdicts) <= 4
    wrong = [
        v
        for v in verdicts
        if any(p.low_all > 0 > t or p.high_all < 0 < t for p, t in zip(v.points, truth(np.arange(6.0)), strict=True))
    ]
    assert len(wrong) <= 8


def test_disjoint_seeds_do_not_contradict_each_other() -> None:
    pairs = zip(*(studies(lambda o: 0.02 * (2.5 - o), 100, seeds=3, first=k) for k in (1, 2)), strict=True)
    assert sum(contradict(one, other) for one, other in pairs) <= 5


def contradict(one: Verdict, other: Verdict) -> bool:
    if any(
        (p.low_all > 0 and q.high_all < 0) or (p.high_all < 0 and q.low_all > 0)
        for p, q in zip(one.points, other.points, strict=True)
    ):
        return True
    kinds = {one.kind, other.kind}
    if kinds == {"crossing"}:
        return one.interval[0] > other.interval[1] or one.interval[1] < other.interval[0]
    return "crossing" in kinds and bool(kinds & {"one_sign", "excluded"})


def test_an_equal_fixed_grid_needs_more_seeds_for_more_noise_and_none_for_no_verdict() -> None:
    xs, rng = [1000.0, 2000.0, 4000.0, 8000.0], np.random.default_rng(7)
    delta = np.repeat(0.05 * np.log2(2900.0 / np.array(xs)), 6) + 0.01 * rng.standard_normal(24)
    verdict = judge(make_pairs(np.repeat(xs, 6), delta, seed=list(range(6)) * 4))
    few, many = equal_grid(verdict, 0.01, xs), equal_grid(verdict, 0.03, xs)
    assert few is not None and many is not None
    assert 2 <= few <= 8
    assert few * 5 <= many <= few * 12  # nine times the variance, and fewer degrees of freedom for few
    assert equal_grid(verdict, 0.2, xs) == pytest.approx(many * (0.2 / 0.03) ** 2, rel=0.2)
    assert equal_grid(verdict, 0.22, xs) is None  # more than 1,000
    assert equal_grid(verdict, 0.01, [1000.0, 2000.0]) is None  # all on one side of the root
    assert equal_grid(replace(verdict, kind="undecided"), 0.01, xs) is None


@pytest.mark.parametrize(
    ("delta", "sd", "level"), [(0.0, 0.01, 0.9), (0.002, 0.01, 0.9), (-0.002, 0.01, 0.9), (0.002, 0.02, 0.8)]
)
def test_a_fixed_grid_excludes_an_effect_with_as_many_seeds_as_its_interval_asks(
    delta: float, sd: float, level: float
) -> None:
    """At one x, t·sd/√n < δ + |Δ| with δ = .005 and n − 1 degrees of freedom: then one sign is excluded."""
    verdict = judge(pairs_of([delta, delta], 1e-5), level=level)
    verdict = replace(verdict, curve={"x": [1000.0, 2000.0], "delta": [delta, delta]})
    assert verdict.kind == "excluded" and verdict.root is None
    wanted = next(n for n in range(2, 999) if stats.t.ppf(0.5 + level / 2, n - 1) * sd / n**0.5 < 0.005 + abs(delta))
    assert equal_grid(verdict, sd, [1500.0]) == wanted
    family = replace(verdict, family=5)
    assert equal_grid(family, sd, [1500.0]) == wanted, "each verdict is compared by itself"
