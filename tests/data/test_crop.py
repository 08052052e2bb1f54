"""Geometry: the fast CPU paths against their twins, and resizing against Pillow."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dbscale.data.augment import (
    RESIZED_CROP_DRAWS,
    center_boxes,
    resize_boxes,
    resize_each,
    resized_crop_boxes,
    shift_flip,
    shift_flip_gather,
)


@given(
    b=st.integers(1, 6), height=st.integers(1, 9), width=st.integers(1, 9), padding=st.integers(0, 4), data=st.data()
)
def test_shift_and_flip_match_their_twin(b: int, height: int, width: int, padding: int, data: st.DataObject) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    images = torch.from_numpy(generator.integers(0, 256, (b, 3, height, width), dtype=np.uint8))
    top, left = generator.integers(0, 2 * padding + 1, (2, b))
    flip = generator.random(b) < 0.5
    before = images.clone()
    shifted = shift_flip(images, top, left, flip, padding)
    assert torch.equal(shifted, shift_flip_gather(images, top, left, flip, padding))
    assert torch.equal(images, before)
    for slot in range(b):
        image = images[slot].flip(2) if flip[slot] else images[slot]
        padded = torch.nn.functional.pad(image, (padding,) * 4)
        window = padded[:, top[slot] : top[slot] + height, left[slot] : left[slot] + width]
        assert torch.equal(shifted[slot], window)


def resized_by_pillow(image: Image.Image, box: list[int], size: int) -> np.ndarray:
    top, left, height, width = box
    cut = image.crop((left, top, left + width, top + height))
    return np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [8, 32, 57])
def test_resized_boxes_are_within_a_level_of_pillow(
    make_photograph: Callable[[int, int, int], Image.Image], size: int
) -> None:
    images = [make_photograph(number, 41, 36) for number in range(12)]
    pixels = [np.asarray(image) for image in images]
    uniform = np.random.default_rng(0).random((12, RESIZED_CROP_DRAWS))
    boxes = resized_crop_boxes(np.full(12, 36), np.full(12, 41), uniform, (0.08, 1.0))
    boxes[0] = (0, 0, 36, 41)
    boxes[1] = (5, 7, 1, 1)
    flip = np.arange(12) % 3 == 0
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    batched, each = resize_boxes(batch, boxes, flip, size), resize_each(pixels, boxes, flip, size)
    for slot, image in enumerate(images):
        expected = resized_by_pillow(image, boxes[slot].tolist(), size).astype(int)
        expected = expected[:, ::-1] if flip[slot] else expected
        for result in (batched, each):
            assert np.abs(result[slot].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("box", [(0, 0, 90, 40), (3, 5, 87, 31), (1, 2, 60, 60), (0, 0, 40, 64), (4, 0, 33, 20)])
def test_hard_edges_are_clipped_in_the_order_that_pillow_takes(box: tuple[int, int, int, int]) -> None:
    """Black and white noise overshoots everywhere, so that clipping between the passes shows which came first."""
    pixels = np.random.default_rng(0).integers(0, 2, (90, 64, 3)).astype(np.uint8) * 255
    expected = resized_by_pillow(Image.fromarray(pixels), list(box), 32).astype(int)
    boxes, flip = np.array([box]), np.zeros(1, bool)
    batch = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    batched, each = resize_boxes(batch, boxes, flip, 32), resize_each([pixels], boxes, flip, 32)
    assert np.abs(batched[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    difference = np.abs(each[0].permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= 2 and (difference == 2).mean() < 0.01


@given(
    sizes=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=8),
    low=st.floats(0.01, 1.0),
    seed=st.integers(0, 1000),
)
def test_crops_lie_inside_and_keep_their_promises(sizes: list[tuple[int, int]], low: float, seed: int) -> None:
    heights, widths = np.array(sizes).T
    uniform = np.random.default_rng(seed).random((len(sizes), RESIZED_CROP_DRAWS))
    boxes = resized_crop_boxes(heights, widths, uniform, (low, 1.0))
    top, left, height, width = boxes.T
    assert (boxes[:, 2:] >= 1).all() and (boxes[:, :2] >= 0).all()
    assert (top + height <= heights).all() and (left + width <= widths).all()


def test_crops_are_distributed_as_torchvisions() -> None:
    """Means and spreads of area, aspect and place, against torchvision's own draws."""
    from torchvision.transforms import RandomResizedCrop

    n, height, width = 400, 300, 400
    uniform = np.random.default_rng(1).random((n, RESIZED_CROP_DRAWS))
    ours = resized_crop_boxes(np.full(n, height), np.full(n, width), uniform, (0.08, 1.0))
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    for measure in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        a, b = measure(ours.astype(float)), measure(theirs.astype(float))
        standard_error = np.sqrt((a.var() + b.var()) / n)
        assert abs(a.mean() - b.mean()) < 4 * standard_error
        assert abs(a.std() - b.std()) < 0.15 * b.std()


def test_centre_boxes() -> None:
    boxes = center_boxes(np.array([256, 100, 1]), np.array([256, 300, 1]), 0.875)
    assert boxes.tolist() == [[16, 16, 224, 224], [6, 106, 88, 88], [0, 0, 1, 1]]
