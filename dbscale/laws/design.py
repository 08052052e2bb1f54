"""The next runs of a hunt: which pairs remove most wrong advice per cost, and when the hunt may stop.

Pure: what was measured, what could be measured at which price, what is under way and a seed go in, choices come out.
Which runs a pair consists of is the caller's business; whether there is a boundary is for `boundary.judge` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dbscale.errors import LawError, NotEnoughData
from dbscale.laws.boundary import Verdict
from dbscale.laws.contrast import PRIOR_DEGREES, Pairs, SeedTable, critical, delta_curves, seed_table

LOOK_AHEAD = (1, 2, 4)
"""Pairs at one x that are weighed as one step: a single pair often turns no sign where four would."""
NUM_CURVES, NUM_FANTASIES = 400, 100
"""Curves drawn from what is known; curves of them from which outcomes are imagined."""
STEPS_PER_OCTAVE = 4
"""Fineness of the integral over log2 x; offers and measured x lie on it in any case."""
START_SIZES, START_PAIRS = 3, 2
START_PRICE = 4.0
"""The start looks where a pair costs at most this many times the cheapest."""
VERDICT_OCTAVES = 1.0
"""What a verdict that is still to be established is worth, in octaves of wrong advice."""
Reason = Literal["start", "explore", "replicate", "establish"]
Stop = Literal["crossing", "one_sign", "excluded", "doubt"]


@dataclass(frozen=True)
class Target:
    """One contrast whose boundary is hunted, with what was measured of it so far."""

    name: str
    pairs: Pairs | None
    """None before the first pair is finished."""
    min_effect: float = 0.005


@dataclass(frozen=True)
class Offer:
    """A place where pairs can be measured, and what they would cost."""

    x: float
    targets: tuple[str, ...]
    """Names of the targets that a pair here measures, each once."""
    runs: tuple[Mapping[str, float], ...]
    """For the next pair, for the one after it and so on: the runs it still needs, each with its cost. A run that stands in
    several (a shared teacher, an upstream run for two downstream sets) is paid for once."""


@dataclass(frozen=True)
class Choice:
    """Pairs that the next wave should measure at one offer."""

    offer: int
    """Its index."""
    num_pairs: int
    gain: float | None
    """Expected octaves of wrong advice that they remove, the worth of a verdict included; None for the start."""
    cost: float
    reason: Reason
    """`start`: nothing can be said yet; `explore`: no pair was measured here; `replicate`: more pairs where there are
    some; `establish`: most of the gain is the verdict's, whose intervals are still too wide."""


def looking_level(level: float, num_targets: int = 1) -> float:
    """The level at which a hunt judges each target, so that all its verdicts together hold at `level`.

    Half the error, because it looks after every wave (measured: docs/hunt.md); of that the root of the number of targets,
    so that intervals hold simultaneously over all of them whatever their correlation (Šidák 1967).
    """
    return (1 - (1 - level) / 2) ** (1 / num_targets)


def choose_wave(
    targets: Sequence[Target],
    offers: Sequence[Offer],
    *,
    num_pairs: int,
    level: float = 0.95,
    pending: Mapping[tuple[str, float], int] | None = None,
    most_cost: float = np.inf,
    seed: int = 0,
) -> tuple[Choice, ...]:
    """At most `num_pairs` pairs that remove most doubt per cost, best first; empty where none is affordable or left.

    `pending` counts pairs under way by (target, x); the choice is made as if their results were known to come. `level`
    is that of each verdict (`looking_level`). Doubt is J = Σ over log2 x of min(P(Δ > 0), P(Δ ≤ 0)), in octaves; outcomes
    are imagined from drawn curves, all curves reweighted by their likelihood, and (J − E J′)/cost is what counts. Raises
    LawError for an offer whose target is not given.
    """
    known = {target.name for target in targets}
    unknown = sorted({name for each in offers for name in each.targets if name not in known})
    if unknown:
        raise LawError(f"offers measure {unknown[0]!r}, which is no target; the targets: {sorted(known)}")
    xs = [np.array([c.x for c in offers if t.name in c.targets]) for t in targets]
    under_way = dict(pending or {})
    beliefs, starting = {}, []
    for target, at in zip(targets, xs, strict=True):
        belief = make_belief(target, at, level, under_way, seed) if len(at) else None
        if belief is not None:
            beliefs[target.name] = belief
        elif len(at):
            starting.append(target)
    wave = _Wave(offers, beliefs, num_pairs, most_cost)
    for target in starting:
        _start(wave, target, under_way)
    wave.fill()
    return tuple(wave.choices)


def _start(wave: _Wave, target: Target, pending: Mapping[tuple[str, float], int]) -> None:
    """Two pairs at three x of the cheap side: enough to draw curves from. They may climb from there."""
    places = [k for k, each in enumerate(wave.offers) if target.name in each.targets]
    prices = np.array([sum(wave.offers[k].runs[0].values()) if wave.offers[k].runs else np.inf for k in places])
    cheap = [k for k, price in zip(places, prices, strict=True) if price <= START_PRICE * prices.min()]
    cheap = sorted(cheap if len(cheap) >= START_SIZES else places, key=lambda k: wave.offers[k].x)
    chosen = [cheap[k] for k in np.linspace(0, len(cheap) - 1, START_SIZES).round().astype(int)]
    for k in dict.fromkeys(chosen):
        x = wave.offers[k].x
        measured = 0 if target.pairs is None else int(np.sum(target.pairs.pooled().x == x))
        lacking = START_PAIRS - measured - pending.get((target.name, x), 0) - wave.taken[k]
        if lacking > 0 and wave.affordable(k, lacking):
            wave.take(k, lacking, None, "start")


class _Wave:
    """A wave in the making: what is chosen and paid for so far."""

    def __init__(self, offers: Sequence[Offer], beliefs: Mapping[str, Belief], size: int, money: float) -> None:
        self.offers, self.beliefs = offers, beliefs
        self.left, self.money = size, money
        self.paid: set[str] = set()
        self.taken = [0] * len(offers)
        self.choices: list[Choice] = []

    def cost(self, place: int, num: int) -> float:
        """Cost of `num` further pairs at an offer, what is paid for left out."""
        first = self.taken[place]
        new = {run: cost for pair in self.offers[place].runs[first : first + num] for run, cost in pair.items()}
        return sum(cost for run, cost in new.items() if run not in self.paid)

    def affordable(self, place: int, num: int) -> bool:
        enough = num <= min(self.left, len(self.offers[place].runs) - self.taken[place])
        return enough and self.cost(place, num) <= self.money

    def take(self, place: int, num: int, gain: float | None, reason: Reason) -> None:
        offer, cost, first = self.offers[place], self.cost(place, num), self.taken[place]
        self.choices.append(Choice(place, num, gain, cost, reason))
        self.paid.update(run for pair in offer.runs[first : first + num] for run in pair)
        self.taken[place] += num
        self.left, self.money = self.left - num, self.money - cost
        for name in offer.targets:
            if name in self.beliefs:
                self.beliefs[name].expect(offer.x, num)

    def fill(self) -> None:
        """Take the best step per cost until the wave is full, the budget is spent, or nothing helps.

        What was worth most before a step is looked at first after it: gains shrink as more is known, so a step that still
        leads with its new gain is the best without a look at the others.
        """
        steps = [(k, n) for k in range(len(self.offers)) for n in LOOK_AHEAD]
        ranked = {step: np.inf for step in steps if self.affordable(*step)}
        fresh: set[tuple[int, int]] = set()
        while ranked and self.left:
            step = max(ranked, key=lambda each: (ranked[each], each in fresh))
            if not self.affordable(*step):
                del ranked[step]
            elif step in fresh:
                if ranked[step] <= 0:
                    return
                gain, reason = self._gain(*step)
                self.take(*step, gain, reason)
                fresh = set()
            else:
                ranked[step] = self._gain(*step)[0] / max(self.cost(*step), 1e-9)
                fresh.add(step)

    def _gain(self, place: int, num: int) -> tuple[float, Reason]:
        """Expected octaves removed over all targets measured here, and what most of it is."""
        offer = self.offers[place]
        found = [self.beliefs[name].gain(offer.x, num) for name in offer.targets if name in self.beliefs]
        doubt, verdict = (sum(each) for each in zip(*found, strict=True)) if found else (0.0, 0.0)
        new = all(not self.beliefs[name].count_at(offer.x) for name in offer.targets if name in self.beliefs)
        reason: Reason = "explore" if new else "establish" if verdict > max(doubt, 0.0) else "replicate"
        return doubt + verdict, reason


@dataclass
class Belief:
    """What is thought of one target: curves [s] that may be true, and imagined studies [m] that go on as one of them is.

    K values of x, g points of the range. `make_belief` draws it from what was measured.
    """

    x: np.ndarray
    """[K] rising: offers and what was measured."""
    octaves: np.ndarray
    """[g] weights of the integral over log2 x."""
    positive: np.ndarray
    """[s, g] whether each curve is above 0; single precision, like all that has one value for each study and curve."""
    drawn: np.ndarray
    """[s, K] each curve at x."""
    true: np.ndarray
    """[m] the curve that each imagined study is true to."""
    variance: np.ndarray
    """[K] of one pair's Δ."""
    count: np.ndarray
    """[K] pairs at x, measured or expected."""
    total: np.ndarray
    """[m, K] their sum in each imagined study."""
    shared: np.ndarray
    """[K] variance of a mean that more pairs do not lessen: that of the test images."""
    error: np.ndarray
    """[steps, m, K] standard normal: the noise of what is imagined; alike for all steps that are compared."""
    min_effect: float
    level: float

    def __post_init__(self) -> None:
        self.log_weight = np.zeros((len(self.true), len(self.drawn)), np.float32)
        self.steps = np.zeros(len(self.x), int)
        self.now = self._losses(self.log_weight, self.total, self.count)

    def count_at(self, x: float) -> float:
        """Pairs at x, measured or expected."""
        return float(self.count[np.searchsorted(self.x, x)])

    def gain(self, x: float, num: int) -> tuple[float, float]:
        """Octaves of doubt, and the worth of a verdict, that `num` more pairs at x are expected to remove."""
        after = self._losses(*self._after(x, num))
        return self.now[0] - after[0], self.now[1] - after[1]

    def expect(self, x: float, num: int) -> None:
        """Count `num` pairs at x as coming: each imagined study sees what its own curve would give."""
        self.log_weight, self.total, self.count = self._after(x, num)
        self.steps[np.searchsorted(self.x, x)] += 1
        self.now = self._losses(self.log_weight, self.total, self.count)

    def _after(self, x: float, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        k = int(np.searchsorted(self.x, x))
        variance = self.variance[k] / num
        seen = self.drawn[self.true, k] + np.sqrt(variance) * self.error[self.steps[k] % len(self.error), :, k]
        missed = (seen[:, None] - self.drawn[:, k]).astype(np.float32)
        missed *= missed  # in place: arrays of [m, s] are most of the work
        missed /= np.float32(2 * variance)
        total, count = self.total.copy(), self.count.copy()
        total[:, k] += num * seen
        count[k] += num
        return np.subtract(self.log_weight, missed, out=missed), total, count

    def _losses(self, log_weight: np.ndarray, total: np.ndarray, count: np.ndarray) -> tuple[float, float]:
        """Mean over imagined studies: octaves of wrong advice, and what the verdict lacks."""
        weight = log_weight - log_weight.max(axis=1, keepdims=True)
        np.exp(weight, out=weight)
        positive = (weight @ self.positive) / weight.sum(axis=1, keepdims=True)
        doubt = np.minimum(positive, 1 - positive) @ self.octaves
        return float(doubt.mean()), VERDICT_OCTAVES * float(self._lacking(total, count).mean())

    def _lacking(self, total: np.ndarray, count: np.ndarray) -> np.ndarray:
        """How far each imagined study is from a verdict [m], 0 to 1: the least that a crossing, no harm or no gain lack.

        With half-widths as `judge` will have them; a sign that is just established lacks nothing.
        """
        some = count > 0
        count = count[some]
        degrees = np.minimum(PRIOR_DEGREES + count - 1, max(float(np.sum(count - 1)), 1.0))
        half = critical(degrees, len(count), self.level, 1) * np.sqrt(self.variance[some] / count + self.shared[some])
        size, margin = total[:, some] / count / half, self.min_effect / half
        unseen = int(np.sum(~some[[0, -1]]))  # ends of the range, without which no sign holds throughout
        no_side = (_short(np.array([margin + size, margin - size])).sum(axis=2) + unseen) / (len(count) + unseen)
        crossing = _short(np.array([size.max(axis=1), -size.min(axis=1)])).mean(axis=0)
        return np.minimum(crossing, no_side.min(axis=0))


def _short(size: np.ndarray) -> np.ndarray:
    """What is lacking of 1, between 0 and 1."""
    return np.minimum(np.maximum(1 - size, 0), 1)


def _trapezoid(at: np.ndarray) -> np.ndarray:
    """Weights of the trapezoid rule at these points."""
    gaps = np.diff(at)
    return (np.append(gaps, 0) + np.append(0, gaps)) / 2


def make_belief(
    target: Target, at: np.ndarray, level: float, pending: Mapping[tuple[str, float], int] | None = None, seed: int = 0
) -> Belief | None:
    """What is thought of a target over the range of `at` and of what was measured, pending pairs counted as coming.

    None while no curve can be drawn: fewer than two x, or no x with two seeds.
    """
    if target.pairs is None:
        return None
    pairs = target.pairs.pooled()
    try:
        table = seed_table(pairs)
        belief = _believe(table, np.union1d(at, table.x), pairs, target.min_effect, level, seed)
    except NotEnoughData:
        return None
    for (name, x), num in sorted((pending or {}).items()):
        if name == target.name and num and x in belief.x:
            belief.expect(x, num)
    return belief


def _believe(table: SeedTable, x: np.ndarray, pairs: Pairs, min_effect: float, level: float, seed: int) -> Belief:
    steps = int(np.ceil(np.log2(x[-1] / x[0]) * STEPS_PER_OCTAVE))
    grid = np.union1d(x, np.geomspace(x[0], x[-1], max(steps, 1) + 1)[1:-1])
    curves = delta_curves(pairs, grid=grid, num_draws=NUM_CURVES, seed=seed)
    measured = np.searchsorted(x, table.x)
    variance, shared = (np.full(len(x), each.mean()) for each in (table.variance, table.shared))
    count, total = np.zeros(len(x)), np.zeros(len(x))
    variance[measured], shared[measured], count[measured] = table.variance, table.shared, table.num_seeds
    total[measured] = table.mean * table.num_seeds
    return Belief(
        x=x, octaves=_trapezoid(np.log2(grid)), positive=(curves.drawn > 0).astype(np.float32),
        drawn=curves.drawn[:, np.searchsorted(grid, x)],
        true=np.linspace(0, NUM_CURVES - 1, NUM_FANTASIES).astype(int),  # draws come sorted: evenly is stratified
        variance=variance, shared=shared, count=count, total=np.tile(total, (NUM_FANTASIES, 1)),
        error=np.random.default_rng([seed, 1]).standard_normal((8, NUM_FANTASIES, len(x))),
        min_effect=min_effect, level=level,
    )  # fmt: skip


def doubt_left(target: Target, at: Sequence[float]) -> float | None:
    """Octaves of wrong advice over the whole range of `at`, measured or not; None while no curve can be drawn."""
    belief = make_belief(target, np.asarray(at, float), 0.9)
    return None if belief is None else belief.now[0]


def why_stop(
    verdict: Verdict, span: tuple[float, float], *, target_octaves: float, least_doubt: float | None = None
) -> Stop | None:
    """Why a target needs no more runs; None while it does.

    A crossing must have its interval within `target_octaves`. All else counts once both ends of the `span` that is hunted
    over were measured: an excluded effect; one sign, with no more doubt between the measured x than half the octaves
    that a crossing may leave; and, whatever the verdict, less doubt than `least_doubt`, where one is stated.
    """
    if verdict.interval is not None and np.log2(verdict.interval[1] / verdict.interval[0]) <= target_octaves:
        return "crossing"
    if verdict.points[0].x > span[0] or verdict.points[-1].x < span[1]:
        return None
    if verdict.kind == "excluded":
        return "excluded"
    if verdict.kind == "one_sign" and verdict.doubt <= target_octaves / 2:
        return "one_sign"
    return "doubt" if least_doubt is not None and verdict.doubt < least_doubt else None
