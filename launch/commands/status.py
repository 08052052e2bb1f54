"""`dbscale status [--watch]`: what runs, waits, failed and why, and when it will be done."""

from __future__ import annotations

import argparse
import sys
import time

from dbscale.study.grid import load_grid
from dbscale.study.plan import PlanRecord, read_plan
from dbscale.study.store import Store
from dbscale.study.strict import ConfigError
from launch.lock import holder, is_held
from launch.options import AddCommand, add_data, add_grid, add_store, store_of
from launch.status import Failure, Status, describe, read_status
from launch.text import duration, table

STATES = ("done", "running", "interrupted", "failed", "blocked", "new")
STAGES = ("pretrain", "distill", "finetune")
MAX_SHOWN = 20
CLEAR_SCREEN = "\033[H\033[2J"


def add_commands(add: AddCommand) -> None:
    parser = add("status", run, "show what runs, waits and failed, and when the grid will be done")
    add_grid(parser)
    add_store(parser)
    add_data(parser)
    parser.add_argument("--watch", action="store_true", help="show it again every few seconds until interrupted")
    parser.add_argument("--interval", type=float, default=5.0, metavar="SECONDS", help="of --watch (default: 5)")
    parser.add_argument("--all", action="store_true", help=f"list every failed cell, not the first {MAX_SHOWN}")


def run(arguments: argparse.Namespace) -> int:
    store, plan = store_of(arguments), planned(arguments)
    while True:
        text = render(read_status(store, plan), store, limit=None if arguments.all else MAX_SHOWN)
        print((CLEAR_SCREEN if arguments.watch and sys.stdout.isatty() else "") + text, flush=True)
        if not arguments.watch:
            return 0
        time.sleep(arguments.interval)
        plan = planned(arguments)


def planned(arguments: argparse.Namespace) -> PlanRecord:
    """The grid's plan as last submitted."""
    grid = load_grid(arguments.grid, arguments.overrides)
    plan = read_plan(store_of(arguments), grid.name)
    if plan is None:
        raise ConfigError(
            f"grid {grid.name} was never submitted to {arguments.store}; `make grid` does it"
        )
    return plan


def render(status: Status, store: Store, *, limit: int | None) -> str:
    """The page that `dbscale status` prints."""
    lines = [f"grid {status.grid}: {status.question.strip()}", headline(status, store), "", counts_table(status)]
    if status.running:
        lines += ["", "running:", *(f"  {describe(cell)}" for cell in status.running[:limit])]
    lines += _failures("failed", [each for each in status.failures if each.state == "failed"], limit)
    lines += _failures("blocked", [each for each in status.failures if each.state == "blocked"], limit)
    return "\n".join(lines)


def headline(status: Status, store: Store) -> str:
    """Share done, device time used and left, and whether anybody works on it."""
    left = max(0.0, status.predicted_device_s - status.device_s)
    done = status.count("done")
    text = f"{done}/{status.num_cells} cells done, {duration(status.device_s)} of device time used"
    if done == status.num_cells:
        return text + "; complete"
    return f"{text}, about {duration(left)} left; {driver_line(store)}"


def driver_line(store: Store) -> str:
    other = holder(store.root)
    if other is None or not is_held(store.root):
        return "no local driver at work (`dbscale submit` goes on)"
    return f"driven by pid {other['pid']} on {other['host']}"


def counts_table(status: Status) -> str:
    """Cells by stage and state; columns that are empty everywhere are left out."""
    shown = [state for state in STATES if status.count(state)]
    stages = [stage for stage in STAGES if any(stage == each for each, _ in status.counts)]
    rows = [(stage, *(status.counts.get((stage, state), 0) for state in shown)) for stage in stages]
    return table(rows, header=("stage", *shown))


def _failures(title: str, failures: list[Failure], limit: int | None) -> list[str]:
    if not failures:
        return []
    lines = ["", f"{title}:"]
    for each in failures[:limit]:
        lines += [f"  {each.key}", f"    {each.reason}"] + ([f"    log: {each.log}"] if each.log else [])
    hidden = len(failures) - len(failures[:limit])
    return [*lines, f"  … and {hidden} more (--all lists them)"] if hidden else lines
