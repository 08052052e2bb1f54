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
from dbscale.data.errors import DataError
from dbscale.data.index import checksum, open_index, split_fingerprint
from dbscale.data.manifest import Manifest, SplitInfo, load_manifest
from shards.jobs import default_processes
from shards.repair import index_is_damaged
from shards.walk import walk_tar


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
        yield Problem(split.index, None, f"missing or changed; `dbscale shards pack {folder.name}` writes it again")
        return
    try:
        index = open_index(folder, split)
    except DataError as error:
        yield Problem(split.index, None, str(error))
        return
    if split_fingerprint(index) != split.fingerprint:
        yield Problem(split.index, None, "does not have the fingerprint of the manifest")
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
    mend = f"remove it and run `dbscale shards pack {folder.name}`, which writes it again"
    if not path.exists():
        return [Problem(info.name, None, f"missing; run `dbscale shards pack {folder.name}`, which writes it again")]
    if path.stat().st_size != info.num_bytes:
        sizes = f"has {path.stat().st_size:,} bytes, expected {info.num_bytes:,}"
        return [Problem(info.name, None, f"{sizes}; {mend}")]
    index = open_index(folder, split)
    try:
        members = {member.name: member for member in walk_tar(path)}
    except DataError as error:
        return [Problem(info.name, None, f"{error}; {mend}")]
    first = sum(other.num_samples for other in split.shards[:shard])
    rows = index[first : first + info.num_samples]
    content = np.memmap(path, np.uint8, "r")
    by_place = {(member.offset, member.size): member.key for member in members.values()}
    return [problem for row in rows for problem in _sample_problems(info.name, row, content, by_place, members)]


def _sample_problems(
    name: str, row: np.void, content: NDArray[np.uint8], by_place: dict[tuple[int, int], str], members: dict
) -> Iterator[Problem]:
    key = bytes(row["key"]).decode()
    offset, size = int(row["offset"]), int(row["size"])
    if by_place.get((offset, size)) != key:
        yield Problem(name, key, "not where the index says: the index is older than the tar, or of another one")
        return
    label = members.get(f"{key}.cls")
    if label is None:
        yield Problem(name, key, "has no label member (.cls)")
    elif bytes(content[label.offset : label.offset + label.size]) != str(int(row["label"])).encode():
        yield Problem(name, key, f"label in the tar differs from the index ({int(row['label'])})")
    data = bytes(content[offset : offset + size])
    if checksum(data) != int(row["checksum"]):
        yield Problem(name, key, "checksum mismatch: the bytes changed since packing")
        return
    try:
        decode_image(data)
    except DecodeError as error:
        yield Problem(name, key, str(error))
