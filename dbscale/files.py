"""Files that are written whole or not at all, sealed JSON, and one lock: temp + fsync + rename, used by every wing.

Two processes may write one file at once: each uses a temporary name of its own, and the last rename wins. A sealed file
ends in a checksum of what stands before it: a changed digit is still valid JSON, and nothing else would tell.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import grp
import hashlib
import json
import os
import pwd
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeVar
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from dbscale.errors import FileError

Model = TypeVar("Model", bound=BaseModel)
LOCK_NAME = ".driver.lock"
LOCK_INTERVAL_S = 5.0
SEAL = b',\n "seal": "'
ZOMBIE = -1
MOST_PROCESSES = 2**31
LATEST = 4e10
"""Unix time that no honest clock shows: beyond it, a time cannot be printed."""
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


def make_folder(path: Path, *, private: bool = False) -> None:
    """Create a folder and its parents; `private`: a new one that only its owner can enter, for scripts and their like.

    Raises FileError where that is not possible.
    """
    try:
        path.mkdir(0o700 if private else 0o777, parents=True, exist_ok=not private)
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


def others_who_write(folder: Path) -> str | None:
    """Who besides its owner can write to a folder, said; None for nobody, and where there is no such folder."""
    try:
        status = folder.stat()
    except OSError:
        return None
    if status.st_mode & stat.S_IWOTH:
        return "everybody on this machine"
    if not status.st_mode & stat.S_IWGRP:
        return None
    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return f"group {status.st_gid}"
    # Where every user has a group of his own, that group means nobody else.
    is_private = (
        group.gr_gid == owner.pw_gid and group.gr_name == owner.pw_name and not set(group.gr_mem) - {owner.pw_name}
    )
    return None if is_private else f"the group {group.gr_name}"


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


def sealed(text: str) -> str:
    """A JSON object as indented text, with a checksum of its own bytes as a last key, `seal`."""
    body = text.rstrip().removesuffix("}").rstrip().encode()
    return f'{(body + SEAL).decode()}{_digest(body)}"\n}}\n'


def unsealed(data: bytes, path: str | Path) -> tuple[bytes, bool]:
    """The JSON in front of a seal, and whether there was one. Raises FileError where it does not fit.

    Files that a hand or an earlier release wrote have none.
    """
    body, mark, rest = data.rpartition(SEAL)
    if (
        not mark and re.search(rb'"seal"\s*:\s*"[^"]*"\s*}\s*$', data[-200:]) is None
    ):  # not one that an editor reformatted
        return data, False
    if rest != f'{_digest(body)}"\n}}\n'.encode():
        raise FileError(f"{path} is damaged (it does not match its own checksum)")
    return body + b"\n}\n", True


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:32]


def read_bytes(path: str | Path) -> bytes:
    """Everything in a regular file. Raises OSError."""
    with open(path, "rb", opener=regular) as file:
        return file.read()


def regular(path: str, flags: int) -> int:
    """For `open`'s `opener`: a pipe in a file's place, whose reader would wait for ever, is an OSError."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "it is not a regular file", path)


def read_json(path: Path) -> Any:
    """The value in a JSON file, its seal checked and left out. Raises FileError where it is damaged, OSError where it
    cannot be read."""
    try:
        return json.loads(unsealed(read_bytes(path), path)[0])
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} is not valid JSON ({error}); restore it, or remove it and run again") from None


def write_json(path: Path, value: Mapping[str, Any], *, durable: bool = True, seal: bool = False) -> None:
    """Atomic: a reader sees the old file or the new one, never half of either. `seal`: as `sealed`."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with atomic_open(path, "w", durable=durable) as file:
        file.write(sealed(text) if seal else text)


def write_model(path: Path, model: BaseModel) -> None:
    """As `write_json`, sealed, for configs that are large: pydantic writes JSON many times faster."""
    write_atomic(path, model_text(model).encode())


def model_text(model: BaseModel) -> str:
    """What `write_model` writes."""
    return sealed(model.model_dump_json(indent=1))


def read_model(kind: type[Model], path: str | Path) -> Model:
    """The `kind` in a JSON file, its seal checked. Raises FileNotFoundError, or FileError saying what is wrong with it."""
    try:
        return kind.model_validate_json(unsealed(read_bytes(path), path)[0])
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise FileError(f"{path} is damaged ({place}{': ' if place else ''}{first['msg']})") from None


@dataclass(frozen=True)
class ProcessMark:
    """One process beyond doubt: pids come again and clocks can be set, boot and tick of start do neither."""

    host: str
    pid: int
    boot: str | None = None
    """The kernel's boot and the pid namespace; None where there is no /proc."""
    start: int | None = None
    """Clock ticks from boot to the start of the process."""

    @classmethod
    def of(cls, pid: int | None = None) -> ProcessMark:
        """This process, or the one with this `pid` on this machine."""
        pid = os.getpid() if pid is None else pid
        return cls(hostname(), pid, _boot(), _start_tick(pid))

    @property
    def alive(self) -> bool | None:
        """Whether the process runs; None where this machine cannot tell: another host, another boot or container."""
        if (
            self.host == hostname() and not 0 < self.pid < MOST_PROCESSES
        ):  # the others mean groups to the kernel, or nothing
            return False
        if self.host != hostname() or self.boot != _boot():
            return None
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            pass  # it is another user's, hence alive
        except (ProcessLookupError, OverflowError):
            return False
        tick = _start_tick(self.pid)
        return tick in (None, self.start)


@functools.cache
def _boot() -> str | None:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_tick(pid: int) -> int | None:
    """Field 22 of /proc/<pid>/stat, or ZOMBIE; None where it is hidden."""
    try:
        # The command's name, in brackets, may hold spaces and brackets of its own.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return ZOMBIE if fields[0] == "Z" else int(fields[19])


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`; yields False when another process holds it. It ends with its holder, however that dies.

    Where the file system has no locks the answer is True. Raises FileError where the file cannot be opened.
    """
    with _open_lock(path) as file:
        yield _acquire(file)


@dataclass(frozen=True)
class Holder:
    """Who drives a store."""

    process: ProcessMark
    command: str
    grid: str
    started: float
    """Unix time."""

    def __str__(self) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(self.started))
        return f"`{self.command}` (pid {self.process.pid} on {self.process.host}, since {since})"


@contextlib.contextmanager
def driver_lock(store_root: Path, command: str, grid: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the store for one submit of `grid`; raises FileError naming command, pid and host of another holder, which
    has `wait_s` to finish.

    Where the file system has no locks, the command continues without one: each cell has its own lock as well.
    """
    deadline = time.monotonic() + wait_s
    with _open_lock(store_root / LOCK_NAME) as file:
        while not _acquire(file):
            if time.monotonic() >= deadline:
                raise FileError(f"{store_root} is in use by {holder(store_root) or 'another dbscale command'}; wait for it, "
                                "stop it with Ctrl-C or `dbscale cancel`, or choose another STORE")  # fmt: skip
            time.sleep(LOCK_INTERVAL_S)
        _sign(file, store_root, Holder(ProcessMark.of(), command, grid, time.time()))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def holder(store_root: Path) -> Holder | None:
    """Who holds the store, or last held it if it was killed; None when the file does not say."""
    try:
        with _open_lock(store_root / LOCK_NAME, os.O_RDONLY) as file:
            found = json.loads(file.read())
        known = Holder(
            ProcessMark(**found["process"]), str(found["command"]), str(found["grid"]), float(found["started"])
        )
        is_sound = isinstance(known.process.pid, int) and known.process.pid > 1 and 0 <= known.started <= LATEST
        return known if is_sound else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):  # FileError among them
        return None


def is_held(store_root: Path) -> bool:
    """Whether a live driver holds the store at this moment."""
    try:
        # Reading suffices for a shared lock, so another user's driver is seen as well.
        with _open_lock(store_root / LOCK_NAME, os.O_RDONLY) as file:
            return not _acquire(file, fcntl.LOCK_SH)
    except (OSError, FileError):  # no such file, most often
        return False


def _open_lock(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> IO[str]:
    """Open without following a link: a lock file that points elsewhere would have its target emptied."""
    try:
        if flags & os.O_CREAT:
            path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileError(f"the lock file {path} is a symbolic link; remove it and run again") from None
        raise FileError(
            f"cannot write to the store {path.parent}: {error.strerror}; choose another with --store (STORE=… in make)"
        ) from error
    return os.fdopen(descriptor, "r+" if flags & os.O_RDWR else "r")


def _acquire(file: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True


def _sign(file: IO[str], store_root: Path, who: Holder) -> None:
    file.seek(0)
    file.truncate()
    try:
        json.dump(asdict(who), file)
        file.flush()
    except OSError as error:
        raise FileError(
            f"cannot write to the store {store_root}: {error.strerror}; free space and run again"
        ) from error
