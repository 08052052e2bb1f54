"""Where a grid stands, from the store alone: counts by stage and state, progress, failures with reason and log.

Reads, writes nothing; the page around it is `launch.commands.status`'s business.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dbscale.study.plan import PlanRecord
from dbscale.study.recipe import Stage
from dbscale.study.store import CellState, Store, read_json


@dataclass(frozen=True)
class Running:
    """A cell in progress; `share` of its steps done."""

    key: str
    share: float
    step: int
    num_steps: int
    images_per_s: float


@dataclass(frozen=True)
class Failure:
    """A cell that failed or waits for one that did."""

    key: str
    state: CellState
    reason: str
    log: str | None


@dataclass(frozen=True)
class Status:
    """One look at a grid."""

    grid: str
    question: str
    counts: Mapping[tuple[Stage, CellState], int]
    running: tuple[Running, ...]
    failures: tuple[Failure, ...]
    device_s: float
    """Used so far by finished and current attempts."""
    predicted_device_s: float
    """Of the whole grid, as planned."""

    @property
    def num_cells(self) -> int:
        return sum(self.counts.values())

    def count(self, *states: CellState) -> int:
        return sum(number for (_, state), number in self.counts.items() if state in states)


def read_status(store: Store, plan: PlanRecord) -> Status:
    """Look at every cell of the plan once."""
    states = {key: store.state(key) for key in plan.cells}
    stages = stages_of(plan)
    return Status(
        grid=plan.grid,
        question=plan.question,
        counts=Counter((stages[key], state) for key, state in states.items()),
        running=tuple(look_at(store, key) for key, state in states.items() if state == "running"),
        failures=tuple(failure(store, key, state) for key, state in states.items() if state in ("failed", "blocked")),
        device_s=sum(device_seconds(store, key, state) for key, state in states.items()),
        predicted_device_s=plan.predicted_device_s,
    )


def stages_of(plan: PlanRecord) -> dict[str, Stage]:
    """Every cell's stage: a point is a finetune, what it starts from a distill when that had a teacher."""
    stages: dict[str, Stage] = {}
    for point in plan.points:
        stages[point.cell] = "finetune"
        if point.upstream_cell:
            stages[point.upstream_cell] = "distill" if point.teacher_cell else "pretrain"
        if point.teacher_cell:
            stages[point.teacher_cell] = "pretrain"
    return stages


def device_seconds(store: Store, key: str, state: CellState) -> float:
    """Device time a cell has used; of an unfinished one, over all its attempts."""
    if state == "new":
        return 0.0
    if state == "done":  # plain JSON: this is read for ten thousand cells at once
        return float(read_json(store.cell_dir(key) / "row.json")["timing"]["device_time_s"])
    progress = store.read_progress(key)
    now = time.time() if state == "running" else None
    ends = [(each, each.ended or now or (progress and progress.updated)) for each in store.attempts(key)]
    return sum(max(0.0, end - each.started) * each.num_devices for each, end in ends if end)


def failure(store: Store, key: str, state: CellState) -> Failure:
    attempt = store.last_attempt(key)
    if attempt is None:
        return Failure(key, state, "no reason recorded", None)
    return Failure(key, state, attempt.reason or "no reason recorded", attempt.log)


def look_at(store: Store, key: str) -> Running:
    """Progress of a running cell; 0 before its first heartbeat."""
    progress = store.read_progress(key)
    if progress is None:
        return Running(key, 0.0, 0, 0, 0.0)
    share = min(1.0, progress.step / max(1, progress.num_steps))
    return Running(key, share, progress.step, progress.num_steps, progress.images_per_s)


def describe(cell: Running) -> str:
    """One line: how far, how fast, which."""
    return f"{cell.share:4.0%}  {cell.images_per_s:7.0f} img/s  {cell.key}"
