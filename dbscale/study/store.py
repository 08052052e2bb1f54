"""The store: one folder per cell, one per grid; every write is temp + fsync + rename, no file has two writers.

Reads are cheap and torch-free, so that `plan` and `status` answer at once on a login node.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from dbscale.errors import StoreError
from dbscale.files import read_json, write_json, write_model
from dbscale.strict import Strict, validate
from dbscale.study.cell import Arm, CellSpec
from dbscale.study.recipe import Stage

CellState = Literal["new", "running", "done", "failed", "interrupted", "blocked"]
HEARTBEAT_LIMIT_S = 120.0
"""A run whose progress file is older than this, on another host, is taken for dead."""


class Upstream(Strict):
    """What a finetune started from, copied from its parent so that a table needs no second lookup."""

    dataset: str
    num_samples: int
    stage: Stage
    error_rate: float
    """Top-1 error on the upstream test split."""
    linear_probe_error: float | None = None
    transrate: float | None = None


class Timing(Strict):
    """Measured, hence left out when two rows are compared for equality."""

    train_time_s: float
    eval_time_s: float
    step_time_s: float
    images_per_s: float
    data_wait_share: float = Field(ge=0)
    device_time_s: float
    """Wall time of all attempts times the number of devices."""
    peak_memory_bytes: int
    mfu: float | None = None
    """Model FLOP utilisation, where the device's peak is known."""
    energy_j: float | None = None
    num_attempts: int = 1
    num_devices: int = 1
    device: str
    host: str


class Row(Strict):
    """One finished cell. Error rates are top-1 shares in [0, 1]; sizes are counts."""

    key: str
    id: str
    stage: Stage
    arm: Arm
    model: str
    dataset: str
    num_samples: int
    seed: int
    num_params: int
    num_classes: int
    num_steps: int
    samples_seen: int
    train_flops: float
    """Forward and backward of the student, forward of the teacher, over all steps."""
    error_rate: float
    top5_error_rate: float | None = None
    test_loss: float
    calibration_error: float | None = None
    num_test_samples: int
    train_loss: float
    """Mean over the last tenth of the run."""
    weights_sha256: str
    """Of model.safetensors: two rows with equal hashes come from bitwise equal runs."""
    replaced_samples: int = 0
    """Undecodable training images that another of their class stood in for."""
    upstream: Upstream | None = None
    teacher: str | None = None
    kd_backend: str | None = None
    resources: dict[str, str | int | float | bool | None] = {}
    """How it ran (precision plugin, ZeRO stage, world size …); informative, not part of its identity."""
    timing: Timing


class Attempt(Strict):
    """One scheduler try at a cell: `attempts/<n>.json`."""

    number: int
    status: Literal["running", "done", "failed", "interrupted", "blocked"]
    host: str
    pid: int
    started: float
    """Unix time."""
    ended: float | None = None
    job: str | None = None
    """Scheduler's job id and restart count, where there is one."""
    log: str | None = None
    """Path of the log that a person would read."""
    reason: str | None = None
    signal: str | None = None
    resumed_from_step: int | None = None
    versions: dict[str, str] = {}
    commit: str | None = None
    num_devices: int = 1


class Progress(Strict):
    """Heartbeat of a running cell: `progress.json`, rewritten every few seconds."""

    step: int
    num_steps: int
    loss: float | None
    images_per_s: float
    updated: float
    """Unix time."""


@dataclass(frozen=True)
class Store:
    """Paths and atomic reads and writes under one root folder."""

    root: Path

    def cell_dir(self, key: str) -> Path:
        return self.root / "cells" / key

    def grid_dir(self, name: str) -> Path:
        return self.root / "grids" / name

    def write_spec(self, spec: CellSpec) -> None:
        """`recipe.json`; left alone when it exists, for equal keys mean equal content.

        Not synced, because a grid writes thousands: what a power cut empties, the next submit writes again.
        """
        path = self.cell_dir(spec.key) / "recipe.json"
        if not _has_content(str(path)):
            write_model(path, spec, durable=False)

    def read_spec(self, key: str) -> CellSpec:
        path = self.cell_dir(key) / "recipe.json"
        if not path.exists():
            raise StoreError(
                f"no cell {key!r} in {self.root}; `dbscale plan --cells` lists a grid's cells, and "
                "--grid names the grid of one that was never submitted"
            )
        return validate(CellSpec, read_json(path), where=str(path))

    def read_row(self, key: str) -> Row | None:
        path = self.cell_dir(key) / "row.json"
        return validate(Row, read_json(path), where=str(path)) if path.exists() else None

    def write_row(self, row: Row) -> None:
        write_json(self.cell_dir(row.key) / "row.json", row.model_dump(mode="json"))

    def attempts(self, key: str) -> list[Attempt]:
        """All tries so far, oldest first."""
        return [self._read_attempt(key, number) for number in self._attempt_numbers(key)]

    def write_attempt(self, key: str, attempt: Attempt) -> None:
        write_json(self.cell_dir(key) / "attempts" / f"{attempt.number}.json", attempt.model_dump(mode="json"))

    def read_progress(self, key: str) -> Progress | None:
        path = self.cell_dir(key) / "progress.json"
        return validate(Progress, read_json(path), where=str(path)) if path.exists() else None

    def write_progress(self, key: str, progress: Progress) -> None:
        write_json(self.cell_dir(key) / "progress.json", progress.model_dump(mode="json"), durable=False)

    def last_attempt(self, key: str) -> Attempt | None:
        numbers = self._attempt_numbers(key)
        return self._read_attempt(key, numbers[-1]) if numbers else None

    def _attempt_numbers(self, key: str) -> list[int]:
        try:
            names = os.listdir(f"{self.root}/cells/{key}/attempts")
        except FileNotFoundError:
            return []
        return sorted(int(name[:-5]) for name in names if name.endswith(".json") and not name.startswith("."))

    def _read_attempt(self, key: str, number: int) -> Attempt:
        path = self.cell_dir(key) / "attempts" / f"{number}.json"
        return validate(Attempt, read_json(path), where=str(path))

    def states(self, keys: Iterable[str]) -> dict[str, CellState]:
        """`state` of many cells: those without a folder are new without another look."""
        folder = self.root / "cells"
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        return {key: self.state(key) if key in present else "new" for key in keys}

    def state(self, key: str) -> CellState:
        """Derived from the files alone: a row means done; an open attempt whose process is gone was interrupted."""
        # Plain strings: this is asked for ten thousand cells at once, and joining paths is most of its cost.
        if os.path.exists(f"{self.root}/cells/{key}/row.json"):
            return "done"
        attempt = self.last_attempt(key)
        if attempt is None:
            return "new"
        if attempt.status != "running":
            return attempt.status
        return "running" if self._alive(key, attempt) else "interrupted"

    def _alive(self, key: str, attempt: Attempt) -> bool:
        if attempt.host == socket.gethostname():
            return _pid_exists(attempt.pid)
        progress = self.read_progress(key)
        last_sign = max(attempt.started, progress.updated if progress else 0.0)
        return time.time() - last_sign < HEARTBEAT_LIMIT_S


def _has_content(path: str) -> bool:
    try:
        return os.stat(path).st_size > 0
    except FileNotFoundError:
        return False


def _pid_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
