"""Copy the shards a subset needs to a node's own disk, once per node, and read them there.

Jobs that race for the same shard wait for the one that copies it; a copy that was cut off goes on at the next shard.
Each copy is read back once and compared with the checksums of manifest and index; a note beside it records that.
Locks are taken on the node's disk only, never on the network filesystem the dataset lives on. A folder in use is
locked as long as the process lives, so that `remove_unused` can tell.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from uuid import uuid4

import numpy as np

from dbscale.data.dataset import Dataset, Subset
from dbscale.data.manifest import MANIFEST_NAME, ShardInfo, load_manifest
from dbscale.data.read import TARGET, check_shard_size, checksum, file_checksum, has_targets
from dbscale.data.remote import copy_shard, origin
from dbscale.errors import DataError, FileError
from dbscale.files import atomic_open, cannot_write, make_folder, write_atomic

_USERS = ".users"
_REMOVED = ".removed"
log = logging.getLogger(__name__)
_held: dict[Path, int] = {}
"""Descriptors of the folders this process uses; their locks fall when the process ends, however it ends."""


def stage_subset(subset: Subset, staging: str | Path) -> Subset:
    """The same subset, read from a folder of its own under `staging`, with just its shards copied there.

    Raises DataError where the disk is full even without unused folders, or a shard at the source is damaged.
    """
    dataset = subset.dataset
    # By the whole manifest: the same samples cut into other shards share a fingerprint, but not their tars.
    digest = hashlib.sha256(dataset.manifest.model_dump_json().encode()).hexdigest()[:12]
    # A manifest may come from anywhere: its name must not lead out of the staging folder.
    local = Path(staging) / f"{re.sub(r'[^A-Za-z0-9_-]', '_', dataset.manifest.name)}-{digest}"
    hold(local)
    try:
        _stage_file(dataset.folder, local, MANIFEST_NAME, lambda: load_manifest(local) == dataset.manifest)
        index, expected = dataset.split.index, dataset.split.index_checksum
        _stage_file(dataset.folder, local, index, lambda: file_checksum(local / index) == expected)
        for number in needed_shards(subset):
            shard, is_whole = dataset.split.shards[number], partial(_is_whole, dataset, local, number)
            _stage_file(dataset.folder, local, shard.name, is_whole, shard)
    except BaseException:
        release(local)
        raise
    cache = dataset.cache_dir or local / "cache"
    staged = Dataset(local, dataset.manifest, dataset.split_name, dataset.tier, dataset.image_size, cache)
    return replace(subset, dataset=staged)


def needed_shards(subset: Subset) -> list[int]:
    """Numbers of the shards that hold samples of the subset; all for the resident tier, which decodes the whole split."""
    if subset.dataset.tier == "resident":
        return list(range(len(subset.dataset.split.shards)))
    return np.unique(subset.dataset.index["shard"][subset.indices]).tolist()


def remove_unused(staging: str | Path) -> list[Path]:
    """Remove the folders that no living process uses; returns what was removed. Several processes may do so at once."""
    removed = []
    for leftover in Path(staging).glob(f".*{_REMOVED}"):  # left by a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    for users in sorted(Path(staging).glob(f"*/{_USERS}")):
        if users.parent.is_symlink():  # not ours: staging folders are made as folders
            continue
        try:
            descriptor = os.open(users, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Moved away first: whoever comes while the files go finds no folder, rather than half of one.
            aside = users.parent.with_name(f".{users.parent.name}.{uuid4().hex[:12]}{_REMOVED}")
            users.parent.rename(aside)
            shutil.rmtree(aside)
            removed.append(users.parent)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        finally:
            os.close(descriptor)
    return removed


def release(local: Path) -> None:
    """Undo `hold`: this process no longer uses the folder."""
    descriptor = _held.pop(local, None)
    if descriptor is not None:
        os.close(descriptor)


def hold(local: Path) -> None:
    """Create a folder and mark it as used as long as this process lives: take part in its shared lock."""
    if local in _held and (local / _USERS).exists():
        return
    while True:
        make_folder(local)
        if local.is_symlink() or local.stat().st_uid != os.geteuid():
            raise DataError(
                f"{local} is another user's, or a link: choose a staging folder of your own, such as $TMPDIR"
            )
        descriptor = os.open(local / _USERS, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        # Another process may have removed the folder between opening and locking.
        if (local / _USERS).exists() and os.stat(local / _USERS).st_ino == os.fstat(descriptor).st_ino:
            _held[local] = descriptor
            return
        os.close(descriptor)


def _stage_file(
    source: Path, local: Path, name: str, is_sound: Callable[[], bool], shard: ShardInfo | None = None
) -> None:
    """Copy a file that is missing or not sound; one process at a time. Raises DataError where the `shard` is damaged at
    its source, or the copy is not sound either."""
    if _holds(is_sound):
        return
    with _only_one(local / f".{name}.lock"):
        if _holds(is_sound):  # another process may have copied it while this one waited
            return
        if shard is not None and origin(source) is None:  # one behind a URL is found to be damaged when it is copied
            check_shard_size(source, shard)
        log.info("copying %s to %s", source / name, local)
        _copy(source / name, local / name)
        if not _holds(is_sound):
            raise DataError(
                f"{local / name}: the copy is not what was packed; look at this node's disk, and let "
                f"`dbscale shards verify {source}` look at the original"
            )


def _holds(is_sound: Callable[[], bool]) -> bool:
    try:
        return is_sound()
    except (DataError, OSError):
        return False


def _is_whole(dataset: Dataset, local: Path, number: int) -> bool:
    """Whether every sample of a copied tar has the bytes that were packed, or else those that its source has now."""
    shard = dataset.split.shards[number]
    path, note = local / shard.name, local / f".{shard.name}.checked"
    status = path.stat()
    stamp = f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"
    if note.is_file() and note.read_bytes() == stamp.encode():
        return True
    if status.st_size != shard.num_bytes:
        return False
    first = sum(other.num_samples for other in dataset.split.shards[:number])
    parts = ("", TARGET) if has_targets(dataset.index) else ("",)
    with open(path, "rb") as copy:
        for position, what in product(range(first, first + shard.num_samples), parts):
            record = dataset.index[position]
            size, offset, expected = (int(record[f"{what}{name}"]) for name in ("size", "offset", "checksum"))
            data = os.pread(copy.fileno(), size, offset)
            # A sample that is bad at its source too is the loader's to replace and to count.
            if checksum(data) != expected and data != dataset.files.stored(position, what):
                return False
    write_atomic(note, stamp.encode())
    return True


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _copy(source: Path, target: Path) -> None:
    try:
        _copy_once(source, target)
    except (DataError, FileError):
        if not remove_unused(target.parent.parent):
            raise
        _copy_once(source, target)


def _copy_once(source: Path, target: Path) -> None:
    try:
        with atomic_open(target) as writer:
            if origin(source.parent) is not None and not source.exists():
                copy_shard(source.parent, source.name, writer)
            else:
                with open(source, "rb") as reader:
                    shutil.copyfileobj(reader, writer, 1 << 22)
    except OSError as error:
        raise cannot_write(target, error) from error
