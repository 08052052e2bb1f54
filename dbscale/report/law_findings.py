"""What the laws say of each arm: the average that predicts, its curves, held-out errors, transfer gaps and levers.

Asks the engine (`dbscale.laws.select_law`) once for every setting, metric and arm, and fills laws.json. Verdicts are
`findings`', which takes the laws' ΔE from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from dbscale.errors import LawError, NotEnoughData
from dbscale.laws import (
    WITH_FLOOR,
    DeltaCurves,
    Pairs,
    Selection,
    bootstrap,
    error_weights,
    exchange_rates,
    fit_law,
    premise,
    seed_spread,
    select_law,
    transfer_gap,
)  # fmt: skip
from dbscale.report import schema
from dbscale.report.schema import AxisName, Estimate, LawRecord, Note, ParamRecord
from dbscale.report.table import COLUMNS, MAIN_ARMS, Run, RunTable, Setting
from dbscale.report.words import AXES, metric_of, note

AXIS_NAMES: tuple[AxisName, ...] = ("upstream_samples", "num_params", "downstream_samples")
EXPONENTS: dict[str, AxisName] = {"alpha": "upstream_samples", "beta": "num_params", "gamma": "downstream_samples"}
GAP_EXPONENTS: dict[str, AxisName] = {"alpha": "upstream_samples", "delta": "num_params", "beta": "downstream_samples"}
"""Names of exponents in the laws, and in `transfer_gap`."""
METRICS = ("error_rate", "test_loss")
FEWEST_SIZES = 3
LEAST_SEED_NOISE = 0.05
"""Spread between seeds, relative to the error, that weights assume at least: few seeds may agree by chance."""
UNKNOWN_TEST_SIZE = 10**6
SMALLEST = 1e-4
"""An error of 0 stands for this one in logarithms."""
MISFIT, FAR_OUT, LEAST_NOISE = 2.0, 3.0, 0.02
"""Residuals may exceed the noise between seeds this many times, held-out ones that many; 2 % is always fine."""
CURVE_POINTS = 25
PREDICTORS = {
    "upstream_error_rate": "error on the upstream test set", "linear_probe_error": "linear-probe error",
    "transrate": "TransRate (arXiv 2106.09719)",
}  # fmt: skip
FEWEST_CHECKPOINTS = 5


@dataclass(frozen=True)
class Options:
    """How to judge and fit."""

    level: float = 0.9
    """Level of every interval."""
    min_effect: float = 0.005
    """δ of error rates; other metrics take the same share of their mean."""
    num_draws: int = 1000
    """Curves drawn for every contrast."""
    num_resamples: int = 200
    """Resamples behind the laws."""
    seed: int = 0


@dataclass(frozen=True)
class ArmLaw:
    """The laws of one arm and metric, or why there are none."""

    setting: Setting
    metric: str
    arm: str
    runs: RunTable
    """What they were fitted to."""
    selection: Selection | None
    reason: str = ""

    @property
    def names(self) -> dict[str, Any]:
        """What every record of it begins with."""
        return {**self.setting._asdict(), "metric": self.metric, "arm": self.arm}

    @property
    def laws(self) -> Selection:
        """The selection where there is one."""
        assert self.selection is not None, self.reason
        return self.selection

    @cached_property
    def measured(self) -> np.ndarray:
        """The metric of every run, as its logarithm can be taken [n]."""
        return np.maximum(self.runs.column(self.metric), SMALLEST)

    @cached_property
    def noise(self) -> float | None:
        """Spread of log y between seeds of one point; None where no point was repeated."""
        return float(np.max(seed_spread(self.measured, points_of(self.runs)) / self.measured)) or None

    @cached_property
    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Predicted by laws that did not see the largest D_p, and measured there."""
        return self.laws.held_out()

    @cached_property
    def misses(self) -> dict[str, float | None]:
        """Root mean square of log(predicted / measured), of the laws over their own runs and over the largest D_p unseen."""
        return {
            "residual": _rms_log(self.laws.predict(columns_of(self.runs.runs)), self.measured),
            "held_out": _rms_log(*self.held_out),
        }

    @property
    def floor(self) -> float:
        """What no law can explain on that scale, or may be supposed not to."""
        return max(self.noise or LEAST_SEED_NOISE, LEAST_NOISE)

    def exceeds(self, name: str, times: float) -> bool:
        """Whether a miss is more than so many times the floor; what is unknown is."""
        miss = self.misses[name]
        return miss is None or miss > times * self.floor


@dataclass(frozen=True)
class ArmLaws:
    """The laws of a study by setting, metric and arm."""

    table: RunTable
    found: Mapping[tuple[Setting, str, str], ArmLaw]

    def of(self, setting: Setting, metric: str, arm: str) -> Selection | None:
        found = self.found.get((setting, metric, arm))
        return found.selection if found else None

    def runs(self, setting: Setting, metric: str, arm: str) -> RunTable:
        """The runs that a selection was fitted to."""
        return self.found[setting, metric, arm].runs


def study_laws(table: RunTable, options: Options, source: str) -> tuple[ArmLaws, schema.LawsFile]:
    """Fit the laws of every arm and write down what they say; an arm without a law is recorded with the reason."""
    arms = arm_laws(table, options)
    laws = [(each, _record(each, options.level)) for each in arms.found.values()]
    known = [(each, record) for each, record in laws if not record.reason]
    return arms, schema.LawsFile(
        grid=table.grid, source=source, level=options.level, num_draws=options.num_resamples, seed=options.seed,
        laws=tuple(record for _, record in laws),
        curves=tuple(curve for each, _ in known for curve in _curves(each, options.level)),
        predictions=tuple(prediction for each, _ in known for prediction in _predictions(each)),
        transfer=tuple(gap for each in arms.found.values() for gap in _transfer(each, options)),
        premises=tuple(_premises(arms, options.level)),
        levers=tuple(_lever(each, record, options.level) for each, record in known),
        predictors=tuple(_predictors(table, options.level)),
        notes=tuple(told for each, _ in laws for told in _notes(each, table)),
    )  # fmt: skip


def arm_laws(table: RunTable, options: Options, metrics: Sequence[str] = METRICS) -> ArmLaws:
    """Fit the laws of every arm; one that has none keeps the reason."""
    found: dict[tuple[Setting, str, str], ArmLaw] = {}
    for key in product(table.settings, metrics, table.arms):
        setting, metric, arm = key
        runs = table.pretrained.where(lambda run, m=metric: getattr(run, m) is not None, setting=setting, arm=arm)
        if len(runs):
            try:
                found[key] = ArmLaw(*key, runs, _select(runs, metric, options))
            except LawError as error:
                found[key] = ArmLaw(*key, runs, None, str(error))
    return ArmLaws(table, found)


def _select(runs: RunTable, metric: str, options: Options) -> Selection:
    if len(runs.values("upstream_samples")) < FEWEST_SIZES:
        raise NotEnoughData(f"laws of upstream data need {FEWEST_SIZES} values of D_p")
    columns = {name: values for name, values in columns_of(runs.runs).items() if len(set(values)) > 1}
    noise: dict[str, Any] = {}
    if metric == "error_rate":
        tests = np.array([run.num_test_samples or UNKNOWN_TEST_SIZE for run in runs])
        errors = np.array(runs.column("error_rate"))
        noise = {"weights": _weights(runs, tests), "stderr": np.sqrt(errors * (1 - errors) / tests), "ceiling": 1.0}
    return select_law(
        columns, np.maximum(runs.column(metric), SMALLEST), **noise,
        clusters=[f"{run.student}|{run.upstream_samples}|{run.seed}" for run in runs],
        within=[f"{run.downstream_samples}|{run.finetune}" for run in runs],
        num_resamples=options.num_resamples, seed=options.seed,
    )  # fmt: skip


def _weights(runs: RunTable, tests: np.ndarray) -> np.ndarray:
    """Inverse variances; errors are averaged over seeds first, so that a lucky run does not weigh more than another."""
    points, errors = points_of(runs), np.array(runs.column("error_rate"))
    _, place = np.unique(points, return_inverse=True)
    means = (np.bincount(place, errors) / np.bincount(place))[place]
    return error_weights(means, tests, seed_stderr=np.maximum(seed_spread(errors, points), LEAST_SEED_NOISE * means))


def points_of(runs: RunTable) -> list[str]:
    """What the runs of one point share, whatever their seed."""
    return [f"{run.student}|{run.upstream_samples}|{run.downstream_samples}" for run in runs]


def columns_of(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """The axes of the laws as float arrays [n]."""
    return {name: np.array([float(getattr(run, name)) for run in runs]) for name in AXIS_NAMES}


def law_delta(
    arms: ArmLaws, setting: Setting, metric: str, pairs: Pairs, sides: tuple[str, str] = MAIN_ARMS
) -> DeltaCurves | None:
    """ΔE of the fitted laws over the measured range, mean over the students and D_f of the pairs; None without laws."""
    first, second = (arms.of(setting, metric, arm) for arm in sides)
    if first is None or second is None:
        return None
    grid = np.geomspace(pairs.x.min(), pairs.x.max(), 8 * CURVE_POINTS)
    strata: set[tuple[Any, Any]] = set(zip(pairs.student.tolist(), pairs.labels.tolist(), strict=True))
    best, drawn = [], []
    for student, labels in sorted(strata, key=str):
        sizes = {"num_params": arms.table.params(student), "downstream_samples": labels}
        at = {"upstream_samples": grid} | {name: np.full(len(grid), float(size)) for name, size in sizes.items()}
        best.append(first.predict(at) - second.predict(at))
        drawn.append(first.draws(at) - second.draws(at))
    name = " and ".join(dict.fromkeys(law.best.name for law in (first, second)))
    return DeltaCurves(grid, np.mean(best, axis=0), np.mean(drawn, axis=0), name)


def _record(own: ArmLaw, level: float) -> LawRecord:
    names = own.names | {"num_runs": len(own.runs), "reason": own.reason}
    if own.selection is None:
        return LawRecord(**names)
    best, intervals = own.laws.best, own.laws.bootstrap.interval(level)
    params = {
        name: ParamRecord(value=None, status="not_determined") if ends is None else
        ParamRecord(value=float(best.params[name]), low=_finite(ends[0]), high=_finite(ends[1]),
                    status="at_bound" if name in best.at_bound else "determined")
        for name, ends in ((name, intervals.get(name)) for name in best.params)
    }  # fmt: skip
    candidates = tuple(
        schema.CandidateRecord(law=each.name, weight=float(each.weight), in_sample=_finite(each.in_sample),
                               held_out=_finite(each.held_out), reason=each.reason)
        for each in own.laws.candidates
    )  # fmt: skip
    exponents = GAP_EXPONENTS if best.name == "transfer_gap" else EXPONENTS
    loose: set[AxisName] = {
        axis for name, axis in exponents.items() if name in params and params[name].status == "not_determined"
    }  # fmt: skip
    return LawRecord(
        **names, law=best.name, equation=best.form.equation, params=params, candidates=candidates, noise=own.noise,
        residual=own.misses["residual"], held_out=own.misses["held_out"], coverage=_finite(own.laws.calibration.coverage),
        no_extrapolation=tuple(_closed(own, loose)),
    )  # fmt: skip


def _closed(own: ArmLaw, loose: set[AxisName]) -> Iterator[AxisName]:
    """Axes along which the laws must not be read beyond what was measured; `loose` are those without an exponent."""
    misfit, far_out = own.exceeds("residual", MISFIT), own.exceeds("held_out", FAR_OUT)
    for axis in AXIS_NAMES:
        if misfit or (far_out and axis == "upstream_samples") or axis in loose or len(own.runs.values(axis)) <= 2:
            yield axis


def _notes(own: ArmLaw, table: RunTable) -> Iterator[Note]:
    """Laws that fit or foretell poorly, or not at all."""
    names = {"where": own.setting.label(table), "metric": metric_of(own.metric), "arm": own.arm}
    if own.selection is None:
        yield note("no_law", **names, reason=own.reason)
        return
    for code, name, most in (("misfit", "residual", MISFIT), ("far_out", "held_out", FAR_OUT)):
        size = own.misses[name]
        if size is not None and own.exceeds(name, most):
            yield note(code, **names, size=size, times=size / own.floor)
    for axis in AXIS_NAMES if (own.metric, own.arm) == ("error_rate", table.arms[0]) else ():
        if len(own.runs.values(axis)) == 2:
            yield note("two_values", **names, axis=AXES[axis])


def _rms_log(predicted: np.ndarray, measured: np.ndarray) -> float | None:
    """Root mean square of log(predicted / measured); None where a prediction is missing."""
    ratio = np.log(np.maximum(predicted, SMALLEST)) - np.log(np.maximum(measured, SMALLEST))
    return float(np.sqrt(np.mean(ratio**2))) if len(ratio) and np.isfinite(ratio).all() else None


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _rounded(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist())


def _curves(own: ArmLaw, level: float) -> Iterator[schema.LawCurve]:
    """The average along each axis over its measured range, at every measured combination of the others."""
    for axis in AXIS_NAMES:
        sizes = own.runs.values(axis)
        if len(sizes) == 1:
            continue
        grid = np.geomspace(sizes[0], sizes[-1], CURVE_POINTS)
        # A student fixes the size of the model.
        fixed = [name for name in ("student", "upstream_samples", "downstream_samples") if name != axis]
        fixed = fixed[1:] if axis == "num_params" else fixed
        for run in {tuple(getattr(run, name) for name in fixed): run for run in own.runs}.values():
            at = {name: np.full(CURVE_POINTS, float(getattr(run, name))) for name in AXIS_NAMES} | {axis: grid}
            free: dict[str, Any] = dict.fromkeys(("student", "upstream_samples", "downstream_samples"))
            names = own.names | free | {name: getattr(run, name) for name in fixed}
            ends = map(_rounded, (own.laws.predict(at), *own.laws.curve_interval(at, level)))
            band = schema.Band(x=tuple(grid.tolist()), **dict(zip(("y", "low", "high"), ends, strict=True)))
            yield schema.LawCurve(**names, axis=axis, band=band)


def _predictions(own: ArmLaw) -> Iterator[schema.Prediction]:
    """Every run by laws that saw it, and runs at the largest D_p once more by laws that did not."""
    largest = own.runs.where(upstream_samples=own.runs.values("upstream_samples")[-1])
    names = set(schema.Prediction.model_fields) & set(COLUMNS)
    for runs, predicted in (own.runs, own.laws.predict(columns_of(own.runs.runs))), (largest, own.held_out[0]):
        for run, value in zip(runs, predicted.tolist(), strict=True):
            yield schema.Prediction(
                metric=own.metric, **{name: getattr(run, name) for name in names}, measured=getattr(run, own.metric),
                predicted=_finite(value), held_out=runs is largest,
            )  # fmt: skip


def _transfer(own: ArmLaw, options: Options) -> Iterator[schema.TransferRecord]:
    """The gap G of every student that has the values for it."""
    for student in own.runs.students:
        runs = own.runs.where(student=student)
        columns = {name: values for name, values in columns_of(runs.runs).items() if name != "num_params"}
        distinct = [len(set(values)) for values in columns.values()]
        if distinct[0] < FEWEST_SIZES or distinct[1] < 2:
            continue
        with suppress(LawError):
            fit = fit_law("transfer_gap", columns, np.maximum(runs.column(own.metric), SMALLEST), seed=options.seed)
            found = transfer_gap(fit, options.level)
            low, high = map(_finite, found.interval)
            gap = Estimate(value=float(found.gap), low=low, high=high)
            yield schema.TransferRecord(**own.names, student=student, gap=gap, gap_error=float(found.gap_error),
                                        share=float(found.share))  # fmt: skip


def _premises(arms: ArmLaws, level: float) -> Iterator[schema.PremiseRecord]:
    """Theorem 1's premise for every setting and metric: by the law with a floor that describes and foretells both arms
    best, because parameters of two different laws cannot be compared."""
    for setting, metric in product(arms.table.settings, METRICS):
        plain, distilled = (arms.of(setting, metric, arm) for arm in MAIN_ARMS)
        if plain is None or distilled is None:
            continue
        ours, theirs = (
            {each.name: (each.score, each.fit) for each in selection.candidates if each.fit and each.name in WITH_FLOOR}
            for selection in (plain, distilled)
        )
        shared = sorted(ours.keys() & theirs.keys(), key=lambda name: (ours[name][0] * theirs[name][0], name))
        if not shared:
            continue
        law = shared[0]
        resampled = bootstrap(ours[law][1], plain.resampling), bootstrap(theirs[law][1], distilled.resampling)
        found = premise(*resampled, level)
        floor, exponent, factor = (
            Estimate(value=middle, low=_finite(low), high=_finite(high))
            for middle, low, high in (found.floor, found.exponent, found.log_factor)
        )
        yield schema.PremiseRecord(
            **setting._asdict(), metric=metric, law=law, verdict=found.verdict, floor=floor, exponent=exponent,
            log_factor=factor,
        )  # fmt: skip


def _lever(own: ArmLaw, law: LawRecord, level: float) -> schema.LeverRecord:
    """Error at the largest point measured, and with twice as much of each lever that may be read that far."""
    student = own.runs.students[-1]
    largest = {name: own.runs.values(name)[-1] for name in ("upstream_samples", "downstream_samples")}
    point = {name: float(value) for name, value in (largest | {"num_params": own.runs.params(student)}).items()}

    def error(lever: AxisName | None = None) -> Estimate:
        at = {name: np.array([value * (2 if name == lever else 1)]) for name, value in point.items()}
        (low,), (high,) = own.laws.curve_interval(at, level)
        return Estimate(value=float(own.laws.predict(at)[0]), low=_finite(low), high=_finite(high))

    axes: list[AxisName] = [
        axis for axis in AXIS_NAMES if axis not in law.no_extrapolation and axis in own.laws.columns
    ]
    rate = exchange_rates(own.laws, point, level).get("upstream_samples_per_downstream_sample")
    both = set(largest) <= set(axes)
    return schema.LeverRecord(
        **own.names, student=student, **largest, error=error(),
        doubled={axis: error(axis) for axis in axes},
        images_per_label=Estimate(value=rate[0], low=rate[1], high=rate[2]) if rate and both else None,
    )  # fmt: skip


def _predictors(table: RunTable, level: float) -> Iterator[schema.PredictorRecord]:
    """How well cheap measurements rank checkpoints, for every downstream set and D_f with enough of them."""
    from scipy import stats

    for dataset, labels in sorted({(run.dataset, run.downstream_samples) for run in table.pretrained}):
        runs = table.pretrained.where(dataset=dataset, downstream_samples=labels)
        for column, name in PREDICTORS.items():
            pairs = {run.upstream_key or run.key: (getattr(run, column), run.error_rate) for run in runs}
            known = np.array([pair for pair in pairs.values() if pair[0] is not None], dtype=float).reshape(-1, 2)
            if len(known) < FEWEST_CHECKPOINTS or min(len(set(each)) for each in known.T) < 2:
                continue
            rho = float(np.corrcoef(stats.rankdata(known, axis=0).T)[0, 1])
            # Fisher's z with Bonett and Wright's variance for ranks.
            half = stats.norm.ppf(0.5 + level / 2) * np.sqrt((1 + rho**2 / 2) / (len(known) - 3))
            low, high = np.tanh(np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12)) + half * np.array([-1, 1]))
            yield schema.PredictorRecord(
                dataset=dataset, downstream_samples=labels, predictor=name, num_checkpoints=len(known),
                rho=Estimate(value=rho, low=float(low), high=float(high)),
            )  # fmt: skip
