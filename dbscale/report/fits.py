"""Laws, ΔE and the boundary of every setting of a table: what `laws.json` and `boundary.json` hold.

A pure function of the table (and the per-sample results where they are at hand); drawing is `figures`'s and `page`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dbscale.report import schema
from dbscale.report.answers import answers
from dbscale.report.arm_fits import EXPONENTS, LAWS, ArmFit, Resamples, fit_arm, make_resamples, rmsd_log, weights_of
from dbscale.report.boundaries import free_boundaries, law_boundaries
from dbscale.report.curves import curves_of
from dbscale.report.deltas import delta_points, pairs_of, seed_noise_log
from dbscale.report.levers import lever_records
from dbscale.report.notes import about_delta, about_fits, about_missing
from dbscale.report.schema import (
    BoundaryFile,
    BoundaryRecord,
    Curve,
    DeltaPoint,
    Estimate,
    FitRecord,
    LawsFile,
    LeverRecord,
    Prediction,
    TransferRecord,
)
from dbscale.report.table import Run, RunTable, Setting
from dbscale.report.transfer import transfer_records

METHOD_VERSION = 7
"""Bumped when equal rows would give other findings, so that stored ones are made anew."""


@dataclass(frozen=True)
class Findings:
    """Both files of a study."""

    laws: LawsFile
    boundary: BoundaryFile

    def write(self, folder: Path) -> None:
        schema.write(folder / "laws.json", self.laws)
        schema.write(folder / "boundary.json", self.boundary)


@dataclass(frozen=True)
class Options:
    """How to fit."""

    level: float = 0.9
    """Of every interval."""
    num_bootstraps: int = 400
    """Refits of the chosen law; the others, which only the table of fits shows, get a quarter."""
    seed: int = 0


@dataclass(frozen=True)
class Candidate:
    """A law with both arms fitted, and how well it did."""

    law: str
    arms: dict[str, ArmFit]
    held_out: dict[str, ArmFit]
    """Fitted without the largest D_p."""

    @property
    def usable(self) -> dict[str, ArmFit]:
        """The arms that it describes."""
        return {arm: fit for arm, fit in self.arms.items() if fit.usable}

    def resampled(self, runs: RunTable, resamples: Resamples, every: int) -> Candidate:
        """With bootstrap draws from one resample in `every`."""
        part = resamples.every(every)
        return replace(
            self, arms={arm: fit.resampled(runs.where(arm=arm).runs, part) for arm, fit in self.arms.items()}
        )

    def score(self, runs: RunTable, arms: Sequence[str]) -> float:
        """Mean over `arms` of log(in-sample residual per degree of freedom × held-out residual); inf if it cannot.

        A law must both describe and predict. Residuals are weighted as in the fit.
        """
        if not all(self.arms[arm].usable for arm in arms):
            return float("inf")
        return float(np.mean([self._arm_score(arm, runs.where(arm=arm).runs) for arm in arms]))

    def _arm_score(self, arm: str, runs: Sequence[Run]) -> float:
        fit = self.arms[arm]
        freedom = max(len(runs) - fit.num_params, 1)
        inside = (residual(fit, runs, weighted=True) or 0.0) * np.sqrt(len(runs) / freedom)
        outside = residual(self.held_out.get(arm), last_size(runs), weighted=True)
        return float(np.log(max(inside, 1e-9)) + np.log(max(inside if outside is None else outside, 1e-9)))


def fit_grid(
    table: RunTable,
    *,
    wrong: Mapping[str, np.ndarray] | None = None,
    options: Options | None = None,
    source: str = "",
) -> Findings:
    """Fit every law to every arm of every setting, choose one, and find the boundaries.

    `wrong` maps run keys to per-test-sample mistakes [samples] (`mistakes.load_mistakes`); with it the bootstrap covers
    the test set as well as seeds. What cannot be fitted is recorded with its reason; nothing here raises for poor data.
    """
    options, wrong = options or Options(), dict(wrong or {})
    parts = [fit_setting(table, setting, wrong, options) for setting in table.settings]
    boundaries = [record for part in parts for record in part.boundaries]
    fits = [fit for part in parts for fit in part.fits]
    curves = [curve for part in parts for curve in part.curves]
    common: dict[str, Any] = {"grid": table.grid, "source": source, "level": options.level}
    laws = LawsFile(
        **common, num_bootstraps=options.num_bootstraps, seed=options.seed,
        fits=tuple(fits),
        curves=tuple(curve for curve in curves if curve.arm != "delta"),
        predictions=tuple(item for part in parts for item in part.predictions),
        transfer=tuple(item for part in parts for item in part.transfer),
        levers=tuple(item for part in parts for item in part.levers),
        notes=(*table.warnings, *about_missing(table), *(note for part in parts for note in part.notes)),
    )  # fmt: skip
    boundary = BoundaryFile(
        **common, answers=tuple(answers(table, boundaries, fits, level=options.level)), boundaries=tuple(boundaries),
        points=tuple(point for part in parts for point in part.points),
        curves=tuple(curve for curve in curves if curve.arm == "delta"),
        notes=tuple(note for part in parts for note in about_delta(part.boundaries, part.points, table)),
    )  # fmt: skip
    return Findings(laws, boundary)


@dataclass(frozen=True)
class SettingFindings:
    """All that was found in one setting."""

    fits: tuple[FitRecord, ...]
    curves: tuple[Curve, ...]
    predictions: tuple[Prediction, ...]
    boundaries: tuple[BoundaryRecord, ...]
    points: tuple[DeltaPoint, ...]
    transfer: tuple[TransferRecord, ...]
    levers: tuple[LeverRecord, ...]
    notes: tuple[str, ...]


def fit_setting(table: RunTable, setting: Setting, wrong: dict[str, np.ndarray], options: Options) -> SettingFindings:
    runs = table.pretrained.where(setting=setting)
    candidates, chosen = fit_laws(runs, setting, wrong, options)
    usable = chosen.usable if chosen else {}
    pairs = pairs_of(table, setting)
    from_laws = list(law_boundaries(runs, usable, level=options.level)) if len(usable) == 2 and pairs else []
    free = list(free_boundaries(runs, setting, pairs, wrong, level=options.level, seed=options.seed)) if pairs else []
    boundaries = [*from_laws, *free]
    fits = tuple(record for each in candidates for record in records_of(runs, each, each is chosen, options))
    arms = [fit for each in candidates for fit in each.arms.values()]
    curves = [curve for fit in usable.values() for curve in curves_of(table, fit, level=options.level)]
    return SettingFindings(
        fits=fits, curves=(*curves, *(curve for _, curve in boundaries if curve is not None)),
        predictions=tuple(predictions_of(runs, chosen)) if chosen else (),
        boundaries=tuple(record for record, _ in boundaries),
        points=tuple(delta_points(pairs, wrong, level=options.level)),
        transfer=tuple(transfer_records(table, arms, level=options.level)),
        levers=tuple(lever_records(runs, usable, level=options.level)),
        notes=tuple(about_fits(table, setting, fits)),
    )  # fmt: skip


def fit_laws(
    runs: RunTable, setting: Setting, wrong: dict[str, np.ndarray], options: Options
) -> tuple[list[Candidate], Candidate | None]:
    """Every law with its bootstrap, and the chosen one among them."""
    candidates = [fit_candidate(law, runs, setting, options) for law in LAWS]
    best = choose(runs, candidates)
    resamples = make_resamples(runs, wrong, count=options.num_bootstraps, seed=options.seed)
    drawn = [each.resampled(runs, resamples, 1 if each is best else 4) for each in candidates]
    return drawn, next((each for each in drawn if best is not None and each.law == best.law), None)


def fit_candidate(law: str, runs: RunTable, setting: Setting, options: Options) -> Candidate:
    """A law fitted to both arms, and once more to all but the largest D_p."""
    arms, held_out = {}, {}
    for arm in runs.arms:
        own = runs.where(arm=arm).runs
        arms[arm] = fit_arm(law, setting, arm, own, seed=options.seed)
        held_out[arm] = fit_arm(law, setting, arm, without_last_size(own), seed=options.seed)
    return Candidate(law, arms, held_out)


def choose(runs: RunTable, candidates: Sequence[Candidate]) -> Candidate | None:
    """The law whose residuals, seen and held out, are smallest; None where none could be fitted.

    An arm that no law fits yet, as in a study half done, has no say.
    """
    arms = [arm for arm in runs.arms if any(candidate.arms[arm].usable for candidate in candidates)]
    if not arms:
        return None
    scores = [candidate.score(runs, arms) for candidate in candidates]
    best = int(np.argmin(scores))
    return candidates[best] if np.isfinite(scores[best]) else None


def last_size(runs: Sequence[Run]) -> list[Run]:
    """Runs at the largest D_p."""
    largest = max(run.upstream_samples for run in runs)
    return [run for run in runs if run.upstream_samples == largest]


def without_last_size(runs: Sequence[Run]) -> list[Run]:
    largest = max(run.upstream_samples for run in runs)
    return [run for run in runs if run.upstream_samples < largest]


def residual(fit: ArmFit | None, runs: Sequence[Run], *, weighted: bool = False) -> float | None:
    """Root mean square log residual over runs; None where the fit cannot say."""
    if fit is None or not fit.fits:
        return None
    errors = np.array([run.error_rate for run in runs])
    return rmsd_log(fit.predict_runs(runs), errors, weights_of(runs) if weighted else None)


def records_of(runs: RunTable, candidate: Candidate, chosen: bool, options: Options) -> Iterator[FitRecord]:
    for arm, fit in candidate.arms.items():
        own = runs.where(arm=arm)
        for student in (*fit.fits, *fit.failures):
            part = own if student is None else own.where(student=student)
            yield _record(fit, student, part, candidate.held_out[arm], chosen, options)


def _record(
    fit: ArmFit, student: str | None, runs: RunTable, held_out: ArmFit, chosen: bool, options: Options
) -> FitRecord:
    common: dict[str, Any] = {
        "law": fit.law, **fit.setting._asdict(), "arm": fit.arm, "student": student, "num_runs": len(runs),
        "noise_log": seed_noise_log(list(runs)),
    }  # fmt: skip
    if student in fit.failures:
        failure = fit.failures[student]
        status = "not_enough_data" if "NotEnoughData" in type(failure).__name__ else "failed"
        return FitRecord(**common, status=status, reason=str(failure))
    found = fit.fits[student]
    intervals = found.interval(options.level)
    written = found.fit.to_dict(calibrate=True) if chosen else None
    covered = written["calibration"]["coverage"].get("0.9") if written else None
    return FitRecord(
        **common, status="fitted", chosen=chosen, equation=found.fit.form.equation,
        variables=found.fit.form.variable_names, warnings=found.fit.warnings,
        at_bound=found.fit.at_bound,
        params={name: estimate(name, value, *intervals[name]) for name, value in found.fit.params.items()},
        rmsd_log=residual(fit, runs.runs), held_out_rmsd_log=residual(held_out, last_size(runs.runs)),
        coverage=covered, law_fit=written,
    )  # fmt: skip


def estimate(name: str, value: float, low: float, high: float) -> Estimate:
    """A parameter with its interval, kept within what the fit allows: widened percentiles may reach beyond."""
    floor, ceiling = EXPONENTS if name in ("alpha", "beta", "gamma") else (0.0, np.inf)
    finite = [float(bound) if np.isfinite(bound) else None for bound in (max(low, floor), min(high, ceiling))]
    return Estimate(value=value, low=finite[0], high=finite[1])


def predictions_of(runs: RunTable, chosen: Candidate) -> Iterator[Prediction]:
    """Every run by the law that saw it, and runs at the largest D_p once more by the law that did not."""
    for arm, fit in chosen.arms.items():
        own = runs.where(arm=arm).runs
        yield from _predictions(fit, own, held_out=False)
        if chosen.held_out[arm].fits:
            yield from _predictions(chosen.held_out[arm], last_size(own), held_out=True)


def _predictions(fit: ArmFit, runs: Sequence[Run], *, held_out: bool) -> Iterator[Prediction]:
    for run, value in zip(runs, fit.predict_runs(runs), strict=True):
        yield Prediction(
            key=run.key, arm=run.arm, **run.setting._asdict(), student=run.student,
            upstream_samples=run.upstream_samples,
            downstream_samples=run.downstream_samples, seed=run.seed, measured=run.error_rate,
            predicted=float(value) if np.isfinite(value) else None, held_out=held_out,
        )  # fmt: skip
