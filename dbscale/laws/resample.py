"""Resample a table and refit the law, all resamples at once.

Rows are resampled within a hierarchy: first clusters (such as cells), then seeds within them, then rows. Two fits
with the same clusters and seed of the generator draw the same ones, which is what pairs the arms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dbscale.laws.errors import LawError
from dbscale.laws.law_fit import LawFit
from dbscale.laws.solver import Problem, minimise

BATCH = 64  # resamples per batch: small enough for their Jacobians to stay in cache


@dataclass(frozen=True)
class Bootstrap:
    """Refits of one law to resampled tables."""

    fit: LawFit
    theta: np.ndarray
    """Scaled coordinates [B, p]."""

    @property
    def params(self) -> np.ndarray:
        """[B, p] in the table's units, columns in the order of `fit.form.param_names`."""
        return self.fit.to_param_rows(self.theta)

    @property
    def stderr(self) -> dict[str, float]:
        """Standard deviation over the resamples."""
        return {n: float(s) for n, s in zip(self.fit.form.param_names, self.params.std(axis=0, ddof=1), strict=True)}

    def interval(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Percentile interval of each parameter."""
        low, high = np.quantile(self.params, [0.5 - level / 2, 0.5 + level / 2], axis=0)
        return {n: (float(a), float(b)) for n, a, b in zip(self.fit.form.param_names, low, high, strict=True)}

    def predict(self, x: object) -> np.ndarray:
        """The curve of every resample [B, n] at flat columns x."""
        return self.fit.predict_draws(x, self.theta)


def bootstrap(fit: LawFit, *, num_resamples: int = 1000, clusters: object = None, seed: int = 0) -> Bootstrap:
    """Refit `fit` to `num_resamples` resampled tables. `clusters` [n] labels rows that are drawn together (default:
    rows).
    """
    counts = resample_counts(fit.num_points if clusters is None else clusters, num_resamples, seed)
    if counts.shape[1] != fit.num_points:
        raise LawError(f"clusters has {counts.shape[1]} labels, the fit {fit.num_points} rows")
    return Bootstrap(fit, refit(fit, counts * fit.weights))


def resample_counts(clusters: object, num_resamples: int, seed: int) -> np.ndarray:
    """How often each row is drawn [B, n] when clusters are drawn with replacement."""
    if isinstance(clusters, int):
        labels = np.arange(clusters)
    else:
        labels = np.unique(np.asarray(clusters), return_inverse=True)[1]
    num_clusters = int(labels.max()) + 1
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, num_clusters, (num_resamples, num_clusters))
    counts = np.zeros((num_resamples, num_clusters))
    np.add.at(counts, (np.arange(num_resamples)[:, None], draws), 1.0)
    return counts[:, labels]


def refit(fit: LawFit, weights: np.ndarray, targets: np.ndarray | None = None) -> np.ndarray:
    """Coordinates [B, p] of the law refitted with each row of weights [B, n], from the full table's optimum."""
    target = np.log(fit.y) if fit.loss.is_log else fit.y
    problem = Problem(fit.form, fit.scaled(fit.x), target, fit.loss, fit.lower, fit.upper)
    theta = np.broadcast_to(fit.theta, (len(weights), len(fit.theta)))
    parts = [
        minimise(problem, theta[k : k + BATCH].copy(), weights[k : k + BATCH], tolerance=1e-9).theta
        for k in range(0, len(weights), BATCH)
    ]
    return np.concatenate(parts)
