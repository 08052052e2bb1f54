"""Bring a source's content into the packed encoding: original bytes, 256-short JPEG, or raw uint8 of one size."""

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from dbscale.data.decode import center_square, decode_image, encode_ppm, image_shape, image_suffix, resize_short
from dbscale.data.manifest import Encoding
from shards.source import Content

JPEG_SHORT_SIDE = 256
JPEG_QUALITY = 95
JPEG_SUBSAMPLING = "420"  # as nearly all photographs; without it decoding takes half as long again
RAW_SIDE = 256


def encode(content: Content, encoding: Encoding, raw_size: int | None) -> tuple[str, bytes, int, int]:
    """(suffix, bytes, height, width) of one sample.

    `raw_size` is the side of raw images; None keeps pixels of a source without files as they are, and makes files
    256 px. Raises DecodeError on what is no image.
    """
    if encoding == "original" and isinstance(content, bytes):
        return image_suffix(content), content, *image_shape(content)
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
