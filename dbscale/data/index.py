"""Where each sample lies: the sidecar index, one fixed-size record per sample in stored order.

An .npy of structured records, opened as a memory map: 14M samples open at once, and all workers share its pages.
`shards.pack` writes it; `read` uses it to fetch any sample with one `pread`. Knows nothing of pixels.
"""

import hashlib
import shlex
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from dbscale.data.manifest import SplitInfo
from dbscale.errors import DataError
from dbscale.files import atomic_open


def index_dtype(key_bytes: int) -> np.dtype:
    """Record layout; `key_bytes` is the longest key's length."""
    return np.dtype(
        [
            ("shard", "<u4"),
            ("size", "<u4"),  # bytes of the image member
            ("offset", "<u8"),  # of the image member's data in its tar
            ("checksum", "<u8"),  # xxh3_64 of the image member's data
            ("label", "<i4"),
            ("height", "<u2"),  # px, 0 where unknown
            ("width", "<u2"),
            ("key", f"S{max(key_bytes, 1)}"),
        ]
    )


def checksum(data: bytes | memoryview | NDArray[np.uint8]) -> int:
    """xxh3_64, at memory speed: it finds damage, it does not stop forgery."""
    return xxhash.xxh3_64_intdigest(data)  # type: ignore[arg-type]


def split_fingerprint(index: NDArray[np.void]) -> str:
    """sha256 over labels and checksums in order: how samples are cut into shards and named does not reach it."""
    digest = hashlib.sha256(np.ascontiguousarray(index["label"]).tobytes())
    digest.update(np.ascontiguousarray(index["checksum"]).tobytes())
    return digest.hexdigest()[:32]


def save_index(path: Path, index: NDArray[np.void]) -> str:
    """Write the index atomically and return its checksum."""
    with atomic_open(path) as file:
        np.save(file, index, allow_pickle=False)
    return file_checksum(path)


def file_checksum(path: Path) -> str:
    """xxh3_128 of a whole file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def open_index(folder: Path, split: SplitInfo) -> NDArray[np.void]:
    """Memory-map a split's index.

    Raises:
        DataError: the file is missing, damaged, or does not belong to the manifest.
    """
    path = folder / split.index
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: index missing or damaged ({error}); {mend(folder)}") from error
    names = index.dtype.names
    if names != index_dtype(1).names or len(index) != split.num_samples:
        raise DataError(
            f"{path}: {len(index)} records, the manifest says {split.num_samples}; the index is not this dataset's: "
            f"{mend(folder)}"
        )
    return index


def mend(folder: Path) -> str:
    """What to do about a dataset's missing, cut or resized files, and the command for it."""
    if folder.parent.name != "shards":
        return "pack it again with the same options, which rewrites only what is damaged (remove a staged copy)"
    command = shlex.join(["dbscale", "shards", "pack", folder.name, "--data", str(folder.parent.parent)])
    return f"run `{command}`, which rewrites only what is damaged"
