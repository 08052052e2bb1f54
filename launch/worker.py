"""What runs inside a job: one bundle of cells, in turn, in one process.  torch is imported here and nowhere earlier.

A cell that fails or is blocked never stops the others.  Which cells a bundle holds is the plan's choice; starting it
is an executor's; training is `dbscale.training`'s.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Attempt, Store
from launch.ranks import Rank, rank_environment
from launch.signals import ProcessMark, install_handlers, stop_on_signals, watch_processes
from launch.staging import staged


@dataclass(frozen=True)
class Result:
    """What became of one cell of a bundle; plain values, because it is pickled."""

    key: str
    status: str
    """done, failed, interrupted, blocked or busy; see `dbscale.training.run.run_cell`."""
    reason: str | None = None


LOST_EXIT = 76
"""Of a rank whose peers may hang."""
RunOne = Callable[[str], Result]
Around = Callable[[RunOne, str], Result]


@dataclass(frozen=True)
class LocalBundle:
    """A job of the local executor: ids and paths, never objects that know how to do things."""

    keys: tuple[str, ...]
    store: str
    data: str
    resources: Resources
    driver: ProcessMark
    port: int
    """Rendezvous port of this job's ranks, chosen by the driver."""
    staging: str | None = None

    def __call__(self) -> tuple[Result, ...]:
        stop = StopRequest()
        with stop_on_signals(stop):
            watch_processes(stop, (self.driver, ProcessMark.of(os.getppid())))
            os.environ.update(rank_environment(Rank.of(), master="127.0.0.1", port=self.port))
            store = Store(Path(self.store))
            alone = self.resources.num_processes == 1
            with staged(self.keys, store, Path(self.data), self.staging, stop) as data_dir:
                return run_bundle(
                    self.keys, store, data_dir, self.resources, stop, log=job_log(),
                    around=None if alone else end_with_peers, second_turns=alone,
                )  # fmt: skip


def end_with_peers(run_one: RunOne, key: str) -> Result:
    """A cell that several ranks run: one that fails alone leaves the others waiting in a collective, so it ends its
    process, they lose the connection, and the driver starts what is left of the bundle again."""
    result = run_one(key)
    if result.status == "failed":
        sys.exit(LOST_EXIT)
    return result


def job_log() -> str:
    """Path of the log submitit writes for this process."""
    from submitit import JobEnvironment

    return str(JobEnvironment().paths.stdout)


def run_bundle(
    keys: Sequence[str], store: Store, data_dir: Path, resources: Resources, stop: StopRequest,
    *, job: str | None = None, log: str | None = None, around: Around | None = None, second_turns: bool = True,
) -> tuple[Result, ...]:  # fmt: skip
    """Run `keys` in order until done or asked to stop, inside `stop_on_signals(stop)`.

    `around` may run a cell again, or end the process, by its result. `second_turns` must be off where several ranks
    run the bundle together: each would look at the store at a moment of its own.
    """
    from dbscale.training.run import run_cell

    install_handlers(stop)  # again: torch, DeepSpeed and their like may have put handlers of their own in place

    def run_one(key: str) -> Result:
        _say("start", key)
        outcome = run_cell(store, key, data_dir=data_dir, resources=resources, stop=stop, job=job, log=log)
        _say(outcome.status, key, outcome.reason)
        return Result(key, outcome.status, outcome.reason)

    run = run_one if around is None else partial(around, run_one)
    return work_through(keys, run, stop, ready=lambda key: second_turns and parents_done(store, key))


def work_through(
    keys: Sequence[str], run_one: RunOne, stop: StopRequest, *, ready: Callable[[str], bool]
) -> tuple[Result, ...]:
    """Results in order of `keys`; a blocked cell gets another turn once its parents are `ready`. Stops when asked."""
    results: dict[str, Result] = {}
    turn = list(keys)
    while turn:
        for key in turn:
            if stop.requested:
                return tuple(results.values())
            results[key] = run_one(key)
        turn = [key for key in turn if results[key].status == "blocked" and ready(key)]
    return tuple(results.values())


def parents_done(store: Store, key: str) -> bool:
    """Whether every parent's row exists."""
    return all((store.cell_dir(parent) / "row.json").exists() for parent in store.read_spec(key).parents)


def record_death(store: Store, key: str, reason: str, log: str) -> None:
    """Close the attempt that a dead process left open, or write one for a cell whose process never came that far."""
    last = store.last_attempt(key)
    now = time.time()
    if last is None or last.status != "running":
        number = 1 + (last.number if last else 0)
        last = Attempt(number=number, status="running", host=socket.gethostname(), pid=os.getpid(), started=now)
    closed = {"status": "failed", "reason": reason, "ended": now, "log": last.log or log}
    store.write_attempt(key, last.model_copy(update=closed))


def _say(event: str, key: str, reason: str | None = None) -> None:
    """One line in the job's log, which all cells of the bundle share."""
    print(f"=== {time.strftime('%F %T')} {event} {key} {reason or ''}".rstrip(), file=sys.stderr, flush=True)
