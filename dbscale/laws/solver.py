"""Minimise Σ w·ρ(r) for many starting points, or many resamples, at once.

A damped Newton method whose matrix is the Gauss-Newton part of the Hessian plus λ times its majorant (iteratively
reweighted least squares) and its diagonal: fast where Huber's loss is parabolic, safe where it is not. All S problems
advance together in numpy; a problem that has converged is dropped from the batch. Bounds are a box in coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dbscale.laws.form import Columns, Form
from dbscale.laws.losses import Loss


@dataclass(frozen=True)
class Problem:
    """A form, its scaled columns [n], the target (log y or y) [n], the loss and the box [p]."""

    form: Form
    x: Columns
    target: np.ndarray
    loss: Loss
    lower: np.ndarray
    upper: np.ndarray

    def residual(self, theta: np.ndarray) -> np.ndarray:
        """r [S, n] at coordinates [S, p]; nan outside the domain."""
        y = self.form.evaluate(self.x, theta)
        with np.errstate(all="ignore"):
            return (np.log(y) if self.loss.is_log else y) - self.target

    def residual_jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """r [S, n] and its Jacobian [S, p, n], zero where it is not finite."""
        y, slopes = self.form.jacobian(self.x, theta)
        with np.errstate(all="ignore"):
            if not self.loss.is_log:
                return y - self.target, np.where(np.isfinite(slopes), slopes, 0.0)
            slopes = slopes / y[:, None, :]
            return np.log(y) - self.target, np.where(np.isfinite(slopes), slopes, 0.0)

    def objective(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Σ w·ρ(r) [S]; inf outside the domain."""
        return total_loss(self.loss, self.residual(theta), weights)


def total_loss(loss: Loss, residual: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Σ w·ρ(r) over the last axis; inf where any residual that counts is not finite."""
    with np.errstate(all="ignore"):
        total = np.sum(weights * loss.rho(residual), axis=-1)
    return np.where(np.isfinite(total), total, np.inf)


@dataclass(frozen=True)
class Minima:
    """Where each of the S problems ended: coordinates [S, p], objective [S], whether it converged [S]."""

    theta: np.ndarray
    objective: np.ndarray
    converged: np.ndarray


@dataclass
class State:
    """The problems still running. One row each."""

    theta: np.ndarray
    """[S, p]."""
    residual: np.ndarray
    """[S, n]."""
    jacobian: np.ndarray
    """[S, p, n]."""
    objective: np.ndarray
    """[S]."""
    weights: np.ndarray
    """[S, n]."""
    shift: np.ndarray
    """[S, n]: what each problem's target adds to the shared one."""

    @classmethod
    def at(cls, problem: Problem, theta: np.ndarray, weights: np.ndarray, shift: np.ndarray) -> State:
        residual, jacobian = problem.residual_jacobian(theta)
        residual = residual - shift
        return cls(theta, residual, jacobian, total_loss(problem.loss, residual, weights), weights, shift)

    def take(self, rows: np.ndarray) -> State:
        return State(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def replace(self, rows: np.ndarray, other: State) -> None:
        """Overwrite the rows where the mask is true with those of `other`."""
        for name in ("theta", "residual", "jacobian", "objective"):
            getattr(self, name)[rows] = getattr(other, name)[rows]


@np.errstate(all="ignore")
def newton_step(problem: Problem, state: State, damping: np.ndarray) -> np.ndarray:
    """The damped step [S, p] for coordinates inside the box; blocked coordinates stay."""
    loss, residual, jacobian = problem.loss, state.residual, state.jacobian
    gradient = (jacobian @ (state.weights * loss.psi(residual))[..., None])[..., 0]
    blocked = (state.theta <= problem.lower) & (gradient > 0) | (state.theta >= problem.upper) & (gradient < 0)
    if blocked.any():
        jacobian = np.where(blocked[..., None], 0.0, jacobian)
    majorant = _weighted_square(jacobian, state.weights * loss.majorant(residual))
    diagonal = majorant.diagonal(axis1=-2, axis2=-1)
    floor = 1e-9 * diagonal.max(axis=-1, keepdims=True) + 1e-300
    diagonal = np.maximum(diagonal, floor)
    matrix = majorant
    if loss.kind != "least_squares":
        curved = _weighted_square(jacobian, state.weights * loss.curvature(residual))
        matrix = curved + damping[:, None, None] * majorant
    matrix = matrix + np.eye(len(problem.lower)) * (damping[:, None] * diagonal + 1e-3 * floor)[:, None, :]
    step = _solve(matrix, -np.where(blocked, 0.0, gradient))
    second = _solve(matrix, bend_of_path(problem, state, jacobian, step, damping))
    scale = np.sqrt(diagonal)
    mild = np.linalg.norm(second * scale, axis=-1) <= 0.5 * np.linalg.norm(step * scale, axis=-1)
    return step + np.where(mild[:, None], second, 0.0)


def bend_of_path(
    problem: Problem, state: State, jacobian: np.ndarray, step: np.ndarray, damping: np.ndarray
) -> np.ndarray:
    """Half the second derivative of the residuals along the step, pulled back [S, p].

    With it the step follows a parabola (geodesic acceleration, Transtrum & Sethna 1201.5885), which shortens the long
    bent valleys of these laws severalfold.
    """
    loss, probe = problem.loss, 0.1
    ahead = problem.residual(state.theta + probe * step) - state.shift - state.residual
    bend = _finite(2 / probe * (ahead / probe - (step[:, None, :] @ jacobian)[:, 0]))
    weights = state.weights * (loss.curvature(state.residual) + damping[:, None] * loss.majorant(state.residual))
    return -0.5 * (jacobian @ (weights * bend)[..., None])[..., 0]


def _weighted_square(jacobian: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Σ w J Jᵀ [S, p, p]."""
    return (jacobian * weights[:, None, :]) @ jacobian.swapaxes(-1, -2)


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    return _finite(np.linalg.solve(matrix, right[..., None])[..., 0])


def _finite(a: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(a), a, 0.0)


@np.errstate(all="ignore")
def minimise(
    problem: Problem,
    theta: np.ndarray,
    weights: np.ndarray,
    *,
    targets: np.ndarray | None = None,
    max_steps: int = 300,
    tolerance: float = 1e-12,
) -> Minima:
    """Minimise from every row of `theta` [S, p] with `weights` [S, n] (or [1, n], shared).

    `targets` [S, n] gives each problem its own data, in the loss's space; by default all have the problem's.
    """
    theta = np.clip(theta, problem.lower, problem.upper)
    shape = len(theta), len(problem.target)
    shift = np.zeros(shape) if targets is None else targets - problem.target
    state = State.at(problem, theta, np.broadcast_to(weights, shape), shift)
    objective, live = state.objective.copy(), np.flatnonzero(np.isfinite(state.objective))
    state = state.take(live)
    damping, quiet = np.full(len(live), 1e-2), np.zeros(len(live), dtype=int)
    for _ in range(max_steps):
        if not live.size:
            break
        moved = np.clip(state.theta + newton_step(problem, state, damping), problem.lower, problem.upper)
        trial = State.at(problem, moved, state.weights, state.shift)
        gain = state.objective - trial.objective
        better, small = gain > 0, gain <= tolerance * np.abs(state.objective) + 1e-300
        state.replace(better, trial)
        quiet = np.where(better, np.where(small, quiet + 1, 0), quiet)
        damping = np.where(better, np.maximum(damping / 6, 1e-12), damping * 5)
        done = (quiet >= 3) | (damping > 1e9)
        if done.any():
            theta[live], objective[live] = state.theta, state.objective
            live, state, damping, quiet = live[~done], state.take(~done), damping[~done], quiet[~done]
    theta[live], objective[live] = state.theta, state.objective
    converged = np.isfinite(objective)
    converged[live] = False
    return Minima(theta, objective, converged)
