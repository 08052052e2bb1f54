"""Write one shard: an ordinary tar of `key.<suffix>` + `key.cls` pairs that `webdataset` reads, and its index rows.

Headers carry no time, user or path, so the same samples give the same bytes.
"""

import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dbscale.data.read import checksum, index_dtype
from dbscale.files import atomic_open

BLOCK = tarfile.BLOCKSIZE


class Sample(NamedTuple):
    """One encoded sample on its way into a tar."""

    key: str
    suffix: str
    data: bytes
    label: int
    height: int
    width: int


def write_shard(path: Path, samples: Iterable[Sample], shard: int) -> NDArray[np.void]:
    """Write the tar atomically and return its index rows (keys as wide as the longest)."""
    rows: list[tuple[int, int, int, int, int, int, int, bytes]] = []
    position = 0
    with atomic_open(path) as file:
        for sample in samples:
            member = _member(f"{sample.key}.{sample.suffix}", sample.data)
            offset = position + BLOCK
            digest = checksum(sample.data)
            sides = min(sample.height, 0xFFFF), min(sample.width, 0xFFFF)
            rows.append((shard, len(sample.data), offset, digest, sample.label, *sides, sample.key.encode()))
            record = member + _member(f"{sample.key}.cls", str(sample.label).encode())
            file.write(record)
            position += len(record)
        file.write(bytes(2 * BLOCK))
    return np.array(rows, dtype=index_dtype(max(len(row[-1]) for row in rows)))


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o444
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
