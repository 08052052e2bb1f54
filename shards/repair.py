"""Mend a packed dataset from its source: rewrite the shards that are missing, cut or resized, and a damaged index.

What is written again must have the very bytes the manifest promises; otherwise the source has changed; that is said.
Damage inside a shard of the right size is found by `verify`; remove such a shard and it is written again.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dbscale.data.manifest import Manifest, ShardInfo, SplitInfo
from dbscale.data.read import file_checksum, index_dtype, open_index, save_index
from dbscale.errors import DataError
from dbscale.files import make_folder
from shards.jobs import WORK_FOLDER, ShardJob, run_jobs
from shards.source import Source


def is_damaged(folder: Path, manifest: Manifest) -> bool:
    """Whether a file is missing, a shard has the wrong size, or an index the wrong bytes."""
    return any(
        index_is_damaged(folder, split) or any(shard_is_damaged(folder, shard) for shard in split.shards)
        for split in manifest.splits.values()
    )


def shard_is_damaged(folder: Path, shard: ShardInfo) -> bool:
    """Whether the tar is missing or has another size than it was packed with."""
    path = folder / shard.name
    return not path.exists() or path.stat().st_size != shard.num_bytes


def index_is_damaged(folder: Path, split: SplitInfo) -> bool:
    """Whether the index file is missing or has other bytes than it was packed with."""
    path = folder / split.index
    return not path.exists() or file_checksum(path) != split.index_checksum


def repair(
    source: Source, manifest: Manifest, jobs: Sequence[ShardJob], num_processes: int | None, progress: bool
) -> None:
    """Write again what is damaged; does nothing to a sound dataset.

    Args:
        source: what the dataset was packed from.
        manifest: of the dataset.
        jobs: of all its shards, by the same plan.
        num_processes, progress: as in `pack`.

    Raises:
        DataError: the source no longer gives the bytes that were packed.
    """
    for split_name, split in manifest.splits.items():
        own = [job for job in jobs if job.split == split_name]
        folder = own[0].folder
        # A lost index can only be trusted again when every row was written again.
        lost_index = index_is_damaged(folder, split)
        todo = [job for job in own if lost_index or shard_is_damaged(folder, split.shards[job.shard])]
        if not todo:
            continue
        make_folder(folder / WORK_FOLDER)
        run_jobs(source.prepare(folder / WORK_FOLDER), todo, num_processes, progress)
        if lost_index:
            _restore_index(folder, split, own)
        _check(folder, split, todo)
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)


def _restore_index(folder: Path, split: SplitInfo, jobs: Sequence[ShardJob]) -> None:
    parts = [job.rows() for job in jobs]
    index = np.concatenate(parts, dtype=index_dtype(max(part.dtype["key"].itemsize for part in parts)))
    if save_index(folder / split.index, index) != split.index_checksum:
        raise _changed(folder)


def _check(folder: Path, split: SplitInfo, jobs: Sequence[ShardJob]) -> None:
    index = open_index(folder, split)
    for job in jobs:
        stored = index[job.first_position : job.first_position + len(job.names)]
        rows = job.rows()
        same = all(np.array_equal(rows[field], stored[field]) for field in ("checksum", "offset", "label"))
        if not same or shard_is_damaged(folder, split.shards[job.shard]):
            job.tar_path.unlink(missing_ok=True)  # better missing, and named as such, than foreign
            raise _changed(folder)


def _changed(folder: Path) -> DataError:
    return DataError(
        f"{folder}: the source no longer gives the images that were packed; bring the old source back, or remove this "
        "folder and pack anew (results of the old images keep their own fingerprint)"
    )
