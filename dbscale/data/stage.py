"""Copy the shards a subset needs to a node's own disk, once per node, and read them there.

Jobs that race for the same shard wait for the one that copies it; a copy that was cut off goes on at the next shard.
Locks are taken on the node's disk only, never on the network filesystem the dataset lives on. A folder in use is
locked as long as the process lives, so that `remove_unused` can tell.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np

from dbscale.data.dataset import Dataset, Subset
from dbscale.data.manifest import MANIFEST_NAME, Manifest, ShardInfo
from dbscale.data.read import check_shard_size
from dbscale.errors import DataError, FileError
from dbscale.files import atomic_open, cannot_write, make_folder

_USERS = ".users"
_REMOVED = ".removed"
_held: dict[Path, int] = {}
"""Descriptors of the folders this process uses; their locks fall when the process ends, however it ends."""


def stage_subset(subset: Subset, staging: str | Path) -> Subset:
    """The same subset, read from a folder of its own under `staging`, with just its shards copied there.

    Raises:
        DataError: the disk is full even without unused folders, or a shard at the source is damaged.
    """
    dataset = subset.dataset
    local = Path(staging) / _folder_name(dataset.manifest)
    hold(local)
    try:
        for name in (dataset.split.index, MANIFEST_NAME):
            if not (local / name).exists():
                _copy(dataset.folder / name, local / name)
        for shard in needed_shards(subset):
            _stage_shard(dataset.folder, local, shard)
    except BaseException:
        let_go(local)
        raise
    cache = dataset.cache_dir or local / "cache"
    staged = Dataset(local, dataset.manifest, dataset.split_name, dataset.tier, dataset.image_size, cache)
    return replace(subset, dataset=staged)


def _folder_name(manifest: Manifest) -> str:
    """Keyed by the whole manifest: the same samples cut into other shards share a fingerprint, but not their tars."""
    digest = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()[:12]
    return f"{manifest.name}-{digest}"


def needed_shards(subset: Subset) -> list[ShardInfo]:
    """Shards that hold samples of the subset; all of them for the resident tier, which decodes the whole split."""
    shards = subset.dataset.split.shards
    if subset.dataset.tier == "resident":
        return list(shards)
    numbers = np.unique(subset.dataset.index["shard"][subset.indices])
    return [shards[number] for number in numbers.tolist()]


def remove_unused(staging: str | Path) -> list[Path]:
    """Remove the folders that no living process uses; returns what was removed. Several processes may do so at once."""
    removed = []
    for leftover in Path(staging).glob(f".*{_REMOVED}"):  # of a process that was killed meanwhile
        shutil.rmtree(leftover, ignore_errors=True)
    for users in sorted(Path(staging).glob(f"*/{_USERS}")):
        try:
            descriptor = os.open(users, os.O_RDWR)
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


def release(subset: Subset) -> None:
    """Say that this process no longer uses the folder of a staged subset."""
    let_go(subset.dataset.folder)


def let_go(local: Path) -> None:
    """Undo `hold`."""
    descriptor = _held.pop(local, None)
    if descriptor is not None:
        os.close(descriptor)


def hold(local: Path) -> None:
    """Create a folder and mark it as used as long as this process lives: take part in its shared lock."""
    if local in _held and (local / _USERS).exists():
        return
    while True:
        make_folder(local)
        descriptor = os.open(local / _USERS, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        # Another process may have removed the folder between opening and locking.
        if (local / _USERS).exists() and os.stat(local / _USERS).st_ino == os.fstat(descriptor).st_ino:
            _held[local] = descriptor
            return
        os.close(descriptor)


def _stage_shard(source: Path, local: Path, shard: ShardInfo) -> None:
    target = local / shard.name
    if _is_whole(target, shard):
        return
    with _only_one(local / f".{shard.name}.lock"):
        if not _is_whole(target, shard):  # another process may have copied it while this one waited
            check_shard_size(source, shard)
            _copy(source / shard.name, target)


def _is_whole(path: Path, shard: ShardInfo) -> bool:
    return path.exists() and path.stat().st_size == shard.num_bytes


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
        with open(source, "rb") as reader, atomic_open(target) as writer:
            shutil.copyfileobj(reader, writer, 1 << 22)
    except OSError as error:
        raise cannot_write(target, error) from error
