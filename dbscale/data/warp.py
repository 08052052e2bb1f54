"""Affine warps of uint8 batches with one matrix per image, on any device; the batched twin of Pillow's transform."""

import torch
from torch import Tensor
from torch.nn import functional


def warp_affine(images_BCHW: Tensor, matrices_B23: Tensor, fill: tuple[int, ...]) -> Tensor:
    """Bilinear sampling at (x, y) → matrix · (x, y, 1), in pixels from the upper left corner; outside is `fill`.

    As `Image.transform(AFFINE, BILINEAR)`, within one level.
    """
    height, width = images_BCHW.shape[2:]
    device = images_BCHW.device
    y, x = torch.meshgrid(
        torch.arange(height, device=device) + 0.5, torch.arange(width, device=device) + 0.5, indexing="ij"
    )
    points_HW3 = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    source = torch.einsum("hwk,bjk->bhwj", points_HW3, matrices_B23.to(device, torch.float32))
    extent = torch.tensor([width, height], device=device)
    inside = ((source >= 0) & (source < extent)).all(dim=-1)[:, None]
    sampled = functional.grid_sample(
        images_BCHW.float(), 2 * source / extent - 1, mode="bilinear", padding_mode="border", align_corners=False
    )
    ground = torch.tensor(fill, dtype=torch.uint8, device=device).view(1, -1, 1, 1)
    return torch.where(inside, sampled.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8), ground)
