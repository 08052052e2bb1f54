"""Where a grid stands: counts by wave, stage and state, progress, failures with reason and log.

Reads the store and, where there is one, what the scheduler says; the page around it is `launch.commands.status`'s.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dbscale.study.plan import PlanRecord
from dbscale.study.recipe import Stage
from dbscale.study.store import CellState, Store
from launch.slurm.view import SlurmView
from launch.study import corrected

State = CellState | Literal["queued"]
"""A cell's state, with what a scheduler adds."""
Place = tuple[int, Stage]
"""Wave and stage."""


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
    """A cell that failed, waits for one that did, or was lost with its job."""

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
    failures: tuple[Failure, ...]
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


def read_status(store: Store, plan: PlanRecord, found: Mapping[str, CellState], view: SlurmView | None) -> Status:
    """`found` are the plan's cells as the store has them; how each ended or goes on is read here."""
    states: dict[str, State] = {key: state_of(store, key, state, view) for key, state in found.items()}
    used = {key: device_seconds(store, key, state) for key, state in states.items()}
    running = tuple(look_at(store, key) for key, state in states.items() if state == "running")
    return Status(
        grid=plan.grid,
        question=plan.question,
        counts=_counts(states, places_of(plan)),
        running=running,
        num_devices=sum(devices_of(store, cell.key) for cell in running),
        failures=tuple(failures(store, states, view)),
        device_s=sum(used.values()),
        left_s=time_left(plan, states, used, running),
        scheduler=None if view is None else view.headline,
    )


def _counts(states: Mapping[str, State], places: Mapping[str, Place]) -> Counter[tuple[Place, State]]:
    return Counter((places[key], state) for key, state in states.items())


def state_of(store: Store, key: str, state: CellState, view: SlurmView | None) -> State:
    """The store's word, and the scheduler's on whether a job still lives."""
    if state == "done" or view is None or not view.answered:
        return state
    element = view.active.get(key)
    if element is not None:
        return state if state == "running" and element.running else "queued"
    return corrected(store, key, state, is_active=False)


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


def device_seconds(store: Store, key: str, state: State) -> float:
    """Device time a cell has used; of an unfinished one, over all its attempts."""
    if state == "new":
        return 0.0
    if state == "done":  # plain file, plain JSON: this is read for ten thousand cells at once
        with open(f"{store.root}/cells/{key}/row.json", "rb") as file:
            return float(json.loads(file.read())["timing"]["device_time_s"])
    attempts = store.attempts(key)
    if not attempts:
        return 0.0
    progress = store.read_progress(key)
    now = time.time() if state == "running" else None
    ends = [(each, each.ended or now or (progress and progress.updated)) for each in attempts]
    return sum(max(0.0, end - each.started) * each.num_devices for each, end in ends if end)


def devices_of(store: Store, key: str) -> int:
    """Devices of a cell's newest attempt."""
    attempt = store.last_attempt(key)
    return 1 if attempt is None else attempt.num_devices


def time_left(
    plan: PlanRecord, states: Mapping[str, State], used: Mapping[str, float], running: tuple[Running, ...]
) -> float:
    """Device-seconds: predictions of unfinished cells, scaled by measured over predicted of the finished ones."""
    predicted = dict(zip(plan.cells, plan.predicted_s, strict=False))
    done = [key for key, state in states.items() if state == "done" and key in predicted]
    expected = sum(predicted[key] for key in done)
    scale = sum(used[key] for key in done) / expected if expected else 1.0
    shares = {cell.key: cell.share for cell in running}
    rest = (seconds * (1 - shares.get(key, 0.0)) for key, seconds in predicted.items() if states[key] != "done")
    return scale * sum(rest)


def failures(store: Store, states: Mapping[str, State], view: SlurmView | None) -> list[Failure]:
    """Failed and blocked cells, and those whose job ended without a word."""
    found = [failure(store, key, state) for key, state in states.items() if state in ("failed", "blocked")]
    if view is not None:
        gone = view.lost({key for key, state in states.items() if state in ("new", "interrupted")})
        found += [Failure(key, states[key], reason, log) for key, (reason, log) in gone.items()]
    return found


def failure(store: Store, key: str, state: State) -> Failure:
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
