"""How sure a fit is, from its curvature: the covariance of the coordinates at the optimum."""

from __future__ import annotations

import numpy as np

from dbscale.laws.form import Form
from dbscale.laws.solver import Problem

WEAK_LOG_ERROR = 1.0
WEAK_RELATIVE_ERROR = 1.0


def theta_covariance(problem: Problem, theta: np.ndarray, weights: np.ndarray, free: np.ndarray) -> np.ndarray:
    """[p, p] covariance of the estimate, zero outside `free`.

    Least squares: s²(JᵀWJ)⁻¹. Huber: the sandwich B⁻¹(Σ w²ψ²JJᵀ)B⁻¹·n/(n − p), whose bread B = Σ wψ′JJᵀ counts
    residuals in a window of the residuals' own spread (Powell's estimate), as δ itself usually holds too few of them.
    """
    residual, jacobian = (a[0] for a in problem.residual_jacobian(theta[None]))
    w = weights / weights.mean()
    slopes, spare = jacobian[free], max(int(np.sum(w > 0)) - int(free.sum()), 1)
    covariance = np.zeros((len(theta), len(theta)))
    if problem.loss.kind == "least_squares":
        inner = np.linalg.pinv((slopes * w) @ slopes.T, rcond=1e-14, hermitian=True) * float(w @ residual**2) / spare
    else:
        bread = np.linalg.pinv(
            (slopes * (w * smooth_curvature(problem, residual))) @ slopes.T, rcond=1e-14, hermitian=True
        )
        meat = (slopes * (w * problem.loss.psi(residual)) ** 2) @ slopes.T
        inner = bread @ meat @ bread * len(w) / spare
    covariance[np.ix_(free, free)] = inner
    return covariance


def smooth_curvature(problem: Problem, residual: np.ndarray) -> np.ndarray:
    """ψ′ [n] with Huber's corner widened to the residuals' spread."""
    window = max(problem.loss.delta, 1.4826 * float(np.median(np.abs(residual))))
    return (np.abs(residual) <= window) * problem.loss.delta / window


def weak_params(form: Form, covariance: np.ndarray, free: np.ndarray) -> list[str]:
    """Words for amplitudes known to no better than a factor e, and a note when none is known at all."""
    sizes = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    weak = [
        p.name for p, s, f in zip(form.params, sizes, free, strict=True) if f and p.kind == "log" and s > WEAK_LOG_ERROR
    ]
    return [f"weakly identified (uncertain by more than a factor e): {', '.join(weak)}"] if weak else []
