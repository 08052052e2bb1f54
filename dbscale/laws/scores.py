"""What a law's residuals say about the next doubling: how well it fits, how well it ends, how well it foretold.

A learning curve is extrapolated from its end. So a law of one variable is judged there too, and its level is moved to
where the data end. Laws of several variables have no single end; they are judged as a whole.
"""

from __future__ import annotations

import numpy as np

from dbscale.laws.fitted import Fitted
from dbscale.laws.prediction import in_sample_noise
from dbscale.laws.rolling import RollingErrors

END_SHARE, LEVEL_SHARE = 0.3, 0.05
"""The end is the largest 30 % of the rows; its level is read off the largest 5 %, two rows at least."""
LATE_ORIGINS = 3
FLOOR = 1e-9


def end_error(fit: Fitted) -> float:
    """Rms residual over the largest rows; of all rows for laws of several variables."""
    if len(fit.x) > 1:
        return in_sample_noise(fit)
    residual = ordered(fit, fit.residuals)
    return float(np.sqrt(np.mean(residual[-max(3, int(np.ceil(END_SHARE * len(residual)))) :] ** 2)))


def ordered(fit: Fitted, values: np.ndarray) -> np.ndarray:
    """Values [..., n] in the order of the only variable."""
    return values[..., np.argsort(next(iter(fit.x.values())), kind="stable")]


def level_shift(fit: Fitted, residuals: np.ndarray) -> float:
    """How far the law lies above the data at their end, shrunk towards 0 where that is no more than noise.

    `residuals` [n] may hold nan (rows not trained on). The noise is read from neighbours' differences, which a smooth
    misfit hardly has; shift = bias · bias²/(bias² + noise²/rows).
    """
    if len(fit.x) > 1:
        return 0.0
    seen = ordered(fit, residuals)
    seen = seen[np.isfinite(seen)]
    if len(seen) < 4:
        return 0.0
    rows = max(2, int(np.ceil(LEVEL_SHARE * len(seen))))
    bias, noise = float(seen[-rows:].mean()), float(np.mean(np.diff(seen) ** 2) / 2)
    return bias * bias**2 / (bias**2 + noise / rows + FLOOR**2)


def shifted(fit: Fitted, rolling: RollingErrors) -> np.ndarray:
    """Held-out errors [O, n] of the law moved to the level of each origin's last trained rows."""
    shifts = np.array([level_shift(fit, row) for row in rolling.inside])
    return rolling.error - shifts[:, None] if len(shifts) else rolling.error


def weights_of(scored: list[tuple[Fitted, RollingErrors]]) -> np.ndarray:
    """Shares of an average: 1/(whole · end · late²), each an error. Laws without rolling origins get the worst
    one's.
    """
    late = np.array([rolling.rms(LATE_ORIGINS) for _, rolling in scored])
    late = np.where(np.isfinite(late), late, np.nanmax(late) if np.isfinite(late).any() else 1.0)
    whole = np.array([in_sample_noise(fit) for fit, _ in scored])
    end = np.array([end_error(fit) for fit, _ in scored])
    weight = 1 / (np.maximum(whole, FLOOR) * np.maximum(end, FLOOR) * np.maximum(late, FLOOR) ** 2)
    return weight / weight.sum()
