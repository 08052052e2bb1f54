"""Losses on residuals: least squares and Huber, on logarithms or on plain values.

The sum of w·ρ(r) is what every fit minimises; r = log ŷ − log y or ŷ − y. Huber is ½r² within δ and δ(|r| − ½δ) beyond.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dbscale.errors import LawError, nearest


@dataclass(frozen=True)
class Loss:
    """`kind` least_squares or huber, `space` log or linear, `delta` Huber's corner in units of the residual."""

    kind: str = "huber"
    space: str = "log"
    delta: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in ("huber", "least_squares"):
            raise LawError(f"loss kind {self.kind!r}: use 'huber' or 'least_squares'")
        if self.space not in ("log", "linear"):
            raise LawError(f"loss space {self.space!r}: use 'log' or 'linear'")
        if not self.delta > 0:
            raise LawError(f"Huber's delta must be above 0, got {self.delta}")

    @property
    def is_log(self) -> bool:
        return self.space == "log"

    def rho(self, r: np.ndarray) -> np.ndarray:
        """The loss of each residual."""
        if self.kind == "least_squares":
            return 0.5 * r * r
        size = np.abs(r)
        inside = np.minimum(size, self.delta)
        return inside * (size - 0.5 * inside)

    def psi(self, r: np.ndarray) -> np.ndarray:
        """dρ/dr."""
        return r if self.kind == "least_squares" else np.clip(r, -self.delta, self.delta)

    def curvature(self, r: np.ndarray) -> np.ndarray:
        """d²ρ/dr²."""
        return np.ones_like(r) if self.kind == "least_squares" else (np.abs(r) <= self.delta).astype(float)

    def majorant(self, r: np.ndarray) -> np.ndarray:
        """ψ(r)/r: the curvature of the parabola that touches ρ at r and lies above it everywhere."""
        if self.kind == "least_squares":
            return np.ones_like(r)
        return self.delta / np.maximum(np.abs(r), self.delta)


LOSSES = {
    "huber_log": Loss("huber", "log", 1e-3),
    "least_squares_log": Loss("least_squares", "log"),
    "huber": Loss("huber", "linear", 1e-3),
    "least_squares": Loss("least_squares", "linear"),
}


def make_loss(loss: str | Loss) -> Loss:
    """A loss by name or as it is. Raises LawError with the nearest name for an unknown one."""
    if isinstance(loss, Loss):
        return loss
    if loss not in LOSSES:
        raise LawError(f"unknown loss {loss!r}; {nearest(str(loss), LOSSES)}")
    return LOSSES[loss]
