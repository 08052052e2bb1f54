"""What SLURM holds: its commands and their answers, the records of what was submitted, and both together for `status`.

One `squeue` call for the queue, and for what has left it a `sacct` call where the cluster keeps accounts. With a record
written before and after each submission, a second `dbscale submit` knows what waits or runs already, even when the first
one died half-way.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from dbscale.errors import FileError
from dbscale.files import read_model, write_model
from dbscale.strict import Strict
from dbscale.study.cell import Key
from dbscale.study.grid import Name
from dbscale.study.recipe import Stage
from dbscale.study.store import Store

TIMEOUT_S = 30.0
DEFAULT_MAX_ARRAY_SIZE = 1001
GONE = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "PREEMPTED",
    "REVOKED",
})  # fmt: skip
"""States of jobs that squeue still lists for a while after their end."""
Uid = Annotated[str, Field(pattern=r"^\d{8}-\d{6}-\d{6}-[0-9a-f]{4}$")]


class SlurmError(ValueError):
    """SLURM cannot be used: says which command, its answer, and what to do."""


def call(command: Sequence[str], timeout_s: float = TIMEOUT_S) -> str:
    """Standard output of a SLURM command, which never goes through a shell. Raises SlurmError."""
    program = command[0]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    except FileNotFoundError:
        raise SlurmError(f"no `{program}` here: use a login node of the cluster, or --cluster local") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"SLURM does not answer (`{program}`, {timeout_s:g} s); try again later") from None
    if done.returncode:
        what = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise SlurmError(f"`{program}` failed: {what}")
    return done.stdout


@dataclass(frozen=True)
class Element:
    """One array element, or a job that is no array (index 0), in the queue."""

    array: int
    index: int
    state: str
    """SLURM's word: PENDING, RUNNING, COMPLETING, …"""
    reason: str = "None"
    """SLURM's reason for the state."""

    @property
    def running(self) -> bool:
        return self.state in ("RUNNING", "COMPLETING")

    @property
    def ended(self) -> bool:
        return self.state in GONE


def read_queue(timeout_s: float = TIMEOUT_S) -> tuple[Element, ...]:
    """All of this user's jobs that wait, run, or ended a few minutes ago, array elements one by one. Raises SlurmError."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={user}", "--format=%F|%K|%T|%r"]
    return parse_queue(call(command, timeout_s))


def parse_queue(out: str) -> tuple[Element, ...]:
    """The elements of squeue's answer."""
    found = (line.split("|", 3) for line in out.splitlines())
    return tuple(Element(int(array), int(index) if index.isdigit() else 0, *words) for array, index, *words in found)


def read_ended(arrays: Iterable[int], timeout_s: float) -> dict[tuple[int, int], str]:
    """How elements (array, index) ended, as accounting knows it; it lags by seconds. Raises SlurmError."""
    ids = ",".join(map(str, sorted(arrays)))
    command = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={ids}", "--format=JobID,State,ExitCode"]
    return parse_ended(call(command, timeout_s))


def parse_ended(out: str) -> dict[tuple[int, int], str]:
    """State and exit code by (array, index); elements that never started, folded into `12_[3-9]`, are left out."""
    found = {}
    for job, state, exit_code in (line.split("|") for line in out.splitlines()):
        place = re.fullmatch(r"(\d+)(?:_(\d+))?", job)
        if place is not None:
            found[int(place[1]), int(place[2] or 0)] = f"{state.split()[0]}, exit code {exit_code}"
    return found


def max_array_size() -> int:
    """The number of elements that one array may have on this cluster. Raises SlurmError."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call(["scontrol", "show", "config"]), re.MULTILINE)
    return max(1, int(found[1]) if found else DEFAULT_MAX_ARRAY_SIZE)


def cancel_jobs(jobs: Collection[int]) -> None:
    if jobs:
        call(["scancel", *map(str, sorted(jobs))])


class SubmitRecord(Strict):
    """`<store>/grids/<name>/submits/<uid>.json`: one array, or the reducer."""

    uid: Uid
    """Sorts by time; unique even among login nodes."""
    grid: Name
    kind: Literal["bundles", "reduce"]
    wave: int
    stage: Stage | None = None
    created: float
    """Unix time."""
    elements: tuple[tuple[Key, ...], ...]
    """Keys of each element's bundle."""
    predicted_s: tuple[float, ...] = ()
    after: tuple[int, ...] = ()
    """Arrays this one waits for, however they end."""
    job: int | None = None
    """SLURM's id of the array; None until sbatch has answered."""
    damage: str | None = Field(default=None, exclude=True)
    """What is wrong with the file that this stands for; in no file."""

    @property
    def job_name(self) -> str:
        """Unique, so that an array whose id was never learnt can still be found."""
        return f"dbscale-{self.grid}-{self.uid}"

    def folder(self, store: Store) -> Path:
        """Where this array's script, logs and fencing tokens are."""
        return store.grid_dir(self.grid).absolute() / "jobs" / self.uid

    def log(self, store: Store, index: int) -> Path:
        """The log of an element."""
        element = f"{self.job}_{index}" if len(self.elements) > 1 else f"{self.job}"
        return self.folder(store) / f"{element}_0_log.out"


def make_uid() -> str:
    """The name of a submission, or of a local driver's folder: the time, and what no other of that moment has."""
    return f"{datetime.now():%Y%m%d-%H%M%S-%f}-{secrets.token_hex(2)}"


def records_dir(store: Store, grid: str) -> Path:
    return store.grid_dir(grid) / "submits"


def write_record(store: Store, record: SubmitRecord) -> None:
    write_model(records_dir(store, record.grid) / f"{record.uid}.json", record)


def read_record(store: Store, grid: str, uid: str) -> SubmitRecord:
    """Raises FileNotFoundError, or FileError where the record cannot be read, is damaged or another one's."""
    path = records_dir(store, grid) / f"{uid}.json"
    try:
        record = read_model(SubmitRecord, path)
        if (record.uid, record.grid) != (uid, grid):
            raise FileError(f"{path} is the record of {record.grid}/{record.uid}, not of {grid}/{uid}")
        return record
    except FileError as error:
        raise FileError(f"{error}; `dbscale submit` of the grid hands in again what is left of it") from error


def read_records(store: Store, grid: str) -> tuple[SubmitRecord, ...]:
    """All arrays of the grid, oldest first; a damaged record reads as one whose submission was cut off."""
    folder, found = records_dir(store, grid), []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            found.append(read_record(store, grid, path.stem))
        except FileNotFoundError:  # another process has just forgotten it
            continue
        except FileError as error:
            with contextlib.suppress(ValidationError):  # not a name of ours, so nothing was submitted under it
                found.append(SubmitRecord(uid=path.stem, grid=grid, kind="bundles", wave=0, created=0.0, elements=(),
                                          damage=str(error)))  # fmt: skip
    return tuple(found)


def cancel_cut_off(store: Store, records: Iterable[SubmitRecord]) -> None:
    """Cancel by name the arrays whose submission was cut off, or its record damaged, which is said: nobody would find
    them by their number."""
    for record in records:
        if record.job is None:
            call(["scancel", f"--name={record.job_name}"])
            if record.damage is not None:
                print(f"{record.damage}; its jobs are cancelled", file=sys.stderr, flush=True)
            (records_dir(store, record.grid) / f"{record.uid}.json").unlink(missing_ok=True)


@dataclass(frozen=True)
class Queued:
    """What SLURM holds of a grid."""

    store: Store
    records: tuple[SubmitRecord, ...] = ()
    """What the grid itself submitted."""
    elements: tuple[Element, ...] = ()
    """The elements of the grid's own jobs that wait or run."""
    cells: Mapping[str, Element] = field(default_factory=dict)
    """Each cell that waits or runs, with the element that holds it, which may be another grid's."""
    ended: Mapping[tuple[int, int], Element] = field(default_factory=dict)
    """Elements that SLURM still remembers the end of, by (array, index)."""
    wait_s: float = TIMEOUT_S
    """How long SLURM has for an answer."""
    error: str | None = None
    """Why SLURM could not be asked; the store alone then has to do."""

    @property
    def jobs(self) -> dict[int, SubmitRecord]:
        """Arrays and reducers of the grid of which anything waits or runs, by SLURM's id."""
        present = {element.array for element in self.elements}
        return {record.job: record for record in self.records if record.job is not None and record.job in present}

    @property
    def reducers(self) -> list[int]:
        return [job for job, record in self.jobs.items() if record.kind == "reduce"]

    def will_be_reduced(self, keys: Collection[str]) -> bool:
        """Whether a reducer comes after all of `keys` that wait or run; not so when a login node died before
        submitting it."""
        arrays = {self.cells[key].array for key in keys if key in self.cells}
        return any(arrays <= set(self.jobs[job].after) for job in self.reducers)

    @property
    def headline(self) -> str:
        """One line for people."""
        if self.error is not None:
            return f"{self.error}; what follows is from the store alone (--wait gives SLURM longer)"
        if not self.elements:
            return "it has nothing waiting or running in SLURM (the command that began it resumes it)"
        running = sum(element.running for element in self.elements)
        text = f"{running} jobs run and {len(self.elements) - running} wait in SLURM"
        return text + (f", the reducer is job {', '.join(map(str, self.reducers))}" if self.reducers else "")

    def endings(self, arrays: Collection[int]) -> dict[tuple[int, int], str]:
        """How elements (array, index) ended, in the words of SLURM's accounts or, where there are none, of its queue."""
        found = {place: f"{element.state}, {element.reason}" for place, element in self.ended.items()}
        with contextlib.suppress(SlurmError):
            found |= read_ended(arrays, self.wait_s) if arrays else {}
        return found

    def lost(self, keys: Collection[str]) -> dict[str, tuple[str, str]]:
        """Those of `keys` whose job has ended without running them, each with (reason in SLURM's words, log)."""
        places = {
            key: (record, index)
            for record in self.records if record.job is not None
            for index, element in enumerate(record.elements) for key in element if key in keys
        }  # fmt: skip
        if not places or self.error is not None:
            return {}
        ended, found = self.endings({record.job or 0 for record, _ in places.values()}), {}
        for key, (record, index) in places.items():
            said = ended.get((record.job or 0, index), "nothing about it any more")
            reason = f"its job {record.job}_{index} is gone without running it; SLURM says {said}"
            found[key] = (reason, str(record.log(self.store, index)))
        return found


def read_queued(store: Store, grid: str, wait_s: float = TIMEOUT_S) -> Queued:
    """What SLURM holds of a grid of the store. Raises SlurmError where it does not answer within `wait_s`."""
    answer = {(element.array, element.index): element for element in read_queue(wait_s)}
    by_place = {place: element for place, element in answer.items() if not element.ended}
    ended = {place: element for place, element in answer.items() if element.ended}
    records, cells = read_records(store, grid), {}
    # Grids share cells: one that another grid has queued is queued for this one, too.
    for folder in sorted(store.root.glob("grids/*/submits")):
        for record in records if folder.parent.name == grid else read_records(store, folder.parent.name):
            for index, keys in enumerate(record.elements):
                if record.job is not None and (record.job, index) in by_place:
                    cells.update(dict.fromkeys(keys, by_place[record.job, index]))
    jobs = {record.job for record in records}
    present = tuple(each for each in by_place.values() if each.array in jobs)
    return Queued(store, records, present, cells, ended, wait_s)
