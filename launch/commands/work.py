"""`dbscale work`: one worker of a grid, for any scheduler that can start a command.

It takes a ready bundle, runs what nobody else runs, and repeats until nothing is left; then one of the workers reduces.
Any number may come, die and return: whatever a worker knows it reads from the store. A lease on each cell keeps workers
apart (`dbscale.launch.lease`), on one machine the cell's own lock as well; bundles are only where each worker begins.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from uuid import uuid4

from dbscale.errors import ConfigError
from dbscale.files import locked, make_folder
from dbscale.launch.cluster import Task, tasks_of
from dbscale.launch.commands.submit import SOME_FAILED, STOPPED, finish, pack_missing, unfinished, write_records
from dbscale.launch.lease import LEASE_NAME, LIMIT_S, Leases
from dbscale.launch.preflight import check
from dbscale.launch.study import AddCommand, Study, add_run, plan_study, refuse_hunted, study_of
from dbscale.launch.worker import (
    Result,
    RunOne,
    cause_of_death,
    record_death,
    run_bundle,
    staged,
    stop_on_signals,
    thread_environment,
)
from dbscale.study.plan import Plan
from dbscale.study.resources import StopRequest
from dbscale.study.store import Attempt, Store

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0
"""Between two looks at the store when nothing is ready."""
AVOID_S = 3.0
"""A cell that was not to be had is left alone for so long."""
MOST_DEATHS = 8
"""A cell in which a process died so often in a row, at the same step, is given up: it would kill every worker."""


def add_commands(add: AddCommand) -> None:
    parser = add("work", run, "run whatever a grid has ready, beside any number of such workers, until nothing is left")
    add_run(parser, smoke=False)
    parser.add_argument("--lease", type=float, default=LIMIT_S, metavar="SECONDS",
                        help=f"a worker of another machine that is silent for so long has lost its cell; the same for "
                        f"all workers (default: {LIMIT_S:.0f})")  # fmt: skip
    parser.add_argument("--retry", action="store_true", help="also try cells that had failed before this worker came")


def run(arguments: argparse.Namespace) -> int:
    """0 when all cells are done, 3 when some failed, 130 when asked to stop, with all progress saved."""
    study = study_of(arguments)
    refuse_hunted(study, "work")
    resources = study.cluster.resources
    if study.cluster.executor == "slurm" or resources.num_processes > 1:
        what = f"executor {study.cluster.executor}, resources.num_processes {resources.num_processes}"
        raise ConfigError(f"a worker runs its cells in its own process, but the cluster file has {what}; use --cluster "
                          "local and start one worker for each GPU")  # fmt: skip
    os.environ.update(thread_environment(resources))
    study, stop = pack_in_turn(study), StopRequest()
    with stop_on_signals(stop):
        worker = Worker(study, stop, Leases(arguments.lease), retry=arguments.retry)
        plan = worker.run()
        if stop.requested:
            left = len(unfinished(study.store, plan))
            print(f"stopped ({stop.reason}) with {left} cells left; start the command again to go on", file=sys.stderr)
            return STOPPED
        return reduce_once(study, plan, worker.leases, stop, report=not arguments.no_report)


def pack_in_turn(study: Study) -> Study:
    """Pack and import what is missing; of several workers that come at once on one file system one does it, and the
    others wait."""
    while study.missing_datasets or study.missing_weights:
        make_folder(study.data_dir)
        with locked(study.data_dir / ".pack.lock") as held:
            if held:
                return pack_missing(study)
        time.sleep(1)
        study = replace(study)  # manifests are read once per study
    return study


def reduce_once(study: Study, plan: Plan, leases: Leases, stop: StopRequest, *, report: bool) -> int:
    """Reduce and report, unless another worker is at it."""
    folder = study.store.grid_dir(study.grid.name)
    with leases.hold(folder / LEASE_NAME, stop.ask) as held:
        if held:
            return finish(study, plan, report=report)
    missing = unfinished(study.store, plan)
    print(f"{len(plan.cells) - len(missing)} of {len(plan.cells)} cells are done; another worker reduces")
    return SOME_FAILED if missing else 0


@dataclass
class Worker:
    """One worker's view of a grid."""

    study: Study
    stop: StopRequest
    leases: Leases
    retry: bool = False
    name: str = field(default_factory=lambda: uuid4().hex)
    """Decides where among the ready bundles it begins."""
    started: float = field(default_factory=time.time)
    avoided: dict[str, float] = field(default_factory=dict)
    """Cells that were not to be had, with the (monotonic) time until which they are left alone."""

    @property
    def store(self) -> Store:
        return self.study.store

    def run(self) -> Plan:
        """Work until nothing is left for anybody, or until asked to stop; returns the plan as last seen.

        Raises ConfigError for what is known to fail before anything is trained.
        """
        plan, cost = plan_study(self.study)
        check(self.study, plan).refuse()
        write_records(self.study, plan, cost)
        wait_s = FIRST_WAIT_S
        while not self.stop.requested:
            todo = list(self.ready(plan, tasks_of(plan, cost, self.study.cluster)))
            task = min(todo, key=self._rank, default=None)
            if task is not None:
                self._work_on(task)
                wait_s = FIRST_WAIT_S
            elif plan.count()["running"] or self.avoided:
                # Somebody else is at it; if that worker dies, its cell falls to those who are still here.
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            else:
                break
            plan, cost = plan_study(self.study)
        return plan

    def ready(self, plan: Plan, tasks: tuple[Task, ...]) -> Iterator[Task]:
        """What each task holds that can run now: parents are done, or come before it in the task."""
        parents = {cell.key: tuple(parent.key for parent in cell.parents) for cell in plan.cells}
        now = time.monotonic()
        self.avoided = {key: until for key, until in self.avoided.items() if until > now}
        for task in tasks:
            found: list[str] = []
            for key in task.keys:
                settled = all(plan.states[parent] == "done" or parent in found for parent in parents[key])
                if settled and key not in self.avoided and self._is_open(key, plan.states):
                    found.append(key)
            if found:
                yield replace(task, keys=tuple(found))

    def _is_open(self, key: str, states: Mapping[str, str]) -> bool:
        """Whether anybody should still try the cell: a failure stands, unless it was the machine's."""
        if states[key] != "failed":
            return True
        attempts = self.store.attempts(key)
        last = attempts[-1]
        if self.retry and (last.ended or 0) < self.started:
            return True
        passing = sum(each.failure is not None and each.failure.passes for each in attempts)
        return last.failure is not None and last.failure.passes and passing <= self.study.cluster.requeue_limit

    def _rank(self, task: Task) -> tuple[int, str]:
        """Upstream runs first; then in an order of this worker's own, so that many begin at different bundles."""
        return task.wave, hashlib.sha256(f"{self.name} {task.keys[0]}".encode()).hexdigest()

    def _work_on(self, task: Task) -> None:
        shape = self.study.cluster.shape(task.stage)
        with staged(task.keys, self.store, self.study.data_dir, shape.slurm.staging, self.stop) as data_dir:
            results = run_bundle(task.keys, self.store, data_dir, shape.resources, self.stop, around=self._leased)
        for result in results:
            if result.status != "done":
                self.avoided[result.key] = time.monotonic() + AVOID_S

    def _leased(self, run_one: RunOne, key: str) -> Result:
        """Run a cell under its lease, or say that another worker has it."""
        with self.leases.hold(self.store.cell_dir(key) / LEASE_NAME, self.stop.ask) as held:
            if not held:
                return Result(key, "busy")
            deaths = deaths_in_a_row(self.store.attempts(key))
            if deaths < MOST_DEATHS:
                return run_one(key)
            reason = f"its process died {deaths} times in a row at the same step {cause_of_death(self.store)}"
            record_death(self.store, key, reason, None)
            return Result(key, "failed", reason)


def deaths_in_a_row(attempts: list[Attempt]) -> int:
    """Last attempts whose process ended without a word, and that began at the same step."""
    count = 0
    for attempt in reversed(attempts):
        silent = attempt.status == "running" or (attempt.status == "interrupted" and attempt.reason == "killed")
        if not silent or attempt.resumed_from_step != attempts[-1].resumed_from_step:
            break
        count += 1
    return count
