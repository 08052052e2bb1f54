"""The verdict of a contrast and the power of a design: what runs establish, and what they could establish.

Signs come from simultaneous intervals at the measured x (`contrast`); the smooth curve gives the root once both signs
are established; laws may sharpen a root, never claim one. Words are the report's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dbscale.laws.contrast import DeltaCurves, DeltaPoint, NoiseModel, Pairs

Kind = Literal["crossing", "excluded", "one_sign", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """How a contrast ended."""

    kind: Kind
    better: Literal["a", "b"] | None
    """Who has the lower y: throughout for `one_sign`; for `excluded` and `undecided` who is established better somewhere;
    None for `crossing`.
    """
    direction: Literal["b_to_a", "a_to_b"] | None
    """Crossing only: `b_to_a` is Δ positive, then negative (the distillation boundary)."""
    root: float | None
    interval: tuple[float, float] | None
    """At `level`, crossing only."""
    bracket: tuple[float, float] | None
    """Crossing only: last x with one established sign, first x with the other."""
    points: tuple[DeltaPoint, ...]
    curve: dict[str, list[float]]
    """x, delta, low, high: the smooth curve with its simultaneous band, for figures."""
    doubt: float
    """Octaves of wrong advice: Σ over log2 x of min(P(Δ > 0), P(Δ ≤ 0))."""
    level: float
    family: int
    min_effect: float
    num_seeds: int
    """Median over x."""
    smallest_effect: float
    """Smallest |Δ| that this design finds at 80 % power at its typical x."""
    more_seeds: int | None
    """Undecided only: seeds in all that would decide (80 %), if the measured Δ are true; None beyond 1,000."""
    law_root: float | None = None
    law_interval: tuple[float, float] | None = None
    law_name: str | None = None
    notes: tuple[str, ...] = ()
    """Codes: `incomplete_pairs`, `several_crossings`, `within_min_effect` (a sign is established, but no Δ beyond δ is),
    `single_seed_points`, `laws_do_not_cross`, `laws_disagree`.
    """


def judge(
    pairs: Pairs,
    *,
    min_effect: float = 0.005,
    level: float = 0.9,
    family: int = 1,
    num_draws: int = 1000,
    seed: int = 0,
    law_curves: DeltaCurves | None = None,
) -> Verdict:
    """The verdict of the pairs; several strata or draws are pooled first. Raises NotEnoughData for one seed or one x."""
    raise NotImplementedError


@dataclass(frozen=True)
class Power:
    """What a design can tell apart."""

    smallest_effect: float
    """Smallest |Δ| at one x whose sign is established with probability .8."""
    width_octaves: float | None
    """Expected width of the boundary's interval, for `slope`; None without one."""
    chance_of_crossing: float | None
    """Probability that a straight crossing with `slope` in the middle of the range is established; None without one."""
    seeds_for_half: int | None
    """Seeds that halve smallest_effect; None beyond 1,000."""
    finetunes_for_half: int | None
    """Finetune draws that do; None where no number does."""
    cost_of_seeds: float | None
    """Cost of that design relative to this one; None without costs or seeds_for_half."""
    cost_of_finetunes: float | None
    best_finetunes: int | None
    """Finetune draws per upstream run with the smallest variance per cost; None without costs."""


def power(
    noise: NoiseModel,
    *,
    num_x: int,
    num_seeds: int,
    finetunes: int = 1,
    num_students: int = 1,
    num_labels: int = 1,
    level: float = 0.9,
    family: int = 1,
    slope: float | None = None,
    step_octaves: float = 1.0,
    cost_upstream: float | None = None,
    cost_finetune: float | None = None,
) -> Power:
    """Power of `num_seeds` seeds at `num_x` points, `step_octaves` apart, pooled over students and labels.

    `slope`: change of Δ per octave at the boundary. Costs are those of one upstream run and of one finetune draw of all
    its labels. Raises LawError for fewer than 2 seeds or 2 x.
    """
    raise NotImplementedError


NOISE_TABLES: dict[str, NoiseModel] = {}
"""Named default tables of noise, for a plan without rows."""
