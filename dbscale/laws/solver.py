"""Minimise Σ w·ρ(r): many problems at once in numpy, one problem to the end with scipy.

`minimise` advances S starts or resamples together by damped Newton steps: the Gauss-Newton part of the Hessian plus λ
times its majorant (iteratively reweighted least squares) and its diagonal. `polish` hands one start to
`scipy.optimize.least_squares`. Bounds are a box in coordinates. Knows forms and losses, nothing of tables or laws' names.

r = log ŷ − log y or ŷ − y; Huber's ρ is ½r² within δ and δ(|r| − ½δ) beyond.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dbscale.errors import LawError, nearest
from dbscale.laws.form import Columns, Form

PROBE = 0.1
"""Share of a step at which its bend is measured."""


@dataclass(frozen=True)
class Loss:
    """`kind` least_squares or huber, `space` log or linear, `delta` Huber's corner.

    Delta is in units of the residual of log y, or under linear losses in units of the geometric mean of |y|, so that no
    fit depends on the unit of y.
    """

    kind: str = "huber"
    space: str = "log"
    delta: float = 1e-3

    def __post_init__(self) -> None:
        for name, known in (("kind", ("huber", "least_squares")), ("space", ("log", "linear"))):
            if (value := getattr(self, name)) not in known:
                raise LawError(f"loss {name} {value!r}: {nearest(value, known)}")
        if not self.delta > 0:
            raise LawError(f"Huber's delta must be above 0, got {self.delta}")

    @property
    def is_log(self) -> bool:
        return self.space == "log"

    @property
    def corner(self) -> float:
        """Where ρ turns from a parabola into a line."""
        return self.delta if self.kind == "huber" else np.inf

    def rho(self, r: np.ndarray) -> np.ndarray:
        """The loss of each residual."""
        inside = np.minimum(np.abs(r), self.corner)
        return inside * (np.abs(r) - 0.5 * inside)

    def psi(self, r: np.ndarray) -> np.ndarray:
        """dρ/dr."""
        return np.clip(r, -self.corner, self.corner)

    def curvature(self, r: np.ndarray) -> np.ndarray:
        """d²ρ/dr²."""
        return (np.abs(r) <= self.corner).astype(float)

    def majorant(self, r: np.ndarray) -> np.ndarray:
        """ψ(r)/r: the curvature of the parabola that touches ρ at r and lies above it everywhere."""
        return self.corner / np.maximum(np.abs(r), self.corner) if self.kind == "huber" else np.ones_like(r)


LOSSES = {
    f"{kind}{'_log' if space == 'log' else ''}": Loss(kind, space)
    for kind in ("huber", "least_squares") for space in ("log", "linear")
}  # fmt: skip


def make_loss(loss: str | Loss) -> Loss:
    """A loss by name or as it is. Raises LawError with the nearest name for an unknown one."""
    if isinstance(loss, Loss):
        return loss
    if loss not in LOSSES:
        raise LawError(f"unknown loss {loss!r}; {nearest(str(loss), LOSSES)}")
    return LOSSES[loss]


@dataclass(frozen=True)
class Problem:
    """A form, its scaled columns [n], the target (log y or y, scaled) [n], the loss and the box [p]."""

    form: Form
    x: Columns
    target: np.ndarray
    loss: Loss
    lower: np.ndarray
    upper: np.ndarray

    def residual(self, theta: np.ndarray) -> np.ndarray:
        """r [S, n] at coordinates [S, p]; nan outside the domain."""
        return self._residual_of(self.form.evaluate(self.x, theta))

    @np.errstate(all="ignore")
    def _residual_of(self, y: np.ndarray) -> np.ndarray:
        return (np.log(y) if self.loss.is_log else y) - self.target

    @np.errstate(all="ignore")
    def residual_jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """r [S, n] and its Jacobian [S, p, n], zero where it is not finite."""
        y, slopes = self.form.jacobian(self.x, theta)
        return self._residual_of(y), finite(slopes / y[:, None, :] if self.loss.is_log else slopes)

    def objective(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Σ w·ρ(r) [S]; inf outside the domain."""
        return total_loss(self.loss, self.residual(theta), weights)


def finite(a: np.ndarray) -> np.ndarray:
    """The array with 0 where it is nan or infinite."""
    return np.where(np.isfinite(a), a, 0.0)


def total_loss(loss: Loss, residual: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Σ w·ρ(r) over the last axis; inf where any residual that counts is not finite."""
    with np.errstate(all="ignore"):
        total = np.sum(weights * loss.rho(residual), axis=-1)
    return np.where(np.isfinite(total), total, np.inf)


class State(NamedTuple):
    """The problems still running, one row each: theta [S, p], jacobian [S, p, n], objective [S], the others [S, n]."""

    theta: np.ndarray
    residual: np.ndarray
    jacobian: np.ndarray
    objective: np.ndarray
    weights: np.ndarray
    shift: np.ndarray
    """What each problem's target adds to the shared one."""

    @classmethod
    def at(cls, problem: Problem, theta: np.ndarray, weights: np.ndarray, shift: np.ndarray) -> State:
        residual, jacobian = problem.residual_jacobian(theta)
        residual = residual - shift
        return cls(theta, residual, jacobian, total_loss(problem.loss, residual, weights), weights, shift)

    def take(self, rows: np.ndarray) -> State:
        return State(*(column[rows] for column in self))

    def replace(self, rows: np.ndarray, other: State) -> None:
        """Overwrite the rows where the mask is true with those of `other`."""
        for mine, column in zip(self, other, strict=True):
            mine[rows] = column[rows]


@np.errstate(all="ignore")
def newton_step(problem: Problem, state: State, damping: np.ndarray) -> np.ndarray:
    """The damped step [S, p] for coordinates inside the box; coordinates pressed against it stay.

    It follows a parabola (geodesic acceleration, Transtrum & Sethna 1201.5885), which shortens the long bent valleys of
    these laws severalfold: scipy's least_squares, without it, takes three times as long on BNSL.
    """
    loss, residual, jacobian = problem.loss, state.residual, state.jacobian
    gradient = (jacobian @ (state.weights * loss.psi(residual))[..., None])[..., 0]
    blocked = (state.theta <= problem.lower) & (gradient > 0) | (state.theta >= problem.upper) & (gradient < 0)
    jacobian = np.where(blocked[..., None], 0.0, jacobian)
    majorant = weighted_square(jacobian, state.weights * loss.majorant(residual))
    diagonal = majorant.diagonal(axis1=-2, axis2=-1)
    floor = 1e-9 * diagonal.max(axis=-1, keepdims=True) + 1e-300
    diagonal = np.maximum(diagonal, floor)
    matrix, curvature = majorant, state.weights
    if loss.kind == "huber":
        curvature = state.weights * (loss.curvature(residual) + damping[:, None] * loss.majorant(residual))
        matrix = weighted_square(jacobian, curvature)
    matrix = matrix + np.eye(len(problem.lower)) * (damping[:, None] * diagonal + 1e-3 * floor)[:, None, :]
    step = solved(matrix, -np.where(blocked, 0.0, gradient))
    # half the second derivative of the residuals along the step, pulled back
    ahead = problem.residual(state.theta + PROBE * step) - state.shift - residual
    bend = finite(2 / PROBE * (ahead / PROBE - (step[:, None, :] @ jacobian)[:, 0]))
    second = solved(matrix, -0.5 * (jacobian @ (curvature * bend)[..., None])[..., 0])
    scale = np.sqrt(diagonal)
    mild = np.linalg.norm(second * scale, axis=-1) <= 0.5 * np.linalg.norm(step * scale, axis=-1)
    return step + np.where(mild[:, None], second, 0.0)


def solved(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The solution [S, p] of S small systems; 0 where it is not finite."""
    return finite(np.linalg.solve(matrix, right[..., None])[..., 0])


def weighted_square(jacobian: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Σ w J Jᵀ [S, p, p]."""
    return (jacobian * weights[:, None, :]) @ jacobian.swapaxes(-1, -2)


@np.errstate(all="ignore")
def minimise(
    problem: Problem,
    theta: np.ndarray,
    weights: np.ndarray,
    *,
    targets: np.ndarray | None = None,
    max_steps: int = 300,
    tolerance: float = 1e-9,
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates [S, p] and objectives [S] reached from every row of `theta` [S, p] with `weights` [S, n] or [1, n].

    `targets` [S, n] gives every problem its own y (in the loss's space, scaled). A problem leaves the batch after three
    steps in a row that gain less than `tolerance` of its objective, or when no step helps.
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
    return theta, objective


def polish(problem: Problem, theta: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float, bool]:
    """One start [p] to its minimum with scipy: coordinates, objective, and whether it converged.

    scipy keeps iterates strictly inside the box, so coordinates that lie on it are held there, and those that end close
    to it are set on it where that costs nothing.
    """
    theta = np.clip(theta, problem.lower, problem.upper)
    start = float(problem.objective(theta[None], weights[None])[0])
    free = (theta > problem.lower) & (theta < problem.upper)
    if not (np.isfinite(start) and free.any()):
        return theta, start, np.isfinite(start)
    found, converged = _least_squares(problem, theta, weights, free)
    near = 1e-6 * (1 + np.abs(found))
    low, high = found - problem.lower < near, problem.upper - found < near
    snapped = np.where(low, problem.lower, np.where(high, problem.upper, found))
    each = np.stack([theta, found, snapped])
    objective = problem.objective(each, weights[None])
    best = 2 if objective[2] <= objective[:2].min() * (1 + 1e-9) else int(np.argmin(objective))
    return each[best], float(objective[best]), converged


@np.errstate(all="ignore")
def _least_squares(
    problem: Problem, theta: np.ndarray, weights: np.ndarray, free: np.ndarray
) -> tuple[np.ndarray, bool]:
    from scipy.optimize import least_squares

    def full(part: np.ndarray) -> np.ndarray:
        whole = theta.copy()
        whole[free] = part
        return whole[None]

    def residual(part: np.ndarray) -> np.ndarray:
        found = problem.residual(full(part))[0]
        return np.nan_to_num(found, nan=1e6, posinf=1e6)  # outside the domain: never a minimum

    def weighted(z: np.ndarray) -> np.ndarray:
        """Weight times ρ and its two derivatives, in scipy's z = (r / f_scale)²."""
        outside = z > (1.0 if problem.loss.kind == "huber" else np.inf)
        size = np.sqrt(np.where(outside, z, 1.0))
        rho, bend = np.where(outside, 2 * size - 1, z), np.where(outside, -0.5 / size**3, 0.0)
        return weights * np.stack([rho, 1 / size, bend])

    jacobian: Any = lambda part: problem.residual_jacobian(full(part))[1][0][free].T  # noqa: E731
    box: Any = (problem.lower[free], problem.upper[free])
    rho: Any = weighted
    scale = problem.loss.delta if problem.loss.kind == "huber" else 1.0
    found = least_squares(residual, theta[free], jacobian, bounds=box, loss=rho, f_scale=scale, x_scale="jac",
                          ftol=1e-13, xtol=1e-13, gtol=1e-13, max_nfev=300)  # fmt: skip
    return full(found.x)[0], bool(found.status > 0)
