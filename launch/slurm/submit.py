"""Hand a plan to SLURM: one array per wave and resource shape, cut at the cluster's limit, and a reducer at the end.

Submits only what is neither done nor waiting nor running; a record is written before and after each call. The script of
a job opens its log itself, starts one rank per task and asks whether to start again when that fails. What a job runs is a
command line, which SLURM keeps; no file of the store is executed.
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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dbscale.files import make_folder
from dbscale.launch import sbatch_options
from dbscale.launch.cluster import Cluster, Shape, Task
from dbscale.launch.slurm import queue as slurm
from dbscale.launch.slurm.job import Work, requeue_lines
from dbscale.launch.slurm.queue import Queued, SlurmError, SubmitRecord, Uid
from dbscale.launch.submitit_names import REFUSALS, render, submit_array
from dbscale.launch.worker import thread_environment
from dbscale.strict import Strict
from dbscale.study.cost import STAGES
from dbscale.study.grid import Name
from dbscale.study.store import Store

SAFE_PATH = re.compile(r"[\w /.,:+@=~()\[\]-]+")
"""SLURM expands `%` and `\\` in paths and has quoting rules of its own in `#SBATCH` lines; newlines end them."""
ENDING_WAIT_S = 300.0
"""Ten times what SLURM leaves a job between TERM and KILL (30 s, as it comes), for busy nodes end late."""
LOG_TRIES, LOG_WAIT_S = 360, 5
"""Half an hour, as `dbscale.launch.slurm.job` waits for a store; then it uses up a requeue."""
DECIDE_TRIES, DECIDE_WAIT_S = 50, 6
"""Five minutes, for slurmctld may be restarting."""


class ReduceWork(Strict):
    """What the last job of a grid needs: to reduce, and to hand in again what was lost on the way."""

    store: str
    grid: Name
    uid: Uid
    data: str
    cluster: Cluster
    """In SLURM's copy of the script, for it holds lines of shell, and what is in the store may not run."""
    hand_ins: int
    """How often reducers have handed in again since `dbscale submit`."""


def check_options(cluster: Cluster) -> None:
    """Raises ConfigError for a name under `slurm.sbatch` that this machine's `sbatch` (without one: SLURM's) lacks."""
    shapes = [*(cluster.shape(stage) for stage in STAGES), cluster.reducer_shape()]
    names = sorted({name for shape in shapes for name in shape.slurm.sbatch})
    if names:
        try:
            known, where = sbatch_options.names_in(slurm.call(["sbatch", "--help"])), "sbatch on this machine"
        except SlurmError:
            known, where = sbatch_options.KNOWN, "sbatch"
        sbatch_options.check_names(names, known, where=where)


def settle_queue(store: Store, grid: str, without: str | None = None) -> Queued:
    """What SLURM holds once no job is about to leave it: while a job ends with cells undone, nothing tells whether it
    was cancelled or comes back. Arrays whose submission was cut off are cancelled first.

    The job that asks leaves out its own record, whose uid is `without`.
    """
    slurm.cancel_cut_off(store, slurm.read_records(store, grid))
    deadline, told = time.monotonic() + ENDING_WAIT_S, False
    while True:
        found = slurm.read_queued(store, grid)
        queued = replace(found, records=tuple(record for record in found.records if record.uid != without))
        ending = {key for key, element in queued.cells.items() if element.state == "COMPLETING"}
        undone = sum(standing.state != "done" for standing in store.standings(ending).values())
        if not undone:
            return queued
        if time.monotonic() > deadline:
            print(f"{undone} cells are taken for running, though their jobs are still ending; if these were cancelled, "
                  "submit again once `squeue` no longer shows them", flush=True)  # fmt: skip
            return queued
        if not told:
            print(f"waiting for jobs that are ending, with {undone} cells undone", flush=True)
            told = True
        time.sleep(1)


@dataclass
class Submission:
    """The submission of what a grid has left."""

    store: Store
    grid: str
    data_dir: Path
    cluster: Cluster
    queued: Queued
    hand_ins: int = 0
    """How often reducers have handed in again before."""
    after: int | None = None
    """A job that the reducer waits for beside the arrays."""
    show: Callable[[str], object] | None = None
    """Takes each script instead of SLURM, and nothing is written: a dry run, in which ids of arrays read as 0."""
    behind: frozenset[str] | None = None
    """The cells that the job at the end waits for; None: all that wait or run."""
    last: Callable[[SubmitRecord], str] | None = None
    """Command line of the job at the end; None: the reducer's."""
    max_size: int | None = None
    """Elements one array may have; None asks the cluster."""
    job_of: dict[str, int] = field(default_factory=dict)
    """Array of each cell that waits or runs."""

    def run(self, tasks: Sequence[Task], keys: Collection[str]) -> Iterator[SubmitRecord]:
        """Submit `tasks` and a reducer after all of the grid's `keys` that wait or run; gives the records, one by one.

        Raises SlurmError.
        """
        check_path(self.store.root, "the store")
        waiting = self.queued.cells
        self.job_of.update({key: waiting[key].array for key in keys if key in waiting})
        limit = self.max_size or slurm.max_array_size()
        for shape, part in arrays(tasks, self.cluster, limit):
            after = sorted({self.job_of[key] for task in part for key in task.parents if key in self.job_of})
            yield self._submit(shape, part, after)
        # An older reducer that still waits would come too early.
        own = set() if self.after is None else {self.after}
        waited = {job for key, job in self.job_of.items() if self.behind is None or key in self.behind}
        yield self._submit(self.cluster.reducer_shape(), (), sorted({*waited, *own}))
        if self.show is None:
            slurm.cancel_jobs(self.queued.reducers)

    def _submit(self, shape: Shape, tasks: Sequence[Task], after: Sequence[int]) -> SubmitRecord:
        """One array of `tasks`, or the reducer when there are none."""
        record = SubmitRecord(
            uid=slurm.make_uid(), grid=self.grid, kind="bundles" if tasks else "reduce",
            wave=tasks[0].wave if tasks else 0, stage=tasks[0].stage if tasks else None, created=time.time(),
            elements=tuple(task.keys for task in tasks), predicted_s=tuple(task.predicted_s for task in tasks),
            after=tuple(after),
        )  # fmt: skip
        folder, count = record.folder(self.store), max(1, len(tasks))
        values = parameters(
            shape, folder=folder, name=record.job_name, requeue_limit=self.cluster.requeue_limit, after=after
        )
        command = self._command(record, shape)
        if self.show is None:
            make_folder(folder, private=True)
            slurm.write_record(self.store, record)
            record = record.model_copy(update={"job": self._call(record, command, values, count)})
            slurm.write_record(self.store, record)
        else:
            self.show(render(folder, command, values, count))
        self.job_of.update({key: record.job or 0 for task in tasks for key in task.keys})
        return record

    def _command(self, record: SubmitRecord, shape: Shape) -> str:
        """What each rank runs, as the script writes it."""
        common = {"store": str(self.store.root.absolute()), "grid": self.grid, "uid": record.uid,
                  "data": str(self.data_dir.absolute())}  # fmt: skip
        if record.kind == "reduce" and self.last is not None:
            return self.last(record)
        if record.kind == "reduce":
            work: BaseModel = ReduceWork(**common, cluster=self.cluster, hand_ins=self.hand_ins)
            return python_command("dbscale.launch.slurm.reducer", work)
        work = Work(
            **common, resources=shape.resources, staging=shape.slurm.staging, requeue_limit=self.cluster.requeue_limit
        )
        return python_command("dbscale.launch.slurm.job", work)

    def _call(self, record: SubmitRecord, command: str, values: dict[str, Any], count: int) -> int:
        try:
            return submit_array(record.folder(self.store), command, values, count)
        except REFUSALS as error:
            with contextlib.suppress(SlurmError):  # an sbatch that timed out may have succeeded all the same
                slurm.cancel_cut_off(self.store, [record])
            said = " ".join(str(error).split()) or "no reason given"
            raise SlurmError(
                f"sbatch refused {count} jobs for partition {values.get('partition')}: {said}; correct the cluster "
                "file and submit again, what was accepted before stays queued"
            ) from None


def arrays(tasks: Sequence[Task], cluster: Cluster, limit: int) -> Iterator[tuple[Shape, tuple[Task, ...]]]:
    """Tasks of one wave and shape together (`tasks_of` has put them side by side), cut at the cluster's and the file's
    limit."""
    for _, group in itertools.groupby(tasks, key=lambda task: (task.wave, cluster.shape_key(task.stage))):
        together = tuple(group)
        shape = cluster.shape(together[0].stage)
        size = min(limit, shape.slurm.array_limit or limit)
        for start in range(0, len(together), size):
            yield shape, together[start : start + size]


def parameters(
    shape: Shape, *, folder: Path, name: str, requeue_limit: int, after: Sequence[int] = ()
) -> dict[str, Any]:
    """The values that `submitit.SlurmExecutor.update_parameters` takes: one task per rank, logs in `folder`."""
    wanted = shape.slurm
    extra = {name: getattr(wanted, name) for name in ("reservation", "licenses")}
    extra = {name: value for name, value in extra.items() if value is not None} | wanted.sbatch
    extra |= {"requeue": True, "output": "/dev/null"}  # the log is the script's own business
    asked: dict[str, Any] = {
        **{key: getattr(wanted, key) for key in ("partition", "account", "qos", "constraint", "exclude", "gres", "nodes",
                                                "cpus_per_task", "signal_delay_s", "array_parallelism")},
        "job_name": name,
        "time": wanted.time_limit_min,
        "ntasks_per_node": shape.tasks_per_node,
        "gpus_per_node": None if wanted.gres_gpus else wanted.gpus_per_node or None,
        "mem": None if wanted.memory_gb is None else f"{int(wanted.memory_gb * 1024)}M",
        "mem_per_cpu": None if wanted.memory_per_cpu_gb is None else f"{int(wanted.memory_per_cpu_gb * 1024)}M",
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


def python_command(module: str, work: BaseModel) -> str:
    """`python -m MODULE WORK` as a shell reads it."""
    return shlex.join([sys.executable, "-u", "-m", module, work.model_dump_json()])


def check_path(path: Path, what: str) -> None:
    """Raises SlurmError where the absolute path holds characters that mean something to SLURM or a shell."""
    absolute = str(path.absolute())
    if not SAFE_PATH.fullmatch(absolute):
        bad = sorted(set(SAFE_PATH.sub("", absolute)))
        raise SlurmError(f"{what} {absolute!r} holds {bad}, which SLURM or a shell could misread; choose another")
