"""What a packed dataset holds: `manifest.json`, the last file a packer writes.

A dataset is packed exactly when its manifest exists. Paths and times never enter it, so that the same source and
seed give the same bytes. It carries a checksum of itself and those of the index files, which carry one of each sample:
so every byte that training reads is checked. Where each sample lies is `read`, how it decodes is `decode`.
"""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationError

from dbscale.errors import DataError
from dbscale.files import read_bytes, write_atomic
from dbscale.strict import Strict

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
Encoding = Literal["original", "jpeg256", "raw"]
TargetKind = Literal["mask", "boxes"]
TARGET_SUFFIX: dict[TargetKind, str] = {"mask": "mask.png", "boxes": "boxes.json"}
"""Name of the member beside `key.jpg`, behind `key.`."""
Count = Annotated[int, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
"""A file inside the dataset's folder: a manifest cannot make anyone read or write elsewhere."""


class ShardInfo(Strict):
    """One tar."""

    name: FileName
    num_samples: Count
    num_bytes: Count
    """Exact size of the tar, by which a truncated or changed one is found."""


class SplitInfo(Strict):
    """One split (train, test)."""

    num_samples: Count
    class_counts: tuple[Count, ...]
    """Samples of each class, by label; of a dense dataset, whose images have no class, one number for all."""
    balanced_up_to: Count
    """Every prefix up to this size holds each class equally often, within one."""
    fingerprint: str
    """Hash of the labels and checksums of all samples, in order."""
    index: FileName
    """The sidecar index."""
    index_checksum: str
    """xxh3_128 of the index file's bytes."""
    shards: tuple[ShardInfo, ...]


class ImageInfo(Strict):
    """What the members of the tars are."""

    encoding: Encoding
    """The source's `original` bytes, `jpeg256` (short side of at most 256), or `raw` (PPM of uint8 pixels)."""
    min_side: Count
    """Smallest height or width in px over all splits."""
    max_side: Count
    """Largest height or width in px over all splits."""
    square: bool
    """Whether all images are square (then they all have `max_side` px if `min_side` equals it)."""


class Manifest(Strict):
    """A packed dataset."""

    format_version: int = FORMAT_VERSION
    name: str
    classes: tuple[str, ...]
    image: ImageInfo
    target: TargetKind | None = None
    """What lies beside each image; None: its label, so that it can be classified."""
    seed: int
    """Seed of the stratified order."""
    source: dict[str, JsonValue]
    """Kind and options the dataset was packed from; paths relative to the data folder."""
    splits: dict[str, SplitInfo]
    fingerprint: str
    """Hash over classes, encoding and the fingerprints of all splits."""
    extra: dict[str, JsonValue] = Field(default_factory=dict)
    checksum: str | None = None
    """Hash of everything above; None in manifests of releases that did not write it."""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_strata(self) -> int:
        """Groups of samples that prefixes are balanced over: the classes, or one of all images that have none."""
        return 1 if self.target else self.num_classes

    def split(self, name: str) -> SplitInfo:
        """The split of this name. Raises DataError naming those that exist."""
        if name not in self.splits:
            raise DataError(f"dataset {self.name!r} has no split {name!r}; it has: {', '.join(self.splits)}")
        return self.splits[name]


def make_fingerprint(
    classes: tuple[str, ...], encoding: str, splits: dict[str, SplitInfo], target: TargetKind | None = None
) -> str:
    """sha256 over what decides the pixels and labels: never file names, shard sizes or paths."""
    parts = [f"v{FORMAT_VERSION}", encoding, *([target] if target else []), *classes]
    parts += [f"{name}={split.fingerprint}" for name, split in sorted(splits.items())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def load_manifest(folder: str | Path) -> Manifest:
    """Read and check `<folder>/manifest.json`. Raises DataError where nothing is packed, or the file is damaged or of
    another version."""
    path = Path(folder) / MANIFEST_NAME
    try:
        text = read_bytes(path)
        manifest = Manifest.model_validate_json(text)
    except FileNotFoundError as error:
        hint = "the folder does not exist" if not path.parent.is_dir() else "the folder holds no finished dataset"
        raise DataError(
            f"{path}: no manifest ({hint}); pack the dataset with `dbscale shards pack`, which also finishes "
            "a pack that was interrupted"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise _damaged(path, f"{where}: {first['msg']}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {manifest.format_version}, this release reads {FORMAT_VERSION}; pack again"
        )
    found = _checksum(json.loads(text))
    if manifest.checksum not in (None, found):
        raise _damaged(path, f"checksum {found}, expected {manifest.checksum}: it changed since packing")
    return manifest


def _damaged(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: damaged or foreign manifest ({what}); remove the folder and pack again with `dbscale shards pack`"
    )


def _checksum(content: dict[str, Any]) -> str:
    kept = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def save_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with its checksum, atomically; its existence declares the dataset packed. Returns it."""
    content = manifest.model_dump(mode="json")
    manifest = manifest.model_copy(update={"checksum": _checksum(content)})
    write_atomic(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode() + b"\n")
    return manifest


def mend(folder: Path) -> str:
    """What to do about a dataset's missing, cut or resized files, and the command for it."""
    if folder.parent.name != "shards":
        return "pack it again with the same options, which rewrites only what is damaged (remove a staged copy)"
    command = shlex.join(["dbscale", "shards", "pack", folder.name, "--data", str(folder.parent.parent)])
    return f"run `{command}`, which rewrites only what is damaged"
