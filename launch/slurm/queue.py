"""What SLURM says: one `squeue` call for the queue, one `sacct` call for what has left it.  Parses, decides nothing."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

TIMEOUT_S = 30.0
READ_S = 0.1
"""To read an answer that is there, however late it is asked for."""
DEFAULT_MAX_ARRAY_SIZE = 1001


class SlurmError(ValueError):
    """SLURM cannot be used: says which command, its answer, and what to do."""


@dataclass(frozen=True)
class Element:
    """One array element, or a job that is no array (index 0), in the queue."""

    array: int
    index: int
    state: str
    """SLURM's word: PENDING, RUNNING, COMPLETING, …"""
    nodes: str
    reason: str
    """Why it waits, in SLURM's words."""

    @property
    def running(self) -> bool:
        return self.state in ("RUNNING", "COMPLETING")


@dataclass(frozen=True)
class Ended:
    """One array element as accounting remembers it."""

    array: int
    index: int
    state: str
    exit_code: str


def read_queue() -> tuple[Element, ...]:
    """All of this user's jobs that wait or run, array elements one by one. Raises SlurmError."""
    return parse_queue(call(queue_command()))


def queue_command() -> list[str]:
    user = pwd.getpwuid(os.geteuid()).pw_name
    form = "%F|%K|%T|%N|%r"
    return ["squeue", "--noheader", "--array", "--states=all", f"--user={user}", f"--format={form}"]


def parse_queue(out: str) -> tuple[Element, ...]:
    return tuple(element for element in map(parse_element, out.splitlines()) if element.state not in GONE)


GONE = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "PREEMPTED",
    "REVOKED",
})  # fmt: skip
"""States of jobs that squeue still lists for a while after their end."""


def parse_element(line: str) -> Element:
    array, index, state, nodes, reason = line.split("|", 4)
    return Element(int(array), int(index) if index.isdigit() else 0, state, nodes, reason)


def read_ended(arrays: Iterable[int], timeout_s: float) -> tuple[Ended, ...]:
    """How elements of `arrays` ended, as accounting knows it; it lags by seconds. Raises SlurmError."""
    ids = ",".join(map(str, sorted(arrays)))
    out = call(["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={ids}",
                "--format=JobID,State,ExitCode"], timeout_s)  # fmt: skip
    return tuple(each for line in out.splitlines() for each in parse_ended(line))


def parse_ended(line: str) -> list[Ended]:
    """None for a line about elements that never started, which sacct folds into `12_[3-9]`."""
    job, state, exit_code = line.split("|")
    found = re.fullmatch(r"(\d+)(?:_(\d+))?", job)
    if found is None:
        return []
    return [Ended(int(found[1]), int(found[2] or 0), state.split()[0], exit_code)]


def max_array_size() -> int:
    """Elements one array may have on this cluster."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call(["scontrol", "show", "config"]), re.MULTILINE)
    return max(1, int(found[1]) if found else DEFAULT_MAX_ARRAY_SIZE)


def cancel_jobs(jobs: Sequence[int]) -> None:
    if jobs:
        call(["scancel", *map(str, sorted(jobs))])


def cancel_by_name(name: str) -> None:
    """Cancel what was submitted under this (unique) name, if anything was."""
    call(["scancel", f"--name={name}"])


def call(command: Sequence[str], timeout_s: float = TIMEOUT_S) -> str:
    """Standard output of a SLURM command, never through a shell. Raises SlurmError."""
    return Asked.of(command).answer(timeout_s)


@dataclass(frozen=True)
class Asked:
    """A SLURM command under way, so that other work can be done meanwhile."""

    process: subprocess.Popen[str]
    since: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, command: Sequence[str]) -> Asked:
        """Raises SlurmError where there is no SLURM."""
        try:
            return cls(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        except FileNotFoundError:
            raise SlurmError(f"no `{command[0]}` here: use a login node of the cluster, or --cluster local") from None

    def answer(self, timeout_s: float) -> str:
        """Standard output, within `timeout_s` of asking. Raises SlurmError."""
        program = self.process.args[0]  # type: ignore[index]
        left_s = timeout_s - (time.monotonic() - self.since)
        try:
            answer, said = self.process.communicate(timeout=max(READ_S, left_s))
        except subprocess.TimeoutExpired:
            self.drop()
            raise SlurmError(f"SLURM does not answer (`{program}`, {timeout_s:g} s); try again later") from None
        if self.process.returncode:
            what = " ".join((said or answer).split()) or f"exit code {self.process.returncode}"
            raise SlurmError(f"`{program}` failed: {what}")
        return answer

    def drop(self) -> None:
        """The answer is no longer wanted."""
        self.process.kill()
        self.process.communicate()
