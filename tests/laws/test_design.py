"""Choosing the next wave: gains against formulas and loops written out, prices, what is pending, and when to stop."""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from dbscale.laws import LawError, Pairs, judge, make_pairs
from dbscale.laws import design as room
from dbscale.laws.design import (
    Belief,
    Offer,
    Target,
    choose_wave,
    doubt_left,
    looking_level,
    make_belief,
    why_stop,
)

XS = np.array([1000.0, 2000.0, 4000.0, 8000.0])


def falling(counts: dict[float, int], *, slope: float = 0.05, root: float = 2900.0, sd: float = 0.01) -> Pairs:
    """Δ that falls by `slope` an octave through 0 at `root`, with noise."""
    rng = np.random.default_rng(7)
    places = [(x, seed) for x, count in counts.items() for seed in range(count)]
    x, seed = zip(*places, strict=True)
    delta = [slope * math.log2(root / each) + sd * rng.standard_normal() for each in x]
    return make_pairs(x, delta, seed=seed)


def offers(cost: Any = lambda x: x / 1000, *, num: int = 8, xs: Any = XS) -> list[Offer]:
    return [Offer(x, ("t",), tuple({f"{x:g}/{k}": cost(x)} for k in range(num))) for x in xs.tolist()]


# --- gains ----------------------------------------------------------------------------------------------------------


def two_curves(d: float = 0.3, sd: float = 0.5, m: int = 4000) -> Belief:
    """Either +d or −d over two octaves, each as likely: the textbook's two hypotheses."""
    drawn = np.repeat([[d], [-d]], 3, axis=1)
    error = np.random.default_rng(0).standard_normal((2, m, 3))
    return Belief(
        x=XS[:3], octaves=np.array([0.5, 1.0, 0.5]), positive=(drawn > 0).astype(np.float32), drawn=drawn,
        true=np.arange(m) % 2, variance=np.full(3, sd**2), count=np.ones(3), total=np.zeros((m, 3)),
        shared=np.zeros(3), error=error, min_effect=0.005, level=0.95,
    )  # fmt: skip


@pytest.mark.parametrize("num", [1, 2, 4])
def test_the_gain_between_two_hypotheses_is_that_of_the_best_decision(num: int) -> None:
    """J before is half the range; after n pairs the expected share of wrong advice is Bayes' error Φ(−d√n/sd)."""
    belief = two_curves()
    assert belief.now[0] == pytest.approx(1.0)  # two octaves, one in two wrong
    doubt, _ = belief.gain(2000.0, num)
    after = 2 * NormalDist().cdf(-0.3 * num**0.5 / 0.5)
    assert doubt == pytest.approx(1.0 - after, abs=0.02)


def test_what_is_expected_leaves_less_to_gain_as_the_formula_has_it() -> None:
    belief = two_curves()
    belief.expect(1000.0, 1)
    assert belief.now[0] == pytest.approx(2 * NormalDist().cdf(-0.3 / 0.5), abs=0.02)
    assert belief.gain(2000.0, 1)[0] == pytest.approx(
        belief.now[0] - 2 * NormalDist().cdf(-0.3 * 2**0.5 / 0.5), abs=0.02
    )
    assert belief.count_at(1000.0) == 2
    assert belief.count_at(2000.0) == 1


def loops(belief: Belief, k: int, num: int) -> float:
    """E J' for `num` pairs at place k, written out."""
    total = 0.0
    for m, s in enumerate(belief.true):
        seen = belief.drawn[s, k] + math.sqrt(belief.variance[k] / num) * belief.error[0, m, k]
        weights = [math.exp(-((seen - y) ** 2) * num / (2 * belief.variance[k])) for y in belief.drawn[:, k]]
        for g, octaves in enumerate(belief.octaves):
            p = sum(w for w, above in zip(weights, belief.positive[:, g], strict=True) if above) / sum(weights)
            total += octaves * min(p, 1 - p)
    return total / len(belief.true)


def test_the_choice_of_a_wave_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Posterior, imagined outcomes, reweighting and price of every step, by loops; the dearest doubt per cost leads."""
    monkeypatch.setattr(room, "NUM_CURVES", 40)
    monkeypatch.setattr(room, "NUM_FANTASIES", 10)
    target = Target("t", falling({1000.0: 2, 2000.0: 2, 8000.0: 2}, sd=0.04))
    belief = make_belief(target, XS, 0.95)
    assert belief is not None
    score = {}
    for k, x in enumerate(XS.tolist()):
        for num in (1, 2, 4):
            doubt, verdict = belief.gain(x, num)
            assert doubt == pytest.approx(belief.now[0] - loops(belief, k, num), abs=1e-5)
            score[x, num] = (doubt + verdict) / (num * x / 1000)
    best = max(score, key=score.__getitem__)
    (first, *_) = choose_wave([target], offers(), num_pairs=4)
    assert (XS[first.offer], first.num_pairs) == best
    assert first.gain == pytest.approx(score[best] * first.cost)
    assert first.cost == best[0] / 1000 * best[1]


def test_a_stricter_level_leaves_a_verdict_lacking_more() -> None:
    target = Target("t", falling({1000.0: 2, 2000.0: 2, 8000.0: 2}, sd=0.08))
    lax, strict = (make_belief(target, XS, level) for level in (0.9, 0.99))
    assert lax is not None and strict is not None
    assert lax.now[0] == strict.now[0] and lax.now[1] < strict.now[1]
    choices = [choose_wave([target], offers(), num_pairs=4, level=level) for level in (0.9, 0.99)]
    assert [c.gain for c in choices[0]] != [c.gain for c in choices[1]]


def test_what_a_verdict_lacks_by_hand() -> None:
    """Two x with four pairs each of sd 1: half-widths t(.9747, 6 degrees)·1/2, Šidák over two x at .95."""
    from scipy.stats import t

    half = t.ppf(0.5 + 0.95**0.5 / 2, 6) / 2
    belief = two_curves(m=2)
    belief.variance, belief.min_effect = np.ones(3), 0.1
    count = np.array([4.0, 0.0, 4.0])
    total = np.array([[8.0, 0.0, -8.0], [0.5 * half * 4, 0.0, -0.25 * half * 4]])
    lacking = belief._lacking(total, count)  # pyright: ignore[reportPrivateUsage]
    # first study: both signs at 2.0 > half; second: half and a quarter of what each side needs
    no_harm = ((1 - min(1, 0.1 / half + 0.5)) + (1 - (0.1 / half - 0.25))) / 2
    assert lacking[0] == 0
    assert lacking[1] == pytest.approx(min((0.5 + 0.75) / 2, no_harm), abs=1e-6)
    # test images add a variance that four pairs do not lessen: half-widths √(1/4 + 3/4), twice as wide
    belief.shared = np.full(3, 0.75)
    assert belief._lacking(total, count)[1] == pytest.approx((0.75 + 0.875) / 2, abs=1e-6)  # pyright: ignore[reportPrivateUsage]
    # without the end of the range there is no sign throughout: the unseen end lacks all
    belief.shared, count[2], total[:, 2] = np.zeros(3), 0.0, 0.0
    alone = belief._lacking(total, count)  # pyright: ignore[reportPrivateUsage]
    assert alone[0] == 0.5  # positive is established, negative not at all; or half of the ends


# --- the wave -------------------------------------------------------------------------------------------------------


def test_the_start_is_two_pairs_at_three_cheap_x() -> None:
    xs = 1000 * 2.0 ** np.arange(8)
    chosen = choose_wave([Target("t", None)], offers(xs=xs), num_pairs=8)
    assert [(xs[c.offer], c.num_pairs, c.reason, c.gain) for c in chosen] == [
        (1000, 2, "start", None), (2000, 2, "start", None), (4000, 2, "start", None),
    ]  # fmt: skip
    flat = choose_wave([Target("t", None)], offers(lambda x: 1.0, xs=xs), num_pairs=8)
    assert [xs[c.offer] for c in flat] == [1000, 16000, 128000]  # where x costs nothing, the whole range


def test_the_start_makes_up_for_what_it_lacks_and_counts_what_is_under_way() -> None:
    target = Target("t", falling({1000.0: 1}))
    chosen = choose_wave([target], offers(), num_pairs=8, pending={("t", 2000.0): 2})
    assert [(XS[c.offer], c.num_pairs) for c in chosen] == [(1000, 1), (4000, 2)]


def test_a_wave_is_full_and_never_fuller() -> None:
    target = Target("t", falling({1000.0: 2, 2000.0: 2, 8000.0: 2}, sd=0.05))
    for size in (1, 3, 8):
        assert sum(c.num_pairs for c in choose_wave([target], offers(), num_pairs=size)) == size


def test_equal_input_gives_equal_waves_and_another_seed_other_draws() -> None:
    target = Target("t", falling({1000.0: 2, 2000.0: 2, 8000.0: 2}, sd=0.05))
    one, again = (choose_wave([target], offers(), num_pairs=8) for _ in range(2))
    assert one == again
    other = choose_wave([target], offers(), num_pairs=8, seed=1)
    assert [c.gain for c in other] != [c.gain for c in one]


def test_the_budget_is_never_passed() -> None:
    target = Target("t", falling({1000.0: 2, 2000.0: 2, 8000.0: 2}, sd=0.05))
    chosen = choose_wave([target], offers(), num_pairs=8, most_cost=5.0)
    assert chosen
    assert sum(c.cost for c in chosen) <= 5.0
    assert choose_wave([target], offers(), num_pairs=8, most_cost=0.99) == ()


def test_dear_places_are_passed_over_for_cheap_ones_that_tell_as_much() -> None:
    target = Target("t", falling({1000.0: 2, 2000.0: 2, 8000.0: 2}, sd=0.05))
    near = choose_wave([target], offers(), num_pairs=1)[0].offer
    dear = choose_wave([target], offers(lambda x: 1e6 if x == XS[near] else x / 1000), num_pairs=1)
    assert dear[0].offer != near


def test_pending_pairs_are_counted_as_coming() -> None:
    target = Target("t", falling({1000.0: 2, 2000.0: 2, 8000.0: 2}, sd=0.05))
    free = choose_wave([target], offers(), num_pairs=2)
    place = free[0].offer
    held = choose_wave([target], offers(), num_pairs=2, pending={("t", XS[place]): 16})
    assert held[0].gain is not None and free[0].gain is not None
    assert (held[0].offer, held[0].num_pairs) != (place, free[0].num_pairs) or held[0].gain < free[0].gain
    other = choose_wave([target], offers(), num_pairs=2, pending={("another", XS[place]): 16})
    assert other == free


def test_a_run_that_two_targets_share_is_paid_for_once() -> None:
    pairs = falling({1000.0: 2, 2000.0: 2, 8000.0: 2}, sd=0.05)
    targets = [Target("one", pairs), Target("two", replace(pairs, delta=pairs.delta * 0.9))]
    both = [
        Offer(2000.0, (name,), ({"upstream": 10.0, name: 1.0},)) for name in ("one", "two")
    ]  # fmt: skip
    chosen = choose_wave(targets, both, num_pairs=2)
    assert [c.cost for c in chosen] == [11.0, 1.0]
    together = choose_wave(targets, [Offer(2000.0, ("one", "two"), ({"upstream": 10.0, "one": 1.0, "two": 1.0},))],
                           num_pairs=2)  # fmt: skip
    assert [c.cost for c in together] == [12.0]
    assert together[0].gain == pytest.approx(sum(c.gain or 0 for c in chosen))


def test_reasons_say_why() -> None:
    target = Target("t", falling({1000.0: 2, 2000.0: 2, 8000.0: 2}, sd=0.05))
    for choice in choose_wave([target], offers(), num_pairs=8):
        new = XS[choice.offer] == 4000.0
        assert (choice.reason == "explore") <= new
    # both signs are plain to see on the curve, but one pair each establishes nothing
    sure = Target("t", falling({1000.0: 2, 2000.0: 1, 8000.0: 1}, sd=0.015, slope=0.06))
    assert {c.reason for c in choose_wave([sure], offers(), num_pairs=4)} & {"establish"}


def test_a_candidate_of_an_unknown_target_is_refused() -> None:
    with pytest.raises(LawError, match=r"measure 't', which is no target; the targets: \['other'\]"):
        choose_wave([Target("other", None)], offers(), num_pairs=1)


def test_no_candidates_no_wave() -> None:
    assert choose_wave([Target("t", falling({1000.0: 2, 2000.0: 2}))], [], num_pairs=4) == ()
    assert choose_wave([Target("t", None)], offers(num=0), num_pairs=4) == ()


# --- stopping -------------------------------------------------------------------------------------------------------


def test_the_level_of_looking_halves_the_error() -> None:
    assert looking_level(0.9) == pytest.approx(0.95)
    assert looking_level(0.5) == pytest.approx(0.75)


def test_several_targets_share_the_error_by_sidak() -> None:
    """Two verdicts that both hold with .95: each with √.95 = .97468; four of them: .95^¼ = .98726."""
    assert looking_level(0.9, 2) == pytest.approx(0.974679, abs=1e-6)
    assert looking_level(0.9, 4) == pytest.approx(0.987259, abs=1e-6)
    pairs = falling(dict.fromkeys(XS.tolist(), 4))
    own, family = judge(pairs, level=looking_level(0.9, 3)), judge(pairs, level=0.95, family=3)
    assert [(p.low_all, p.high_all) for p in own.points] == [
        pytest.approx((p.low_all, p.high_all)) for p in family.points
    ]
    assert own.interval is not None and family.interval is not None
    assert (
        own.interval[0] < family.interval[0] and family.interval[1] < own.interval[1]
    )  # the root's is simultaneous, too


def test_a_crossing_stops_at_its_width() -> None:
    verdict = judge(falling(dict.fromkeys(XS.tolist(), 6)))
    assert verdict.kind == "crossing" and verdict.interval is not None
    octaves = math.log2(verdict.interval[1] / verdict.interval[0])
    wide = (1.0, 1e9)
    assert why_stop(verdict, wide, target_octaves=octaves + 1e-9) == "crossing"
    assert why_stop(verdict, wide, target_octaves=octaves - 1e-9) is None
    assert why_stop(verdict, (1000.0, 8000.0), target_octaves=octaves - 1e-9, least_doubt=1.0) == "doubt"
    assert why_stop(verdict, (1000.0, 8001.0), target_octaves=octaves - 1e-9, least_doubt=1.0) is None
    assert why_stop(verdict, (999.0, 8000.0), target_octaves=octaves - 1e-9, least_doubt=1.0) is None


@pytest.mark.parametrize(("kind", "delta", "effect"), [("one_sign", 0.1, 0.005), ("excluded", 0.0, 0.03)])
def test_other_verdicts_count_once_both_ends_were_measured(kind: str, delta: float, effect: float) -> None:
    rng = np.random.default_rng(3)
    pairs = make_pairs(np.repeat(XS, 6), delta + 0.01 * rng.standard_normal(24), seed=list(range(6)) * 4)
    verdict = judge(pairs, min_effect=effect)
    assert verdict.kind == kind
    assert why_stop(verdict, (1000.0, 8000.0), target_octaves=4.0) == kind
    assert why_stop(verdict, (1000.0, 8001.0), target_octaves=4.0) is None


def test_one_sign_waits_while_doubt_lies_between_the_measured_x() -> None:
    rng = np.random.default_rng(3)
    pairs = make_pairs(np.repeat(XS, 6), 0.1 + 0.01 * rng.standard_normal(24), seed=list(range(6)) * 4)
    verdict = replace(judge(pairs), doubt=0.5)
    assert why_stop(verdict, (1000.0, 8000.0), target_octaves=1.0) == "one_sign"
    assert why_stop(verdict, (1000.0, 8000.0), target_octaves=0.99) is None


def test_the_benchmark_ends_studies_where_their_verdicts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for intervals before it asks for a verdict, which is most of its time; both ways end alike."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    bench = importlib.import_module("bench_hunt")
    noise, ends = 0.02 * np.random.default_rng(5).standard_normal((20, 4)), []
    for shape, seeds in itertools.product(("crossing", "hump", "constant", "zero"), (2, 4, 8, 16)):
        world = bench.make_world(shape, 5, [noise])
        pairs = bench.measure(world, dict.fromkeys(bench.GRID_X, seeds))
        verdict = judge(pairs, min_effect=bench.MIN_EFFECT, level=0.95, num_draws=400)
        plain = why_stop(verdict, (bench.GRID_X[0], bench.GRID_X[-1]), target_octaves=bench.TARGET_OCTAVES)
        assert bench.stop_of(pairs, bench.GRID_X, 0.9) == plain
        ends.append(plain)
    assert {None, "crossing"} < {*ends}


def test_doubt_runs_over_the_whole_range() -> None:
    target = Target("t", falling({1000.0: 6, 2000.0: 6}, sd=0.02))
    assert doubt_left(Target("t", None), XS.tolist()) is None
    near, far = doubt_left(target, [1000.0, 2000.0]), doubt_left(target, [1000.0, 64000.0])
    assert near is not None and far is not None
    assert near < 0.2 < far < 6
