"""`dbscale run|logs|cancel`: one cell by its key, its log, and stopping a grid."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from dbscale.errors import ConfigError
from dbscale.files import holder, is_held, read_json
from dbscale.launch import study as studies
from dbscale.launch.cluster import CONFIGS, load_cluster
from dbscale.launch.preflight import store_notes
from dbscale.launch.study import AddCommand
from dbscale.launch.worker import run_bundle, stop_on_signals
from dbscale.study.grid import load_grid
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Store

TAIL_BYTES = 20_000


def add_commands(add: AddCommand) -> None:
    parser = add(
        "run", run, "run one cell in this process, or in those of `accelerate launch -m dbscale.launch.cli run CELL`"
    )
    parser.add_argument("cell", help="the cell's key, or its 12-digit id (see `dbscale plan --cells`)")
    studies.add_cluster(parser, "inline")
    parser.add_argument(
        "--grid", type=studies.grid_path, metavar="NAME|PATH", help="the grid of a cell that was never submitted"
    )
    studies.add_store(parser)
    studies.add_data(parser)
    studies.add_set(parser)
    studies.add_tracker(parser)
    parser = add("logs", logs, "show the log of a cell's last attempt")
    parser.add_argument("cell", help="the cell's key, or its 12-digit id")
    parser.add_argument("-f", "--follow", action="store_true", help="keep printing as the log grows, until interrupted")
    studies.add_store(parser)
    parser = add("cancel", cancel, "stop a grid's jobs, and only those; they save their progress")
    studies.add_cluster(parser, "local")
    studies.add_grid(parser)
    studies.add_store(parser)
    studies.add_data(parser)


def run(arguments: argparse.Namespace) -> int:
    """130 when it was stopped, 0 when the cell is done, else 3."""
    store, stop = studies.store_of(arguments), StopRequest()
    for note in store_notes(store.root):
        print(f"note: {note}", file=sys.stderr)
    with stop_on_signals(stop):
        if arguments.grid is None:
            overrides = [each.removeprefix(studies.CLUSTER_PREFIX) for each in arguments.overrides]
            cluster, key = load_cluster(arguments.cluster, overrides), studies.find_cell(store, arguments.cell)
        else:
            study = studies.study_of(arguments)
            cluster, key = study.cluster, studies.record_cell(study, arguments.cell)
        resources = as_launched(cluster.shape(store.read_spec(key).recipe.stage).resources)
        (result,) = run_bundle([key], store, arguments.data, resources, stop, second_turns=False)
    if os.environ.get("RANK", "0") == "0":
        row = store.read_row(key) if result.status == "done" else None
        print(f"{key}: {result.status}" + (f", error {row.error_rate:.4f}" if row else f": {result.reason}"))
    return 130 if result.status == "interrupted" else 0 if result.status == "done" else 3


def as_launched(resources: Resources) -> Resources:
    """With the engine and the number of processes of the Accelerate config, under `accelerate launch`."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return resources
    zero_stage, config = None, os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        zero_stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        if config:
            path = _deepspeed_config(config)
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)  # the engine reads it again
            zero_stage = _zero_stage(path)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    return resources.model_copy(update={"zero_stage": zero_stage, "num_processes": num_processes})


def _deepspeed_config(name: str) -> Path:
    """The file that an Accelerate config names: from the current folder or, as the shipped ones do, from the checkout.

    Raises ConfigError where neither holds it.
    """
    path = next((each for each in (Path(name), CONFIGS.parent / name) if each.exists()), None)
    if path is None:
        raise ConfigError(f"the Accelerate config names {name}, which is neither here nor in {CONFIGS.parent}; "
                          "give an absolute path as deepspeed_config_file")  # fmt: skip
    return path.resolve()


def _zero_stage(path: Path) -> int:
    """The stage that a DeepSpeed config asks for. Raises ConfigError."""
    try:
        return int(read_json(path)["zero_optimization"]["stage"])
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} names no zero_optimization.stage ({error}); see configs/deepspeed/zero1.json"
        ) from None


def logs(arguments: argparse.Namespace) -> int:
    store = studies.store_of(arguments)
    key = studies.find_cell(store, arguments.cell)
    attempt = store.last_attempt(key)
    if attempt is None or attempt.log is None:
        raise ConfigError(f"cell {key} has no log: {'it never ran' if attempt is None else 'it ran in a terminal'}")
    path = Path(attempt.log)
    if not path.resolve().is_relative_to((store.root / "grids").resolve()):
        raise ConfigError(f"attempt {attempt.number} of {key} names {path} as its log, which is not in the store "
                          f"{store.root}; if the store was moved, look into its grids/*/jobs")  # fmt: skip
    print(f"==> {path} (attempt {attempt.number}, {attempt.status})", file=sys.stderr)
    _print_tail(path, follow=arguments.follow)
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
    store, name = studies.store_of(arguments), load_grid(arguments.grid, arguments.overrides).name
    stopped = stop_driver(store, name) + cancel_in_slurm(store, name)
    print("\n".join(stopped) if stopped else f"grid {name} has nothing waiting or running on {store.root}")
    return 0


def stop_driver(store: Store, grid: str) -> list[str]:
    """Ask the grid's driver on this machine to save and stop; another grid's driver is left alone."""
    other = holder(store.root)
    if other is None or other.grid != grid or not is_held(store.root):
        return []
    pid = other.process.pid
    if not other.process.alive:  # not to be seen from this machine, or from this container
        raise ConfigError(f"{store.root} is driven by pid {pid} on {other.process.host}; cancel it there")
    os.kill(pid, signal.SIGTERM)
    return [f"asked pid {pid} to save and stop"]


def cancel_in_slurm(store: Store, grid: str) -> list[str]:
    """Cancel the arrays and reducers of the grid that wait or run, also those whose submission was cut off."""
    from dbscale.launch.slurm.queue import cancel_cut_off, cancel_jobs, read_queued, read_records

    cancelled: set[int] = set()
    # Again until nothing new is found: a reducer may be handing in cells at this moment.
    while records := read_records(store, grid):
        cancel_cut_off(store, records)
        found = read_queued(store, grid).jobs.keys() - cancelled
        if not found:
            break
        cancel_jobs(found)
        cancelled |= found
    return [f"cancelled job {job}" for job in sorted(cancelled)]
