"""RandAugment (Cubuk et al. 2020) in timm's "increasing" variant, on whole batches with keyed draws.

Per layer and image: one of 15 operations, applied with probability p, at a magnitude near m. Images that drew the same
operation are processed together. One difference to timm: warps sample bilinearly, timm draws bilinear or bicubic.
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dbscale.data import color
from dbscale.data.erase import normal_from_uniform
from dbscale.data.warp import warp_affine
from dbscale.errors import DataError
from dbscale.keyed import keyed_uniform

OPERATIONS = (
    *("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add"),
    *("saturation", "contrast", "brightness", "sharpness"),
    *("rotate", "shear_x", "shear_y", "translate_x", "translate_y"),
)
_FIRST_WARP = OPERATIONS.index("rotate")
_MAX_LEVEL = 10.0
_DRAWS = 5


@dataclass(frozen=True)
class Policy:
    """Parsed form of timm's notation, e.g. rand-m9-mstd0.5-inc1."""

    magnitude: float = 10.0
    """0…10."""
    num_layers: int = 2
    probability: float = 0.5
    """Of each drawn operation."""
    magnitude_std: float = 0.0


@lru_cache(maxsize=16)
def parse_policy(text: str) -> Policy:
    """Read timm's notation. Raises DataError on what this implementation does not have."""
    head, *sections = text.split("-")
    matches = [re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", section) for section in sections]
    if head != "rand" or not all(matches):
        raise DataError(
            f"rand_augment {text!r}: expected rand-m<magnitude>[-n<layers>][-p<probability>][-mstd<std>]-inc1"
        )
    values = {match[1]: float(match[2]) for match in matches if match}
    if values.pop("inc", 0) != 1:
        raise DataError(f"rand_augment {text!r}: only the increasing set of operations is there; append -inc1")
    policy = Policy(
        magnitude=values.get("m", _MAX_LEVEL),
        num_layers=int(values.get("n", 2)),
        probability=values.get("p", 0.5),
        magnitude_std=values.get("mstd", 0.0),
    )
    if not (0 <= policy.magnitude <= _MAX_LEVEL and 0 <= policy.probability <= 1 and policy.num_layers >= 1):
        raise DataError(f"rand_augment {text!r}: m must lie in 0…10, p in 0…1, n must be at least 1")
    return policy


def rand_augment(
    images_BCHW: Tensor,
    policy: Policy,
    fill: tuple[int, ...],
    seed: int,
    epoch_B: NDArray[np.int64],
    sample_B: NDArray[np.int64],
) -> Tensor:
    """uint8 [b, 3, H, W], on the device of the images; `fill` colours what a warp uncovers."""
    draws = keyed_uniform(seed, "rand augment", epoch_B, sample_B, num_draws=_DRAWS * policy.num_layers)
    images = images_BCHW.clone()
    for layer in draws.reshape(len(draws), policy.num_layers, _DRAWS).transpose(1, 0, 2):
        _apply_layer(images, policy, fill, layer)
    return images


def _apply_layer(images: Tensor, policy: Policy, fill: tuple[int, ...], draws_BD: NDArray[np.float64]) -> None:
    chosen, levels, signs = draw_operations(policy, draws_BD)
    for number in range(_FIRST_WARP):
        slots = np.flatnonzero(chosen == number)
        if len(slots):
            where = torch.from_numpy(slots).to(images.device)
            images[where] = apply_color(OPERATIONS[number], images[where], levels[slots], signs[slots])
    slots = np.flatnonzero(chosen >= _FIRST_WARP)
    if len(slots):
        where = torch.from_numpy(slots).to(images.device)
        size = (images.shape[2], images.shape[3])
        names = [OPERATIONS[number] for number in chosen[slots].tolist()]
        signed = (levels[slots] * signs[slots] / _MAX_LEVEL).tolist()
        matrices = np.stack([warp_matrix(name, level, size) for name, level in zip(names, signed, strict=True)])
        images[where] = warp_affine(images[where], torch.from_numpy(matrices), fill)


def draw_operations(
    policy: Policy, draws_BD: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Operation number (-1: none), level in 0…10 and sign ±1 of each image, from five uniforms each."""
    chosen = (draws_BD[:, 0] * len(OPERATIONS)).astype(np.int64)
    chosen[draws_BD[:, 1] >= policy.probability] = -1
    normal = normal_from_uniform(np.concatenate([draws_BD[:, 2], draws_BD[:, 3]]))
    levels = np.clip(policy.magnitude + policy.magnitude_std * normal, 0, _MAX_LEVEL)
    return chosen, levels, np.where(draws_BD[:, 4] < 0.5, -1.0, 1.0)


def apply_color(name: str, images: Tensor, level_B: NDArray[np.float64], sign_B: NDArray[np.float64]) -> Tensor:
    """One photometric operation at each image's level, by timm's "increasing" scales."""
    share = level_B / _MAX_LEVEL
    operation = getattr(color, name)
    if name in ("auto_contrast", "equalize", "invert"):
        return operation(images)
    if name == "posterize":
        strength = 4 - (share * 4).astype(np.int64)
    elif name == "solarize":
        strength = 256 - np.minimum((share * 256).astype(np.int64), 256)
    elif name == "solarize_add":
        strength = np.minimum((share * 110).astype(np.int64), 128)
    else:
        strength = np.maximum(0.1, 1 + sign_B * share * 0.9).astype(np.float32)
    return operation(images, torch.from_numpy(strength).to(images.device))


def warp_matrix(name: str, level: float, size: tuple[int, int]) -> NDArray[np.float64]:
    """[2, 3] from output to input pixels; `level` is signed, in -1…1; `size` is (height, width)."""
    height, width = size
    matrix = np.array([[1.0, 0, 0], [0, 1, 0]])
    if name == "rotate":
        angle = -math.radians(30 * level)
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = width / 2, height / 2
        return np.array([[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y]])
    row, column, value = {
        "shear_x": (0, 1, 0.3 * level),
        "shear_y": (1, 0, 0.3 * level),
        "translate_x": (0, 2, 0.45 * level * width),
        "translate_y": (1, 2, 0.45 * level * height),
    }[name]
    matrix[row, column] = value
    return matrix
