"""What a packed dataset holds: `manifest.json`, the last file a packer writes.

A dataset is packed exactly when its manifest exists. Paths and times never enter it, so that the same source and
seed give the same bytes. Knows nothing of pixels: where each sample lies is `index`, how it decodes is `decode`.
"""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from dbscale.errors import DataError
from dbscale.files import write_atomic

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
Encoding = Literal["original", "jpeg256", "raw"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardInfo(Frozen):
    """One tar."""

    name: str
    """File name inside the dataset's folder."""
    num_samples: int
    num_bytes: int
    """Exact size of the tar, by which a truncated or changed one is found."""


class SplitInfo(Frozen):
    """One split (train, test)."""

    num_samples: int
    class_counts: tuple[int, ...]
    """Samples of each class, by label."""
    balanced_up_to: int
    """Every prefix up to this size holds each class equally often, within one."""
    fingerprint: str
    """Hash of the labels and checksums of all samples, in order."""
    index: str
    """File name of the sidecar index."""
    index_checksum: str
    """xxh3_128 of the index file's bytes."""
    shards: tuple[ShardInfo, ...]


class ImageInfo(Frozen):
    """What the members of the tars are."""

    encoding: Encoding
    """The source's `original` bytes, `jpeg256` (short side of at most 256), or `raw` (PPM of uint8 pixels)."""
    min_side: int
    """Smallest height or width in px over all splits."""
    max_side: int
    """Largest height or width in px over all splits."""
    square: bool
    """Whether all images are square (then they all have `max_side` px if `min_side` equals it)."""


class Manifest(Frozen):
    """A packed dataset."""

    format_version: int = FORMAT_VERSION
    name: str
    classes: tuple[str, ...]
    image: ImageInfo
    seed: int
    """Seed of the stratified order."""
    source: dict[str, JsonValue]
    """Kind and options the dataset was packed from; paths relative to the data folder."""
    splits: dict[str, SplitInfo]
    fingerprint: str
    """Hash over classes, encoding and the fingerprints of all splits."""
    extra: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(self, name: str) -> SplitInfo:
        """The split of this name. Raises DataError naming those that exist."""
        if name not in self.splits:
            raise DataError(f"dataset {self.name!r} has no split {name!r}; it has: {', '.join(self.splits)}")
        return self.splits[name]


def make_fingerprint(classes: tuple[str, ...], encoding: str, splits: dict[str, SplitInfo]) -> str:
    """sha256 over what decides the pixels and labels: never file names, shard sizes or paths."""
    parts = [f"v{FORMAT_VERSION}", encoding, *classes]
    parts += [f"{name}={split.fingerprint}" for name, split in sorted(splits.items())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def load_manifest(folder: str | Path) -> Manifest:
    """Read `<folder>/manifest.json`.

    Raises:
        DataError: nothing is packed there, or the file is damaged or of another version.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        hint = "the folder does not exist" if not path.parent.is_dir() else "the folder holds no finished dataset"
        raise DataError(
            f"{path}: no manifest ({hint}); pack the dataset with `dbscale shards pack`, which also finishes "
            "a pack that was interrupted"
        ) from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{path}: damaged or foreign manifest ({where}: {first['msg']}); remove the folder and "
            "pack again with `dbscale shards pack`"
        ) from error
    if manifest.format_version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {manifest.format_version}, this release reads {FORMAT_VERSION}; pack again"
        )
    return manifest


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically; its existence declares the dataset packed."""
    write_atomic(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode() + b"\n")
