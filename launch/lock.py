"""One driver per store: a lock file that names its holder, released by the kernel when the holder dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dbscale.study.store import StoreError

LOCK_NAME = ".driver.lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def driver_lock(store_root: Path, command: str, grid: str) -> Iterator[None]:
    """Hold the store for one submit of `grid`; raises StoreError naming pid, host and command of another holder.

    Where the file system has no locks the command goes on without: each cell has its own lock besides.
    """
    path = store_root / LOCK_NAME
    with _open(path) as file:
        if not _acquire(file):
            raise StoreError(f"{store_root} is in use by {_describe(holder(store_root))}; wait for it, stop it with "
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
        raise StoreError(
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
        raise StoreError(f"cannot write to the store {file.name}: {error.strerror}; free space and run again") from None


def _describe(other: dict[str, Any] | None) -> str:
    if other is None:
        return "another dbscale command"
    since = time.strftime("%H:%M:%S", time.localtime(other["started"]))
    return f"`{other['command']}` (pid {other['pid']} on {other['host']}, since {since})"
