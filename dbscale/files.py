"""Files that are written whole or not at all, JSON, and one lock: temp + fsync + rename, used by every wing.

Two processes may write one file at once: each uses a temporary name of its own, and the last rename wins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal
from uuid import uuid4

from pydantic import BaseModel

from dbscale.errors import FileError

LOCK_NAME = ".driver.lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def atomic_open(path: Path, mode: Literal["w", "wb"] = "wb", *, durable: bool = True) -> Iterator[IO[Any]]:
    """A file that appears under `path` only when it was written whole, and vanishes when the block raises.

    `durable` makes it survive a power cut. Creates the folder. Raises FileError when it cannot be written.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{hostname()}.{os.getpid()}.{uuid4().hex[:8]}.tmp")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        with open(temporary, mode) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync_folder(Path(folder or "."))
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        # A folder that vanishes while it is written belongs to another process that was faster: the caller knows.
        if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
            raise
        raise cannot_write(path, error) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_open(path, "wb") as file:
        file.write(data)


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises FileError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> FileError:
    """What to tell the user of a write that failed."""
    path = Path(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
        free_mib = shutil.disk_usage(folder).free / 2**20
        return FileError(
            f"cannot write {path}: {error.strerror}; the disk is full ({free_mib:.0f} MiB free): free some space and "
            "run the same command again, what was finished is kept"
        )
    return FileError(
        f"cannot write {path}: {error.strerror or error}; choose a folder that you may write to, then run again: what "
        "was finished is kept"
    )


@functools.cache
def hostname() -> str:
    return socket.gethostname()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The value in a JSON file. Raises FileError where it is damaged, OSError where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is not valid JSON ({error}); remove it and the cell runs again") from None


def write_json(path: Path, value: Mapping[str, Any] | list[Any], *, durable: bool = True) -> None:
    """Atomic: a reader sees the old file or the new one, never half of either."""
    with atomic_open(path, "w", durable=durable) as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")


def write_model(path: Path, model: BaseModel, *, durable: bool = True) -> None:
    """As `write_json`, for configs that are large or many: pydantic writes JSON many times faster."""
    with atomic_open(path, "w", durable=durable) as file:
        file.write(model.model_dump_json(indent=1) + "\n")


@contextlib.contextmanager
def driver_lock(store_root: Path, command: str, grid: str) -> Iterator[None]:
    """Hold the store for one submit of `grid`; raises FileError naming pid, host and command of another holder.

    Where the file system has no locks the command goes on without: each cell has its own lock besides.
    """
    path = store_root / LOCK_NAME
    with _open(path) as file:
        if not _acquire(file):
            raise FileError(f"{store_root} is in use by {_describe(holder(store_root))}; wait for it, stop it with "
                             "Ctrl-C or `dbscale cancel`, or choose another STORE")  # fmt: skip
        _sign(file, command, grid)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def holder(store_root: Path) -> dict[str, Any] | None:
    """Who holds (or last held, if it was killed) the store: pid, host, command, grid, started."""
    try:
        return json.loads((store_root / LOCK_NAME).read_text())
    except (OSError, json.JSONDecodeError):
        return None


def is_held(store_root: Path) -> bool:
    """Whether a live driver holds the store at this moment."""
    try:
        with (store_root / LOCK_NAME).open("r+") as file:
            return not _acquire(file)
    except OSError:
        return False


def _open(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError as error:
        raise FileError(
            f"cannot write to the store {path.parent}: {error.strerror}; choose another with --store (STORE=… in make)"
        ) from None


def _acquire(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True


def _sign(file: IO[str], command: str, grid: str) -> None:
    file.seek(0)
    file.truncate()
    who = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "grid": grid, "started": time.time()}
    try:
        json.dump(who, file)
        file.flush()
    except OSError as error:
        raise FileError(f"cannot write to the store {file.name}: {error.strerror}; free space and run again") from None


def _describe(other: dict[str, Any] | None) -> str:
    if other is None:
        return "another dbscale command"
    since = time.strftime("%H:%M:%S", time.localtime(other["started"]))
    return f"`{other['command']}` (pid {other['pid']} on {other['host']}, since {since})"
