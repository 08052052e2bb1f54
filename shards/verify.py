"""Check every sample of a packed dataset: files, tar headers, checksums, labels, and that each image decodes."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dbscale.data.decode import DecodeError, decode_image
from dbscale.data.manifest import Manifest, SplitInfo, load_manifest, mend
from dbscale.data.read import checksum, open_index, split_fingerprint
from dbscale.errors import DataError
from shards.jobs import default_processes
from shards.repair import index_is_damaged
from shards.walk import Member, walk_tar


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where."""

    file: str
    """Name inside the dataset's folder."""
    key: str | None
    """Of the sample; None where the whole file is meant."""
    what: str

    def __str__(self) -> str:
        place = self.file if self.key is None else f"{self.file}, sample {self.key!r}"
        return f"{place}: {self.what}"


def verify(folder: str | Path, *, jobs: int | None = None, progress: bool = False) -> list[Problem]:
    """All problems of a dataset, in stored order; empty when every sample is good.

    Args:
        folder: of the dataset.
        jobs: processes; None takes one per core where that pays.
        progress: show a bar.

    Raises:
        DataError: there is no readable manifest.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    problems: list[Problem] = []
    tasks = []
    for name, split in manifest.splits.items():
        found = list(_index_problems(folder, split, manifest))
        problems += found
        if not found:
            tasks += [(folder, name, shard) for shard in range(len(split.shards))]
    sizes = [manifest.splits[split].shards[shard].num_samples for _, split, shard in tasks]
    wanted = jobs or default_processes(sum(sizes))
    with tqdm(total=sum(sizes), desc=f"verify {folder.name}", unit="img", unit_scale=True, disable=not progress) as bar:
        for size, found in zip(sizes, _map(tasks, wanted), strict=True):
            problems += found
            bar.update(size)
    return problems


def _map(tasks: list[tuple[Path, str, int]], jobs: int) -> Iterator[list[Problem]]:
    if min(jobs, len(tasks)) <= 1:
        yield from (verify_shard(*task) for task in tasks)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(verify_shard, *zip(*tasks, strict=True))


def _index_problems(folder: Path, split: SplitInfo, manifest: Manifest) -> Iterator[Problem]:
    if index_is_damaged(folder, split):
        yield Problem(split.index, None, f"missing or changed; {mend(folder)}")
        return
    try:
        index = open_index(folder, split)
    except DataError as error:
        yield Problem(split.index, None, str(error))
        return
    if split_fingerprint(index) != split.fingerprint:
        foreign = "does not have the fingerprint of the manifest; remove the dataset's folder and pack it again"
        yield Problem(split.index, None, foreign)
    for key, times in Counter(index["key"].tolist()).items():
        if times > 1:
            yield Problem(split.index, key.decode(), f"key occurs {times} times")
    for record in index[(index["label"] < 0) | (index["label"] >= manifest.num_classes)]:
        found = f"label {record['label']} is out of range 0…{manifest.num_classes - 1}"
        yield Problem(split.index, bytes(record["key"]).decode(), found)


def verify_shard(folder: Path, split_name: str, shard: int) -> list[Problem]:
    """Problems of one tar."""
    split = load_manifest(folder).split(split_name)
    info = split.shards[shard]
    path = folder / info.name
    if not path.exists():
        return [Problem(info.name, None, f"missing; {mend(folder)}")]
    if path.stat().st_size != info.num_bytes:
        sizes = f"has {path.stat().st_size:,} bytes, expected {info.num_bytes:,}"
        return [Problem(info.name, None, f"{sizes}; {mend(folder)}")]
    index = open_index(folder, split)
    remedy = f"remove {info.name} and {mend(folder)}"  # of the right size, it would be taken for sound
    try:
        members = {member.name: member for member in walk_tar(path, remedy)}
    except DataError as error:
        return [Problem(info.name, None, str(error).removeprefix(f"{path}: "))]
    first = sum(other.num_samples for other in split.shards[:shard])
    rows = index[first : first + info.num_samples]
    content = np.memmap(path, np.uint8, "r")
    by_place = {(member.offset, member.size): member.key for member in members.values()}
    problems = []
    for row in rows:
        key = bytes(row["key"]).decode()
        changes = list(_changes(key, row, content, by_place, members))
        problems += [Problem(info.name, key, f"{what}; {remedy}") for what in changes]
        if not changes:
            problems += [Problem(info.name, key, what) for what in _faults_of_the_source(_data(row, content))]
    return problems


def _data(row: np.void, content: NDArray[np.uint8]) -> bytes:
    start = int(row["offset"])
    return bytes(content[start : start + int(row["size"])])


def _changes(
    key: str,
    row: np.void,
    content: NDArray[np.uint8],
    by_place: dict[tuple[int, int], str],
    members: dict[str, Member],
) -> Iterator[str]:
    """How a sample differs from what was packed."""
    if by_place.get((int(row["offset"]), int(row["size"]))) != key:
        yield "not where the index says: the index is older than the tar, or of another one"
        return
    label = members.get(f"{key}.cls")
    if label is None:
        yield "has no label member (.cls)"
    elif bytes(content[label.offset : label.offset + label.size]) != str(int(row["label"])).encode():
        yield f"label in the tar differs from the index ({int(row['label'])})"
    if checksum(_data(row, content)) != int(row["checksum"]):
        yield "checksum mismatch: the bytes changed since packing"


def _faults_of_the_source(data: bytes) -> Iterator[str]:
    """What packing again would not mend."""
    try:
        decode_image(data)
    except DecodeError as error:
        yield f"{error}; it came so from its source: training shows the next of its class instead"
