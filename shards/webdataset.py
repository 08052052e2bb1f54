"""Source `webdataset`: existing WebDataset tars (`key.<image>` + `key.cls`), brought into the stratified order."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dbscale.data.manifest import Encoding
from dbscale.errors import DataError
from shards.source import FieldSource, Listing, refuse_remote
from shards.walk import Member, walk_tar

IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "ppm", "webp", "bmp", "gif", "tif", "tiff"}


@dataclass(frozen=True)
class WebDatasetTars(FieldSource):
    """Local tars; what is not an image or a `.cls` label is ignored, what could run code is refused."""

    path: Path
    train: str = "train-*.tar"
    """Pattern of the training tars below `path`."""
    test: str | None = "test-*.tar"
    """Pattern of the test tars; None packs no test split."""
    class_names: tuple[str, ...] | None = None
    """Names by label; None numbers them."""

    def __post_init__(self) -> None:
        for text in (str(self.path), self.train, self.test or ""):
            refuse_remote(text)

    @property
    def default_encoding(self) -> Encoding:
        return "original"

    @cached_property
    def classes(self) -> tuple[str, ...]:
        if self.class_names is not None:
            return tuple(self.class_names)
        count = 1 + max(int(listing.labels.max()) for listing in self._scanned.values())
        return tuple(str(label) for label in range(count))

    def listings(self) -> dict[str, Listing]:
        for listing in self._scanned.values():
            wrong = np.flatnonzero((listing.labels < 0) | (listing.labels >= len(self.classes)))
            if len(wrong):
                raise DataError(
                    f"{self.origin(listing.names[wrong[0]])}: label {listing.labels[wrong[0]]} is out of range "
                    f"0…{len(self.classes) - 1}; mend the label or extend class_names"
                )
        return self._scanned

    def origin(self, name: str) -> str:
        """Tar and key."""
        tar, _, _, key = name.split(":", 3)
        return f"{self.path / tar}, sample {key!r}"

    @cached_property
    def _scanned(self) -> dict[str, Listing]:
        patterns = {"train": self.train} if self.test is None else {"train": self.train, "test": self.test}
        return {split: self._scan(pattern) for split, pattern in patterns.items()}

    def _scan(self, pattern: str) -> Listing:
        paths = sorted(self.path.glob(pattern))
        if not paths:
            raise DataError(f"{self.path}: no tar matches {pattern!r}; set `path`, `train` and `test` of the source")
        labels: list[int] = []
        names: list[str] = []
        seen: set[str] = set()
        for path in paths:
            for key, image, label in pair_members(path):
                if key in seen:
                    raise DataError(f"{path}: key {key!r} occurs twice in the split; keys must be unique")
                seen.add(key)
                labels.append(label)
                names.append(f"{path.relative_to(self.path)}:{image.offset}:{image.size}:{key}")
        return Listing(np.array(labels, np.int64), names)

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[bytes]:
        for name in names:
            tar, offset, size, _ = name.split(":", 3)
            descriptor = self._open(tar)
            yield os.pread(descriptor, int(size), int(offset))

    def _open(self, tar: str) -> int:
        descriptors: dict[str, int] = self.__dict__.setdefault("_descriptors", {})
        if tar not in descriptors:
            descriptors[tar] = os.open(self.path / tar, os.O_RDONLY)
        return descriptors[tar]


def pair_members(path: Path) -> Iterator[tuple[str, Member, int]]:
    """(key, image member, label) of each sample of a tar.

    Raises:
        DataError: an image without label or a label without image, two of a kind, a label that is no integer.
    """
    images: dict[str, Member] = {}
    labels: dict[str, Member] = {}
    for member in walk_tar(path):
        table = labels if member.suffix == "cls" else images if member.suffix in IMAGE_SUFFIXES else None
        if table is None:
            continue
        if member.key in table:
            raise DataError(f"{path}: key {member.key!r} has two {member.suffix!r} members; keys must be unique")
        table[member.key] = member
    lonely = sorted(images.keys() ^ labels.keys())
    if lonely:
        lack = "label (.cls)" if lonely[0] in images else "image"
        raise DataError(
            f"{path}: sample {lonely[0]!r} has no {lack}; {len(lonely)} samples are incomplete: complete or remove them"
        )
    with open(path, "rb") as file:
        for key, image in images.items():
            yield key, image, _label(os.pread(file.fileno(), labels[key].size, labels[key].offset), key, path)


def _label(data: bytes, key: str, path: Path) -> int:
    try:
        return int(data)
    except ValueError as error:
        raise DataError(f"{path}: the label of {key!r} is {data[:20]!r}, not an integer") from error
