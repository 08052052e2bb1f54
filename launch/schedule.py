"""Which bundle may start next, and what is left of one whose process died.  Pure; the executors act on it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from dbscale.study.cell import Cell
from dbscale.study.cost import CostModel
from dbscale.study.plan import Plan
from dbscale.study.recipe import Stage
from dbscale.study.store import CellState

SETTLED: frozenset[CellState] = frozenset({"done", "failed", "blocked"})
WEIGHT: Mapping[Stage, int] = {"finetune": 0, "pretrain": 1, "distill": 2}


@dataclass(frozen=True)
class Task:
    """A bundle as an executor sees it: keys in order, what they wait for, how often it was started again in vain."""

    keys: tuple[str, ...]
    parents: frozenset[str]
    """Cells outside the bundle that its own build on."""
    stage: Stage
    """Whose resources it runs with: the heaviest stage in it."""
    wave: int
    predicted_s: float
    restarts: int = 0


def tasks_of(plan: Plan, cost: CostModel, shape_of: Callable[[Stage], Hashable]) -> tuple[Task, ...]:
    """All bundles of a plan, parents' before children's, longest first; one whose stages run in different shapes is
    cut into one task a shape."""
    tasks = [
        make_task(cells, wave=number, cost=cost)
        for number, wave in enumerate(plan.waves, start=1)
        for bundle in wave.bundles
        for cells in cut_by_shape(bundle.cells, shape_of)
    ]
    return tuple(sorted(tasks, key=lambda task: (task.wave, task.stage == "finetune", -task.predicted_s)))


def cut_by_shape(cells: Sequence[Cell], shape_of: Callable[[Stage], Hashable]) -> list[list[Cell]]:
    """`cells` grouped by the shape their stage runs in, order kept."""
    groups: dict[Hashable, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(shape_of(cell.recipe.stage), []).append(cell)
    return list(groups.values())


def make_task(cells: Sequence[Cell], *, wave: int, cost: CostModel) -> Task:
    """One job's work from cells that share a shape."""
    return Task(
        keys=tuple(cell.key for cell in cells),
        parents=external_parents({cell.key: [parent.key for parent in cell.parents] for cell in cells}),
        stage=max((cell.recipe.stage for cell in cells), key=WEIGHT.__getitem__),
        wave=wave,
        predicted_s=sum(map(cost.seconds, cells)),
    )


def external_parents(parents: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """Parents of any cell of a bundle that are not in it themselves."""
    return frozenset(each for found in parents.values() for each in found if each not in parents)


def next_ready(waiting: Sequence[Task], running: Collection[Task]) -> Task | None:
    """The first task whose parents no task is still to run; None while all must wait."""
    pending = {key for task in (*waiting, *running) for key in task.keys}
    return next((task for task in waiting if task.parents.isdisjoint(pending)), None)


def rest_after_crash(task: Task, states: Mapping[str, CellState], parents: Mapping[str, Sequence[str]]) -> Task | None:
    """What is left when a bundle's process died; the cell it died in, and what builds on it, come last.

    So a cell that kills its process (out of memory) costs the others of its bundle nothing but time. Restarts are counted
    anew once a start has settled a cell.
    """
    rest = [key for key in task.keys if key in states and states[key] not in SETTLED]
    last = {key for key in rest if states[key] in ("interrupted", "running")}
    for key in rest:
        if last.intersection(parents.get(key, ())):
            last.add(key)
    ordered = [key for key in rest if key not in last] + [key for key in rest if key in last]
    restarts = task.restarts + 1 if len(ordered) == len(task.keys) else 0
    return replace(task, keys=tuple(ordered), restarts=restarts) if ordered else None
