"""Look at packed datasets: check every sample (files, tar headers, checksums, labels, decoding), describe them, and
compare them with what their source holds now."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dbscale.data.dataset import TOGETHER
from dbscale.data.decode import DecodeError, decode_image
from dbscale.data.manifest import MANIFEST_NAME, Manifest, SplitInfo, TargetKind, load_manifest, mend
from dbscale.data.read import TARGET, checksum, open_index, split_fingerprint
from dbscale.data.remote import RemoteShards, origin
from dbscale.data.target import decode_target
from dbscale.errors import DataError
from dbscale.shards.pack import (
    ShardJob,
    default_processes,
    in_processes,
    index_is_damaged,
    make_plan,
    make_sample,
    plan_jobs,
)
from dbscale.shards.source import FileSource, Source
from dbscale.shards.sources import source_change, source_of
from dbscale.shards.webdataset import Member, walk_tar

_SHOWN_CLASSES = 10


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where."""

    file: str
    """Name inside the dataset's folder."""
    key: str | None
    """The sample; None where the whole file is meant."""
    what: str

    def __str__(self) -> str:
        place = self.file if self.key is None else f"{self.file}, sample {self.key!r}"
        return f"{place}: {self.what}"


def verify(folder: str | Path, *, jobs: int | None = None, progress: bool = False) -> list[Problem]:
    """All problems of a dataset, in stored order; empty when every sample is good.

    `jobs` is the number of processes; None takes one per core where that pays. `progress` shows a bar. Raises DataError
    where there is no readable manifest.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    problems = {name: list(_index_problems(folder, split, manifest)) for name, split in manifest.splits.items()}
    sound = [(name, manifest.splits[name].shards) for name, found in problems.items() if not found]
    sizes = {(name, k): shard.num_samples for name, shards in sound for k, shard in enumerate(shards)}
    total, by_shard = sum(sizes.values()), {}
    with tqdm(total=total, desc=f"verify {folder.name}", unit="img", unit_scale=True, disable=not progress) as bar:
        for shard, found in in_processes(verify_shard, folder, list(sizes), jobs or default_processes(total)):
            by_shard[shard] = found
            bar.update(sizes[shard])
    return [*chain(*problems.values()), *chain(*(by_shard[shard] for shard in sizes))]


def _index_problems(folder: Path, split: SplitInfo, manifest: Manifest) -> Iterator[Problem]:
    if index_is_damaged(folder, split):
        yield Problem(split.index, None, f"missing or changed; {mend(folder)}")
        return
    index = np.load(folder / split.index, mmap_mode="r", allow_pickle=False)
    if split_fingerprint(index) != split.fingerprint:
        foreign = "does not have the fingerprint of the manifest; remove the dataset's folder and pack it again"
        yield Problem(split.index, None, foreign)
    for key, times in Counter(index["key"].tolist()).items():
        if times > 1:
            yield Problem(split.index, key.decode(), f"key occurs {times} times")
    for record in index[(index["label"] < 0) | (index["label"] >= manifest.num_classes)]:
        found = f"label {record['label']} is out of range 0…{manifest.num_classes - 1}"
        yield Problem(split.index, bytes(record["key"]).decode(), found)


def _verify_remote(folder: Path, split: SplitInfo, shard: int) -> list[Problem]:
    """The same for a tar behind a URL, whose samples are read by byte ranges."""
    info, problems = split.shards[shard], []
    first = sum(other.num_samples for other in split.shards[:shard])
    index = np.load(folder / split.index, mmap_mode="r", allow_pickle=False)
    files, target = RemoteShards(folder, split, index), load_manifest(folder).target
    for start in range(first, first + info.num_samples, TOGETHER):
        positions = np.arange(start, min(start + TOGETHER, first + info.num_samples))
        try:
            files.prepare(positions)
        except DataError as error:
            return [Problem(info.name, None, str(error).removeprefix(f"{files.url}/{info.name}: "))]
        for position in positions.tolist():
            try:
                decode_image(files.read(position))
                if target is not None:
                    decode_target(target, files.read(position, TARGET))
            except DecodeError as error:
                problems.append(Problem(info.name, bytes(index["key"][position]).decode(), str(error)))
    return problems


def verify_shard(folder: Path, place: tuple[str, int]) -> list[Problem]:
    """Problems of one tar, the one of this split and number."""
    manifest, (split_name, shard) = load_manifest(folder), place
    split = manifest.split(split_name)
    info = split.shards[shard]
    if origin(folder) is not None:
        return _verify_remote(folder, split, shard)
    path = folder / info.name
    if not path.exists():
        return [Problem(info.name, None, f"missing; {mend(folder)}")]
    if path.stat().st_size != info.num_bytes:
        sizes = f"has {path.stat().st_size:,} bytes, expected {info.num_bytes:,}"
        return [Problem(info.name, None, f"{sizes}; {mend(folder)}")]
    remedy = f"remove {info.name} and {mend(folder)}"  # of the right size, it would be taken for sound
    try:
        members = {member.name: member for member in walk_tar(path, remedy)}
    except DataError as error:
        return [Problem(info.name, None, str(error).removeprefix(f"{path}: "))]
    first = sum(other.num_samples for other in split.shards[:shard])
    index = np.load(folder / split.index, mmap_mode="r", allow_pickle=False)
    content = np.memmap(path, np.uint8, "r")
    by_place = {(member.offset, member.size): member.key("first") for member in members.values()}
    problems = []
    for row in index[first : first + info.num_samples]:
        key = bytes(row["key"]).decode()
        changes = list(_changes(key, row, content, by_place, members, manifest.target))
        problems += [Problem(info.name, key, f"{what}; {remedy}") for what in changes]
        if not changes:
            problems += [Problem(info.name, key, what) for what in _faults_of_the_source(row, content, manifest.target)]
    return problems


def _data(row: np.void, content: NDArray[np.uint8], prefix: str = "") -> bytes:
    start = int(row[f"{prefix}offset"])
    return bytes(content[start : start + int(row[f"{prefix}size"])])


def _changes(
    key: str, row: np.void, content: NDArray[np.uint8], by_place: dict[tuple[int, int], str],
    members: dict[str, Member], target: TargetKind | None,
) -> Iterator[str]:  # fmt: skip
    """How a sample differs from what was packed."""
    if by_place.get((int(row["offset"]), int(row["size"]))) != key:
        yield "not where the index says: the index is older than the tar, or of another one"
        return
    if checksum(_data(row, content)) != int(row["checksum"]):
        yield "checksum mismatch: the bytes changed since packing"
    if target is not None:
        if by_place.get((int(row["target_offset"]), int(row["target_size"]))) != key:
            yield f"its {target} is not where the index says: the index is older than the tar, or of another one"
        elif checksum(_data(row, content, TARGET)) != int(row["target_checksum"]):
            yield f"checksum mismatch: its {target} changed since packing"
        return
    label = members.get(f"{key}.cls")
    if label is None:
        yield "has no label member (.cls)"
    elif bytes(content[label.offset : label.offset + label.size]) != str(int(row["label"])).encode():
        yield f"label in the tar differs from the index ({int(row['label'])})"


def _faults_of_the_source(row: np.void, content: NDArray[np.uint8], target: TargetKind | None) -> Iterator[str]:
    """What packing again would not mend."""
    try:
        decode_image(_data(row, content))
        if target is not None:
            decode_target(target, _data(row, content, TARGET))
    except DecodeError as error:
        yield f"{error}; it came so from its source: training shows the next of its class instead"


def describe(folder: str | Path, *, classes: bool = False) -> str:
    """Sizes, balance, encoding and fingerprint; with `classes` also the count of every class. Raises DataError where there
    is no readable manifest."""
    manifest = load_manifest(folder)
    image = manifest.image
    side = f"{image.max_side}" if image.min_side == image.max_side else f"{image.min_side}…{image.max_side}"
    beside = {"mask": " with masks", "boxes": " with boxes"}.get(manifest.target or "", "")
    lines = [
        f"{manifest.name}: {manifest.num_classes} classes, {image.encoding} images of {side} px{beside}",
        f"  fingerprint {manifest.fingerprint}",
    ]
    for name, split in manifest.splits.items():
        lines += _describe_split(name, split, dense=manifest.target is not None)
    return "\n".join(
        [*lines, *describe_unused(manifest), *(_class_lines(manifest) if classes and manifest.target is None else ())]
    )


def _describe_split(name: str, split: SplitInfo, *, dense: bool) -> list[str]:
    counts = np.array(split.class_counts)
    num_bytes = sum(shard.num_bytes for shard in split.shards)
    balance = (
        f"    {counts.min():,} to {counts.max():,} samples a class; every prefix is class-balanced within one up to "
        f"{split.balanced_up_to:,} samples ({counts.min():,} a class)"
    )
    return [
        f"  {name}: {split.num_samples:,} samples in {len(split.shards)} shards, {num_bytes / 1e6:,.1f} MB",
        "    in random order: images of this dataset have no class" if dense else balance,
        f"    fingerprint {split.fingerprint}",
    ]


def describe_unused(manifest: Manifest) -> list[str]:
    """One line for each reason for which something of the source was not packed, with its count, and one for classes that
    are trained and never tested."""
    unused, lone = manifest.extra.get("unused"), manifest.extra.get("lone_classes")
    lines = [
        f"  {split}: not used: {count:,} × {reason}"
        for split, reasons in (unused.items() if isinstance(unused, dict) else ())
        for reason, count in (reasons.items() if isinstance(reasons, dict) else ())
    ]
    untested = lone.get("train") if isinstance(lone, dict) else None
    if isinstance(untested, list):
        more = f" and {len(untested) - _SHOWN_CLASSES} more" if len(untested) > _SHOWN_CLASSES else ""
        names = ", ".join(map(str, untested[:_SHOWN_CLASSES]))
        lines.append(f"  classes of training that no {manifest.target} of another split holds: {names}{more}")
    return lines


def _class_lines(manifest: Manifest) -> list[str]:
    """One line a class, one column a split."""
    counts = zip(*(split.class_counts for split in manifest.splits.values()), strict=True)
    rows = [("label", "class", *manifest.splits)]
    rows += [
        (str(label), name, *(f"{count:,}" for count in held))
        for label, (name, held) in enumerate(zip(manifest.classes, counts, strict=True))
    ]
    label_width, name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([f"  {label:>{label_width}}", f"{name:<{name_width}}", *map(str.rjust, held, widths)])
        for label, name, *held in rows
    ]


def exact_source_change(folder: Path, data_dir: str | Path) -> str | None:
    """As `source_change`, but the source is listed again in any case, and files newer than the pack are compared.

    Where nothing changed the manifest's time is renewed, so that those files need not be read the next time. In a folder
    that cannot be written to only the listing is compared.
    """
    change = source_change(folder, data_dir, quick=False)
    if change is not None or origin(folder) is not None:
        return change
    manifest = load_manifest(folder)
    source = source_of(manifest.name, manifest.source, data_dir)
    if not isinstance(source, FileSource) or not source.root.exists() or not os.access(folder, os.W_OK):
        return None
    listings = source.listings()
    is_newer = partial(_is_newer, source, (folder / MANIFEST_NAME).stat().st_mtime_ns, {})
    other: list[str] = []
    with TemporaryDirectory(prefix=".compare-", dir=folder) as work:
        for job in plan_jobs(folder, listings, make_plan(source, listings, manifest.name, manifest.source)):
            slots = [slot for slot, name in enumerate(job.names) if is_newer(name)]
            if slots:
                some = replace(job, numbers=job.numbers[slots], names=[job.names[slot] for slot in slots])
                packed = open_index(folder, manifest.split(job.split))[job.first_position + np.array(slots)]
                other += _differing(source.prepare(Path(work)), some, packed)
    if other:
        return (
            f"its source now holds other images in place of {len(other):,} packed ones, the first "
            f"{source.origin(other[0])}; results keep to what is packed: remove {folder} to pack it anew"
        )
    with suppress(OSError):
        os.utime(folder / MANIFEST_NAME)
    return None


def _is_newer(source: Source, packed_at: int, known: dict[Path | None, bool], name: str) -> bool:
    """Whether the file of a sample (or, where samples have none, any of the source) changed since packing."""
    path = source.file_of(name)
    if path not in known:
        times = [
            max(each.stat().st_mtime_ns, each.stat().st_ctime_ns) for each in ([path] if path else source.watched())
        ]
        known[path] = max(times) >= packed_at
    return known[path]


def _differing(source: Source, job: ShardJob, packed: NDArray[np.void]) -> Iterator[str]:
    """Names of the samples that would not be packed with the checksums of these index rows today."""
    contents = source.read(job.split, job.numbers, job.names)
    for slot, (name, row) in enumerate(zip(job.names, packed, strict=True)):
        try:
            sample = make_sample(source, job, slot, next(contents))
        except (OSError, DataError, StopIteration):
            yield name
            continue
        same = checksum(sample.data) == int(row["checksum"])
        if sample.target is not None:
            same &= checksum(sample.target) == int(row["target_checksum"])
        if not same:
            yield name
