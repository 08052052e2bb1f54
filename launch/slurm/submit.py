"""Hand a plan to SLURM: one array per wave and resource shape, cut at the cluster's limit, and a reducer at the end.

Submits only what is neither done nor waiting nor running; a record is written before and after each call. The script of
a job opens its log itself, starts one rank per task and asks whether to start again when that fails.
No value of a config reaches a shell unquoted: words are checked by `dbscale.launch.cluster`, paths here. The exception are
the `setup` lines, which are shell by their nature and come from the cluster file alone.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit

from dbscale.launch.cluster import Cluster, Shape, Task, tasks_of
from dbscale.launch.slurm import queue as slurm
from dbscale.launch.slurm.job import SlurmBundle, requeue_lines
from dbscale.launch.slurm.queue import Queued, SlurmError, SubmitRecord
from dbscale.launch.study import Study
from dbscale.launch.submitit_names import FailedJobError, render
from dbscale.launch.worker import thread_environment
from dbscale.study.cost import CostModel
from dbscale.study.plan import Plan

SAFE_PATH = re.compile(r"[\w /.,:+@=~()\[\]-]+")
"""SLURM expands `%` and `\\` in paths and has quoting rules of its own in `#SBATCH` lines; newlines end them."""
ENDING_WAIT_S = 90.0
"""Longer than SLURM leaves a job between TERM and KILL (30 s, as it comes)."""
LOG_TRIES, LOG_WAIT_S = 360, 5
"""Half an hour, as `dbscale.launch.slurm.job` waits for a store; then it uses up a requeue."""
DECIDE_TRIES, DECIDE_WAIT_S = 50, 6
"""Five minutes, for slurmctld may be restarting."""


def settle_queue(study: Study) -> Queued:
    """What SLURM holds once no job is about to leave it: while a job ends with cells undone, nothing tells whether it
    was cancelled or comes back. Arrays whose submission was cut off are cancelled first."""
    slurm.cancel_cut_off(study.store, slurm.read_records(study.store, study.grid.name))
    deadline, told = time.monotonic() + ENDING_WAIT_S, False
    while True:
        queued = slurm.read_queued(study.store, study.grid.name)
        ending = {key for key, element in queued.cells.items() if element.state == "COMPLETING"}
        undone = sum(standing.state != "done" for standing in study.store.standings(ending).values())
        if not undone or time.monotonic() > deadline:
            return queued
        if not told:
            print(f"waiting for jobs that are ending, with {undone} cells undone", flush=True)
            told = True
        time.sleep(1)


@dataclass
class Submission:
    """The submission of one plan."""

    study: Study
    plan: Plan
    cost: CostModel
    queued: Queued
    reduce: Callable[[], object]
    """What the job at the end does."""
    show: Callable[[str], object] | None = None
    """Takes each script instead of SLURM, and nothing is written: a dry run, in which ids of arrays read as 0."""
    behind: frozenset[str] | None = None
    """The cells that the job at the end waits for; None: all that wait or run."""
    max_size: int | None = None
    """Elements one array may have; None asks the cluster."""
    job_of: dict[str, int] = field(default_factory=dict)
    """Array of each cell that waits or runs."""

    def run(self) -> Iterator[SubmitRecord]:
        """Submit all arrays and the reducer, one by one; gives their records. Raises SlurmError."""
        check_path(self.study.store.root, "the store")
        waiting, cluster = self.queued.cells, self.study.cluster
        self.job_of.update({cell.key: waiting[cell.key].array for cell in self.plan.cells if cell.key in waiting})
        max_size = self.max_size or slurm.max_array_size()
        for part in arrays(tasks_of(self.plan, self.cost, cluster), cluster, max_size):
            after = sorted({self.job_of[key] for task in part for key in task.parents if key in self.job_of})
            yield self._submit(cluster.shape(part[0].stage), part, after)
        # After every cell that waits or runs; an older reducer that still waits would come too early.
        last = {job for key, job in self.job_of.items() if self.behind is None or key in self.behind}
        yield self._submit(cluster.reducer_shape(), (), sorted(last))
        if self.show is None:
            slurm.cancel_jobs(self.queued.reducers)

    def _submit(self, shape: Shape, tasks: Sequence[Task], after: Sequence[int]) -> SubmitRecord:
        """One array of `tasks`, or the reducer when there are none."""
        store, limit = self.study.store, self.study.cluster.requeue_limit
        record = SubmitRecord(
            uid=slurm.make_uid(), grid=self.study.grid.name, kind="bundles" if tasks else "reduce",
            wave=tasks[0].wave if tasks else 0, stage=tasks[0].stage if tasks else None, created=time.time(),
            elements=tuple(task.keys for task in tasks), predicted_s=tuple(task.predicted_s for task in tasks),
            after=tuple(after),
        )  # fmt: skip
        folder = record.folder(store)
        values = parameters(shape, folder=folder, name=record.job_name, requeue_limit=limit, after=after)
        if self.show is None:
            slurm.write_record(store, record)
            work = [self._bundle(folder, index, task, shape) for index, task in enumerate(tasks)]
            record = record.model_copy(update={"job": self._call(record, values, work or [self.reduce])})
            slurm.write_record(store, record)
        else:
            self.show(render(folder, python_command(), values, len(tasks)))
        self.job_of.update({key: record.job or 0 for task in tasks for key in task.keys})
        return record

    def _bundle(self, folder: Path, index: int, task: Task, shape: Shape) -> SlurmBundle:
        return SlurmBundle(
            keys=task.keys, store=str(self.study.store.root.absolute()), data=str(self.study.data_dir.absolute()),
            resources=shape.resources, staging=shape.slurm.staging, requeue_limit=self.study.cluster.requeue_limit,
            token=str(folder / f"{index}.fence"),
        )  # fmt: skip

    def _call(self, record: SubmitRecord, values: Mapping[str, Any], work: Sequence[Callable[[], object]]) -> int:
        executor = submitit.SlurmExecutor(record.folder(self.study.store), python=python_command())
        executor.update_parameters(**values)
        try:
            jobs = executor.submit_array(work)
        except FailedJobError as error:
            with contextlib.suppress(SlurmError):  # an sbatch that timed out may have succeeded all the same
                slurm.cancel_cut_off(self.study.store, [record])
            said = str(error).strip().splitlines()[-1]
            raise SlurmError(
                f"sbatch refused {len(work)} jobs for partition {values.get('partition')}: {said}; correct the cluster "
                "file and submit again, what was accepted before stays queued"
            ) from None
        return int(jobs[0].job_id.partition("_")[0])


def arrays(tasks: Sequence[Task], cluster: Cluster, max_size: int) -> Iterator[tuple[Task, ...]]:
    """Tasks of one wave and shape together (`tasks_of` has put them side by side), at most `max_size` at a time."""
    for _, group in itertools.groupby(tasks, key=lambda task: (task.wave, cluster.shape_key(task.stage))):
        together = tuple(group)
        for start in range(0, len(together), max_size):
            yield together[start : start + max_size]


def parameters(
    shape: Shape, *, folder: Path, name: str, requeue_limit: int, after: Sequence[int] = ()
) -> dict[str, Any]:
    """The values that `submitit.SlurmExecutor.update_parameters` takes: one task per rank, logs in `folder`."""
    wanted = shape.slurm
    extra: dict[str, Any] = {"requeue": True, "output": "/dev/null"}  # the log is the script's own business
    if wanted.reservation is not None:
        extra["reservation"] = wanted.reservation
    asked: dict[str, Any] = {
        **{key: getattr(wanted, key) for key in ("partition", "account", "qos", "constraint", "exclude", "nodes",
                                                "cpus_per_task", "signal_delay_s", "array_parallelism")},
        "job_name": name,
        "time": wanted.time_limit_min,
        "ntasks_per_node": shape.tasks_per_node,
        "gpus_per_node": wanted.gpus_per_node or None,
        "mem": None if wanted.memory_gb is None else f"{int(wanted.memory_gb * 1024)}M",
        "dependency": ":".join(["afterany", *map(str, after)]) if after else None,
        "additional_parameters": extra,
        "setup": setup_lines(shape, folder, requeue_limit),
        # From SLURM 22.05 on srun no longer takes the CPUs per task from sbatch.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={wanted.cpus_per_task}"],
        "stderr_to_stdout": True,
    }  # fmt: skip
    return {key: value for key, value in asked.items() if value is not None} | {"wckey": None}


def setup_lines(shape: Shape, folder: Path, requeue_limit: int) -> list[str]:
    """The script's lines before `srun`. The cluster file's own lines may fail in any way, so they come last."""
    exports = {"PYTHONSAFEPATH": "1", **thread_environment(shape.resources)}
    return [
        *requeue_lines(requeue_limit),
        "finish() {",
        f'  [ "$1" -eq 0 ] || for _ in $(seq {DECIDE_TRIES}); do',
        f"    requeue_unless_wished now && break; sleep {DECIDE_WAIT_S}",
        "  done",
        '  exit "$1"',
        "}",
        "trap 'finish $?' EXIT",
        # Opened here, because SLURM gives up a job for good whose log's file system is read-only just then.
        f'log={shlex.quote(str(folder))}/"${{job}}_0_log.out"',
        f'for _ in $(seq {LOG_TRIES}); do {{ : >>"$log"; }} 2>/dev/null && break; sleep {LOG_WAIT_S}; done',
        'exec >>"$log" 2>&1 || exit 74',
        *(f"export {name}={value}" for name, value in exports.items()),
        *shape.slurm.setup,
        # An empty or relative entry is the folder the job was submitted from, whatever PYTHONSAFEPATH says.
        """export PYTHONPATH=$(printf %s "${PYTHONPATH:-}" | tr : '\\n' | grep ^/ | paste -sd:)""",
    ]


def python_command() -> str:
    return shlex.quote(sys.executable)


def check_path(path: Path, what: str) -> None:
    """Raises SlurmError where the absolute path holds characters that mean something to SLURM or a shell."""
    absolute = str(path.absolute())
    if not SAFE_PATH.fullmatch(absolute):
        bad = sorted(set(SAFE_PATH.sub("", absolute)))
        raise SlurmError(f"{what} {absolute!r} holds {bad}, which SLURM or a shell could misread; choose another")
