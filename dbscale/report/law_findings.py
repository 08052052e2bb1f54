"""What the laws say of each arm: the average that predicts, its curves, held-out errors, transfer gaps and levers.

Asks the engine (`dbscale.laws.select_law`) once for every setting, metric and arm, and fills laws.json. Verdicts are
`findings`', which takes the laws' ΔE from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from dbscale.errors import LawError, NotEnoughData
from dbscale.laws import (
    DeltaCurves,
    Pairs,
    Selection,
    error_weights,
    exchange_rates,
    fit_law,
    seed_spread,
    select_law,
    transfer_gap,
)  # fmt: skip
from dbscale.report import schema
from dbscale.report.schema import AxisName, Estimate, LawRecord, Note, ParamRecord
from dbscale.report.table import Run, RunTable, Setting
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
    """Of every interval."""
    min_effect: float = 0.005
    """δ of error rates; other metrics take the same share of their mean."""
    num_draws: int = 1000
    """Curves drawn for every contrast."""
    num_resamples: int = 200
    """Resamples behind the laws."""
    seed: int = 0


@dataclass(frozen=True)
class ArmLaws:
    """Every selection of a study, or why there is none, by setting, metric and arm."""

    table: RunTable
    found: Mapping[tuple[Setting, str, str], Selection | str]

    def of(self, setting: Setting, metric: str, arm: str) -> Selection | None:
        selection = self.found.get((setting, metric, arm))
        return selection if isinstance(selection, Selection) else None

    def runs(self, setting: Setting, metric: str, arm: str) -> RunTable:
        """The runs that a selection was fitted to."""
        return self.table.pretrained.where(lambda run: getattr(run, metric) is not None, setting=setting, arm=arm)


def study_laws(table: RunTable, options: Options, source: str) -> tuple[ArmLaws, schema.LawsFile]:
    """Fit the laws of every arm and write down what they say; an arm without a law is recorded with the reason."""
    arms = arm_laws(table, options)
    held = {key: found.held_out() for key, found in arms.found.items() if isinstance(found, Selection)}
    laws = [_record(arms, key, options, held) for key in arms.found]
    known = [(law, key) for law, key in zip(laws, arms.found, strict=True) if not law.reason]
    errors = [(law, key) for law, key in known if law.metric == "error_rate"]
    return arms, schema.LawsFile(
        grid=table.grid, source=source, level=options.level, num_draws=options.num_resamples, seed=options.seed,
        laws=tuple(laws),
        curves=tuple(curve for _, key in known for curve in _curves(arms, key, options.level)),
        predictions=tuple(each for _, key in errors for each in _predictions(arms, key, held[key][0])),
        transfer=tuple(_transfer(table, options)),
        levers=tuple(_lever(arms, key, law, options.level) for law, key in errors),
        predictors=tuple(_predictors(table, options.level)),
        notes=tuple(each for law in laws for each in _notes(arms, law)),
    )  # fmt: skip


Key = tuple[Setting, str, str]


def arm_laws(table: RunTable, options: Options, metrics: Sequence[str] = METRICS) -> ArmLaws:
    """Fit the laws of every arm; one that has none keeps the reason."""
    return ArmLaws(table, dict(_selections(table, options, metrics)))


def _selections(table: RunTable, options: Options, metrics: Sequence[str]) -> Iterator[tuple[Key, Selection | str]]:
    for setting, metric in product(table.settings, metrics):
        for arm in table.arms:
            runs = table.pretrained.where(lambda run, m=metric: getattr(run, m) is not None, setting=setting, arm=arm)
            if len(runs):
                try:
                    yield (setting, metric, arm), _select(runs, metric, options)
                except LawError as error:
                    yield (setting, metric, arm), str(error)


def _select(runs: RunTable, metric: str, options: Options) -> Selection:
    if len(runs.values("upstream_samples")) < FEWEST_SIZES:
        raise NotEnoughData(f"laws of upstream data need {FEWEST_SIZES} values of D_p")
    columns = {name: values for name, values in columns_of(runs.runs).items() if len(set(values)) > 1}
    is_error = metric == "error_rate"
    tests = np.array([run.num_test_samples or UNKNOWN_TEST_SIZE for run in runs])
    errors = np.array(runs.column("error_rate"))
    return select_law(
        columns, np.maximum(runs.column(metric), SMALLEST), weights=_weights(runs, tests) if is_error else None,
        clusters=[f"{run.student}|{run.upstream_samples}|{run.seed}" for run in runs],
        within=[f"{run.downstream_samples}|{run.finetune}" for run in runs],
        stderr=np.sqrt(errors * (1 - errors) / tests) if is_error else None, ceiling=1.0 if is_error else None,
        num_resamples=options.num_resamples, seed=options.seed,
    )  # fmt: skip


def _weights(runs: RunTable, tests: np.ndarray) -> np.ndarray:
    """Inverse variances; errors are averaged over seeds first, so that a lucky run does not weigh more than another."""
    points = [f"{run.student}|{run.upstream_samples}|{run.downstream_samples}" for run in runs]
    errors = np.array(runs.column("error_rate"))
    _, place = np.unique(points, return_inverse=True)
    means = (np.bincount(place, errors) / np.bincount(place))[place]
    return error_weights(means, tests, seed_stderr=np.maximum(seed_spread(errors, points), LEAST_SEED_NOISE * means))


def columns_of(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """The axes of the laws as float arrays [n]."""
    return {name: np.array([float(getattr(run, name)) for run in runs]) for name in AXIS_NAMES}


def law_delta(arms: ArmLaws, setting: Setting, metric: str, pairs: Pairs) -> DeltaCurves | None:
    """ΔE of the fitted laws over the measured range, mean over the students and D_f of the pairs; None without laws."""
    plain, distilled = (arms.of(setting, metric, arm) for arm in ("plain", "distilled"))
    if plain is None or distilled is None:
        return None
    grid = np.geomspace(pairs.x.min(), pairs.x.max(), 8 * CURVE_POINTS)
    strata: set[tuple[Any, Any]] = set(zip(pairs.student.tolist(), pairs.labels.tolist(), strict=True))
    best, drawn = [], []
    for student, labels in sorted(strata, key=str):
        sizes = {"num_params": arms.table.params(student), "downstream_samples": labels}
        at = {"upstream_samples": grid} | {name: np.full(len(grid), float(size)) for name, size in sizes.items()}
        best.append(plain.predict(at) - distilled.predict(at))
        drawn.append(plain.draws(at) - distilled.draws(at))
    name = " and ".join(dict.fromkeys(law.best.name for law in (plain, distilled)))
    return DeltaCurves(grid, np.mean(best, axis=0), np.mean(drawn, axis=0), name)


def _record(arms: ArmLaws, key: Key, options: Options, held: Mapping[Key, tuple[np.ndarray, np.ndarray]]) -> LawRecord:
    setting, metric, arm = key
    runs, found = arms.runs(*key), arms.found[key]
    names: dict[str, Any] = {**setting._asdict(), "metric": metric, "arm": arm, "num_runs": len(runs)}
    if isinstance(found, str):
        return LawRecord(**names, reason=found)
    residual = _rms_log(found.predict(columns_of(runs.runs)), np.array(runs.column(metric)))
    held_out, noise = _rms_log(*held[key]), _noise(runs, metric)
    params = _params(found, options.level)
    return LawRecord(
        **names, law=found.best.name, equation=found.best.form.equation, params=params, residual=residual,
        candidates=tuple(
            schema.CandidateRecord(law=each.name, weight=float(each.weight), in_sample=_finite(each.in_sample),
                            held_out=_finite(each.held_out), reason=each.reason)
            for each in found.candidates
        ),
        held_out=held_out, noise=noise, coverage=_finite(found.calibration.coverage),
        no_extrapolation=tuple(_closed(runs, _loose(found.best.name, params), residual, held_out, noise)),
    )  # fmt: skip


def _params(found: Selection, level: float) -> dict[str, ParamRecord]:
    intervals, records = found.bootstrap.interval(level), {}
    for name, value in found.best.params.items():
        ends = intervals.get(name)
        if ends is None:
            records[name] = ParamRecord(value=None, status="not_determined")
        else:
            status = "at_bound" if name in found.best.at_bound else "determined"
            records[name] = ParamRecord(value=float(value), low=_finite(ends[0]), high=_finite(ends[1]), status=status)
    return records


def _loose(law: str, params: Mapping[str, ParamRecord]) -> set[AxisName]:
    """Axes whose exponent the table does not determine."""
    exponents = GAP_EXPONENTS if law == "transfer_gap" else EXPONENTS
    return {axis for name, axis in exponents.items() if name in params and params[name].status == "not_determined"}


def _closed(
    runs: RunTable, loose: set[AxisName], residual: float | None, held_out: float | None, noise: float | None
) -> Iterator[AxisName]:
    """Axes along which the laws must not be read beyond what was measured."""
    floor = max(noise or LEAST_SEED_NOISE, LEAST_NOISE)
    misfit = residual is None or residual > MISFIT * floor
    for axis in AXIS_NAMES:
        far = axis == "upstream_samples" and (held_out is None or held_out > FAR_OUT * floor)
        if misfit or far or axis in loose or len(runs.values(axis)) <= 2:
            yield axis


def _notes(arms: ArmLaws, law: LawRecord) -> Iterator[Note]:
    """Laws that fit or foretell poorly, or not at all."""
    setting = Setting(law.variant, law.upstream_dataset, law.dataset)
    names = {"where": setting.label(arms.table), "metric": metric_of(law.metric), "arm": law.arm}
    if law.reason:
        yield note("no_law", **names, reason=law.reason)
        return
    floor = max(law.noise or LEAST_SEED_NOISE, LEAST_NOISE)
    if law.residual is not None and law.residual > MISFIT * floor:
        yield note("misfit", **names, size=law.residual, times=law.residual / floor)
    if law.held_out is not None and law.held_out > FAR_OUT * floor:
        yield note("far_out", **names, size=law.held_out)
    for axis in AXIS_NAMES if law.metric == "error_rate" and law.arm == arms.table.arms[0] else ():
        if len(arms.runs(setting, law.metric, law.arm).values(axis)) == 2:
            yield note("two_values", **names, axis=AXES[axis])


def _rms_log(predicted: np.ndarray, measured: np.ndarray) -> float | None:
    """Root mean square of log(predicted / measured); None where a prediction is missing."""
    ratio = np.log(np.maximum(predicted, SMALLEST)) - np.log(np.maximum(measured, SMALLEST))
    return float(np.sqrt(np.mean(ratio**2))) if len(ratio) and np.isfinite(ratio).all() else None


def _noise(runs: RunTable, metric: str) -> float | None:
    """Spread of log y between seeds of one point; None where no point was repeated."""
    cells: dict[Any, list[float]] = {}
    for run in runs:
        place = (run.student, run.upstream_samples, run.downstream_samples)
        cells.setdefault(place, []).append(float(np.log(max(getattr(run, metric), SMALLEST))))
    degrees = sum(len(values) - 1 for values in cells.values())
    squares = sum(float(np.var(values) * len(values)) for values in cells.values())
    return float(np.sqrt(squares / degrees)) if degrees else None


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _rounded(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist())


def _curves(arms: ArmLaws, key: Key, level: float) -> Iterator[schema.LawCurve]:
    """The average along each axis over its measured range, at every measured combination of the others."""
    runs, found = arms.runs(*key), arms.of(*key)
    assert found is not None
    for axis in AXIS_NAMES:
        ends = runs.values(axis)[0], runs.values(axis)[-1]
        if ends[0] == ends[1]:
            continue
        grid = np.geomspace(*ends, CURVE_POINTS)
        fixed = [name for name in ("student", "upstream_samples", "downstream_samples") if _is_free(name, axis)]
        for place in sorted({tuple(getattr(run, name) for name in fixed) for run in runs}, key=str):
            at = dict(zip(fixed, place, strict=True))
            band = _band(found, grid, axis, at, runs, level)
            names: dict[str, Any] = {"student": None, "upstream_samples": None, "downstream_samples": None} | at
            yield schema.LawCurve(**key[0]._asdict(), metric=key[1], arm=key[2], axis=axis, **names, band=band)


def _is_free(column: str, axis: AxisName) -> bool:
    """A student fixes the size of the model."""
    return axis != ("num_params" if column == "student" else column)


def _band(
    found: Selection, grid: np.ndarray, axis: AxisName, at: Mapping[str, Any], runs: RunTable, level: float
) -> schema.Band:
    columns: dict[str, np.ndarray] = {axis: grid}
    for name in AXIS_NAMES:
        if name != axis:
            value = runs.params(at["student"]) if name == "num_params" else at[name]
            columns[name] = np.full(len(grid), float(value))
    low, high = found.curve_interval(columns, level)
    return schema.Band(
        x=tuple(map(float, grid)), y=_rounded(found.predict(columns)), low=_rounded(low), high=_rounded(high)
    )


def _predictions(arms: ArmLaws, key: Key, held: np.ndarray) -> Iterator[schema.Prediction]:
    """Every run by laws that saw it, and runs at the largest D_p once more by laws that did not."""
    runs, found = arms.runs(*key), arms.of(*key)
    assert found is not None
    largest = runs.where(upstream_samples=runs.values("upstream_samples")[-1])
    parts = ((runs, found.predict(columns_of(runs.runs)), False), (largest, held, True))
    for part, predicted, held_out in parts:
        for run, value in zip(part, predicted.tolist(), strict=True):
            yield schema.Prediction(
                key=run.key, arm=run.arm, **run.setting._asdict(), student=run.student,
                upstream_samples=run.upstream_samples, downstream_samples=run.downstream_samples, seed=run.seed,
                measured=run.error_rate, predicted=_finite(value), held_out=held_out,
            )  # fmt: skip


def _transfer(table: RunTable, options: Options) -> Iterator[schema.TransferRecord]:
    """The gap G of every student and arm that has the values for it."""
    for setting, arm, student in product(table.settings, table.arms, table.students):
        runs = table.pretrained.where(setting=setting, arm=arm, student=student)
        if len(runs.values("upstream_samples")) < FEWEST_SIZES or len(runs.values("downstream_samples")) < 2:
            continue
        columns = {name: values for name, values in columns_of(runs.runs).items() if name != "num_params"}
        try:
            fit = fit_law("transfer_gap", columns, np.maximum(runs.column("error_rate"), SMALLEST), seed=options.seed)
            found = transfer_gap(fit, options.level)
        except LawError:
            continue
        low, high = map(_finite, found.interval)
        yield schema.TransferRecord(**setting._asdict(), arm=arm, student=student, share=float(found.share),
                             gap=Estimate(value=float(found.gap), low=low, high=high),
                             gap_error=float(found.gap_error))  # fmt: skip


def _lever(arms: ArmLaws, key: Key, law: LawRecord, level: float) -> schema.LeverRecord:
    """Error at the largest point measured, and with twice as much of each lever that may be read that far."""
    runs, found = arms.runs(*key), arms.of(*key)
    assert found is not None
    student = runs.students[-1]
    sizes = (runs.values("upstream_samples")[-1], runs.params(student), runs.values("downstream_samples")[-1])
    point = {str(name): float(size) for name, size in zip(AXIS_NAMES, sizes, strict=True)}

    def error(lever: AxisName | None = None) -> Estimate:
        at = {name: np.array([value * (2 if name == lever else 1)]) for name, value in point.items()}
        low, high = found.curve_interval(at, level)
        return Estimate(value=float(found.predict(at)[0]), low=_finite(low[0]), high=_finite(high[0]))

    open_axes: list[AxisName] = [
        axis for axis in AXIS_NAMES if axis not in law.no_extrapolation and axis in found.columns
    ]
    rate = exchange_rates(found, point, level).get("upstream_samples_per_downstream_sample")
    both = {"upstream_samples", "downstream_samples"} <= set(open_axes)
    return schema.LeverRecord(
        **key[0]._asdict(), arm=key[2], student=student, upstream_samples=int(sizes[0]),
        downstream_samples=int(sizes[2]), error=error(), doubled={axis: error(axis) for axis in open_axes},
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
