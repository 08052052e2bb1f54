"""What the packer asks of an image collection. One module per kind implements it; `sources.make_source` picks one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from dbscale.data.manifest import Encoding
from dbscale.errors import DataError

Content = bytes | NDArray[np.uint8]
"""An encoded image file, or uint8 RGB pixels [H, W, 3] where the source has no files."""


@dataclass(frozen=True)
class Listing:
    """The samples of one split, before any is read."""

    labels: NDArray[np.int64]
    """int64 [n], in 0…num_classes-1."""
    names: list[str]
    """A name per sample by which its origin can be found again."""


class Source(Protocol):
    """An image collection. Instances are small and picklable; what is large is loaded when first asked for."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label."""
        ...

    @property
    def default_encoding(self) -> Encoding: ...

    @property
    def remedy(self) -> str:
        """What to do about samples that cannot be packed, for messages."""
        ...

    def listings(self) -> dict[str, Listing]:
        """Splits by name, `train` first."""
        ...

    def origin(self, name: str) -> str:
        """Where a sample of the listing comes from, for messages."""
        ...

    def prepare(self, work: Path) -> "Source":
        """The source to read from, after work that is done once for all shards, in `work`; restartable."""
        ...

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[Content]:
        """The samples of these numbers (and names) of the split's listing, in this order."""
        ...


class FieldSource:
    """What the frozen dataclasses that are sources share: nothing to prepare, and pickling by fields.

    A copy in another process carries the fields alone; cached listings and pixels stay behind.
    """

    remedy: ClassVar[str] = "take these samples out of their file"

    def origin(self, name: str) -> str:
        """The name, below the source's path where it has one."""
        path = getattr(self, "path", None)
        return name if path is None else f"{path / name}"

    def prepare(self, work: Path) -> Self:
        """Nothing to do."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


def refuse_remote(place: str) -> None:
    """Raise DataError on `pipe:` commands, which a shell would run, and on URLs (a Path turns `://` into `:/`)."""
    if "pipe:" in place or ":/" in place:
        raise DataError(f"{place!r} is a pipe or a URL: refused; download the files and give their folder")
