"""`dbscale submit` (make grid): pack what is missing, plan, run or queue, and at the end reduce and report.

Typed again it goes on where it stopped; typed when all is done it says so.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dbscale.files import driver_lock
from dbscale.study.cost import CostModel
from dbscale.study.plan import Plan, read_plan, record, write_plan
from dbscale.study.stop import StopRequest
from launch.commands import plan as plan_command
from launch.commands.results import report_is_current, write_results
from launch.options import AddCommand, add_study, add_tracker, study_of
from launch.schedule import tasks_of
from launch.signals import stop_on_signals
from launch.study import Study, plan_study
from launch.text import duration
from launch.worker import Result

STOPPED, SOME_FAILED = 130, 3
WAIT_FOR_OTHERS_S = 120.0


def add_commands(add: AddCommand) -> None:
    parser = add("submit", run, "run a grid: pack, plan, train, reduce, report; type it again to resume")
    add_study(parser)
    add_tracker(parser)
    parser.add_argument("--dry-run", action="store_true", help="show the plan and what would be started, start nothing")
    parser.add_argument("--no-report", action="store_true", help="leave out reduce and report at the end")


def run(arguments: argparse.Namespace) -> int:
    study = study_of(arguments)
    if arguments.dry_run:
        return show_only(study)
    with driver_lock(study.store.root, "dbscale submit", study.grid.name):
        study = pack_missing(study)
        if study.cluster.executor == "slurm":
            return submit_to_slurm(study)
        plan, cost = settled_plan(study)
        write_records(study, plan, cost)
        if not plan.waves:
            print(f"grid {study.grid.name}: all {len(plan.cells)} cells are done")
            return finish(study, plan, {}, report=not arguments.no_report)
        print(plan_command.describe(study, plan, cost), flush=True)
        results, stop = execute(study, plan, cost)
        if stop.requested:
            return say_stopped(study, plan, stop)
        return finish(study, plan, results, report=not arguments.no_report)


def pack_missing(study: Study) -> Study:
    """The same study with every dataset packed; one that stands is left alone."""
    from shards.pack import ensure_packed, source_of

    for name in study.missing_datasets:  # all entries before the first is packed, which may take hours
        source_of(name, study.grid.datasets[name], study.data_dir)
    for name in study.used_datasets:
        if name in study.missing_datasets:
            print(f"packing dataset {name} into {study.dataset_dir(name)}", flush=True)
        ensure_packed(name, study.grid.datasets[name], study.data_dir)
    return replace(study)  # a new value, because manifests are read once per study


def show_only(study: Study) -> int:
    """The plan, and for SLURM the exact scripts."""
    if study.cluster.executor == "slurm":
        return show_scripts(study)
    plan, cost = plan_study(study)
    print(plan_command.describe(study, plan, cost))
    return 0


def show_scripts(study: Study) -> int:
    """What `submit` would hand to SLURM now; on a machine without SLURM, to a cluster that holds nothing of the grid."""
    from launch.slurm.queue import DEFAULT_MAX_ARRAY_SIZE, SlurmError, max_array_size
    from launch.slurm.submit import dry_run, peek_at_queue

    try:
        active, max_size = peek_at_queue(study).cells, max_array_size()
    except SlurmError as error:
        print(f"{error}; shown is what an idle cluster with SLURM's own limits would get", file=sys.stderr)
        active, max_size = {}, DEFAULT_MAX_ARRAY_SIZE
    plan, cost = plan_study(study, active)
    print(plan_command.describe(study, plan, cost))
    for script in dry_run(study, plan, cost, active, max_size) if plan.waves else ():
        print(f"\n{script}")
    return 0


def submit_to_slurm(study: Study) -> int:
    """Queue what is neither done nor queued nor running, and return."""
    from launch.slurm.submit import Submission, look_at_queue

    queued = look_at_queue(study)
    plan, cost = plan_study(study, queued.cells)
    write_records(study, plan, cost)
    waiting, keys = plan.count()["running"], [cell.key for cell in plan.cells]
    if not plan.waves and queued.will_be_reduced(keys):
        print(f"nothing to submit: {waiting} cells wait or run in SLURM, {len(keys) - waiting} are done")
        return 0
    if not plan.waves and report_is_current(study.store, study.grid.name, keys):
        print(f"all {len(keys)} cells are done; the report: {study.store.grid_dir(study.grid.name) / 'report.html'}")
        return 0
    print(plan_command.describe(study, plan, cost), flush=True)
    for made in Submission(study, plan, cost, queued).run():
        what = f"{len(made.elements)} bundles of wave {made.wave}" if made.kind == "bundles" else "the reducer"
        after = f", after {', '.join(map(str, made.after))}" if made.after else ""
        print(f"submitted {what} as job {made.job}{after}")
    return 0


def settled_plan(study: Study) -> tuple[Plan, CostModel]:
    """The plan once nobody else's worker is at this grid: those of a driver that was killed need a moment to save."""
    deadline = time.monotonic() + WAIT_FOR_OTHERS_S
    told = False
    while True:
        plan, cost = plan_study(study)
        busy = plan.count()["running"]
        if not busy or time.monotonic() > deadline:
            return plan, cost
        if not told:
            print(f"waiting for {busy} running cells of an earlier command to save and stop", flush=True)
            told = True
        time.sleep(1)


def write_records(study: Study, plan: Plan, cost: CostModel) -> None:
    """`recipe.json` of every cell and the grid's `plan.json`; an unchanged plan keeps its file and date."""
    for cell in plan.cells:
        study.store.write_spec(cell.spec())
    new, old = record(plan, cost), read_plan(study.store, study.grid.name)
    if old is None or (new.points, new.question, new.min_effect) != (old.points, old.question, old.min_effect):
        write_plan(study.store, new)


def execute(study: Study, plan: Plan, cost: CostModel) -> tuple[Mapping[str, Result], StopRequest]:
    """Run everything the plan has left, here or on this machine's workers."""
    stop = StopRequest()
    with stop_on_signals(stop):
        if study.cluster.executor == "inline":
            from launch.executors.inline import run_inline

            return run_inline(
                tasks_of(plan, cost, study.cluster.shape_key), study.store, study.data_dir, study.cluster, stop
            ), stop
        return run_local(study, plan, cost, stop), stop


def run_local(study: Study, plan: Plan, cost: CostModel, stop: StopRequest) -> Mapping[str, Result]:
    from launch.executors.local import LocalRun
    from launch.progress import Display

    display = Display(
        store=study.store, total=len(plan.cells), done=plan.count()["done"],
        predicted_s={cell.key: cost.seconds(cell) for cell in plan.todo}, workers=study.cluster.num_workers(),
    )  # fmt: skip
    local = LocalRun(
        store=study.store, data_dir=study.data_dir, cluster=study.cluster, job_folder=job_folder(study),
        stop=stop, display=display, waiting=list(tasks_of(plan, cost, study.cluster.shape_key)),
        parents={cell.key: tuple(parent.key for parent in cell.parents) for cell in plan.cells},
    )  # fmt: skip
    try:
        return local.run()
    finally:
        display.close()


def job_folder(study: Study) -> Path:
    """Where this driver's jobs keep their logs."""
    return study.store.grid_dir(study.grid.name).absolute() / "jobs" / time.strftime("%Y%m%d-%H%M%S")


def say_stopped(study: Study, plan: Plan, stop: StopRequest) -> int:
    done = sum(study.store.state(cell.key) == "done" for cell in plan.cells)
    print(f"stopped ({stop.reason}) with {done}/{len(plan.cells)} cells done; unfinished cells go on from their last "
          f"checkpoint:\n  {command_line()}", file=sys.stderr)  # fmt: skip
    return STOPPED


def command_line() -> str:
    return shlex.join(["dbscale", *sys.argv[1:]])


def finish(study: Study, plan: Plan, results: Mapping[str, Result], *, report: bool) -> int:
    """Say what failed, reduce and report; 3 when a cell is missing."""
    missing = [result for result in results.values() if result.status != "done"]
    for result in missing[:20]:
        print(f"{result.status}: {result.key}: {result.reason or ''}", file=sys.stderr)
    if missing:
        print(f"{len(missing)} of {len(plan.cells)} cells did not finish; `dbscale status` names them with their logs, "
              "and the same command tries them again", file=sys.stderr)  # fmt: skip
    if not report:
        print(
            f"{len(plan.cells) - len(missing)} of {len(plan.cells)} cells are done; `dbscale report` fits and draws them"
        )
    elif report_is_current(study.store, study.grid.name, [cell.key for cell in plan.cells]):
        print(f"the report is up to date: {study.store.grid_dir(study.grid.name) / 'report.html'}")
    else:
        started = time.monotonic()
        path, answers = write_results(study.store, study.grid.name)
        print("\n".join(answers))
        print(f"reduced and reported in {duration(time.monotonic() - started)}: {path}")
    return SOME_FAILED if missing else 0
