"""Intervals for predictions: of the law's curve, and of new measurements, the latter calibrated by rolling origins.

A law's own error bars assume that the law is true and cover far too little outside the measured range. So the width
comes from how wrong the law was, at each distance, when it was fitted to the smaller part of the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from dbscale.laws.fitted import Fitted
from dbscale.laws.rolling import RollingErrors, beyond, rolling_origin

UNKNOWN_DRIFT = 0.05
"""Error per unit of log distance that is assumed when the table is too short for a single rolling origin."""
MAX_DISTANCE = 1.5
"""Rolling errors further out than this (in log x) say little about the next doubling and are not used, unless the
table's levels lie further apart.
"""


@dataclass(frozen=True)
class Calibration:
    """Error size as a function of distance beyond the data: √(noise² + (drift·distance)²) times a quantile of
    `scores`.
    """

    noise: float
    """Rms residual inside the data, per degree of freedom."""
    drift: float
    """Growth of the error per unit of log distance."""
    scores: np.ndarray
    """|held-out error| over its predicted size, sorted; empty when no origin could be fitted."""
    coverage: Mapping[str, float]
    """Share of held-out points inside the interval whose quantile came from the other origins, per nominal level."""

    def to_dict(self) -> dict:
        """JSON-ready, for the report."""
        return {
            "noise": self.noise,
            "drift": self.drift,
            "num_scores": len(self.scores),
            "coverage": dict(self.coverage),
        }

    def half_width(self, distance: np.ndarray, level: float) -> np.ndarray:
        """Half the interval [n] at these distances."""
        return self.quantile(level) * np.hypot(self.noise, self.drift * distance)

    def quantile(self, level: float) -> float:
        """The scores' quantile, but never less than normal errors would need."""
        normal = NormalDist().inv_cdf(0.5 + level / 2)
        return max(score_quantile(self.scores, level), normal) if len(self.scores) else normal


def score_quantile(scores: np.ndarray, level: float) -> float:
    """A quantile halfway between `level` and 1: errors of one origin move together, so they count for less than
    they are.
    """
    return float(np.quantile(scores, (1 + level) / 2))


def make_calibration(noise: float, rolling: RollingErrors) -> Calibration:
    """Calibrate from in-sample noise and held-out errors."""
    use = rolling.near(MAX_DISTANCE)
    if not use.any():
        return Calibration(noise, UNKNOWN_DRIFT, np.array([]), {})
    error, distance = np.abs(rolling.error[use]), rolling.distance[use]
    excess = np.sqrt(np.maximum(error**2 - noise**2, 0.0))
    drift = float(np.median(excess[distance > 0] / distance[distance > 0])) if np.any(distance > 0) else 0.0
    drift = max(drift, noise)  # a flat record over a few origins is luck, not knowledge
    scores = error / np.maximum(np.hypot(noise, drift * distance), 1e-12)
    origin = np.nonzero(use)[0]
    return Calibration(noise, drift, np.sort(scores), held_out_coverage(scores, origin))


def held_out_coverage(scores: np.ndarray, origin: np.ndarray) -> dict[str, float]:
    """Coverage of 50 % and 90 % intervals when each origin's quantile comes from the other origins."""
    out = {}
    for level in (0.5, 0.9):
        inside = [
            scores[origin == k] <= score_quantile(scores[origin != k], level)
            for k in np.unique(origin)
            if np.any(origin != k)
        ]
        if inside:
            out[f"{level:g}"] = float(np.mean(np.concatenate(inside)))
    return out


@lru_cache(maxsize=64)
def calibration_of(fit: Fitted) -> Calibration:
    """The calibration of one law, computed on first use."""
    return make_calibration(in_sample_noise(fit), rolling_origin(fit))


def in_sample_noise(fit: Fitted) -> float:
    """Rms residual per degree of freedom."""
    spare = max(fit.num_points - fit.num_free, 1)
    return float(np.sqrt(np.sum(fit.weights / fit.weights.mean() * fit.residuals**2) / spare))


def distance_beyond(table: Mapping[str, np.ndarray], x: Mapping[str, np.ndarray]) -> np.ndarray:
    """How far the points `x` lie beyond the table's largest values; 0 inside."""
    trained = np.concatenate(
        [np.ones(len(next(iter(table.values()))), bool), np.zeros(np.size(next(iter(x.values()))), bool)]
    )
    joined = {n: np.concatenate([table[n], np.ravel(x[n])]) for n in table}
    return beyond(joined, trained)[~trained]


def curve_stderr(fit: Fitted, x: Mapping[str, object] | object) -> np.ndarray:
    """Standard error [n] of the law's curve at `x` (of log y under log losses), by the delta method."""
    y, jacobian = fit.form.jacobian(fit.scaled(x), fit.theta[None])
    slopes = np.nan_to_num(jacobian[0] / y if fit.loss.is_log else jacobian[0])
    return np.sqrt(np.maximum(np.einsum("pn,pq,qn->n", slopes, fit.theta_covariance, slopes), 0.0))


def mean_interval(fit: Fitted, x: Mapping[str, object] | object, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the law's curve, if the law is true."""
    return band(fit.predict(x), NormalDist().inv_cdf(0.5 + level / 2) * curve_stderr(fit, x), is_log=fit.loss.is_log)


def prediction_interval(fit: Fitted, x: Mapping[str, object] | object, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Interval for a new measurement at flat columns x."""
    half = calibration_of(fit).half_width(distance_beyond(fit.x, fit.form.columns(x)), level)
    return band(fit.predict(x), half, is_log=fit.loss.is_log)


def band(y: np.ndarray, half: np.ndarray, *, is_log: bool) -> tuple[np.ndarray, np.ndarray]:
    """y and its half-width to bounds; a ratio under log losses."""
    return (y * np.exp(-half), y * np.exp(half)) if is_log else (y - half, y + half)
