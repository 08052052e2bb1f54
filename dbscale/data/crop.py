"""Crops, flips and resizes of whole uint8 batches, with one box per image.

Boxes are drawn elsewhere (`boxes`); everything here is a deterministic function of pixels and boxes. Each fast CPU
path has a twin that runs on any device, and tests hold the two together.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


def shift_flip(
    images_BCHW: Tensor, top_B: NDArray[np.int64], left_B: NDArray[np.int64], flip_B: NDArray[np.bool_], padding: int
) -> Tensor:
    """Zero-pad by `padding`, mirror where `flip_B`, and cut the window at (top, left) back to the old size.

    Args:
        images_BCHW: uint8 [b, c, h, w], on any device.
        top_B, left_B: int [b] in [0, 2·padding].
        flip_B: bool [b].
    """
    if images_BCHW.device.type == "cpu":
        return _shift_flip_numpy(images_BCHW, top_B, left_B, flip_B, padding)
    return shift_flip_gather(images_BCHW, top_B, left_B, flip_B, padding)


def _shift_flip_numpy(
    images: Tensor, top: NDArray[np.int64], left: NDArray[np.int64], flip: NDArray[np.bool_], padding: int
) -> Tensor:
    pixels = images.numpy()
    b, c, h, w = pixels.shape
    mirrored = np.flatnonzero(flip)
    padded = np.zeros((b, c, h + 2 * padding, w + 2 * padding), np.uint8) if padding else pixels.copy()
    inner = padded[:, :, padding : padding + h, padding : padding + w]
    if padding:
        inner[:] = pixels
    inner[mirrored] = pixels[mirrored][..., ::-1]
    if not padding:
        return torch.from_numpy(padded)
    sb, sc, sy, sx = padded.strides
    shifts = 2 * padding + 1
    # All windows of all images as one view: indexing it copies just one window an image, row by row.
    windows = as_strided(padded, (b, shifts, shifts, c, h, w), (sb, sy, sx, sc, sy, sx), writeable=False)
    return torch.from_numpy(windows[np.arange(b), top, left])


def shift_flip_gather(
    images_BCHW: Tensor, top_B: NDArray[np.int64], left_B: NDArray[np.int64], flip_B: NDArray[np.bool_], padding: int
) -> Tensor:
    """`shift_flip` as one gather, for any device."""
    b, c, h, w = images_BCHW.shape
    device = images_BCHW.device
    rows = torch.from_numpy(top_B).to(device)[:, None] + torch.arange(h, device=device)
    columns = torch.from_numpy(left_B).to(device)[:, None] + torch.arange(w, device=device)
    # The mirror comes before the cut, so a window at `left` of the mirrored image runs backwards in the original.
    mirrored = torch.from_numpy(flip_B).to(device)[:, None]
    columns = torch.where(mirrored, w + 2 * padding - 1 - columns, columns)
    padded = functional.pad(images_BCHW, (padding,) * 4).reshape(b, c, -1)
    index = rows[:, :, None] * (w + 2 * padding) + columns[:, None, :]
    return padded.gather(2, index.reshape(b, 1, -1).expand(b, c, -1)).reshape(b, c, h, w)


def resize_boxes(images_BCHW: Tensor, boxes_B4: NDArray[np.int64], flip_B: NDArray[np.bool_], size: int) -> Tensor:
    """Cut each image's box (top, left, height, width), resize it to size × size, mirror where `flip_B`.

    Antialiased bicubic interpolation as in Pillow, which is separable: per image two small matrices, so a whole batch
    is two batched products on any device. Returns uint8 [b, c, size, size], within one level of the per-image path.
    """
    rows = resize_matrix(boxes_B4[:, 0], boxes_B4[:, 2], images_BCHW.shape[2], size)
    columns = resize_matrix(boxes_B4[:, 1], boxes_B4[:, 3], images_BCHW.shape[3], size)
    columns[flip_B] = columns[flip_B][:, ::-1]
    device = images_BCHW.device
    out = torch.empty((len(images_BCHW), images_BCHW.shape[1], size, size), dtype=torch.uint8, device=device)
    tall_B = vertical_first(boxes_B4, size)
    for slots in (np.flatnonzero(tall_B), np.flatnonzero(~tall_B)):
        if len(slots):
            images = images_BCHW if len(slots) == len(images_BCHW) else images_BCHW[torch.from_numpy(slots).to(device)]
            rows_B1SH = torch.from_numpy(rows[slots]).to(device)[:, None]
            columns_B1WS = torch.from_numpy(columns[slots]).to(device).transpose(1, 2)[:, None]
            # Pillow rounds and clips between its two passes; so must we, or overshoot would pile up.
            if tall_B[slots[0]]:
                resized = _levels(rows_B1SH @ images.float()) @ columns_B1WS
            else:
                resized = rows_B1SH @ _levels(images.float() @ columns_B1WS)
            out[torch.from_numpy(slots).to(device)] = _levels(resized).to(torch.uint8)
    return out


def _levels(values: Tensor) -> Tensor:
    """Round and clip to 0…255, in place."""
    return values.round_().clamp_(0, 255)


def vertical_first(boxes_B4: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    """bool [b]: boxes whose columns Pillow resizes before their rows.

    Since release 13 it does so where that is cheaper: where the height shrinks by more than twice what the width does
    (python-pillow/Pillow#9549; the exact border was measured). Older releases never do.
    """
    height_B, width_B = boxes_B4[:, 2], boxes_B4[:, 3]
    return (height_B > size) & (2 * (width_B - size) < height_B - size)


def resize_matrix(
    starts_B: NDArray[np.int64], lengths_B: NDArray[np.int64], extent: int, size: int
) -> NDArray[np.float32]:
    """float32 [b, size, extent]: bicubic weights (a = -0.5, Keys 1981) of each input pixel for each output pixel.

    Pixels outside [start, start + length) have weight 0, as if the box had been cut out first.
    """
    scale = (lengths_B / size)[:, None, None]
    centers = starts_B[:, None, None] + (np.arange(size)[None, :, None] + 0.5) * scale
    pixels = np.arange(extent)[None, None, :]
    weights = _cubic((pixels + 0.5 - centers) / np.maximum(scale, 1.0))
    inside = (pixels >= starts_B[:, None, None]) & (pixels < (starts_B + lengths_B)[:, None, None])
    weights = np.where(inside, weights, 0.0)
    return (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def resize_each(
    images: Sequence[NDArray[np.uint8]], boxes_B4: NDArray[np.int64], flip_B: NDArray[np.bool_], size: int
) -> Tensor:
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
