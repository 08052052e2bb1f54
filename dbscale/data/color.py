"""Photometric operations on uint8 batches [b, 3, H, W] with one strength per image, on any device.

Each is the batched twin of a Pillow operation (ImageOps, ImageEnhance) and within one level of it; tests compare them.
Which operation an image gets is drawn in `rand_augment` and `jitter`.
"""

import torch
from torch import Tensor
from torch.nn import functional


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
    mean = (grey(images).float().mean(dim=(1, 2, 3)) + 0.5).floor()
    return blend(_column(mean), images, factor_B)


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


def invert(images: Tensor) -> Tensor:
    return 255 - images


def posterize(images: Tensor, bits_B: Tensor) -> Tensor:
    """Keep the `bits` (0…8) most significant bits."""
    mask = (0xFF00 >> bits_B.to(torch.int32)) & 0xFF
    return images & _column(mask.to(torch.uint8))


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
