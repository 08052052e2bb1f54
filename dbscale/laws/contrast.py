"""Contrasts of two procedures: paired differences, their noise by address, intervals and smooth curves.

Δ = y_A − y_B along one axis; positive where B has the lower y. From here `boundary` reads verdicts. Knows nothing of
runs, arms or grids: who makes the pairs names the columns. numpy and scipy only.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Pairs:
    """Paired differences, one row per (stratum, x, seed, draw); a stratum is a (student, labels). Made by
    `make_pairs`.
    """

    x: np.ndarray
    """[n] > 0: position along the axis (D_p, compute, M, D_f)."""
    delta: np.ndarray
    """[n] y_A − y_B."""
    seed: np.ndarray
    """[n] label of the repetition."""
    student: np.ndarray
    """[n] label of the first stratum axis."""
    labels: np.ndarray
    """[n] label of the second stratum axis (D_f)."""
    draw: np.ndarray
    """[n] index of the finetune draw."""
    teacher: np.ndarray
    """[n] label of the teacher run, shared by the students of one x and seed."""
    test_variance: np.ndarray
    """[n] variance of each Δ over test sets; 0 where unknown."""
    by_sample: Mapping[int, np.ndarray] | None = None
    """row -> wrong_A − wrong_B of every test sample, in {-1, 0, 1}."""
    left_out: int = 0
    """Number of (x, seed) that `pooled` left out because a stratum is missing there."""

    def of(self, student: Hashable | None = None, labels: Hashable | None = None) -> Pairs:
        """The rows of one student, of one `labels`, or of both. Raises LawError naming the values that exist."""
        raise NotImplementedError

    def pooled(self) -> Pairs:
        """Mean over draws, then over strata, of each (x, seed) that has all strata; one stratum (None, None)."""
        raise NotImplementedError


def make_pairs(
    x: Sequence[float] | np.ndarray,
    delta: Sequence[float] | np.ndarray,
    *,
    seed: Sequence[Hashable] | np.ndarray,
    student: Sequence[Hashable] | np.ndarray | None = None,
    labels: Sequence[Hashable] | np.ndarray | None = None,
    draw: Sequence[int] | np.ndarray | None = None,
    teacher: Sequence[Hashable] | np.ndarray | None = None,
    test_variance: Sequence[float] | np.ndarray | None = None,
    by_sample: Mapping[int, np.ndarray] | None = None,
) -> Pairs:
    """Checked pairs. Raises LawError for no rows, unequal lengths, values that are not finite, x not above 0, a negative
    variance, and rows that repeat a (student, labels, x, seed, draw).
    """
    raise NotImplementedError


@dataclass(frozen=True)
class Component:
    """One address of the noise of a Δ."""

    name: str
    """`seed`, `teacher`, `upstream`, `interaction` (upstream run × labels), `finetune` or `test_set`."""
    sd: float
    low: float
    high: float
    """90 % interval of the sd."""
    share: float
    """Of the variance of one Δ of one seed of one stratum and draw; the shares sum to 1."""
    degrees: float
    """Effective degrees of freedom (Satterthwaite)."""


@dataclass(frozen=True)
class NoiseModel:
    """Where the noise of Δ comes from, and how much each address gives."""

    components: tuple[Component, ...]
    """Only those that the table can tell apart, the widest shared first."""
    confounded: tuple[str, ...]
    """Codes `teacher_in_upstream`: the first has no component of its own, its variance is part of the second's."""
    sd: float
    """Of one Δ of one seed, stratum and draw."""
    degrees: float
    by_x: tuple[tuple[float, float], ...]
    """(x, sd of the pooled Δ of one seed there), moderated."""
    correlation_students: float | None
    """Of the Δ of one seed between students; None with one student."""
    correlation_labels: float | None
    """Of the Δ of one seed and student between labels; None with one value."""
    shared_test: float = 0.0
    """Variance that no number of seeds averages out: the test images themselves. 0 where unknown."""

    def variance_of_mean(
        self, num_seeds: int, finetunes: int = 1, *, num_students: int = 1, num_labels: int = 1
    ) -> float:
        """Variance of Δ averaged over seeds, students, labels and finetune draws."""
        raise NotImplementedError

    def best_finetunes(self, cost_upstream: float, cost_finetune: float) -> int:
        """Finetune draws per upstream run that buy the smallest variance per cost: √(σ²_ft·c_up / (σ²_up·c_ft))."""
        raise NotImplementedError


def fit_noise(pairs: Pairs) -> NoiseModel | None:
    """Components of the noise; None where no stratum and x has two seeds."""
    raise NotImplementedError


@dataclass(frozen=True)
class DeltaPoint:
    """Δ at one x: the mean over seeds with its intervals."""

    x: float
    delta: float
    stderr: float
    degrees: float
    num_seeds: int
    by_seed: tuple[float, ...]
    low: float
    high: float
    """Pointwise interval at `level`."""
    low_all: float
    high_all: float
    """Simultaneous over all x and the family."""


def delta_points(pairs: Pairs, *, level: float = 0.9, family: int = 1) -> tuple[DeltaPoint, ...]:
    """Means over seeds by x with t intervals; several strata or draws are pooled first."""
    raise NotImplementedError


@dataclass(frozen=True, eq=False)
class DeltaCurves:
    """Δ along a grid of x: the best curve [g] and draws [S, g] from its uncertainty."""

    grid: np.ndarray
    best: np.ndarray
    drawn: np.ndarray
    name: str = ""
    """What drew them: empty for the law-free curve, else the law's name."""


def delta_curves(
    pairs: Pairs,
    noise: NoiseModel | None = None,
    *,
    grid: np.ndarray | None = None,
    num_draws: int = 1000,
    seed: int = 0,
) -> DeltaCurves:
    """Posterior draws of the smooth curve of Δ. `noise` stands in where the pairs have one seed only; without a grid,
    sixteenths of an octave over the measured range.
    """
    raise NotImplementedError
