"""Inside a SLURM job: one bundle, one task per rank, through warnings, preemption, lost ranks and a store that is away.

`python -m dbscale.launch.slurm.job WORK` is what the script of an array runs on every rank. WORK is JSON in SLURM's copy
of the script; of the store's files only the record of the submission is read, which says which cells are whose. USR2 (time
limit, preemption with notice) and TERM both save and end the job with RETRY_EXIT. Whether the job starts again is decided
in one place, the shell function of `requeue_lines`. Training is `dbscale.launch.worker`'s and `dbscale.training`'s.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment

from dbscale.errors import FileError, log_to_stderr
from dbscale.files import atomic_open, write_atomic
from dbscale.launch import worker
from dbscale.launch.slurm.queue import SubmitRecord, Uid, read_record, records_dir
from dbscale.launch.submitit_names import log_of_job
from dbscale.launch.worker import LOST_EXIT, Rank, Result, RunOne
from dbscale.strict import Strict
from dbscale.study.grid import Name
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Failure, Store, failure_of

RETRY_EXIT, OVERTAKEN_EXIT = 75, 81
END_WAIT_S = 60.0
"""How long a rank waits, all saved, for SLURM's reason to end the job; ranks but 0 for rank 0, which saves last, because
the first that ends takes the others with it."""
FIRST_INTERVALS_S, DECIDE_INTERVAL_S = (0.5, 1.0), 2.0
"""Between questions whether to start again: first short ones, for ranks whose script is dead have 3.9 s where SLURM's
KillWait is 3 s, and a question takes up to 0.9 s on a busy machine (docs/reliability)."""
TRIES, BUSY_WAIT_S = 60, 5.0
"""At a cell held by a process of an earlier start, which ends itself within seconds, or by a store that is full."""
STORE_WAIT_S, PROBE_INTERVAL_S = 1800.0, 2.0
"""How long a job waits for a file system that is full or read-only, before it uses up a requeue."""
RECORD_WAIT_S = 30.0
UNWANTED = ("TimeLimit", "NonZeroExitCode", "RaisedSignal", "JobLaunchFailure", "NodeDown", "OutOfMemory")
"""SLURM's reasons for ending a job that nobody wished to end; a cancelled or preempted one has none of them."""


def requeue_lines(limit: int) -> list[str]:
    """Shell lines that define `requeue_unless_wished`: the one place that decides whether a job is started again.

    The job's script asks `requeue_unless_wished now` once something in it has failed. Rank 0 asks
    `requeue_unless_wished later` while SLURM ends the job around it, for the script's shell may be dead. A job is
    requeued at most `limit` times, and never one that is being cancelled, that SLURM starts again itself, or that was
    started again since: SLURM's state and reason tell. (A controller that lost its last seconds knows of fewer starts
    than there were.) The answer is 0 when all is decided, 1 when it must be asked again, for slurmctld is away or has no
    reason yet, and (later) 2 while the job still runs. In shell, because that works where Python is broken.
    """
    unwanted = "|".join(f'*" {reason}"*' for reason in UNWANTED)
    return [
        # One element of every array has the array's number as its raw id, which alone would mean the whole array.
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        "requeue_unless_wished() {",
        f'  [ "${{SLURM_RESTART_COUNT:-0}}" -lt {int(limit)} ] || return 0',
        '  said=$(squeue --noheader --jobs="$job" --states=all --Format=RestartCnt:10,State:20,Reason:40) || return 1',
        '  set -- "$1" $said',
        '  [ "$2" -le "${SLURM_RESTART_COUNT:-0}" ] || return 0',
        '  case "$3 $4" in',
        '    "RUNNING "*) [ "$1" = now ] || return 2 ;;',
        "    CANCELLED*|PREEMPTED*|PENDING*) return 0 ;;",
        f"    {unwanted}) ;;",
        '    *) [ "$1" = now ]; return ;;',
        "  esac",
        '  scontrol requeue "$job"',
        "}",
    ]


def ask_later(limit: int) -> int:
    """The answer of `requeue_unless_wished later`."""
    question = "\n".join([*requeue_lines(limit), "requeue_unless_wished later"])
    return subprocess.run(["bash", "-c", question], check=False).returncode


@dataclass(frozen=True)
class JobIdentity:
    """This job as SLURM numbers it."""

    name: str
    """`123_4` for element 4 of array 123."""
    raw: str
    """SLURM's own number, another one for each element."""
    restart: int

    @classmethod
    def of_job(cls) -> JobIdentity:
        job = JobEnvironment()
        return cls(job.job_id, job.raw_job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0")))

    def __str__(self) -> str:
        """The name that attempts of this start carry."""
        return f"{self.name}.{self.restart}"


@dataclass
class Fence:
    """Only the newest start of a job, and the newest job at a cell, may write; an older process ends at once.

    SLURM counts the starts of a job; each writes its count beside the job's log, and every rank of an older one that
    reads a newer count ends. A process that outlived its node's failure may belong to a job that was given up
    altogether, with its cell in another job's hands: attempts, numbered and signed with their job, tell.
    """

    token: Path
    job: JobIdentity
    store: Store
    key: str | None = None
    """The cell at work; None between cells."""

    def raise_token(self) -> None:
        """Declare this start the newest; by rank 0, before anything else is written. A process that was frozen until
        a later start had done so ends instead."""
        self.check()
        with atomic_open(self.token, "w") as file:
            file.write(f"{self.job.restart}\n")

    def overtaken(self) -> str | None:
        """Why this process must end; None while it may continue, or where a file cannot be read."""
        with contextlib.suppress(OSError, ValueError):
            if int(self.token.read_text()) > self.job.restart:
                return f"superseded by a later start of this job (restart > {self.job.restart})"
        key = self.key  # the main thread may come to another cell meanwhile
        last = self.store.last_attempt(key) if key is not None else None
        if key is None or last is None or last.job == str(self.job) or last.pid == 0:
            return None
        # Before this job's own attempt is there, the last one is an older job's.
        own = str(self.job) in [each.job for each in self.store.attempts(key)]
        return f"cell {key} is in the hands of another job by now" if own else None

    def check(self) -> None:
        """End this process at once if it was overtaken: no handler runs, no buffer reaches the store."""
        reason = self.overtaken()
        if reason is not None:
            print(reason, file=sys.stderr, flush=True)
            os._exit(OVERTAKEN_EXIT)


class Work(Strict):
    """What the elements of an array share: ids, paths and how to run."""

    store: str
    grid: Name
    uid: Uid
    """Name of the submission, whose record holds each element's cells."""
    data: str
    resources: Resources
    staging: str | None = None
    requeue_limit: int


def main(words: Sequence[str]) -> None:
    """Run the cells of this element. The store then says what became of them."""
    work, stop = Work.model_validate_json(words[0]), StopRequest()
    with worker.stop_on_signals(stop):
        record = record_of(work)
        if record is not None:
            run_element(work, record, stop)


def record_of(work: Work) -> SubmitRecord | None:
    """None, with the reason on stderr, where no further start of this job could do anything: a later `dbscale submit`
    has withdrawn the submission, or the record is damaged. Raises FileError where the store is away just now."""
    store = Store(Path(work.store))
    try:
        return read_record(store, work.grid, work.uid)
    except FileNotFoundError:
        if not records_dir(store, work.grid).is_dir():
            raise FileError(f"the store {work.store} is not to be seen on {socket.gethostname()}") from None
        reason = f"submission {work.uid} was cut off and withdrawn"
    except FileError as error:
        if failure_of(error).passes:
            raise
        reason = str(error)
    print(f"{reason}: nothing to do", file=sys.stderr, flush=True)
    return None


def run_element(work: Work, record: SubmitRecord, stop: StopRequest) -> None:
    """Run the cells that this element of the array has, and end the process with RETRY_EXIT when asked to stop."""
    job, rank, store = JobIdentity.of_job(), Rank.of_job(), Store(Path(work.store))
    folder, index = record.folder(store), int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    fence, log = Fence(folder / f"{index}.fence", job, store), log_of_job(folder)
    if rank.rank == 0:
        write_patiently(fence.raise_token, stop)
        # The main thread may be in the middle of an evaluation, or saving; SLURM kills it all the same.
        threading.Thread(target=decide_when_stopped, args=(stop, work.requeue_limit), daemon=True).start()
    worker.watch(fence.check)
    os.environ.update(rank.environment(master=master_address(), port=worker.port_of_job(job.raw, job.restart)))
    keys = [key for key in record.elements[index] if not failed_in_this_job(store, key, job)]
    attempts = CellRuns(store, rank, stop, fence, log)
    with worker.staged(keys, store, Path(work.data), work.staging, stop) as data_dir:
        worker.run_bundle(
            keys, store, data_dir, work.resources, stop, job=str(job), log=log, around=attempts.run,
            second_turns=rank.world_size == 1,
        )  # fmt: skip
    if stop.requested:
        deadline = time.monotonic() + END_WAIT_S
        while time.monotonic() < deadline and (rank.rank or ask_later(work.requeue_limit) == 1):
            time.sleep(DECIDE_INTERVAL_S)
        sys.exit(RETRY_EXIT)


def decide_when_stopped(stop: StopRequest, limit: int) -> None:
    """Ask from the moment a stop is asked for until all is decided."""
    stop.wait()
    for pause_s in itertools.chain(FIRST_INTERVALS_S, itertools.repeat(DECIDE_INTERVAL_S)):
        if ask_later(limit) == 0:
            return
        time.sleep(pause_s)


@dataclass(frozen=True)
class CellRuns:
    """Runs the cells of a job and deals with outcomes that are not a cell's own doing."""

    store: Store
    rank: Rank
    stop: StopRequest
    fence: Fence
    log: str

    def run(self, run_one: RunOne, key: str) -> Result:
        """Run a cell, again while an older process holds it or the store cannot be written to; end the job when the
        machine failed otherwise."""
        self.fence.key, probe = key, self.store.cell_dir(key) / ".probe"
        result = run_one(key)
        for _ in range(TRIES):
            if result.status == "busy" and not self.stop.requested:
                time.sleep(BUSY_WAIT_S)
            elif result.failure is Failure.STORAGE and self.rank.world_size == 1 and not self.stop.requested:
                write_patiently(lambda: write_atomic(probe, bytes(65536)), self.stop)
                probe.unlink(missing_ok=True)
            else:
                break
            result = run_one(key)
        if result.failure is not None and result.failure.passes:
            print(f"=== {result.reason}: the job ends and is requeued", file=sys.stderr, flush=True)
            sys.exit(RETRY_EXIT)
        if result.status == "failed" and self.rank.world_size > 1:
            # The other ranks may hang in a collective that this one left: start again without this cell.
            self._see_recorded(result)
            sys.exit(LOST_EXIT)
        return result

    def _see_recorded(self, result: Result) -> None:
        """Rank 0 records failures; when another rank failed alone, rank 0 hangs and this one records instead."""
        deadline = time.monotonic() + RECORD_WAIT_S
        while self.rank.rank and time.monotonic() < deadline:
            attempt = self.store.last_attempt(result.key)
            if attempt is not None and attempt.status != "running":
                return
            time.sleep(1)
        if self.rank.rank:
            reason = f"rank {self.rank.rank}: {result.reason}"
            worker.record_death(self.store, result.key, reason, self.log, result.failure or Failure.CELL)


def write_patiently(write: Callable[[], None], stop: StopRequest) -> None:
    """Call `write`, again and again while the store refuses. Raises its last FileError after half an hour, or when
    asked to stop."""
    deadline = time.monotonic() + STORE_WAIT_S
    while True:
        try:
            return write()
        except FileError as error:
            if stop.requested or time.monotonic() > deadline:
                raise
            print(f"=== {error}: waiting", file=sys.stderr, flush=True)
            time.sleep(PROBE_INTERVAL_S)


def failed_in_this_job(store: Store, key: str, job: JobIdentity) -> bool:
    """Whether an earlier start of this very job saw the cell fail for a reason of its own."""
    attempt = store.last_attempt(key)
    if job.restart == 0 or attempt is None or attempt.status != "failed" or attempt.job is None:
        return False
    return attempt.job.rpartition(".")[0] == job.name and not (attempt.failure or Failure.CELL).passes


def master_address() -> str:
    """Where rank 0 listens: the job's first node by name, or by the address that started the tasks."""
    try:
        return socket.gethostbyname(JobEnvironment().hostnames[0])
    except OSError:
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")


if __name__ == "__main__":
    log_to_stderr()
    main(sys.argv[1:])
