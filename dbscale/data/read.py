"""Fetch samples of one split by position: the sidecar index says where each lies, one `pread` or a mapped tar gives it.

The index is an .npy of fixed-size records in stored order, opened as a memory map: 14M samples open at once, and all
workers share its pages; `dbscale.shards.pack` writes it. Every fetch is checked against it: a shard that is missing,
cut short or foreign stops the run with the command that mends it; a single sample whose bytes changed or do not decode
is reported as bad and left to the loader.
"""

import hashlib
import mmap
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from dbscale.data.decode import DecodeError, decode_image, ppm_header_size
from dbscale.data.manifest import ShardInfo, SplitInfo, mend
from dbscale.errors import DataError
from dbscale.files import atomic_open, regular


def index_dtype(key_bytes: int, *, with_target: bool = False) -> np.dtype:
    """Record layout; `key_bytes` is the longest key's length, `with_target` says where a mask or boxes lie."""
    target = [("target_offset", "<u8"), ("target_size", "<u4"), ("target_checksum", "<u8")]
    return np.dtype(
        [
            ("shard", "<u4"),
            ("size", "<u4"),  # bytes of the image member
            ("offset", "<u8"),  # of the image member's data in its tar
            ("checksum", "<u8"),  # xxh3_64 of the image member's data
            ("label", "<i4"),
            ("height", "<u2"),  # px, 0 where unknown
            ("width", "<u2"),
            *(target if with_target else []),
            ("key", f"S{max(key_bytes, 1)}"),
        ]
    )


TARGET = "target_"
"""Begins the names of the index's fields on masks and boxes."""


def has_targets(index: NDArray[np.void]) -> bool:
    """Whether the records say where masks or boxes lie."""
    return "target_offset" in (index.dtype.names or ())


def checksum(data: bytes | memoryview | NDArray[np.uint8]) -> int:
    """xxh3_64, at memory speed: it finds damage, it does not stop forgery."""
    return xxhash.xxh3_64_intdigest(data)  # type: ignore[arg-type]


def split_fingerprint(index: NDArray[np.void]) -> str:
    """sha256 over labels and checksums, of targets too, in order: how samples are cut into shards does not reach it."""
    digest = hashlib.sha256(np.ascontiguousarray(index["label"]).tobytes())
    digest.update(np.ascontiguousarray(index["checksum"]).tobytes())
    if has_targets(index):
        digest.update(np.ascontiguousarray(index["target_checksum"]).tobytes())
    return digest.hexdigest()[:32]


def save_index(path: Path, index: NDArray[np.void]) -> str:
    """Write the index atomically and return its checksum."""
    with atomic_open(path) as file:
        np.save(file, index, allow_pickle=False)
    return file_checksum(path)


def file_checksum(path: Path) -> str:
    """xxh3_128 of a whole file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", opener=regular) as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def open_index(folder: Path, split: SplitInfo) -> NDArray[np.void]:
    """Memory-map a split's index, after checking every byte of it against the manifest, once per process.

    Raises DataError where it is missing, damaged or of another manifest, or its labels are out of range.
    """
    path = folder / split.index
    try:
        status = path.stat()
        problem = _index_problem(path, split.model_dump_json(), (status.st_ino, status.st_size, status.st_mtime_ns))
    except OSError as error:
        problem = f"index missing or unreadable ({error.strerror}); {mend(folder)}"
    if problem is not None:
        raise DataError(f"{path}: {problem}")
    return np.load(path, mmap_mode="r", allow_pickle=False)


@lru_cache(maxsize=256)
def _index_problem(path: Path, split_json: str, _status: tuple[int, int, int]) -> str | None:
    """What is wrong with an index file; one that changes meanwhile is looked at again.

    On a map of its own, whose pages do not stay with the process.
    """
    split = SplitInfo.model_validate_json(split_json)
    found = file_checksum(path)
    if found != split.index_checksum:
        return (
            f"index damaged or of another dataset (checksum {found}, the manifest expects {split.index_checksum}); "
            f"{mend(path.parent)}"
        )
    index = np.load(path, mmap_mode="r", allow_pickle=False)
    again = f"it was written wrongly: remove {path.parent} and pack it again"
    if index.dtype.names != index_dtype(1, with_target=has_targets(index)).names or len(index) != split.num_samples:
        return f"{len(index)} records of {index.dtype.names}, the manifest expects {split.num_samples}; {again}"
    for field, limit in (("label", len(split.class_counts)), ("shard", len(split.shards))):
        values = np.array(index[field])
        for place in (values.argmin(), values.argmax()) if len(values) else ():
            if not 0 <= values[place] < limit:
                key = bytes(index["key"][place]).decode(errors="replace")
                return f"sample {key!r} has {field} {values[place]}, expected 0…{limit - 1}; {again}"
    return None


Pixels = NDArray[np.uint8] | list[NDArray[np.uint8]]
"""One array [b, 3, H, W] where all images have one size, else a list of [H, W, 3]."""


class Descriptor:
    """A file opened for reading by offset, closed with its last reference. Raises DataError where it cannot be opened."""

    def __init__(self, path: Path) -> None:
        try:
            self.number = regular(str(path), os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened ({error.strerror})") from error

    def __del__(self) -> None:
        number = getattr(self, "number", None)
        if number is not None:
            os.close(number)


class ShardFiles:
    """The tars of one split, each checked when first touched; those behind a URL are `remote.RemoteShards`."""

    def __init__(self, folder: Path, split: SplitInfo, index: NDArray[np.void], place: str | None = None) -> None:
        self.folder, self.split, self.index = folder, split, index
        self.place = place or str(folder)
        """Where the tars are, for messages."""
        self._descriptor = lru_cache(maxsize=256)(self._open)

    def _open(self, shard: int) -> Descriptor:
        check_shard_size(self.folder, self.split.shards[shard])
        return Descriptor(self.folder / self.split.shards[shard].name)

    def open(self, shard: int) -> Descriptor:
        """The shard's descriptor. Raises DataError when the tar is not the one that was packed."""
        return self._descriptor(shard)

    def prepare(self, positions: NDArray[np.int64]) -> None:
        """Called before these samples are read one by one. The kernel reads local files ahead by itself."""

    def stored(self, position: int, what: str = "") -> bytes:
        """The bytes of one sample as they lie there now: of its image, or with TARGET of its mask or boxes."""
        record = self.index[position]
        shard, size, offset = int(record["shard"]), int(record[f"{what}size"]), int(record[f"{what}offset"])
        try:
            return os.pread(self.open(shard).number, size, offset)
        except OSError as error:  # not the sample's fault: to replace it would train on other images
            raise DataError(
                f"{self.describe(position)}: cannot be read ({error.strerror}); look at the disk"
            ) from error

    def read(self, position: int, what: str = "") -> bytes:
        """The same bytes as they were packed. Raises DecodeError when they changed since, DataError as `stored`."""
        data = self.stored(position, what)
        if checksum(data) != int(self.index[f"{what}checksum"][position]):
            part = " of its mask or boxes" if what == TARGET else ""
            raise DecodeError(f"{self.describe(position)}: the bytes{part} changed since packing (checksum mismatch)")
        return data

    def describe(self, position: int) -> str:
        """Shard and key of a sample, for messages."""
        record = self.index[position]
        name = self.split.shards[int(record["shard"])].name
        return f"{self.place}/{name}, sample {bytes(record['key']).decode()!r}"


def check_shard_size(folder: Path, shard: ShardInfo) -> None:
    """Raise DataError when a tar is missing or its size is not the packed one."""
    path = folder / shard.name
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(f"{path}: shard is missing; {mend(folder)}") from error
    if found != shard.num_bytes:
        raise DataError(f"{path}: shard has {found:,} bytes, expected {shard.num_bytes:,} bytes; {mend(folder)}")


class EncodedReader:
    """Tiers `jpeg` and `jpeg256`: read, check and decode each sample."""

    def __init__(self, files: ShardFiles) -> None:
        self.files = files

    def fetch(self, positions: NDArray[np.int64]) -> tuple[list[NDArray[np.uint8]], list[int]]:
        """A list of uint8 [H, W, 3], and the slots (not positions) that are bad, which hold one black pixel."""
        images: list[NDArray[np.uint8]] = []
        bad: list[int] = []
        self.files.prepare(positions)
        for slot, position in enumerate(positions.tolist()):
            try:
                images.append(decode_image(self.files.read(position)))
            except DecodeError:
                images.append(np.zeros((1, 1, 3), np.uint8))
                bad.append(slot)
        return images, bad


class RawReader:
    """Tier `raw`: uint8 pixels straight out of the memory-mapped tars, shared by all processes of a node."""

    def __init__(self, files: ShardFiles) -> None:
        self.files, index = files, files.index
        self.height, self.width = int(index["height"][0]), int(index["width"][0])
        self._header = ppm_header_size(self.height, self.width)
        self._maps: dict[int, NDArray[np.uint8]] = {}
        # A checksum costs as much as the copy itself, so each sample is checked at its first use in this process.
        self._good = np.zeros(len(index), bool)

    def fetch(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[int]]:
        """uint8 [b, 3, H, W] (channels last in memory); bad slots stay as they are in the tar."""
        size = self.height * self.width * 3
        out = np.empty((len(positions), size), np.uint8)
        records = self.files.index[positions]
        starts = records["offset"].astype(np.int64) + self._header
        for slot, (shard, start) in enumerate(zip(records["shard"].tolist(), starts.tolist(), strict=True)):
            out[slot] = self._map(shard)[start : start + size]
        bad = self._check(positions, records)
        return out.reshape(-1, self.height, self.width, 3).transpose(0, 3, 1, 2), bad

    def _check(self, positions: NDArray[np.int64], records: NDArray[np.void]) -> list[int]:
        bad = []
        for slot in np.flatnonzero(~self._good[positions]).tolist():
            record = records[slot]
            start = int(record["offset"])
            member = self._map(int(record["shard"]))[start : start + int(record["size"])]
            if checksum(member) == int(record["checksum"]):
                self._good[positions[slot]] = True
            else:
                bad.append(slot)
        return bad

    def _map(self, shard: int) -> NDArray[np.uint8]:
        if shard not in self._maps:
            mapped = mmap.mmap(self.files.open(shard).number, 0, access=mmap.ACCESS_READ)
            self._maps[shard] = np.frombuffer(mapped, np.uint8)
        return self._maps[shard]
