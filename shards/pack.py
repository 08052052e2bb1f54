"""Pack a source into tar shards with index and manifest: parallel, restartable, the same bytes every time.

`ensure_packed` is the entry for a grid's dataset; it also mends a dataset whose files were damaged. The manifest comes
last: a folder without one is not a dataset yet. One job writes one tar: jobs share nothing and end in atomic renames,
so the result is the same however many processes run them, a killed run loses only the shards in flight, and two runs at
once do double work but no harm. One sample's bytes and the tar itself are `tar`'s.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue
from tqdm import tqdm

from dbscale.data.decode import DecodeError
from dbscale.data.manifest import (
    MANIFEST_NAME,
    Encoding,
    ImageInfo,
    Manifest,
    ShardInfo,
    SplitInfo,
    TargetKind,
    load_manifest,
    make_fingerprint,
    save_manifest,
)
from dbscale.data.read import file_checksum, has_targets, index_dtype, open_index, save_index, split_fingerprint
from dbscale.data.target import decode_target
from dbscale.errors import DataError
from dbscale.files import atomic_open, make_folder, write_atomic
from dbscale.shards.source import Content, Listing, Source, WithTarget, listing_digest, stratified_order
from dbscale.shards.sources import ensure_mirrored, remote_of, source_of
from dbscale.shards.tar import Sample, encode, write_shard
from dbscale.shards.target import classes_seen, pack_target
from dbscale.strict import Strict

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")
WORK_FOLDER = ".pack"
"""Inside the dataset's folder: the plan and the finished shards' rows, until the manifest is written."""
SHARD_SAMPLES: dict[Encoding, int] = {"original": 2048, "jpeg256": 8192, "raw": 8192}
"""Samples per tar, by encoding, so that a tar of photographs has a few hundred MB."""
_PARALLEL_FROM = 8192
"""Samples below which starting processes costs more than it saves."""
_TARGETS: dict[str | None, tuple[str, str]] = {
    "mask": ("masks", ", or list its label under `ignore_labels`"), "boxes": ("boxes", "")
}  # fmt: skip
"""What stands beside images, and how a class of them can be left out."""
_SHOWN_FAULTS = 10
"""Samples that cannot be packed which a message names at most."""


def ensure_packed(
    name: str, entry: Mapping[str, Any], data_dir: str | Path, *, jobs: int | None = None, progress: bool = True
) -> Path:
    """Pack `<data_dir>/shards/<name>` from a grid's dataset entry unless that is done; returns the folder.

    A packed dataset with missing, cut or resized files is mended from its source. `jobs` is the number of processes;
    None takes one per core where that pays. `progress` shows a bar with the rate. Raises ConfigError as `source_of` does,
    and DataError as `pack` does, also when what was packed under this name came from another entry.
    """
    folder = Path(data_dir) / "shards" / name
    remote = remote_of(name, entry)
    if remote is not None:
        return ensure_mirrored(name, remote, folder)
    recorded = json.loads(json.dumps(dict(entry)))
    source = source_of(name, entry, data_dir)
    if (folder / MANIFEST_NAME).exists():
        manifest = load_manifest(folder)
        if manifest.source != recorded:
            raise _refusal(folder, "source", manifest.source, recorded)
        if not is_damaged(folder, manifest):
            return folder
    pack(source, folder, name=name, jobs=jobs, progress=progress, entry=recorded)
    return folder


def pack(
    source: Source,
    out_dir: str | Path,
    *,
    name: str | None = None,
    jobs: int | None = None,
    progress: bool = True,
    entry: Mapping[str, Any] | None = None,
) -> Manifest:
    """Pack a source. A killed pack goes on with the missing shards; a finished one is only checked and mended.

    `name` of the dataset is the folder's by default; `entry` is the dataset entry to record in the manifest; the rest is
    as in `ensure_packed`. Raises DataError where another plan was packed there, for a sample that is no image, more
    samples left out than `allow_unused`, or a folder that cannot be written.
    """
    folder = Path(out_dir)
    listings = source.listings()
    _check_listings(source, listings)
    plan = make_plan(source, listings, name or folder.name, entry or {})
    shard_jobs = plan_jobs(folder, listings, plan)
    if (folder / MANIFEST_NAME).exists():
        manifest = load_manifest(folder)
        plan.refuse_unlike(manifest, folder)
        repair(source, manifest, shard_jobs, jobs, progress)
        return manifest
    make_folder(folder / WORK_FOLDER)
    claim(folder, plan)
    try:
        prepared = source.prepare(folder / WORK_FOLDER)
        # A shard's rows are written after its tar.
        left = [job for job in shard_jobs if not (job.rows_path.exists() and job.tar_path.exists())]
        run_jobs(prepared, left, jobs, progress)
        unused: dict[str, JsonValue] = {s: dict(x.unused.counts) for s, x in listings.items() if x.unused.counts}
        lone = _lone_classes(source, shard_jobs) if source.target else {}
        described = make_manifest(folder, plan, shard_jobs, source.classes, unused, source.target, lone)
        manifest = save_manifest(folder, described)
    except OSError:
        if not (folder / MANIFEST_NAME).exists():
            raise
        # Another process with the same plan came first, and took the work folder away.
        manifest = load_manifest(folder)
    # By the last of them, too: what only an unfinished pack needs, and what killed ones left.
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return manifest


def _check_listings(source: Source, listings: Mapping[str, Listing]) -> None:
    """Raise DataError on labels without a class, and where too much of what was found stays unused."""
    for split, listing in listings.items():
        wrong = np.flatnonzero((listing.labels < 0) | (listing.labels >= len(source.classes)))
        if len(wrong):
            raise DataError(
                f"{source.origin(listing.names[wrong[0]])}: label {listing.labels[wrong[0]]} is out of range "
                f"0…{len(source.classes) - 1}; the source names too few classes"
            )
        lost = listing.unused.lost
        share = lost / max(lost + len(listing.names), 1)
        if share > source.allow_unused:
            raise DataError(
                f"split {split!r}: {lost:,} of {lost + len(listing.names):,} images or labels would stay unused, more "
                f"than the allowed share {source.allow_unused:g}: {listing.unused}; mend or remove them, or set "
                f"`allow_unused: {np.ceil(100 * share) / 100:g}` of the source"
            )


# --- the plan: everything that decides the packed bytes, and how it is cut into jobs ---


class PackPlan(Strict):
    """Two packs with equal plans give equal bytes."""

    name: str
    seed: int
    encoding: Encoding
    raw_size: int | None
    shard_samples: int
    source: dict[str, JsonValue]
    """The dataset entry it was packed from, for the record and for repairs."""
    listing: str
    """Hash of the source's classes, names and labels."""

    def refuse_unlike(self, manifest: Manifest, folder: Path) -> None:
        """Raise DataError when a finished dataset was packed by another plan."""
        packed = {"name": manifest.name, "source": manifest.source, **manifest.extra}
        for field, value in self.model_dump(mode="json").items():
            if field in packed and packed[field] != value:
                raise _refusal(folder, field, packed[field], value)


def _refusal(folder: Path, field: str, packed: object, asked: object) -> DataError:
    return DataError(
        f"{folder}: already packed with {field} = {packed!r}, now asked for {asked!r}; take another dataset name, or "
        "remove this folder first"
    )


def make_plan(source: Source, listings: Mapping[str, Listing], name: str, entry: Mapping[str, Any]) -> PackPlan:
    """Fill in what was left open and hash the listing."""
    encoding = source.encoding or source.default_encoding
    return PackPlan(
        name=name,
        seed=source.pack_seed,
        encoding=encoding,
        raw_size=source.raw_size,
        shard_samples=source.shard_samples or SHARD_SAMPLES[encoding],
        source=dict(entry),
        listing=listing_digest(source.classes, listings),
    )


def claim(folder: Path, plan: PackPlan) -> None:
    """Note the plan in the work folder, or check that the half-finished pack found there has the same one."""
    path = folder / WORK_FOLDER / "plan.json"
    text = plan.model_dump_json(indent=1).encode()
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        write_atomic(path, text)
        return
    if found != text:
        raise DataError(
            f"{folder}: holds a half-finished pack of another plan ({path}), perhaps being written now; finish that "
            "one, or remove the folder"
        )


@dataclass(frozen=True)
class ShardJob:
    """What one process needs to write one shard."""

    folder: Path
    split: str
    shard: int
    first_position: int
    numbers: NDArray[np.int64]
    """Where the samples stand in the source's listing."""
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

    def rows(self) -> NDArray[np.void]:
        """The finished shard's index rows."""
        return np.load(self.rows_path, allow_pickle=False)


def plan_jobs(folder: Path, listings: Mapping[str, Listing], plan: PackPlan) -> list[ShardJob]:
    """Cut every split's stratified order into shards."""
    jobs = []
    for split, listing in listings.items():
        stored = stratified_order(listing.labels, plan.seed, split)
        for shard, first in enumerate(range(0, len(stored), plan.shard_samples)):
            numbers = stored[first : first + plan.shard_samples]
            names = [listing.names[number] for number in numbers.tolist()]
            labels = listing.labels[numbers]
            jobs.append(ShardJob(folder, split, shard, first, numbers, names, labels, plan.encoding, plan.raw_size))
    return jobs


def make_manifest(
    folder: Path, plan: PackPlan, jobs: Sequence[ShardJob], classes: tuple[str, ...], unused: dict[str, JsonValue],
    target: TargetKind | None = None, lone: dict[str, JsonValue] | None = None,
) -> Manifest:  # fmt: skip
    """Join the shards' rows into one index file per split and describe the whole."""
    splits: dict[str, SplitInfo] = {}
    sides: list[int] = []
    square = True
    for split in dict.fromkeys(job.split for job in jobs):
        own = [job for job in jobs if job.split == split]
        index = _joined_rows(own)
        splits[split] = _split_info(folder, split, own, index, 1 if target else len(classes))
        sides += [int(edge) for side in ("height", "width") for edge in (index[side].min(), index[side].max())]
        square &= bool((index["height"] == index["width"]).all())
    extra = plan.model_dump(mode="json", exclude={"name", "source"})
    return Manifest(
        name=plan.name,
        classes=classes,
        image=ImageInfo(encoding=plan.encoding, min_side=min(sides), max_side=max(sides), square=square),
        target=target,
        seed=plan.seed,
        source=plan.source,
        splits=splits,
        fingerprint=make_fingerprint(classes, plan.encoding, splits, target),
        extra={**extra, **({"unused": unused} if unused else {}), **({"lone_classes": lone} if lone else {})},
    )


def _lone_classes(source: Source, jobs: Sequence[ShardJob]) -> dict[str, JsonValue]:
    """Classes that the masks or boxes of one split alone hold, by split. Raises DataError for those of a test split."""
    seen = {job.split: np.zeros(len(source.classes), bool) for job in jobs}
    for job in jobs:
        seen[job.split] |= _classes_in(source, job)
    other = {split: np.any([seen[each] for each in seen if each != split], axis=0) for split in seen}
    lone = {split: [name for name, alone in zip(source.classes, found & ~other[split], strict=True) if alone]
            for split, found in seen.items() if len(seen) > 1}  # fmt: skip
    for split, names in lone.items():
        if names and split != "train":
            what, or_else = _TARGETS[source.target]
            more = f" ({len(names)} such classes)" if names[1:] else ""
            raise DataError(
                f"split {split!r} has {what} of {names[0]!r}, training has none, so that no model can learn it{more}; add "
                f"such images to training{or_else}, remove the half-finished {jobs[0].folder}, then run the same command "
                "again"
            )
    return {split: [*names] for split, names in lone.items() if names}


def _classes_in(source: Source, job: ShardJob) -> NDArray[np.bool_]:
    """Which classes the targets of a finished shard hold."""
    assert source.target is not None
    found = np.zeros(len(source.classes), bool)
    with job.tar_path.open("rb") as tar:
        for offset, size in job.rows()[["target_offset", "target_size"]].tolist():
            tar.seek(offset)
            found |= classes_seen(decode_target(source.target, tar.read(size)), len(found))
    return found


def _joined_rows(jobs: Sequence[ShardJob]) -> NDArray[np.void]:
    parts = [job.rows() for job in jobs]
    key_bytes = max(part.dtype["key"].itemsize for part in parts)
    return np.concatenate(parts, dtype=index_dtype(key_bytes, with_target=has_targets(parts[0])))


def _split_info(
    folder: Path, split: str, jobs: Sequence[ShardJob], index: NDArray[np.void], num_classes: int
) -> SplitInfo:
    counts = np.bincount(index["label"], minlength=num_classes)
    index_name = f"{split}.index.npy"
    return SplitInfo(
        num_samples=len(index),
        class_counts=tuple(counts.tolist()),
        balanced_up_to=int(counts.min()) * num_classes,
        fingerprint=split_fingerprint(index),
        index=index_name,
        index_checksum=save_index(folder / index_name, index),
        shards=tuple(
            ShardInfo(name=job.tar_path.name, num_samples=len(job.names), num_bytes=job.tar_path.stat().st_size)
            for job in jobs
        ),
    )


# --- one shard ---


class _Faulty(Exception):
    """Stops a shard from being written."""


def run_job(source: Source, job: ShardJob) -> list[str]:
    """Write one shard and its rows; where samples cannot be packed nothing is written, and they are named."""
    faults: list[str] = []
    try:
        rows = write_shard(job.tar_path, _samples(source, job, faults), job.shard, source.target)
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
            sample = make_sample(source, job, slot, next(contents))
        except StopIteration:  # a reader that could not go on after a fault
            break
        except OSError as error:
            faults.append(f"{source.origin(name)}: cannot be read ({error.strerror})")
        except DecodeError as error:
            faults.append(f"{source.origin(name)}: {error}")
        else:
            yield sample
    if faults:
        raise _Faulty


def make_sample(source: Source, job: ShardJob, slot: int, content: Content | WithTarget) -> Sample:
    """One encoded sample. Raises DecodeError on an image or a target that cannot be packed."""
    image = content.image if isinstance(content, WithTarget) else content
    suffix, data, height, width = encode(image, job.encoding, job.raw_size)
    target = None
    if isinstance(content, WithTarget):
        found = source.target_of(content.target)
        target = pack_target(found, image, job.encoding, (height, width), len(source.classes))
    key = make_key(job.first_position + slot, job.names[slot])
    return Sample(key, suffix, data, int(job.labels[slot]), height, width, target)


def make_key(position: int, name: str) -> str:
    """Unique through the position, traceable through the name; no dots, which would end a WebDataset key."""
    stem = re.split("[/:]", name)[-1].rsplit(".", 1)[0]
    return f"{position:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[-40:]}"


# --- many jobs, in this process or in several ---


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
        for job, found in in_processes(run_job, source, jobs, wanted):
            bar.update(len(job.names))
            faults += found
    if faults:
        more = f" (and {len(faults) - 1} more: {'; '.join(faults[1:_SHOWN_FAULTS])})" if faults[1:] else ""
        raise DataError(
            f"{faults[0]}{more}; {source.remedy}, remove the half-finished {jobs[0].folder}, then run the same command "
            "again"
        )


def in_processes(
    function: Callable[[Shared, Task], Result], shared: Shared, tasks: Sequence[Task], num_processes: int
) -> Iterator[tuple[Task, Result]]:
    """`function(shared, task)` of each task as it ends, in this process or in several, each of which gets `shared` once."""
    if min(num_processes, len(tasks)) <= 1:
        yield from ((task, function(shared, task)) for task in tasks)
        return
    # Spawned, not forked: the caller may have threads (torch's, for one), and those do not survive a fork.
    pool = ProcessPoolExecutor(min(num_processes, len(tasks)), get_context("spawn"), _start_worker, (function, shared))
    try:
        pending = {pool.submit(_run_in_worker, task): task for task in tasks}
        for future in as_completed(pending):
            yield pending[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def default_processes(num_samples: int) -> int:
    """One per core that this process may use, or a single one where starting processes costs more than it saves."""
    return 1 if num_samples < _PARALLEL_FROM else len(os.sched_getaffinity(0))


_work: list[Callable[[Any], Any]] = []
"""What a pool's process does with each task: its initializer has no other place to leave it."""


def _start_worker(function: Callable[[Shared, Task], Result], shared: Shared) -> None:
    _work.append(partial(function, shared))
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's process whose parent was killed would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _run_in_worker(task: Any) -> Any:
    return _work[0](task)


# --- mending: what is missing, cut or resized is written again, with the very bytes that the manifest promises ---


def is_damaged(folder: Path, manifest: Manifest) -> bool:
    """Whether a file is missing, a shard has the wrong size, or an index the wrong bytes.

    Damage inside a shard of the right size is found by `verify`; remove such a shard and it is written again.
    """
    return any(
        index_is_damaged(folder, split) or any(_shard_is_damaged(folder, shard) for shard in split.shards)
        for split in manifest.splits.values()
    )


def _shard_is_damaged(folder: Path, shard: ShardInfo) -> bool:
    path = folder / shard.name
    return not path.exists() or path.stat().st_size != shard.num_bytes


def index_is_damaged(folder: Path, split: SplitInfo) -> bool:
    """Whether the index file is missing or has other bytes than it was packed with."""
    path = folder / split.index
    return not path.exists() or file_checksum(path) != split.index_checksum


def repair(
    source: Source, manifest: Manifest, jobs: Sequence[ShardJob], num_processes: int | None, progress: bool
) -> None:
    """Write again what is damaged; does nothing to a sound dataset. `jobs` are all its shards', by the same plan.

    Raises DataError where the source no longer gives the bytes that were packed.
    """
    for split_name, split in manifest.splits.items():
        own = [job for job in jobs if job.split == split_name]
        folder = own[0].folder
        # A lost index can only be trusted again when every row was written again.
        lost_index = index_is_damaged(folder, split)
        todo = [job for job in own if lost_index or _shard_is_damaged(folder, split.shards[job.shard])]
        if not todo:
            continue
        make_folder(folder / WORK_FOLDER)
        run_jobs(source.prepare(folder / WORK_FOLDER), todo, num_processes, progress)
        if lost_index and save_index(folder / split.index, _joined_rows(own)) != split.index_checksum:
            raise _changed(folder)
        _check_rewritten(folder, split, todo)
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)


def _check_rewritten(folder: Path, split: SplitInfo, jobs: Sequence[ShardJob]) -> None:
    index = open_index(folder, split)
    for job in jobs:
        stored = index[job.first_position : job.first_position + len(job.names)]
        rows = job.rows()
        fields = ("checksum", "offset", "label", *(("target_checksum",) if has_targets(rows) else ()))
        same = all(np.array_equal(rows[field], stored[field]) for field in fields)
        if not same or _shard_is_damaged(folder, split.shards[job.shard]):
            job.tar_path.unlink(missing_ok=True)  # better missing, and named as such, than foreign
            raise _changed(folder)


def _changed(folder: Path) -> DataError:
    return DataError(
        f"{folder}: the source no longer gives the images that were packed; bring the old source back, or remove this "
        "folder and pack anew (results of the old images keep their own fingerprint)"
    )
