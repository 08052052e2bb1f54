"""Intervals for predictions."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from dbscale.laws.law_fit import LawFit


def curve_stderr(fit: LawFit, x: Mapping[str, object] | object) -> np.ndarray:
    """Standard error [n] of the law's curve at `x` (of log y under log losses), by the delta method."""
    y, jacobian = fit.form.jacobian(fit.scaled(x), fit.theta[None])
    slopes = np.nan_to_num(jacobian[0] / y if fit.loss.is_log else jacobian[0])
    return np.sqrt(np.maximum(np.einsum("pn,pq,qn->n", slopes, fit.theta_covariance, slopes), 0.0))


def mean_interval(fit: LawFit, x: Mapping[str, object] | object, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the law's curve."""
    return _band(fit, x, NormalDist().inv_cdf(0.5 + level / 2) * curve_stderr(fit, x))


def prediction_interval(fit: LawFit, x: Mapping[str, object] | object, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Interval for a new measurement."""
    spread = np.hypot(curve_stderr(fit, x), np.sqrt(np.sum(fit.residuals**2) / max(fit.num_points - fit.num_free, 1)))
    return _band(fit, x, NormalDist().inv_cdf(0.5 + level / 2) * spread)


def _band(fit: LawFit, x: Mapping[str, object] | object, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y = fit.predict(x)
    return (y * np.exp(-half), y * np.exp(half)) if fit.loss.is_log else (y - half, y + half)
