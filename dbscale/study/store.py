"""The store: one folder per cell, one per grid; every write is temp + fsync + rename, no file has two writers.

Reads are cheap and torch-free, so that `plan` and `status` answer at once on a login node.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from dbscale.study.cell import CellSpec
from dbscale.study.row import Row
from dbscale.study.strict import Strict, validate

CellState = Literal["new", "running", "done", "failed", "interrupted", "blocked"]
HEARTBEAT_LIMIT_S = 120.0
"""A run whose progress file is older than this, on another host, is taken for dead."""


class StoreError(ValueError):
    """The store cannot be used: says which path and what to do."""


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


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise StoreError(f"{path} is not valid JSON ({error}); remove it and the cell runs again") from None


def write_json(path: Path, value: Mapping[str, Any] | list[Any], *, durable: bool = True) -> None:
    """Atomic: a reader sees the old file or the new one, never half of either."""
    with atomic_open(path, "w", durable=durable) as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")


def write_model(path: Path, model: Strict, *, durable: bool = True) -> None:
    """As `write_json`, for configs that are large or many: pydantic writes JSON many times faster."""
    with atomic_open(path, "w", durable=durable) as file:
        file.write(model.model_dump_json(indent=1) + "\n")


@contextlib.contextmanager
def atomic_open(path: Path, mode: Literal["w", "wb"], *, durable: bool = True) -> Iterator[IO[Any]]:
    """A file that appears under `path` only when it was written whole. Raises StoreError when it cannot be."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{_hostname()}.{os.getpid()}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, mode) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another STORE, then run again: "
            "finished cells are kept"
        ) from error


@functools.cache
def _hostname() -> str:
    return socket.gethostname()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
