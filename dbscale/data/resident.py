"""Tier `resident`: a whole split of small images decoded once into one uint8 array, kept as a mapped .npy file.

All processes of a node share its pages. Built by whoever comes first; several may race, each writes a file of its own
and the last rename wins. A damaged or half-written file is rebuilt; where nothing can be written it stays in RAM.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dbscale.data.decode import DecodeError, center_square, decode_image, resize_short
from dbscale.data.index import file_checksum
from dbscale.data.manifest import SplitInfo
from dbscale.data.read import ShardFiles
from dbscale.errors import DataError, FileError
from dbscale.files import atomic_open, make_folder, write_atomic


class ResidentReader:
    """Fetches by one gather from the decoded array."""

    def __init__(
        self, folder: Path, split: SplitInfo, index: NDArray[np.void], image_size: int, cache_dir: Path | None
    ) -> None:
        name = f"{split.index.split('.')[0]}-{split.fingerprint[:12]}-{image_size}px"
        path = (cache_dir or folder / "cache") / f"{name}.npy"
        files = ShardFiles(folder, split, index)
        known = _opened(path)
        if known is None or any(_decoded(files, position) is not None for position in known[1]):
            # A cache that calls samples bad outlives the damage: `shards pack` may have mended them.
            known = _store(path, *_build(files, image_size))
        self.images, self.bad = known

    def fetch(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[int]]:
        """uint8 [b, 3, S, S]; bad slots are black."""
        images = np.take(self.images, positions, axis=0)
        if not self.bad:
            return images, []
        return images, [slot for slot, position in enumerate(positions.tolist()) if position in self.bad]


def _build(files: ShardFiles, image_size: int) -> tuple[NDArray[np.uint8], frozenset[int]]:
    """Decode a split into [num_samples, 3, S, S]."""
    images = np.zeros((len(files.index), 3, image_size, image_size), np.uint8)
    bad = set()
    for position in range(len(images)):
        pixels = _decoded(files, position)
        if pixels is None:
            bad.add(position)
            continue
        images[position] = center_square(resize_short(pixels, image_size), image_size).transpose(2, 0, 1)
    return images, frozenset(bad)


def _decoded(files: ShardFiles, position: int) -> NDArray[np.uint8] | None:
    """Pixels of one sample, or None where its bytes changed or do not decode."""
    try:
        return decode_image(files.read(position))
    except DecodeError:
        return None


def _store(path: Path, images: NDArray[np.uint8], bad: frozenset[int]) -> tuple[NDArray[np.uint8], frozenset[int]]:
    try:
        make_folder(path.parent)
        with atomic_open(path) as file:
            np.save(file, images, allow_pickle=False)
        # The note comes last: an array without its note counts as half-written.
        note = {"checksum": file_checksum(path), "bad": sorted(bad)}
        write_atomic(path.with_suffix(".json"), json.dumps(note).encode())
    except (DataError, FileError, OSError):
        return images, bad  # a cache is a convenience: without one every process decodes for itself
    _opened.cache_clear()
    return _opened(path) or (images, bad)


@lru_cache(maxsize=32)
def _opened(path: Path) -> tuple[NDArray[np.uint8], frozenset[int]] | None:
    """The mapped cache, or None where it is missing, half-written or damaged."""
    try:
        note = json.loads(path.with_suffix(".json").read_bytes())
        if file_checksum(path) != note["checksum"]:
            return None
        return np.load(path, mmap_mode="r", allow_pickle=False), frozenset(note["bad"])
    except (OSError, ValueError, KeyError, EOFError):
        return None
