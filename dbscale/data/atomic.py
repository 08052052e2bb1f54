"""Write files so that a reader sees the old one, the new one, or none: temp + fsync + rename.

Used by everything that writes into a dataset's folder. Two processes may write the same file at once: each uses a
temporary name of its own and the last rename wins.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

from dbscale.data.errors import DataError


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `path` when the block ends, and vanishes when it raises.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    temp = path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")
    try:
        with open(temp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        with suppress(OSError):
            temp.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically; creates the folder."""
    make_folder(path.parent)
    with atomic_writer(path) as file:
        file.write(data)


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises DataError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain_os_error(error, path) from error


def explain_os_error(error: OSError, path: Path) -> Exception:
    """A DataError for what users can mend (disk full, no permission, read-only); the error itself otherwise."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
        free_mib = shutil.disk_usage(folder).free / 2**20
        return DataError(
            f"{path}: the disk is full ({free_mib:.0f} MiB free); what was written before is kept: "
            "free some space and run the same command again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DataError(f"{path}: cannot be written ({error.strerror}); choose a folder you may write to")
    return error
