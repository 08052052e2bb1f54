"""From stored pixels to what a model eats: place, colour, normalise, erase; one batch at a time, on any device.

Where pixels go is `geometry`, so that a mask can go with them. Each draw is keyed by (seed, augmentation epoch, sample):
the same pixels on any worker, rank or resumed run. Mixing of whole samples (mixup, CutMix) is `mix`. The caller may run
a transform in the loader or on the device.

Why not torchvision: its v2 transforms draw once per batch, or run once per sample, and small models would wait: per
core 6k against 360k images/s (crop and flip, 32 px), 3k against 34k (RandAugment), 767 against 896 (random resized
crop, 224 px); nor can their draws be keyed. Tests compare every operation with Pillow's, torchvision's or timm's.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dbscale.data.geometry import (
    RESIZED_CROP_DRAWS,
    Floats,
    Ints,
    Pixels,
    Placement,
    center_boxes,
    resize,
    resized_crop_boxes,
    sent,
    shift_flip,
)
from dbscale.errors import DataError, nearest
from dbscale.keyed import keyed_uniform

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CENTER_SHARE = 0.875
"""Evaluation keeps this share of the short side, as 256 → 224 does."""
_CACHED_VALUES = 1 << 18
"""Values that are normalised at a time on the CPU: their float32 results stay in the core's cache meanwhile."""


@dataclass(frozen=True)
class Augmentation:
    """The per-sample part of `study.recipe.Augment`, field by field."""

    crop_padding: int = 0
    random_resized_crop: tuple[float, float] | None = None
    hflip: float = 0.0
    color_jitter: float = 0.0
    """Left out where `rand_augment` is set, as in timm and DeiT's recipe."""
    rand_augment: str | None = None
    random_erasing: float = 0.0


_FIELDS_OF_OTHERS = {"mixup", "cutmix", "mix_share", "mix_switch_share", "repeats"}  # they belong to `mix` and `order`


def make_transform(
    *,
    image_size: int,
    train: bool,
    augment: Mapping[str, Any] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    seed: int = 0,
    tier: str = "resident",
    whole: bool = False,
) -> "Transform":
    """A batched transform.

    Args:
        image_size: side of the result in px.
        train: draw augmentation; False takes the centre.
        augment: fields of `study.recipe.Augment`; those of mixing and repeats are accepted and left to others.
        mean, std: per channel, on the 0…1 scale.
        seed: of the augmentation stream.
        tier: of the dataset; evaluation on `resident` keeps the whole image, the others the central 87.5 %.
        whole: stretch the whole image to the square instead, where nothing is cropped at random: of an image with
            masks or boxes nothing may be left out.

    Raises DataError on an unknown augment field, or a combination that cannot be honoured.
    """
    fields = {name: value for name, value in (augment or {}).items() if name not in _FIELDS_OF_OTHERS}
    known = Augmentation.__dataclass_fields__.keys()
    for name in fields.keys() - known:
        raise DataError(f"augment: unknown field {name!r}; {nearest(name, known | _FIELDS_OF_OTHERS)}")
    augmentation = Augmentation(**fields) if train else Augmentation()
    if augmentation.crop_padding and augmentation.random_resized_crop is not None:
        raise DataError("augment: crop_padding and random_resized_crop exclude each other; set one of them")
    if augmentation.rand_augment is not None:
        parse_policy(augmentation.rand_augment)
    share = None if whole else 1.0 if tier == "resident" else CENTER_SHARE
    return Transform(image_size, augmentation, tuple(mean), tuple(std), seed, share)


@dataclass(frozen=True)
class Transform:
    """Pixels and keys to float32 [b, 3, S, S]; see `make_transform`."""

    image_size: int
    augmentation: Augmentation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    center_share: float | None
    """Share of the short side that the central square keeps; None: the whole image, stretched to the square."""

    def __call__(self, pixels: Pixels, *, epoch: Tensor, sample_ids: Tensor) -> Tensor:
        """float32 [b, 3, S, S], on the device of `pixels`; epoch and sample_ids are int64 [b]."""
        keys = (epoch.cpu().numpy(), sample_ids.cpu().numpy())
        return self.finish(self.place(pixels, self.placement(pixels, *keys)), *keys)

    def finish(self, images: Tensor, epoch_B: Ints, sample_B: Ints) -> Tensor:
        """Colour, normalise and erase placed pixels: float32 [b, 3, S, S]."""
        spec, keys = self.augmentation, (epoch_B, sample_B)
        if spec.rand_augment is not None:
            fill = tuple(round(255 * value) for value in self.mean)
            images = rand_augment(images, parse_policy(spec.rand_augment), fill, self.seed, *keys)
        elif spec.color_jitter:
            images = color_jitter(images, spec.color_jitter, self.seed, *keys)
        images = self.normalize(images)
        if spec.random_erasing:
            images = erase_random(images, spec.random_erasing, self.seed, *keys)
        return images

    def placement(self, pixels: Pixels, epoch_B: Ints, sample_B: Ints) -> Placement:
        """Where the pixels of each image go: drawn once, so that a mask or boxes can follow their image."""
        spec = self.augmentation
        draws = keyed_uniform(self.seed, "place", epoch_B, sample_B, num_draws=3)
        top, left = (draws[:, 1:].T * (2 * spec.crop_padding + 1)).astype(np.int64)
        keeps_whole = spec.random_resized_crop is None and self.center_share in (None, 1.0)
        is_placed = isinstance(pixels, Tensor) and pixels.shape[2:] == (self.image_size, self.image_size)
        boxes = None if keeps_whole and is_placed else self._boxes(pixels, epoch_B, sample_B)
        return Placement(boxes, draws[:, 0] < spec.hflip, top, left, spec.crop_padding, self.image_size)

    def place(self, pixels: Pixels, placement: Placement) -> Tensor:
        """The geometric part: uint8 [b, 3, S, S]."""
        boxes, flip, top, left, padding, size = placement
        if boxes is None:
            assert isinstance(pixels, Tensor)
            return shift_flip(pixels, top, left, flip, padding)
        images = resize(pixels, boxes, flip, size)
        return shift_flip(images, top, left, np.zeros_like(flip), padding) if padding else images

    def _boxes(self, pixels: Pixels, epoch_B: Ints, sample_B: Ints) -> Ints:
        if isinstance(pixels, Tensor):
            heights, widths = (np.full(len(sample_B), side) for side in pixels.shape[2:])
        else:
            heights, widths = np.array([image.shape[:2] for image in pixels]).T
        area_range = self.augmentation.random_resized_crop
        if area_range is not None:
            uniform = keyed_uniform(self.seed, "resized crop", epoch_B, sample_B, num_draws=RESIZED_CROP_DRAWS)
            return resized_crop_boxes(heights, widths, uniform, area_range)
        if self.center_share is None:
            return np.stack([np.zeros_like(heights), np.zeros_like(heights), heights, widths], axis=1)
        return center_boxes(heights, widths, self.center_share)

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """(x / 255 - mean) / std as float32."""
        scale, offset = _affine(self.mean, self.std, images_BCHW.device)
        if images_BCHW.device.type != "cpu":
            return torch.mul(images_BCHW, scale).add_(offset)
        normalized = torch.empty(images_BCHW.shape, dtype=torch.float32)
        few = max(_CACHED_VALUES // images_BCHW[0].numel(), 1)
        for part, result in zip(images_BCHW.split(few), normalized.split(few), strict=True):
            result.copy_(part).mul_(scale).add_(offset)
        return normalized


@lru_cache(maxsize=64)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> list[Tensor]:
    """Factor and offset of `Transform.normalize`, each [1, 3, 1, 1]."""
    rows = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    return [torch.tensor(row, dtype=torch.float32, device=device).view(1, -1, 1, 1) for row in rows]


# --- colour: batched twins of Pillow's ImageOps and ImageEnhance, within one level of them ---


def _column(values_B: Tensor) -> Tensor:
    return values_B.view(-1, 1, 1, 1)


def blend(degenerate: Tensor, images: Tensor, factor_B: Tensor) -> Tensor:
    """degenerate + factor · (images - degenerate), clipped; Pillow truncates, so do we."""
    mixed = torch.lerp(degenerate.float().expand(images.shape), images.float(), _column(factor_B))
    return mixed.clamp_(0, 255).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """uint8 [b, 1, H, W] luma with Pillow's integer weights (ITU-R 601-2)."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)[:, None]


def brightness(images: Tensor, factor_B: Tensor) -> Tensor:
    """0 is black, 1 the image."""
    return blend(torch.zeros_like(images[:, :1]), images, factor_B)


def contrast(images: Tensor, factor_B: Tensor) -> Tensor:
    """0 is flat at the mean luma, 1 the image."""
    return blend(_column((grey(images).float().mean(dim=(1, 2, 3)) + 0.5).floor()), images, factor_B)


def saturation(images: Tensor, factor_B: Tensor) -> Tensor:
    """0 is grey, 1 the image."""
    return blend(grey(images), images, factor_B)


def sharpness(images: Tensor, factor_B: Tensor) -> Tensor:
    """0 is smoothed by Pillow's SMOOTH kernel, 1 the image; the border pixels stay."""
    kernel = torch.ones(1, 1, 3, 3, device=images.device)
    kernel[0, 0, 1, 1] = 5
    smooth = images.clone()
    if min(images.shape[2:]) > 2:
        flat = images.flatten(0, 1)[:, None].float()
        inner = functional.conv2d(flat, kernel).div_(13).add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)
        smooth[:, :, 1:-1, 1:-1] = inner.view(*images.shape[:2], *inner.shape[2:])
    return blend(smooth, images, factor_B)


def posterize(images: Tensor, bits_B: Tensor) -> Tensor:
    """Keep the `bits` (0…8) most significant bits."""
    return images & _column(((0xFF00 >> bits_B.to(torch.int32)) & 0xFF).to(torch.uint8))


def solarize(images: Tensor, threshold_B: Tensor) -> Tensor:
    """Invert the values at or above the threshold (0…256)."""
    return torch.where(images.to(torch.int32) < _column(threshold_B), images, 255 - images)


def solarize_add(images: Tensor, added_B: Tensor) -> Tensor:
    """Add to the values below 128, up to 255."""
    lifted = (images.to(torch.int32) + _column(added_B)).clamp_(max=255).to(torch.uint8)
    return torch.where(images < 128, lifted, images)


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch each channel to 0…255."""
    low = images.amin(dim=(2, 3), keepdim=True).double()
    high = images.amax(dim=(2, 3), keepdim=True).double()
    scale = 255 / (high - low).clamp_(min=1)
    # The same two roundings as Pillow's table, so that truncation falls alike.
    stretched = (images.double() * scale - low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor) -> Tensor:
    """Flatten each channel's histogram (Pillow's integer rule)."""
    b, c, height, width = images.shape
    values = images.reshape(b * c, -1).long()
    counts = torch.zeros(b * c, 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, values, torch.ones_like(values))
    last = counts.gather(1, values.amax(dim=1, keepdim=True))
    step = (height * width - last) // 255
    below = counts.cumsum(1) - counts
    table = torch.where(step > 0, (step // 2 + below) // step.clamp(min=1), torch.arange(256, device=images.device))
    return table.clamp_(max=255).gather(1, values).to(torch.uint8).view(images.shape)


_JITTERED = (brightness, contrast, saturation)
_JITTER_ORDERS = np.array(list(permutations(range(3))))


def color_jitter(images_BCHW: Tensor, strength: float, seed: int, epoch_B: Ints, sample_B: Ints) -> Tensor:
    """Brightness, contrast and saturation by keyed factors in keyed order: uint8 [b, 3, H, W].

    Each factor is uniform in [max(0, 1 - strength), 1 + strength], as torchvision's.
    """
    draws = keyed_uniform(seed, "color jitter", epoch_B, sample_B, num_draws=4)
    low = max(0.0, 1 - strength)
    factors = low + draws[:, :3] * (1 + strength - low)
    order_B3 = _JITTER_ORDERS[(draws[:, 3] * len(_JITTER_ORDERS)).astype(np.int64)]
    images = images_BCHW.clone()
    for turn in range(3):
        for number, operation in enumerate(_JITTERED):
            slots = np.flatnonzero(order_B3[:, turn] == number)
            where = sent(slots, images.device)
            factor = sent(factors[slots, number].astype(np.float32), images.device)
            images[where] = operation(images[where], factor)
    return images


# --- RandAugment (Cubuk et al. 2020), timm's "increasing" variant: per layer and image one of 15 operations ---
# Images that drew the same one are processed together. Unlike timm's, which draws bilinear or bicubic, warps are bilinear.

_MAX_LEVEL = 10.0


def _enhanced(share_B: Floats, sign_B: Floats) -> NDArray[np.float32]:
    return np.maximum(0.1, 1 + sign_B * share_B * 0.9).astype(np.float32)


COLOR_OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[[Floats, Floats], NDArray[Any]] | None]] = {
    "auto_contrast": (auto_contrast, None),
    "equalize": (equalize, None),
    "invert": (lambda images: 255 - images, None),
    "posterize": (posterize, lambda share, _: 4 - (share * 4).astype(np.int64)),
    "solarize": (solarize, lambda share, _: 256 - np.minimum((share * 256).astype(np.int64), 256)),
    "solarize_add": (solarize_add, lambda share, _: np.minimum((share * 110).astype(np.int64), 128)),
    "saturation": (saturation, _enhanced),
    "contrast": (contrast, _enhanced),
    "brightness": (brightness, _enhanced),
    "sharpness": (sharpness, _enhanced),
}
"""Each operation with timm's scale from (level / 10, sign) to its strength; None where it takes none."""
_WARPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = (*COLOR_OPERATIONS, *_WARPS)
"""In the order of the draws: part of the recipe."""


@dataclass(frozen=True)
class Policy:
    """Parsed form of timm's notation, e.g. rand-m9-mstd0.5-inc1."""

    magnitude: float
    """0…10."""
    num_layers: int
    probability: float
    """That a drawn operation is applied."""
    magnitude_std: float


@lru_cache(maxsize=16)
def parse_policy(text: str) -> Policy:
    """Read timm's notation. Raises DataError on what this implementation does not have."""
    head, *sections = text.split("-")
    matches = [re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", section) for section in sections]
    values = {match[1]: float(match[2]) for match in matches if match}
    if head != "rand" or not all(matches) or values.get("inc") != 1:
        raise DataError(
            f"rand_augment {text!r}: expected rand-m<magnitude>[-n<layers>][-p<probability>][-mstd<std>]-inc1, and "
            "-inc1 always: only the increasing set of operations is there"
        )
    policy = Policy(values.get("m", 10.0), int(values.get("n", 2)), values.get("p", 0.5), values.get("mstd", 0.0))
    if not (0 <= policy.magnitude <= _MAX_LEVEL and 0 <= policy.probability <= 1 and policy.num_layers >= 1):
        raise DataError(f"rand_augment {text!r}: m must lie in 0…10, p in 0…1, n must be at least 1")
    return policy


def rand_augment(
    images_BCHW: Tensor, policy: Policy, fill: tuple[int, ...], seed: int, epoch_B: Ints, sample_B: Ints
) -> Tensor:
    """uint8 [b, 3, H, W], on the device of the images; `fill` colours what a warp uncovers."""
    draws = keyed_uniform(seed, "rand augment", epoch_B, sample_B, num_draws=5 * policy.num_layers)
    images = images_BCHW.clone()
    for layer in draws.reshape(len(draws), policy.num_layers, 5).transpose(1, 0, 2):
        _apply_layer(images, policy, fill, layer)
    return images


def _apply_layer(images: Tensor, policy: Policy, fill: tuple[int, ...], draws_BD: Floats) -> None:
    chosen, levels, signs = draw_operations(policy, draws_BD)
    share = levels / _MAX_LEVEL
    for number, (operation, scale) in enumerate(COLOR_OPERATIONS.values()):
        slots = np.flatnonzero(chosen == number)
        if len(slots):
            where = sent(slots, images.device)
            strength = () if scale is None else (sent(scale(share[slots], signs[slots]), images.device),)
            images[where] = operation(images[where], *strength)
    slots = np.flatnonzero(chosen >= len(COLOR_OPERATIONS))
    if len(slots):
        where = sent(slots, images.device)
        size = (images.shape[2], images.shape[3])
        signed = (levels[slots] * signs[slots] / _MAX_LEVEL).tolist()
        drawn = zip(chosen[slots].tolist(), signed, strict=True)
        matrices = np.stack([warp_matrix(OPERATIONS[number], level, size) for number, level in drawn])
        images[where] = warp_affine(images[where], sent(matrices.astype(np.float32), images.device), fill)


def draw_operations(policy: Policy, draws_BD: Floats) -> tuple[Ints, Floats, Floats]:
    """Operation number (-1: none), level in 0…10 and sign ±1 of each image, from five uniforms each."""
    chosen = (draws_BD[:, 0] * len(OPERATIONS)).astype(np.int64)
    chosen[draws_BD[:, 1] >= policy.probability] = -1
    normal = normal_from_uniform(np.concatenate([draws_BD[:, 2], draws_BD[:, 3]]))
    levels = np.clip(policy.magnitude + policy.magnitude_std * normal, 0, _MAX_LEVEL)
    return chosen, levels, np.where(draws_BD[:, 4] < 0.5, -1.0, 1.0)


def warp_matrix(name: str, level: float, size: tuple[int, int]) -> Floats:
    """[2, 3] from output to input pixels; `level` is signed, in -1…1; `size` is (height, width)."""
    height, width = size
    if name == "rotate":
        angle = -math.radians(30 * level)
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = width / 2, height / 2
        return np.array([[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y]])
    kind, axis = name.split("_")
    row = "xy".index(axis)
    matrix = np.array([[1.0, 0, 0], [0, 1, 0]])
    if kind == "shear":
        matrix[row, 1 - row] = 0.3 * level
    else:
        matrix[row, 2] = 0.45 * level * (width, height)[row]
    return matrix


def warp_affine(images_BCHW: Tensor, matrices_B23: Tensor, fill: tuple[int, ...]) -> Tensor:
    """Sample bilinearly at (x, y) → matrix · (x, y, 1), in pixels from the upper left corner; outside is `fill`.

    As Pillow's `Image.transform(AFFINE, BILINEAR)`, within one level.
    """
    height, width = images_BCHW.shape[2:]
    device = images_BCHW.device
    x, y = torch.meshgrid(*(torch.arange(n, device=device) + 0.5 for n in (width, height)), indexing="xy")
    points_HW3 = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    source = torch.einsum("hwk,bjk->bhwj", points_HW3, matrices_B23.to(device, torch.float32))
    extent = torch.tensor([width, height], device=device)
    inside = ((source >= 0) & (source < extent)).all(dim=-1)[:, None]
    sampled = functional.grid_sample(
        images_BCHW.float(), 2 * source / extent - 1, mode="bilinear", padding_mode="border", align_corners=False
    )
    ground = torch.tensor(fill, dtype=torch.uint8, device=device).view(1, -1, 1, 1)
    return torch.where(inside, sampled.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8), ground)


_ERASED_AREA = (0.02, 1 / 3)
_ERASED_LOG_RATIO = (math.log(0.3), math.log(10 / 3))
_NUM_STARTS = 1 << 16


def erase_random(images_BCHW: Tensor, share: float, seed: int, epoch_B: Ints, sample_B: Ints) -> Tensor:
    """Random erasing (Zhong et al. 2020): fill one rectangle in about `share` of the images with unit normals, in place.

    Area 2 % … 33 % of the image, aspect ratio 0.3 … 3.3, as timm's defaults (mode `pixel`) and DeiT's recipe have it.
    """
    (low, high), (log_low, log_high) = _ERASED_AREA, _ERASED_LOG_RATIO
    draws = keyed_uniform(seed, "erase", epoch_B, sample_B, num_draws=6)
    channels, height, width = images_BCHW.shape[1:]
    noise = _noise(seed, images_BCHW[0].numel())
    for slot in np.flatnonzero(draws[:, 0] < share).tolist():
        _, area_draw, ratio_draw, top_draw, left_draw, start_draw = draws[slot].tolist()
        area = (low + area_draw * (high - low)) * height * width
        ratio = math.exp(log_low + ratio_draw * (log_high - log_low))
        h = min(max(round(math.sqrt(area * ratio)), 1), height)
        w = min(max(round(math.sqrt(area / ratio)), 1), width)
        top, left = int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1))
        start = int(start_draw * _NUM_STARTS)
        patch = noise[start : start + channels * h * w].view(channels, h, w)
        images_BCHW[slot, :, top : top + h, left : left + w] = patch.to(images_BCHW.device)
    return images_BCHW


@lru_cache(maxsize=4)
def _noise(seed: int, length: int) -> Tensor:
    """One long row of unit normals; every erased patch is a stretch of it that begins at a drawn place."""
    uniform = keyed_uniform(seed, "erase noise", num_draws=2 * (length + _NUM_STARTS))[0]
    return torch.from_numpy(normal_from_uniform(uniform).astype(np.float32))


def normal_from_uniform(uniform: Floats) -> Floats:
    """Half as many standard normals as there are uniforms (Box & Muller 1958)."""
    first, second = uniform[: len(uniform) // 2], uniform[len(uniform) // 2 :]
    return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second)
