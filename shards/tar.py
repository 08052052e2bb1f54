"""One sample's bytes in the packed encoding, and the tar that many make; the same bytes every time.

Shards are ordinary WebDataset tars. They are written here rather than by `webdataset.TarWriter`, which tells no offsets
for the index, does not sync, takes half as long again (20,000 against 29,000 samples/s) and would lay out other bytes:
what earlier releases packed could no longer be mended. Tests read every shard back through `webdataset`.
"""

import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from dbscale.data.decode import center_square, decode_image, encode_ppm, image_shape, image_suffix, resize_short
from dbscale.data.manifest import TARGET_SUFFIX, Encoding, TargetKind
from dbscale.data.read import checksum, index_dtype
from dbscale.files import atomic_open
from dbscale.shards.source import Content

JPEG_SHORT_SIDE = 256
JPEG_QUALITY = 95
JPEG_SUBSAMPLING = "420"  # as nearly all photographs; without it decoding takes half as long again
RAW_SIDE = 256
BLOCK = tarfile.BLOCKSIZE


def encode(content: Content, encoding: Encoding, raw_size: int | None) -> tuple[str, bytes, int, int]:
    """(suffix, bytes, height, width) of one sample in the packed encoding.

    `raw_size` is the side of raw images; None keeps pixels of a source without files as they are, and makes files
    256 px. Raises DecodeError on what is no image.
    """
    if encoding == "original" and isinstance(content, bytes):
        suffix = image_suffix(content)
        if suffix not in ("jpg", "png"):
            decode_image(content)  # rare formats have rare variants; what cannot be read is known before training
        return suffix, content, *image_shape(content)
    pixels = decode_image(content) if isinstance(content, bytes) else content
    if encoding == "jpeg256":
        return _encode_jpeg(content, pixels)
    if encoding == "raw" and (raw_size is not None or isinstance(content, bytes)):
        side = raw_size or RAW_SIDE
        pixels = center_square(resize_short(pixels, side), side)
    return "ppm", encode_ppm(pixels), *pixels.shape[:2]


def _encode_jpeg(content: Content, pixels: NDArray[np.uint8]) -> tuple[str, bytes, int, int]:
    height, width = pixels.shape[:2]
    if min(height, width) <= JPEG_SHORT_SIDE:
        if isinstance(content, bytes) and image_suffix(content) == "jpg":
            return "jpg", content, height, width  # encoding it again would only lose quality
    else:
        pixels = resize_short(pixels, JPEG_SHORT_SIDE)
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling=JPEG_SUBSAMPLING
    )
    return "jpg", data, *pixels.shape[:2]


class Sample(NamedTuple):
    """One encoded sample on its way into a tar."""

    key: str
    suffix: str
    data: bytes
    label: int
    height: int
    width: int
    target: bytes | None = None
    """Encoded mask or boxes of a dense dataset, which then stand in the place of the label."""


def write_shard(
    path: Path, samples: Iterable[Sample], shard: int, target: TargetKind | None = None
) -> NDArray[np.void]:
    """Write a tar of `key.<suffix>` + `key.cls` pairs atomically and return its index rows (keys as wide as the longest).

    With a `target` the pairs are `key.<suffix>` + `key.mask.png` or `key.boxes.json`. Headers carry no time, user or
    path, so the same samples give the same bytes.
    """
    rows: list[tuple[Any, ...]] = []
    position = 0
    with atomic_open(path) as file:
        for sample in samples:
            member = _member(f"{sample.key}.{sample.suffix}", sample.data)
            row = [shard, len(sample.data), position + BLOCK, checksum(sample.data), sample.label]
            row += [min(sample.height, 0xFFFF), min(sample.width, 0xFFFF)]
            if target is None:
                record = member + _member(f"{sample.key}.cls", str(sample.label).encode())
            else:
                assert sample.target is not None
                row += [position + len(member) + BLOCK, len(sample.target), checksum(sample.target)]
                record = member + _member(f"{sample.key}.{TARGET_SUFFIX[target]}", sample.target)
            rows.append((*row, sample.key.encode()))
            file.write(record)
            position += len(record)
        file.write(bytes(2 * BLOCK))
    return np.array(rows, dtype=index_dtype(max(len(row[-1]) for row in rows), with_target=target is not None))


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o444
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
