"""A lease on a cell: whoever holds it runs the cell, and it passes on when its holder is dead or stops renewing it.

For workers that share nothing but a folder, on any file system: a lease is a file that only one of those who ask at once
can create. No lock daemon is asked and no two clocks are compared: a worker takes over what it has itself watched for
`limit_s` without a renewal, or whose process it sees to be dead. A holder that was merely asleep finds the file is no
longer its own and stops. What a cell writes is the store's business, which lock keeps one machine's processes apart too.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from uuid import uuid4

from dbscale.files import ProcessMark, cannot_write, make_folder

LEASE_NAME = ".lease"
LIMIT_S = 120.0
"""Twice what NFS clients may show an old time of a file for (acregmax, 60 s)."""
RENEWALS = 6
"""Within the limit: a store that is away for a moment costs no lease."""
Stamp = tuple[str, int]
"""A lease's token and when it was last renewed, by the file server's clock."""


@dataclass
class Leases:
    """Takes leases for one worker, and remembers since when it has seen each of the others' unrenewed."""

    limit_s: float = LIMIT_S
    clock: Callable[[], float] = time.monotonic
    _seen: dict[Path, tuple[Stamp, float]] = field(default_factory=dict)

    @contextlib.contextmanager
    def hold(self, path: Path, lost: Callable[[str], object]) -> Iterator[bool]:
        """Hold the lease `path` inside the block, renewed in the background; False where somebody else holds it.

        `lost` is called with a sentence when another worker took it over meanwhile. Raises FileError or OSError where
        the folder cannot be written.
        """
        descriptor = self.take(path)
        if descriptor is None:
            yield False
            return
        released = threading.Event()
        threading.Thread(target=self._renew, args=(path, descriptor, released, lost), daemon=True).start()
        try:
            yield True
        finally:
            released.set()
            if is_own(path, descriptor):
                with contextlib.suppress(OSError):
                    path.unlink()
            os.close(descriptor)

    def take(self, path: Path) -> int | None:
        """A descriptor of the lease, now this process's; None where somebody else has it."""
        make_folder(path.parent)
        for _ in range(2):
            try:
                # Only one of several processes creates a file, on NFS too (from version 3 on).
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            except FileExistsError:
                if not self._take_away(path):
                    return None
                continue
            except OSError as error:
                raise cannot_write(path, error) from error
            os.write(descriptor, json.dumps({"token": uuid4().hex, **asdict(ProcessMark.of())}).encode())
            os.fsync(descriptor)
            return descriptor
        return None

    def _take_away(self, path: Path) -> bool:
        """Remove a lease whose time is over; True where the path is free now."""
        try:
            stamp, holder = read_lease(path)
        except FileNotFoundError:  # given back this moment
            return True
        first, since = self._seen.setdefault(path, (stamp, self.clock()))
        if first != stamp:
            self._seen[path] = (stamp, self.clock())
        is_over = (holder is not None and holder.alive is False) or (
            first == stamp and self.clock() - since > self.limit_s
        )
        return is_over and remove(path, stamp)

    def _renew(self, path: Path, descriptor: int, released: threading.Event, lost: Callable[[str], object]) -> None:
        while not released.wait(self.limit_s / RENEWALS):
            if not is_own(path, descriptor):
                if not released.is_set():
                    lost(f"the lease {path} was taken over: this process had not renewed it for {self.limit_s:.0f} s")
                return
            with contextlib.suppress(OSError):
                os.utime(descriptor)


def read_lease(path: Path) -> tuple[Stamp, ProcessMark | None]:
    """Stamp and holder of a lease; no holder while it is being written, or where it is damaged. Raises
    FileNotFoundError."""
    with path.open() as file:  # opening makes an NFS client ask the server for the file's time
        text, renewed = file.read(), os.fstat(file.fileno()).st_mtime_ns
    try:
        content = json.loads(text)
        return (str(content.pop("token")), renewed), ProcessMark(**content)
    except (ValueError, TypeError, KeyError, AttributeError):
        return (text, renewed), None


def remove(path: Path, stamp: Stamp) -> bool:
    """Remove the lease of this stamp; one that was renewed, or is another's by now, is put back."""
    aside = path.with_name(f"{path.name}.{uuid4().hex[:12]}")
    try:
        path.rename(aside)  # of several workers that try, one finds the file
        same = read_lease(aside)[0] == stamp
        if not same:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()
    except FileNotFoundError:
        return True
    return same


def is_own(path: Path, descriptor: int) -> bool:
    """Whether the file at `path` is still the one that was created; a store that is away proves nothing."""
    try:
        there, own = path.stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)
