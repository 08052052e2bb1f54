"""Hand a plan to SLURM: one array per wave and resource shape, cut at the cluster's limit, and a reducer at the end.

Submits only what is neither done nor waiting nor running; a record is written before and after each call.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from dbscale.study.cost import CostModel
from dbscale.study.plan import Plan
from dbscale.study.recipe import Stage
from launch.cluster import Shape
from launch.schedule import Task, tasks_of
from launch.slurm import queue as slurm
from launch.slurm.job import SlurmBundle
from launch.slurm.records import (
    SubmitRecord,
    active_cells,
    active_jobs,
    forget,
    jobs_dir,
    make_uid,
    read_all_records,
    read_records,
    write_record,
)
from launch.slurm.reducer import ReduceJob
from launch.slurm.script import check_path, parameters, python_command, render
from launch.study import Study

ENDING_WAIT_S = 90.0
"""Longer than SLURM leaves a job between TERM and KILL (30 s, as it comes)."""


@dataclass(frozen=True)
class Queued:
    """What SLURM holds before anything new is submitted."""

    cells: Mapping[str, slurm.Element]
    """Of any grid of the store."""
    jobs: Mapping[int, SubmitRecord]
    """Of this grid."""

    @property
    def reducers(self) -> list[int]:
        return [job for job, record in self.jobs.items() if record.kind == "reduce"]

    def will_be_reduced(self, keys: Collection[str]) -> bool:
        """Whether a reducer comes after all of `keys` that wait or run; not so when a login node died before
        submitting it."""
        arrays = {self.cells[key].array for key in keys if key in self.cells}
        return any(arrays <= set(self.jobs[job].after) for job in self.reducers)


def look_at_queue(study: Study) -> Queued:
    """What SLURM holds. Arrays whose submission was cut off are cancelled first: their elements may lack their work."""
    for record in read_records(study.store, study.grid.name):
        if record.job is None:
            slurm.cancel_by_name(record.job_name)
            forget(study.store, record)
    return wait_for_ending(study)


def wait_for_ending(study: Study) -> Queued:
    """The queue once no job is about to leave it: of one that ends with cells undone only its end shows whether it
    was cancelled or comes back."""
    deadline, told = time.monotonic() + ENDING_WAIT_S, False
    while True:
        queued = peek_at_queue(study)
        ending = {key for key, element in queued.cells.items() if element.state == "COMPLETING"}
        undone = sum(state != "done" for state in study.store.states(ending).values())
        if not undone or time.monotonic() > deadline:
            return queued
        if not told:
            print(f"waiting for jobs that are ending, with {undone} cells undone", flush=True)
            told = True
        time.sleep(1)


def peek_at_queue(study: Study) -> Queued:
    """The same look, changing nothing."""
    records, queue = read_all_records(study.store), slurm.read_queue()
    own = [record for record in records if record.grid == study.grid.name]
    return Queued(active_cells(records, queue), active_jobs(own, queue))


@dataclass
class Submission:
    """Submits one plan; `job_of` grows as arrays are accepted."""

    study: Study
    plan: Plan
    cost: CostModel
    queued: Queued
    job_of: dict[str, int] = field(default_factory=dict)
    """Array of each cell that waits or runs."""
    records: list[SubmitRecord] = field(default_factory=list)

    def run(self) -> list[SubmitRecord]:
        """Submit all arrays and the reducer; returns their records."""
        check_path(self.study.store.root, "the store")
        waiting = self.queued.cells
        self.job_of.update({cell.key: waiting[cell.key].array for cell in self.plan.cells if cell.key in waiting})
        tasks = tasks_of(self.plan, self.cost, self.study.cluster.shape_key)
        for part in arrays(tasks, self.study.cluster.shape_key, slurm.max_array_size()):
            self._submit_array(part)
        self._submit_reducer()
        return self.records

    def _submit_array(self, tasks: Sequence[Task]) -> None:
        after = sorted({self.job_of[key] for task in tasks for key in task.parents if key in self.job_of})
        record = self._record("bundles", tasks, after)
        shape = self.study.cluster.shape(tasks[0].stage)
        bundles = [self._bundle(record, index, task, shape) for index, task in enumerate(tasks)]
        job = self._submit(record, shape, bundles)
        self.job_of.update({key: job for task in tasks for key in task.keys})

    def _submit_reducer(self) -> None:
        """After every cell that waits or runs; an older reducer that still waits would come too early."""
        after = sorted(set(self.job_of.values()))
        record = self._record("reduce", (), after)
        self._submit(record, self.study.cluster.reducer_shape(), [ReduceJob(str(self._root), self.study.grid.name)])
        slurm.cancel_jobs(self.queued.reducers)

    def _record(self, kind: str, tasks: Sequence[Task], after: Sequence[int]) -> SubmitRecord:
        return SubmitRecord(
            uid=make_uid(), grid=self.study.grid.name, kind="reduce" if kind == "reduce" else "bundles",
            wave=tasks[0].wave if tasks else 0, stage=tasks[0].stage if tasks else None, created=time.time(),
            elements=tuple(task.keys for task in tasks), predicted_s=tuple(task.predicted_s for task in tasks),
            after=tuple(after),
        )  # fmt: skip

    def _bundle(self, record: SubmitRecord, index: int, task: Task, shape: Shape) -> SlurmBundle:
        return SlurmBundle(
            keys=task.keys, store=str(self._root), data=str(self.study.data_dir.absolute()), resources=shape.resources,
            staging=shape.slurm.staging, requeue_limit=self.study.cluster.requeue_limit,
            fence=str(jobs_dir(self.study.store, record) / f"{index}.fence"),
        )  # fmt: skip

    def _submit(self, record: SubmitRecord, shape: Shape, work: Sequence[SlurmBundle | ReduceJob]) -> int:
        write_record(self.study.store, record)
        folder, limit = jobs_dir(self.study.store, record), self.study.cluster.requeue_limit
        executor = submitit.SlurmExecutor(folder, python=python_command())
        executor.update_parameters(
            **parameters(shape, folder=folder, name=record.job_name, requeue_limit=limit, after=record.after)
        )
        try:
            jobs = executor.submit_array(work)
        except FailedJobError as error:
            self._take_back(record)
            said = str(error).strip().splitlines()[-1]
            raise slurm.SlurmError(
                f"sbatch refused {len(work)} jobs for partition {shape.slurm.partition}: {said}; mend the cluster file "
                "and submit again, what was accepted before stays queued"
            ) from None
        job = int(jobs[0].job_id.partition("_")[0])
        done = record.model_copy(update={"job": job})
        write_record(self.study.store, done)
        self.records.append(done)
        return job

    def _take_back(self, record: SubmitRecord) -> None:
        """An sbatch that timed out may have succeeded all the same."""
        with contextlib.suppress(slurm.SlurmError):
            slurm.cancel_by_name(record.job_name)
            forget(self.study.store, record)

    @property
    def _root(self) -> Path:
        return self.study.store.root.absolute()


def arrays(tasks: Sequence[Task], shape_of: Callable[[Stage], str], max_size: int) -> Iterator[tuple[Task, ...]]:
    """Tasks of one wave and shape together (`tasks_of` has put them side by side), at most `max_size` at a time."""
    for _, group in itertools.groupby(tasks, key=lambda task: (task.wave, shape_of(task.stage))):
        together = tuple(group)
        for start in range(0, len(together), max_size):
            yield together[start : start + max_size]


def dry_run(study: Study, plan: Plan, cost: CostModel, active: Collection[str], max_size: int) -> Iterator[str]:
    """The exact scripts, in order, beside the `active` cells that wait or run already; ids of arrays to wait for,
    which are not known before submission, read as 0."""
    cluster = study.cluster
    tasks = tasks_of(plan, cost, cluster.shape_key)
    folder = check_path(study.store.grid_dir(study.grid.name), "the store") / "jobs" / "UID"
    coming = {*active, *(key for task in tasks for key in task.keys)}

    def script(shape: Shape, num_elements: int, *, waits: bool) -> str:
        name, after = f"dbscale-{study.grid.name}-UID", [0] if waits else []
        values = parameters(shape, folder=folder, name=name, requeue_limit=cluster.requeue_limit, after=after)
        return render(folder, values, num_elements)

    for part in arrays(tasks, cluster.shape_key, max_size):
        yield script(cluster.shape(part[0].stage), len(part), waits=any(task.parents & coming for task in part))
    yield script(cluster.reducer_shape(), 1, waits=bool(coming))
