"""Augmentation: keyed draws, geometry and colour against Pillow's and torchvision's, distributions against timm's."""

import random
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import ks_2samp
from timm.data.auto_augment import LEVEL_TO_ARG
from timm.data.random_erasing import RandomErasing

from dbscale.data import DataError, augment, make_transform
from dbscale.data.augment import (
    COLOR_OPERATIONS,
    OPERATIONS,
    Policy,
    brightness,
    color_jitter,
    contrast,
    draw_operations,
    erase_random,
    parse_policy,
    rand_augment,
    saturation,
    warp_affine,
    warp_matrix,
)
from dbscale.data.geometry import (
    RESIZED_CROP_DRAWS,
    center_boxes,
    resize_boxes,
    resize_each,
    resized_crop_boxes,
    shift_flip,
    shift_flip_gather,
)
from dbscale.keyed import keyed_bits, keyed_uniform

IDS = np.arange(64)
EPOCHS = np.zeros(64, np.int64)


def batch(seed: int = 0, size: int = 16, count: int = 64) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def test_keyed_draws_never_drift() -> None:
    """Old runs stay comparable: these numbers are part of the recipe."""
    assert keyed_bits(7, "place", 3, [11, 12], num_draws=2).tolist() == [
        [2980235430960381024, 9423503503639630040],
        [11867970194891825577, 2851268213815723437],
    ]


def test_keyed_draws_are_uniform_and_unrelated() -> None:
    draws = keyed_uniform(1, "test", 0, np.arange(20000), num_draws=3)
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 4 / np.sqrt(12 * 20000)
    assert np.abs(draws.var(axis=0) - 1 / 12).max() < 0.005
    others = [
        keyed_uniform(2, "test", 0, np.arange(20000), num_draws=1)[:, 0],
        keyed_uniform(1, "other", 0, np.arange(20000), num_draws=1)[:, 0],
        keyed_uniform(1, "test", 1, np.arange(20000), num_draws=1)[:, 0],
        np.roll(draws[:, 0], 1),
        draws[:, 1],
    ]
    for other in others:
        assert abs(np.corrcoef(draws[:, 0], other)[0, 1]) < 4 / np.sqrt(20000)


@pytest.mark.parametrize(
    "augment",
    [
        {"crop_padding": 2, "hflip": 0.5},
        {"random_resized_crop": (0.3, 1.0)},
        {"color_jitter": 0.4},
        {"rand_augment": "rand-m9-mstd0.5-inc1"},
        {"random_erasing": 0.5},
    ],
)
def test_a_sample_looks_the_same_in_any_batch(augment: dict[str, object]) -> None:
    transform = make_transform(image_size=16, train=True, augment=augment, seed=4)
    images, epochs, ids = batch(), torch.from_numpy(EPOCHS + 2), torch.from_numpy(IDS)
    whole = transform(images, epoch=epochs, sample_ids=ids)
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:20]
    part = transform(images[shuffle], epoch=epochs[shuffle], sample_ids=ids[shuffle])
    torch.testing.assert_close(part, whole[shuffle], rtol=0, atol=1e-6)
    again = transform(images, epoch=epochs + 1, sample_ids=ids)
    assert not torch.equal(again, whole)
    assert whole.shape == (64, 3, 16, 16) and whole.dtype == torch.float32


def test_normalisation_and_the_plain_transform() -> None:
    transform = make_transform(image_size=16, train=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images = batch()
    result = transform(images, epoch=torch.from_numpy(EPOCHS), sample_ids=torch.from_numpy(IDS))
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    torch.testing.assert_close(result, (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_stored_pixels_are_never_written_to() -> None:
    augment = {"crop_padding": 2, "hflip": 1.0, "rand_augment": "rand-m9-inc1", "random_erasing": 1.0}
    images = batch()
    before = images.clone()
    for train in (True, False):
        transform = make_transform(image_size=16, train=train, augment=augment)
        transform(images, epoch=torch.from_numpy(EPOCHS), sample_ids=torch.from_numpy(IDS))
    assert torch.equal(images, before)


def test_unknown_and_contradictory_fields_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"unknown field 'flip'; did you mean 'hflip'\? known: color_jitter, crop_padding, cutmix"
    ):
        make_transform(image_size=8, train=True, augment={"flip": 1})
    with pytest.raises(DataError, match="exclude each other"):
        make_transform(image_size=8, train=True, augment={"crop_padding": 2, "random_resized_crop": (0.1, 1)})
    for text in ("m9", "rand-m9", "rand-m9-w0-inc1", "rand-m11-inc1", "rand-mx-inc1"):
        with pytest.raises(DataError, match="rand_augment"):
            make_transform(image_size=8, train=True, augment={"rand_augment": text})


def test_every_recipe_field_is_understood() -> None:
    """The training wing passes the recipe's augment block as it is."""
    from dbscale.study.recipe import Augment

    make_transform(image_size=8, train=True, augment=Augment().model_dump())


def test_policies_parse_as_timms() -> None:
    assert parse_policy("rand-m9-mstd0.5-inc1") == Policy(9, 2, 0.5, 0.5)
    assert parse_policy("rand-m7-n3-p0.8-inc1") == Policy(7, 3, 0.8, 0.0)


def test_operations_are_drawn_as_timm_draws_them() -> None:
    """Half are left out, the rest even over 15; levels N(9, 0.5) clipped at 10; signs even."""
    draws = keyed_uniform(0, "test", np.arange(30000), num_draws=5)
    chosen, levels, signs = draw_operations(Policy(9, 2, 0.5, 0.5), draws)
    assert abs((chosen < 0).mean() - 0.5) < 0.012
    shares = np.bincount(chosen[chosen >= 0], minlength=15) / (chosen >= 0).sum()
    assert len(shares) == len(OPERATIONS) == 15
    assert np.abs(shares - 1 / 15).max() < 0.009
    reference = np.clip(np.random.default_rng(0).normal(9, 0.5, 30000), 0, 10)
    assert abs(levels.mean() - reference.mean()) < 0.015
    assert abs(levels.std() - reference.std()) < 0.015
    assert levels.max() <= 10
    assert abs(signs.mean()) < 0.025


def test_rand_augment_changes_about_what_timm_changes(make_photograph: Callable) -> None:
    """The mean change of a pixel, over many draws, against timm's own per-image implementation."""
    import random

    from timm.data.auto_augment import rand_augment_transform

    image = make_photograph(3, 24, 24)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    n = 400
    ids = np.arange(n)
    fill = (124, 116, 104)
    ours = rand_augment(pixels.expand(n, 3, 24, 24), parse_policy("rand-m7-mstd0.5-inc1"), fill, 0, ids * 0, ids)
    random.seed(0)
    np.random.seed(0)
    # Magnitude 10 would ask for posterising to 0 bits, which Pillow 13 refuses timm.
    timm = rand_augment_transform("rand-m7-mstd0.5-inc1", {"img_mean": fill})
    theirs = np.stack([np.asarray(timm(image)) for _ in range(n)])
    original = np.asarray(image).astype(float)
    changes = [
        np.abs(result - original).mean(axis=(1, 2, 3))
        for result in (ours.permute(0, 2, 3, 1).numpy().astype(float), theirs.astype(float))
    ]
    error = np.sqrt(sum(change.var() for change in changes) / n)
    assert abs(changes[0].mean() - changes[1].mean()) < 4 * error
    assert abs((changes[0] == 0).mean() - (changes[1] == 0).mean()) < 0.09
    for share in (0.25, 0.5, 0.75, 0.9):
        assert abs(np.quantile(changes[0], share) - np.quantile(changes[1], share)) < 9


def test_color_jitter_changes_brightness_contrast_and_saturation_of_every_image_each_once(
    make_photograph: Callable,
) -> None:
    pixels = torch.from_numpy(np.asarray(make_photograph(5, 16, 16)).copy()).permute(2, 0, 1)[None]
    ids = np.arange(40)
    jittered = color_jitter(pixels.expand(40, 3, 16, 16), 0.4, 7, ids * 0, ids)
    factors = torch.from_numpy(keyed_uniform(7, "color jitter", ids * 0, ids, num_draws=4)[:, :3] * 0.8 + 0.6).float()
    operations, seen = (brightness, contrast, saturation), set()
    for image, factor in zip(jittered, factors, strict=True):
        for order in permutations(range(3)):
            expected = pixels
            for number in order:
                expected = operations[number](expected, factor[number : number + 1])
            if torch.equal(image, expected[0]):
                seen.add(order)
                break
        else:
            pytest.fail("no order of the three gives this image")
    assert len(seen) >= 5


def test_color_jitter_is_distributed_as_torchvisions(make_photograph: Callable) -> None:
    from torchvision.transforms import ColorJitter

    image = make_photograph(5, 16, 16)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    n = 400
    ids = np.arange(n)
    ours = color_jitter(pixels.expand(n, 3, 16, 16), 0.4, 0, ids * 0, ids).float()
    torch.manual_seed(0)
    jitter = ColorJitter(0.4, 0.4, 0.4)
    theirs = torch.stack([jitter(pixels) for _ in range(n)]).float()
    for measure in (lambda x: x.mean(dim=(1, 2, 3)), lambda x: x.std(dim=(1, 2, 3))):
        a, b = measure(ours), measure(theirs)
        assert (a.mean() - b.mean()).abs() < 4 * ((a.var() + b.var()) / n).sqrt()
        assert (a.std() - b.std()).abs() < 0.15 * b.std()


def test_erasing_follows_the_published_ranges() -> None:
    n = 2000
    images = torch.full((n, 3, 32, 32), 100.0)
    erased = erase_random(images, 0.25, 0, np.zeros(n, np.int64), np.arange(n)) != 100.0
    areas = erased[:, 0].float().mean(dim=(1, 2))
    touched = areas > 0
    assert abs(touched.float().mean() - 0.25) < 0.04
    assert areas[touched].min() > 0.01 and areas[touched].max() < 0.36
    assert abs(areas[touched].mean() - (0.02 + 1 / 3) / 2) < 0.02
    noise = images[erased]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


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
        COLOR_OPERATIONS[name][0](stack(images)),
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
    ours = COLOR_OPERATIONS[name][0](stack(images), torch.tensor(FACTORS))
    assert_near(ours, [pillow(image).enhance(factor) for image, factor in zip(images, FACTORS, strict=True)])


def test_mirrors_and_shifts_are_drawn_apart() -> None:
    transform = make_transform(image_size=8, train=True, augment={"crop_padding": 4, "hflip": 0.3}, seed=5)
    ids = np.arange(3000)
    placed = transform.placement(torch.zeros(1, 3, 8, 8, dtype=torch.uint8).expand(3000, 3, 8, 8), ids * 0, ids)
    assert abs(placed.flip.mean() - 0.3) < 0.03
    assert set(placed.top.tolist()) == set(placed.left.tolist()) == set(range(9))
    correlations = np.corrcoef([placed.flip, placed.top, placed.left])[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 0.06


@pytest.mark.parametrize("value", [0, 255])
def test_black_stays_black_and_white_white(value: int) -> None:
    boxes = np.array([[0, 0, 20, 20], [3, 1, 9, 17]])
    flat = torch.full((2, 3, 20, 20), value, dtype=torch.uint8)
    assert set(resize_boxes(flat, boxes, np.array([False, True]), 16).unique().tolist()) == {value}


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("posterize", "PosterizeIncreasing"), ("solarize", "SolarizeIncreasing"), ("solarize_add", "SolarizeAdd"),
     ("saturation", "ColorIncreasing"), ("contrast", "ContrastIncreasing"), ("brightness", "BrightnessIncreasing"),
     ("sharpness", "SharpnessIncreasing")],
)  # fmt: skip
def test_strengths_grow_with_the_level_as_timms(name: str, theirs: str) -> None:
    _, strength = augment.COLOR_OPERATIONS[name]
    assert strength is not None
    for level in (0.0, 1.3, 5.0, 9.0, 10.0):
        random.seed(3)
        (expected,) = LEVEL_TO_ARG[theirs](level, {})
        sign = 1.0
        if name in ("saturation", "contrast", "brightness", "sharpness"):
            random.seed(3)
            sign = -1.0 if random.random() > 0.5 else 1.0
        assert strength(np.array([level / 10]), np.array([sign]))[0] == pytest.approx(expected, rel=1e-6)


def test_without_contrast_an_image_is_its_mean_luma_rounded_as_pillow_does(images: list[Image.Image]) -> None:
    expected = [ImageEnhance.Contrast(image).enhance(0.0) for image in images]
    assert_near(contrast(stack(images), torch.zeros(len(images))), expected, 0)


def test_posterize_and_solarize(images: list[Image.Image]) -> None:
    bits = [0, 1, 4, 7, 8]
    expected = [ImageOps.posterize(i, b) if b else Image.new("RGB", i.size) for i, b in zip(images, bits, strict=True)]
    assert_near(augment.posterize(stack(images), torch.tensor(bits)), expected, 0)
    thresholds = [0, 1, 128, 255, 256]
    expected = [ImageOps.solarize(image, t) for image, t in zip(images, thresholds, strict=True)]
    assert_near(augment.solarize(stack(images), torch.tensor(thresholds)), expected, 0)


def test_solarize_add(images: list[Image.Image]) -> None:
    added = [0, 1, 55, 110, 128]
    tables = [[min(255, v + a) if v < 128 else v for v in range(256)] for a in added]
    expected = [image.point(table * 3) for image, table in zip(images, tables, strict=True)]
    assert_near(augment.solarize_add(stack(images), torch.tensor(added)), expected, 0)


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


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_shifts_and_flips_are_drawn_evenly(share: float) -> None:
    """Each of the 5 × 5 shifts equally often (chi-square, 5 sigma), the given share mirrored."""
    n, pad = 6000, 2
    column, row = torch.arange(1, 13), 16 * torch.arange(1, 13)
    pixels = (row[:, None] + column).to(torch.uint8).expand(n, 3, 12, 12)  # every pixel names its place
    transform = make_transform(
        image_size=12, train=True, augment={"crop_padding": pad, "hflip": share}, mean=(0, 0, 0), std=(1, 1, 1)
    )
    shown = (255 * transform(pixels, epoch=torch.zeros(n, dtype=torch.int64), sample_ids=torch.arange(n))).round()
    left, center, right, below = (shown[:, 0, y, x] for y, x in ((6, 5), (6, 6), (6, 7), (7, 6)))
    assert ((right - left).abs() == 2).all() and (below - center == 16).all()
    mirrored = right < left
    assert abs(mirrored.float().mean() - share) < 4 * np.sqrt(share * (1 - share) / n)
    moved = center - torch.where(mirrored, 17 * 7 - 1, 17 * 7)  # 16 rows down and columns across
    counts = np.unique(moved.numpy(), return_counts=True)[1]
    assert len(counts) == 25
    expected = n / 25
    assert abs(((counts - expected) ** 2 / expected).sum() - 24) < 5 * np.sqrt(2 * 24)


def test_erasing_is_distributed_as_timms() -> None:
    n = 1500
    ours = erase_random(torch.full((n, 3, 32, 32), 100.0), 1.0, 0, np.zeros(n, np.int64), np.arange(n)) != 100.0
    random.seed(0)
    torch.manual_seed(0)
    reference = RandomErasing(probability=1.0, mode="pixel", device="cpu")
    theirs = torch.stack([reference(torch.full((3, 32, 32), 100.0)) for _ in range(n)]) != 100.0
    for along in (1, 2):
        extents = [
            (erased[:, 0].any(dim=along).sum(dim=1), erased[:, 0].any(dim=along).float().argmax(dim=1))
            for erased in (ours, theirs)
        ]
        for a, b in zip(*extents, strict=True):
            assert ks_2samp(a.numpy(), b.numpy()).pvalue > 0.01
