"""Write shards: one job per tar, in this process or in several. A finished job leaves its index rows behind.

Jobs share nothing and end in atomic renames, so the result is the same however many processes run them, a killed run
loses only the shards in flight, and two runs at once do double work but no harm.
"""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dbscale.data.decode import DecodeError
from dbscale.data.manifest import Encoding
from dbscale.errors import DataError
from dbscale.files import atomic_open
from shards.encode import encode
from shards.source import Source
from shards.tar import Sample, write_shard

WORK_FOLDER = ".pack"
"""Inside the dataset's folder: the plan and the finished shards' rows, until the manifest is written."""
_PARALLEL_FROM = 8192
"""Samples below which starting processes costs more than it saves."""
_SHOWN_FAULTS = 10
"""Samples that cannot be packed which a message names at most."""


@dataclass(frozen=True)
class ShardJob:
    """What one process needs to write one shard."""

    folder: Path
    split: str
    shard: int
    first_position: int
    numbers: NDArray[np.int64]
    """Of the samples, in the source's listing."""
    names: list[str]
    labels: NDArray[np.int64]
    encoding: Encoding
    raw_size: int | None

    @property
    def tar_path(self) -> Path:
        return self.folder / f"{self.split}-{self.shard:06d}.tar"

    @property
    def rows_path(self) -> Path:
        return self.folder / WORK_FOLDER / f"{self.split}-{self.shard:06d}.npy"

    def is_done(self) -> bool:
        """Whether an earlier run finished this shard: its rows are written after its tar."""
        return self.rows_path.exists() and self.tar_path.exists()

    def rows(self) -> NDArray[np.void]:
        """The finished shard's index rows."""
        return np.load(self.rows_path, allow_pickle=False)


class _Faulty(Exception):
    """Stops a shard from being written."""


def run_job(source: Source, job: ShardJob) -> list[str]:
    """Write one shard and its rows; where samples cannot be packed nothing is written, and they are named."""
    faults: list[str] = []
    try:
        rows = write_shard(job.tar_path, _samples(source, job, faults), job.shard)
    except _Faulty:
        return faults
    with atomic_open(job.rows_path) as file:
        np.save(file, rows, allow_pickle=False)
    return []


def _samples(source: Source, job: ShardJob, faults: list[str]) -> Iterator[Sample]:
    """Encoded samples; raises _Faulty after the last when there were faults, so that all are found at once."""
    contents = source.read(job.split, job.numbers, job.names)
    for slot, name in enumerate(job.names):
        try:
            suffix, data, height, width = encode(next(contents), job.encoding, job.raw_size)
        except StopIteration:  # a reader that could not go on after a fault
            break
        except OSError as error:
            faults.append(f"{source.origin(name)}: cannot be read ({error.strerror})")
        except DecodeError as error:
            faults.append(f"{source.origin(name)}: {error}")
        else:
            yield Sample(make_key(job.first_position + slot, name), suffix, data, int(job.labels[slot]), height, width)
    if faults:
        raise _Faulty


def make_key(position: int, name: str) -> str:
    """Unique through the position, traceable through the name; no dots, which would end a WebDataset key."""
    stem = re.split("[/:]", name)[-1].rsplit(".", 1)[0]
    return f"{position:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[-40:]}"


def run_jobs(source: Source, jobs: Sequence[ShardJob], num_processes: int | None, progress: bool) -> None:
    """Run jobs on `num_processes` (None: one per core where that pays), with a bar that shows the rate."""
    if not jobs:
        return
    total = sum(len(job.names) for job in jobs)
    wanted = num_processes or default_processes(total)
    with tqdm(
        total=total, desc=f"pack {jobs[0].folder.name}", unit="img", unit_scale=True, disable=not progress
    ) as bar:
        faults = []
        for job, found in _run_all(source, jobs, min(wanted, len(jobs))):
            bar.update(len(job.names))
            faults += found
    if faults:
        more = f" (and {len(faults) - 1} more: {'; '.join(faults[1:_SHOWN_FAULTS])})" if faults[1:] else ""
        raise DataError(
            f"{faults[0]}{more}; {source.remedy}, remove the half-finished {jobs[0].folder}, then run the same command "
            "again"
        )


def _run_all(source: Source, jobs: Sequence[ShardJob], num_processes: int) -> Iterator[tuple[ShardJob, list[str]]]:
    """Each job as it ends, with its faults."""
    if num_processes == 1:
        yield from ((job, run_job(source, job)) for job in jobs)
    else:
        yield from _run_in_pool(source, jobs, num_processes)


def default_processes(num_samples: int) -> int:
    """One per core, or a single one where starting processes costs more than it saves."""
    return num_cores() if num_samples >= _PARALLEL_FROM else 1


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_in_pool(source: Source, jobs: Sequence[ShardJob], size: int) -> Iterator[tuple[ShardJob, list[str]]]:
    # Spawned, not forked: the caller may have threads (torch's, for one), and those do not survive a fork.
    pool = ProcessPoolExecutor(size, get_context("spawn"), _start_worker, (source,))
    try:
        pending = {pool.submit(_run_in_worker, job): job for job in jobs}
        for future in as_completed(pending):
            yield pending[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_source: Source | None = None


def _end_with_parent() -> None:
    """A pool's process whose parent was killed would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _start_worker(source: Source) -> None:
    global _worker_source  # noqa: PLW0603  (a pool's initializer has no other place to leave it)
    _worker_source = source
    Thread(target=_end_with_parent, daemon=True).start()


def _run_in_worker(job: ShardJob) -> list[str]:
    assert _worker_source is not None
    return run_job(_worker_source, job)
