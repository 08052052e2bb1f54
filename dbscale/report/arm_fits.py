"""One law fitted to one arm of one setting, with bootstrap refits that are paired across the arms.

A resample draws upstream runs (student, D_p, seed) with all their finetunes, the same ones in both arms; where the
per-sample results are at hand it also redraws the test samples, the same ones for every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dbscale.errors import LawError, NotEnoughData
from dbscale.laws import error_weights, fit_law, seed_spread
from dbscale.laws.law_fit import LawFit
from dbscale.laws.losses import Loss
from dbscale.laws.resample import Bootstrap, refit, resample_counts
from dbscale.report.table import Run, RunTable, Setting

LAWS = ("additive", "product", "m4_product", "transfer_gap")
AXES = ("upstream_samples", "num_params", "downstream_samples")
LOSS = Loss("huber", "log", 0.1)
"""Quadratic for the noise of seeds (about 10 %), linear for runs that went astray."""
SMALLEST_ERROR = 1e-4
LEAST_SEED_NOISE = 0.05
"""Spread between seeds, relative to the error, that weights assume at least: few seeds may agree by chance."""
UNKNOWN_TEST_SIZE = 10**6
EXPONENTS = (0.0, 2.0)
"""Beyond 2 an exponent only says that a term vanished after its first value."""
FEWEST_SIZES = 3
GAP_AXES = ("upstream_samples", "downstream_samples")


@dataclass(frozen=True)
class Resamples:
    """What each bootstrap world sees of a list of runs."""

    runs: tuple[Run, ...]
    counts: np.ndarray
    """How often each run is drawn, [B, n]."""
    errors: np.ndarray | None
    """Errors on the redrawn test samples, [B, n]; None where single results are not at hand."""

    def every(self, step: int) -> Resamples:
        """One world in `step`."""
        return replace(self, counts=self.counts[::step], errors=None if self.errors is None else self.errors[::step])

    def of(self, runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray | None]:
        """Counts and errors of some of the runs, in their order."""
        place = {id(run): i for i, run in enumerate(self.runs)}
        columns = [place[id(run)] for run in runs]
        return self.counts[:, columns], None if self.errors is None else self.errors[:, columns]


@dataclass(frozen=True)
class ArmFit:
    """A law of one arm; `fits` by student, or under None where one law holds for all."""

    law: str
    setting: Setting
    arm: str
    fits: dict[str | None, Bootstrap]
    failures: dict[str | None, LawError]

    @property
    def usable(self) -> bool:
        return bool(self.fits) and not self.failures

    def of(self, student: str) -> Bootstrap:
        """The fit that holds for a student."""
        return self.fits[None] if None in self.fits else self.fits[student]

    def predict(self, student: str, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The curve [n] and its bootstrap draws [B, n] at columns upstream_samples, num_params, downstream_samples."""
        found = self.of(student)
        own = {name: columns[name] for name in found.fit.form.variable_names}
        with np.errstate(over="ignore", invalid="ignore"):
            return found.fit.predict(own), found.predict(own)

    def resampled(self, runs: Sequence[Run], resamples: Resamples) -> ArmFit:
        """The same fits with refits to every bootstrap world."""
        groups = grouped(self.law, runs)
        drawn = {
            key: Bootstrap(
                found.fit, _refits(found.fit, groups[key], resamples), len({lineage(run) for run in groups[key]})
            )
            for key, found in self.fits.items()
        }
        return replace(self, fits=drawn)

    @property
    def num_params(self) -> int:
        """Free parameters of all its fits together."""
        return sum(found.fit.num_free for found in self.fits.values())

    def predict_runs(self, runs: Sequence[Run]) -> np.ndarray:
        """Predicted error of each run, [n]; nan for students without a fit."""
        predicted = np.full(len(runs), np.nan)
        for student in {run.student for run in runs}:
            if None not in self.fits and student not in self.fits:
                continue
            chosen = [i for i, run in enumerate(runs) if run.student == student]
            predicted[chosen] = self.predict(student, columns_of([runs[i] for i in chosen]))[0]
        return predicted


def columns_of(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """The axes of the laws as float arrays [n]."""
    return {name: np.array([float(getattr(run, name)) for run in runs]) for name in AXES}


def make_resamples(table: RunTable, wrong: dict[str, np.ndarray], *, count: int, seed: int) -> Resamples:
    """Bootstrap worlds of a setting's pretrained runs. `wrong` maps keys to mistakes [samples], or is empty."""
    counts = resample_counts(np.array([lineage(run) for run in table]), count, seed)
    return Resamples(table.runs, counts, _redrawn_errors(table, wrong, count, seed))


def lineage(run: Run) -> str:
    """Runs that are drawn together: one upstream run of either arm, with all its finetunes."""
    return f"{run.student}|{run.upstream_samples}|{run.seed}"


def _redrawn_errors(table: RunTable, wrong: dict[str, np.ndarray], count: int, seed: int) -> np.ndarray | None:
    rows = [wrong.get(run.key) for run in table]
    if any(row is None for row in rows) or len({len(row) for row in rows if row is not None}) != 1:
        return None
    mistakes = np.array(rows, dtype=np.float32)
    samples = mistakes.shape[1]
    weights = np.random.default_rng([seed, 1]).multinomial(samples, np.full(samples, 1 / samples), size=count)
    return (weights.astype(np.float32) @ mistakes.T) / samples


def grouped(law: str, runs: Sequence[Run]) -> dict[str | None, list[Run]]:
    """Runs that one fit describes: each student's own for laws without a size term, else all."""
    if law != "transfer_gap":
        return {None: list(runs)}
    return {name: [run for run in runs if run.student == name] for name in dict.fromkeys(run.student for run in runs)}


def fit_arm(law: str, setting: Setting, arm: str, runs: Sequence[Run], *, seed: int) -> ArmFit:
    """Fit one law to one arm; a law that cannot be fitted is a failure with its reason, never an exception."""
    found = ArmFit(law, setting, arm, {}, {})
    for student, group in grouped(law, runs).items():
        try:
            fit = _fit(law, group, seed)
        except LawError as error:
            found.failures[student] = error
        else:
            found.fits[student] = Bootstrap(fit, fit.theta[None])
    return found


def _fit(law: str, runs: Sequence[Run], seed: int) -> LawFit:
    if len({run.upstream_samples for run in runs}) < FEWEST_SIZES:
        raise NotEnoughData(f"a law in upstream data needs at least {FEWEST_SIZES} values of D_p")
    columns = columns_of(runs)
    errors = np.array([run.error_rate for run in runs])
    if law == "transfer_gap":
        columns.pop("num_params")
    bounds = {name: EXPONENTS for name in exponents_of(law, [c for c in columns if len(set(columns[c])) > 1])}
    return fit_law(law, columns, errors, weights=weights_of(runs), loss=LOSS, bounds=bounds, seed=seed)


def exponents_of(law: str, varying: Sequence[str]) -> list[str]:
    """Names of the exponents of the variables that vary."""
    names = {"upstream_samples": "alpha", "num_params": "beta", "downstream_samples": "gamma"}
    if law == "transfer_gap":
        names = {"upstream_samples": "alpha", "downstream_samples": "beta"} if len(varying) == len(GAP_AXES) else {}
    return [names[axis] for axis in varying if axis in names]


def weights_of(runs: Sequence[Run]) -> np.ndarray:
    """1 / variance of each log error, mean 1: binomial noise of the test set and the spread between seeds.

    Errors are averaged over seeds first, so that a lucky run does not weigh more than an unlucky one.
    """
    places = [f"{run.student}|{run.upstream_samples}|{run.downstream_samples}" for run in runs]
    cells: dict[str, list[float]] = {}
    for place, run in zip(places, runs, strict=True):
        cells.setdefault(place, []).append(run.error_rate)
    means = np.array([float(np.mean(cells[place])) for place in places])
    spread = np.maximum(seed_spread([run.error_rate for run in runs], places), LEAST_SEED_NOISE * means)
    return error_weights(means, [run.num_test_samples or UNKNOWN_TEST_SIZE for run in runs], seed_stderr=spread)


def _refits(fit: LawFit, runs: Sequence[Run], resamples: Resamples) -> np.ndarray:
    counts, errors = resamples.of(runs)
    targets = None if errors is None else np.log(np.maximum(errors, SMALLEST_ERROR))
    return refit(fit, counts * fit.weights, targets)


def rmsd_log(predicted: np.ndarray, measured: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Root (weighted) mean square of log(predicted / measured); None without points."""
    if len(measured) == 0:
        return None
    ratio = np.log(np.maximum(predicted, SMALLEST_ERROR)) - np.log(np.maximum(measured, SMALLEST_ERROR))
    return float(np.sqrt(np.average(ratio**2, weights=weights))) if np.isfinite(ratio).all() else None
