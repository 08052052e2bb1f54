"""Where a grid stands: counts by wave, stage and state, progress, time left, failures with reason and log.

Reads the store and, where there is one, what the scheduler says; the page around it is `launch.commands.status`'s.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dbscale.study.plan import PlanRecord
from dbscale.study.recipe import Stage
from dbscale.study.store import CellState, Standing, Store
from launch.slurm.queue import SlurmView
from launch.study import corrected

State = CellState | Literal["queued"]
"""A cell's state, with what a scheduler adds."""
Place = tuple[int, Stage]
"""Wave and stage."""
TROUBLES: tuple[State, ...] = ("failed", "blocked", "damaged")


@dataclass(frozen=True)
class Running:
    """A cell in progress; `share` of its steps done."""

    key: str
    share: float
    images_per_s: float


@dataclass(frozen=True)
class Trouble:
    """A cell that failed, waits for one that did, lost a file, or was lost with its job."""

    key: str
    state: State
    reason: str
    log: str | None


@dataclass(frozen=True)
class Status:
    """One look at a grid."""

    grid: str
    question: str
    counts: Mapping[tuple[Place, State], int]
    running: tuple[Running, ...]
    num_devices: int
    """At work on running cells."""
    troubles: tuple[Trouble, ...]
    device_s: float
    """Used so far by finished and current attempts."""
    left_s: float
    """Predicted device time of what is not done, corrected by how predictions held so far."""
    scheduler: str | None
    """One line about the scheduler, where there is one."""

    @property
    def num_cells(self) -> int:
        return sum(self.counts.values())

    def count(self, *states: State) -> int:
        return sum(number for (_, state), number in self.counts.items() if state in states)


def read_status(store: Store, plan: PlanRecord, found: Mapping[str, Standing], view: SlurmView | None) -> Status:
    """`found` says how the plan's cells stand in the store; how far they are and what they used is read here."""
    states: dict[str, State] = {key: state_of(key, standing, view) for key, standing in found.items()}
    used = {key: device_seconds(store, key, found[key], state) for key, state in states.items()}
    running = tuple(look_at(store, key) for key, state in states.items() if state == "running")
    attempts = (found[cell.key].attempt for cell in running)
    places = places_of(plan)
    return Status(
        grid=plan.grid,
        question=plan.question,
        counts=Counter((places[key], state) for key, state in states.items()),
        running=running,
        num_devices=sum(1 if attempt is None else attempt.num_devices for attempt in attempts),
        troubles=tuple(troubles(found, states, view)),
        device_s=sum(used.values()),
        left_s=time_left(plan, states, used, running),
        scheduler=None if view is None else view.headline,
    )


def state_of(key: str, standing: Standing, view: SlurmView | None) -> State:
    """The store's word, and the scheduler's on whether a job still lives."""
    if standing.state == "done" or view is None or view.error is not None:
        return standing.state
    element = view.active.get(key)
    if element is not None:
        return "running" if standing.state == "running" and element.running else "queued"
    return corrected(standing, is_active=False).state


def places_of(plan: PlanRecord) -> dict[str, Place]:
    """Every cell's wave and stage: a point is a finetune, what it starts from a distill when that had a teacher."""
    places: dict[str, Place] = {}
    for point in plan.points:
        wave = 2 if point.teacher_cell else 1
        places[point.cell] = (wave, "finetune")
        if point.upstream_cell:
            places[point.upstream_cell] = (wave, "distill" if point.teacher_cell else "pretrain")
        if point.teacher_cell:
            places[point.teacher_cell] = (1, "pretrain")
    return places


def device_seconds(store: Store, key: str, standing: Standing, state: State) -> float:
    """Device time a cell has used; of an unfinished one, over all its attempts."""
    if standing.row is not None:
        return standing.row.timing.device_time_s
    if standing.attempt is None:
        return 0.0
    progress = store.read_progress(key)
    # An attempt that is open ends now, or when its last heartbeat came.
    last = time.time() if state == "running" else progress.updated if progress else 0.0
    ends = ((each, last if each.ended is None else each.ended) for each in store.attempts(key))
    return sum(max(0.0, end - each.started) * each.num_devices for each, end in ends)


def time_left(
    plan: PlanRecord, states: Mapping[str, State], used: Mapping[str, float], running: Sequence[Running]
) -> float:
    """Device-seconds: predictions of unfinished cells, scaled by measured over predicted of the finished ones."""
    predicted = dict(zip(plan.cells, plan.predicted_s, strict=False))
    done = [key for key, state in states.items() if state == "done" and key in predicted]
    expected = sum(predicted[key] for key in done)
    scale = sum(used[key] for key in done) / expected if expected else 1.0
    shares = {cell.key: cell.share for cell in running}
    rest = (seconds * (1 - shares.get(key, 0.0)) for key, seconds in predicted.items() if states[key] != "done")
    return scale * sum(rest)


def troubles(found: Mapping[str, Standing], states: Mapping[str, State], view: SlurmView | None) -> list[Trouble]:
    """Failed, blocked and damaged cells, and those whose job ended without a word."""
    named = []
    for key, state in states.items():
        if state in TROUBLES:
            attempt, note = found[key].attempt, found[key].note
            reason = note or (attempt.reason if attempt else None) or "no reason recorded"
            named.append(Trouble(key, state, reason, attempt.log if attempt and not note else None))
    if view is not None:
        gone = view.lost({key for key, state in states.items() if state in ("new", "interrupted")})
        named += [Trouble(key, states[key], reason, log) for key, (reason, log) in gone.items()]
    return named


def look_at(store: Store, key: str) -> Running:
    """Progress of a running cell; 0 before its first heartbeat."""
    progress = store.read_progress(key)
    if progress is None:
        return Running(key, 0.0, 0.0)
    return Running(key, min(1.0, progress.step / max(1, progress.num_steps)), progress.images_per_s)


def describe(cell: Running) -> str:
    """One line: how far, how fast, which."""
    return f"{cell.share:4.0%}  {cell.images_per_s:7.0f} img/s  {cell.key}"


def table(rows: Sequence[Sequence[object]], *, header: Sequence[str]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [list(header), *[[str(value) for value in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(value, int | float) for value in column) for column in zip(*rows, strict=True)]
    justify = [str.rjust if number else str.ljust for number in numeric or [False] * len(header)]
    lines = ([put(text, width) for put, text, width in zip(justify, row, widths, strict=True)] for row in cells)
    return "\n".join("  ".join(line).rstrip() for line in lines)
