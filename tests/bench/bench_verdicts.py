"""Calibration of verdicts on simulated worlds with real noise: `make bench-verdicts`, or run this file.

Prints one markdown table per question of docs/calibration.md: how often intervals hold the truth, signs are claimed on
the wrong side, crossings are found or invented, and verdicts of disjoint halves of the seeds contradict each other.
Noise: the components of ROWS (csv or parquet; by default the CIFAR-10 study), and of two levels of the demo, each with
normal or heavy tails and a variance that is equal at all x or changes along it. `--first` moves all random numbers: tune
on one, report another.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from dbscale.laws import Pairs, Power, Verdict, fit_noise, judge, make_pairs, noise_of, power

ROWS = Path(__file__).resolve().parents[2] / "docs" / "studies" / "cifar10" / "rows.csv"
STUDENTS, LABELS = ("h2", "h3", "h4"), (100, 1000, 10000)
MIN_EFFECT, LEVEL = 0.005, 0.9
SHARES = {"seed": 0.12, "teacher": 0.20, "upstream": 0.06, "finetune": 0.62}
"""Of the variance of one ΔE of the demo: students correlate .32, D_f .38 (measured .25–.39, .15–.58)."""
PROFILES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "equal": np.ones_like,
    "falling": lambda u: 1.5 * 3.0**-u,
    "demo": lambda u: np.interp(u, [0, 0.25, 0.5, 0.75, 1], np.array([2.1, 3.1, 2.8, 1.4, 0.9]) / 2.2),
}
"""sd of the noise against the position u in the measured range, 0 to 1."""


@dataclass(frozen=True)
class World:
    """One study that could have been: where it measures, what is true there, and its noise."""

    x: np.ndarray
    truth: np.ndarray
    roots: dict[str, float]
    """Where the truth crosses 0, by direction."""
    noise: Mapping[str, float] | np.ndarray
    """sd by address; or deviations of real seeds [seeds, x, students, D_f], of which each study draws its own."""
    profile: np.ndarray
    heavy: bool
    num_seeds: int


# --- worlds ---------------------------------------------------------------------------------------------------------


def falling(rng: np.random.Generator, octaves: float, root: float) -> Callable[[np.ndarray], np.ndarray]:
    """A curve that falls through 0 at `root` octaves: nearly straight, flattening to a plateau, or falling ever faster."""
    rate, height = rng.uniform(0.05, 0.8), rng.uniform(0.03, 0.25)
    turned = rng.random() < 0.5
    rate = -rate if turned else rate
    scale = height / abs(2.0 ** (-rate * octaves) - 1.0)  # from end to end Δ falls by `height`
    return lambda o: scale * (2.0 ** (-rate * o) - 2.0 ** (-rate * root)) * (-1.0 if turned else 1.0)


def make_shape(name: str, rng: np.random.Generator, x: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Truth at x, and its roots by direction."""
    o = np.log2(x / x[0])
    height = rng.uniform(0.01, 0.12)
    if name == "zero":
        return np.zeros_like(o), {}
    if name == "constant":
        return np.full_like(o, height * rng.choice([-1.0, 1.0])), {}
    if name == "decaying":
        return height * 2.0 ** (-rng.choice([0.5, 1.0, 2.0]) * o), {}
    if name == "middle":  # what `power` promises: straight, through the middle
        slope = rng.uniform(0.006, 0.04)
        return slope * (o[-1] / 2 - o), {"b_to_a": x[0] * 2 ** (o[-1] / 2)}
    if name == "hump":
        peak, half = o[-1] * rng.uniform(0.35, 0.5), o[-1] * rng.uniform(0.2, 0.3)
        ends = {"a_to_b": x[0] * 2 ** (peak - half), "b_to_a": x[0] * 2 ** (peak + half)}
        return height * (3 * np.exp(-np.log(3) * ((o - peak) / half) ** 2) - 1) / 2, ends
    steps = len(x) - 1
    reach = {"first step": (0.1, 0.9), "last step": (steps - 0.9, steps - 0.1)}.get(name, (0.25 * steps, 0.75 * steps))
    root = rng.uniform(*reach) * o[-1] / steps
    sign, direction = (-1, "a_to_b") if name == "reversed" else (1, "b_to_a")
    return sign * falling(rng, o[-1], root)(o), {direction: x[0] * 2**root}


SHAPES = ("crossing", "middle", "first step", "last step", "reversed", "hump", "constant", "decaying", "zero")
CROSSES = SHAPES[:6]


def make_world(shape: str, rng: np.random.Generator, noises: Sequence[Mapping[str, float] | np.ndarray]) -> World:
    noise = noises[rng.integers(len(noises))]
    real = isinstance(noise, np.ndarray)
    x = 1000.0 * 2.0 ** (np.arange(noise.shape[1] if real else rng.integers(5, 8)) * rng.choice([1.0, 1.0, 1.7]))
    truth, roots = make_shape(shape, rng, x)
    profile = PROFILES["equal" if real else rng.choice(list(PROFILES))](np.linspace(0, 1, len(x)))
    seeds = [n for n in (2, 3, 4, 6, 8) if not real or n <= len(noise)]
    return World(x, truth, roots, noise, profile, bool(rng.random() < 0.6), int(rng.choice(seeds)))


def variates(world: World, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Unit variance: normal, or Student's t with 4 degrees of freedom."""
    return rng.standard_t(4, shape) / 2**0.5 if world.heavy else rng.standard_normal(shape)


def draw_noise(world: World, rng: np.random.Generator, n: int) -> np.ndarray:
    """Noise of n seeds [n, x, students, D_f]; windows of neighbouring D_p overlap, so a seed's effect goes along x."""
    if isinstance(world.noise, np.ndarray):
        seeds = rng.choice(len(world.noise), n, replace=n > len(world.noise))
        return world.noise[seeds] * rng.choice([-1.0, 1.0], (n, 1, 1, 1))
    k, s, d = len(world.x), len(STUDENTS), len(LABELS)
    sizes = {"seed": (k, 1, 1), "teacher": (k, 1, 1), "upstream": (k, s, 1), "finetune": (k, s, d)}
    part = {name: variates(world, rng, (n, *size)) for name, size in sizes.items()}
    gap = np.abs(np.log2(world.x)[:, None] - np.log2(world.x))
    part["seed"] = np.einsum("kl,nlij->nkij", np.linalg.cholesky(0.7**gap), part["seed"])
    return sum((world.noise.get(name, 0.0) * each for name, each in part.items()), np.zeros((n, k, s, d)))


def draw_pairs(world: World, rng: np.random.Generator, num_seeds: int | None = None) -> Pairs:
    """ΔE of every seed, x, student and D_f."""
    noise = draw_noise(world, rng, num_seeds or world.num_seeds)
    n, k, s, d = noise.shape
    images = rng.standard_normal((k, 1, 1)) * 0.002  # 10,000 test images, 15 % judged differently, a third of it shared
    delta = world.truth[:, None, None] + world.profile[:, None, None] * noise + images
    columns = np.meshgrid(np.arange(n), world.x, np.arange(s), np.arange(d), indexing="ij")
    seed, x, student, labels = (c.ravel() for c in columns)
    return make_pairs(
        x, delta.ravel(), seed=seed, student=student, labels=labels, test_variance=np.full(seed.size, 1.5e-5)
    )


# --- what is counted --------------------------------------------------------------------------------------------------


def half_of(pairs: Pairs, number: int) -> Pairs:
    return pairs.rows(np.flatnonzero(pairs.seed % 2 == number))


def contradict(one: Verdict, other: Verdict) -> bool:
    """Whether nothing that is true could be both: opposite signs at one x, a crossing against none, the same crossing at
    different places, or crossings of both directions at one place.

    Crossings of both directions at different places are both true of a curve that rises through 0 and falls again.
    """
    signs = [{p.x: (p.low_all > 0) - (p.high_all < 0) for p in v.points} for v in (one, other)]
    if any(signs[0][x] * signs[1].get(x, 0) < 0 for x in signs[0]):
        return True
    kinds = {one.kind, other.kind}
    if kinds == {"crossing"}:
        (a, b), (c, d) = one.interval, other.interval
        apart = a > d or c > b
        return apart == (one.direction == other.direction)
    return "crossing" in kinds and bool(kinds & {"one_sign", "excluded"})


def other_directions(one: Verdict, other: Verdict) -> bool:
    """Whether two crossings have different directions, at whatever places."""
    return one.kind == other.kind == "crossing" and one.direction != other.direction


def is_wrong(verdict: Verdict, truth: np.ndarray) -> bool:
    """Whether the verdict's kind is false of the truth at the measured x."""
    harm, benefit = truth.min() < -MIN_EFFECT, truth.max() > MIN_EFFECT
    if verdict.kind == "crossing":
        return not (truth.min() < 0 < truth.max())
    if verdict.kind == "one_sign":
        return harm if verdict.better == "b" else benefit
    return verdict.kind == "excluded" and bool(harm and benefit)


def count(world: World, rng: np.random.Generator, promise: Power | None) -> Iterator[tuple[str, float]]:
    """(what, value) of one world; means over worlds are the table."""
    pairs = draw_pairs(world, rng)
    start = time.process_time()
    verdict = judge(pairs, min_effect=MIN_EFFECT, level=LEVEL, num_draws=500)
    yield "ms", 1e3 * (time.process_time() - start)
    row = rng.integers(len(pairs.x))
    cell = judge(pairs.of(pairs.student[row], pairs.labels[row]), num_draws=100)
    for name, points in (("pooled", verdict.points), ("cell", cell.points)):
        inside = [p.low <= t <= p.high for p, t in zip(points, world.truth, strict=True)]
        yield name, float(np.mean(inside))
    yield "all x", float(all(p.low_all <= t <= p.high_all for p, t in zip(verdict.points, world.truth, strict=True)))
    wrong = [p.low_all > 0 > t or p.high_all < 0 < t for p, t in zip(verdict.points, world.truth, strict=True)]
    yield "wrong sign", float(any(wrong))
    yield "wrong kind", float(is_wrong(verdict, world.truth))
    yield "decided", float(verdict.kind != "undecided")
    yield "crossing", float(verdict.kind == "crossing")
    if promise is not None:
        yield "promised", promise.chance_of_crossing
    if verdict.kind == "crossing" and world.roots:
        low, high = verdict.interval
        yield "root held", float(low <= world.roots.get(verdict.direction, 0.0) <= high)
        yield "octaves", float(np.log2(high / low))
        if promise is not None:
            yield "promised octaves", promise.width_octaves
    if world.num_seeds >= 4:
        halves = [judge(half_of(pairs, k), min_effect=MIN_EFFECT, level=LEVEL, num_draws=300) for k in (0, 1)]
        yield "contradict", float(contradict(*halves))
        yield "other directions", float(other_directions(*halves))
    if verdict.more_seeds and verdict.more_seeds <= 64:
        again = judge(draw_pairs(world, rng, verdict.more_seeds), min_effect=MIN_EFFECT, level=LEVEL, num_draws=50)
        yield "decided with more", float(again.kind != "undecided")


def promise_of(world: World) -> Power:
    """What `power` states for this design and slope, from the true components or from those fitted to the real rows."""
    size, sizes = 1.0, (len(STUDENTS), len(LABELS))
    if isinstance(world.noise, np.ndarray):
        model, sizes = fit_noise(draw_pairs(world, np.random.default_rng(0), len(world.noise))), world.noise.shape[2:]
        assert model is not None
    else:
        size = float(np.sqrt(np.mean(world.profile**2)))
        model = noise_of(**{name: sd * size for name, sd in world.noise.items()})
    gap = float(np.log2(world.x[1] / world.x[0]))
    design = {"num_x": len(world.x), "num_seeds": world.num_seeds, "num_students": sizes[0], "num_labels": sizes[1]}
    return power(model, **design, level=LEVEL, slope=float(world.truth[0] - world.truth[1]) / gap, step_octaves=gap)


# --- real rows --------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return [{k: str(v) for k, v in row.items()} for row in parquet.read_table(path).to_pylist()]
    with path.open() as file:
        return list(csv.DictReader(file))


def pairs_of(rows: Sequence[Mapping[str, str]], metric: str = "error_rate") -> dict[str, Pairs]:
    """Plain minus distilled by downstream set, of the first variant."""
    found: dict[str, Pairs] = {}
    kept = [r for r in rows if r.get("variant") in (None, "", "None", rows[0].get("variant"))]
    for dataset in sorted({r["dataset"] for r in kept}):
        arms: dict[str, dict] = defaultdict(dict)
        for row in kept:
            if row["dataset"] == dataset:
                key = float(row["upstream_samples"]), int(row["seed"]), row["student"], float(row["downstream_samples"])
                arms[row["arm"]][key] = float(row[metric])
        both = sorted(set(arms["plain"]) & set(arms["distilled"]))
        x, seed, student, labels = zip(*both, strict=True)
        delta = [arms["plain"][k] - arms["distilled"][k] for k in both]
        found[dataset] = make_pairs(x, delta, seed=seed, student=student, labels=labels)
    return found


def noises_of(found: Mapping[str, Pairs]) -> Iterator[Mapping[str, float] | np.ndarray]:
    """Of every downstream set: with five seeds or more how they deviate from their means, else the fitted components."""
    for pairs in found.values():
        axes = [np.unique(getattr(pairs, name), return_inverse=True) for name in ("seed", "x", "student", "labels")]
        if len(axes[0][0]) < 5:
            model = fit_noise(pairs)
            yield {c.name: c.sd for c in model.components if c.name in SHARES} if model else {}
            continue
        table = np.full([len(values) for values, _ in axes], np.nan)
        table[tuple(place for _, place in axes)] = pairs.delta
        table = table[np.isfinite(table).all(axis=(1, 2, 3))]
        yield (table - table.mean(axis=0)) * (len(table) / (len(table) - 1)) ** 0.5


def repeat(found: Mapping[str, Pairs], size: int) -> Iterator[str]:
    """Verdicts of disjoint parts of `size` seeds of real rows, their contradictions, and coverage of each other."""
    for dataset, pairs in found.items():
        seeds = sorted(set(pairs.seed.tolist()))
        parts = [seeds[i : i + size] for i in range(0, len(seeds) - size + 1, size)]
        if len(parts) < 2 or size < 2:
            continue
        verdicts = [judge(pairs.rows(np.flatnonzero(np.isin(pairs.seed, part)))) for part in parts]
        held = [
            abs(p.delta - q.delta) <= (p.high - p.delta) * 2**0.5
            for one, other in combinations(verdicts, 2) for p, q in zip(one.points, other.points, strict=True)
        ]  # fmt: skip
        against = [contradict(one, other) for one, other in combinations(verdicts, 2)]
        kinds = ", ".join(f"{v.kind}{' ' + v.better if v.better else ''}" for v in verdicts)
        held_by = f"{np.mean(held):.2f} ({len(held)})"
        yield f"| {dataset}, {len(parts)} parts of {size} seeds | {kinds} | {sum(against)} of {len(against)} | {held_by} |"


# --- tables -----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "pooled", "cell", "all x", "wrong sign", "wrong kind", "decided", "crossing", "promised", "root held", "octaves",
    "promised octaves", "contradict", "other directions", "decided with more", "ms",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", type=Path, default=[ROWS], help="tables of real rows (csv or parquet)")
    parser.add_argument("--worlds", type=int, default=600, help="worlds of each shape")
    parser.add_argument("--first", type=int, default=2_000_000, help="first random seed")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, choices=SHAPES)
    asked = parser.parse_args()
    noises = [{name: total * share**0.5 for name, share in SHARES.items()} for total in (0.045, 0.09)]
    for path in asked.rows:
        found = pairs_of(read_rows(path))
        noises += noises_of(found)
        for size in (2, 4):
            for line in repeat(found, size):
                print(line, flush=True)
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    print(f"| worlds | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for shape in asked.shapes:
        for number in range(asked.worlds):
            rng = np.random.default_rng([asked.first + number, SHAPES.index(shape)])
            world = make_world(shape, rng, noises)
            rows = [shape, f"all shapes, {world.num_seeds} seeds"]
            rows += [f"middle, {world.num_seeds} seeds"] if shape == "middle" else []
            for name, value in count(world, rng, promise_of(world) if shape == "middle" else None):
                for row in rows:
                    values[row][name].append(value)
        show(shape, values.pop(shape))
    for row in sorted(values):
        show(row, values[row])


def show(name: str, values: Mapping[str, list[float]]) -> None:
    cells = [f"{np.mean(values[c]):.3f} ({len(values[c])})" if c in values else "" for c in COLUMNS]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
