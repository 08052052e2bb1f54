"""Attention-map KL in closed form, a cache-sized block of maps at a time: what the CPU runs.

Plain torch operations on any device; never more than one block of the maps exists. Value and gradient come out of one
pass, so backward only multiplies; with reduction "none", where the upstream gradient is a number per row, backward
makes the pass again. Leaves checks to `attention_kl`.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dbscale.kernels.attention_arguments import MapPair
from dbscale.kernels.closed_forms import kl_of_maps, kl_of_scores
from dbscale.kernels.head_map import HeadPlan
from dbscale.kernels.kd_loss_eager import wide

ELEMENTS_PER_BLOCK = 1 << 18
"""Student map entries at a time: 1 MiB of float32."""


def total_kl_chunked(pair: MapPair, weight: Tensor) -> Tensor:
    """Σ weight · KL over all rows, a scalar; weight [B, M, N], no gradient."""
    heads = pair.heads
    want_grad = torch.is_grad_enabled() and (pair.q_s.requires_grad or pair.k_s.requires_grad)
    total, _, _, _ = _total_kl(
        pair.q_s, pair.k_s, pair.q_t, pair.k_t, heads.mixing, weight,
        pair.scale_s, pair.scale_t, heads.num_maps, heads.group_size, heads.repeats, want_grad,
    )  # fmt: skip
    return total


def kl_rows_chunked(pair: MapPair) -> Tensor:
    """KL(teacher map ‖ student map) of every row: [B, M, N]."""
    heads = pair.heads
    return _kl_rows(
        pair.q_s, pair.k_s, pair.q_t, pair.k_t, heads.mixing,
        pair.scale_s, pair.scale_t, heads.num_maps, heads.group_size, heads.repeats,
    )  # fmt: skip


@torch.library.custom_op("dbscale::attention_kl_total_chunked", mutates_args=())
def _total_kl(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mixing: Tensor | None, weight: Tensor,
    scale_s: float, scale_t: float, num_maps: int, group_size: int, repeats: int, want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    total, rows, grad_q, grad_k = outputs = _outputs(q_s, num_maps, want_grad)
    heads = HeadPlan(num_maps, group_size, repeats, mixing)
    if want_grad:
        grad_k.zero_()
    for images, tokens in _blocks(q_s):
        q, k = wide(q_s[images, :, tokens]) * scale_s, wide(k_s[images])
        scores_t = (wide(q_t[images, :, tokens]) * scale_t) @ wide(k_t[images]).mT
        block_weight = weight[images, :, tokens].to(q.dtype)
        kl, slope = _one_block(q @ k.mT, scores_t, heads, block_weight, want_grad)
        rows[images, :, tokens] = kl
        if slope is not None:
            grad_q[images, :, tokens] = (slope @ k).mul_(scale_s)
            grad_k[images] += slope.mT @ q
    total.copy_((rows * weight).sum())
    return outputs


def _outputs(q_s: Tensor, num_maps: int, want_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """total [], rows [B, M, N], grad_q and grad_k like q_s in the accumulating dtype."""
    dtype = torch.float64 if q_s.dtype == torch.float64 else torch.float32
    batch, _, num_tokens, _ = q_s.shape
    shape = q_s.shape if want_grad else (0,)
    return (
        q_s.new_empty((), dtype=dtype),
        q_s.new_empty((batch, num_maps, num_tokens), dtype=dtype),
        q_s.new_empty(shape, dtype=dtype),
        q_s.new_empty(shape, dtype=dtype),
    )


@_total_kl.register_fake
def _(q_s, k_s, q_t, k_t, mixing, weight, scale_s, scale_t, num_maps, group_size, repeats, want_grad):
    return _outputs(q_s, num_maps, want_grad)


def _setup_total(ctx, inputs, output) -> None:
    _, rows, grad_q, grad_k = output
    ctx.mark_non_differentiable(rows, grad_q, grad_k)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_q, grad_k)
    ctx.dtype = inputs[0].dtype


def _backward_total(ctx, upstream, *_unused):
    if upstream is None:
        return (None,) * 12
    return *((upstream * grad).to(ctx.dtype) for grad in ctx.saved_tensors), *(None,) * 10


_total_kl.register_autograd(_backward_total, setup_context=_setup_total)


@torch.library.custom_op("dbscale::attention_kl_rows_chunked", mutates_args=())
def _kl_rows(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mixing: Tensor | None,
    scale_s: float, scale_t: float, num_maps: int, group_size: int, repeats: int,
) -> Tensor:  # fmt: skip
    nothing = q_s.new_zeros(()).expand(q_s.shape[0], num_maps, q_s.shape[2])
    return _total_kl(
        q_s, k_s, q_t, k_t, mixing, nothing, scale_s, scale_t, num_maps, group_size, repeats, False
    )[1]  # fmt: skip


@_kl_rows.register_fake
def _(q_s, k_s, q_t, k_t, mixing, scale_s, scale_t, num_maps, group_size, repeats):
    return _outputs(q_s, num_maps, False)[1]


def _setup_rows(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]


def _backward_rows(ctx, upstream):
    q_s = ctx.saved_tensors[0]
    _, _, grad_q, grad_k = _total_kl(*ctx.saved_tensors, upstream, *ctx.numbers, True)
    return grad_q.to(q_s.dtype), grad_k.to(q_s.dtype), *(None,) * 8


_kl_rows.register_autograd(_backward_rows, setup_context=_setup_rows)


def _blocks(q_s: Tensor) -> Iterator[tuple[slice, slice]]:
    """(images, query tokens) of each block: several whole images where they are small, else rows of one."""
    batch, num_heads, num_tokens, _ = q_s.shape
    entries_per_image = max(num_heads * num_tokens * num_tokens, 1)
    images = max(1, ELEMENTS_PER_BLOCK // entries_per_image)
    tokens = num_tokens if entries_per_image <= ELEMENTS_PER_BLOCK else ELEMENTS_PER_BLOCK // (num_heads * num_tokens)
    for first_image in range(0, batch, images):
        for first_token in range(0, num_tokens, max(1, tokens)):
            yield slice(first_image, first_image + images), slice(first_token, first_token + max(1, tokens))


def _one_block(
    scores_s: Tensor, scores_t: Tensor, heads: HeadPlan, weight: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """KL rows [b, M, r] of a block, and the gradient in scores_s [b, H_s, r, N] of their weighted sum."""
    if heads.group_size == 1 and heads.mixing is None:
        per_teacher = (scores_t.shape[1], heads.repeats)
        found = kl_of_scores(scores_s.unflatten(1, per_teacher), scores_t.unsqueeze(2))
        kl = found.kl.squeeze(-1).flatten(1, 2)
        if not want_grad:
            return kl, None
        slope = found.p_s.sub_(found.p_t).flatten(1, 2)
        return kl, slope.mul_(weight[..., None])
    return _one_general_block(scores_s, scores_t, heads, weight, want_grad)


def _one_general_block(
    scores_s: Tensor, scores_t: Tensor, heads: HeadPlan, weight: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    log_p = scores_s.log_softmax(-1).unflatten(1, (heads.num_maps, heads.group_size))
    log_mean = log_p.logsumexp(2, keepdim=True) - math.log(heads.group_size)
    p_t = _mixture(scores_t.softmax(-1), heads)
    mean = log_mean.exp()
    kl = kl_of_maps(mean.squeeze(2), log_mean.squeeze(2), p_t).squeeze(-1)
    if not want_grad:
        return kl, None
    # share = p_h/(G·mean) ≤ 1 is head h's part in the mean; dKL/dz_h = p_h·Σ_j(p_t share) − p_t share.
    pull = (log_p - log_mean).exp_().div_(heads.group_size).mul_(p_t.unsqueeze(2))
    slope = log_p.exp().mul_(pull.sum(-1, keepdim=True)).sub_(pull)
    return kl, slope.mul_(weight[:, :, None, :, None]).flatten(1, 2)


def _mixture(p_t: Tensor, heads: HeadPlan) -> Tensor:
    if heads.mixing is None:
        return p_t.repeat_interleave(heads.repeats, dim=1)
    return (heads.mixing.to(p_t.dtype) @ p_t.flatten(2)).unflatten(2, p_t.shape[2:])
