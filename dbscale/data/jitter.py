"""Colour jitter: brightness, contrast and saturation by random factors in random order, on whole batches."""

from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dbscale.data.color import brightness, contrast, saturation
from dbscale.keyed import keyed_uniform

_OPERATIONS = (brightness, contrast, saturation)
_ORDERS = np.array(list(permutations(range(3))))


def color_jitter(
    images_BCHW: Tensor, strength: float, seed: int, epoch_B: NDArray[np.int64], sample_B: NDArray[np.int64]
) -> Tensor:
    """uint8 [b, 3, H, W]; each factor is uniform in [max(0, 1 - strength), 1 + strength], as torchvision's."""
    draws = keyed_uniform(seed, "color jitter", epoch_B, sample_B, num_draws=4)
    low = max(0.0, 1 - strength)
    factors = low + draws[:, :3] * (1 + strength - low)
    order_B3 = _ORDERS[(draws[:, 3] * len(_ORDERS)).astype(np.int64)]
    images = images_BCHW.clone()
    for turn in range(3):
        for number, operation in enumerate(_OPERATIONS):
            slots = np.flatnonzero(order_B3[:, turn] == number)
            where = torch.from_numpy(slots).to(images.device)
            factor = torch.from_numpy(factors[slots, number].astype(np.float32)).to(images.device)
            images[where] = operation(images[where], factor)
    return images
