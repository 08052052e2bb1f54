"""Profile likelihood: an interval for one parameter that re-optimises all others, as a check on curvature and
bootstrap.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from dbscale.errors import LawError, nearest
from dbscale.laws.law_fit import LawFit
from dbscale.laws.quantiles import student_quantile
from dbscale.laws.solver import Problem, minimise

STEPS, FINE_STEPS, REFINEMENTS = 41, 5, 2
REACH = 6.0  # standard errors to either side


def profile(fit: LawFit, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of a parameter [41] and √(2·rise of the log-likelihood) at each, signed by side: about −z … z.

    The rise is (n − p)·log(objective ratio)/2 for least squares; for Huber it is the objective's rise over its noise
    scale.
    """
    if name not in fit.form.param_names:
        raise LawError(f"{fit.name} has no parameter {name!r}; {nearest(name, fit.form.param_names)}")
    if name in fit.fixed:
        raise LawError(f"{name!r} was fixed; there is nothing to profile")
    k = fit.form.param_names.index(name)
    matrix = fit.form.unscaling(fit.units)
    middle = matrix[:, :-1] @ fit.theta + matrix[:, -1]
    size = float(np.sqrt(max((matrix[:, :-1] @ fit.theta_covariance @ matrix[:, :-1].T)[k, k], 0.0)))
    size = size if size > 0 and name not in fit.at_bound else 0.25 * abs(middle[k]) + 1e-6
    grid = _inside(fit, k, middle[k] + size * np.linspace(-REACH, REACH, STEPS))
    return (np.exp(grid) if fit.form.is_log[k] else grid), _signed_rise(fit, k, grid)


def _signed_rise(fit: LawFit, k: int, grid: np.ndarray) -> np.ndarray:
    """√deviance at each value of coordinate k, in the table's own units; negative below the optimum."""
    matrix = fit.form.unscaling(fit.units)
    middle = matrix[:, :-1] @ fit.theta + matrix[:, -1]
    objective = _walk(fit, k, middle, grid)
    return np.sqrt(np.maximum(_deviance(fit, objective), 0.0)) * np.sign(grid - middle[k])


def profile_interval(fit: LawFit, name: str, level: float = 0.9) -> tuple[float, float]:
    """Where the profile crosses the quantile; an end that is not reached within 6 standard errors is the last value
    tried.
    """
    values, rise = profile(fit, name)
    small = fit.loss.kind == "least_squares"
    limit = student_quantile(level, fit.num_points - fit.num_free) if small else NormalDist().inv_cdf(0.5 + level / 2)
    return _end(fit, name, values, rise, -limit), _end(fit, name, values, rise, limit)


def _end(fit: LawFit, name: str, values: np.ndarray, rise: np.ndarray, limit: float) -> float:
    """Where the signed rise passes `limit`, with the profile walked again between the two values around it."""
    k = fit.form.param_names.index(name)
    grid = np.log(values) if fit.form.is_log[k] else values
    for _ in range(REFINEMENTS):
        after = int(np.searchsorted(np.maximum.accumulate(rise), limit))
        if after in (0, len(grid)):
            break
        grid = np.linspace(grid[after - 1], grid[after], FINE_STEPS)
        rise = _signed_rise(fit, k, grid)
    found = float(np.interp(limit, np.maximum.accumulate(rise), grid))
    return float(np.exp(found)) if fit.form.is_log[k] else found


def _inside(fit: LawFit, k: int, grid: np.ndarray) -> np.ndarray:
    """Linear parameters keep to their bounds."""
    return grid if fit.form.is_log[k] else np.clip(grid, fit.lower[k], fit.upper[k])


def _walk(fit: LawFit, k: int, middle: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Objective at each grid value with the other coordinates re-optimised, in the table's own units."""
    order, objective = np.argsort(np.abs(grid - middle[k]), kind="stable"), np.empty(len(grid))
    target = np.log(fit.y) if fit.loss.is_log else fit.y
    logs = fit.form.is_log
    start = {-1: middle, 1: middle}
    for i in order:
        side = 1 if grid[i] >= middle[k] else -1
        lower, upper = np.where(logs, -np.inf, fit.lower), np.where(logs, np.inf, fit.upper)
        frozen = [fit.form.param_names.index(n) for n in fit.fixed]
        lower[frozen], upper[frozen] = middle[frozen], middle[frozen]
        lower[k] = upper[k] = grid[i]
        problem = Problem(fit.form, fit.x, target, fit.loss, lower, upper)
        minima = minimise(problem, start[side][None].copy(), fit.weights[None, :], max_steps=100, tolerance=1e-10)
        objective[i] = minima.objective[0]
        start[side] = minima.theta[0]
    return objective


def _deviance(fit: LawFit, objective: np.ndarray) -> np.ndarray:
    """Twice the rise of the log-likelihood, scaled by the noise that the residuals show."""
    spare = max(fit.num_points - fit.num_free, 1)
    best = max(min(fit.objective, float(objective.min())), 1e-300)
    if fit.loss.kind == "least_squares":
        return spare * (objective / best - 1)
    window = max(fit.loss.delta, 1.4826 * float(np.median(np.abs(fit.residuals))))
    curvature = float(np.mean(np.abs(fit.residuals) <= window)) * fit.loss.delta / window
    score = float(np.average(fit.loss.psi(fit.residuals) ** 2, weights=fit.weights)) * float(fit.weights.mean())
    return 2 * (objective - best) * curvature / max(score, 1e-300)
