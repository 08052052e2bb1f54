"""Inside a SLURM job: one bundle, one task per rank, through warnings, preemption and lost ranks.

USR2 (time limit, preemption with notice) saves and requeues; TERM saves and waits for the end, because leaving early
would mark the job failed and requeueing could undo a `scancel` (`launch.slurm.ending`). A store that cannot be written
to for a while is waited for. Training itself is `launch.worker`'s and `dbscale.training`'s.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dbscale.errors import FileError
from dbscale.files import atomic_open
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Store
from launch.ranks import Rank, port_of_job, rank_environment
from launch.signals import stop_on_signals
from launch.slurm.ending import RETRY_EXIT, watch_for_end, wind_down
from launch.slurm.fence import Claim, Fence, watch
from launch.slurm.identity import JobIdentity
from launch.staging import staged
from launch.worker import LOST_EXIT, Result, job_log, record_death, run_bundle

BUSY_TRIES, BUSY_WAIT_S = 60, 5.0
"""A cell held by a process of an earlier start: that one ends itself within seconds."""
RECORD_WAIT_S = 30.0
STORE_TRIES, STORE_WAIT_S, PROBE_INTERVAL_S = 5, 1800.0, 2.0
"""How long a job waits for a file system that is full or read-only, before it uses up a requeue."""
PASSING = re.compile(
    r"no space left|quota exceeded|read-only file system|input/output error|stale file handle|cannot write|file write|"
    r"connection (closed|reset|refused)|broken pipe|timed out|nccl|gloo|distbackend|distnetwork|rendezvous|"
    r"address already in use|failed to listen",
    re.IGNORECASE,
)
"""Failures of the machine rather than of the cell: the file system, or a rank that died."""


@dataclass(frozen=True)
class SlurmBundle:
    """A job of the SLURM executor: ids and paths, never objects that know how to do things."""

    keys: tuple[str, ...]
    store: str
    data: str
    resources: Resources
    staging: str | None
    requeue_limit: int
    fence: str
    """Path of this bundle's fencing token."""

    def __call__(self) -> tuple[Result, ...]:
        stop, job, rank = StopRequest(), JobIdentity.of(), Rank.of()
        with stop_on_signals(stop):
            clear_cut_off_result()
            fence = Fence(Path(self.fence), job.restart)
            if rank.rank == 0:
                write_patiently(fence.raise_token, stop)
            claim = Claim(Store(Path(self.store)), str(job))
            watch(fence.check, claim.check)
            watch_for_end(stop, job, rank, self.requeue_limit)
            os.environ.update(rank_environment(rank, master=master_address(), port=port_of_job(job.raw, job.restart)))
            results = self._work(stop, job, rank, claim)
            if stop.requested:
                wind_down(stop, job, rank, self.requeue_limit)
            return results

    def checkpoint(self) -> SlurmBundle:
        """For submitit: what a requeued job runs is what this one did; the store knows how far it came."""
        return self

    def _work(self, stop: StopRequest, job: JobIdentity, rank: Rank, claim: Claim) -> tuple[Result, ...]:
        store = claim.store
        job_keys = [key for key in self.keys if not failed_in_this_job(store, key, job)]
        patience = Patience(store, rank, stop, claim)
        with staged(job_keys, store, Path(self.data), self.staging, stop) as data_dir:
            return run_bundle(
                job_keys, store, data_dir, self.resources, stop, job=str(job), log=job_log(), around=patience.run,
                second_turns=rank.world_size == 1,
            )  # fmt: skip


@dataclass(frozen=True)
class Patience:
    """What a job does about outcomes that are not the cell's own doing."""

    store: Store
    rank: Rank
    stop: StopRequest
    claim: Claim

    def run(self, run_one: Callable[[str], Result], key: str) -> Result:
        """Run a cell; wait for a store that cannot be written to; end the job, to be requeued, when the machine
        failed otherwise."""
        self.claim.key = key
        result = self._unless_busy(run_one, key)
        for _ in range(STORE_TRIES):
            if not is_passing(result) or self.rank.world_size > 1 or self.stop.requested:
                break
            write_patiently(partial(probe, self.store.cell_dir(key)), self.stop)
            result = self._unless_busy(run_one, key)
        if result.status == "failed":
            self._consider(result)
        return result

    def _unless_busy(self, run_one: Callable[[str], Result], key: str) -> Result:
        """Run a cell; wait while an older process holds it."""
        result = outcome(run_one, key)
        for _ in range(BUSY_TRIES):
            if result.status != "busy" or self.stop.requested:
                break
            time.sleep(BUSY_WAIT_S)
            result = outcome(run_one, key)
        return result

    def _consider(self, result: Result) -> None:
        if is_passing(result):
            print(f"=== {result.reason}: the job ends and is requeued", file=sys.stderr, flush=True)
            sys.exit(RETRY_EXIT)
        if self.rank.world_size > 1:
            # The other ranks may hang in a collective that this one left: start again without this cell.
            self._see_recorded(result)
            sys.exit(LOST_EXIT)

    def _see_recorded(self, result: Result) -> None:
        """Rank 0 records failures; when another rank failed alone, rank 0 hangs and this one records instead."""
        deadline = time.monotonic() + RECORD_WAIT_S
        while self.rank.rank and time.monotonic() < deadline:
            attempt = self.store.last_attempt(result.key)
            if attempt is not None and attempt.status != "running":
                return
            time.sleep(1)
        if self.rank.rank:
            record_death(self.store, result.key, f"rank {self.rank.rank}: {result.reason}", job_log())


def outcome(run_one: Callable[[str], Result], key: str) -> Result:
    """A cell's result, also where not even its attempt could be written down."""
    try:
        return run_one(key)
    except (FileError, OSError) as error:
        return Result(key, "failed", str(error))


def is_passing(result: Result) -> bool:
    """Whether a cell failed for a reason that is the machine's and may pass."""
    return result.status == "failed" and PASSING.search(result.reason or "") is not None


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


def probe(folder: Path) -> None:
    """Write a small file and remove it. Raises FileError."""
    path = folder / ".probe"
    with atomic_open(path, "w") as file:
        file.write("x" * 65536)
    path.unlink(missing_ok=True)


def clear_cut_off_result() -> None:
    """submitit refuses to write its result beside a half-written one of a process that was killed just then."""
    from submitit import JobEnvironment

    path = JobEnvironment().paths.result_pickle
    path.with_suffix(path.suffix + ".save_tmp").unlink(missing_ok=True)


def failed_in_this_job(store: Store, key: str, job: JobIdentity) -> bool:
    """Whether an earlier start of this very job saw the cell fail for a reason of its own."""
    attempt = store.last_attempt(key)
    if job.restart == 0 or attempt is None or attempt.status != "failed" or attempt.job is None:
        return False
    return attempt.job.rpartition(".")[0] == job.name and not PASSING.search(attempt.reason or "")


def master_address(environ: Mapping[str, str] = os.environ) -> str:
    """Where rank 0 listens: the job's first node by name, or by the address that started the tasks."""
    from submitit.slurm.slurm import _parse_node_list

    first = next(iter(_parse_node_list(environ.get("SLURM_JOB_NODELIST", ""))), "127.0.0.1")
    try:
        return socket.gethostbyname(first)
    except OSError:
        return environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
