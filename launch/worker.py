"""What runs inside a job, local or SLURM's: one bundle of cells in turn, as one rank of those that train together.

Holds what every job needs: which rank it is, the signals that ask it to save and stop, shards on the node's own disk,
the loop over the bundle's cells. A cell that fails or is blocked never stops the others. Which cells a bundle holds is
the plan's choice, starting it an executor's; torch is imported in `run_bundle` and nowhere earlier.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from uuid import uuid4

from dbscale.errors import FileError
from dbscale.files import ProcessMark
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Attempt, CellState, Failure, Store, failure_of

FIRST_PORT, NUM_PORTS = 20000, 12000
"""Below the ports that Linux hands to outgoing connections (from 32768)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SETTLED: frozenset[CellState] = frozenset({"done", "failed", "blocked"})
"""States that no further start of the same job changes."""
FULL_DISK = 16 << 20
"""Bytes left on a disk on which nothing of a cell fits any more."""
LOST_EXIT = 76
"""Exit code of a rank that leaves its peers in the middle of a cell."""


@dataclass(frozen=True)
class Result:
    """How one cell of a bundle ended."""

    key: str
    status: str
    """done, failed, interrupted, blocked or busy; see `dbscale.training.run.run_cell`."""
    reason: str | None = None
    failure: Failure | None = None


RunOne = Callable[[str], Result]
Around = Callable[[RunOne, str], Result]


@dataclass(frozen=True)
class Rank:
    """This process among those that train one cell together.

    One task per rank, in process: on clusters that track jobs by cgroup a signal reaches the task itself but none of its
    children, so a launcher in between would die of it with nothing saved.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @classmethod
    def of_job(cls) -> Rank:
        """The rank that submitit gave this process."""
        from submitit import JobEnvironment

        job = JobEnvironment()
        return cls(job.global_rank, job.local_rank, job.num_tasks, job.num_tasks // job.num_nodes)

    def environment(self, *, master: str, port: int) -> dict[str, str]:
        """What torch.distributed, Accelerate and DeepSpeed read; empty for one process, which needs no rendezvous."""
        if self.world_size == 1:
            return {}
        local_size = str(self.local_world_size)
        return {
            "RANK": str(self.rank), "LOCAL_RANK": str(self.local_rank), "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": local_size, "LOCAL_SIZE": local_size, "MASTER_ADDR": master, "MASTER_PORT": str(port),
        }  # fmt: skip


def port_of_job(job: str, restart: int) -> int:
    """A rendezvous port that all ranks agree on without talking: another one after each restart, so that a stale rank
    of the attempt before finds nobody there."""
    digits = int("".join(filter(str.isdigit, job)) or 0)
    return FIRST_PORT + (digits * 31 + restart * 7919) % NUM_PORTS


def thread_environment(resources: Resources) -> dict[str, str]:
    """Threads of the math libraries; must be set before numpy and torch are imported."""
    threads = str(resources.threads or 1)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {name: threads for name in names} if resources.threads or resources.num_processes > 1 else {}


@contextlib.contextmanager
def stop_on_signals(stop: StopRequest) -> Iterator[None]:
    """Let stop signals ask `stop` inside the block; afterwards the earlier handlers are back. Main thread only."""
    earlier = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    install_handlers(stop)
    try:
        yield
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)


def install_handlers(stop: StopRequest) -> None:
    """Let every stop signal ask `stop` and do nothing else; the training loop obeys at its next step. A second SIGINT
    kills. Call this again after imports that install handlers of their own."""
    interrupts = 0

    def ask(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += signum == signal.SIGINT
        stop.ask(signal.Signals(signum).name)
        if interrupts > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    for each in STOP_SIGNALS:
        signal.signal(each, ask)


def watch(*checks: Callable[[], object], interval_s: float = 1.0) -> None:
    """Call `checks` in the background, again and again, until one of them returns something true."""

    def loop() -> None:
        while not any([check() for check in checks]):
            time.sleep(interval_s)

    threading.Thread(target=loop, daemon=True, name="watcher").start()


def stop_without(stop: StopRequest, *processes: ProcessMark) -> Callable[[], bool]:
    """Make a check for `watch` that asks `stop` once one of `processes` is gone: a killed driver cannot tell its workers."""

    def check() -> bool:
        for process in processes:
            if not process.alive:
                stop.ask(f"the process that started this one (pid {process.pid}) is gone")
        return stop.requested

    return check


def end_with_peers(run_one: RunOne, key: str) -> Result:
    """Run a cell that several ranks train. One that fails alone leaves the others waiting in a collective, so it ends
    its process; they lose the connection, and the driver starts what is left of the bundle again."""
    result = run_one(key)
    if result.status == "failed":
        sys.exit(LOST_EXIT)
    return result


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
        try:
            outcome = run_cell(store, key, data_dir=data_dir, resources=resources, stop=stop, job=job, log=log)
            result = Result(key, outcome.status, outcome.reason, outcome.failure)
        except (FileError, OSError) as error:  # before an attempt was opened
            result = Result(key, "failed", str(error), failure_of(error))
            if not failure_of(error).passes:
                record_death(store, key, str(error), log, failure_of(error))
        _say(result.status, key, result.reason)
        return result

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
    try:
        return all(store.state(parent) == "done" for parent in store.read_spec(key).parents)
    except FileError:
        return False


def record_death(store: Store, key: str, reason: str, log: str | None, failure: Failure = Failure.LOST) -> None:
    """Close the attempt that a dead process left open, or write one for a cell whose process never came that far.

    Where the store cannot be written, `dbscale status` shows the cell as interrupted."""
    last, now = store.last_attempt(key), time.time()
    if last is None or last.status != "running":
        number = 1 + (last.number if last else 0)
        last = Attempt(number=number, status="running", **asdict(ProcessMark.of()), started=now)
    closed = {"status": "failed", "reason": reason, "failure": failure, "ended": now, "log": last.log or log}
    with contextlib.suppress(FileError, OSError):
        store.write_attempt(key, last.model_copy(update=closed))


def cause_of_death(store: Store) -> str:
    """The likely reason why a process ended without a word, in brackets: a full disk takes its log's last line as well."""
    free = shutil.disk_usage(store.root).free
    return (
        f"(the disk of {store.root} has {free // 2**20} MiB left)" if free < FULL_DISK else "(out of memory? killed?)"
    )


def _say(event: str, key: str, reason: str | None = None) -> None:
    """One line in the job's log, which all cells of the bundle share."""
    print(f"=== {time.strftime('%F %T')} {event} {key} {reason or ''}".rstrip(), file=sys.stderr, flush=True)


@contextlib.contextmanager
def staged(keys: Sequence[str], store: Store, data_dir: Path, staging: str | None, stop: StopRequest) -> Iterator[Path]:
    """The data folder to read from: `dbscale.data.stage` copies the shards that hold the bundle's samples to the node's
    own disk, once per node, and what cannot be copied is read where it is. Without `staging` that is `data_dir`.

    `$NAME` in `staging` is filled in from the job's environment, e.g. `$TMPDIR`. The last process of a node to leave
    removes the copies; a job that was asked to stop leaves them, for it comes back.
    """
    if staging is None:
        yield data_dir
        return
    from dbscale.data.stage import release, remove_unused

    folder = Path(os.path.expandvars(staging)) / "dbscale"
    held: list[Path] = []
    try:
        yield _stage(keys, store, data_dir, folder, held)
    finally:
        for each in held:
            release(each)
    if not stop.requested:
        remove_unused(folder)


def _stage(keys: Sequence[str], store: Store, data_dir: Path, folder: Path, held: list[Path]) -> Path:
    """Copy what the cells read; the folder in which it is found by name, or `data_dir` where that is not possible."""
    from dbscale.data.stage import hold

    copies: dict[str, Path] = {}
    try:
        if "$" in str(folder):
            raise ValueError(f"{folder}: a variable that is not set in the job's environment")
        for key in keys:
            name, copy = _stage_cell(store, key, data_dir, folder)
            copies[name] = copy
            held.append(copy)
        # A data folder of this process's own, in which the copies have their datasets' names.
        view = folder / f"view-{uuid4().hex[:12]}"
        hold(view)
        held.append(view)
        (view / "shards").mkdir()
        for name, copy in copies.items():
            (view / "shards" / name).symlink_to(copy, target_is_directory=True)
    except (ValueError, OSError) as error:
        print(f"=== not staged: {error}; reading {data_dir / 'shards'}", file=sys.stderr, flush=True)
        return data_dir
    return view


def _stage_cell(store: Store, key: str, data_dir: Path, folder: Path) -> tuple[str, Path]:
    """Copy what one cell trains on and is tested on; its dataset's name and the copy."""
    from dbscale.data import open_dataset
    from dbscale.data.stage import stage_subset

    data = store.read_spec(key).recipe.data
    source = data_dir / "shards" / data.dataset
    copy = source
    for split, count, seed in (("train", data.num_samples, data.subset_seed), ("test", None, 0)):
        dataset = open_dataset(source, split, tier=data.tier, image_size=data.image_size)
        copy = stage_subset(dataset.subset(count, seed), folder).dataset.folder
    return data.dataset, copy
