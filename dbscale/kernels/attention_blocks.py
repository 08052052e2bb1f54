"""Blocks of attention maps: how a batch is cut into them, and the closed forms on one. See `attention_kl_chunked`."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dbscale.kernels.closed_forms import ELEMENTS_ON_DEVICE, kl_of_maps, refine_near
from dbscale.kernels.head_map import HeadPlan
from dbscale.kernels.kd_loss_eager import wide

ELEMENTS_PER_BLOCK = 1 << 18
"""Student map entries at a time: 1 MiB of float32, measured best on a core with 2 MiB of L2; flat over a factor 4."""


def blocks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """(images, query tokens) of each block: several whole images where they are small, else rows of one."""
    batch, num_heads, num_tokens, _ = q.shape
    most = ELEMENTS_PER_BLOCK if q.device.type == "cpu" else ELEMENTS_ON_DEVICE
    entries_per_row = max(num_heads * num_tokens, 1)
    # Equal parts, and an image that is a little too large in one: a short rest costs as many operations as a block.
    parts = max(round(entries_per_row * num_tokens / most), 1)
    tokens = max(math.ceil(num_tokens / parts), 1)
    images = max(most // (entries_per_row * tokens), 1)
    for first_image in range(0, batch, images):
        for first_token in range(0, num_tokens, tokens):
            yield slice(first_image, first_image + images), slice(first_token, first_token + tokens)


def packed(tensor: Tensor, scale: float = 1.0) -> Tensor:
    """scale · tensor in the accumulating dtype, contiguous, in one walk where there is anything to do."""
    tensor = wide(tensor)
    if scale == 1.0:
        return tensor.contiguous()
    return torch.mul(tensor, scale, out=tensor.new_empty(tensor.shape))


def multiply_into(out: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """out[:] = factor · left @ right, batches [b, H] of matrices, with no copy where `out` is whole; returns `out`."""
    if out.dtype != left.dtype or not out.is_contiguous():
        return out.copy_((left @ right).mul_(factor))
    whole = out.flatten(0, 1)
    torch.baddbmm(whole, left.flatten(0, 1), right.flatten(0, 1), beta=0.0, alpha=factor, out=whole)
    return out


def kl_block(
    scores_s: Tensor, scores_t: Tensor, heads: HeadPlan, want_slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """KL rows [b, M, r] of a block, the student's maps, and the gradient of each row's KL in scores_s [b, H_s, r, N]."""
    if heads.group_size == 1 and heads.mixing is None:
        return _paired_block(scores_s, scores_t, heads.repeats, want_slope)
    return _general_block(scores_s, scores_t, heads, want_slope)


def slope_block(scores_s: Tensor, scores_t: Tensor, heads: HeadPlan) -> tuple[Tensor, Tensor]:
    """The last two of `kl_block`, where the KL itself is known."""
    if heads.group_size > 1 or heads.mixing is not None:
        _, p_s, slope = _general_block(scores_s, scores_t, heads, True)
        assert slope is not None
        return p_s, slope
    p_s, p_t = scores_s.softmax(-1), scores_t.softmax(-1)
    return p_s, (p_s.unflatten(1, (p_t.shape[1], heads.repeats)) - p_t.unsqueeze(2)).flatten(1, 2)


def _paired_block(
    scores_s: Tensor, scores_t: Tensor, repeats: int, want_slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    num_rows = scores_s.shape[2]
    log_p_s = scores_s.log_softmax(-1).unflatten(1, (scores_t.shape[1], repeats))
    log_p_t = scores_t.log_softmax(-1).unsqueeze(2)
    p_t = log_p_t.exp()
    gap = (log_p_t - log_p_s).mul_(p_t)
    kl = gap @ gap.new_ones(gap.shape[-1])

    def rows_of(rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if rows is None:
            return scores_s.view_as(log_p_s), scores_t.unsqueeze(2), p_t
        rows_t = rows // (repeats * num_rows) * num_rows + rows % num_rows
        return scores_s.flatten(0, 2)[rows], scores_t.flatten(0, 2)[rows_t], p_t.flatten(0, 3)[rows_t]

    kl = refine_near(kl, rows_of, 1.0)
    p_s = log_p_s.exp_()
    slope = torch.sub(p_s, p_t, out=gap).flatten(1, 2) if want_slope else None
    return kl.flatten(1, 2), p_s.flatten(1, 2), slope


def _general_block(
    scores_s: Tensor, scores_t: Tensor, heads: HeadPlan, want_slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    log_p = scores_s.log_softmax(-1).unflatten(1, (heads.num_maps, heads.group_size))
    log_mean = log_p.logsumexp(2, keepdim=True) - math.log(heads.group_size)
    p_t = _mixture(scores_t.softmax(-1), heads)
    kl = kl_of_maps(log_mean.exp().squeeze(2), log_mean.squeeze(2), p_t)
    p = log_p.exp()
    if not want_slope:
        return kl, p.flatten(1, 2), None
    # share = p_h/(G·mean) ≤ 1 is head h's part in the mean; dKL/dz_h = p_h·Σ_j(p_t share) − p_t share.
    pull = log_p.sub_(log_mean).exp_().div_(heads.group_size).mul_(p_t.unsqueeze(2))
    slope = torch.mul(p, pull.sum(-1, keepdim=True)).sub_(pull)
    return kl, p.flatten(1, 2), slope.flatten(1, 2)


def _mixture(p_t: Tensor, heads: HeadPlan) -> Tensor:
    if heads.mixing is None:
        return p_t.repeat_interleave(heads.repeats, dim=1)
    return (heads.mixing.to(p_t.dtype) @ p_t.flatten(2)).unflatten(2, p_t.shape[2:])


def uniform_weight(weight: Tensor) -> float | None:
    """The weight of every row, where they all are one number in memory; looked at on the CPU only, it costs no wait."""
    if weight.device.type != "cpu" or any(weight.stride()) or not weight.numel():
        return None
    return float(weight[0, 0, 0])
