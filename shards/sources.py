"""Pick the kind of source that a grid's dataset entry names, and check its options; needs neither torch nor pyarrow.

An entry may also name a dataset that is packed already, behind a URL: reading it is `dbscale.data.remote`, packing to a
URL `dbscale.shards.publish`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dbscale import plugins
from dbscale.data.manifest import MANIFEST_NAME, load_manifest
from dbscale.data.remote import mirror, origin
from dbscale.errors import ConfigError, DataError, nearest
from dbscale.shards.cifar import Cifar
from dbscale.shards.coco import Coco
from dbscale.shards.generated import Digits, Fractals
from dbscale.shards.imagefolder import ImageFolder, TinyImageNet
from dbscale.shards.maskfolder import ADE20K, VOC, MaskFolder
from dbscale.shards.parquet import MaskParquet, Parquet
from dbscale.shards.scenes import FractalBoxes, FractalMasks
from dbscale.shards.source import FileSource, Source, listing_digest
from dbscale.shards.webdataset import WebDatasetTars
from dbscale.strict import Strict, validate

KINDS: dict[str, type[Source]] = {
    "imagefolder": ImageFolder,
    "cifar": Cifar,
    "tinyimagenet": TinyImageNet,
    "parquet": Parquet,
    "webdataset": WebDatasetTars,
    "digits": Digits,
    "fractals": Fractals,
    "maskfolder": MaskFolder,
    "voc": VOC,
    "ade20k": ADE20K,
    "parquet_masks": MaskParquet,
    "coco": Coco,
    "fractal_masks": FractalMasks,
    "fractal_boxes": FractalBoxes,
}
REMOTE = "remote"


def source_of(name: str, entry: Mapping[str, Any], data_dir: str | Path = ".") -> Source:
    """The source that a grid's dataset entry `{source: <kind>, <option>: …}` describes; nothing is read yet.

    Relative paths of the entry are below `data_dir`. Raises ConfigError for an unknown kind or option, and for an option
    that is missing, of the wrong type or impossible.
    """
    options = {key: str(value) if isinstance(value, Path) else value for key, value in entry.items() if key != "source"}
    kind = entry.get("source")
    kinds = KINDS | plugins.SOURCES
    if not isinstance(kind, str) or kind not in kinds:
        what = "names no `source`" if kind is None else f"has the unknown source {kind!r}"
        raise ConfigError(f"dataset {name!r} {what}; {nearest(kind, [*kinds, REMOTE])}")
    return validate(kinds[kind], options, where=f"dataset {name!r} (source {kind})").below(Path(data_dir))


class Remote(Strict):
    """`{source: remote, url: s3://bucket/birds}`: a dataset that is packed already, behind a URL."""

    url: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.]*://[^\s\x00-\x1f]+$")]
    keep: bool = False
    """Keep on disk what was read of the tars."""


def remote_of(name: str, entry: Mapping[str, Any]) -> Remote | None:
    """The remote dataset that an entry names; None for an entry that is packed from a source. Raises ConfigError."""
    if entry.get("source") != REMOTE:
        return None
    options = {key: value for key, value in entry.items() if key != "source"}
    return validate(Remote, options, where=f"dataset {name!r} (source {REMOTE})")


def ensure_mirrored(name: str, remote: Remote, folder: Path) -> Path:
    """Manifest and index of a remote dataset in `folder`, fetched unless they are there.

    Raises DataError where the folder holds another dataset, or the URL cannot be read.
    """
    if not (folder / MANIFEST_NAME).exists():
        return mirror(remote.url, folder, keep=remote.keep)
    found = origin(folder)
    if found != remote.url.rstrip("/"):
        what = f"comes from {found}" if found else "was packed here"
        raise DataError(f"{folder}: dataset {name!r} {what}, now asked for {remote.url}; take another dataset name, or "
                        "remove this folder first")  # fmt: skip
    return folder


def check_entry(name: str, entry: Mapping[str, Any], data_dir: str | Path) -> None:
    """Raise ConfigError for a dataset entry that cannot be packed, or that names no remote dataset; reads nothing."""
    if remote_of(name, entry) is None:
        source_of(name, entry, data_dir)


def check_there(name: str, entry: Mapping[str, Any], data_dir: str | Path) -> None:
    """As `check_entry`, and raise DataError where nothing lies at the path that the entry names; reads nothing."""
    if remote_of(name, entry) is not None:
        return
    source = source_of(name, entry, data_dir)
    if isinstance(source, FileSource) and not source.root.exists():
        raise DataError(f"dataset {name!r}: {source.root} does not exist; set its `path`, or --data (DATA=… in make)")


def source_change(folder: Path, data_dir: str | Path, *, quick: bool = True) -> str | None:
    """A sentence when the source of the dataset packed in `folder` holds other samples now, else None.

    Quick looks at the times of a few files and folders, and lists the source again only where one is newer than the
    pack. A source that is gone cannot have changed, and what was packed behind a URL has none here.
    """
    manifest = load_manifest(folder)
    if origin(folder) is not None:
        return None
    packed_at = (folder / MANIFEST_NAME).stat().st_mtime_ns
    try:
        source = source_of(manifest.name, manifest.source, data_dir)
        if isinstance(source, FileSource) and not source.root.exists():
            return None
        if quick and not any(path.stat().st_mtime_ns >= packed_at for path in source.watched()):
            return None
        listings = source.listings()
    except (OSError, ValueError) as error:
        return f"its source cannot be listed again: {error}"
    if listing_digest(source.classes, listings) == manifest.extra.get("listing"):
        return None
    counts = ", ".join(
        f"{len(listing.names):,} {split} samples, {manifest.splits[split].num_samples:,} are packed"
        for split, listing in listings.items()
        if split in manifest.splits
    )
    return (
        f"its source now holds other files ({counts}); results keep to what is packed: remove {folder} to pack it anew"
    )
