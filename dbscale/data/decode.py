"""Turn the bytes of one image file into uint8 RGB [H, W, 3].

JPEG goes through simplejpeg (libjpeg-turbo: 923 against 585 crops/s of a 500 × 375 px photograph), everything else, and
what simplejpeg refuses (CMYK), through Pillow. The format is told from the bytes, never from the file's name: ImageNet
holds PNG files named .JPEG. Damage is reported as `DecodeError`; what to do about it is the loader's decision.
"""

import io
import re
import struct
import warnings
from functools import cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

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
"""The formats that nearly all images have, told without opening them; Pillow tells the others."""
_PNG_HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PILLOW_SUFFIXES = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
_PILLOW_FORMATS = (
    *("JPEG", "PNG", "PPM", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "ICO", "CUR", "ICNS", "QOI"),
    *("PCX", "DCX", "SGI", "SUN", "MSP", "XBM", "XPM", "PSD", "DDS", "IM", "SPIDER", "TGA"),
)
"""What is opened at all: never EPS, which runs Ghostscript, nor what other programs would have to decode. TGA comes
last, because it has no mark of its own."""
_WHITE = 255


class DecodeError(DataError):
    """These bytes are no image that can be decoded."""


def image_suffix(data: bytes) -> str:
    """File suffix (jpg, png, ppm, webp …) by the bytes. Raises DecodeError where no format is known."""
    for magic, suffix in _SUFFIXES:
        if data.startswith(magic):
            return suffix
    with _open_pillow(data) as image:
        name = image.format or ""
        return _PILLOW_SUFFIXES.get(name, name.lower())


def image_shape(data: bytes) -> tuple[int, int]:
    """(height, width) from the header alone. Raises DecodeError."""
    if data.startswith(b"\xff\xd8\xff"):
        height, width, _ = _jpeg_header(data)
    elif data.startswith(_PNG_HEADER) and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
    else:
        with _open_pillow(data) as image:
            height, width = image.height, image.width
    _check_pixels(height, width)
    return height, width


def orientation(data: bytes) -> int:
    """EXIF's number for how an image is shown: 1 as it is stored, 5 to 8 lying. Pixels are decoded as they are stored."""
    with _open_pillow(data) as image:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"{width}×{height} px is more than {MAX_PIXELS:,} pixels: refused as a decompression bomb")
    if not height * width:
        raise DecodeError(f"{width}×{height} px: an image without pixels")


@cache
def _formats() -> tuple[str, ...]:
    """Those that this build of Pillow can open."""
    Image.init()
    return tuple(name for name in _PILLOW_FORMATS if name in Image.OPEN)


def _open_pillow(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about bombs: our own limit is lower, and an error
            image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError as error:
        raise DecodeError(f"refused as a decompression bomb: {error}") from error
    except Exception as error:  # Pillow's plugins raise many kinds on damaged input
        known = next((suffix for magic, suffix in _SUFFIXES if data.startswith(magic)), None)
        if known is None:
            raise DecodeError(f"not an image: {len(data)} bytes that begin with {data[:8]!r}") from error
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise DecodeError(f"damaged {known} header{detail}") from error
    _check_pixels(image.height, image.width)
    return image


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """uint8 RGB [H, W, 3]. Grey is repeated, alpha dropped, CMYK converted, 16 bits scaled to 8. Raises DecodeError."""
    if data.startswith(b"P6"):
        return _decode_ppm(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _decode_jpeg(data)
    return _decode_pillow(data)


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
    """(height, width, colour space)."""
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise DecodeError(f"damaged JPEG header: {error}") from error
    return int(height), int(width), str(color_space)


def _decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    height, width, color_space = _jpeg_header(data)
    _check_pixels(height, width)
    if color_space in ("CMYK", "YCCK"):
        return _decode_pillow(data)
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        # It also refuses what libjpeg only warns about (stray bytes between markers); Pillow, as everybody else's
        # loader, takes those and refuses the truncated.
        return _decode_pillow(data)


def _decode_pillow(data: bytes) -> NDArray[np.uint8]:
    with _open_pillow(data) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata; damage is an error
        try:
            if image.mode.startswith("I") or image.mode == "F":
                return np.repeat(_grey_levels(image)[..., None], 3, axis=2)
            return np.asarray(image.convert("RGB"))
        except DecodeError:
            raise
        except Exception as error:
            raise DecodeError(f"damaged {image_suffix(data)}: {error}") from error


def _grey_levels(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [H, W] of greys with more than 8 bits; Pillow's own convert() would clip 16 bits at 255."""
    values = np.asarray(image)
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):  # which hold at most 16 bits
        return (values.astype(np.uint32) >> 8).clip(0, _WHITE).astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    # What white is, 32-bit files do not say. Pillow reads them as 0…255; others mean 0…1, 0…65,535 or more.
    if image.mode == "F" and low >= 0 and 0 < high <= 1:
        raise DecodeError(
            f"grey values of 32 bits from {low:g} to {high:g}, where white may be 1 or 255; save it with 8 or 16 bits"
        )
    if not (low >= 0 and high <= _WHITE):
        raise DecodeError(
            f"grey values of 32 bits from {low:g} to {high:g}, of which only 0…255 has an agreed meaning; "
            "save it with 8 or 16 bits"
        )
    return np.rint(values).astype(np.uint8)


PPM_HEADER = b"P6\n%d %d\n255\n"


def encode_ppm(pixels_HWC: NDArray[np.uint8]) -> bytes:
    """Uncompressed PPM: the same bytes on every machine, and every image viewer and `webdataset` reads it."""
    height, width, _ = pixels_HWC.shape
    return PPM_HEADER % (width, height) + np.ascontiguousarray(pixels_HWC).tobytes()


def ppm_header_size(height: int, width: int) -> int:
    """Bytes before the pixels in a file by `encode_ppm`."""
    return len(PPM_HEADER % (width, height))


def _decode_ppm(data: bytes) -> NDArray[np.uint8]:
    header = re.match(rb"P6\n([1-9]\d{0,8}) ([1-9]\d{0,8})\n255\n", data)
    size = int(header[1]) * int(header[2]) * 3 if header else -1
    if header is None or size > 3 * MAX_PIXELS or len(data) != header.end() + size:
        return _decode_pillow(data)  # a PPM by another program, with comments or other whitespace; or a damaged one
    return np.frombuffer(data, np.uint8, offset=header.end()).reshape(int(header[2]), int(header[1]), 3)


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
