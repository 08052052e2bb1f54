"""Source `tinyimagenet`: TinyImageNet as unzipped (train/<id>/images/*, val/images/* with val_annotations.txt)."""

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
class TinyImageNet(FieldSource):
    """200 classes at 64 px; the official validation split serves as the test split."""

    path: Path
    remedy: ClassVar[str] = "unzip the archive again, or remove such files"

    @property
    def default_encoding(self) -> Encoding:
        return "original"

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._text("wnids.txt").split())

    def _text(self, name: str) -> str:
        try:
            return (self.path / name).read_text()
        except OSError as error:
            raise DataError(
                f"{self.path / name}: cannot be read ({error.strerror}); point `path` at the unzipped tiny-imagenet-200"
            ) from error

    def listings(self) -> dict[str, Listing]:
        return {"train": self._train(), "test": self._validation()}

    def _train(self) -> Listing:
        labels: list[int] = []
        names: list[str] = []
        for label, wordnet_id in enumerate(self.classes):
            files = sorted((self.path / "train" / wordnet_id / "images").glob("*.JPEG"))
            if not files:
                raise DataError(f"{self.path / 'train' / wordnet_id / 'images'}: class folder is empty or missing")
            labels += [label] * len(files)
            names += [f"train/{wordnet_id}/images/{file.name}" for file in files]
        return Listing(np.array(labels, np.int64), names)

    def _validation(self) -> Listing:
        label_of = {wordnet_id: label for label, wordnet_id in enumerate(self.classes)}
        rows = [line.split("\t") for line in self._text("val/val_annotations.txt").splitlines() if line]
        unknown = [row for row in rows if len(row) < 2 or row[1] not in label_of]
        if unknown:
            raise DataError(f"{self.path / 'val/val_annotations.txt'}: unknown class in line {unknown[0]!r}")
        return Listing(np.array([label_of[row[1]] for row in rows], np.int64), [f"val/images/{row[0]}" for row in rows])

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[bytes]:
        return map(self._read_file, names)  # unlike a generator, it goes on after a file that cannot be read

    def _read_file(self, name: str) -> bytes:
        return (self.path / name).read_bytes()
