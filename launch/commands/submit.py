"""`dbscale submit` (make grid): pack what is missing, plan, run or queue, and at the end reduce and report.

The same command resumes a grid where it stopped, and says so when everything is done. Its last words and its exit code
are computed from the rows in the store.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dbscale.files import driver_lock, make_folder
from dbscale.launch.cluster import tasks_of
from dbscale.launch.commands import plan as plan_command
from dbscale.launch.commands.results import report_is_current, write_results
from dbscale.launch.preflight import check
from dbscale.launch.study import AddCommand, Study, add_run, plan_study, refuse_hunted, study_of
from dbscale.launch.worker import stop_on_signals
from dbscale.study.cost import CostModel, duration
from dbscale.study.grid import weights_in_use
from dbscale.study.plan import Plan, record, write_plan
from dbscale.study.plan import read_plan as read_record
from dbscale.study.resources import StopRequest
from dbscale.study.store import Standing, Store

if TYPE_CHECKING:
    from dbscale.launch.slurm.queue import Queued, SubmitRecord

Look = TypeVar("Look")
STOPPED, SOME_FAILED = 130, 3
MAX_NAMED = 20
WAIT_FOR_OTHERS_S = 120.0


def add_commands(add: AddCommand) -> None:
    parser = add("submit", run, "run a grid: pack, plan, train, reduce, report; run it again to resume")
    add_run(parser)
    parser.add_argument("--dry-run", action="store_true", help="show the plan and what would be started, start nothing")


def run(arguments: argparse.Namespace) -> int:
    study = study_of(arguments)
    refuse_hunted(study, "submit")
    check_cluster(study)
    if arguments.dry_run:
        return dry_run(study)
    with driver_lock(study.store.root, "dbscale submit", study.grid.name):
        study = pack_missing(study)
        if study.cluster.executor == "slurm":
            return submit_to_slurm(study, trial=not arguments.no_smoke)
        plan, cost = settled(lambda: plan_study(study), lambda found: found[0].count()["running"])
        refuse_what_would_fail(study, plan, trial=not arguments.no_smoke)
        write_records(study, plan, cost)
        if plan.waves:
            show_plan(plan, cost, study)
            stop = execute(study, plan, cost)
            if stop.requested:
                return say_stopped(study, plan, stop)
        return finish(study, plan, report=not arguments.no_report)


def check_cluster(study: Study) -> None:
    """Raises ConfigError for an option under `slurm.sbatch` that sbatch does not have."""
    if study.cluster.executor == "slurm":
        from dbscale.launch.slurm.submit import check_options

        check_options(study.cluster)


def pack_missing(study: Study) -> Study:
    """The same study with every dataset packed and all weights imported; what stands is left alone."""
    from dbscale.shards.pack import ensure_packed
    from dbscale.shards.sources import check_there

    for name in study.missing_datasets:  # all of them before the first is packed, which may take hours
        check_there(name, study.grid.datasets[name], study.data_dir)
    for name in study.used_datasets:
        if name in study.missing_datasets:
            print(f"packing dataset {name} into {study.dataset_dir(name)}", flush=True)
        ensure_packed(name, study.grid.datasets[name], study.data_dir)
    for weights in weights_in_use(study.grid):
        from dbscale.training.pretrained import import_weights  # with torch, and few grids have any

        digest = import_weights(study.store, weights, study.data_dir)
        print(f"weights {weights.checkpoint}: sha256 {digest}", flush=True)
    return replace(study)  # a new value, because manifests are read once per study


def show_plan(plan: Plan, cost: CostModel, study: Study) -> int:
    print(plan_command.describe(study, plan, cost), flush=True)
    return 0


def dry_run(study: Study) -> int:
    """The plan, and on SLURM the scripts that `submit` would hand in now."""
    queued, max_size = queue_seen(study)
    plan, cost = plan_study(study, queued and queued.cells)
    show_plan(plan, cost, study)
    if queued is not None and plan.waves:
        hand_in(study, plan, cost, queued, max_size=max_size)
    return 0


def queue_seen(study: Study) -> tuple[Queued | None, int]:
    """What SLURM holds of the grid and the longest array it takes; on a machine without SLURM, those of a cluster that
    holds nothing. None where the study does not run on SLURM."""
    from dbscale.launch.slurm.queue import DEFAULT_MAX_ARRAY_SIZE, Queued, SlurmError, max_array_size, read_queued

    if study.cluster.executor != "slurm":
        return None, 0
    try:
        return read_queued(study.store, study.grid.name), max_array_size()
    except SlurmError as error:
        print(f"{error}; shown is what an idle cluster with SLURM's own limits would get", file=sys.stderr)
        return Queued(study.store), DEFAULT_MAX_ARRAY_SIZE


def hand_in(
    study: Study, plan: Plan, cost: CostModel, queued: Queued, *, max_size: int | None = None,
    last: Callable[[SubmitRecord], str] | None = None, behind: frozenset[str] | None = None,
    check: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Submit the plan's bundles and the job behind them; with `max_size` given, only show the scripts.

    `last` and `behind` are `Submission`'s; `check` is called before each call of SLURM.
    """
    from dbscale.launch.slurm.submit import Submission

    submission = Submission(
        study.store, study.grid.name, study.data_dir, study.cluster, queued, last=last, behind=behind, max_size=max_size,
        show=None if max_size is None else lambda script: print(f"\n{script}"),
    )  # fmt: skip
    check()
    for made in submission.run(tasks_of(plan, cost, study.cluster), [cell.key for cell in plan.cells]):
        if max_size is None:
            part, job = (
                (f" of wave {made.wave}", "the reducer") if last is None else ("", "the job that plans the next wave")
            )
            what = f"{len(made.elements)} bundles{part}" if made.kind == "bundles" else job
            after = f", after {', '.join(map(str, made.after))}" if made.after else ""
            print(f"submitted {what} as job {made.job}{after}", flush=True)
            check()


def refuse_what_would_fail(study: Study, plan: Plan, *, trial: bool) -> None:
    """Before anything is queued: what can be known without training and, with `trial`, from one step of each new kind of
    recipe. Raises ConfigError; the plan that is shown names what is merely to be known."""
    check(study, plan).refuse()
    if trial:
        from dbscale.launch.smoke import smoke

        smoke(study, plan)


def submit_to_slurm(study: Study, *, trial: bool) -> int:
    """Queue what is neither done nor queued nor running, and return."""
    from dbscale.launch.slurm.submit import settle_queue

    queued = settle_queue(study.store, study.grid.name)
    plan, cost = plan_study(study, queued.cells)
    refuse_what_would_fail(study, plan, trial=trial)
    write_records(study, plan, cost)
    count, keys = plan.count(), [cell.key for cell in plan.cells]
    if not plan.waves and queued.will_be_reduced(keys):
        print(f"nothing to submit: {count['running']} cells wait or run in SLURM, {count['done']} are done")
        return 0
    if count["done"] == len(keys) and report_is_current(study.store, study.grid.name, keys):
        print(f"all {len(keys)} cells are done; the report: {report_path(study)}")
        return 0
    show_plan(plan, cost, study)
    hand_in(study, plan, cost, queued)
    return 0


def report_path(study: Study) -> Path:
    return study.store.grid_dir(study.grid.name) / "report.html"


def settled(look: Callable[[], Look], num_running: Callable[[Look], int]) -> Look:
    """What is to be done once nobody else's worker is at this grid: those of a driver that was killed need a moment to
    save."""
    deadline, told = time.monotonic() + WAIT_FOR_OTHERS_S, False
    while (busy := num_running(found := look())) and time.monotonic() <= deadline:
        if not told:
            print(f"waiting for {busy} running cells of an earlier command to save and stop", file=sys.stderr)
        told = True
        time.sleep(1)
    return found


def write_records(
    study: Study, plan: Plan, cost: CostModel, *, level: float = 0.9, targets: Sequence[str] = ()
) -> None:  # fmt: skip
    """`recipe.json` of every cell and the grid's `plan.json`; an unchanged plan keeps its file and date.

    `level` is that of the report's intervals, `targets` the verdicts of a hunt for whose number it allows.
    """
    for cell in plan.cells:
        study.store.write_spec(cell.spec())
    new = record(plan, cost, level=level, targets=targets)
    try:
        old = read_record(study.store, study.grid.name)
    except ValueError:  # damaged, which the plan's notes say
        old = None
    asked = ("points", "question", "min_effect", "level", "targets")
    if old is None or any(getattr(new, name) != getattr(old, name) for name in asked):
        write_plan(study.store, new)


def execute(study: Study, plan: Plan, cost: CostModel) -> StopRequest:
    """Run everything the plan has left, in this process or on this machine's workers; says whether it was stopped."""
    from dbscale.launch.local import Display, LocalRun, run_inline
    from dbscale.launch.slurm.queue import make_uid

    stop, tasks = StopRequest(), tasks_of(plan, cost, study.cluster)
    with stop_on_signals(stop):
        if study.cluster.executor == "inline":
            run_inline(tasks, study.store, study.data_dir, study.cluster, stop)
            return stop
        display = Display(
            store=study.store, total=len(plan.cells), done=plan.count()["done"],
            predicted_s={cell.key: cost.seconds(cell) for cell in plan.todo}, workers=study.cluster.num_workers(),
        )  # fmt: skip
        folder = study.store.own_grid_dir(study.grid.name).absolute() / "jobs" / make_uid()
        make_folder(folder, private=True)
        local = LocalRun(
            store=study.store, data_dir=study.data_dir, cluster=study.cluster, job_folder=folder, stop=stop,
            display=display, waiting=list(tasks),
            parents={cell.key: tuple(parent.key for parent in cell.parents) for cell in plan.cells},
        )  # fmt: skip
        try:
            local.run()
        finally:
            display.close()
    return stop


def say_stopped(study: Study, plan: Plan, stop: StopRequest) -> int:
    done = len(plan.cells) - len(unfinished(study.store, plan))
    command = shlex.join(["dbscale", *sys.argv[1:]])
    print(f"stopped ({stop.reason}) with {done}/{len(plan.cells)} cells done; unfinished cells resume from their last "
          f"checkpoint:\n  {command}", file=sys.stderr)  # fmt: skip
    return STOPPED


def unfinished(store: Store, plan: Plan) -> dict[str, Standing]:
    """The cells without a row, with how each stands."""
    found = store.standings([cell.key for cell in plan.cells])
    return {key: standing for key, standing in found.items() if standing.state != "done"}


def finish(study: Study, plan: Plan, *, report: bool) -> int:
    """Say which cells are missing and why, reduce and report; 3 when a cell is missing."""
    missing, total = unfinished(study.store, plan), len(plan.cells)
    for key, standing in list(missing.items())[:MAX_NAMED]:
        print(f"{standing.state}: {key}: {standing.reason}", file=sys.stderr)
    if missing:
        print(f"{len(missing)} of {total} cells did not finish; `dbscale status` names them with their logs, and the "
              "same command tries them again", file=sys.stderr)  # fmt: skip
    else:
        print(f"grid {study.grid.name}: {f'all {total} cells are done' if total else 'no cell was run'}")
    if not report:
        print(f"{total - len(missing)} of {total} cells are done; `dbscale report` fits and draws them")
    elif report_is_current(study.store, study.grid.name, [cell.key for cell in plan.cells]):
        print(f"the report is up to date: {report_path(study)}")
    else:
        started = time.monotonic()
        path, answers = write_results(study.store, study.grid.name)
        print("\n".join(answers))
        print(f"reduced and reported in {duration(time.monotonic() - started)}: {path}")
    return SOME_FAILED if missing else 0
