"""Turn the bytes of one image file into uint8 RGB [H, W, 3].

JPEG goes through simplejpeg (libjpeg-turbo), everything else, and what simplejpeg refuses (CMYK), through Pillow. The
format is told from the bytes, never from the file's name: ImageNet holds PNG files named .JPEG. Damage is reported as
`DecodeError`; what to do about it is the loader's decision.
"""

import io
import struct
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from dbscale.errors import DataError

MAX_PIXELS = 1 << 26
"""Larger images are refused unread: 67 megapixels is far above any training photograph (decompression bombs)."""

_SUFFIXES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"P6", "ppm"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\x00", "tif"),
    (b"MM\x00*", "tif"),
)


_PNG_HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


class DecodeError(DataError):
    """These bytes are no image that can be decoded."""


def image_suffix(data: bytes) -> str:
    """File suffix (jpg, png, ppm, webp …) by the leading bytes. Raises DecodeError where no format is known."""
    for magic, suffix in _SUFFIXES:
        if data.startswith(magic):
            return suffix
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise DecodeError(f"not an image: {len(data)} bytes that begin with {data[:8]!r}")


def image_shape(data: bytes) -> tuple[int, int]:
    """(height, width) from the header alone. Raises DecodeError."""
    if data.startswith(b"\xff\xd8\xff"):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise DecodeError(f"damaged JPEG header: {error}") from error
        return int(height), int(width)
    if data.startswith(_PNG_HEADER) and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    image_suffix(data)
    with _open_pillow(data) as image:
        return image.height, image.width


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"{width}×{height} px is more than {MAX_PIXELS:,} pixels: refused as a decompression bomb")


def _open_pillow(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower, and an error
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise DecodeError(f"refused as a decompression bomb: {error}") from error
    except Exception as error:  # Pillow's plugins raise many kinds on damaged input
        raise DecodeError(f"damaged {image_suffix(data)} header: {error}") from error
    _check_pixels(image.height, image.width)
    return image


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """uint8 RGB [H, W, 3]. Grey is repeated, alpha dropped, CMYK converted, 16 bits scaled to 8. Raises DecodeError."""
    if data.startswith(b"P6"):
        return _decode_ppm(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _decode_jpeg(data)
    image_suffix(data)
    return _decode_pillow(data)


def _decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise DecodeError(f"damaged JPEG header: {error}") from error
    _check_pixels(int(height), int(width))
    if color_space in ("CMYK", "YCCK"):
        return _decode_pillow(data)
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        # It also refuses what libjpeg only warns about (stray bytes between markers); Pillow, as everybody else's
        # loader, takes those and refuses the truncated.
        return _decode_pillow(data)


def _decode_pillow(data: bytes) -> NDArray[np.uint8]:
    try:
        with _open_pillow(data) as image:
            if image.mode.startswith("I"):
                # Pillow's own convert() clips 16-bit values at 255 instead of scaling them.
                grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.asarray(image.convert("RGB"))
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(f"damaged {image_suffix(data)}: {error}") from error


PPM_HEADER = b"P6\n%d %d\n255\n"


def encode_ppm(pixels_HWC: NDArray[np.uint8]) -> bytes:
    """Uncompressed PPM: the same bytes on every machine, and every image viewer and `webdataset` reads it."""
    height, width, _ = pixels_HWC.shape
    return PPM_HEADER % (width, height) + np.ascontiguousarray(pixels_HWC).tobytes()


def ppm_header_size(height: int, width: int) -> int:
    """Bytes before the pixels in a file by `encode_ppm`."""
    return len(PPM_HEADER % (width, height))


def _decode_ppm(data: bytes) -> NDArray[np.uint8]:
    try:
        size, rest = data[3:].split(b"\n255\n", 1)
        width, height = (int(part) for part in size.split(b" "))
        return np.frombuffer(rest, np.uint8).reshape(height, width, 3)
    except ValueError:
        return _decode_pillow(data)  # a PPM by another program: comments, other whitespace


def resize_short(pixels_HWC: NDArray[np.uint8], short: int) -> NDArray[np.uint8]:
    """Resize so that the short side has `short` px (Pillow, antialiased bicubic)."""
    height, width, _ = pixels_HWC.shape
    scale = short / min(height, width)
    size = (max(short, round(width * scale)), max(short, round(height * scale)))
    if size == (width, height):
        return pixels_HWC
    return np.asarray(Image.fromarray(pixels_HWC).resize(size, Image.Resampling.BICUBIC))


def center_square(pixels_HWC: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The central side × side square."""
    height, width, _ = pixels_HWC.shape
    top, left = (height - side) // 2, (width - side) // 2
    return pixels_HWC[top : top + side, left : left + side]
