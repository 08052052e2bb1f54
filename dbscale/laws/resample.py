"""Resample a table and refit the law, all resamples at once.

Rows are resampled in a hierarchy: clusters (such as cells), labels within them (such as seeds), and the noise of the
finite test set. Two fits with the same labels and generator seed draw alike, which is what pairs the arms.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from dbscale.errors import LawError
from dbscale.laws.form import as_numbers
from dbscale.laws.law_fit import LawFit
from dbscale.laws.quantiles import student_quantile
from dbscale.laws.solver import Problem, minimise
from dbscale.laws.starts import restarts

BATCH = 64  # resamples per batch: small enough for their Jacobians to stay in cache


@dataclass(frozen=True)
class Bootstrap:
    """Refits of one law to resampled tables."""

    fit: LawFit
    theta: np.ndarray
    """Scaled coordinates [B, p]."""
    num_clusters: int = 0
    """How many clusters were drawn from; 0 means rows."""

    @property
    def params(self) -> np.ndarray:
        """[B, p] in the table's units, columns in the order of `fit.form.param_names`."""
        return self.fit.to_param_rows(self.theta)

    @property
    def stderr(self) -> dict[str, float]:
        """Standard deviation over the resamples."""
        return {n: float(s) for n, s in zip(self.fit.form.param_names, self.params.std(axis=0, ddof=1), strict=True)}

    def interval(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Percentile interval of each parameter, widened for small tables.

        Percentiles of n resampled rows are too narrow by √(n/(n − p)) and by Student's t over the normal quantile; both
        widen them around the estimate, in coordinates (so amplitudes stay positive).
        """
        matrix = self.fit.form.unscaling(self.fit.units)
        drawn = self.theta @ matrix[:, :-1].T + matrix[:, -1]
        middle = self.fit.theta @ matrix[:, :-1].T + matrix[:, -1]
        count = self.num_clusters or self.fit.num_points
        spare = max(count - self.fit.num_free, 1)
        wider = np.sqrt(count / spare) * student_quantile(level, spare) / NormalDist().inv_cdf(0.5 + level / 2)
        tails = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2], axis=0)
        is_log, vanished = self.fit.form.is_log, self.fit.form.is_log & (self.fit.theta <= self.fit.lower + 1.0)
        with np.errstate(over="ignore"):
            widened = middle + wider * (tails - middle)
            low, high = np.where(is_log, np.exp(widened), widened)
            # From an estimate of nothing, widening a logarithm would multiply by powers of the floor.
            low, high = np.where(vanished, np.exp(tails) * [[1.0], [wider]], [low, high])
        return {n: (float(a), float(b)) for n, a, b in zip(self.fit.form.param_names, low, high, strict=True)}

    def predict(self, x: object) -> np.ndarray:
        """The curve of every resample [B, n] at flat columns x."""
        return self.fit.predict_draws(x, self.theta)


def bootstrap(
    fit: LawFit,
    *,
    num_resamples: int = 1000,
    clusters: object = None,
    within: object = None,
    target_stderr: object = None,
    seed: int = 0,
) -> Bootstrap:
    """Refit `fit` to `num_resamples` resampled tables.

    The hierarchy: `clusters` [n] labels rows that are drawn together (default: each row alone; pass the cell),
    `within` [n] labels what is drawn again inside each drawn cluster (the seed), and `target_stderr` [n] is the
    standard error of each y from its finite test set, redrawn as normal noise. Two arms given the same labels and
    seed stay paired.
    """
    labels = np.arange(fit.num_points) if clusters is None else np.asarray(clusters)
    if len(labels) != fit.num_points:
        raise LawError(f"clusters has {len(labels)} labels, the fit {fit.num_points} rows")
    counts = resample_counts(labels, num_resamples, seed, within=within)
    targets = (
        None
        if target_stderr is None
        else noisy_targets(fit, as_numbers("target_stderr", target_stderr), num_resamples, seed)
    )
    return Bootstrap(fit, refit(fit, counts * fit.weights, targets), len(np.unique(labels)))


def noisy_targets(fit: LawFit, stderr: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Targets [B, n] with the test set's noise drawn anew, in the loss's space."""
    noise = np.random.default_rng([seed, 1]).standard_normal((num_resamples, fit.num_points))
    return np.log(fit.y) + noise * stderr / fit.y if fit.loss.is_log else fit.y + noise * stderr


def resample_counts(clusters: object, num_resamples: int, seed: int, *, within: object = None) -> np.ndarray:
    """How often each row is drawn [B, n] when clusters, and the labels within each, are drawn with replacement."""
    labels = (
        np.arange(clusters) if isinstance(clusters, int) else np.unique(np.asarray(clusters), return_inverse=True)[1]
    )
    rng = np.random.default_rng(seed)
    counts = _drawn(rng, num_resamples, int(labels.max()) + 1)[:, labels]
    if within is None:
        return counts
    inner = np.unique(np.asarray(within), return_inverse=True)[1]
    for cluster in range(int(labels.max()) + 1):
        rows = np.flatnonzero(labels == cluster)
        kinds, place = np.unique(inner[rows], return_inverse=True)
        counts[:, rows] *= _drawn(rng, num_resamples, len(kinds))[:, place]
    return counts


def _drawn(rng: np.random.Generator, num_resamples: int, num_labels: int) -> np.ndarray:
    """How often each of `num_labels` is drawn when as many are drawn with replacement [B, num_labels]."""
    draws = rng.integers(0, num_labels, (num_resamples, num_labels))
    counts = np.zeros((num_resamples, num_labels))
    np.add.at(counts, (np.arange(num_resamples)[:, None], draws), 1.0)
    return counts


def refit(fit: LawFit, weights: np.ndarray, targets: np.ndarray | None = None) -> np.ndarray:
    """Coordinates [B, p] of the law refitted from the full table's optimum with each row of weights [B, n].

    `targets` [B, n] replaces y in each resample, in the loss's space (log y under log losses).
    """
    target = np.log(fit.y) if fit.loss.is_log else fit.y
    problem = Problem(fit.form, fit.scaled(fit.x), target, fit.loss, fit.lower, fit.upper)
    starts, parts = restarts(fit.form, fit.theta, fit.lower, fit.y), []
    for k in range(0, len(weights), BATCH):
        own = None if targets is None else targets[k : k + BATCH]
        parts.append(_best_of(problem, starts, weights[k : k + BATCH], own))
    return np.concatenate(parts)


def _best_of(problem: Problem, starts: np.ndarray, weights: np.ndarray, targets: np.ndarray | None) -> np.ndarray:
    """The best coordinates [B, p] of each resample over a few starts [K, p]."""
    found = [
        minimise(problem, np.tile(start, (len(weights), 1)), weights, targets=targets, tolerance=1e-9)
        for start in starts
    ]
    best = np.argmin([minima.objective for minima in found], axis=0)
    return np.stack([minima.theta for minima in found])[best, np.arange(len(weights))]
