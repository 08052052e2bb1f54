"""Source `imagefolder`: <path>/<split>/<class>/**/<image>, the layout of torchvision's ImageFolder and of ImageNet."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dbscale.data.manifest import Encoding
from dbscale.errors import DataError
from shards.source import FieldSource, Listing


@dataclass(frozen=True)
class ImageFolder(FieldSource):
    """Every file below a class folder is a sample, hidden files excepted."""

    path: Path
    train: str = "train"
    """Folder of the training split."""
    test: str | None = "test"
    """Folder of the test split; None packs no test split."""
    class_list: tuple[str, ...] | None = None
    """Class folders to take, in label order; None takes all, sorted."""
    exclude: frozenset[str] = frozenset()
    """Files to leave out, relative to `path`."""
    remedy: ClassVar[str] = "mend or remove such files (or list them under the source's `exclude`)"

    @property
    def default_encoding(self) -> Encoding:
        return "original"

    @cached_property
    def classes(self) -> tuple[str, ...]:
        found = self._class_folders(self.train)
        if self.class_list is None:
            return tuple(found)
        missing = sorted(set(self.class_list) - set(found))
        if missing:
            raise DataError(
                f"{self.path / self.train}: {len(missing)} classes of the class list have no folder, among them "
                f"{', '.join(missing[:5])}"
            )
        return self.class_list

    def _class_folders(self, split: str) -> list[str]:
        folder = self.path / split
        if not folder.is_dir():
            there = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
            hint = f"{self.path} holds: {', '.join(there[:10])}" if there else f"{self.path} does not exist or is empty"
            raise DataError(f"{folder}: no such folder ({hint}); set `path`, `train` and `test` of the source")
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        if not names:
            raise DataError(f"{folder}: holds no class folders; expected <class>/<image> below it")
        return names

    def listings(self) -> dict[str, Listing]:
        splits = {"train": self.train} if self.test is None else {"train": self.train, "test": self.test}
        return {name: self._listing(folder) for name, folder in splits.items()}

    def _listing(self, split: str) -> Listing:
        labels: list[int] = []
        names: list[str] = []
        surplus = set(self._class_folders(split)) - set(self.classes)
        if surplus and self.class_list is None:
            raise DataError(f"{self.path / split}: classes without training images: {', '.join(sorted(surplus)[:5])}")
        for label, name in enumerate(self.classes):
            files = sorted(self._files(f"{split}/{name}"))
            if not files:
                raise DataError(
                    f"{self.path / split / name}: class folder is empty or missing; add images, or leave the class "
                    "out with a class list"
                )
            labels += [label] * len(files)
            names += files
        return Listing(np.array(labels, np.int64), names)

    def _files(self, folder: str) -> Iterator[str]:
        root = self.path / folder
        if not root.is_dir():
            return
        for entry in os.scandir(root):
            relative = f"{folder}/{entry.name}"
            if entry.name.startswith(".") or relative in self.exclude:
                continue
            if entry.is_dir():
                yield from self._files(relative)
            else:
                yield relative

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[bytes]:
        return map(self._read_file, names)  # unlike a generator, it goes on after a file that cannot be read

    def _read_file(self, name: str) -> bytes:
        return (self.path / name).read_bytes()
