"""A small ImageFolder of real files, and how to make others."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from dbscale.shards.source import Source
from dbscale.shards.sources import source_of

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def make_source(kind: str, *, data_dir: str | Path = ".", **options: Any) -> Source:
    """The source of a grid's entry that has these options and the name of its kind."""
    return source_of(kind, {"source": kind, **options}, data_dir)


def image_bytes(number: int, kind: str = "PNG", size: tuple[int, int] = (12, 12)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_image() -> Callable[..., bytes]:
    return image_bytes


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An ImageFolder of 23 + 7 PNG files in three uneven classes."""
    root = tmp_path / "data" / "photos"
    for split, counts in (("train", (10, 6, 7)), ("test", (3, 2, 2))):
        for label, count in enumerate(counts):
            folder = root / split / f"kind-{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{split}.{label}.{number}.png").write_bytes(image_bytes(100 * label + number))
    return root
