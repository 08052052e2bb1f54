"""Where the optimiser starts: the laws that a law contains, and a deterministic spread over its ranges."""

from __future__ import annotations

import zlib

import numpy as np

from dbscale.laws.form import Form
from dbscale.laws.solver import Problem

SCREENED_PER_PARAM = 48


def levels_of(y: np.ndarray) -> dict[str, float]:
    """What each `Param.unit` stands for in a table."""
    return {"": 1.0, "y_low": float(y.min()), "y_mid": float(np.median(y)), "y_high": float(y.max())}


def spread_starts(form: Form, y: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` coordinates [count, p], stratified in each parameter (a Latin hypercube drawn from the seed and the
    name).
    """
    rng = np.random.default_rng([seed, zlib.crc32(form.name.encode())])
    level = levels_of(y)
    theta = np.empty((count, len(form.params)))
    for k, p in enumerate(form.params):
        low, high = np.log(np.maximum(p.start, 1e-300)) if p.kind == "log" else np.array(p.start, dtype=float)
        u = (rng.permutation(count) + rng.random(count)) / count
        theta[:, k] = low + (high - low) * u
        scale = max(level[p.unit], 1e-300)
        theta[:, k] = theta[:, k] + np.log(scale) if p.kind == "log" else theta[:, k] * scale
    return theta


def best_starts(problem: Problem, y: np.ndarray, weights: np.ndarray, *, keep: int, seed: int) -> np.ndarray:
    """The `keep` best of a wide spread [keep, p], judged by the objective."""
    wide = spread_starts(problem.form, y, SCREENED_PER_PARAM * len(problem.form.params), seed)
    wide = np.clip(wide, problem.lower, problem.upper)
    return wide[np.argsort(problem.objective(wide, weights[None, :]), kind="stable")[:keep]]


def restarts(form: Form, theta: np.ndarray, lower: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where refits of a table like this one start [1 or 2, p]: its optimum, and that with vanished amplitudes regrown.

    At its floor the logarithm of an amplitude has no slope, so a term that vanished once would never come back.
    """
    level = levels_of(y)
    small = np.array([np.log(max(p.start[0] * level[p.unit], 1e-300)) if p.kind == "log" else 0.0 for p in form.params])
    gone = form.is_log & (theta <= lower + 1.0) & (lower < small)
    return np.stack([theta, np.where(gone, small, theta)]) if gone.any() else theta[None]
