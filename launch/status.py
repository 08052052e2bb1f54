"""`dbscale status [--watch]`: where a grid stands, what runs, waits, failed and why, and when it will be done.

Counts by wave, stage and state, progress, time left, troubles with reason and log: from the store and, where there is
one, from what the scheduler says.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import log2
from typing import Any, Literal

from dbscale.errors import ConfigError, FileError
from dbscale.files import holder, is_held
from dbscale.launch import study as studies
from dbscale.launch.slurm.queue import Queued, SlurmError, read_queued, read_records
from dbscale.launch.study import AddCommand
from dbscale.study.cost import STAGES, duration
from dbscale.study.grid import load_grid
from dbscale.study.hunt import STOPS, Finding, HuntLog, log_path, read_log
from dbscale.study.plan import PlanRecord, read_plan, record
from dbscale.study.recipe import Stage
from dbscale.study.store import CellState, Standing, Store

State = CellState | Literal["queued"]
"""A cell's state, with what a scheduler adds."""
Place = tuple[int, Stage]
"""Wave and stage."""
STATES: tuple[State, ...] = ("done", "running", "queued", "interrupted", "failed", "blocked", "damaged", "new")
MAX_SHOWN = 20
WAIT_S = 0.5
"""A controller that is away lets squeue try for ten seconds."""
CLEAR_SCREEN = "\033[H\033[2J"


@dataclass(frozen=True)
class Running:
    """A cell in progress; `share` of its steps done."""

    key: str
    share: float
    images_per_s: float


@dataclass(frozen=True)
class Trouble:
    """A cell that failed, waits for one that did, is damaged, or was lost with its job."""

    key: str
    kind: str
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


def add_commands(add: AddCommand) -> None:
    parser = add("status", run, "show what runs, waits and failed, and when the grid will be done")
    studies.add_grid(parser)
    studies.add_store(parser)
    studies.add_data(parser)
    studies.add_json(parser)
    parser.add_argument("--watch", action="store_true", help="show it again every few seconds until interrupted")
    parser.add_argument("--interval", type=float, default=5.0, metavar="SECONDS", help="of --watch (default: 5)")
    parser.add_argument("--wait", type=float, default=WAIT_S, metavar="SECONDS",
                        help=f"how long SLURM may take to answer (default: {WAIT_S})")  # fmt: skip
    parser.add_argument("--all", action="store_true", help=f"list every failed cell, not the first {MAX_SHOWN}")


def run(arguments: argparse.Namespace) -> int:
    store, limit = studies.store_of(arguments), None if arguments.all else MAX_SHOWN
    if arguments.json:
        status = look_once(store, planned(arguments), arguments.wait)
        studies.print_json(as_data(status) | {"hunt": hunt_as_data(store, status.grid)})
        return 0
    while True:
        status = look_once(store, planned(arguments), arguments.wait)
        text = "\n".join([render(status, store, limit=limit), *hunt_so_far(store, status.grid)])
        print((CLEAR_SCREEN if arguments.watch and sys.stdout.isatty() else "") + text, flush=True)
        if not arguments.watch:
            return 0
        time.sleep(arguments.interval)


def planned(arguments: argparse.Namespace) -> PlanRecord:
    """The grid's plan as last submitted, or made anew where its file is damaged. Raises ConfigError."""
    grid = load_grid(arguments.grid, arguments.overrides)
    try:
        plan = read_plan(studies.store_of(arguments), grid.name)
    except FileError as error:
        shown = "the grid as it would be run whole" if grid.hunt is not None else "what the grid asks for now"
        print(f"{error}; shown is {shown}", file=sys.stderr)
        return record(*studies.plan_study(studies.study_of(arguments)))
    if plan is None:
        what = "submitted to" if grid.hunt is None else "hunted in"
        command = "submit" if grid.hunt is None else "hunt"
        raise ConfigError(
            f"grid {grid.name} was never {what} {arguments.store}; `dbscale {command} {arguments.grid}` does it"
        )
    return plan


def look_once(store: Store, plan: PlanRecord, wait_s: float) -> Status:
    """SLURM is asked while the store is read; a grid it was never given, or that is done, needs no answer."""
    records = read_records(store, plan.grid)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(read_queued, store, plan.grid, wait_s) if records else None
        found, queued = store.standings(plan.cells), None
        if answer is not None and any(standing.state != "done" for standing in found.values()):
            try:
                queued = answer.result()
            except SlurmError as error:
                queued = Queued(store, records, error=str(error))
        return read_status(store, plan, found, queued)


def read_status(store: Store, plan: PlanRecord, found: Mapping[str, Standing], queued: Queued | None) -> Status:
    """`found` says how the plan's cells stand in the store; how far they are and what they used is read here."""
    states: dict[str, State] = {key: state_of(key, standing, queued) for key, standing in found.items()}
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
        troubles=tuple(troubles(found, states, queued)),
        device_s=sum(used.values()),
        left_s=time_left(plan, states, used, running),
        scheduler=None if queued is None else queued.headline,
    )


def state_of(key: str, standing: Standing, queued: Queued | None) -> State:
    """The store's word, and the scheduler's on whether a job still lives."""
    if standing.state == "done" or queued is None or queued.error is not None:
        return standing.state
    element = queued.cells.get(key)
    if element is not None:
        return "running" if standing.state == "running" and element.running else "queued"
    return studies.corrected(standing, is_active=False).state


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


def troubles(found: Mapping[str, Standing], states: Mapping[str, State], queued: Queued | None) -> list[Trouble]:
    """Failed, blocked and damaged cells, those whose job ended without a word, and damaged records of submissions."""
    named = []
    for key, state in states.items():
        if state in ("failed", "blocked", "damaged"):
            attempt = found[key].attempt
            log = attempt.log if attempt is not None and state == "failed" else None
            named.append(Trouble(key, state, found[key].reason, log))
    if queued is not None:
        gone = queued.lost({key for key, state in states.items() if state in ("new", "interrupted")})
        named += [Trouble(key, "lost", reason, log) for key, (reason, log) in gone.items()]
        named += [Trouble(f"submission {each.uid}", "damaged", each.damage, None)
                  for each in queued.records if each.damage is not None]  # fmt: skip
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


def as_data(status: Status) -> dict[str, Any]:
    """One look for a program: times in device-seconds."""
    counts = [{"wave": wave, "stage": stage, "state": state, "count": count}
              for ((wave, stage), state), count in status.counts.items()]  # fmt: skip
    return {**vars(status), "counts": counts, "num_cells": status.num_cells, "num_done": status.count("done")}


def render(status: Status, store: Store, *, limit: int | None) -> str:
    """The page that `dbscale status` prints."""
    places = sorted({place for place, _ in status.counts}, key=lambda place: (place[0], STAGES.index(place[1])))
    lines = [f"grid {status.grid}: {status.question.strip()}", *headline(status, store), ""]
    lines += [states_table(status.counts, {place: place for place in places}, header=("wave", "stage"))]
    blocks = {"running": [[f"  {describe(cell)}"] for cell in status.running]}
    for each in status.troubles:
        log = [f"    log: {each.log}"] if each.log else []
        blocks.setdefault(each.kind, []).append([f"  {each.key}", f"    {each.reason}", *log])
    for title in ("running", "failed", "blocked", "damaged", "lost"):
        found = blocks.get(title, [])
        lines += ["", f"{title}:"] if found else []
        lines += [line for block in found[:limit] for line in block]
        lines += [f"  … and {len(found) - limit} more (--all lists them)"] if limit and len(found) > limit else []
    return "\n".join(lines)


def hunt_so_far(store: Store, grid: str) -> list[str]:
    """Where the grid's hunt stands, if it is hunted."""
    try:
        log = read_log(store, grid)
    except FileError as error:
        return ["", str(error)]
    return ["", *hunt_lines(log)] if log is not None and log.waves else []


def hunt_as_data(store: Store, grid: str) -> HuntLog | None:
    """The log with its last wave alone; None where there is none to be read."""
    with contextlib.suppress(FileError):
        log = read_log(store, grid)
        return log and log.model_copy(update={"waves": log.waves[-1:]})
    return None


def hunt_lines(log: HuntLog) -> list[str]:
    """The last wave of a hunt: what is known, what it cost, what comes next."""
    wave = log.waves[-1]
    hours, budget = wave.spent_s / 3600, log.budget_s / 3600
    failed = f", {pairs_text(wave.failed_pairs)} failed and not replaced" if wave.failed_pairs else ""
    pairs, cost_s = sum(each.num_pairs for each in wave.bought), sum(each.cost_s for each in wave.bought)
    text = f"hunt, wave {wave.number}: {hours:.2f} of {budget:.2f} device-hours used{failed}; "
    if wave.stopped:
        text += "it is over: " + "; ".join(STOPS[reason] for reason in wave.stopped.split(", "))
    else:
        text += f"{pairs_text(pairs)} in about {duration(cost_s)}" if pairs else "it waits for runs that are under way"
    if len(wave.findings) > 1:
        text += f" (each verdict at level {wave.verdict_level:.1%}, so that all hold at {log.level:.0%})"
    return [text, *(f"  {describe_finding(each, log)}" for each in wave.findings)]


def pairs_text(number: int) -> str:
    """A number of pairs in words: 1 pair, 2 pairs."""
    return f"{number:,} {'pair' if number == 1 else 'pairs'}"


def describe_finding(found: Finding, log: HuntLog) -> str:
    """What is known of one target, in a sentence."""
    if found.kind is None:
        return f"{found.target}: nothing can be judged yet; {pairs_text(found.num_pairs)} measured"
    text = found.kind.replace("_", " ")
    if found.root is not None and found.low is not None and found.high is not None:
        text = f"crossing at {found.root:,.0f} [{found.low:,.0f}, {found.high:,.0f}], {log2(found.high / found.low):.1f} " \
               f"octaves wide ({log.target_octaves:g} wanted)"  # fmt: skip
    doubt = "" if found.doubt is None else f"; {found.doubt:.2g} octaves of wrong advice left"
    return f"{found.target}: {text}{doubt}; {pairs_text(found.num_pairs)} measured"


def headline(status: Status, store: Store) -> list[str]:
    """Share done, device time used and left, the finish, and whether anybody works on it."""
    done = status.count("done")
    text = f"{done}/{status.num_cells} cells done, {duration(status.device_s)} of device time used"
    if done == status.num_cells:
        return [text + "; complete"]
    text += f", about {duration(status.left_s)} left"
    if status.num_devices:
        finish = time.time() + status.left_s / status.num_devices
        text += f"; at the present pace it ends about {time.strftime('%a %H:%M', time.localtime(finish))}"
    other = holder(store.root)
    command = "hunt" if log_path(store, status.grid).exists() else "submit"
    driver = f"nobody works on it (`dbscale {command}` resumes it)"
    if other is not None and other.grid == status.grid and is_held(store.root):
        driver = f"driven by pid {other.process.pid} on {other.process.host}"
    elif status.running:
        driver = f"{len(status.running)} cells run in workers or by hand"
    return [text, status.scheduler or driver]


def states_table(
    counts: Mapping[tuple[Any, Any], int], rows: Mapping[Any, Sequence[object]], *, header: Sequence[str]
) -> str:
    """Cells by place and state, one line per place of `rows`; states of no cell are left out."""
    shown = [state for state in STATES if any(counts.get((place, state)) for place in rows)]
    lines = [(*label, *(counts.get((place, state), 0) for state in shown)) for place, label in rows.items()]
    return table(lines, header=(*header, *shown))


def table(rows: Sequence[Sequence[object]], *, header: Sequence[str]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [list(header), *[[str(value) for value in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(value, int | float) for value in column) for column in zip(*rows, strict=True)]
    justify = [str.rjust if number else str.ljust for number in numeric or [False] * len(header)]
    lines = ([put(text, width) for put, text, width in zip(justify, row, widths, strict=True)] for row in cells)
    return "\n".join("  ".join(line).rstrip() for line in lines)
