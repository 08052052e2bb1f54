"""What is left to do and in which jobs: cells in bundles, bundles in waves.

A lineage (an upstream run and its finetunes) shares a job; small lineages are packed up to a target time.
The only barrier is teacher → distill.  A pure function of cells and states, called again whenever rows arrive.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import model_validator

from dbscale.errors import FileError
from dbscale.files import read_model, write_model
from dbscale.strict import Strict
from dbscale.study.cell import Arm, Cell, Key, model_label
from dbscale.study.cost import CostModel
from dbscale.study.grid import Grid, Name, Point, merged_cells
from dbscale.study.store import Amount, CellState, Count, Moment, Store, Word


@dataclass(frozen=True)
class Bundle:
    """Cells that one job runs in turn, parents first."""

    cells: tuple[Cell, ...]
    predicted_s: float


@dataclass(frozen=True)
class Wave:
    """Bundles that may be submitted at once."""

    bundles: tuple[Bundle, ...]


@dataclass(frozen=True)
class Plan:
    """Everything a grid needs, what of it stands, and the jobs that do the rest."""

    grid: Grid
    points: tuple[Point, ...]
    cells: tuple[Cell, ...]
    states: Mapping[str, CellState]
    waves: tuple[Wave, ...]
    predicted_s: float
    """Device-seconds left."""
    stale: tuple[str, ...] = ()
    """Cells of the grid's earlier plan that it no longer asks for; their results stay in the store."""
    notes: tuple[str, ...] = ()
    """Damaged files that were met on the way, and what becomes of them."""

    def count(self) -> Counter[str]:
        return Counter(self.states[cell.key] for cell in self.cells)

    @property
    def todo(self) -> tuple[Cell, ...]:
        return tuple(cell for wave in self.waves for bundle in wave.bundles for cell in bundle.cells)


class PointRecord(Strict):
    """A point in `plan.json`, so that the reducer knows what was asked for, finished or not."""

    cell: Key
    variant: Name
    arm: Arm
    student: Name
    model: Word
    upstream_dataset: Name | None
    upstream_num_samples: Count
    upstream_cell: Key | None
    teacher_cell: Key | None
    dataset: Name
    num_samples: Count
    seed: int
    finetune: Count = 0
    """Draw of the labels, head and order of one upstream run."""


class PlanRecord(Strict):
    """`<store>/grids/<name>/plan.json`."""

    grid: Name
    question: str
    created: Moment
    points: tuple[PointRecord, ...]
    cells: tuple[Key, ...]
    """Parents first."""
    predicted_device_s: Amount
    """Device time of all cells, finished ones included."""
    predicted_s: tuple[Amount, ...] = ()
    """Device time of each cell, in the order of `cells`."""
    min_effect: float = 0.005
    """Difference of error rates that matters, as the grid says."""
    level: float = 0.9
    """Level of the report's intervals; a hunt, which looks after every wave and may have several targets, judges at a
    stricter one."""
    targets: tuple[Word, ...] = ()
    """Verdicts of a hunt, by the target's name: `level` allows for their number."""

    @model_validator(mode="after")
    def _points_are_of_its_cells(self) -> PlanRecord:
        named = {key for point in self.points for key in (point.cell, point.upstream_cell, point.teacher_cell)}
        strangers = named.difference(self.cells, [None])
        if strangers:
            raise ValueError(f"a point names {strangers.pop()}, which is none of its cells")
        return self


def make_plan(
    grid: Grid, points: Sequence[Point], *, states: Mapping[str, CellState], cost: CostModel,
    target_s: float, workers: int = 1, earlier: PlanRecord | None = None, notes: Sequence[str] = (),
) -> Plan:  # fmt: skip
    """Plan what is neither done nor running. `states` by key, missing means new; bundles aim at `target_s`
    device-seconds each."""
    cells = merged_cells(points)
    known: dict[str, CellState] = {cell.key: states.get(cell.key, "new") for cell in cells}
    waiting = [cell for cell in cells if known[cell.key] not in ("done", "running")]
    lineages: list[dict[str, list[Cell]]] = [{}, {}]
    for cell in waiting:
        root = cell.init if cell.init is not None else cell
        lineages[1 if root.teacher is not None else 0].setdefault(root.key, []).append(cell)
    waves = tuple(Wave(_bundles(list(wave.values()), cost, target_s, workers)) for wave in lineages if wave)
    stale = tuple(key for key in (earlier.cells if earlier else ()) if key not in known)
    return Plan(grid, tuple(points), cells, known, waves, sum(map(cost.seconds, waiting)), stale, tuple(notes))


def _bundles(lineages: list[list[Cell]], cost: CostModel, target_s: float, workers: int) -> tuple[Bundle, ...]:
    """Longest lineage first into the emptiest bundle: as many bundles as the target asks, a multiple of the workers."""
    timed = sorted(((sum(map(cost.seconds, cells)), i) for i, cells in enumerate(lineages)), reverse=True)
    wanted = math.ceil(sum(seconds for seconds, _ in timed) / target_s)
    count = min(len(lineages), workers * max(1, math.ceil(wanted / workers)))
    heap: list[tuple[float, int]] = [(0.0, i) for i in range(count)]
    packed: list[list[Cell]] = [[] for _ in range(count)]
    for seconds, index in timed:
        load, target = heapq.heappop(heap)
        packed[target].extend(lineages[index])
        heapq.heappush(heap, (load + seconds, target))
    loads = {target: load for load, target in heap}
    return tuple(Bundle(tuple(cells), loads[i]) for i, cells in enumerate(packed))


def record(plan: Plan, cost: CostModel, *, level: float = 0.9, targets: Sequence[str] = ()) -> PlanRecord:
    """The plan as `plan.json` keeps it, for the reducer and for `status`."""
    return PlanRecord(
        grid=plan.grid.name, question=plan.grid.question, created=time.time(),
        points=tuple(map(_record_point, plan.points)),
        cells=tuple(cell.key for cell in plan.cells),
        predicted_device_s=sum(map(cost.seconds, plan.cells)),
        predicted_s=tuple(round(cost.seconds(cell), 3) for cell in plan.cells), min_effect=plan.grid.min_effect,
        level=level, targets=tuple(targets),
    )  # fmt: skip


def _record_point(point: Point) -> PointRecord:
    cell, upstream = point.cell, point.cell.init
    return PointRecord(
        cell=cell.key, variant=point.variant, arm=point.arm,
        student=point.student, model=model_label(cell.recipe.model),
        upstream_dataset=upstream.recipe.data.dataset if upstream else None,
        upstream_num_samples=point.upstream_num_samples,
        upstream_cell=upstream.key if upstream else None,
        teacher_cell=upstream.teacher.key if upstream and upstream.teacher else None,
        dataset=cell.recipe.data.dataset, num_samples=cell.recipe.data.num_samples, seed=point.seed,
        finetune=point.finetune,
    )  # fmt: skip


def write_plan(store: Store, plan: PlanRecord) -> None:
    write_model(store.grid_dir(plan.grid) / "plan.json", plan)


def read_plan(store: Store, grid_name: str) -> PlanRecord | None:
    """The grid's plan as last submitted, if ever. Raises FileError where the file is damaged."""
    try:
        path = store.grid_dir(grid_name) / "plan.json"
        found = read_model(PlanRecord, path)
        if found.grid != grid_name:
            raise FileError(f"{path} is the plan of grid {found.grid}")
        return found
    except FileNotFoundError:
        return None
    except FileError as error:
        raise FileError(f"{error}; `dbscale submit` of the grid writes it anew") from None
