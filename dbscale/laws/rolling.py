"""Rolling origins: refit a law to the smaller part of its table and see how it predicts the larger part.

That is the question a scaling law is asked, so its errors rank forms and calibrate prediction intervals. All origins
of a law are refitted in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dbscale.laws.fitted import Fitted
from dbscale.laws.solver import Problem, minimise
from dbscale.laws.starts import best_starts

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
EXTRA_STARTS = 3
HORIZON = 1.0
"""Forms are ranked by errors at most this far (in log x, a factor of 2.7) beyond the training range, or at the next level
where that lies further out.
"""


@dataclass(frozen=True)
class RollingErrors:
    """Held-out errors [O, n] per origin and row; nan where the row was trained on or the law could not be fitted."""

    distance: np.ndarray
    """How far each row lies beyond the origin's training range [O, n]: Σ over variables of log(x / largest x trained
    on).
    """
    error: np.ndarray
    """log ŷ − log y (ŷ − y for linear losses) [O, n]."""

    inside: np.ndarray
    """The same for the rows that were trained on [O, n]; nan elsewhere."""

    def rms(self, last: int | None = None) -> float:
        """Root mean over the `last` (default: all) origins of each one's mean square within HORIZON; nan without
        any.
        """
        squares = np.where(self.near(HORIZON), self.error**2, np.nan)
        rows = squares[np.isfinite(squares).any(axis=1)]
        rows = rows if last is None else rows[-last:]
        return float(np.sqrt(np.mean(np.nanmean(rows, axis=1)))) if len(rows) else float("nan")

    def near(self, reach: float) -> np.ndarray:
        """Held-out rows that count [O, n]: those within `reach`, and where levels lie further apart the nearest one."""
        held_out = np.where(np.isfinite(self.error), self.distance, np.inf)
        nearest = held_out.min(axis=1, keepdims=True, initial=np.inf)
        return np.isfinite(held_out) & (held_out <= np.maximum(reach, nearest * (1 + 1e-9)))


def training_masks(x: dict[str, np.ndarray]) -> np.ndarray:
    """Rows that each origin trains on [O, n]: all but the largest levels of one variable at a time."""
    masks = []
    for column in x.values():
        levels = np.unique(column)
        ranks = np.searchsorted(levels, column)
        cuts = sorted({int(np.ceil(share * len(levels))) for share in SHARES} - {0, len(levels)})
        masks += [ranks < cut for cut in cuts]
    return np.array(masks).reshape(len(masks), -1)


def beyond(x: dict[str, np.ndarray], trained: np.ndarray) -> np.ndarray:
    """Distance of every row beyond the trained rows' range."""
    logs = [np.log(c) for c in x.values()]
    return sum((np.maximum(log - log[trained].max(), 0.0) for log in logs), np.zeros(len(trained)))


def rolling_origin(fit: Fitted) -> RollingErrors:
    """Held-out errors of a law. Origins with no more distinct points than free parameters are left out (nan)."""
    points, masks = np.stack(list(fit.x.values()), axis=1), training_masks(fit.x)
    residual = np.full(masks.shape, np.nan)
    able = np.array([len(np.unique(points[m], axis=0)) > fit.num_free for m in masks], dtype=bool)
    if able.any():
        target = np.log(fit.y) if fit.loss.is_log else fit.y
        problem = Problem(fit.form, fit.scaled(fit.x), target, fit.loss, fit.lower, fit.upper)
        residual[able] = problem.residual(refit_origins(fit, problem, masks[able]))
    residual = np.where(np.isfinite(residual), residual, np.nan)
    distance = np.array([beyond(fit.x, m) for m in masks]).reshape(masks.shape)
    return RollingErrors(distance, np.where(masks, np.nan, residual), np.where(masks, residual, np.nan))


def refit_origins(fit: Fitted, problem: Problem, masks: np.ndarray) -> np.ndarray:
    """Best coordinates [O, p] for each origin, from the full table's optimum and a few spread starts."""
    spread = best_starts(problem, fit.y, fit.weights, keep=EXTRA_STARTS, seed=fit.seed)
    starts = np.concatenate([fit.theta[None], spread])
    theta, weights = np.tile(starts, (len(masks), 1)), np.repeat(masks * fit.weights, len(starts), axis=0)
    minima = minimise(problem, theta, weights, max_steps=120, tolerance=1e-7)
    best = minima.objective.reshape(len(masks), len(starts)).argmin(axis=1)
    return minima.theta.reshape(len(masks), len(starts), -1)[np.arange(len(masks)), best]
