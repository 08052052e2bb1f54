"""Where pixels go: crops, shifts, mirrors and resizing of a batch, on any device.

A `Placement` says it for a batch, drawn once; images are resampled here, masks and boxes in `target`, by the same one. What
is drawn, and what becomes of colours, is `augment`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Pixels = Tensor | Sequence[NDArray[np.uint8]]
"""uint8 [b, 3, H, W] on any device, or a list of uint8 [H, W, 3]."""
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
_RESIZE_EACH_ABOVE = 64
"""On the CPU, larger images are resized one by one: the batched matrices only pay for small ones."""


class Placement(NamedTuple):
    """How a batch is brought to S × S: cut, resize and mirror, then shift inside a padded frame."""

    boxes: Ints | None
    """int64 [b, 4]: top, left, height, width of what is cut out, px; None: images are S × S already and kept whole."""
    flip: Flags
    """[b]: mirrored left to right, after the cut."""
    top: Ints
    """[b]: row of the final window in the padded image, 0…2·padding."""
    left: Ints
    padding: int
    """px on each side before the final window is cut."""
    size: int
    """S, px."""


def resize(pixels: Pixels, boxes: Ints, flip: Flags, size: int) -> Tensor:
    """Cut, resize and mirror by the faster of the two ways below: uint8 [b, 3, size, size]."""
    if isinstance(pixels, Tensor):
        if pixels.device.type != "cpu" or max(pixels.shape[2:]) <= _RESIZE_EACH_ABOVE:
            return resize_boxes(pixels, boxes, flip, size)
        pixels = list(pixels.permute(0, 2, 3, 1).numpy())
    return resize_each(pixels, boxes, flip, size)


RESIZED_CROP_DRAWS = 40
"""Uniform draws per image that `resized_crop_boxes` takes: four for each of ten tries."""
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))


def resized_crop_boxes(heights_B: Ints, widths_B: Ints, uniform_BD: Floats, area_range: tuple[float, float]) -> Ints:
    """Boxes (top, left, height, width), int64 [b, 4], by torchvision's rule (Szegedy et al. 2015); sizes in px.

    Of ten tries, an area share in `area_range` and an aspect ratio in 3/4…4/3 each, the first that fits is taken, else
    the central crop of the nearest allowed ratio. `uniform_BD` is [b, RESIZED_CROP_DRAWS] in [0, 1).
    """
    draws = uniform_BD.reshape(len(heights_B), 4, -1)
    area = (heights_B * widths_B)[:, None] * (area_range[0] + draws[:, 0] * (area_range[1] - area_range[0]))
    ratio = np.exp(_LOG_RATIO[0] + draws[:, 1] * (_LOG_RATIO[1] - _LOG_RATIO[0]))
    width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (width > 0) & (width <= widths_B[:, None]) & (height > 0) & (height <= heights_B[:, None])
    first = (np.arange(len(heights_B)), fits.argmax(axis=1))
    height, width = height[first], width[first]
    top = (draws[:, 2][first] * (heights_B - height + 1)).astype(np.int64)
    left = (draws[:, 3][first] * (widths_B - width + 1)).astype(np.int64)
    drawn = np.stack([top, left, height, width], axis=1)
    low, high = (math.exp(value) for value in _LOG_RATIO)
    height = np.where(widths_B / heights_B < low, np.rint(widths_B / low), heights_B).astype(np.int64)
    width = np.where(widths_B / heights_B > high, np.rint(heights_B * high), widths_B).astype(np.int64)
    central = np.stack([(heights_B - height) // 2, (widths_B - width) // 2, height, width], axis=1)
    return np.where(fits.any(axis=1, keepdims=True), drawn, central)


def center_boxes(heights_B: Ints, widths_B: Ints, share: float) -> Ints:
    """int64 [b, 4]: the central square whose side is `share` of the short side."""
    side = np.maximum(np.rint(np.minimum(heights_B, widths_B) * share), 1).astype(np.int64)
    return np.stack([(heights_B - side) // 2, (widths_B - side) // 2, side, side], axis=1)


def sent(values: NDArray[Any], device: torch.device) -> Tensor:
    """Drawn values on the device of the images; from pinned memory, for otherwise the host waits at each small copy."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def shift_flip(images_BCHW: Tensor, top_B: Ints, left_B: Ints, flip_B: Flags, padding: int) -> Tensor:
    """Zero-pad by `padding`, mirror where `flip_B`, and cut the window at (top, left) back to the old size.

    Images are uint8 [b, c, h, w]; top and left lie in 0…2·padding. The fast CPU path and its twin for any device,
    `shift_flip_gather`, are held together by tests, as are `resize_each` and `resize_boxes` below.
    """
    if images_BCHW.device.type != "cpu":
        return shift_flip_gather(images_BCHW, top_B, left_B, flip_B, padding)
    b, c, h, w = images_BCHW.shape
    padded = functional.pad(images_BCHW, (padding,) * 4).numpy()
    padded[flip_B] = padded[flip_B][..., ::-1]
    if not padding:
        return torch.from_numpy(padded)
    sb, sc, sy, sx = padded.strides
    shifts = 2 * padding + 1
    # All windows of all images as one view: indexing it copies just one window an image, row by row.
    windows = as_strided(padded, (b, shifts, shifts, c, h, w), (sb, sy, sx, sc, sy, sx), writeable=False)
    return torch.from_numpy(windows[np.arange(b), top_B, left_B])


def shift_flip_gather(images_BCHW: Tensor, top_B: Ints, left_B: Ints, flip_B: Flags, padding: int) -> Tensor:
    """`shift_flip` as one gather, for any device: one copy to it and four launches, which are what a small batch costs."""
    b, c, h, w = images_BCHW.shape
    width = w + 2 * padding
    columns = left_B[:, None] + np.arange(w)
    # The mirror comes before the cut, so a window at `left` of the mirrored image runs backwards in the original.
    columns = np.where(flip_B[:, None], width - 1 - columns, columns)
    starts = (top_B[:, None] + np.arange(h)) * width
    places = sent(np.concatenate([starts, columns], axis=1), images_BCHW.device)
    index = places[:, :h, None] + places[:, None, h:]
    padded = functional.pad(images_BCHW, (padding,) * 4).reshape(b, c, -1)
    return padded.gather(2, index.reshape(b, 1, -1).expand(b, c, -1)).reshape(b, c, h, w)


def resize_boxes(images_BCHW: Tensor, boxes_B4: Ints, flip_B: Flags, size: int) -> Tensor:
    """Cut each image's box, resize it to size × size, mirror where `flip_B`: uint8 [b, c, size, size].

    Antialiased bicubic interpolation as in Pillow, which is separable: per image two small matrices, so a whole batch
    is two batched products on any device; within one level of `resize_each`.
    """
    rows = resize_matrix(boxes_B4[:, 0], boxes_B4[:, 2], images_BCHW.shape[2], size)
    columns = resize_matrix(boxes_B4[:, 1], boxes_B4[:, 3], images_BCHW.shape[3], size)
    columns[flip_B] = columns[flip_B][:, ::-1]
    device = images_BCHW.device
    out = torch.empty((len(images_BCHW), images_BCHW.shape[1], size, size), dtype=torch.uint8, device=device)
    tall_B = vertical_first(boxes_B4, size)
    for tall in np.unique(tall_B):
        slots = np.flatnonzero(tall_B == tall)
        where = sent(slots, device)
        images = (images_BCHW if len(slots) == len(images_BCHW) else images_BCHW[where]).float()
        rows_B1SH = sent(rows[slots], device)[:, None]
        columns_B1WS = sent(columns[slots], device).transpose(1, 2)[:, None]
        # Pillow rounds and clips between its two passes; so must we, or overshoot would pile up.
        if tall:
            resized = (rows_B1SH @ images).round_().clamp_(0, 255) @ columns_B1WS
        else:
            resized = rows_B1SH @ (images @ columns_B1WS).round_().clamp_(0, 255)
        out[where] = resized.round_().clamp_(0, 255).to(torch.uint8)
    return out


def vertical_first(boxes_B4: Ints, size: int) -> Flags:
    """bool [b]: boxes whose columns Pillow resizes before their rows.

    Since release 13 (python-pillow/Pillow#9549; border measured) it does so where the height shrinks by more than
    twice what the width does. Older releases never do.
    """
    height_B, width_B = boxes_B4[:, 2], boxes_B4[:, 3]
    return (height_B > size) & (2 * (width_B - size) < height_B - size)


def resize_matrix(starts_B: Ints, lengths_B: Ints, extent: int, size: int) -> NDArray[np.float32]:
    """float32 [b, size, extent]: bicubic weights (a = -0.5, Keys 1981) of each input pixel for each output pixel.

    Pixels outside [start, start + length) have weight 0, as if the box had been cut out first.
    """
    scale = (lengths_B / size)[:, None, None]
    centers = starts_B[:, None, None] + (np.arange(size)[None, :, None] + 0.5) * scale
    pixels = np.arange(extent)[None, None, :]
    x = np.abs((pixels + 0.5 - centers) / np.maximum(scale, 1.0))
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    inside = (pixels >= starts_B[:, None, None]) & (pixels < (starts_B + lengths_B)[:, None, None])
    weights = np.where(inside, weights, 0.0)
    return (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)


def resize_each(images: Sequence[NDArray[np.uint8]], boxes_B4: Ints, flip_B: Flags, size: int) -> Tensor:
    """`resize_boxes` image by image on the CPU, for images [h, w, 3] of any sizes and for large ones.

    torch's uint8 antialiased bicubic kernel: more than twice as fast as Pillow's and within one level of it (its weights
    have fewer bits: on hard edges one value in a million differs by two).
    """
    out = np.empty((len(images), 3, size, size), np.uint8)
    tall_B = vertical_first(boxes_B4, size)
    for slot, (image, (top, left, height, width)) in enumerate(zip(images, boxes_B4.tolist(), strict=True)):
        box_HWC = image[top : top + height, left : left + width]
        if not box_HWC.flags.writeable:  # Pillow's arrays: torch warns where it could write to them
            box_HWC = box_HWC.copy()
        # Known to be channels-last, so that the kernel need not repack its result: a third of its time.
        box_1CHW = torch.from_numpy(box_HWC)[None].permute(0, 3, 1, 2)
        if tall_B[slot]:
            box_1CHW = functional.interpolate(box_1CHW, (size, width), mode="bicubic", antialias=True)
        if box_1CHW.shape[2:] != (size, size):
            box_1CHW = functional.interpolate(box_1CHW, (size, size), mode="bicubic", antialias=True)
        resized_CHW = box_1CHW[0].numpy()
        out[slot] = resized_CHW[:, :, ::-1] if flip_B[slot] else resized_CHW
    return torch.from_numpy(out)
