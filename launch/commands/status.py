"""`dbscale status [--watch]`: what runs, waits, failed and why, and when it will be done."""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from dbscale.errors import ConfigError, FileError
from dbscale.files import holder, is_held
from dbscale.study.cost import STAGES, duration
from dbscale.study.grid import load_grid
from dbscale.study.plan import PlanRecord, read_plan, record
from dbscale.study.store import Store
from launch.slurm.queue import read_records, read_view
from launch.status import State, Status, Trouble, describe, read_status, table
from launch.study import AddCommand, add_data, add_grid, add_store, plan_study, store_of, study_of

STATES: tuple[State, ...] = ("done", "running", "queued", "interrupted", "failed", "blocked", "damaged", "new")
MAX_SHOWN = 20
WAIT_S = 0.5
"""A controller that is away lets squeue try for ten seconds."""
CLEAR_SCREEN = "\033[H\033[2J"


def add_commands(add: AddCommand) -> None:
    parser = add("status", run, "show what runs, waits and failed, and when the grid will be done")
    add_grid(parser)
    add_store(parser)
    add_data(parser)
    parser.add_argument("--watch", action="store_true", help="show it again every few seconds until interrupted")
    parser.add_argument("--interval", type=float, default=5.0, metavar="SECONDS", help="of --watch (default: 5)")
    parser.add_argument("--wait", type=float, default=WAIT_S, metavar="SECONDS",
                        help=f"how long SLURM may take to answer (default: {WAIT_S})")  # fmt: skip
    parser.add_argument("--all", action="store_true", help=f"list every failed cell, not the first {MAX_SHOWN}")


def run(arguments: argparse.Namespace) -> int:
    store, limit = store_of(arguments), None if arguments.all else MAX_SHOWN
    while True:
        text = render(look_once(store, planned(arguments), arguments.wait), store, limit=limit)
        print((CLEAR_SCREEN if arguments.watch and sys.stdout.isatty() else "") + text, flush=True)
        if not arguments.watch:
            return 0
        time.sleep(arguments.interval)


def look_once(store: Store, plan: PlanRecord, wait_s: float) -> Status:
    """SLURM is asked while the store is read; a grid it was never given, or that is done, needs no answer."""
    records = read_records(store, plan.grid)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(read_view, store, records, wait_s) if records else None
        found = store.standings(plan.cells)
        undone = any(standing.state != "done" for standing in found.values())
        return read_status(store, plan, found, answer.result() if answer is not None and undone else None)


def planned(arguments: argparse.Namespace) -> PlanRecord:
    """The grid's plan as last submitted, or made anew where its file is damaged. Raises ConfigError."""
    name = load_grid(arguments.grid, arguments.overrides).name
    try:
        plan = read_plan(store_of(arguments), name)
    except FileError as error:
        print(f"{error}; shown is what the grid asks for now", file=sys.stderr)
        return record(*plan_study(study_of(arguments)))
    if plan is None:
        raise ConfigError(f"grid {name} was never submitted to {arguments.store}; `make grid` does it")
    return plan


def render(status: Status, store: Store, *, limit: int | None) -> str:
    """The page that `dbscale status` prints."""
    lines = [f"grid {status.grid}: {status.question.strip()}", *headline(status, store), "", counts_table(status)]
    if status.running:
        lines += ["", "running:", *(f"  {describe(cell)}" for cell in status.running[:limit])]
        lines += [f"  … and {len(status.running) - limit} more"] if limit and len(status.running) > limit else []
    for title in ("failed", "blocked", "damaged"):
        lines += _list(title, [each for each in status.troubles if each.state == title], limit)
    lines += _list("lost", [each for each in status.troubles if each.state in ("new", "interrupted")], limit)
    return "\n".join(lines)


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
    return [text, status.scheduler or driver_line(store, status.grid)]


def driver_line(store: Store, grid: str) -> str:
    other = holder(store.root)
    if other is None or other.grid != grid or not is_held(store.root):
        return "nobody works on it (`dbscale submit` goes on)"
    return f"driven by pid {other.process.pid} on {other.process.host}"


def counts_table(status: Status) -> str:
    """Cells by wave, stage and state; columns that are empty everywhere are left out."""
    shown: list[State] = [state for state in STATES if status.count(state)]
    places = sorted({place for place, _ in status.counts}, key=lambda place: (place[0], STAGES.index(place[1])))
    rows = [(wave, stage, *(status.counts.get(((wave, stage), state), 0) for state in shown)) for wave, stage in places]
    return table(rows, header=("wave", "stage", *shown))


def _list(title: str, found: list[Trouble], limit: int | None) -> list[str]:
    if not found:
        return []
    lines = ["", f"{title}:"]
    for each in found[:limit]:
        lines += [f"  {each.key}", f"    {each.reason}"] + ([f"    log: {each.log}"] if each.log else [])
    hidden = len(found) - len(found[:limit])
    return [*lines, f"  … and {hidden} more (--all lists them)"] if hidden else lines
