"""Draw crop boxes from keyed uniforms: random resized crop, padded shift, centre. Pure numpy, no pixels."""

import math

import numpy as np
from numpy.typing import NDArray

_TRIES = 10
RESIZED_CROP_DRAWS = 4 * _TRIES
"""Uniform draws per image that `resized_crop_boxes` takes."""
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))


def resized_crop_boxes(
    heights_B: NDArray[np.int64],
    widths_B: NDArray[np.int64],
    uniform_BD: NDArray[np.float64],
    area_range: tuple[float, float],
) -> NDArray[np.int64]:
    """int64 [b, 4] (top, left, height, width) by torchvision's rule (Szegedy et al. 2015).

    Ten tries of an area share in `area_range` and an aspect ratio in 3/4…4/3; the first that fits is taken, else the
    central crop of the nearest allowed ratio.

    Args:
        heights_B, widths_B: image sizes in px.
        uniform_BD: [b, RESIZED_CROP_DRAWS] in [0, 1).
    """
    draws = uniform_BD.reshape(len(heights_B), 4, _TRIES)
    area = (heights_B * widths_B)[:, None] * (area_range[0] + draws[:, 0] * (area_range[1] - area_range[0]))
    ratio = np.exp(_LOG_RATIO[0] + draws[:, 1] * (_LOG_RATIO[1] - _LOG_RATIO[0]))
    width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (width > 0) & (width <= widths_B[:, None]) & (height > 0) & (height <= heights_B[:, None])
    first = (np.arange(len(heights_B)), fits.argmax(axis=1))
    height, width = height[first], width[first]
    top = (draws[:, 2][first] * (heights_B - height + 1)).astype(np.int64)
    left = (draws[:, 3][first] * (widths_B - width + 1)).astype(np.int64)
    boxes = np.stack([top, left, height, width], axis=1)
    none_fits = np.flatnonzero(~fits.any(axis=1))
    boxes[none_fits] = _nearest_ratio_boxes(heights_B[none_fits], widths_B[none_fits])
    return boxes


def _nearest_ratio_boxes(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    low, high = (math.exp(value) for value in _LOG_RATIO)
    height = np.where(widths / heights < low, np.rint(widths / low), heights).astype(np.int64)
    width = np.where(widths / heights > high, np.rint(heights * high), widths).astype(np.int64)
    return np.stack([(heights - height) // 2, (widths - width) // 2, height, width], axis=1)


def center_boxes(heights_B: NDArray[np.int64], widths_B: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """int64 [b, 4]: the central square whose side is `share` of the short side."""
    side = np.maximum(np.rint(np.minimum(heights_B, widths_B) * share), 1).astype(np.int64)
    return np.stack([(heights_B - side) // 2, (widths_B - side) // 2, side, side], axis=1)
