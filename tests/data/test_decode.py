"""Every kind of image file becomes RGB, or a DecodeError that says why not."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from dbscale.data import decode
from dbscale.data.decode import DecodeError, center_square, decode_image, encode_ppm, image_shape, image_suffix

Photograph = Callable[[int, int, int], Image.Image]


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "PPM", "BMP", "TIFF"])
@pytest.mark.parametrize("size", [(1, 1), (31, 17)])
def test_lossless_files_are_exact(make_photograph: Photograph, kind: str, size: tuple[int, int]) -> None:
    image = make_photograph(1, *size)
    data = saved(image, kind)
    assert np.array_equal(decode_image(data), np.asarray(image))
    assert image_shape(data) == (size[1], size[0])


def test_our_ppm_is_what_pillow_reads() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    data = encode_ppm(pixels)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert np.array_equal(decode_image(data), pixels)


def test_a_commented_ppm_of_another_program(make_photograph: Photograph) -> None:
    image = make_photograph(1, 4, 3)
    data = b"P6 # by hand\n4 3\n255\n" + image.tobytes()
    assert np.array_equal(decode_image(data), np.asarray(image))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_match_pillow(make_photograph: Photograph, mode: str) -> None:
    data = saved(make_photograph(2, 64, 48).convert(mode), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_other_modes_become_rgb(make_photograph: Photograph, mode: str) -> None:
    image = make_photograph(3, 20, 10).convert(mode)
    assert np.array_equal(decode_image(saved(image, "PNG")), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 255, 256, 0x7FFF, 0xFFFF]], np.uint16)
    data = saved(Image.fromarray(values), "PNG")
    assert decode_image(data)[0, :, 0].tolist() == [0, 0, 1, 0x7F, 0xFF]


LOSSLESS = [
    ("PGM", "PPM", "L"),
    ("TGA", "TGA", "RGB"),
    ("ICO", "ICO", "RGB"),
    ("QOI", "QOI", "RGB"),
    ("PCX", "PCX", "RGB"),
]


@pytest.mark.parametrize(("name", "kind", "mode"), LOSSLESS)
def test_other_formats_that_pillow_reads(make_photograph: Photograph, name: str, kind: str, mode: str) -> None:
    image = make_photograph(8, 32, 32).convert(mode)
    options = {"sizes": [(32, 32)]} if kind == "ICO" else {}
    data = saved(image, kind, **options)
    assert image_suffix(data) == ("ppm" if name == "PGM" else name.lower())
    assert image_shape(data) == (32, 32)
    assert np.array_equal(decode_image(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("kind", "suffix"), [("AVIF", "avif"), ("JPEG2000", "jp2"), ("WEBP", "webp")])
def test_lossy_formats(make_photograph: Photograph, kind: str, suffix: str) -> None:
    image = make_photograph(9, 40, 24)
    data = saved(image, kind)
    assert (image_suffix(data), image_shape(data)) == (suffix, (24, 40))
    assert np.abs(decode_image(data).astype(int) - np.asarray(image)).mean() < 12


@pytest.mark.parametrize("big", [False, True])
def test_tiffs_large_and_small(make_photograph: Photograph, big: bool) -> None:
    image = make_photograph(10, 17, 9)
    data = saved(image, "TIFF", big_tiff=big)
    assert data[:4] == (b"II+\0" if big else b"II*\0")
    assert (image_suffix(data), image_shape(data)) == ("tif", (9, 17))
    assert np.array_equal(decode_image(data), np.asarray(image))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_greys_of_32_bits(mode: str) -> None:
    """0…255 is what it says; what white is elsewhere nobody knows."""
    kind = np.int32 if mode == "I" else np.float32
    values = np.array([[0, 7, 128, 255]], kind)
    assert decode_image(saved(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 7, 128, 255]
    for wrong in ([[0, 256]], [[-1, 5]], [[0, 60000]]):
        with pytest.raises(DecodeError, match=r"grey values of 32 bits from .*; save it with 8 or 16 bits"):
            decode_image(saved(Image.fromarray(np.array(wrong, kind)), "TIFF"))


def test_floats_from_0_to_1_are_refused_and_black_is_black() -> None:
    with pytest.raises(DecodeError, match=r"grey values of 32 bits from 0 to 0.5, where white may be 1 or 255"):
        decode_image(saved(Image.fromarray(np.array([[0, 0.5]], np.float32)), "TIFF"))
    assert decode_image(saved(Image.fromarray(np.zeros((2, 3), np.float32)), "TIFF")).max() == 0


@pytest.mark.parametrize("kind", ["PPM", "TIFF"])
def test_sixteen_bits_of_other_formats(kind: str) -> None:
    data = saved(Image.fromarray(np.array([[0, 255, 256, 0xFFFF]], np.uint16)), kind)
    assert decode_image(data)[0, :, 0].tolist() == [0, 0, 1, 0xFF]


def test_postscript_is_never_opened() -> None:
    with pytest.raises(DecodeError, match="not an image"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize("size", [b"-1 5", b"0 5", b"5 0", b"99999999 99999999"])
def test_impossible_sizes_are_refused(size: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_image(b"P6\n" + size + b"\n255\n" + bytes(15))
    with pytest.raises(DecodeError, match=r"without pixels|decompression bomb"):
        image_shape(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(4) + b"\xff" * 4 + bytes(9))


def test_the_format_is_told_from_the_bytes(make_photograph: Photograph) -> None:
    image = make_photograph(4, 8, 8)
    assert [image_suffix(saved(image, kind)) for kind in ("JPEG", "PNG", "WEBP", "GIF")] == [
        "jpg",
        "png",
        "webp",
        "gif",
    ]


@pytest.mark.parametrize("data", [b"", b"hello, I am no image", b"\x80\x04\x95pickle"])
def test_what_is_no_image_says_so(data: bytes) -> None:
    with pytest.raises(DecodeError, match="not an image"):
        decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("keep", [12, 200])
def test_cut_files_are_damaged(make_photograph: Photograph, kind: str, keep: int) -> None:
    with pytest.raises(DecodeError, match="damaged"):
        decode_image(saved(make_photograph(5, 64, 64), kind)[:keep])


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_jpeg_cut_anywhere_is_damaged(make_photograph: Photograph, share: float) -> None:
    data = saved(make_photograph(5, 320, 240), "JPEG")
    with pytest.raises(DecodeError, match="damaged jpg"):
        decode_image(data[: int(share * len(data))])


def test_what_libjpeg_only_warns_about_is_taken_as_pillow_takes_it(make_photograph: Photograph) -> None:
    data = saved(make_photograph(7, 64, 48), "JPEG")
    stray = data[:-2] + bytes(40) + data[-2:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(stray)
    expected = np.asarray(Image.open(io.BytesIO(stray)).convert("RGB"))
    assert np.array_equal(decode_image(stray), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decompression_bombs_are_refused_unread(
    make_photograph: Photograph, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    # Pillow's own limit only warns, and warnings are errors here.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    with pytest.raises(DecodeError, match="64×32 px is more than 1,000 pixels: refused as a decompression bomb"):
        decode_image(saved(make_photograph(6, 64, 32), kind))


@pytest.mark.parametrize("size", [(9, 4), (4, 9), (5, 5)])
def test_the_central_square_lies_in_the_middle(size: tuple[int, int]) -> None:
    rows, columns = np.indices(size)
    square = center_square(np.stack([rows, columns, rows], axis=2).astype(np.uint8), 3)
    top, left = ((side - 3) // 2 for side in size)
    assert square[:, 0, 0].tolist() == [top, top + 1, top + 2]
    assert square[0, :, 1].tolist() == [left, left + 1, left + 2] and square.shape == (3, 3, 3)


def test_what_pillow_says_of_a_damaged_header_is_passed_on() -> None:
    start = b"\x89PNG\r\n\x1a\n"
    with pytest.raises(DecodeError, match=r"^damaged png header: Truncated File Read$"):
        decode_image(start + b"junk" * 9)
    with pytest.raises(DecodeError, match=r"^damaged png header$"):  # it says only that it knows no such image
        decode_image(start + b"\0\0\0\rIHDR" + bytes(17))
