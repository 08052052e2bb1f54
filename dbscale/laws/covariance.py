"""How sure a fit is, from its curvature: the covariance of the coordinates at the optimum."""

from __future__ import annotations

import numpy as np

from dbscale.laws.form import Form
from dbscale.laws.solver import Problem

WEAK_LOG_ERROR = 1.0
WEAK_RELATIVE_ERROR = 1.0


def theta_covariance(problem: Problem, theta: np.ndarray, weights: np.ndarray, free: np.ndarray) -> np.ndarray:
    """[p, p] covariance of an M-estimate, zero outside `free`: E[ψ²]/E[ψ′]² · (Σ w J Jᵀ)⁻¹, with n − p in place of n.

    For least squares this is s²(JᵀWJ)⁻¹. For Huber with δ below the noise, E[ψ′] is the residuals' density at 0, which is
    counted in a window of half their spread, as δ itself holds too few points.
    """
    residual, jacobian = (a[0] for a in problem.residual_jacobian(theta[None]))
    w = weights / weights.mean()
    num_free = int(free.sum())
    spare = max(int(np.sum(w > 0)) - num_free, 1)
    score = float(np.sum(w * problem.loss.psi(residual) ** 2)) / spare
    bread = (jacobian * w)[free] @ jacobian[free].T
    covariance = np.zeros((len(theta), len(theta)))
    covariance[np.ix_(free, free)] = np.linalg.pinv(bread, rcond=1e-14, hermitian=True) * score / mean_curvature(problem, residual, w) ** 2
    return covariance


def mean_curvature(problem: Problem, residual: np.ndarray, weights: np.ndarray) -> float:
    """E[ψ′], smoothed over half the residuals' spread when Huber's δ is narrower than that."""
    if problem.loss.kind == "least_squares":
        return 1.0
    spread = 0.5 * 1.4826 * float(np.median(np.abs(residual)))
    window = max(problem.loss.delta, spread)
    share = float(np.average(np.abs(residual) <= window, weights=weights))
    return max(share * problem.loss.delta / window, 1e-6)


def weak_params(form: Form, covariance: np.ndarray, free: np.ndarray) -> list[str]:
    """Words for amplitudes known to no better than a factor e, and a note when none is known at all."""
    sizes = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    weak = [p.name for p, s, f in zip(form.params, sizes, free, strict=True) if f and p.kind == "log" and s > WEAK_LOG_ERROR]
    return [f"weakly identified (uncertain by more than a factor e): {', '.join(weak)}"] if weak else []
