"""Random erasing (Zhong et al. 2020) on normalised batches, with keyed draws."""

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dbscale.keyed import keyed_uniform

_AREA = (0.02, 1 / 3)
_NUM_STARTS = 1 << 16
_LOG_RATIO = (math.log(0.3), math.log(10 / 3))


def erase_random(
    images_BCHW: Tensor, share: float, seed: int, epoch_B: NDArray[np.int64], sample_B: NDArray[np.int64]
) -> Tensor:
    """Fill one rectangle in about `share` of the images with unit normal noise (timm's `pixel` mode); in place.

    Area 2 % … 33 % of the image, aspect ratio 0.3 … 3.3, as timm's defaults and DeiT's recipe have it.
    """
    draws = keyed_uniform(seed, "erase", epoch_B, sample_B, num_draws=6)
    channels, height, width = images_BCHW.shape[1:]
    noise = _noise(seed, channels * height * width)
    for slot in np.flatnonzero(draws[:, 0] < share).tolist():
        top, left, h, w = _rectangle(draws[slot], height, width)
        start = int(draws[slot, 5] * _NUM_STARTS)
        patch = noise[start : start + channels * h * w].view(channels, h, w)
        images_BCHW[slot, :, top : top + h, left : left + w] = patch.to(images_BCHW.device)
    return images_BCHW


@lru_cache(maxsize=4)
def _noise(seed: int, length: int) -> Tensor:
    """One long row of unit normals; every erased patch is a stretch of it that begins at a drawn place."""
    uniform = keyed_uniform(seed, "erase noise", num_draws=2 * (length + _NUM_STARTS))[0]
    return torch.from_numpy(normal_from_uniform(uniform).astype(np.float32))


def _rectangle(draws: NDArray[np.float64], height: int, width: int) -> tuple[int, int, int, int]:
    area = (_AREA[0] + draws[1] * (_AREA[1] - _AREA[0])) * height * width
    ratio = math.exp(_LOG_RATIO[0] + draws[2] * (_LOG_RATIO[1] - _LOG_RATIO[0]))
    h = min(max(round(math.sqrt(area * ratio)), 1), height)
    w = min(max(round(math.sqrt(area / ratio)), 1), width)
    return int(draws[3] * (height - h + 1)), int(draws[4] * (width - w + 1)), h, w


def normal_from_uniform(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half as many standard normals as there are uniforms (Box & Muller 1958)."""
    first, second = uniform[: len(uniform) // 2], uniform[len(uniform) // 2 :]
    return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second)
