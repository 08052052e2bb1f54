"""Open a packed dataset and take subsets of it: windows of the stored, class-balanced order.

`open_dataset(path).subset(num_samples, subset_seed=0)` is what a cell trains on. Knows the order samples are stored
in; the order they are seen in is `order`, their bytes are `read`, how they decode is `decode`. The tier `resident`
lives here: a whole split of small images, decoded once into one uint8 array that is kept as a mapped .npy file.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dbscale.data.decode import DecodeError, center_square, decode_image, resize_short
from dbscale.data.manifest import Manifest, SplitInfo, load_manifest
from dbscale.data.read import TARGET, EncodedReader, RawReader, ShardFiles, file_checksum, open_index
from dbscale.data.remote import RemoteRawReader, RemoteShards, is_url, mirror, origin
from dbscale.data.target import IGNORE, TargetReader, decode_mask, square_target
from dbscale.errors import DataError, FileError
from dbscale.files import atomic_open, make_folder, read_bytes, write_atomic
from dbscale.keyed import keyed_bits

Tier = Literal["resident", "raw", "jpeg256", "jpeg"]
RESIDENT_MAX_SIDE = 64
TOGETHER = 1024
"""Samples that are asked for at once when a whole split is decoded."""


def _fields_alone(self: Any) -> dict[str, Any]:
    """State of a frozen dataclass to pickle, caches left out: another process maps index and pixels for itself."""
    return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Dataset:
    """One split of a packed dataset, opened with one decode tier."""

    folder: Path
    manifest: Manifest
    split_name: str
    tier: Tier
    image_size: int | None
    """Side in px of the resident array; None for the other tiers."""
    cache_dir: Path | None = None
    __getstate__ = _fields_alone

    @property
    def split(self) -> SplitInfo:
        return self.manifest.split(self.split_name)

    @property
    def fingerprint(self) -> str:
        """The whole dataset's, from which a cell id is made."""
        return self.manifest.fingerprint

    @property
    def num_classes(self) -> int:
        return self.manifest.num_classes

    @property
    def num_samples(self) -> int:
        return self.split.num_samples

    @cached_property
    def index(self) -> NDArray[np.void]:
        """Memory-mapped records (see `read.index_dtype`)."""
        return open_index(self.folder, self.split)

    def labels_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [b]: labels of these positions of the split; touches no other record."""
        return self.index["label"][positions].astype(np.int64)

    @cached_property
    def files(self) -> ShardFiles:
        """The split's tars."""
        kind = ShardFiles if origin(self.folder) is None else RemoteShards
        return kind(self.folder, self.split, self.index)

    @cached_property
    def reader(self) -> "ResidentReader | RawReader | RemoteRawReader | EncodedReader":
        """Fetches pixels by position in the split."""
        if self.tier == "resident":
            assert self.image_size is not None
            return ResidentReader(self.folder, self.split, self.files, self.image_size, self.cache_dir)
        if self.tier == "raw":
            return RemoteRawReader(self.files) if isinstance(self.files, RemoteShards) else RawReader(self.files)
        return EncodedReader(self.files)

    @cached_property
    def targets(self) -> "TargetReader | ResidentReader | None":
        """Fetches masks or boxes by position in the split, fitting the pixels of `reader`; None where images have labels."""
        kind = self.manifest.target
        if kind is None:
            return None
        if kind == "mask" and self.image_size is not None:
            return ResidentReader(self.folder, self.split, self.files, self.image_size, self.cache_dir, masks=True)
        return TargetReader(self.files, kind, self.image_size)

    def subset(self, num_samples: int | None = None, subset_seed: int = 0) -> "Subset":
        """`num_samples` samples, class-balanced within one while that is possible; None takes all.

        Subsets of one `subset_seed` nest; another seed gives another window of the same order. Nothing is copied. Raises
        DataError for a size that does not fit, naming the largest that does.
        """
        total = self.num_samples
        if num_samples is not None and not 1 <= num_samples <= total:
            raise DataError(
                f"dataset {self.manifest.name!r}, split {self.split_name!r}: a subset of {num_samples:,} samples does "
                f"not fit; the split holds {total:,} (the largest that fits), class-balanced up to "
                f"{self.split.balanced_up_to:,}"
            )
        size = total if num_samples is None else num_samples
        return Subset(self, size, 0 if size == total else window_start(self.split, subset_seed))


def window_start(split: SplitInfo, subset_seed: int) -> int:
    """First position of a window: a multiple of the class count, so that windows stay balanced. Seed 0 starts at 0."""
    num_classes = len(split.class_counts)
    num_rounds = split.balanced_up_to // num_classes
    if subset_seed == 0 or num_rounds < 2:
        return 0
    draw = int(keyed_bits(subset_seed, "subset window", num_draws=1)[0, 0])
    return draw % num_rounds * num_classes


@dataclass(frozen=True)
class Subset:
    """A window of a dataset's stored order."""

    dataset: Dataset
    num_samples: int
    start: int
    """Window start; positions wrap inside the balanced part, then the unbalanced rest follows."""

    def __len__(self) -> int:
        return self.num_samples

    __getstate__ = _fields_alone

    @cached_property
    def fingerprint(self) -> str:
        """Names the exact samples: the dataset's fingerprint, the split, the size and the window."""
        parts = (self.dataset.fingerprint, self.dataset.split_name, self.num_samples, self.start)
        return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        """int64 [num_samples]: position in the split of each position in the subset."""
        positions = np.arange(self.num_samples, dtype=np.int64)
        if self.start:
            balanced = self.dataset.split.balanced_up_to
            positions = np.where(positions < balanced, (positions + self.start) % balanced, positions)
        positions.flags.writeable = False
        return positions

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """int64 [num_samples]."""
        return self.dataset.labels_of(self.indices)


def open_dataset(
    folder: str | Path,
    split: str = "train",
    *,
    tier: Tier | None = None,
    image_size: int | None = None,
    cache_dir: str | Path | None = None,
    keep: bool = False,
) -> Dataset:
    """Open a packed dataset.

    Args:
        folder: where `manifest.json` lies: a folder, or a URL that fsspec opens (s3://, gs://, hf://, https://).
        split: `train`, `test`, or another one of the manifest.
        tier: decode tier; None takes `resident` for images of at most 64 px, else the one of the packed encoding.
        image_size: side in px of the resident tier's images (others are resized once, centre-cropped); None keeps
            the stored size. Ignored by the other tiers, whose transform resizes.
        cache_dir: folder of the resident tier's decoded array; None keeps it beside the shards. Of a URL, the folder
            for manifest and index; None takes one below the user's cache.
        keep: of a URL, also keep there what is read of the tars, so that a second epoch asks for nothing.

    Raises DataError where nothing is packed, for an unknown split, a damaged index, or a tier the encoding cannot serve.

    >>> import dbscale, tempfile
    >>> from dbscale.shards.pack import ensure_packed
    >>> folder = ensure_packed("digits", {"source": "digits"}, tempfile.mkdtemp(), progress=False)
    >>> dataset = dbscale.open_dataset(folder)
    >>> dataset.num_classes, dataset.tier, len(dataset.subset(100))
    (10, 'resident', 100)
    """
    folder = mirror(str(folder), cache_dir, keep=keep) if is_url(folder) else Path(folder)
    manifest = load_manifest(folder)
    manifest.split(split)
    chosen = tier or default_tier(manifest)
    _check_tier(manifest, chosen)
    size = _resident_size(manifest, image_size) if chosen == "resident" else None
    dataset = Dataset(folder, manifest, split, chosen, size, Path(cache_dir) if cache_dir else None)
    _ = dataset.index  # damage is found here, rather than in the middle of a run
    return dataset


def default_tier(manifest: Manifest) -> Tier:
    """`resident` up to 64 px, else the tier of the packed encoding."""
    if manifest.image.max_side <= RESIDENT_MAX_SIDE:
        return "resident"
    encoding_tier: dict[str, Tier] = {"original": "jpeg", "jpeg256": "jpeg256", "raw": "raw"}
    return encoding_tier[manifest.image.encoding]


def _check_tier(manifest: Manifest, tier: str) -> None:
    if tier not in get_args(Tier):
        raise DataError(f"decode tier {tier!r} is unknown; known: {', '.join(get_args(Tier))}")
    needs = {"raw": "raw", "jpeg256": "jpeg256"}.get(tier)
    if needs is not None and manifest.image.encoding != needs:
        raise DataError(
            f"dataset {manifest.name!r} is packed with encoding {manifest.image.encoding!r}, which the decode tier "
            f"{tier!r} cannot read; pack it again with encoding {needs!r} or choose tier {default_tier(manifest)!r}"
        )


def _resident_size(manifest: Manifest, image_size: int | None) -> int:
    image = manifest.image
    if image_size is not None:
        return image_size
    if not image.square or image.min_side != image.max_side:
        raise DataError(
            f"dataset {manifest.name!r} has images of {image.min_side} to {image.max_side} px; the resident tier "
            "needs one size: pass image_size"
        )
    return image.max_side


class ResidentReader:
    """Tier `resident`: fetches by one gather from the split's decoded array, which all processes of a node share; of
    images or, with `masks`, of a dense dataset's masks.

    Built by whoever comes first; several may race, each writes a file of its own and the last rename wins. A damaged,
    foreign or half-written file is rebuilt; where nothing can be written the array stays in RAM.
    """

    def __init__(
        self, folder: Path, split: SplitInfo, files: ShardFiles, image_size: int, cache_dir: Path | None, *,
        masks: bool = False,
    ) -> None:  # fmt: skip
        decode, fill, mark = (_mask, IGNORE, "-mask") if masks else (_pixels, 0, "")
        name = f"{split.index.split('.')[0]}-{split.fingerprint[:12]}-{image_size}px{mark}.npy"
        shape = (len(files.index), *(() if masks else (3,)), image_size, image_size)
        path, decode_one = (cache_dir or folder / "cache") / name, partial(decode, files, image_size)
        self.values, self.bad = _resident(path, shape, files, decode_one, fill)

    def fetch(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[int]]:
        """uint8 [b, 3, S, S], or masks [b, S, S], and the slots that are bad: black, or all IGNORE."""
        bad = [slot for slot, position in enumerate(positions.tolist()) if position in self.bad] if self.bad else []
        return np.take(self.values, positions, axis=0), bad


Decode = Callable[[int], NDArray[np.uint8] | None]
"""One sample's array by its position, or None where its bytes changed or do not decode."""


def _resident(
    path: Path, shape: tuple[int, ...], files: ShardFiles, decode: Decode, fill: int
) -> tuple[NDArray[np.uint8], frozenset[int]]:
    """The split's decoded array and its bad positions, from the cache in `path` or built anew."""
    known = _opened(path, shape)
    if known is None or any(decode(position) is not None for position in known[1]):
        # A cache that calls samples bad outlives the damage: `shards pack` may have mended them.
        known = _store(path, *_build(decode, shape, files, fill))
    return known


def _build(
    decode: Decode, shape: tuple[int, ...], files: ShardFiles, fill: int
) -> tuple[NDArray[np.uint8], frozenset[int]]:
    values = np.full(shape, fill, np.uint8)
    bad = set()
    for position in range(len(values)):
        if position % TOGETHER == 0:
            files.prepare(np.arange(position, min(position + TOGETHER, len(values))))
        found = decode(position)
        if found is None:
            bad.add(position)
        else:
            values[position] = found
    return values, frozenset(bad)


def _pixels(files: ShardFiles, image_size: int, position: int) -> NDArray[np.uint8] | None:
    """An image as the resident tier keeps it, uint8 [3, S, S]; None where it does not decode."""
    try:
        pixels = decode_image(files.read(position))
    except DecodeError:
        return None
    return center_square(resize_short(pixels, image_size), image_size).transpose(2, 0, 1)


def _mask(files: ShardFiles, image_size: int, position: int) -> NDArray[np.uint8] | None:
    """A mask as the resident tier keeps it, uint8 [S, S]; None where it does not decode."""
    try:
        mask = square_target(decode_mask(files.read(position, TARGET)), image_size)
    except DecodeError:
        return None
    assert isinstance(mask, np.ndarray)
    return mask


def _store(path: Path, images: NDArray[np.uint8], bad: frozenset[int]) -> tuple[NDArray[np.uint8], frozenset[int]]:
    try:
        make_folder(path.parent)
        with atomic_open(path) as file:
            np.save(file, images, allow_pickle=False)
        # The note comes last: an array without its note counts as half-written.
        note = {"of": path.stem, "checksum": file_checksum(path), "bad": sorted(bad)}
        write_atomic(path.with_suffix(".json"), json.dumps(note).encode())
    except (DataError, FileError, OSError):
        return images, bad  # a cache is a convenience: without one every process decodes for itself
    _opened.cache_clear()
    return _opened(path, images.shape) or (images, bad)


@lru_cache(maxsize=32)
def _opened(path: Path, shape: tuple[int, ...]) -> tuple[NDArray[np.uint8], frozenset[int]] | None:
    """The mapped cache, or None where it is missing, half-written, damaged or another split's."""
    try:
        note = json.loads(read_bytes(path.with_suffix(".json")))
        if note["of"] != path.stem or file_checksum(path) != note["checksum"]:
            return None
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        bad = frozenset(int(position) for position in note["bad"])
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    sound = images.shape == shape and images.dtype == np.uint8 and all(0 <= each < shape[0] for each in bad)
    return (images, bad) if sound else None
