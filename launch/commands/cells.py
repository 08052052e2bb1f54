"""`dbscale run|logs|cancel`: one cell by its key, its log, and stopping a grid."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path

from dbscale.errors import ConfigError
from dbscale.files import holder, is_held
from dbscale.study.grid import load_grid
from dbscale.study.resources import StopRequest
from dbscale.study.store import Store
from launch.cluster import load_cluster
from launch.options import AddCommand, add_data, add_grid, add_set, add_store, add_tracker, store_of, study_of
from launch.signals import stop_on_signals
from launch.study import CLUSTER_PREFIX, match_key, record_cell

TAIL_BYTES = 20_000


def add_commands(add: AddCommand) -> None:
    parser = add("run", run, "run one cell in this process, by its key (see `dbscale plan --cells`)")
    parser.add_argument("cell", help="the cell's key, or its 12-digit id")
    parser.add_argument("--cluster", default="inline", metavar="NAME|PATH", help="whose resources (default: inline)")
    parser.add_argument("--grid", type=Path, metavar="PATH", help="the grid of a cell that was never submitted")
    add_store(parser)
    add_data(parser)
    add_set(parser)
    add_tracker(parser)
    parser = add("logs", logs, "show the log of a cell's last attempt")
    parser.add_argument("cell", help="the cell's key, or its 12-digit id")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as it grows, until interrupted")
    add_store(parser)
    parser = add("cancel", cancel, "stop a grid's jobs, and only those; they save their progress")
    parser.add_argument("--cluster", default="local", metavar="NAME|PATH")
    add_grid(parser)
    add_store(parser)
    add_data(parser)


def run(arguments: argparse.Namespace) -> int:
    from launch.worker import run_bundle

    store, stop = store_of(arguments), StopRequest()
    if arguments.grid is None:
        overrides = [each.removeprefix(CLUSTER_PREFIX) for each in arguments.overrides]
        cluster, key = load_cluster(arguments.cluster, overrides), find_cell(store, arguments.cell)
    else:
        study = study_of(arguments)
        cluster, key = study.cluster, record_cell(study, arguments.cell)
    resources = cluster.shape(store.read_spec(key).recipe.stage).resources
    with stop_on_signals(stop):
        (result,) = run_bundle([key], store, arguments.data, resources, stop)
    print(f"{result.status}: {key}" + (f": {result.reason}" if result.reason else ""))
    return 130 if result.status == "interrupted" else 0 if result.status == "done" else 3


def find_cell(store: Store, name: str) -> str:
    """The key of the store's cell that `name` is, or whose id it is."""
    folder = store.root / "cells"
    keys = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return match_key(name, keys, where=str(store.root))


def logs(arguments: argparse.Namespace) -> int:
    store = store_of(arguments)
    key = find_cell(store, arguments.cell)
    attempt = store.last_attempt(key)
    if attempt is None or attempt.log is None:
        raise ConfigError(f"cell {key} has no log: {'it never ran' if attempt is None else 'it ran in a terminal'}")
    print(f"==> {attempt.log} (attempt {attempt.number}, {attempt.status})", file=sys.stderr)
    _print_tail(Path(attempt.log), follow=arguments.follow)
    return 0


def _print_tail(path: Path, *, follow: bool) -> None:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        while True:
            sys.stdout.write(file.read().decode(errors="replace"))
            sys.stdout.flush()
            if not follow:
                return
            time.sleep(0.5)


def cancel(arguments: argparse.Namespace) -> int:
    """Ask a local driver to stop, as Ctrl-C would; cancel what SLURM holds of the grid, and nothing else."""
    store, name = store_of(arguments), load_grid(arguments.grid, arguments.overrides).name
    stopped = stop_driver(store, name) + cancel_in_slurm(store, name)
    print("\n".join(stopped) if stopped else f"nothing of grid {name} waits or runs on {store.root}")
    return 0


def stop_driver(store: Store, grid: str) -> list[str]:
    """Nothing is said to a driver of another grid."""
    other = holder(store.root)
    if other is None or other.get("grid") != grid or not is_held(store.root):
        return []
    if other["host"] != socket.gethostname():
        raise ConfigError(f"{store.root} is driven by pid {other['pid']} on {other['host']}; cancel it there")
    os.kill(other["pid"], signal.SIGTERM)
    return [f"asked pid {other['pid']} to save and stop"]


def cancel_in_slurm(store: Store, grid: str) -> list[str]:
    from launch.slurm.queue import cancel_by_name, cancel_jobs, read_queue
    from launch.slurm.records import active_jobs, forget, read_records

    records = read_records(store, grid)
    if not records:
        return []
    for record in records:
        if record.job is None:  # its submission was cut off
            cancel_by_name(record.job_name)
            forget(store, record)
    jobs = sorted(active_jobs(records, read_queue()))
    cancel_jobs(jobs)
    return [f"cancelled job {job}" for job in jobs]
