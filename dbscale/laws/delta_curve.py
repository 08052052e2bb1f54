"""Curves of ΔE against log D_p from paired measurements, free of any law.

A Gaussian process (constant, slope and smooth bend in log D_p; noise from the given standard errors plus a scatter between
seeds that is inferred) with its hyperparameters averaged over their posterior, or an isotonic fit under a bootstrap.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from dbscale.laws.errors import LawError
from dbscale.laws.form import as_numbers


@dataclass(frozen=True)
class DeltaCurves:
    """ΔE along a grid of D_p: the best curve [n] and draws [S, n] from its uncertainty."""

    grid: np.ndarray
    best: np.ndarray
    drawn: np.ndarray


@dataclass(frozen=True)
class PairedDelta:
    """Paired differences, one row per (D_p, seed): ΔE = E_plain − E_distilled, positive where distilling pays."""

    upstream_samples: np.ndarray
    """[n] > 0."""
    delta: np.ndarray
    """[n] difference of error rates."""
    stderr: np.ndarray | None = None
    """[n] standard error of each difference from the finite test set (paired: from the samples on which the arms differ)."""
    seeds: np.ndarray | None = None
    """[n] labels; rows of one seed may share an offset."""

    def __post_init__(self) -> None:
        d_p, delta = as_numbers("upstream_samples", self.upstream_samples), as_numbers("delta", self.delta)
        stderr = np.zeros(len(delta)) if self.stderr is None else as_numbers("stderr", self.stderr)
        seeds = np.arange(len(delta)) if self.seeds is None else np.unique(np.asarray(self.seeds), return_inverse=True)[1]
        if not len(d_p) == len(delta) == len(stderr) == len(seeds):
            raise LawError("PairedDelta: upstream_samples, delta, stderr and seeds must have equal lengths")
        if not (np.isfinite(delta).all() and np.isfinite(d_p).all() and np.isfinite(stderr).all()):
            raise LawError("PairedDelta: values must be finite; drop the rows of failed cells")
        if np.any(d_p <= 0) or np.any(stderr < 0):
            raise LawError("PairedDelta: upstream_samples must be above 0 and stderr not below it")
        if len(np.unique(d_p)) < 3:
            raise LawError(f"PairedDelta: {len(np.unique(d_p))} distinct upstream_samples; a boundary needs at least 3")
        for name, value in (("upstream_samples", d_p), ("delta", delta), ("stderr", stderr), ("seeds", seeds)):
            object.__setattr__(self, name, value)

    @property
    def measured_range(self) -> tuple[float, float]:
        return float(self.upstream_samples.min()), float(self.upstream_samples.max())


def gaussian_process_curves(pairs: PairedDelta, *, num_draws: int, grid: np.ndarray, seed: int) -> DeltaCurves:
    """Posterior draws of ΔE on `grid`, hyperparameters included."""
    low, high = np.log(pairs.measured_range)
    t, t_grid = (np.log(pairs.upstream_samples) - low) / (high - low), (np.log(grid) - low) / (high - low)
    level = max(float(np.sqrt(np.mean(pairs.delta**2))), 1e-12)
    posteriors, scores = [], []
    for hyper in itertools.product((0.25, 0.5, 1.0), (0.1, 0.3, 1.0), scatter_levels(pairs)):
        score, mean, covariance = _posterior(pairs, t, t_grid, level, *hyper)
        posteriors.append((mean, covariance))
        scores.append(score)
    share = np.exp(np.array(scores) - max(scores))
    share /= share.sum()
    counts = np.random.default_rng(seed).multinomial(num_draws, share)
    rng = np.random.default_rng([seed, 1])
    drawn = [_draw(mean, cov, k, rng) for (mean, cov), k in zip(posteriors, counts, strict=True) if k]
    best = np.einsum("h,hn->n", share, np.array([m for m, _ in posteriors]))
    return DeltaCurves(grid, best, np.concatenate(drawn))


def scatter_levels(pairs: PairedDelta) -> tuple[float, ...]:
    """Candidate scatters between seeds: around what replicates at equal D_p show beyond their standard errors."""
    groups = [pairs.delta[pairs.upstream_samples == d] for d in np.unique(pairs.upstream_samples)]
    spare = sum(len(g) - 1 for g in groups)
    if spare:
        pooled = np.sqrt(sum(float(np.sum((g - g.mean()) ** 2)) for g in groups) / spare)
    else:
        pooled = 0.2 * float(np.std(pairs.delta))
    pooled = max(pooled, float(np.mean(pairs.stderr)), 1e-9)
    return tuple(float(pooled * f) for f in (0.25, 0.5, 0.75, 1.0, 1.4, 2.0))


def _kernel(a: np.ndarray, b: np.ndarray, level: float, length: float, bend: float) -> np.ndarray:
    """Constant + slope + smooth bend, in units of the data's level."""
    gap = a[:, None] - b[None, :]
    return level**2 * (4.0 + 4.0 * np.outer(a - 0.5, b - 0.5) + bend**2 * np.exp(-0.5 * (gap / length) ** 2))


def _posterior(
    pairs: PairedDelta, t: np.ndarray, t_grid: np.ndarray, level: float, length: float, bend: float, scatter: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log marginal likelihood, posterior mean [n] and covariance [n, n] on the grid."""
    noise = np.diag(pairs.stderr**2 + scatter**2)
    root = np.linalg.cholesky(_kernel(t, t, level, length, bend) + noise + 1e-12 * level**2 * np.eye(len(t)))
    across = np.linalg.solve(root, _kernel(t, t_grid, level, length, bend))
    white = np.linalg.solve(root, pairs.delta)
    score = -0.5 * float(white @ white) - float(np.log(np.diag(root)).sum())
    return score, across.T @ white, _kernel(t_grid, t_grid, level, length, bend) - across.T @ across


def _draw(mean: np.ndarray, covariance: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return mean + rng.standard_normal((count, len(mean))) @ (vectors * np.sqrt(np.maximum(values, 0.0))).T


def isotonic_curves(pairs: PairedDelta, *, num_draws: int, grid: np.ndarray, seed: int) -> DeltaCurves:
    """ΔE that only falls with D_p, fitted to resampled seeds; constant beyond the measured range."""
    from scipy.optimize import isotonic_regression

    d_p = np.unique(pairs.upstream_samples)
    labels = np.unique(pairs.seeds)
    rng = np.random.default_rng(seed)

    def curve(delta: np.ndarray, counts: np.ndarray) -> np.ndarray:
        share = [counts * (pairs.upstream_samples == d) for d in d_p]
        mass = np.array([s.sum() for s in share])
        means = np.array([(s * delta).sum() / max(m, 1e-300) for s, m in zip(share, mass, strict=True)])
        kept = mass > 0
        fitted = isotonic_regression(means[kept], weights=mass[kept], increasing=False).x
        return np.interp(np.log(grid), np.log(d_p[kept]), fitted)

    ones = np.ones(len(pairs.delta))
    drawn = []
    for _ in range(num_draws):
        picked = np.bincount(rng.integers(0, len(labels), len(labels)), minlength=len(labels)).astype(float)
        counts = picked[np.searchsorted(labels, pairs.seeds)]
        noisy = pairs.delta + pairs.stderr * rng.standard_normal(len(pairs.delta))
        drawn.append(curve(noisy, counts if counts.any() else ones))
    return DeltaCurves(grid, curve(pairs.delta, ones), np.array(drawn))
