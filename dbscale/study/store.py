"""The store: one folder per cell, one per grid, and what their files hold; states are derived from files alone.

Every write is temp + fsync + rename and no file has two writers. A damaged file costs its own cell at most: it is named
and the cell runs again. Reads are cheap and torch-free, so that `plan` and `status` answer at once on a login node.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dbscale.errors import FileError, StoreError
from dbscale.files import LATEST, ProcessMark, atomic_open, model_text, read_bytes, read_model, write_json
from dbscale.strict import Strict
from dbscale.study.cell import Arm, CellSpec, cell_id
from dbscale.study.recipe import RECIPE_VERSION, Share, Stage
from dbscale.study.task import TaskName

CellState = Literal["new", "running", "done", "failed", "interrupted", "blocked", "damaged"]
HEARTBEAT_LIMIT_S = 120.0
"""A run on another machine whose last sign of life is older than this, or as far in the future, is taken for dead."""
STORAGE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN})
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Moment = Annotated[float, Field(ge=0, le=LATEST, allow_inf_nan=False)]
"""Unix time."""
Word = Annotated[str, Field(pattern=r"^[^=+@\t\r-]")]
"""Goes into `rows.csv`: a spreadsheet would run what begins like a formula."""


class Failure(StrEnum):
    """Why an attempt failed, as far as it decides what happens next; `Attempt.reason` tells people."""

    CELL = "cell"
    """By its own doing: a recipe that cannot be trained, a loss that is not finite, a bug."""
    MEMORY = "memory"
    STORAGE = "storage"
    """The file system was full, read-only or away."""
    CONNECTION = "connection"
    """Another rank, or the connection to it, was lost."""
    LOST = "lost"
    """Its process ended without a word."""

    @property
    def passes(self) -> bool:
        """Whether the machine failed rather than the cell: the same cell may well succeed with nothing changed."""
        return self in (Failure.STORAGE, Failure.CONNECTION)


def failure_of(error: BaseException | None) -> Failure:
    """The kind of a failure, by the types of `error` and of what caused it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            return Failure.STORAGE
        if isinstance(error, ConnectionError | TimeoutError):
            return Failure.CONNECTION
        if isinstance(error, MemoryError):
            return Failure.MEMORY
        error = error.__cause__ or error.__context__
    return Failure.CELL


class Upstream(Strict):
    """What a finetune started from, copied from its parent so that a table needs no second lookup."""

    dataset: Word
    num_samples: Count
    stage: Stage
    error_rate: Share
    """Top-1 error on the upstream test split."""
    linear_probe_error: Share | None = None
    transrate: float | None = None


class Timing(Strict):
    """Measured, hence left out when two rows are compared for equality."""

    train_time_s: Amount
    eval_time_s: Amount
    step_time_s: Amount
    images_per_s: Amount
    data_wait_share: Amount
    device_time_s: Amount
    """Wall time of all attempts times the number of devices."""
    peak_memory_bytes: Count
    mfu: float | None = None
    """Model FLOP utilisation, where the device's peak is known."""
    energy_j: Amount | None = None
    num_attempts: Count = 1
    num_devices: Count = 1
    device: Word
    host: Word


class WeightsOrigin(Strict):
    """Weights that no cell trained."""

    source: str
    """As the grid names them."""
    licence: str
    """As their owner says; empty where nobody said."""
    sha256: str


class Row(Strict):
    """One finished cell: `row.json`, written last, so its existence means done.

    Error rates are shares in [0, 1]; sizes are counts.
    """

    key: str
    id: str
    stage: Stage
    arm: Arm
    """What the run itself was: plain, distilled or scratch. What a study uses it as, `plain_matched` say, is its plan's."""
    model: Word
    dataset: Word
    num_samples: Count
    seed: int
    num_params: Count
    num_classes: Count
    num_steps: Count
    samples_seen: Count
    train_flops: Amount
    """Forward and backward of the student, forward of the teacher, over all steps."""
    task: TaskName = "classification"
    """What the dataset asks, which says what an error is."""
    error_rate: Share
    """Top-1 error of a classification, 1 − mIoU of a segmentation, 1 − mAP of a detection."""
    top5_error_rate: Share | None = None
    test_loss: float = Field(allow_inf_nan=False)
    calibration_error: Share | None = None
    metrics: dict[str, float] = {}
    """Means over the test split that plugins define."""
    num_test_samples: Count
    train_loss: float = Field(allow_inf_nan=False)
    """Mean over the last tenth of the run."""
    weights_sha256: str
    """The hash of model.safetensors: two rows with equal hashes come from bitwise equal runs."""
    correct_sha256: str | None = None
    """The hash of correct.npz; None in rows of releases that did not write it."""
    replaced_samples: Count = 0
    """Undecodable training images that another of their class stood in for."""
    upstream: Upstream | None = None
    teacher: str | None = None
    weights_from: dict[str, WeightsOrigin] = {}
    """Where a teacher or a start came from that no cell trained."""
    kd_backend: str | None = None
    resources: dict[str, str | int | float | bool | None] = {}
    """How it ran (precision plugin, ZeRO stage, world size …); informative, not part of its identity."""
    timing: Timing


class Attempt(Strict):
    """One try at a cell: `attempts/<n>.json`."""

    cell: str | None = None
    """Key of the cell, set by the store when it writes; None in attempts of releases that did not."""
    number: Count
    status: Literal["running", "done", "failed", "interrupted", "blocked"]
    host: str
    pid: int
    boot: str | None = None
    start: int | None = None
    """With `host` and `pid`, which process it is beyond doubt; see `dbscale.files.ProcessMark`."""
    started: Moment
    ended: Moment | None = None
    job: str | None = None
    """Scheduler's job id and restart count, where there is one."""
    log: str | None = None
    """Path of the log that a person would read."""
    reason: str | None = None
    failure: Failure | None = None
    """The kind, where the attempt failed."""
    signal: str | None = None
    resumed_from_step: int | None = None
    versions: dict[str, str] = {}
    commit: str | None = None
    num_devices: Count = 1

    @property
    def process(self) -> ProcessMark:
        return ProcessMark(self.host, self.pid, self.boot, self.start)


class Progress(Strict):
    """Heartbeat of a running cell: `progress.json`, rewritten every few seconds."""

    step: Count
    num_steps: Count
    loss: float | None
    images_per_s: Amount
    updated: Moment


@dataclass(frozen=True)
class Standing:
    """State of a cell, and the files that tell it."""

    state: CellState
    row: Row | None = None
    attempt: Attempt | None = None
    """The last one; not read of a cell that is done."""
    note: str | None = None
    """What is damaged."""

    @property
    def reason(self) -> str:
        """Why a cell has no row, for people."""
        if self.state == "running" and self.attempt is not None:
            return f"held by pid {self.attempt.pid} on {self.attempt.host}; end that process if it is not at work on it"
        return self.note or (self.attempt.reason if self.attempt else None) or "no reason recorded"


@dataclass(frozen=True)
class Store:
    """Paths and atomic reads and writes under one root folder."""

    root: Path

    def cell_dir(self, key: str) -> Path:
        return self.root / "cells" / key

    def grid_dir(self, name: str) -> Path:
        return self.root / "grids" / name

    def own_dir(self, key: str) -> Path:
        """A cell's folder, to be written to. Raises StoreError where it, or a folder in it, is a link: what is written
        and removed there might be anyone's. The store itself, or all of `cells`, may well be one."""
        return _no_link(self.cell_dir(key), "attempts", "checkpoints")

    def own_grid_dir(self, name: str) -> Path:
        """A grid's folder in the same way."""
        return _no_link(self.grid_dir(name), "jobs", "submits")

    def write_spec(self, spec: CellSpec) -> None:
        """`recipe.json`; left alone when it holds just this.

        Not synced, because a grid writes thousands: what a power cut empties, the next submit writes again.
        """
        path, data = self.own_dir(spec.key) / "recipe.json", model_text(spec).encode()
        if _content(path) != data:
            with atomic_open(path, durable=False) as file:
                file.write(data)

    def read_spec(self, key: str) -> CellSpec:
        """Raises StoreError where there is none, or one that does not belong to this key."""
        try:
            spec = read_model(CellSpec, f"{self.root}/cells/{key}/recipe.json")
        except FileNotFoundError:
            raise StoreError(
                f"no cell {key!r} in {self.root}; `dbscale plan --cells` lists a grid's cells, and "
                "--grid names the grid of one that was never submitted"
            ) from None
        except FileError as error:
            raise StoreError(f"{error}; `dbscale submit` of its grid writes it anew") from None
        parents = [parent.rpartition("-")[2] for parent in spec.parents]
        known = spec.version == RECIPE_VERSION
        if spec.key != key or (known and spec.id != cell_id(spec.recipe, parents, spec.fingerprint)):
            raise StoreError(f"{self.cell_dir(key) / 'recipe.json'} is not the recipe of this cell; `dbscale submit` of "
                             "its grid writes it anew")  # fmt: skip
        return spec

    def read_row(self, key: str) -> Row | None:
        """None where there is none, or none that can be used: `standing` says which."""
        return self.standing(key).row

    def write_row(self, row: Row) -> None:
        write_json(self.own_dir(row.key) / "row.json", row.model_dump(mode="json"), seal=True)

    def attempts(self, key: str) -> list[Attempt]:
        """All tries so far, oldest first."""
        return [self._read_attempt(key, number) for number in self._attempt_numbers(key)]

    def write_attempt(self, key: str, attempt: Attempt) -> None:
        path = self.own_dir(key) / "attempts" / f"{attempt.number}.json"
        write_json(path, attempt.model_copy(update={"cell": key}).model_dump(mode="json"), seal=True)

    def read_progress(self, key: str) -> Progress | None:
        """The last heartbeat; None where there is none that can be read."""
        try:
            return read_model(Progress, f"{self.root}/cells/{key}/progress.json")
        except (FileNotFoundError, FileError):
            return None

    def write_progress(self, key: str, progress: Progress) -> None:
        write_json(self.cell_dir(key) / "progress.json", progress.model_dump(mode="json"), durable=False, seal=True)

    def last_attempt(self, key: str) -> Attempt | None:
        numbers = self._attempt_numbers(key)
        return self._read_attempt(key, numbers[-1]) if numbers else None

    def _attempt_numbers(self, key: str) -> list[int]:
        try:
            names = os.listdir(f"{self.root}/cells/{key}/attempts")
        except OSError:
            return []
        return sorted(int(name[:-5]) for name in names if re.fullmatch(r"[0-9]{1,9}\.json", name))

    def _read_attempt(self, key: str, number: int) -> Attempt:
        """One that cannot be read counts as broken off, with the reason."""
        path = f"{self.root}/cells/{key}/attempts/{number}.json"
        try:
            attempt = read_model(Attempt, path)
            if attempt.number != number or attempt.cell not in (None, key):
                raise StoreError(f"{path} is the record of attempt {attempt.number} at {attempt.cell}")
            return attempt
        except (FileNotFoundError, FileError) as error:
            return Attempt(number=number, status="interrupted", host="unknown", pid=0, started=0.0, ended=0.0,
                           reason=str(error))  # fmt: skip

    def standings(self, keys: Iterable[str]) -> dict[str, Standing]:
        """`standing` of many cells: those without a folder are new without another look."""
        folder = self.root / "cells"
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        new = Standing("new")
        return {key: self.standing(key) if key in present else new for key in keys}

    def state(self, key: str) -> CellState:
        return self.standing(key).state

    def standing(self, key: str) -> Standing:
        """From the files alone: a sound row means done; an open attempt whose process is gone was interrupted."""
        # Plain strings: this is asked for ten thousand cells at once, and joining paths is most of its cost.
        path, note = f"{self.root}/cells/{key}/row.json", None
        try:
            row = read_model(Row, path)
            if row.key == key:
                return Standing("done", row)
            note = f"{path} is the row of {row.key}"
        except FileNotFoundError:
            pass
        except FileError as error:
            note = str(error)
        try:
            self.own_dir(key)
        except StoreError as error:
            note = str(error)
        attempt = self.last_attempt(key)
        if attempt is not None and attempt.status == "running":
            alive = self._is_alive(key, attempt)
            return Standing("running" if alive else "damaged" if note else "interrupted", None, attempt, note)
        if note is None and attempt is not None and attempt.status == "done":
            note = f"{path} is missing, although attempt {attempt.number} finished"
        if note is not None:
            return Standing("damaged", None, attempt, f"{note}; the cell runs again")
        return Standing("new" if attempt is None else attempt.status, None, attempt)

    def _is_alive(self, key: str, attempt: Attempt) -> bool:
        alive = attempt.process.alive
        if alive is not None:
            return alive
        progress, now = self.read_progress(key), time.time()
        signs = (attempt.started, progress.updated if progress else attempt.started)
        # A sign from the future is no sign: clocks jump.
        return any(abs(now - sign) < HEARTBEAT_LIMIT_S for sign in signs)


def _no_link(folder: Path, *below: str) -> Path:
    for path in (str(folder), *(f"{folder}/{name}" for name in below)):
        if os.path.islink(path):
            raise StoreError(f"{path} is a symbolic link: nothing is written or removed behind it; remove the link")
    return folder


def _content(path: Path) -> bytes | None:
    try:
        return read_bytes(path)
    except OSError:
        return None
