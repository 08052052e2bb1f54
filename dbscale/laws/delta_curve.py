"""Curves of ΔE against log D_p from paired measurements, free of any law.

A Gaussian process (constant, slope and smooth bend in log D_p; noise from the given standard errors plus a scatter
between seeds that is inferred) with its hyperparameters averaged over their posterior, or an isotonic fit under a
bootstrap.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbscale.errors import LawError
from dbscale.laws.form import as_numbers

LENGTHS, BENDS, OFFSETS = (0.25, 0.5, 1.0), (0.1, 0.3, 1.0), (0.0, 0.5)
"""Hyperparameters averaged over: bend's length in units of the measured log range, its size, seeds' shared share."""
NODES = 20


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
    stderr: Any = None
    """[n] standard error of each difference from the finite test set (paired: from the samples on which the arms
    differ).
    """
    seeds: Any = None
    """[n] labels; rows of one seed may share an offset."""

    def __post_init__(self) -> None:
        d_p, delta = as_numbers("upstream_samples", self.upstream_samples), as_numbers("delta", self.delta)
        stderr = np.zeros(len(delta)) if self.stderr is None else as_numbers("stderr", self.stderr)
        seeds = (
            np.arange(len(delta)) if self.seeds is None else np.unique(np.asarray(self.seeds), return_inverse=True)[1]
        )
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
    def noise(self) -> np.ndarray:
        """`stderr` [n], zeros when none was given."""
        return np.zeros(len(self.delta)) if self.stderr is None else self.stderr

    @property
    def labels(self) -> np.ndarray:
        """`seeds` as integers [n], all different when none were given."""
        return np.arange(len(self.delta)) if self.seeds is None else self.seeds

    @property
    def measured_range(self) -> tuple[float, float]:
        return float(self.upstream_samples.min()), float(self.upstream_samples.max())


def gaussian_process_curves(pairs: PairedDelta, *, num_draws: int, grid: np.ndarray, seed: int) -> DeltaCurves:
    """Posterior draws of ΔE on `grid`, hyperparameters (bend, its length, scatter between seeds, seeds' offsets)
    included.
    """
    low, high = np.log(pairs.measured_range)
    t, t_grid = (np.log(pairs.upstream_samples) - low) / (high - low), (np.log(grid) - low) / (high - low)
    level = max(float(np.sqrt(np.mean(pairs.delta**2))), 1e-12)
    weights = [
        _posterior(pairs, level * _features(t, t_grid, length, bend), scatter, offset)
        for length, bend, scatter, offset in itertools.product(LENGTHS, BENDS, scatter_levels(pairs), OFFSETS)
    ]
    bases = [level * _features(t_grid, t_grid, length, bend) for length in LENGTHS for bend in BENDS]
    scores = np.array([score for score, _, _ in weights])
    share = np.exp(scores - scores.max())
    share /= share.sum()
    per_basis = len(weights) // len(bases)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_draws, share)
    drawn = [
        (mean + rng.standard_normal((count, len(mean))) @ root.T) @ bases[k // per_basis].T
        for k, (count, (_, mean, root)) in enumerate(zip(counts, weights, strict=True))
        if count
    ]
    best = sum(s * bases[k // per_basis] @ mean for k, (s, (_, mean, _)) in enumerate(zip(share, weights, strict=True)))
    return DeltaCurves(grid, np.asarray(best), np.concatenate(drawn))


def scatter_levels(pairs: PairedDelta) -> tuple[float, ...]:
    """Candidate scatters between seeds: around what replicates at equal D_p show beyond their standard errors."""
    groups = [pairs.delta[pairs.upstream_samples == d] for d in np.unique(pairs.upstream_samples)]
    spare = sum(len(g) - 1 for g in groups)
    if spare:
        pooled = np.sqrt(sum(float(np.sum((g - g.mean()) ** 2)) for g in groups) / spare)
    else:
        pooled = 0.2 * float(np.std(pairs.delta))
    pooled = max(pooled, float(np.mean(pairs.noise)), 1e-9)
    return tuple(float(pooled * f) for f in (0.25, 0.5, 0.75, 1.0, 1.4, 2.0))


def _features(t: np.ndarray, span: np.ndarray, length: float, bend: float) -> np.ndarray:
    """Columns whose standard-normal weights give constant + slope + smooth bend [len(t), 2 + NODES] (Nyström, unit
    level).
    """
    nodes = np.linspace(min(span.min(), t.min()), max(span.max(), t.max()), NODES)

    def kernel(a: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * ((a[:, None] - nodes[None, :]) / length) ** 2)

    values, vectors = np.linalg.eigh(kernel(nodes))
    kept = values > 1e-8 * values.max()
    smooth = kernel(t) @ vectors[:, kept] / np.sqrt(values[kept])
    return np.column_stack([np.full(len(t), 2.0), 2.0 * (t - 0.5), bend * smooth])


def _posterior(
    pairs: PairedDelta, features: np.ndarray, scatter: float, offset: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log marginal likelihood, posterior mean [q] and a root of the covariance [q, q] of the features' weights.

    `offset` is the share of the scatter's variance that all rows of one seed have in common.
    """
    same_seed = pairs.labels[:, None] == pairs.labels[None, :]
    noise = np.diag(pairs.noise**2 + (1 - offset) * scatter**2) + offset * scatter**2 * same_seed
    root = np.linalg.cholesky(noise + 1e-18 * np.eye(len(noise)))
    white = np.linalg.solve(root, np.column_stack([features, pairs.delta]))
    design, target = white[:, :-1], white[:, -1]
    precision = np.eye(features.shape[1]) + design.T @ design
    factor = np.linalg.cholesky(precision)
    half = np.linalg.solve(factor, design.T @ target)
    score = -0.5 * float(target @ target - half @ half) - float(
        np.log(np.diag(factor)).sum() + np.log(np.diag(root)).sum()
    )
    inverse = np.linalg.inv(factor)
    return score, inverse.T @ half, inverse.T


def isotonic_curves(pairs: PairedDelta, *, num_draws: int, grid: np.ndarray, seed: int) -> DeltaCurves:
    """ΔE that only falls with D_p, fitted to resampled seeds; constant beyond the measured range."""
    from scipy.optimize import isotonic_regression

    d_p = np.unique(pairs.upstream_samples)
    labels = np.unique(pairs.labels)
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
        counts = picked[np.searchsorted(labels, pairs.labels)]
        noisy = pairs.delta + pairs.noise * rng.standard_normal(len(pairs.delta))
        drawn.append(curve(noisy, counts if counts.any() else ones))
    return DeltaCurves(grid, curve(pairs.delta, ones), np.array(drawn))
