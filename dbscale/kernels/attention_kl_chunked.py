"""Attention-map KL in closed form, a cache-sized block of maps at a time: what the CPU runs.

Plain torch operations on any device; never more than one block of the maps exists. Value and gradient come out of one
pass, so backward only multiplies, and the attention output shares that pass. With reduction "none", where the upstream
gradient is a number per row, backward makes the pass again. Leaves checks to `attention_kl`.
"""

import torch
from torch import Tensor

from dbscale.kernels.attention_arguments import MapPair
from dbscale.kernels.attention_blocks import attention_gradients, blocks, kl_block
from dbscale.kernels.head_map import HeadPlan
from dbscale.kernels.kd_loss_eager import wide


def total_kl_chunked(pair: MapPair, weight: Tensor) -> Tensor:
    """Σ weight · KL over all rows, a scalar; weight [B, M, N], no gradient."""
    return _call_total(pair, None, weight)[0]


def out_and_total_kl_chunked(pair: MapPair, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Attention output and Σ weight · KL; all tokens are compared."""
    total, out, *_ = _call_total(pair, v, weight)
    return out, total


def kl_rows_chunked(pair: MapPair) -> Tensor:
    """KL(teacher map ‖ student map) of every row: [B, M, N]."""
    heads = pair.heads
    return _kl_rows(
        pair.q_s, pair.k_s, pair.q_t, pair.k_t, heads.mixing,
        pair.scale_s, pair.scale_t, heads.num_maps, heads.group_size, heads.repeats,
    )  # fmt: skip


def _call_total(pair: MapPair, v: Tensor | None, weight: Tensor) -> tuple[Tensor, ...]:
    heads = pair.heads
    want_grad = torch.is_grad_enabled() and (pair.q_s.requires_grad or pair.k_s.requires_grad)
    return _total_kl(
        pair.q_s, pair.k_s, v, pair.q_t, pair.k_t, heads.mixing, weight,
        pair.scale_s, pair.scale_t, heads.num_maps, heads.group_size, heads.repeats, want_grad,
    )  # fmt: skip


@torch.library.custom_op("dbscale::attention_kl_total_chunked", mutates_args=())
def _total_kl(
    q_s: Tensor, k_s: Tensor, v: Tensor | None, q_t: Tensor, k_t: Tensor, mixing: Tensor | None, weight: Tensor,
    scale_s: float, scale_t: float, num_maps: int, group_size: int, repeats: int, want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    total, out, rows, grad_q, grad_k = outputs = _outputs(q_s, v, num_maps, want_grad)
    heads = HeadPlan(num_maps, group_size, repeats, mixing)
    if want_grad:
        grad_k.zero_()
    for images, tokens in blocks(q_s):
        q, k = wide(q_s[images, :, tokens]) * scale_s, wide(k_s[images])
        scores_t = (wide(q_t[images, :, tokens]) * scale_t) @ wide(k_t[images]).mT
        kl, p_s, slope = kl_block(q @ k.mT, scores_t, heads, want_grad)
        rows[images, :, tokens] = kl
        if v is not None:
            out[images, :, tokens] = p_s @ wide(v[images])
        if slope is not None:
            row_weight = weight[images, :, tokens, None].to(q.dtype).repeat_interleave(group_size, 1)
            grad_q[images, :, tokens] = (slope @ k).mul_(row_weight * scale_s)
            grad_k[images] += slope.mT @ q.mul_(row_weight)
    total.copy_((rows * weight).sum())
    return outputs


def _outputs(
    q_s: Tensor, v: Tensor | None, num_maps: int, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total [], out like v, rows [B, M, N], grad_q and grad_k like q_s in the accumulating dtype."""
    dtype = torch.float64 if q_s.dtype == torch.float64 else torch.float32
    batch, num_heads, num_tokens, _ = q_s.shape
    out_shape = (0,) if v is None else (batch, num_heads, num_tokens, v.shape[3])
    grad_shape = q_s.shape if want_grad else (0,)
    return (
        q_s.new_empty((), dtype=dtype),
        q_s.new_empty(out_shape),
        q_s.new_empty((batch, num_maps, num_tokens), dtype=dtype),
        q_s.new_empty(grad_shape, dtype=dtype),
        q_s.new_empty(grad_shape, dtype=dtype),
    )


@_total_kl.register_fake
def _(q_s, k_s, v, q_t, k_t, mixing, weight, scale_s, scale_t, num_maps, group_size, repeats, want_grad):
    return _outputs(q_s, v, num_maps, want_grad)


@torch.library.custom_op("dbscale::attention_gradients_chunked", mutates_args=())
def _attention_gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_gradients(grad_out, q, k, v, out, scale)


@_attention_gradients.register_fake
def _(grad_out, q, k, v, out, scale):
    return tuple(torch.empty_like(wide(each), memory_format=torch.contiguous_format) for each in (q, k, v))


def _setup_total(ctx, inputs, output) -> None:
    q, k, v, *_ = inputs
    _, out, rows, grad_q, grad_k = output
    ctx.mark_non_differentiable(rows, grad_q, grad_k)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_q, grad_k, *((q, k, v, out) if v is not None else ()))
    ctx.scale = inputs[7]
    ctx.dtype = q.dtype


def _backward_total(ctx, upstream, grad_out, *_unused):
    kl_q, kl_k, *attention = ctx.saved_tensors
    grads: list[Tensor | None] = [None, None, None]
    if upstream is not None:
        grads[:2] = upstream * kl_q, upstream * kl_k
    if grad_out is not None and attention:
        found = _attention_gradients(grad_out, *attention, ctx.scale)
        grads = [new if old is None else old + new for old, new in zip(grads, found, strict=True)]
    return *(None if each is None else each.to(ctx.dtype) for each in grads), *(None,) * 10


_total_kl.register_autograd(_backward_total, setup_context=_setup_total)


@torch.library.custom_op("dbscale::attention_kl_rows_chunked", mutates_args=())
def _kl_rows(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mixing: Tensor | None,
    scale_s: float, scale_t: float, num_maps: int, group_size: int, repeats: int,
) -> Tensor:  # fmt: skip
    nothing = q_s.new_zeros(()).expand(q_s.shape[0], num_maps, q_s.shape[2])
    numbers = (scale_s, scale_t, num_maps, group_size, repeats)
    return _total_kl(q_s, k_s, None, q_t, k_t, mixing, nothing, *numbers, False)[2]


@_kl_rows.register_fake
def _(q_s, k_s, q_t, k_t, mixing, scale_s, scale_t, num_maps, group_size, repeats):
    return _outputs(q_s, None, num_maps, False)[2]


def _setup_rows(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]


def _backward_rows(ctx, upstream):
    q_s, k_s, q_t, k_t, mixing = ctx.saved_tensors
    grad_q, grad_k = _total_kl(q_s, k_s, None, q_t, k_t, mixing, upstream, *ctx.numbers, True)[3:]
    return grad_q.to(q_s.dtype), grad_k.to(q_s.dtype), *(None,) * 8


_kl_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
