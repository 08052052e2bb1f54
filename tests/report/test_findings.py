"""Verdicts of a study, worked out by hand; what a reader is warned of; findings that are kept until something changes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbscale.laws import fit_noise, make_pairs, power
from dbscale.report import findings as findings_module
from dbscale.report import schema, words
from dbscale.report.findings import Findings, Options, contrast, digest, find, refresh_table
from dbscale.report.pairing import pair_arms
from dbscale.report.schema import BoundaryFile, LawsFile
from dbscale.report.table import MissingPoint, Run, RunTable, Setting, read_table, to_csv

STUDY = Path(__file__).parents[2] / "docs" / "studies" / "cifar10"
FAST = Options(num_draws=200, num_resamples=20)
SIZES = (1000, 2000, 4000, 8000)
DELTAS = {1000: 0.06, 2000: 0.04, 4000: -0.04, 8000: -0.06}
"""ΔE of the study below: distilling helps up to a place between 2,000 and 4,000."""
JITTER = (-0.002, 0.002, -0.001, 0.001)
"""Of ΔE by seed: sums to 0, so that means over seeds are the numbers above."""


def run(arm: str, upstream: int, error: float, **fields: Any) -> Run:
    names = {"variant": "base", "student": "h2", "num_params": 5000, "upstream_dataset": "fractals", "dataset": "digits",
             "downstream_samples": 100, "seed": 0, "num_test_samples": 10_000}  # fmt: skip
    key = "-".join(map(str, (arm, upstream, *fields.values())))
    return Run(**(names | {"arm": arm, "upstream_samples": upstream, "error_rate": error, "key": key} | fields))


def study(
    *,
    sign: float = 1.0,
    seeds: int = 4,
    students=("h2",),
    labels=(100,),
    sizes=SIZES,
    datasets=("digits",),
    **fields: Any,
) -> RunTable:
    """Plain error .4, distilled .4 − ΔE; the second label count doubles ΔE."""
    runs = []
    for size in sizes:
        for seed in range(seeds):
            for student in students:
                for place, count in enumerate(labels):
                    delta = sign * (1 + place) * (DELTAS[size] + JITTER[seed % 4])
                    for dataset in datasets:
                        at = {"student": student, "downstream_samples": count, "seed": seed, "dataset": dataset}
                        runs += [
                            run("plain", size, 0.4, **at, **fields),
                            run("distilled", size, 0.4 - delta, **at, **fields),
                        ]
    return RunTable(tuple(runs), grid="tiny", question="Does it pay?")


@pytest.fixture(scope="module")
def found() -> Findings:
    return find(study(labels=(100, 1000)), options=FAST, source="mark")


def verdict_of(findings: Findings, number: int = 0):
    verdict = findings.boundary.contrasts[number].verdict
    assert verdict is not None
    return verdict


def test_the_main_verdict_is_that_of_the_pooled_differences(found: Findings):
    main = found.boundary.contrasts[0]
    assert main.main and main.pooled and (main.dataset, main.metric, main.a, main.b) == (
        "digits", "error_rate", "plain", "distilled")  # fmt: skip
    verdict = verdict_of(found)
    # Pooled over 100 and 1,000 labels ΔE is (1 + 2)/2 of the numbers above, and so is its jitter.
    assert [point.delta for point in verdict.points] == pytest.approx([0.09, 0.06, -0.06, -0.09])
    assert verdict.points[0].by_seed == pytest.approx((0.087, 0.093, 0.0885, 0.0915))
    assert (verdict.kind, verdict.direction, verdict.num_seeds) == ("crossing", "b_to_a", 4)
    assert verdict.root is not None and 2000 < verdict.root < 4000
    assert found.boundary.answers[0].startswith("On digits: distillation gives the lower error up to about 2,")


def with_controls(gain_at_equal_cost: float, gain_of_equal_size: float) -> RunTable:
    """The study above, its plain arm also at equal cost, and with a teacher of equal size; both gains alike at all D_p."""
    table = study(labels=(100, 1000))
    more = [
        replace(each, arm=arm, error_rate=each.error_rate - gain - JITTER[each.seed], key=f"{arm}-{each.key}")
        for each in table.where(arm="plain")
        for arm, gain in (("plain_matched", gain_at_equal_cost), ("self_distilled", gain_of_equal_size))
    ]
    runs = [replace(each, upstream_error_rate=each.error_rate) for each in (*table.runs, *more)]
    return replace(table, runs=tuple(runs))


def test_controls_are_judged_pooled_after_the_main_arms():
    findings = find(with_controls(0.02, 0.05), options=FAST)
    seen = [(each.a, each.b, each.metric, each.student) for each in findings.boundary.contrasts]
    own = [("plain", "distilled", "error_rate", student) for student in (None, "h2", "h2")]
    assert seen[:4] == [*own, ("plain", "distilled", "upstream_error_rate", None)]
    assert seen[4:] == [
        (a, b, metric, None)
        for a, b in (("plain_matched", "distilled"), ("plain", "self_distilled"))
        for metric in ("error_rate", "upstream_error_rate")
    ]
    matched, by_self = (verdict_of(findings, number) for number in (4, 6))
    # Pooled ΔE of the main arms is .09, .06, −.06, −.09; at equal cost the plain arm takes .02 off.
    assert [point.delta for point in matched.points] == pytest.approx([0.07, 0.04, -0.08, -0.11])
    assert [point.delta for point in by_self.points] == pytest.approx([0.05] * 4)
    assert (matched.kind, by_self.kind, by_self.better) == ("crossing", "one_sign", "b")
    told = {each.partition(":")[0]: each for each in findings.boundary.answers}
    assert "plain pretraining at equal cost does" in told[
        "On digits (plain pretraining at equal cost against distillation)"]  # fmt: skip
    assert "distillation from a teacher of equal size gives the lower error" in told[
        "On digits (plain pretraining against distillation from a teacher of equal size)"]  # fmt: skip
    assert {law.arm for law in findings.laws.laws} == {"plain", "distilled", "plain_matched", "self_distilled"}


def test_controls_leave_the_main_verdict_alone(found: Findings):
    main = verdict_of(find(with_controls(0.02, 0.05), options=FAST))
    assert main == verdict_of(found), "it is no part of the family"


def test_arms_the_other_way_round_turn_the_verdict_round():
    verdict = verdict_of(find(study(sign=-1.0), options=FAST))
    assert [point.delta for point in verdict.points] == pytest.approx([-0.06, -0.04, 0.04, 0.06])
    assert (verdict.kind, verdict.direction) == ("crossing", "a_to_b")


def test_every_student_and_label_count_is_judged_and_shares_the_family(found: Findings):
    contrasts = found.boundary.contrasts
    assert [(each.student, each.downstream_samples) for each in contrasts] == [(None, None), ("h2", 100), ("h2", 1000)]
    assert [verdict_of(found, number).family for number in range(3)] == [1, 2, 2]
    assert [point.delta for point in verdict_of(found, 2).points] == pytest.approx([0.12, 0.08, -0.08, -0.12])
    assert [each.main for each in contrasts] == [True, False, False]


def test_targets_of_a_hunt_are_judged_outside_the_family():
    """Their number is in the level already; the other four verdicts share a family."""
    table = study(labels=(100, 1000), datasets=("digits", "birds"))

    def families(*targets: str) -> list[int]:
        findings = find(replace(table, targets=targets), options=FAST)
        return [verdict_of(findings, number).family for number in range(6)]

    assert families() == [1, 5, 5, 5, 5, 5]
    assert families("digits", "birds") == [1, 4, 4, 1, 4, 4]
    assert families("birds h2 100", "birds h2 1000") == [1, 3, 3, 3, 1, 1]
    assert digest(table, FAST) != digest(replace(table, targets=("birds",)), FAST)


def test_a_family_of_more_questions_has_wider_intervals():
    one, many = (find(study(labels=labels), options=FAST) for labels in ((100,), (100, 1000, 3000)))
    assert verdict_of(one).family == 1 and verdict_of(many, 1).family == 3
    first, same = verdict_of(one).points[0], verdict_of(many, 1).points[0]
    assert first.delta == pytest.approx(same.delta)
    assert same.high_all - same.low_all > first.high_all - first.low_all
    assert same.high - same.low == pytest.approx(first.high - first.low)


def test_test_loss_and_upstream_error_have_verdicts_of_their_own():
    table = study(seeds=2)
    runs = tuple(
        replace(r, test_loss=10 * r.error_rate, upstream_error_rate=r.error_rate / 2, upstream_key=f"up-{r.key}")
        for r in table
    )
    findings = find(replace(table, runs=runs), options=FAST)
    error, loss, upstream = (findings.boundary.contrasts[i].verdict for i in range(3))
    assert error is not None and loss is not None and upstream is not None
    assert [c.metric for c in findings.boundary.contrasts] == ["error_rate", "test_loss", "upstream_error_rate"]
    assert findings.boundary.contrasts[2].dataset == "fractals"
    assert [p.delta for p in loss.points] == pytest.approx([10 * p.delta for p in error.points])
    assert [p.delta for p in upstream.points] == pytest.approx([p.delta / 2 for p in error.points])
    # δ of a loss is the same share of its mean: 10 times that of the error, .005.
    assert (error.min_effect, loss.min_effect, upstream.min_effect) == pytest.approx((0.005, 0.05, 0.005))
    assert (loss.family, upstream.family) == (2, 2)


def test_the_first_downstream_set_of_the_grid_is_the_main_one():
    contrasts = find(study(datasets=("zebras", "ants"), seeds=2), options=FAST).boundary.contrasts
    assert [(each.dataset, each.main) for each in contrasts] == [("zebras", True), ("ants", False)]


def test_options_reach_the_verdict():
    wide = verdict_of(find(study(), options=replace(FAST, level=0.99, min_effect=0.02)))
    narrow = verdict_of(find(study(), options=FAST))
    assert (wide.level, wide.min_effect) == (0.99, 0.02)
    assert wide.points[0].high - wide.points[0].low > narrow.points[0].high - narrow.points[0].low


def test_halves_are_every_other_seed_and_are_held_against_each_other():
    """Two seeds at each end differ by .2 in ΔE: seeds 0 and 2 lie near .1, seeds 1 and 3 near −.1 at x = 1."""
    x, seeds = np.repeat([1.0, 2.0], 4), np.tile([0, 1, 2, 3], 2)
    delta = np.array([0.101, -0.1, 0.099, -0.102, 0.01, -0.01, -0.012, 0.011])
    record = contrast(make_pairs(x, delta, seed=seeds), {"dataset": "digits"}, "error_rate", FAST)
    assert record.main is False, "a contrast by itself is no study's one question"
    assert [half.seeds for half in record.halves] == [("0", "2"), ("1", "3")]
    assert [half.verdict.points[0].delta for half in record.halves] == pytest.approx([0.1, -0.101])
    assert [half.verdict.num_seeds for half in record.halves] == [2, 2]
    assert all(half.verdict.curve == {} for half in record.halves)
    # At x = 1 the means lie .201 apart, far beyond any interval; at x = 2 .0015, well within.
    assert record.held == 0.5
    assert contrast(make_pairs(x[:7], delta[:7], seed=seeds[:7] % 3 + [0] * 7, draw=range(7)),
                    {"dataset": "digits"}, "error_rate", FAST).halves == ()  # fmt: skip


def test_power_and_noise_come_with_a_verdict(found: Findings):
    main = found.boundary.contrasts[0]
    assert main.noise is not None and main.power is not None
    assert sum(part.share for part in main.noise.components) == pytest.approx(1)
    assert main.power.width_octaves is not None and main.power.width_octaves > 0
    assert main.power.seeds_for_half is None or main.power.seeds_for_half > 4


def test_power_is_that_of_the_design_and_of_the_slope_at_the_root(found: Findings):
    """Four D_p an octave apart, four seeds, one student, two label counts; Δ falls by .12 between 2,000 and 4,000."""
    main = found.boundary.contrasts[0]
    pairs, _ = pair_arms(study(labels=(100, 1000)), Setting("base", "fractals", "digits"))
    assert pairs is not None and main.power is not None
    noise = fit_noise(pairs)
    assert noise is not None
    design = {"num_x": 4, "num_seeds": 4, "num_students": 1, "num_labels": 2, "finetunes": 1}
    wanted = power(noise, **design, level=0.9, family=1, slope=-0.12, step_octaves=1.0)
    assert main.power.smallest_effect == pytest.approx(wanted.smallest_effect)
    assert main.power.seeds_for_half == wanted.seeds_for_half
    assert main.power.width_octaves == pytest.approx(wanted.width_octaves, rel=0.2)
    single = found.boundary.contrasts[1].power
    part = fit_noise(pairs.of("h2", 100))
    assert part is not None and single is not None
    one = power(part, **design | {"num_labels": 1}, level=0.9, family=2)
    assert single.smallest_effect == pytest.approx(one.smallest_effect)


def test_the_design_whose_power_is_asked_is_that_of_the_pairs(monkeypatch: pytest.MonkeyPatch):
    """Five D_p over four octaves; three students, two label counts, two draws of each finetune."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(findings_module, "power", lambda noise, **design: asked.append(design))
    sizes, seeds = np.array([100.0, 200.0, 400.0, 800.0, 1600.0]), range(4)
    rows = list(itertools.product(sizes, seeds, ("s", "t", "u"), (10, 20), (0, 1)))
    x, seed, student, labels, draw = zip(*rows, strict=True)
    # Δ falls by .04 an octave through 0 at 400; seeds and draws scatter evenly around that.
    delta = [-0.04 * np.log2(at / 400) + 0.002 * (s - 1.5) + 0.001 * (2 * d - 1) for at, s, _, _, d in rows]
    pairs = make_pairs(x, delta, seed=seed, student=student, labels=labels, draw=draw)
    record = contrast(pairs, {"dataset": "digits"}, "error_rate", replace(FAST, level=0.8), family=3)
    (design,) = asked
    assert record.power is None and record.verdict is not None and record.verdict.kind == "crossing"
    assert design.pop("slope") == pytest.approx(-0.04, rel=0.05)
    assert design == {"num_x": 5, "num_students": 3, "num_labels": 2, "finetunes": 2, "num_seeds": 4, "level": 0.8,
                      "family": 3, "step_octaves": 1.0}  # fmt: skip


def test_parts_of_a_contrast_have_no_halves():
    """Of the upstream contrast, too, whose parts are students alone."""
    table = study(students=("h2", "h3"), upstream_error_rate=0.5)
    contrasts = find(table, options=FAST).boundary.contrasts
    assert [(each.metric, each.student, len(each.halves)) for each in contrasts] == [
        ("error_rate", None, 2), ("error_rate", "h2", 0), ("error_rate", "h3", 0),
        ("upstream_error_rate", None, 2), ("upstream_error_rate", "h2", 0), ("upstream_error_rate", "h3", 0),
    ]  # fmt: skip


def test_three_seeds_have_no_halves_and_four_do():
    assert [len(find(study(seeds=n), options=FAST).boundary.contrasts[0].halves) for n in (3, 4)] == [0, 2]


def test_pairs_that_lack_a_stratum_are_counted():
    table = study(labels=(100, 1000))
    runs = tuple(
        r for r in table if (r.arm, r.upstream_samples, r.downstream_samples, r.seed) != ("plain", 1000, 100, 0)
    )
    findings = find(replace(table, runs=runs), options=FAST)
    assert findings.boundary.contrasts[0].num_incomplete == 1
    assert [note.code for note in findings.boundary.notes] == ["incomplete_pairs"]
    assert (
        findings.boundary.notes[0].text
        == "On digits 1 incomplete sets of pairs are left out of the pooled means of error."
    )


def test_no_sentence_of_a_page_stands_twice():
    """Error and test loss lack the same pair: each note names its metric, and nothing else tells them apart."""
    table = study(labels=(100, 1000))
    kept = (r for r in table if (r.arm, r.upstream_samples, r.downstream_samples, r.seed) != ("plain", 1000, 100, 0))
    found = find(replace(table, runs=tuple(replace(r, test_loss=3 * r.error_rate) for r in kept)), options=FAST)
    main = found.boundary.contrasts[0]
    notes = [note.text for note in (*found.boundary.notes, *found.laws.notes)]
    told = [*notes, *words.sentences(main), *words.evidence(main), words.noise_text(main)]
    assert len(set(told)) == len(told)
    assert [note.text for note in found.boundary.notes] == [
        f"On digits 1 incomplete sets of pairs are left out of the pooled means of {metric}."
        for metric in ("error", "test loss")
    ]


BAD = {
    "one seed": (study(seeds=1), "every pair has seed 0"),
    "one D_p": (study(sizes=(1000,)), "x is upstream_samples"),
    "no distilled arm": (study().where(arm="plain"), "no distilled run has error_rate"),
    "other sizes": (
        RunTable(tuple(
            replace(r, student="h4" if r.arm == "distilled" else "h2", num_params=9 if r.arm == "distilled" else 5)
            for r in study()
        )),
        "what keeps them apart is student",
    ),
    "other seeds": (
        RunTable(tuple(replace(r, seed=r.seed + 10 * (r.arm == "plain")) for r in study())), "what keeps them apart is seed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_judged_gives_the_reason_by_column(name):
    """Reasons are said of columns: which one is alike, or keeps the arms apart."""
    table, named = BAD[name]
    findings = find(table, options=FAST)
    main = findings.boundary.contrasts[0]
    assert main.verdict is None and named in main.reason
    assert named in findings.boundary.answers[0]


def test_an_empty_table_concludes_nothing():
    findings = find(RunTable(()), options=FAST)
    assert (findings.boundary.contrasts, findings.laws.laws, findings.boundary.answers) == ((), (), ())
    assert [note.code for note in findings.boundary.notes] == ["nothing"]


# Limited by data, or by steps?


def regime(errors: dict[int, float], teacher: dict[int, float] | None = None, seen: dict[int, int] | None = None):
    runs = []
    for size, error in errors.items():
        upstream = {"upstream_error_rate": error, "upstream_samples_seen": (seen or {}).get(size)}
        runs += [run("plain", size, 0.4, **upstream), run("distilled", size, 0.4, **upstream,
                                                          teacher_error_rate=(teacher or {}).get(size))]  # fmt: skip
    return [note.text for note in find(RunTable(tuple(runs)), options=FAST).boundary.notes]


def test_upstream_error_that_does_not_fall_is_named():
    assert regime({1000: 0.5, 2000: 0.52, 4000: 0.3}) == [
        "Upstream error of plain h2 does not fall from 1,000 to 2,000 upstream images (50.0 % to 52.0 %): training there "
        "may be limited by steps rather than by data."
    ]
    assert regime({1000: 0.5, 2000: 0.4, 4000: 0.3}) == []


def test_a_teacher_still_on_its_slope_is_named():
    flat = {1000: 0.5, 2000: 0.4, 4000: 0.3}
    # Falls of .1 and then .3 in one octave each; then the other way round.
    assert regime(flat, {1000: 0.7, 2000: 0.6, 4000: 0.3}) == [
        "Upstream error of the teacher falls fastest at the last step, from 60.0 % to 30.0 % at 4,000 upstream images: "
        "training has not begun to level off, and on such a slope the luck of a seed is largest."
    ]
    assert regime(flat, {1000: 0.7, 2000: 0.4, 4000: 0.3}) == []
    # The last of three steps counts; and where error rises at every step, nothing falls fastest.
    longer = flat | {8000: 0.2}
    assert len(regime(longer, {1000: 0.75, 2000: 0.7, 4000: 0.6, 8000: 0.3})) == 1
    assert regime(longer, {1000: 0.75, 2000: 0.45, 4000: 0.4, 8000: 0.3}) == []
    assert ["falls fastest" in text for text in regime(longer, {1000: 0.75, 2000: 0.7, 4000: 0.71, 8000: 0.3})] == [
        False, True]  # fmt: skip
    rising = regime(flat, {1000: 0.5, 2000: 0.6, 4000: 0.65})
    assert len(rising) == 2 and not any("falls fastest" in text for text in rising)
    # .1 in one octave is faster than .15 in two.
    assert regime({1000: 0.5, 2000: 0.4, 8000: 0.3}, {1000: 0.7, 2000: 0.6, 8000: 0.45}) == []


def test_models_near_chance_are_named_at_the_largest_such_size():
    assert regime({1000: 0.86, 2000: 0.81, 4000: 0.4}) == [
        "plain h2 errs on 81.0 % of the test images of fractals at 2,000 upstream images, close to chance: comparisons "
        "there say little."
    ]


def test_chance_begins_at_four_in_five():
    assert len(regime({1000: 0.8, 2000: 0.5, 4000: 0.4})) == 1
    assert regime({1000: 0.799, 2000: 0.5, 4000: 0.4}) == []


def test_a_floor_of_steps_is_named():
    errors = {500: 0.5, 1000: 0.4, 4000: 0.3}
    assert regime(errors, seen={500: 32_000, 1000: 35_000, 4000: 90_000}) == [
        "Upstream runs of 500 and 1,000 images all saw about 32,000 images in training: a floor of steps, not the data, "
        "sets how long they train."
    ]
    assert regime(errors, seen={500: 32_000, 1000: 64_000, 4000: 90_000}) == []
    assert regime(errors, seen={500: 32_000, 1000: 36_800, 4000: 90_000}) != []  # 1.15 times the least
    assert regime(errors, seen={500: 32_000, 1000: 36_900, 4000: 90_000}) == []
    assert regime(errors, seen={500: 32_000, 1000: 32_000, 4000: 32_000}) == []  # equal steps by design, no floor


def test_a_teacher_that_has_learnt_what_it_can_is_told_apart():
    falling = {1000: 0.5, 2000: 0.4, 4000: 0.3}
    assert regime(falling, {1000: 0.7, 2000: 0.4, 4000: 0.41}) == [
        "Upstream error of the teacher does not fall from 2,000 to 4,000 upstream images (40.0 % to 41.0 %): it has learnt "
        "what its size and its number of steps allow."
    ]


def test_missing_points_are_counted_and_gaps_named():
    lost = MissingPoint("base", "distilled", "h2", 9000, "digits", 100, 0, "k", "t", "failed", "killed", "log")
    table = replace(study(seeds=2), missing=(lost, replace(lost, state="blocked", key="k2")))
    notes = [note.text for note in find(table, options=FAST).boundary.notes]
    assert notes[:2] == [
        "2 of 18 points have no result (1 failed, 1 blocked); everything here rests on the others.",
        "No distilled run on digits at 9,000 upstream images has finished.",
    ]


# Kept until something changes.


def test_the_published_study_holds_the_verdict_of_its_rows():
    """docs/studies/cifar10: `dbscale reduce --table docs/studies/cifar10/rows.csv` writes its files anew."""
    table = read_table(STUDY / "rows.csv").where(dataset="fashion_mnist")
    main = schema.read(BoundaryFile, STUDY / "boundary.json").contrasts[0]
    laws = schema.read(LawsFile, STUDY / "laws.json")
    assert main.verdict is not None and (main.dataset, main.main) == ("fashion_mnist", True)
    errors = {
        arm: [np.mean(table.where(arm=arm, upstream_samples=size, student="h2").column("error_rate")
                      + table.where(arm=arm, upstream_samples=size, student="h3").column("error_rate"))
              for size in (500, 1500, 5000, 15_000, 50_000)]
        for arm in ("plain", "distilled")
    }  # fmt: skip
    expected = [plain - distilled for plain, distilled in zip(errors["plain"], errors["distilled"], strict=True)]
    assert [point.delta for point in main.verdict.points] == pytest.approx(expected)
    assert {(law.dataset, law.metric, law.arm) for law in laws.laws} == set(
        itertools.product(("fashion_mnist", "mnist"), ("error_rate", "test_loss"), ("plain", "distilled"))
    )


def test_files_say_the_same_when_read_again(found: Findings, tmp_path):
    found.write(tmp_path)
    assert schema.read(BoundaryFile, tmp_path / "boundary.json") == found.boundary
    assert schema.read(LawsFile, tmp_path / "laws.json") == found.laws
    lines = (tmp_path / "boundary.json").read_text().count("\n")
    assert lines < len(found.boundary.contrasts) + len(found.boundary.notes) + 20


def test_findings_are_made_anew_only_when_rows_or_options_change(tmp_path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "rows.csv"
    path.write_text(to_csv(study(seeds=2)))
    _, first = refresh_table(path, tmp_path, FAST)
    assert first.boundary.grid == tmp_path.name
    with monkeypatch.context() as patched:
        patched.setattr(findings_module, "find", lambda *_, **__: pytest.fail("judged anew"))
        _, again = refresh_table(path, tmp_path, FAST)
    assert again == first
    (tmp_path / "boundary.json").write_text("{}")
    refresh_table(path, tmp_path, FAST)
    assert schema.read(BoundaryFile, tmp_path / "boundary.json") == first.boundary
    _, other = refresh_table(path, tmp_path, replace(FAST, level=0.8))
    assert (other.boundary.level, other.laws.level) == (0.8, 0.8)


def test_the_digest_knows_every_option_row_and_gap():
    table = study(seeds=2)
    lost = MissingPoint("base", "plain", "h2", 1, "digits", 1, 0, "k", "t", "failed", "killed", "log")
    marks = {
        digest(table, FAST), digest(table, replace(FAST, level=0.8)), digest(table, replace(FAST, min_effect=0.01)),
        digest(table, replace(FAST, num_draws=9)), digest(table, replace(FAST, num_resamples=9)),
        digest(table, replace(FAST, seed=1)), digest(table.where(seed=0), FAST), digest(replace(table, question="?"), FAST),
        digest(replace(table, missing=(lost,)), FAST),
    }  # fmt: skip
    assert len(marks) == 9
