"""What the laws say of a study whose truth is known, and where they must not be read further."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from dbscale.errors import LawError
from dbscale.laws import make_pairs
from dbscale.report import law_findings
from dbscale.report.law_findings import ArmLaw, Options, law_delta, study_laws
from dbscale.report.table import Run, RunTable, Setting

FAST = Options(num_resamples=20)
SIZES, LABELS, PARAMS = (500, 1000, 2000, 4000, 8000), (100, 400, 1600), {"h1": 10_000, "h2": 40_000, "h4": 160_000}


def truth(arm: str, size: float, params: float, labels: float) -> float:
    """A product of powers; the distilled arm is better by a fifth everywhere."""
    return (0.8 if arm == "distilled" else 1.0) * 20 * size**-0.3 * params**-0.1 * labels**-0.2


def study(*, sizes=SIZES, labels=LABELS, students=PARAMS, seeds=(0, 1), noise=0.01, **fields) -> RunTable:
    rng = np.random.default_rng(0)
    runs = tuple(
        Run(
            variant="base", arm=arm, student=student, num_params=students[student], upstream_dataset="fractals",
            upstream_samples=size, dataset="digits", downstream_samples=count, seed=seed, num_test_samples=10**6,
            error_rate=float(truth(arm, size, students[student], count) * np.exp(noise * rng.standard_normal())),
            key=f"{arm}-{student}-{size}-{count}-{seed}", **fields,
        )
        for arm, student, size, count, seed in itertools.product(("plain", "distilled"), students, sizes, labels, seeds)
    )  # fmt: skip
    return RunTable(runs, grid="laws")


@pytest.fixture(scope="module")
def found():
    return study_laws(study(), FAST, "mark")


def test_an_arm_has_its_laws_with_what_they_miss(found):
    _, laws = found
    assert [(law.arm, law.metric, law.num_runs) for law in laws.laws] == [
        ("plain", "error_rate", 90), ("distilled", "error_rate", 90)
    ]  # fmt: skip
    for law in laws.laws:
        assert law.reason == "" and law.law in {each.law for each in law.candidates}
        assert law.residual == pytest.approx(0.01, rel=0.3) and law.noise == pytest.approx(0.01, rel=0.3)
        assert law.held_out is not None and law.held_out < 0.05
        assert sum(each.weight for each in law.candidates) == pytest.approx(1)
        assert law.no_extrapolation == ()
    assert laws.notes == () and (laws.source, laws.level, laws.num_draws) == ("mark", 0.9, 20)


def test_curves_span_the_measured_range_at_every_measured_combination(found):
    _, laws = found
    curves = [each for each in laws.curves if each.arm == "plain" and each.axis == "upstream_samples"]
    assert {(each.student, each.downstream_samples) for each in curves} == set(itertools.product(PARAMS, LABELS))
    (curve,) = [each for each in curves if (each.student, each.downstream_samples) == ("h2", 400)]
    assert (curve.band.x[0], curve.band.x[-1]) == pytest.approx((500, 8000))
    assert curve.band.y == pytest.approx([truth("plain", x, 40_000, 400) for x in curve.band.x], rel=0.03)
    assert all(low <= y <= high for low, y, high in zip(curve.band.low, curve.band.y, curve.band.high, strict=True))
    assert {each.axis for each in laws.curves} == {"upstream_samples", "downstream_samples", "num_params"}
    assert {each.student for each in laws.curves if each.axis == "num_params"} == {None}


def test_every_run_is_predicted_and_the_largest_size_once_more_unseen(found):
    _, laws = found
    seen, held = ([each for each in laws.predictions if each.held_out is out] for out in (False, True))
    assert len(seen) == 180 and len(held) == 36 and {each.upstream_samples for each in held} == {8000}
    for each in held:
        assert each.predicted == pytest.approx(
            truth(each.arm, 8000, PARAMS[each.student], each.downstream_samples), rel=0.1
        )
        assert each.key == f"{each.arm}-{each.student}-8000-{each.downstream_samples}-{each.seed}"


def test_twice_of_a_lever_does_what_the_truth_does(found):
    _, laws = found
    plain = laws.levers[0]
    assert (plain.arm, plain.student, plain.upstream_samples, plain.downstream_samples) == ("plain", "h4", 8000, 1600)
    assert plain.error.value == pytest.approx(truth("plain", 8000, 160_000, 1600), rel=0.03)
    assert plain.doubled["upstream_samples"].value == pytest.approx(truth("plain", 16_000, 160_000, 1600), rel=0.04)
    assert plain.doubled["downstream_samples"].value == pytest.approx(truth("plain", 8000, 160_000, 3200), rel=0.04)
    assert plain.doubled["num_params"].value == pytest.approx(truth("plain", 8000, 320_000, 1600), rel=0.04)
    # Slopes of a product: .2/1600 of the error a label, .3/8000 of it an image.
    assert plain.images_per_label is not None
    assert plain.images_per_label.value == pytest.approx((0.2 / 1600) / (0.3 / 8000), rel=0.3)


def test_the_transfer_gap_has_its_profile_interval(found):
    """A product of powers has no gap: G is 0, and the interval says how large it might be."""
    _, laws = found
    assert {(each.arm, each.student) for each in laws.transfer} == set(
        itertools.product(("plain", "distilled"), PARAMS)
    )
    for each in laws.transfer:
        assert each.gap.low == pytest.approx(0, abs=1e-6)
        assert each.gap.high is not None and each.gap.high > each.gap.value
        assert 0 <= each.share < 0.5 and 0 <= each.gap_error < 0.05


@pytest.mark.parametrize(("floor", "exponent", "verdict"), [(0.2, 0.7, "holds"), (0.02, 0.3, "fails")])
def test_the_premise_of_the_theorem_is_put_to_both_arms(floor, exponent, verdict):
    """Plain .1 + 5·D_p^-.4 with noise of .3 %; distilled on another floor, with another exponent."""
    terms = {"plain": (0.1, 5.0, 0.4), "distilled": (floor, 3.0 if exponent < 0.4 else 15.0, exponent)}
    rng = np.random.default_rng(1)
    sizes = tuple(100 * 2**k for k in range(9))

    def error(run: Run) -> float:
        bottom, factor, power = terms[run.arm]
        return float((bottom + factor * run.upstream_samples**-power) * np.exp(0.003 * rng.standard_normal()))

    table = study(sizes=sizes, labels=(100,), students={"h1": 10_000}, seeds=(0, 1, 2))
    runs = [Run(**{**vars(run), "error_rate": error(run)}) for run in table]
    # A second setting has the plain arm only: it is left out.
    runs += [Run(**{**vars(run), "dataset": "other"}) for run in runs if run.arm == "plain"]
    _, laws = study_laws(RunTable(tuple(runs), grid="laws"), FAST, "")
    (found,) = laws.premises
    assert (found.dataset, found.metric, found.law, found.verdict) == ("digits", "error_rate", "power_plus", verdict)
    assert found.floor.value == pytest.approx(floor - 0.1, abs=0.02)
    assert found.exponent.value == pytest.approx(exponent - 0.4, abs=0.08)
    assert found.log_factor.value == pytest.approx(np.log(terms["distilled"][1] / 5.0), abs=0.5)


def test_test_loss_is_fitted_predicted_and_read_as_error_is():
    table = study(students={"h1": 10_000})
    runs = tuple(Run(**{**vars(run), "test_loss": 3 * run.error_rate}) for run in table)
    _, laws = study_laws(RunTable(runs), FAST, "")
    metrics = ["error_rate", "error_rate", "test_loss", "test_loss"]
    assert [law.metric for law in laws.laws] == [each.metric for each in laws.transfer] == metrics
    assert [each.metric for each in laws.levers] == metrics
    error, loss = laws.levers[0], laws.levers[2]
    assert loss.error.value == pytest.approx(3 * error.error.value, rel=0.02)
    seen = [[each for each in laws.predictions if each.metric == metric and not each.held_out]
            for metric in ("error_rate", "test_loss")]  # fmt: skip
    assert [each.measured for each in seen[1]] == pytest.approx([3 * each.measured for each in seen[0]])
    assert {each.metric for each in laws.curves} == {"error_rate", "test_loss"}


def test_axes_with_two_values_are_not_read_further():
    _, laws = study_laws(study(labels=(100, 400), students={"h1": 10_000}), FAST, "")
    assert laws.laws[0].no_extrapolation == ("num_params", "downstream_samples")
    assert set(laws.levers[0].doubled) == {"upstream_samples"} and laws.levers[0].images_per_label is None
    assert [note.text for note in laws.notes] == [
        "On digits labels were measured at two values only: no law is determined along them."
    ]


def test_two_values_of_an_axis_have_curves_too_and_gaps_need_no_third_label_count():
    _, laws = study_laws(study(labels=(100, 400), students={"h1": 10_000}), FAST, "")
    assert {each.axis for each in laws.curves} == {"upstream_samples", "downstream_samples"}
    assert [each.arm for each in laws.transfer] == ["plain", "distilled"]


def test_a_test_set_of_unknown_size_counts_as_a_million_images(monkeypatch: pytest.MonkeyPatch):
    """Then the noise of an error of .2 is √(.2·.8/10⁶) = .0004, and clusters are upstream runs."""
    asked: dict[str, Any] = {}

    def kept(columns, y, **options):
        asked.update(options, columns=columns, y=y)
        raise LawError("enough")

    monkeypatch.setattr(law_findings, "select_law", kept)
    runs = tuple(
        Run(variant="base", arm="plain", student="h1", num_params=10, upstream_samples=size, dataset="digits",
            downstream_samples=labels, seed=0, finetune=draw, error_rate=0.2, test_loss=0.0)
        for size in (1, 2, 4) for labels in (10, 20) for draw in (0, 1)
    )  # fmt: skip
    law_findings.arm_laws(RunTable(runs), FAST, ("error_rate",))
    assert asked["stderr"] == pytest.approx(np.full(12, 0.0004)) and asked["ceiling"] == 1
    assert set(asked["columns"]) == {"upstream_samples", "downstream_samples"}, "one model size is no axis"
    assert asked["clusters"][:5] == ["h1|1|0"] * 4 + ["h1|2|0"] and asked["within"][:3] == ["10|0", "10|1", "20|0"]
    assert (asked["num_resamples"], asked["seed"]) == (20, 0)
    law_findings.arm_laws(RunTable(runs), Options(num_resamples=9, seed=3), ("test_loss",))
    assert (asked["num_resamples"], asked["seed"], asked["y"].tolist()) == (9, 3, [1e-4] * 12), (
        "a logarithm needs some loss"
    )


def arm_law(*, residual: float, held_out: float, noise: float | None = 0.1) -> ArmLaw:
    """Laws of one arm that miss by so much, where seeds scatter by `noise`; measured at three values of each axis."""
    runs = [
        Run(variant="base", arm="plain", student=f"h{k}", num_params=k, upstream_samples=k, dataset="digits",
            downstream_samples=k, seed=0, error_rate=0.5) for k in (1, 2, 3)
    ]  # fmt: skip
    own = ArmLaw(Setting("base", "", "digits"), "error_rate", "plain", RunTable(tuple(runs)), cast(Any, "some laws"))
    vars(own).update(noise=noise, misses={"residual": residual, "held_out": held_out})
    return own


@pytest.mark.parametrize(
    ("residual", "held_out", "noise", "codes", "closed"),
    [(0.2, 0.3, 0.1, [], []),
     (0.201, 0.3, 0.1, ["misfit"], ["upstream_samples", "num_params", "downstream_samples"]),
     (0.2, 0.301, 0.1, ["far_out"], ["upstream_samples"]),
     (0.1, 0.15, None, [], []),  # of unknown noise a spread of 5 % is supposed,
     (0.101, 0.1, None, ["misfit"], ["upstream_samples", "num_params", "downstream_samples"]),
     (0.04, 0.06, 0.001, [], []),  # and of hardly any 2 %
     (0.04, 0.061, 0.001, ["far_out"], ["upstream_samples"])],
)  # fmt: skip
def test_laws_may_miss_by_twice_the_noise_and_unseen_runs_by_three_times(residual, held_out, noise, codes, closed):
    own = arm_law(residual=residual, held_out=held_out, noise=noise)
    assert list(law_findings._closed(own, set())) == closed
    assert [each.code for each in law_findings._notes(own, own.runs)] == codes


def test_laws_that_cannot_be_held_against_the_largest_size_are_not_read_beyond_it():
    own = arm_law(residual=0.1, held_out=0.1)
    own.misses["held_out"] = None
    assert list(law_findings._closed(own, {"num_params"})) == ["upstream_samples", "num_params"]
    assert list(law_findings._notes(own, own.runs)) == []


def test_the_premise_is_asked_of_the_law_that_serves_both_arms_best(monkeypatch: pytest.MonkeyPatch):
    """Scores are misses: power_plus 1·6, product 2·2.5, and additive, which one arm lacks. Arms without laws are passed."""

    def laws(*scores: float) -> Any:
        names = ("power_plus", "product", "additive")
        found = [SimpleNamespace(name=name, score=score, fit=f"{name} {score}") for name, score in
                 zip(names, scores, strict=False)]  # fmt: skip
        return SimpleNamespace(candidates=[*found, SimpleNamespace(name="m4", score=0.1, fit="another shape")],
                               resampling="drawn")  # fmt: skip

    monkeypatch.setattr(law_findings, "bootstrap", lambda fit, drawn: (fit, drawn))
    given = []

    def premise(*resampled: Any) -> Any:
        given.append(resampled)
        return SimpleNamespace(
            verdict="holds", floor=(0.0, -1.0, 1.0), exponent=(0.0, -np.inf, 2.0), log_factor=(3.0, 2.0, 4.0)
        )

    monkeypatch.setattr(law_findings, "premise", premise)
    small = study(students={"h1": 1}, seeds=(0,))
    table = RunTable((*small.where(arm="plain"), *(Run(**{**vars(run), "dataset": "later"}) for run in small)))
    first, later = table.settings
    found = {
        (setting, "error_rate", arm): ArmLaw(setting, "error_rate", arm, table, selection)
        for setting, arm, selection in ((first, "plain", laws(1, 2)), (later, "plain", laws(1, 2, 0.1)),
                                        (later, "distilled", laws(6, 2.5)))
    }  # fmt: skip
    (record,) = law_findings._premises(law_findings.ArmLaws(table, found), 0.8)
    assert given == [(("product 2", "drawn"), ("product 2.5", "drawn"), 0.8)]
    assert (record.dataset, record.law, record.verdict) == ("later", "product", "holds")
    assert (record.floor.low, record.exponent.low, record.exponent.high, record.log_factor.value) == (-1, None, 2, 3)


def test_options_begin_as_a_table_does():
    assert (Options().level, Options().min_effect) == (RunTable(()).level, RunTable(()).min_effect) == (0.9, 0.005)
    assert (Options().num_draws, Options().num_resamples, Options().seed) == (1000, 200, 0)


def test_laws_that_foretell_poorly_are_not_read_further_along_upstream_data():
    """Error stays where it was up to 4,000 images and then halves: no law of the smaller sizes foretells it."""
    table = study(students={"h1": 10_000})
    runs = tuple(
        Run(**{**vars(run), "error_rate": run.error_rate * (run.upstream_samples / 500) ** 0.3
               * (0.5 if run.upstream_samples == 8000 else 1)})
        for run in table
    )  # fmt: skip
    _, laws = study_laws(RunTable(runs), FAST, "")
    assert all("upstream_samples" in law.no_extrapolation for law in laws.laws)
    assert all("upstream_samples" not in lever.doubled for lever in laws.levers)
    codes = {note.code for note in laws.notes}
    assert "far_out" in codes
    far = next(note.text for note in laws.notes if note.code == "far_out")
    assert far.startswith(
        "Fitted without the largest number of upstream images, the laws miss error of the plain arm there by"
    )


def test_an_arm_without_enough_sizes_has_the_reason():
    _, laws = study_laws(study(sizes=(500, 1000), students={"h1": 10_000}), FAST, "")
    assert {law.reason for law in laws.laws} == {"laws of upstream data need 3 values of D_p"}
    assert laws.curves == () and laws.levers == () and [note.code for note in laws.notes] == ["no_law", "no_law"]


def test_the_laws_difference_is_averaged_over_the_pairs_strata(found):
    arms, _ = found
    setting = arms.table.settings[0]
    strata = [("h1", 100), ("h4", 1600)]
    pairs = make_pairs([500, 8000] * 2, [0.0] * 4, seed=[0] * 4, student=["h1", "h1", "h4", "h4"],
                       labels=[100, 100, 1600, 1600])  # fmt: skip
    curves = law_delta(arms, setting, "error_rate", pairs)
    assert curves is not None and (curves.grid[0], curves.grid[-1]) == pytest.approx((500, 8000))
    expected = [np.mean([0.2 * truth("plain", x, PARAMS[s], d) for s, d in strata]) for x in curves.grid]
    assert curves.best == pytest.approx(expected, rel=0.15)
    assert curves.drawn.shape[1] == len(curves.grid)
    assert law_delta(arms, setting, "test_loss", pairs) is None


@pytest.mark.parametrize("count", [4, 5])
def test_a_rank_correlation_has_its_interval(count):
    """Ranks 1…5 against 2, 1, 4, 3, 5: ρ = 1 − 6·4/(5·24) = .8; z = 1.0986 ± 1.6449·√((1 + .8²/2)/2)."""
    errors = (0.2, 0.1, 0.4, 0.3, 0.5)
    runs = tuple(
        Run(variant="base", arm="plain", student="h1", num_params=10, upstream_dataset="up", upstream_samples=place + 1,
            dataset="digits", downstream_samples=10, seed=0, error_rate=errors[place], linear_probe_error=0.1 * place,
            upstream_key=f"up {place}")
        for place in range(count)
    )  # fmt: skip
    _, laws = study_laws(RunTable(runs), FAST, "")
    if count == 4:
        assert laws.predictors == ()
        return
    (found,) = laws.predictors
    assert (found.predictor, found.num_checkpoints, found.downstream_samples) == ("linear-probe error", 5, 10)
    assert (found.rho.value, found.rho.low, found.rho.high) == pytest.approx((0.8, -0.2333, 0.9848), abs=2e-3)


def test_weights_are_inverse_variances_of_logarithms():
    """100 test images: (.16/100)/.2² + .05² = .0425 at an error of .2 and (.24/100)/.4² + .05² = .0175 at .4."""
    runs = RunTable(tuple(
        Run(variant="base", arm="plain", student="h1", num_params=10, upstream_samples=size, dataset="digits",
            downstream_samples=10, seed=seed, error_rate=error)
        for size, error in ((1, 0.2), (2, 0.4)) for seed in (0, 1)
    ))  # fmt: skip
    weights = law_findings._weights(runs, np.full(4, 100.0))
    assert weights[0] == weights[1] and weights[2] == weights[3]
    assert weights[2] / weights[0] == pytest.approx(0.0425 / 0.0175, rel=0.03)
    many = law_findings._weights(runs, np.full(4, 1e9))
    assert many == pytest.approx([1, 1, 1, 1], rel=1e-3)


def test_cheap_predictors_are_ranked_against_the_finetuned_error():
    table = study(students={"h1": 10_000}, labels=(100,), seeds=(0, 1, 2))
    runs = tuple(
        Run(**{**vars(run), "upstream_key": f"{run.arm}-{run.upstream_samples}-{run.seed}",
               "upstream_error_rate": run.error_rate, "transrate": -run.error_rate})
        for run in table
    )  # fmt: skip
    _, laws = study_laws(RunTable(runs), FAST, "")
    assert [(each.predictor, each.num_checkpoints) for each in laws.predictors] == [
        ("error on the upstream test set", 30), ("TransRate (arXiv 2106.09719)", 30)
    ]  # fmt: skip
    assert [each.rho.value for each in laws.predictors] == pytest.approx([1, -1])
