"""Weights for error rates: inverse variances from the finite test set and from the spread between seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dbscale.errors import LawError
from dbscale.laws.form import as_numbers


def error_weights(error_rate: object, num_test: object, *, seed_stderr: object = 0.0, space: str = "log") -> np.ndarray:
    """Weights [n] = 1/variance with mean 1, for error rates measured on `num_test` samples each.

    The variance of an error rate p is p(1 − p)/num_test (binomial, p drawn in by half a sample from 0 and 1) plus
    `seed_stderr`² (from `seed_spread`, in units of the error rate); under a log loss it is divided by p².
    """
    errors, count = as_numbers("error_rate", error_rate), as_numbers("num_test", num_test)
    if np.any((errors < 0) | (errors > 1)):
        raise LawError("error_rate must lie between 0 and 1; these weights are for error rates")
    if np.any(count < 1):
        raise LawError("num_test must be at least 1")
    drawn_in = (errors * count + 0.5) / (count + 1)
    variance = drawn_in * (1 - drawn_in) / count + as_numbers("seed_stderr", seed_stderr) ** 2
    weights = 1 / (variance / drawn_in**2 if space == "log" else variance)
    return weights / weights.mean()


def seed_spread(error_rate: object, points: Sequence[object] | np.ndarray) -> np.ndarray:
    """Relative standard deviation between seeds, pooled over all points, times each error rate: [n].

    `points` labels the rows that differ in nothing but their seed. Pooling the relative spread is steadier than a
    spread per point from two or three seeds. 0 when no point was repeated.
    """
    errors = as_numbers("error_rate", error_rate)
    labels = np.unique(np.asarray(points), return_inverse=True, axis=0)[1].ravel()
    logs = np.log(np.maximum(errors, 1e-12))
    counts = np.bincount(labels)
    centred = logs - (np.bincount(labels, logs) / counts)[labels]
    spare = int(np.sum(counts - 1))
    return errors * (np.sqrt(float(np.sum(centred**2)) / spare) if spare else 0.0)
