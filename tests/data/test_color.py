"""Batched colour and warp operations against Pillow's, image by image."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from dbscale.data import augment as color
from dbscale.data.augment import warp_affine, warp_matrix

Photograph = Callable[[int, int, int], Image.Image]
FACTORS = [0.1, 0.55, 1.0, 1.45, 1.9]


@pytest.fixture(scope="module")
def images(make_photograph: Photograph) -> list[Image.Image]:
    """Photographs, one of low contrast, one flat, one of two values."""
    flat = Image.new("RGB", (33, 29), (90, 90, 200))
    photographs = [make_photograph(number, 33, 29) for number in range(2)]
    dull = photographs[0].point([80 + value // 8 for value in range(256)] * 3)
    return [*photographs, dull, flat, photographs[1].convert("1").convert("RGB")]


def stack(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def assert_near(ours: torch.Tensor, theirs: list[Image.Image], levels: int = 1) -> None:
    difference = (ours.int() - stack(theirs).int()).abs()
    assert ours.dtype == torch.uint8
    assert difference.max() <= levels


@pytest.mark.parametrize("name", ["auto_contrast", "equalize", "invert"])
def test_operations_without_strength(images: list[Image.Image], name: str) -> None:
    pillow = {"auto_contrast": ImageOps.autocontrast, "equalize": ImageOps.equalize, "invert": ImageOps.invert}[name]
    assert_near(
        color.COLOR_OPERATIONS[name][0](stack(images)),
        [pillow(image) for image in images],
        0 if name != "auto_contrast" else 1,
    )


@pytest.mark.parametrize(
    ("name", "pillow"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
        ("sharpness", ImageEnhance.Sharpness),
    ],
)
def test_enhancements(images: list[Image.Image], name: str, pillow: Callable) -> None:
    ours = color.COLOR_OPERATIONS[name][0](stack(images), torch.tensor(FACTORS))
    assert_near(ours, [pillow(image).enhance(factor) for image, factor in zip(images, FACTORS, strict=True)])


def test_posterize_and_solarize(images: list[Image.Image]) -> None:
    bits = [0, 1, 4, 7, 8]
    expected = [ImageOps.posterize(i, b) if b else Image.new("RGB", i.size) for i, b in zip(images, bits, strict=True)]
    assert_near(color.posterize(stack(images), torch.tensor(bits)), expected, 0)
    thresholds = [0, 1, 128, 255, 256]
    expected = [ImageOps.solarize(image, t) for image, t in zip(images, thresholds, strict=True)]
    assert_near(color.solarize(stack(images), torch.tensor(thresholds)), expected, 0)


def test_solarize_add(images: list[Image.Image]) -> None:
    added = [0, 1, 55, 110, 128]
    tables = [[min(255, v + a) if v < 128 else v for v in range(256)] for a in added]
    expected = [image.point(table * 3) for image, table in zip(images, tables, strict=True)]
    assert_near(color.solarize_add(stack(images), torch.tensor(added)), expected, 0)


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
@pytest.mark.parametrize("level", [-0.9, 0.0, 0.35, 1.0])
def test_warps(images: list[Image.Image], name: str, level: float) -> None:
    matrix = warp_matrix(name, level, (29, 33))
    fill = (124, 116, 104)
    if name == "rotate":
        bilinear = Image.Resampling.BILINEAR
        expected = [image.rotate(30 * level, resample=bilinear, fillcolor=fill) for image in images]
    else:
        expected = [
            image.transform(
                image.size,
                Image.Transform.AFFINE,
                tuple(matrix.ravel()),
                resample=Image.Resampling.BILINEAR,
                fillcolor=fill,
            )
            for image in images
        ]
    ours = warp_affine(stack(images), torch.from_numpy(np.stack([matrix] * len(images))), fill)
    difference = (ours.int() - stack(expected).int()).abs().amax(dim=(1,))
    # Pixels that fall on the image's very border may be judged inside by one and outside by the other.
    assert (difference > 1).float().mean() < 0.01
