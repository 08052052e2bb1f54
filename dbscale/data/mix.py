"""Mixup and CutMix of neighbours in a batch, keyed by (seed, step): equal on any world size.

The partner of batch position i is i xor 1, so pairs never cross the border of a rank's even slice. One draw of the
mixing share per step, as timm's `batch` mode; the loss takes both labels and their share.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dbscale.errors import DataError
from dbscale.keyed import keyed_bits, keyed_uniform


class MixTarget(NamedTuple):
    """Targets of a mixed batch: share `lam` of `y_a`, the rest of `y_b`."""

    y_a: Tensor
    """int64 [b]."""
    y_b: Tensor
    """int64 [b]."""
    lam: float | Tensor
    """1.0 where the batch was left alone; float64 [] on the device inside a recorded step."""


def mix_batch(
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    seed: int,
    step: int,
) -> tuple[Tensor, MixTarget]:
    """Mix each image with its neighbour (Zhang et al. 2018; Yun et al. 2019).

    Args:
        images_BCHW: float [b, 3, S, S], b even, an even slice of the global batch.
        labels_B: int64 [b].
        mixup, cutmix: Beta parameters; 0 turns one off.
        prob: share of steps that are mixed.
        switch_prob: share of mixed steps that take CutMix when both are on.
        seed, step: key of the draws.

    Raises DataError for an odd batch.
    """
    plain = images_BCHW, MixTarget(labels_B, labels_B, 1.0)
    if mixup <= 0 and cutmix <= 0:
        return plain
    if len(labels_B) % 2:
        raise DataError(
            f"mixup and CutMix pair neighbours: a rank's batch of {len(labels_B)} is odd; choose a global batch whose "
            "micro-batches are even, or set mixup and cutmix to 0"
        )
    applies, switch, x, y = keyed_uniform(seed, "mix", step, num_draws=4)[0].tolist()
    if applies >= prob:
        return plain
    use_cutmix = cutmix > 0 and (mixup <= 0 or switch < switch_prob)
    words, parameter = keyed_bits(seed, "mix beta", step, num_draws=4)[0].view("<u4"), cutmix if use_cutmix else mixup
    lam = float(np.random.RandomState(words).beta(parameter, parameter))
    partners, labels_b = _neighbours(images_BCHW), _neighbours(labels_B)
    if not use_cutmix:
        return torch.lerp(partners, images_BCHW, lam), MixTarget(labels_B, labels_b, lam)
    mixed, kept = _paste(images_BCHW, partners, lam, x, y)
    return mixed, MixTarget(labels_B, labels_b, kept)


def _neighbours(values: Tensor) -> Tensor:
    """[b, …] with the two of each pair exchanged."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _paste(images: Tensor, others: Tensor, lam: float, x: float, y: float) -> tuple[Tensor, float]:
    """CutMix's rectangle of area 1 - lam around (x, y), clipped at the border; the share is corrected for clipping."""
    height, width = images.shape[2:]
    cut = (1 - lam) ** 0.5
    half_h, half_w = int(height * cut) // 2, int(width * cut) // 2
    center_y, center_x = int(y * height), int(x * width)
    top, bottom = max(center_y - half_h, 0), min(center_y + half_h, height)
    left, right = max(center_x - half_w, 0), min(center_x + half_w, width)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
