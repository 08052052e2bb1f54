"""Faults at random, from a printed seed, while a grid runs on the sandbox; what they are and how they are dealt out.

`make chaos [FAULTS=n] [SEED=s]` runs them through test_chaos.py.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TMPFS_MB = 256


@dataclass
class Chaos:
    """A grid that runs on a sandbox, and a die."""

    place: Any
    """Where the grid's store is; on a file system of its own when `own_disk`."""
    sandbox: Any
    die: random.Random
    submit: list[str]
    """Options of `dbscale submit`."""
    own_disk: bool
    started: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.lines.append(f"{time.monotonic() - self.started:7.1f} s  {text}")
        print(self.lines[-1], flush=True)

    def victim(self) -> str | None:
        """A running job, in scontrol's words; None when none runs just now."""
        lines = self.sandbox.slurm(
            "squeue", "--noheader", "--array", "--states=RUNNING", "--partition=low", "--format=%i"
        )
        return self.die.choice(lines.split()) if lines.split() else None

    def raw(self, job: str) -> str:
        return self.sandbox.slurm("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%A").split()[0]

    def pause(self, least: float, most: float) -> None:
        time.sleep(self.die.uniform(least, most))

    def done(self) -> bool:
        return not self.sandbox.jobs()


def warning(chaos: Chaos, job: str) -> None:
    chaos.sandbox.send(job, "USR2")


def preemption(chaos: Chaos, job: str) -> None:
    """By a job of the high partition; SLURM sends USR2, and after the grace time what it takes."""
    chaos.sandbox.preempt(1)


def preemption_term_only(chaos: Chaos, job: str) -> None:
    """The same on a cluster that sends TERM alone."""
    with chaos.sandbox.no_user_signal():
        chaos.sandbox.preempt(1)
        chaos.pause(5, 6)  # the grace time


def requeue(chaos: Chaos, job: str) -> None:
    chaos.sandbox.requeue(job)


def time_limit(chaos: Chaos, job: str) -> None:
    """The limit comes down upon the job; once it has been told, the limit is what it was."""
    chaos.sandbox.tell("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    deadline = time.monotonic() + 45  # SLURM looks at limits every 30 s
    while time.monotonic() < deadline and "RUNNING" in chaos.sandbox.state(job):
        time.sleep(0.5)
    chaos.sandbox.tell("scontrol", "update", f"JobId={job}", "TimeLimit=10")


def killed_rank(chaos: Chaos, job: str) -> None:
    chaos.sandbox.kill_rank(chaos.raw(job))


def killed_batch_shell(chaos: Chaos, job: str) -> None:
    """Not even the line that requeues a job is reached."""
    chaos.sandbox.kill_batch_shell(chaos.raw(job))


def frozen_rank(chaos: Chaos, job: str) -> None:
    """Stopped while its job starts anew elsewhere, and awake again later."""
    raw = chaos.raw(job)
    chaos.sandbox.kill_rank(raw, signal.SIGSTOP)
    chaos.sandbox.requeue(job)
    chaos.pause(1, 2)
    chaos.sandbox.kill_rank(raw, signal.SIGCONT)


def paused_rank(chaos: Chaos, job: str) -> None:
    """Nothing of it moves for a while, as on a node that swaps; nobody tells SLURM."""
    raw = chaos.raw(job)
    chaos.sandbox.kill_rank(raw, signal.SIGSTOP)
    chaos.pause(2, 8)
    chaos.sandbox.kill_rank(raw, signal.SIGCONT)


def node_drained(chaos: Chaos, job: str) -> None:
    """An administrator takes a node out of service, puts its jobs back into the queue, and brings it back."""
    node = chaos.sandbox.node_of(job)
    chaos.sandbox.tell("scontrol", "update", f"nodename={node}", "state=drain", "reason=chaos")
    chaos.sandbox.requeue(job)
    chaos.pause(2, 5)
    chaos.sandbox.tell("scontrol", "update", f"nodename={node}", "state=resume")


def node_daemon_restart(chaos: Chaos, job: str) -> None:
    """slurmd is updated under running jobs."""
    chaos.sandbox.restart_node_daemon(chaos.die.choice([1, 2]), chaos.die.uniform(0, 3))


def node_cut_off(chaos: Chaos, job: str) -> None:
    """Its ranks train on while SLURM starts the job again."""
    node = chaos.sandbox.node_of(job)
    chaos.sandbox.cut_off(int(node.removeprefix("n")), chaos.die.uniform(1, 4))


def power_cut(chaos: Chaos, job: str) -> None:
    chaos.sandbox.power_off(chaos.die.choice([1, 2]), chaos.die.uniform(1, 4))


def controller_restart(chaos: Chaos, job: str) -> None:
    chaos.sandbox.restart_controller(chaos.die.uniform(1, 4))


def login_node_gone(chaos: Chaos, job: str) -> None:
    """The grid is cancelled, and the login node dies while it is submitted again; then somebody types it once more."""
    assert chaos.place.run("cancel").returncode == 0
    process = chaos.place.start("submit", *chaos.submit)
    chaos.pause(0.5, 8)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    submit(chaos)


def store_read_only(chaos: Chaos, job: str, seconds: float | None = None) -> None:
    """For new writers; file descriptors that are open go on."""
    root = str(chaos.place.store.root)
    mount("mount", "--bind", root, root)
    mount("mount", "-o", "remount,bind,ro", root)
    time.sleep(seconds or chaos.die.uniform(2, 6))
    mount("umount", "--lazy", root)


def mount(*words: str) -> None:
    """Tried again, because the table of mounts changes under another sandbox's hands, too."""
    for _ in range(9):
        if subprocess.run(words, check=False).returncode == 0:
            return
        time.sleep(0.2)
    subprocess.run(words, check=True)


def store_full(chaos: Chaos, job: str, seconds: float | None = None) -> None:
    ballast = chaos.place.store.root / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    time.sleep(seconds or chaos.die.uniform(2, 6))
    ballast.unlink()


FAULTS: tuple[Callable[[Chaos, str], None], ...] = (
    warning, preemption, preemption_term_only, requeue, time_limit, killed_rank, killed_batch_shell, frozen_rank,
    paused_rank, node_drained, node_daemon_restart, node_cut_off, power_cut, controller_restart,
    login_node_gone, store_read_only, store_full,
)  # fmt: skip
ON_OWN_DISK = (store_read_only, store_full)
AT_WORK_SHARE = 0.5
"""Of faults that wait until a cell trains; the others may hit jobs that start, save or end."""
RARE = (time_limit, node_cut_off)
"""Slow ones: dealt once a hand, others twice."""


def deal(die: random.Random, count: int) -> list[Callable[[Chaos, str], None]]:
    """`count` faults in random order: first each kind once, then each as often as the others but for the rare ones."""
    hand = [fault for fault in FAULTS for _ in range(1 if fault in RARE else 2)]
    dealt = die.sample(FAULTS, len(FAULTS))
    while len(dealt) < count:
        dealt += die.sample(hand, len(hand))
    return dealt[:count]


def submit(chaos: Chaos) -> None:
    """`make grid`, as typed; once more while SLURM is away."""
    for _ in range(10):
        done = chaos.place.run("submit", *chaos.submit)
        if done.returncode == 0:
            return
        time.sleep(2)
    raise AssertionError(done.stderr)


def unleash(
    chaos: Chaos, hand: Sequence[Callable[[Chaos, str], None]], gap_s: tuple[float, float], first: int = 1
) -> int:
    """Inject the faults of `hand`, each upon a running job; returns how many it were before the grid was through."""
    for number, fault in enumerate(hand):
        if fault in ON_OWN_DISK and not chaos.own_disk:
            chaos.say(f"{first + number:4}  left out, for nothing may be mounted here: {fault.__name__}")
            continue
        job = next_victim(chaos)
        if job is None:
            return number
        if chaos.die.random() < AT_WORK_SHARE:
            await_progress(chaos)
        chaos.pause(*gap_s)
        done = len(chaos.place.done())
        chaos.say(f"{first + number:4}  {fault.__name__.replace('_', ' ')} (job {job}, {done} cells done)")
        fault(chaos, job)
    return len(hand)


def await_progress(chaos: Chaos, patience_s: float = 60.0) -> None:
    """Until some cell trains that did not a moment ago: many faults in a row would all hit jobs that start."""

    def heartbeats() -> set[tuple[str, float]]:
        found = set()
        for path in chaos.place.store.root.glob("cells/*/progress.json"):
            with contextlib.suppress(OSError):
                found.add((path.parent.name, path.stat().st_mtime))
        return found

    before, deadline = heartbeats(), time.monotonic() + patience_s
    while heartbeats() <= before and time.monotonic() < deadline and not chaos.done():
        time.sleep(0.3)


def next_victim(chaos: Chaos) -> str | None:
    """A running job; None when nothing is left in the queue, or nothing starts for minutes."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not chaos.done():
        job = chaos.victim()
        if job is not None:
            return job
        time.sleep(0.3)
    return None


@contextlib.contextmanager
def kept_when_it_fails(store: Path, sandbox: Any, kept: Path) -> Iterator[None]:
    """Copy the store and SLURM's logs to `kept` when the block raises: both end with the test."""
    try:
        yield
    except BaseException:
        logs = Path(sandbox.environment["SLURM_CONF"]).parent / "log"
        for folder, name in ((store, "store"), (logs, "slurm")):
            shutil.copytree(folder, kept / name, symlinks=True, dirs_exist_ok=True)
        print(f"the store and SLURM's logs of this run are kept in {kept}", flush=True)
        raise


@contextlib.contextmanager
def disk_of_its_own(folder: Path) -> Iterator[bool]:
    """A small file system on `folder`; False where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={TMPFS_MB}m"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=False).returncode == 0
    try:
        yield mounted
    finally:
        while mounted and subprocess.run(["mountpoint", "--quiet", str(folder)], check=False).returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
