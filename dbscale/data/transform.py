"""From stored pixels to what a model eats: crop, flip, colour, normalise, erase; one batch at a time.

Each draw is keyed by (seed, augmentation epoch, sample): the same pixels on any worker, rank or resumed run. Mixing
of whole samples (mixup, CutMix) is `mix`. The caller may run a transform in the loader or on the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dbscale.data.boxes import RESIZED_CROP_DRAWS, center_boxes, resized_crop_boxes
from dbscale.data.crop import resize_boxes, resize_each, shift_flip
from dbscale.data.erase import erase_random
from dbscale.data.jitter import color_jitter
from dbscale.data.rand_augment import parse_policy, rand_augment
from dbscale.errors import DataError
from dbscale.keyed import keyed_uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CENTER_SHARE = 0.875
"""Evaluation keeps this share of the short side, as 256 → 224 does."""

Pixels = Tensor | Sequence[NDArray[np.uint8]]
"""uint8 [b, 3, H, W] on any device, or a list of uint8 [H, W, 3]."""
_RESIZE_EACH_ABOVE = 64
"""On the CPU, larger images are resized one by one: the batched matrices only pay for small ones."""
_CACHED_VALUES = 1 << 18
"""Values that are normalised at a time on the CPU: their float32 results stay in the core's cache meanwhile."""


class Transform(Protocol):
    """Pixels and keys to float32 [b, 3, S, S]."""

    def __call__(self, pixels: Pixels, *, epoch: Tensor, sample_ids: Tensor) -> Tensor: ...


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


_FIELDS_OF_OTHERS = {"mixup", "cutmix", "mix_share", "mix_switch_share", "repeats"}
"""Recipe fields that act on whole batches (`mix`) or on the stream (`order`)."""


def make_transform(
    *,
    image_size: int,
    train: bool,
    augment: Mapping[str, Any] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    seed: int = 0,
    tier: str = "resident",
) -> Transform:
    """A batched transform.

    Args:
        image_size: side of the result in px.
        train: draw augmentation; False takes the centre.
        augment: fields of `study.recipe.Augment`; those of mixing and repeats are accepted and left to others.
        mean, std: per channel, on the 0…1 scale.
        seed: of the augmentation stream.
        tier: of the dataset; evaluation on `resident` keeps the whole image, the others the central 87.5 %.

    Raises:
        DataError: an unknown augment field, or a combination that cannot be honoured.
    """
    fields = {name: value for name, value in (augment or {}).items() if name not in _FIELDS_OF_OTHERS}
    unknown = fields.keys() - Augmentation.__dataclass_fields__.keys()
    if unknown:
        known = sorted(Augmentation.__dataclass_fields__.keys() | _FIELDS_OF_OTHERS)
        raise DataError(f"augment: unknown field {sorted(unknown)[0]!r}; known: {', '.join(known)}")
    augmentation = Augmentation(**fields) if train else Augmentation()
    if augmentation.crop_padding and augmentation.random_resized_crop is not None:
        raise DataError("augment: crop_padding and random_resized_crop exclude each other; set one of them")
    if augmentation.rand_augment is not None:
        parse_policy(augmentation.rand_augment)
    share = 1.0 if tier == "resident" else CENTER_SHARE
    return BatchTransform(image_size, augmentation, tuple(mean), tuple(std), seed, share)


@dataclass(frozen=True)
class BatchTransform:
    """See `make_transform`."""

    image_size: int
    augmentation: Augmentation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    center_share: float

    def __call__(self, pixels: Pixels, *, epoch: Tensor, sample_ids: Tensor) -> Tensor:
        """float32 [b, 3, S, S], on the device of `pixels`; epoch and sample_ids are int64 [b]."""
        keys = (epoch.cpu().numpy(), sample_ids.cpu().numpy())
        spec = self.augmentation
        images = self.place(pixels, *keys)
        if spec.rand_augment is not None:
            fill = tuple(round(255 * value) for value in self.mean)
            images = rand_augment(images, parse_policy(spec.rand_augment), fill, self.seed, *keys)
        elif spec.color_jitter:
            images = color_jitter(images, spec.color_jitter, self.seed, *keys)
        images = self.normalize(images)
        if spec.random_erasing:
            images = erase_random(images, spec.random_erasing, self.seed, *keys)
        return images

    def place(self, pixels: Pixels, epoch_B: NDArray[np.int64], sample_B: NDArray[np.int64]) -> Tensor:
        """The geometric part: uint8 [b, 3, S, S]."""
        spec = self.augmentation
        draws = keyed_uniform(self.seed, "place", epoch_B, sample_B, num_draws=3)
        flip = draws[:, 0] < spec.hflip
        if spec.random_resized_crop is None and self._is_whole(pixels):
            top, left = (draws[:, 1:].T * (2 * spec.crop_padding + 1)).astype(np.int64)
            return shift_flip(pixels, top, left, flip, spec.crop_padding)
        images = self._resize(pixels, self._boxes(pixels, epoch_B, sample_B), flip)
        if spec.crop_padding:
            top, left = (draws[:, 1:].T * (2 * spec.crop_padding + 1)).astype(np.int64)
            images = shift_flip(images, top, left, np.zeros_like(flip), spec.crop_padding)
        return images

    def _is_whole(self, pixels: Pixels) -> TypeGuard[Tensor]:
        """Whether the batch already is what the central crop would give."""
        size = (self.image_size, self.image_size)
        return isinstance(pixels, Tensor) and self.center_share == 1.0 and tuple(pixels.shape[2:]) == size

    def _boxes(self, pixels: Pixels, epoch_B: NDArray[np.int64], sample_B: NDArray[np.int64]) -> NDArray[np.int64]:
        heights, widths = _sizes(pixels, len(sample_B))
        area_range = self.augmentation.random_resized_crop
        if area_range is None:
            return center_boxes(heights, widths, self.center_share)
        uniform = keyed_uniform(self.seed, "resized crop", epoch_B, sample_B, num_draws=RESIZED_CROP_DRAWS)
        return resized_crop_boxes(heights, widths, uniform, area_range)

    def _resize(self, pixels: Pixels, boxes: NDArray[np.int64], flip: NDArray[np.bool_]) -> Tensor:
        if not isinstance(pixels, Tensor):
            return resize_each(pixels, boxes, flip, self.image_size)
        if pixels.device.type == "cpu" and max(pixels.shape[2:]) > _RESIZE_EACH_ABOVE:
            return resize_each(list(pixels.permute(0, 2, 3, 1).numpy()), boxes, flip, self.image_size)
        return resize_boxes(pixels, boxes, flip, self.image_size)

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """(x / 255 - mean) / std as float32."""
        scale, offset = _affine(self.mean, self.std, images_BCHW.device)
        if images_BCHW.device.type != "cpu":
            return images_BCHW.to(torch.float32).mul_(scale).add_(offset)
        normalized = torch.empty(images_BCHW.shape, dtype=torch.float32)
        few = max(_CACHED_VALUES // images_BCHW[0].numel(), 1)
        for part, result in zip(images_BCHW.split(few), normalized.split(few), strict=True):
            result.copy_(part).mul_(scale).add_(offset)
        return normalized


@lru_cache(maxsize=64)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    scale = torch.tensor([1 / (255 * value) for value in std], dtype=torch.float32, device=device)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32, device=device)
    return scale.view(1, -1, 1, 1), offset.view(1, -1, 1, 1)


def _sizes(pixels: Pixels, b: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if isinstance(pixels, Tensor):
        return np.full(b, pixels.shape[2]), np.full(b, pixels.shape[3])
    return np.array([image.shape[0] for image in pixels]), np.array([image.shape[1] for image in pixels])
