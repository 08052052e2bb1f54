"""Small packed datasets and image files for the tests of order, pixels and loading."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image

from dbscale.data.manifest import Encoding
from dbscale.shards.pack import pack
from dbscale.shards.source import Listing, Source
from dbscale.shards.sources import source_of

# Under a deadline hypothesis fails tests on a busy machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


class ArraySource(Source):
    """Random pixels, a pure function of (split, number); class sizes as given."""

    class_counts: tuple[int, ...]
    size: int = 8
    default_encoding: ClassVar[Encoding] = "raw"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(f"class-{label}" for label in range(len(self.class_counts)))

    def listings(self) -> dict[str, Listing]:
        labels = np.repeat(np.arange(len(self.class_counts)), self.class_counts)
        listing = Listing(labels, [f"sample-{number}" for number in range(len(labels))])
        return {"train": listing, "test": listing}

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[NDArray[np.uint8]]:
        for number in numbers.tolist():
            generator = np.random.default_rng([number, split == "test"])
            yield generator.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def make_folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Packs an ArraySource of these class counts into a fresh folder."""

    def make(class_counts: tuple[int, ...], *, size: int = 8, shard_samples: int = 7, seed: int = 0) -> Path:
        folder = tmp_path_factory.mktemp("dataset") / "arrays"
        source = ArraySource(class_counts=class_counts, size=size, pack_seed=seed, shard_samples=shard_samples)
        pack(source, folder, progress=False)
        return folder

    return make


@pytest.fixture(scope="session")
def folder(make_folder_of: Callable[..., Path]) -> Path:
    """53 + 53 random 8 px images of four uneven classes in shards of 7: sizes that divide nothing. Read only."""
    return make_folder_of((20, 11, 12, 10))


@pytest.fixture
def own_folder(make_folder_of: Callable[..., Path]) -> Path:
    """The same, to be damaged."""
    return make_folder_of((20, 11, 12, 10))


def photograph(number: int, width: int, height: int) -> Image.Image:
    """A smooth picture with some texture: what JPEG and resizing are meant for."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + generator.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def make_photograph() -> Callable[[int, int, int], Image.Image]:
    return photograph


@pytest.fixture(scope="session")
def jpeg_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of 18 + 6 JPEG photographs in three classes, sizes between 300 and 420 px."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(24):
        split, label = ("train", number % 3) if number < 18 else ("test", number % 3)
        path = root / split / f"kind-{label}" / f"photo_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        photograph(number, 300 + 10 * (number % 7), 300 + 20 * (number % 5)).save(buffer, "JPEG", quality=90)
        path.write_bytes(buffer.getvalue())
    return root


@pytest.fixture(scope="session")
def jpeg_folder(jpeg_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Encoding], Path]:
    """The photographs packed in one encoding. Read only."""
    packed: dict[Encoding, Path] = {}

    def get(encoding: Encoding) -> Path:
        if encoding not in packed:
            packed[encoding] = tmp_path_factory.mktemp("packed") / encoding
            entry = {"source": "imagefolder", "path": str(jpeg_tree), "encoding": encoding, "shard_samples": 5}
            pack(source_of("photos", entry), packed[encoding], progress=False)
        return packed[encoding]

    return get
