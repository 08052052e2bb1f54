"""What a hunt may run: the pairs of its grid, each the runs that measure one Δ; and the log of its waves.

`expand` makes the cells, so that a hunt's runs are those of a fixed grid at the same points. Which pairs are run is
`dbscale.laws.design`'s choice; how they stand in a store is `launch`'s to find out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dbscale.errors import ConfigError
from dbscale.files import read_model, write_model
from dbscale.strict import Strict
from dbscale.study.cell import Cell
from dbscale.study.cost import num_params
from dbscale.study.grid import DataAxis, Grid, Hunt, Point, expand, merged_cells
from dbscale.study.recipe import SEEDS, DeiT
from dbscale.study.store import Store

MOST_DRAWS = 4
"""Finetunes of one upstream run that `auto` may ask for."""
NEAR = 0.1
"""Values closer than this share to one of the grid's own are not asked for beside it."""


@dataclass(frozen=True)
class Target:
    """One contrast that is hunted: a downstream dataset, and the student and D_f (or D_p) where they are not pooled."""

    dataset: str
    student: str | None = None
    size: int | None = None

    def __str__(self) -> str:
        rest = [self.student, None if self.size is None else str(self.size)]
        return " ".join([self.dataset, *(each for each in rest if each is not None)])


@dataclass(frozen=True, eq=False)
class Pair:
    """One repetition of one target at one value of the axis: the points of both sides."""

    target: Target
    x: int
    seed: int
    points: tuple[Point, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every run that its first finetune draws need, each once, parents first."""
        return self.runs(1)

    def runs(self, draws: int) -> tuple[Cell, ...]:
        """The same for the first `draws` finetunes of each upstream run."""
        return merged_cells([point for point in self.points if point.finetune < draws])


def hunt_of(grid: Grid) -> Hunt:
    """Raises ConfigError where the grid has no `hunt:`."""
    if grid.hunt is None:
        raise ConfigError(f"grid {grid.name} has no `hunt:` section; give it one with at least `budget_hours:`, or run "
                          "the grid as it is with `dbscale submit`")  # fmt: skip
    return grid.hunt


def is_hunted(store: Store, grid: Grid) -> bool:
    """Whether a hunt of the grid was begun in this store; its plan.json is then the hunt's."""
    return grid.hunt is not None and log_path(store, grid.name).exists()


def axis_values(grid: Grid) -> tuple[int, ...]:
    """Values of the hunt's axis that may be measured, rising. Raises ConfigError for fewer than two and for M of timm."""
    hunt = hunt_of(grid)
    values = sorted(set(student_sizes(grid).values())) if hunt.along == "num_params" else _sizes(grid, hunt)
    if len(values) < 2:
        raise ConfigError(f"grid {grid.name}: the hunt has {len(values)} value of {hunt.along}; give it a wider `range:`, "
                          "or along num_params more students")  # fmt: skip
    return tuple(values)


def _sizes(grid: Grid, hunt: Hunt) -> list[int]:
    """Evenly spread over the octaves of the range, together with the grid's own."""
    axes = [grid.upstream] if hunt.along == "upstream_samples" else _downstream(grid)
    own = sorted({size for axis in axes for size in axis.num_samples})
    low, high = hunt.range or (own[0], own[-1])
    steps = max(round(math.log2(high / low) * hunt.per_octave), 1)
    even = [round(low * (high / low) ** (k / steps)) for k in range(steps + 1)]
    own = [size for size in own if low <= size <= high]
    return sorted({*own, *(value for value in even if all(abs(value - size) > NEAR * size for size in own))})


def student_sizes(grid: Grid) -> dict[str, int]:
    """Parameters of each student without its head, as the axis has them; a row's count depends on the classes."""
    return {name: _size_of(grid, name) for name in hunt_of(grid).students or grid.students}


def _downstream(grid: Grid) -> list[DataAxis]:
    wanted = hunt_of(grid).downstream
    return [axis for axis in grid.downstream if wanted is None or axis.dataset in wanted]


def _size_of(grid: Grid, student: str) -> int:
    model = grid.models[student]
    if not isinstance(model, DeiT):
        raise ConfigError(f"grid {grid.name}: the number of parameters of {student!r}, a timm model, is not known before it "
                          "runs; hunt along num_params with `kind: deit` models")  # fmt: skip
    return num_params(model, grid.image_size, 0)


def seeds_of(grid: Grid) -> tuple[int, ...]:
    """The seeds that pairs take at any value of the axis, in this order."""
    first, most = tuple(grid.seeds), hunt_of(grid).most_seeds
    further = range(max(first) + 1, min(max(first) + 1 + most, SEEDS))
    return (*first, *further)[:most]


def pairs_of(grid: Grid, fingerprints: Mapping[str, str], seeds: tuple[int, ...], draws: int) -> list[Pair]:
    """Every pair of these seeds, with `draws` finetunes of each upstream run.

    Raises ConfigError where no run of one side has a partner on the other.
    """
    groups: dict[tuple[Target, int, int], dict[tuple, dict[str, Point]]] = {}
    for point in expand(widest(grid).model_copy(update={"seeds": seeds, "finetunes": draws}), fingerprints):
        for side in _sides(grid, point):
            target, x, shared = _place(grid, point)
            groups.setdefault((target, x, point.seed), {}).setdefault(shared, {})[side] = point
    pairs = []
    for (target, x, seed), group in groups.items():
        both = tuple(side[name] for side in group.values() if len(side) == 2 for name in ("a", "b"))
        if both:
            pairs.append(Pair(target, x, seed, both))
    if not pairs:
        hunt = hunt_of(grid)
        raise ConfigError(f"grid {grid.name}: no run with {hunt.a} has a partner with {hunt.b}; look at the arms, "
                          "teachers and variants that the grid has")  # fmt: skip
    return sorted(pairs, key=lambda pair: (pair.x, seeds.index(pair.seed)))


def widest(grid: Grid) -> Grid:
    """The grid with all values of the axis that the hunt may ask for, and nothing that it leaves out."""
    hunt, values = hunt_of(grid), axis_values(grid)
    changes: dict[str, object] = {"scratch": False}
    if hunt.students is not None:
        changes["students"] = hunt.students
    if hunt.along == "upstream_samples":
        changes["upstream"] = grid.upstream.model_copy(update={"num_samples": values})
    sizes = values if hunt.along == "downstream_samples" else hunt.num_labels
    changes["downstream"] = tuple(
        axis if sizes is None else axis.model_copy(update={"num_samples": sizes}) for axis in _downstream(grid)
    )
    return grid.model_copy(update=changes)


def _sides(grid: Grid, point: Point) -> Iterator[Literal["a", "b"]]:
    """The side that a point belongs to, if any; of a grid's variants the first, unless the sides name theirs."""
    hunt, has = hunt_of(grid), {"arm": point.arm, "variant": point.variant, "student": point.student}
    if "variant" not in hunt.a and grid.variants and point.variant != grid.variants[0].name:
        return
    sides: dict[Literal["a", "b"], Mapping] = {"a": hunt.a, "b": hunt.b}
    for name, wanted in sides.items():
        if all(has[column] == value for column, value in wanted.items()):
            yield name


def _place(grid: Grid, point: Point) -> tuple[Target, int, tuple]:
    """The target that a point measures, its x, and what it shares with its partner: all but what the sides differ in."""
    hunt, data = hunt_of(grid), point.cell.recipe.data
    sizes = {"upstream_samples": point.upstream_num_samples, "downstream_samples": data.num_samples}
    x = sizes[hunt.along] if hunt.along in sizes else _size_of(grid, point.student)
    # What pairs are pooled over: the student, and the D_f (along D_f: the D_p).
    student = point.student if hunt.along != "num_params" and "student" not in hunt.a else None
    across = sizes["upstream_samples" if hunt.along == "downstream_samples" else "downstream_samples"]
    target = Target(data.dataset) if hunt.pooled else Target(data.dataset, student, across)
    names = {"arm": point.arm, "variant": point.variant, "student": point.student}
    fixed = (value for name, value in names.items() if name not in hunt.a)
    return target, x, (*fixed, student, *sizes.values(), point.finetune)


# The log of a hunt: for people and the report; nothing is planned by it.


STOPS = {
    "crossing": "every boundary is as sharp as was asked",
    "one_sign": "one side is better over the whole range",
    "excluded": "a difference that matters is excluded",
    "doubt": "less doubt is left than was stated",
    "budget": "nothing more fits its budget",
    "gain": "no run that it may buy would tell more",
    "seeds": "every seed that it may use is measured",
    "failures": "too many of its runs fail to rely on the rest",
}
"""Why a hunt is over, by `WaveRecord.stopped`."""
WHY = {
    "start": "a first look where runs are cheap",
    "explore": "nothing was measured there yet",
    "replicate": "more repetitions where the sign is in doubt",
    "establish": "the intervals there must narrow before a verdict holds",
}
"""Why pairs were chosen, by `Bought.reason`."""


class Finding(Strict):
    """What was known of one target when a wave was planned."""

    target: str
    kind: Literal["crossing", "one_sign", "excluded", "undecided"] | None = None
    """None before anything can be judged."""
    better: Literal["a", "b"] | None = None
    root: float | None = None
    low: float | None = None
    high: float | None = None
    """Where a crossing is, and its interval."""
    doubt: float | None = None
    """Octaves of wrong advice over the range of the hunt."""
    num_pairs: int = 0
    stop: str | None = None
    """Why the target needs no more runs."""


class Bought(Strict):
    """Pairs that a wave measures at one value of the axis."""

    x: int
    targets: tuple[str, ...]
    num_pairs: int
    gain: float | None
    """Expected octaves of wrong advice removed."""
    cost_s: float
    """Predicted device-seconds."""
    reason: Literal["start", "explore", "replicate", "establish"]


class WaveRecord(Strict):
    """A wave, and what was known before it."""

    number: int
    created: float
    """Unix time."""
    spent_s: float
    """Device-seconds of everything finished before."""
    failed_pairs: int = 0
    verdict_level: float
    """Level of each target's intervals: stricter than the hunt's, which looks after every wave and may have several."""
    findings: tuple[Finding, ...]
    bought: tuple[Bought, ...]
    """Empty for the entry that ends the hunt."""
    stopped: str | None = None


class HuntLog(Strict):
    """`<store>/grids/<name>/hunt.json`."""

    grid: str
    along: str
    span: tuple[int, int]
    target_octaves: float
    level: float
    """At which all verdicts of the hunt together should hold."""
    budget_s: float
    """Device-seconds."""
    waves: tuple[WaveRecord, ...] = ()


def log_path(store: Store, grid: str) -> Path:
    return store.grid_dir(grid) / "hunt.json"


def read_log(store: Store, grid: str) -> HuntLog | None:
    """The log, None where the grid was never hunted. Raises FileError where it is damaged."""
    try:
        return read_model(HuntLog, log_path(store, grid))
    except FileNotFoundError:
        return None


def write_log(store: Store, log: HuntLog) -> None:
    write_model(log_path(store, log.grid), log)


def with_wave(log: HuntLog, wave: WaveRecord) -> HuntLog:
    """The log with a wave at its end; one planned again, nothing having finished in between, replaces its first plan."""
    kept = log.waves
    if kept and (kept[-1].findings, kept[-1].spent_s) == (wave.findings, wave.spent_s):
        kept = kept[:-1]
    number = len(kept) + 1
    return log.model_copy(update={"waves": (*kept, wave.model_copy(update={"number": number}))})
