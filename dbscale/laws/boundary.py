"""The verdict of a contrast and the power of a design: what runs establish, and what they could establish.

Signs come from simultaneous intervals at the measured x (`contrast`). Once both signs are established the smooth curve
gives the root; laws may sharpen that root, never claim one. Words are the report's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np

from dbscale.errors import LawError
from dbscale.laws.contrast import PRIOR_DEGREES, DeltaCurves, DeltaPoint, Pairs, critical, delta_curves, delta_points
from dbscale.laws.noise import NoiseModel

Kind = Literal["crossing", "excluded", "one_sign", "undecided"]
Arm = Literal["a", "b"]
Direction = Literal["b_to_a", "a_to_b"]
WANTED_POWER = 0.8
MOST_SEEDS = 1000
"""More seeds than these are nobody's plan."""
EARLY_TAIL = 0.5
"""Share of its tail that the interval of a root leaves out below, where the bracket starts at the first x and goes beyond
the second. With the whole tail such intervals hold .67 to .83 of the roots in the first step (docs/calibration.md).
"""


@dataclass(frozen=True)
class Verdict:
    """How a contrast ended."""

    kind: Kind
    better: Arm | None
    """Who has the lower y: throughout for `one_sign`; somewhere, for `excluded` and `undecided`, if that is established
    for one of them; None for `crossing`.
    """
    points: tuple[DeltaPoint, ...]
    curve: dict[str, list[float]]
    """x, delta, low, high: the smooth curve with its simultaneous band, for figures."""
    doubt: float
    """Octaves of wrong advice: the integral over log2 x of min(P(Δ > 0), P(Δ ≤ 0))."""
    level: float
    family: int
    min_effect: float
    num_seeds: int
    """Median over x."""
    smallest_effect: float
    """Smallest |Δ| whose sign this design establishes with probability .8, at its typical x."""
    more_seeds: int | None
    """Undecided only: seeds in all that would decide, four times in five given what is known; None beyond 1,000."""
    direction: Direction | None = None
    """Crossing only: `b_to_a` is Δ positive, then negative (the distillation boundary)."""
    root: float | None = None
    interval: tuple[float, float] | None = None
    """Crossing only, at `level`; within the bracket. Reaches further down where no sign follows that at the first x."""
    bracket: tuple[float, float] | None = None
    """Crossing only: last x with the one sign established, first x with the other."""
    law_root: float | None = None
    law_interval: tuple[float, float] | None = None
    law_name: str | None = None
    notes: tuple[str, ...] = ()
    """Codes: `incomplete_pairs` (an (x, seed) was not pooled because a stratum is missing), `single_seed_points`,
    `within_min_effect` (a sign is established, but nothing beyond δ), `several_crossings` (the last from positive to
    negative is given), `laws_do_not_cross`, `laws_disagree`.
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
    """The verdict of the pairs; several strata or draws are pooled first.

    Signs count where the simultaneous interval excludes 0, "beyond δ" where it excludes ±`min_effect`; `family` is the
    number of verdicts read together. `law_curves` must span the bracket. Raises NotEnoughData for one seed or one x,
    LawError for options out of range.
    """
    check_options(min_effect, level, family)
    pooled = pairs.pooled()
    points = delta_points(pooled, level=level, family=family)
    curves = delta_curves(pooled, num_draws=num_draws, seed=seed)
    band = _band(curves, level ** (1 / family))
    low, high = (np.array([getattr(p, end) for p in points]) for end in ("low_all", "high_all"))
    positive, negative = low > 0, high < 0
    kind = str(decide(low, high, min_effect))
    beyond = (low > min_effect) | (high < -min_effect)
    num_seeds, stderr, degrees = (
        float(np.median([getattr(p, name) for p in points])) for name in ("num_seeds", "stderr", "degrees")
    )
    notes = {
        "incomplete_pairs": pooled.left_out > 0,
        "single_seed_points": min(p.num_seeds for p in points) < 2,
        "within_min_effect": (positive | negative).any() and not beyond.any(),
    }
    found: dict[str, Any] = {}
    if kind == "crossing":
        found, more = _crossing(curves, law_curves, [p.x for p in points], positive, negative, level)
        notes |= more
    return Verdict(
        kind=cast(Kind, kind),
        better=None if kind == "crossing" else "b" if positive.any() else "a" if negative.any() else None,
        points=points,
        curve=band,
        doubt=_doubt(curves),
        level=level,
        family=family,
        min_effect=min_effect,
        num_seeds=int(num_seeds),
        smallest_effect=detectable(stderr, degrees, len(points), level, family),
        more_seeds=_more_seeds(points, curves, min_effect, level, family) if kind == "undecided" else None,
        notes=tuple(name for name, true in notes.items() if true),
        **found,
    )


def check_options(min_effect: float, level: float, family: int) -> None:
    for name, value, allowed, wanted in (
        ("min_effect", min_effect, 0 <= min_effect < np.inf, "finite and not negative"),
        ("level", level, 0 < level < 1, "between 0 and 1"),
        ("family", family, family >= 1, "at least 1"),
    ):
        if not allowed:
            raise LawError(f"{name} is {value!r}; it must be {wanted}")


def decide(low: np.ndarray, high: np.ndarray, min_effect: float) -> np.ndarray:
    """Kind [...] of the verdict on simultaneous intervals [..., K] at the measured x."""
    positive, negative = (low > 0).any(axis=-1), (high < 0).any(axis=-1)
    no_harm, no_gain = (low > -min_effect).all(axis=-1), (high < min_effect).all(axis=-1)
    one_sign = (no_harm & (low > min_effect).any(axis=-1)) | (no_gain & (high < -min_effect).any(axis=-1))
    cases = {"crossing": positive & negative, "one_sign": one_sign, "excluded": no_harm | no_gain}
    return np.select(list(cases.values()), list(cases), "undecided")


def _crossing(
    curves: DeltaCurves,
    laws: DeltaCurves | None,
    x: Sequence[float],
    positive: np.ndarray,
    negative: np.ndarray,
    level: float,
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Fields of a crossing's verdict, and notes, from the signs established at x."""
    direction, bracket, several = _bracket(x, positive, negative)
    # A root in the first step leaves no sign at the second x only where luck was against it; so did it lift the curve.
    below = EARLY_TAIL if bracket[0] == x[0] and bracket[1] > x[1] else 1.0
    root, interval = _root(curves, bracket, direction, level, below)
    found: dict[str, Any] = {"direction": direction, "bracket": bracket, "root": root, "interval": interval}
    notes = {"several_crossings": several}
    if laws is None:
        return found, notes
    _, drawn = _signed(laws, bracket, direction)
    law_root, law_interval = _root(laws, bracket, direction, level)
    # a law sharpens what the points support: its curves must cross here, and not elsewhere than the points say
    notes["laws_do_not_cross"] = bool(np.mean((drawn[:, 0] > 0) & (drawn[:, -1] < 0)) < level)
    apart = law_interval[0] > interval[1] or law_interval[1] < interval[0]
    notes["laws_disagree"] = apart and not notes["laws_do_not_cross"]
    if not (notes["laws_do_not_cross"] or apart):
        found |= {"law_root": law_root, "law_interval": law_interval, "law_name": laws.name}
    return found, notes


def _bracket(
    x: Sequence[float], positive: np.ndarray, negative: np.ndarray
) -> tuple[Direction, tuple[float, float], bool]:
    """Direction and bracket of the crossing, and whether there are several.

    Of several changes of sign the last from positive to negative counts: beyond it distilling no longer pays. Where
    there is none, the last from negative to positive.
    """
    established = np.flatnonzero(positive | negative).tolist()
    changes = [(j, k) for j, k in pairwise(established) if positive[j] != positive[k]]
    last = max(changes, key=lambda change: (positive[change[0]], change))
    return "b_to_a" if positive[last[0]] else "a_to_b", (x[last[0]], x[last[1]]), len(changes) > 1


def _signed(curves: DeltaCurves, bracket: tuple[float, float], direction: Direction) -> tuple[np.ndarray, np.ndarray]:
    """Log x across the bracket [65], and the drawn curves there [S, 65], turned so that they fall through 0."""
    at, known = np.log(np.geomspace(*bracket, num=65)), np.log(curves.grid)
    if known[0] > at[0] + 1e-9 or known[-1] < at[-1] - 1e-9:
        raise LawError(
            f"law_curves run from x = {curves.grid[0]:g} to {curves.grid[-1]:g}; they must span the bracket {bracket}"
        )
    left = np.clip(np.searchsorted(known, at, side="right") - 1, 0, len(known) - 2)
    part = (at - known[left]) / (known[left + 1] - known[left])
    drawn = curves.drawn[:, left] * (1 - part) + curves.drawn[:, left + 1] * part
    return at, drawn if direction == "b_to_a" else -drawn


def _root(
    curves: DeltaCurves, bracket: tuple[float, float], direction: Direction, level: float, below: float = 1.0
) -> tuple[float, tuple[float, float]]:
    """Median and interval of the drawn curves' roots within the bracket: of each, how far the first sign reaches in all.

    For a curve that crosses once that is its root; one that wanders through 0 gives the middle of its wandering. Each end
    leaves (1 - level) / 2 of the roots out, the lower one `below` of that.
    """
    at, drawn = _signed(curves, bracket, direction)
    ahead, size = np.maximum(drawn, 0.0), np.abs(drawn)
    share = (ahead[:, :-1] + ahead[:, 1:]) / np.maximum(size[:, :-1] + size[:, 1:], 1e-300)  # of each piece, linear
    roots = at[0] + (at[1] - at[0]) * share.sum(axis=1)
    low, root, high = np.exp(np.quantile(roots, [below * (0.5 - level / 2), 0.5, 0.5 + level / 2])).tolist()
    return root, (low, high)


def _band(curves: DeltaCurves, level: float) -> dict[str, list[float]]:
    """The best curve and the band that holds a share `level` of the drawn curves throughout."""
    sd = np.maximum(curves.drawn.std(axis=0), 1e-300)
    half = sd * np.quantile((np.abs(curves.drawn - curves.best) / sd).max(axis=1), level)
    rows = (curves.grid, curves.best, curves.best - half, curves.best + half)
    return dict(zip(("x", "delta", "low", "high"), (row.tolist() for row in rows), strict=True))


def _doubt(curves: DeltaCurves) -> float:
    positive = (curves.drawn > 0).mean(axis=0)
    return float(np.trapezoid(np.minimum(positive, 1 - positive), np.log2(curves.grid)))


def detectable(stderr: float, degrees: float, num_x: int, level: float, family: int) -> float:
    """|Δ| whose sign is established with probability WANTED_POWER: noncentral t, simultaneous critical value."""
    from scipy.special import nctdtrinc

    return stderr * float(nctdtrinc(degrees, 1 - WANTED_POWER, float(critical(degrees, num_x, level, family))))


def complete_degrees(num_x: int, num_seeds: int) -> float:
    """Degrees of freedom of the moderated variance in a complete table."""
    return min(PRIOR_DEGREES + num_seeds - 1, num_x * (num_seeds - 1.0))


def _more_seeds(
    points: Sequence[DeltaPoint], curves: DeltaCurves, min_effect: float, level: float, family: int
) -> int | None:
    """Fewest seeds in all that decide with probability WANTED_POWER: truths drawn from the curve, new seeds about them.

    What is measured already stays in the means. The truth is not known, so a study with no effect needs many.
    """
    from scipy.special import chdtri

    delta, sd, have = (
        np.array(each)
        for each in zip(*((p.delta, p.stderr * p.num_seeds**0.5, p.num_seeds) for p in points), strict=True)
    )
    every = max(1, len(curves.drawn) // 250)
    truth = curves.drawn[::every, np.searchsorted(curves.grid, [p.x for p in points])]
    rng = np.random.default_rng(0)
    error, quantile = rng.standard_normal(truth.shape), rng.random((len(truth), 1))

    def decides(num_seeds: int) -> bool:
        new, degrees = num_seeds - have, complete_degrees(len(points), num_seeds)
        mean = (have * delta + new * truth + np.sqrt(new) * sd * error) / num_seeds
        half = critical(degrees, len(points), level, family) * sd / num_seeds**0.5
        half = half * np.sqrt(chdtri(degrees, quantile) / degrees)  # that study will have to estimate its noise, too
        return float(np.mean(decide(mean - half, mean + half, min_effect) != "undecided")) >= WANTED_POWER

    counts = range(int(have.max()) + 1, MOST_SEEDS + 1)
    found = bisect_left(counts, True, key=decides)
    return counts[found] if found < len(counts) else None


@dataclass(frozen=True)
class Power:
    """What a design can tell apart, and what would halve that."""

    smallest_effect: float
    """Smallest |Δ| at one x whose sign is established with probability .8."""
    width_octaves: float | None
    """Expected width of the boundary's interval; None without a slope."""
    chance_of_crossing: float | None
    """Probability that a straight crossing in the middle of the range is established; None without a slope."""
    seeds_for_half: int | None
    """Seeds that halve `smallest_effect`; None beyond 1,000."""
    finetunes_for_half: int | None
    """Finetune draws per upstream run that halve it; None where 64 do not."""
    cost_of_seeds: float | None
    """Cost of the design with `seeds_for_half`, relative to this one."""
    cost_of_finetunes: float | None
    """The same for `finetunes_for_half`; None without costs."""
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
    """Power of `num_seeds` seeds at `num_x` points, pooled over students and labels.

    `slope` is the change of Δ per octave of x at the boundary, `step_octaves` the distance of the points. Costs, in one
    unit, are those of one upstream run and of one finetune draw at all its labels. Raises LawError for fewer than 2
    seeds or 2 x.
    """
    check_options(0.0, level, family)
    if num_seeds < 2 or num_x < 2:
        raise LawError(f"power of {num_seeds} seed(s) at {num_x} x: a verdict needs two of each or more")

    def stderr(seeds: int, draws: int) -> float:
        return noise.variance_of_mean(seeds, draws, num_students=num_students, num_labels=num_labels) ** 0.5

    def effect(seeds: int, draws: int) -> float:
        return detectable(stderr(seeds, draws), complete_degrees(num_x, seeds), num_x, level, family)

    now = effect(num_seeds, finetunes)
    more = range(num_seeds, MOST_SEEDS + 1)
    place = bisect_left(more, True, key=lambda n: effect(n, finetunes) <= now / 2)
    seeds = more[place] if place < len(more) else None
    draws = next((r for r in range(finetunes, 65) if effect(num_seeds, r) <= now / 2), None)
    dearer = best = width = chance = None
    if cost_upstream is not None and cost_finetune is not None:
        best = noise.best_finetunes(cost_upstream, cost_finetune)
        if draws is not None:
            dearer = (cost_upstream + draws * cost_finetune) / (cost_upstream + finetunes * cost_finetune)
    if slope is not None:
        own = stderr(num_seeds, finetunes)
        # share of the noise that all x of a seed share
        along = noise.variance("seed") / num_seeds / max(own**2, 1e-300)
        design = (own, complete_degrees(num_x, num_seeds), num_x, along, level)
        width = width_at_root(*design, slope)
        chance = _chance(*design, family, abs(slope) * step_octaves)
    return Power(now, width, chance, seeds, draws, seeds / num_seeds if seeds else None, dearer, best)


def width_at_root(stderr: float, degrees: float, num_x: int, along: float, level: float, slope: float) -> float:
    """Octaves: the curve's interval at the root, read off along its slope. The root leans on the four x about it."""
    at_root = stderr * np.sqrt(along + (1 - along) / min(num_x, 4))
    return float(2 * critical(degrees, 1, level, 1) * at_root / abs(slope))


def _chance(stderr: float, degrees: float, num_x: int, along: float, level: float, family: int, step: float) -> float:
    """Share of 4,000 simulated studies of a straight crossing, `step` between neighbours, that establish both signs."""
    rng = np.random.default_rng(0)
    truth = -step * (np.arange(num_x) - (num_x - 1) / 2)
    shared, own = rng.standard_normal((4000, 1)), rng.standard_normal((4000, num_x))
    mean = truth + stderr * (np.sqrt(along) * shared + np.sqrt(1 - along) * own)
    half = stderr * np.sqrt(rng.chisquare(degrees, (4000, 1)) / degrees) * critical(degrees, num_x, level, family)
    return float(np.mean((mean > half).any(axis=1) & (mean < -half).any(axis=1)))


def equal_grid(verdict: Verdict, sd: float, x: Sequence[float]) -> int | None:
    """Seeds with which a fixed grid at `x` [K] would be expected to end in the same verdict, its root as sharp.

    The curve that was found is taken for the truth and `sd` for the noise of one seed's Δ. None for an undecided
    verdict, for a grid that lies on one side of the root, and beyond 1,000.
    """
    at, known = np.log(np.asarray(x, float)), np.log(verdict.curve["x"])
    delta = np.interp(at, known, verdict.curve["delta"])
    if verdict.kind == "undecided":
        return None
    slope, wanted = 0.0, np.inf
    if verdict.root is not None and verdict.interval is not None:
        octave = np.log(verdict.root) + np.log(2) * np.array([-0.5, 0.5])
        slope = float(np.diff(np.interp(octave, known, verdict.curve["delta"]))[0])
        wanted = np.log2(verdict.interval[1] / verdict.interval[0])

    def ends_alike(seeds: int) -> bool:
        degrees, stderr = complete_degrees(len(at), seeds), sd / seeds**0.5
        half = critical(degrees, len(at), verdict.level, 1) * stderr
        if decide(delta - half, delta + half, verdict.min_effect) != verdict.kind:
            return False
        return not slope or width_at_root(stderr, degrees, len(at), 0.0, verdict.level, slope) <= wanted

    return next((seeds for seeds in range(2, MOST_SEEDS + 1) if ends_alike(seeds)), None)
