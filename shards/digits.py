"""Source `digits`: scikit-learn's 1,797 real handwritten digits (8 × 8), enlarged; nothing is downloaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dbscale.data.manifest import Encoding
from dbscale.errors import DataError
from shards.source import FieldSource, Listing
from shards.stratify import stratified_order


@dataclass(frozen=True)
class Digits(FieldSource):
    """A stratified split of the digits: the first `num_test` of the stratified order are the test split."""

    image_size: int = 32
    """Side in px."""
    num_test: int = 597
    seed: int = 0
    """Of the split."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("0123456789")

    @property
    def default_encoding(self) -> Encoding:
        return "raw"

    @cached_property
    def _data(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        from sklearn.datasets import load_digits  # takes a second to import, and only this source needs it

        pixels, labels = load_digits(return_X_y=True)
        return pixels.reshape(-1, 8, 8), labels.astype(np.int64)

    @cached_property
    def _parts(self) -> dict[str, NDArray[np.int64]]:
        labels = self._data[1]
        if not 10 <= self.num_test <= len(labels) - 10:
            raise DataError(f"digits: num_test {self.num_test} must lie in 10…{len(labels) - 10}")
        stored = stratified_order(labels, self.seed, "digits")
        return {"train": stored[self.num_test :], "test": stored[: self.num_test]}

    def listings(self) -> dict[str, Listing]:
        labels = self._data[1]
        return {
            split: Listing(labels[part], [f"digit-{number:04d}" for number in part.tolist()])
            for split, part in self._parts.items()
        }

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[NDArray[np.uint8]]:
        for image in self._data[0][self._parts[split][numbers]]:
            grey = Image.fromarray((image * (255 / 16)).astype(np.uint8))
            pixels = np.asarray(grey.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC))
            yield np.repeat(pixels[..., None], 3, axis=2)
