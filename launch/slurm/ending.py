"""How a start of a job ends, as seen from inside it: requeued after a warning, waiting where TERM announces the end.

What kills without warning is requeued by the batch script (`script.requeue_lines`); what ends the batch script itself
(the time limit, a signal to its shell) is noticed here, while SLURM still waits for the ranks.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from dbscale.study.resources import StopRequest
from launch.ranks import Rank
from launch.slurm.identity import JobIdentity
from launch.slurm.queue import SlurmError, call

KILL_WAIT_S = 60.0
"""After a TERM that nothing follows, give up waiting for the end and be requeued."""
LOOK_INTERVAL_S = 2.0
WATCH_S = 600.0
RETRY_EXIT = 75
NOTICE = ("SIGUSR1", "SIGUSR2")
UNWANTED = ("TimeLimit", "NonZeroExitCode", "RaisedSignal", "JobLaunchFailure", "NodeDown", "OutOfMemory")
"""SLURM's reasons for ending a job that nobody wished to end; a cancelled or preempted one has none of them."""


def watch_for_end(stop: StopRequest, job: JobIdentity, rank: Rank, requeue_limit: int) -> None:
    """From rank 0, in the background: once asked to stop, requeue the job if SLURM ends it for an unwanted reason.

    The main thread may be in the middle of an evaluation, or saving; SLURM kills it all the same.
    """
    if rank.rank or job.restart >= requeue_limit:
        return

    def watch() -> None:
        while not stop.requested:
            time.sleep(0.2)
        deadline = time.monotonic() + WATCH_S
        while time.monotonic() < deadline:
            if is_ending_unwanted(job):
                return requeue(job)
            time.sleep(LOOK_INTERVAL_S)
        return None

    threading.Thread(target=watch, daemon=True, name="end-watcher").start()


def is_ending_unwanted(job: JobIdentity) -> bool:
    """Whether the job is past its end though its ranks still live, and why is not somebody's wish."""
    try:
        state, _, reason = (
            call(["squeue", "--noheader", f"--jobs={job.name}", "--states=all", "--format=%T|%r"])
            .strip()
            .partition("|")
        )
    except SlurmError:
        return False
    return state not in ("RUNNING", "PENDING", "CANCELLED", "PREEMPTED") and reason.startswith(UNWANTED)


def wind_down(stop: StopRequest, job: JobIdentity, rank: Rank, requeue_limit: int) -> None:
    """All is saved; get this job started again, or wait for the end that TERM announces. Does not return."""
    if stop.reason in NOTICE and job.restart >= requeue_limit:
        sys.exit(RETRY_EXIT)
    if stop.reason in NOTICE and rank.rank == 0:
        requeue(job)
    time.sleep(KILL_WAIT_S)
    sys.exit(RETRY_EXIT)


def requeue(job: JobIdentity) -> None:
    """Ask SLURM to start this job again; while slurmctld does not answer, ask again."""
    print(f"=== requeueing {job.name} (restart {job.restart + 1})", file=sys.stderr, flush=True)
    for _ in range(10):
        if subprocess.run(["scontrol", "requeue", job.name], check=False, timeout=60).returncode == 0:
            return
        time.sleep(6)
