"""Hunts in simulated worlds beside fixed grids: `make bench-hunt`, or run this file.

Prints the tables of docs/hunt.md: what a hunt costs beside a fixed grid that ends as sharply, how often its interval holds
the root, and how often it claims a crossing where there is none. Shapes are those of `bench_verdicts`; noise is how the
real seeds of ROWS deviate from their means at each D_p. Finished worlds are kept in CACHE, so that a run can be stopped
and typed again. `--first` moves all random numbers: tune on one, report another.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bench_verdicts import falling, noises_of, pairs_of, read_rows

from dbscale.laws import Pairs, Verdict, judge, make_pairs
from dbscale.laws.boundary import decide
from dbscale.laws.contrast import delta_points
from dbscale.laws.design import Offer, Target, choose_wave, looking_level, why_stop

ROWS = Path(__file__).resolve().parents[2] / "docs" / "studies" / "demo" / "rows.parquet"
SMALLEST, OCTAVES, PER_OCTAVE = 1000.0, 6, 2
FINETUNE_COST = 0.5
"""In units of one pair at the smallest D_p: what a pair costs whatever its D_p."""
MOST_SEEDS, FIXED_SEEDS = 40, 16
LEVEL, MIN_EFFECT, WAVE, TARGET_OCTAVES = 0.9, 0.02, 8, 1.0
BUDGET_GRIDS = 4.0
"""A hunt may spend this many fixed grids of three seeds."""
GRID_X = SMALLEST * 2.0 ** np.arange(OCTAVES + 1)
HUNT_X = SMALLEST * 2.0 ** (np.arange(OCTAVES * PER_OCTAVE + 1) / PER_OCTAVE)


def pair_cost(x: float) -> float:
    return x / SMALLEST + FINETUNE_COST


# --- worlds ---------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A truth along octaves, and noise that the same (x, seed) always has."""

    truth: Callable[[np.ndarray], np.ndarray]
    roots: Mapping[str, float]
    """Where the truth crosses 0, by direction."""
    deviations: np.ndarray
    """[real seeds, real x] of one Δ about its mean."""
    number: int
    heavy: bool
    known: dict[tuple[float, int], float] = field(default_factory=dict)

    def delta(self, x: float, seed: int) -> float:
        if (x, seed) not in self.known:
            self.known[x, seed] = self._draw(x, seed)
        return self.known[x, seed]

    def _draw(self, x: float, seed: int) -> float:
        octave = np.log2(x / SMALLEST)
        rng = np.random.default_rng([self.number, seed, round(octave * 16)])
        # the x of one seed have one real seed in common, as far as the real rows have it
        own = np.random.default_rng([self.number, seed, 999])
        row, sign = own.integers(len(self.deviations)), own.choice([-1.0, 1.0])
        place = octave / OCTAVES * (self.deviations.shape[1] - 1)
        column = int(min(np.floor(place + rng.random()), self.deviations.shape[1] - 1))
        if rng.random() < 0.7:  # most of the noise is the run's own (.83 to .93 of the variance)
            row, sign = rng.integers(len(self.deviations)), rng.choice([-1.0, 1.0])
        noise = sign * self.deviations[row, column]
        if self.heavy:
            noise *= np.sqrt(2.0 / rng.chisquare(4))  # the tails of Student's t
        return float(self.truth(np.array([octave]))[0] + noise)


def make_truth(
    shape: str, rng: np.random.Generator, size: float
) -> tuple[Callable[[np.ndarray], np.ndarray], Mapping[str, float]]:
    """Truth along octaves with heights in units of the noise's sd, and its roots by direction."""
    height = size * rng.uniform(0.5, 4.0)
    if shape == "zero":
        return np.zeros_like, {}
    if shape == "constant":
        level = height * rng.choice([-1.0, 1.0])
        return lambda o: np.full_like(o, level), {}
    if shape == "decaying":
        rate = rng.choice([0.5, 1.0, 2.0])
        return lambda o: height * 2.0 ** (-rate * o), {}
    if shape == "hump":
        peak, half = OCTAVES * rng.uniform(0.35, 0.5), OCTAVES * rng.uniform(0.2, 0.3)
        ends = {"a_to_b": SMALLEST * 2 ** (peak - half), "b_to_a": SMALLEST * 2 ** (peak + half)}
        return lambda o: height * (3 * np.exp(-np.log(3) * ((o - peak) / half) ** 2) - 1) / 2, ends
    reach = {"first step": (0.1, 0.9), "last step": (OCTAVES - 0.9, OCTAVES - 0.1)}
    root = rng.uniform(*reach.get(shape, (0.25 * OCTAVES, 0.75 * OCTAVES)))
    if shape == "middle":
        slope = size * rng.uniform(0.3, 1.5)
        return lambda o: slope * (root - o), {"b_to_a": SMALLEST * 2**root}
    curve, state = falling, np.random.default_rng(rng.integers(2**32))
    found = curve(state, OCTAVES, root)
    scale = size * rng.uniform(4.0, 16.0) / abs(found(np.array([0.0]))[0] - found(np.array([float(OCTAVES)]))[0])
    sign, direction = (-1, "a_to_b") if shape == "reversed" else (1, "b_to_a")
    return lambda o: sign * scale * found(o), {direction: SMALLEST * 2**root}


SHAPES = ("crossing", "middle", "first step", "last step", "reversed", "hump", "constant", "decaying", "zero")


def make_world(shape: str, number: int, noises: Sequence[np.ndarray]) -> World:
    rng = np.random.default_rng([number, SHAPES.index(shape)])
    deviations = noises[rng.integers(len(noises))]
    truth, roots = make_truth(shape, rng, float(deviations.std()))
    return World(truth, roots, deviations, int(rng.integers(2**31)), bool(rng.random() < 0.3))


def measure(world: World, counts: Mapping[float, int]) -> Pairs:
    places = [(x, seed) for x, count in sorted(counts.items()) for seed in range(count)]
    x, seed = zip(*places, strict=True)
    return make_pairs(x, [world.delta(*place) for place in places], seed=seed)


# --- designs ----------------------------------------------------------------------------------------------------------


def end_of(verdict: Any, world: World, cost: float, stop: str) -> dict[str, Any]:
    found = {"stop": stop, "kind": verdict.kind, "cost": cost, "better": verdict.better, "direction": verdict.direction}
    if verdict.kind == "crossing":
        root = world.roots.get(verdict.direction)
        found |= {"octaves": float(np.log2(verdict.interval[1] / verdict.interval[0])), "root": verdict.root,
                  "held": None if root is None else bool(verdict.interval[0] <= root <= verdict.interval[1])}  # fmt: skip
    return found


def hunt(world: World, *, wave: int = WAVE, level: float = LEVEL) -> dict[str, Any]:
    counts: dict[float, int] = {}
    cost, waves, started = 0.0, 0, time.process_time()
    budget = BUDGET_GRIDS * 3 * sum(map(pair_cost, GRID_X))
    while True:
        pairs = measure(world, counts) if counts else None
        target = Target("t", pairs, MIN_EFFECT)
        stop = None if pairs is None else stop_of(pairs, HUNT_X, level)
        if stop is None:
            offers = [
                Offer(x, ("t",), tuple({f"{x}/{s}": pair_cost(x)} for s in range(counts.get(x, 0), MOST_SEEDS)[:8]))
                for x in HUNT_X
            ]
            chosen = choose_wave(
                [target], offers, num_pairs=wave, level=looking_level(level), most_cost=budget - cost, seed=waves
            )
            stop = None if chosen else "budget"
        if stop is not None:
            ms = 1e3 * (time.process_time() - started) / max(waves, 1)
            return end_of(verdict_of(pairs, level), world, cost, stop) | {"waves": waves, "ms": ms}
        for choice in chosen:
            x = offers[choice.offer].x
            counts[x] = counts.get(x, 0) + choice.num_pairs
            cost += choice.num_pairs * pair_cost(x)
        waves += 1


def fixed(world: World) -> dict[str, Any]:
    """A fixed grid with seed after seed until it ends as a hunt may."""
    for seeds in range(2, FIXED_SEEDS + 1):
        pairs = measure(world, dict.fromkeys(GRID_X, seeds))
        stop = stop_of(pairs, GRID_X, LEVEL)
        if stop is not None or seeds == FIXED_SEEDS:
            return end_of(verdict_of(pairs, LEVEL), world, seeds * sum(map(pair_cost, GRID_X)), stop or "budget")
    raise AssertionError


def verdict_of(pairs: Pairs, level: float) -> Verdict:
    return judge(pairs, min_effect=MIN_EFFECT, level=looking_level(level), num_draws=400)


def stop_of(pairs: Pairs, xs: np.ndarray, level: float) -> str | None:
    """As a hunt does it, but `judge` is asked only where its intervals decide something: most of its time goes into
    curves, and no undecided study stops by them (`least_doubt` is not stated here)."""
    points = delta_points(pairs, level=looking_level(level))
    low, high = (np.array([getattr(point, end) for point in points]) for end in ("low_all", "high_all"))
    if decide(low, high, MIN_EFFECT) == "undecided":
        return None
    return why_stop(verdict_of(pairs, level), (xs[0], xs[-1]), target_octaves=TARGET_OCTAVES)


# --- real rows ------------------------------------------------------------------------------------------------------


def replay(pairs: Pairs, seeds: Sequence[int], *, target_octaves: float = TARGET_OCTAVES) -> dict[str, Any]:
    """A hunt that buys its pairs from finished ones, seed after seed in this order; every pair costs the same."""
    values = np.unique(pairs.x).tolist()
    counts = dict.fromkeys(values, 0)
    while True:
        bought = np.array([
            k for k, (x, seed) in enumerate(zip(pairs.x.tolist(), pairs.seed.tolist(), strict=True))
            if seed in seeds[: counts[x]]
        ], int)  # fmt: skip
        known = pairs.rows(bought) if len(bought) else None
        stop = verdict = None
        if known is not None:
            verdict = judge(known, min_effect=MIN_EFFECT, level=looking_level(LEVEL))
            stop = why_stop(verdict, (values[0], values[-1]), target_octaves=target_octaves)
        runs = {x: tuple({f"{x}/{seed}": 1.0} for seed in seeds[counts[x] :]) for x in values}
        places = [Offer(x, ("t",), runs[x]) for x in values if runs[x]]
        chosen = (
            ()
            if stop
            else choose_wave([Target("t", known, MIN_EFFECT)], places, num_pairs=WAVE, level=looking_level(LEVEL))
        )
        if not chosen:
            kind = verdict.kind if verdict else "undecided"
            return {"pairs": sum(counts.values()), "stop": stop or "seeds", "kind": kind, "at": dict(counts),
                    "better": verdict.better if verdict else None}  # fmt: skip
        for choice in chosen:
            counts[places[choice.offer].x] += choice.num_pairs


def replays(found: Mapping[str, Pairs], num_seeds: int = 15) -> Iterator[str]:
    """Hunts on disjoint parts of the real seeds, beside what fixed grids of the same seeds say."""
    for dataset, pairs in found.items():
        seeds = sorted(set(pairs.seed.tolist()))
        for first in range(0, len(seeds) - num_seeds + 1, num_seeds):
            part = seeds[first : first + num_seeds]
            hunted = replay(pairs, part)
            for fixed_seeds in range(2, num_seeds + 1):
                grid = judge(pairs.rows(np.flatnonzero(np.isin(pairs.seed, part[:fixed_seeds]))),
                             min_effect=MIN_EFFECT, level=looking_level(LEVEL))  # fmt: skip
                if why_stop(grid, (pairs.x.min(), pairs.x.max()), target_octaves=TARGET_OCTAVES):
                    break
            places = ", ".join(f"{count} at {x:,.0f}" for x, count in hunted["at"].items())
            cells = (
                f"{dataset}, seeds {part[0]}–{part[-1]}", f"{hunted['kind']} {hunted['better'] or ''}",
                f"{hunted['pairs']} ({places})", f"{grid.kind} {grid.better or ''}",
                f"{fixed_seeds * len(grid.points)} ({fixed_seeds} seeds)",
            )  # fmt: skip
            yield f"| {' | '.join(cells)} |"


# --- tables -----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "hunt decided", "hunt crossing", "held", "octaves", "hunt cost", "fixed decided", "fixed cost", "fixed held",
    "fixed / hunt, median", "fixed / hunt, of means", "waves", "ms a wave",
)  # fmt: skip


def summary(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, str]:
    """Cells of one row of the table; costs in units of the fixed grid with three seeds."""
    unit = 3 * sum(map(pair_cost, GRID_X))
    hunts, fixeds = [each["hunt"] for each in found], [each["fixed"] for each in found]
    both = [(h, f) for h, f in zip(hunts, fixeds, strict=True) if "budget" not in (h["stop"], f["stop"])]

    def share(values: Iterator[bool]) -> str:
        kept = list(values)
        return f"{np.mean(kept):.3f} ({len(kept)})" if kept else ""

    def mean(values: Iterator[float], digits: int = 2) -> str:
        kept = list(values)
        return f"{np.mean(kept):.{digits}f}" if kept else ""

    ratios = [f["cost"] / h["cost"] for h, f in both]
    totals = [sum(side["cost"] for side in sides) for sides in zip(*both, strict=True)] or [0.0, 0.0]
    return {
        "hunt decided": share(h["stop"] != "budget" for h in hunts),
        "hunt crossing": share(h["kind"] == "crossing" for h in hunts),
        "held": share(h["held"] for h in hunts if h.get("held") is not None),
        "octaves": mean(h["octaves"] for h in hunts if h["kind"] == "crossing" and h["stop"] == "crossing"),
        "hunt cost": mean(h["cost"] / unit for h in hunts),
        "fixed decided": share(f["stop"] != "budget" for f in fixeds),
        "fixed cost": mean(f["cost"] / unit for f in fixeds),
        "fixed held": share(f["held"] for f in fixeds if f.get("held") is not None),
        "fixed / hunt, median": f"{np.median(ratios):.2f} ({len(ratios)})" if ratios else "",
        "fixed / hunt, of means": f"{totals[1] / totals[0]:.2f}" if ratios else "",
        "waves": mean((h["waves"] for h in hunts), 1),
        "ms a wave": mean((h["ms"] for h in hunts), 0),
    }


def read_cache(path: Path) -> dict[tuple[str, int], Any]:
    """Finished worlds by (shape, number); a line that was cut off is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            world = json.loads(line)
        except ValueError:
            continue
        found[world["shape"], world["number"]] = world
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROWS, help="table of real rows (csv or parquet)")
    parser.add_argument("--worlds", type=int, default=600, help="worlds of each shape")
    parser.add_argument("--first", type=int, default=3_000_000, help="first random seed")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, choices=SHAPES)
    parser.add_argument("--cache", type=Path, help="file of finished worlds, one JSON line each; made when missing")
    parser.add_argument("--replay", action="store_true", help="hunt in the finished pairs of ROWS instead of in worlds")
    asked = parser.parse_args()
    noises = [
        each.mean(axis=(2, 3)) for each in noises_of(pairs_of(read_rows(asked.rows))) if isinstance(each, np.ndarray)
    ]
    if asked.replay:
        print("| real rows | hunt | its pairs | fixed grid | its pairs |\n|---|---|---|---|---|")
        for line in replays(pairs_of(read_rows(asked.rows))):
            print(line, flush=True)
        return
    known = read_cache(asked.cache) if asked.cache else {}
    found: dict[str, list[Any]] = defaultdict(list)
    for number in range(asked.first, asked.first + asked.worlds):
        for shape in asked.shapes:
            if (shape, number) not in known:
                world = make_world(shape, number, noises)
                known[shape, number] = {"shape": shape, "number": number, "hunt": hunt(world), "fixed": fixed(world)}
                if asked.cache:
                    with asked.cache.open("a") as file:
                        file.write(json.dumps(known[shape, number]) + "\n")
            found[shape].append(known[shape, number])
    found["all that cross"] = [world for shape in SHAPES[:6] for world in found.get(shape, [])]
    found["all"] = [world for shape in SHAPES for world in found.get(shape, [])]
    print(f"| worlds | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for shape, worlds in found.items():
        print(f"| {shape} | {' | '.join(summary(worlds).values())} |")


if __name__ == "__main__":
    main()
