"""Masks and boxes placed as their images are: one draw, one crop, one mirror for both.

A `DenseTransform` is to an image with a target what `augment.Transform` is to an image alone. Bytes and storage are
`target`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dbscale.data.augment import Transform
from dbscale.data.geometry import Pixels, Placement, shift_flip
from dbscale.data.target import Boxes, Mask, clip_boxes, nearest_pixels

Targets = Tensor | Sequence[Mask] | Sequence[Boxes]
"""The targets of a batch: masks uint8 [b, S, S] once placed, else one item an image."""


def place_masks(masks: Sequence[Mask], placement: Placement) -> Tensor:
    """uint8 [b, S, S]: the nearest class of every pixel of the placed images; IGNORE where padding came in."""
    boxes, flip, top, left, padding, size = placement
    if boxes is None:
        cut, mirror = np.stack(masks), flip
    else:
        cut, mirror = np.empty((len(masks), size, size), np.uint8), np.zeros_like(flip)
        y, x, height, width = np.asarray(boxes).T
        rows, columns = nearest_pixels(y, height, size), nearest_pixels(x, width, size)
        columns[flip] = columns[flip, ::-1]
        for slot, mask in enumerate(masks):
            np.take(mask[rows[slot]], columns[slot], 1, cut[slot])
    if not padding and not mirror.any():
        return torch.from_numpy(cut)
    # Shifting pads with zeros: one more, classes begin at 1 and IGNORE, 255, wraps round to 0.
    shifted = shift_flip(torch.from_numpy(cut)[:, None] + 1, top, left, mirror, padding)
    return shifted[:, 0] - 1


def place_boxes(targets: Sequence[Boxes], placement: Placement) -> list[Boxes]:
    """The boxes of the placed images, in their S × S pixels, clipped."""
    cuts, flip, top, left, padding, size = placement
    placed = []
    for slot, target in enumerate(targets):
        y, x, height, width = (0, 0, size, size) if cuts is None else cuts[slot].tolist()
        boxes = (target.boxes_N4 - np.array([x, y] * 2, np.float32)) * np.array(
            [size / width, size / height] * 2, np.float32
        )
        whole = clip_boxes(target._replace(size=(size, size), boxes_N4=boxes))
        boxes = whole.boxes_N4
        if flip[slot]:
            boxes = np.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], axis=1)
        shift = np.array([padding - left[slot], padding - top[slot]] * 2, np.float32)
        placed.append(clip_boxes(whole._replace(boxes_N4=boxes + shift)))
    return placed


@dataclass(frozen=True)
class DenseTransform:
    """Pixels and targets to model input; one placement for both."""

    image: Transform
    train: bool
    """False leaves the targets as they are stored, which an error is measured on."""

    def __call__(
        self, pixels: Pixels, targets: Sequence[Mask] | Sequence[Boxes], *, epoch: Tensor, sample_ids: Tensor
    ) -> tuple[Tensor, Targets]:
        """float32 [b, 3, S, S], and the targets: placed in training (masks uint8 [b, S, S])."""
        keys = (epoch.cpu().numpy(), sample_ids.cpu().numpy())
        placement = self.image.placement(pixels, *keys)
        images = self.image.finish(self.image.place(pixels, placement), *keys)
        if not self.train:
            return images, targets
        if isinstance(targets[0], Boxes):
            return images, place_boxes(targets, placement)  # type: ignore[arg-type]
        return images, place_masks(targets, placement)  # type: ignore[arg-type]
