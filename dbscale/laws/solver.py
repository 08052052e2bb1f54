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
    """The problems still running: coordinates [S, p], residual [S, n], Jacobian [S, p, n], weights [S, n], objective
    [S].
    """

    theta: np.ndarray
    residual: np.ndarray
    jacobian: np.ndarray
    weights: np.ndarray
    objective: np.ndarray

    @classmethod
    def at(cls, problem: Problem, theta: np.ndarray, weights: np.ndarray) -> State:
        residual, jacobian = problem.residual_jacobian(theta)
        return cls(theta, residual, jacobian, weights, total_loss(problem.loss, residual, weights))

    def take(self, rows: np.ndarray) -> State:
        return State(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def replace(self, rows: np.ndarray, other: State) -> None:
        """Overwrite the rows where the mask is true with those of `other`."""
        for name in ("theta", "residual", "jacobian", "objective"):
            getattr(self, name)[rows] = getattr(other, name)[rows]


@np.errstate(all="ignore")
def newton_step(problem: Problem, state: State, damping: np.ndarray) -> np.ndarray:
    """The damped step [S, p] for coordinates inside the box; blocked coordinates stay."""
    loss, weights, theta, residual, jacobian = problem.loss, state.weights, state.theta, state.residual, state.jacobian
    gradient = (jacobian @ (weights * loss.psi(residual))[..., None])[..., 0]
    blocked = (theta <= problem.lower) & (gradient > 0) | (theta >= problem.upper) & (gradient < 0)
    if blocked.any():
        jacobian = np.where(blocked[..., None], 0.0, jacobian)
    transposed = jacobian.swapaxes(-1, -2)
    majorant = (jacobian * (weights * loss.majorant(residual))[:, None, :]) @ transposed
    diagonal = majorant.diagonal(axis1=-2, axis2=-1)
    floor = 1e-9 * diagonal.max(axis=-1, keepdims=True) + 1e-300
    matrix = majorant
    if loss.kind != "least_squares":
        matrix = (jacobian * (weights * loss.curvature(residual))[:, None, :]) @ transposed + damping[
            :, None, None
        ] * majorant
    ridge = damping[:, None] * np.maximum(diagonal, floor) + 1e-3 * floor
    matrix = matrix + np.eye(theta.shape[-1]) * ridge[:, None, :]
    step = finite(np.linalg.solve(matrix, -np.where(blocked, 0.0, gradient)[..., None])[..., 0])
    probe = 0.1
    with np.errstate(all="ignore"):
        ahead = problem.residual(theta + probe * step) - residual
    bend = finite(2 / probe * (ahead / probe - (transposed @ step[..., None])[..., 0]))
    push = (
        -0.5
        * (
            jacobian
            @ (weights * (loss.curvature(residual) + damping[:, None] * loss.majorant(residual)) * bend)[..., None]
        )[..., 0]
    )
    second = finite(np.linalg.solve(matrix, push[..., None])[..., 0])
    scale = np.sqrt(np.maximum(diagonal, floor))
    fits = np.linalg.norm(second * scale, axis=-1) <= 0.5 * np.linalg.norm(step * scale, axis=-1)
    return step + np.where(fits[:, None], second, 0.0)


def finite(a: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(a), a, 0.0)


@np.errstate(all="ignore")
def minimise(
    problem: Problem, theta: np.ndarray, weights: np.ndarray, *, max_steps: int = 300, tolerance: float = 1e-12
) -> Minima:
    """Minimise from every row of `theta` [S, p] with `weights` [S, n] (or [1, n], shared)."""
    theta = np.clip(theta, problem.lower, problem.upper)
    weights = np.broadcast_to(weights, (len(theta), len(problem.target)))
    state = State.at(problem, theta, weights)
    objective, live = state.objective.copy(), np.flatnonzero(np.isfinite(state.objective))
    state = state.take(live)
    damping, quiet = np.full(len(live), 1e-2), np.zeros(len(live), dtype=int)
    for _ in range(max_steps):
        if not live.size:
            break
        moved = np.clip(state.theta + newton_step(problem, state, damping), problem.lower, problem.upper)
        trial = State.at(problem, moved, state.weights)
        gain = state.objective - trial.objective
        better = gain > 0
        small = gain <= tolerance * np.abs(state.objective) + 1e-300
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
