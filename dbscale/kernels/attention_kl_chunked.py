"""Attention-map KL in closed form, a cache-sized block of maps at a time: what the CPU runs.

Plain torch operations on any device; never more than one block of the maps exists. With the attention output, or where
every row has an upstream gradient of its own, backward makes the maps anew (short ones, which are no larger than q, k
and v, are kept); a reduced KL alone finds value and gradient in one pass, and its backward only multiplies. Leaves
checks and reductions to `attention_kl`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dbscale.kernels.attention_arguments import MapPair
from dbscale.kernels.attention_blocks import blocks, kl_block, multiply_into, packed, slope_block, uniform_weight
from dbscale.kernels.closed_forms import may_hold
from dbscale.kernels.head_map import HeadPlan
from dbscale.kernels.kd_loss_eager import wide

SHORT = 2
"""Maps of up to so many times as many tokens as a head is wide are kept for backward: they cost about what q and k do."""


def total_kl_chunked(pair: MapPair, weight: Tensor) -> Tensor:
    """Σ weight · KL over all rows, a scalar; weight [B, M, N], no gradient."""
    want_grad = torch.is_grad_enabled() and (pair.q_s.requires_grad or pair.k_s.requires_grad)
    operator = _total_kl if torch.compiler.is_compiling() else _DirectTotal.apply
    return operator(*_operands(pair), weight, *_numbers(pair), want_grad)[0]


def kl_rows_chunked(pair: MapPair) -> Tensor:
    """KL(teacher map ‖ student map) of every row: [B, M, N]."""
    return _attend(pair, None)[1]


def out_and_kl_rows_chunked(pair: MapPair, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention output [B, H_s, N, d_v] and the KL rows; all tokens are compared."""
    return _attend(pair, v)


def _attend(pair: MapPair, v: Tensor | None) -> tuple[Tensor, Tensor]:
    operator = _attention if torch.compiler.is_compiling() else _DirectAttention.apply
    return operator(*_operands(pair), v, *_numbers(pair))


def _operands(pair: MapPair) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return pair.q_s, pair.k_s, pair.q_t, pair.k_t, pair.heads.mixing


def _numbers(pair: MapPair) -> tuple[float, float, int, int, int]:
    return pair.scale_s, pair.scale_t, pair.heads.num_maps, pair.heads.group_size, pair.heads.repeats


def _scores_t(q_t: Tensor, k_t: Tensor, images: slice, tokens: slice, scale_t: float) -> Tensor:
    return packed(q_t[images, :, tokens], scale_t) @ packed(k_t[images]).mT


def _accumulating(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# A reduced KL alone


def _total_forward(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mixing: Tensor | None, weight: Tensor,
    scale_s: float, scale_t: float, num_maps: int, group_size: int, repeats: int, want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    total, grad_q, grad_k = _total_outputs(q_s, want_grad)
    rows = total.new_empty(weight.shape)
    uniform = uniform_weight(weight)
    for images, tokens in blocks(q_s):
        q, k = packed(q_s[images, :, tokens], scale_s), packed(k_s[images])
        scores_t = _scores_t(q_t, k_t, images, tokens, scale_t)
        heads = HeadPlan(num_maps, group_size, repeats, mixing)
        rows[images, :, tokens], _, slope = kl_block(q @ k.mT, scores_t, heads, want_grad)
        if slope is not None and uniform is not None:
            multiply_into(grad_q[images, :, tokens], slope, k, uniform * scale_s)
            _add_over_tokens(grad_k, slope.mT, q, images, tokens, uniform)
        elif slope is not None:
            row_weight = weight[images, :, tokens, None].to(q.dtype).repeat_interleave(group_size, 1)
            multiply_into(grad_q[images, :, tokens], slope, k).mul_(row_weight * scale_s)
            _add_over_tokens(grad_k, slope.mT, q.mul_(row_weight), images, tokens)
    total.copy_((rows * weight).sum())
    return total, grad_q, grad_k


def _add_over_tokens(
    total: Tensor, left: Tensor, right: Tensor, images: slice, tokens: slice, factor: float = 1.0
) -> None:
    """total[images] += factor · left @ right, where the first block of an image's tokens finds nothing there yet."""
    if tokens.start == 0:
        multiply_into(total[images], left, right, factor)
    else:
        total[images].add_(left @ right, alpha=factor)


_total_kl = torch.library.custom_op("dbscale::attention_kl_total_chunked", _total_forward, mutates_args=())


def _total_outputs(q_s: Tensor, want_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """total [], grad_q and grad_k like q_s, in the accumulating dtype."""
    grad_shape = q_s.shape if want_grad else (0,)
    total, grad_q, grad_k = (q_s.new_empty(shape, dtype=_accumulating(q_s)) for shape in ((), grad_shape, grad_shape))
    return total, grad_q, grad_k


@_total_kl.register_fake
def _(q_s, k_s, q_t, k_t, mixing, weight, scale_s, scale_t, num_maps, group_size, repeats, want_grad):
    return _total_outputs(q_s, want_grad)


def _setup_total(ctx, inputs, output) -> None:
    _, grad_q, grad_k = output
    ctx.mark_non_differentiable(grad_q, grad_k)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_q, grad_k)
    ctx.dtype = inputs[0].dtype


def _backward_total(ctx, upstream, *_unused):
    grads = (None, None) if upstream is None else ((upstream * each).to(ctx.dtype) for each in ctx.saved_tensors)
    return *grads, *(None,) * 10


_total_kl.register_autograd(_backward_total, setup_context=_setup_total)


class _DirectTotal(torch.autograd.Function):
    """`_total_kl` without the dispatcher, which is written in Python; see `kd_loss_chunked`."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _total_forward(*inputs)
        _setup_total(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstreams):  # pyright: ignore[reportIncompatibleMethodOverride]
        upstream, *_ = upstreams
        grad_q, grad_k = ctx.saved_tensors
        if upstream is not None and grad_q.dtype == ctx.dtype and not may_hold(upstream != 1):
            return grad_q, grad_k, *(None,) * 10
        return _backward_total(ctx, upstream)


# Output and KL rows, or KL rows alone


def _attention_forward(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mixing: Tensor | None, v: Tensor | None,
    scale_s: float, scale_t: float, num_maps: int, group_size: int, repeats: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _attend_blocks(
        None, q_s, k_s, q_t, k_t, v, scale_s, scale_t, HeadPlan(num_maps, group_size, repeats, mixing)
    )


def _attend_blocks(
    keep: list[Tensor] | None, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, v: Tensor | None,
    scale_s: float, scale_t: float, heads: HeadPlan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and KL rows; where asked, each block's maps and the KL's gradient in its scores are appended to `keep`."""
    out, rows = _attention_outputs(q_s, v, heads.num_maps)
    for images, tokens in blocks(q_s):
        scores_s = packed(q_s[images, :, tokens], scale_s) @ packed(k_s[images]).mT
        scores_t = _scores_t(q_t, k_t, images, tokens, scale_t)
        rows[images, :, tokens], p_s, slope = kl_block(scores_s, scores_t, heads, keep is not None)
        if v is not None:
            multiply_into(out[images, :, tokens], p_s, packed(v[images]))
        if keep is not None and slope is not None:
            keep += p_s, slope
    return out, rows


_attention = torch.library.custom_op("dbscale::attention_kl_chunked", _attention_forward, mutates_args=())


def _attention_outputs(q_s: Tensor, v: Tensor | None, num_maps: int) -> tuple[Tensor, Tensor]:
    batch, num_heads, num_tokens, _ = q_s.shape
    out_shape = (0,) if v is None else (batch, num_heads, num_tokens, v.shape[3])
    return q_s.new_empty(out_shape), q_s.new_empty((batch, num_maps, num_tokens), dtype=_accumulating(q_s))


@_attention.register_fake
def _(q_s, k_s, q_t, k_t, mixing, v, scale_s, scale_t, num_maps, group_size, repeats):
    return _attention_outputs(q_s, v, num_maps)


def _gradients_forward(
    grad_out: Tensor | None, upstream: Tensor | None, out: Tensor,
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mixing: Tensor | None, v: Tensor | None,
    scale_s: float, scale_t: float, num_maps: int, group_size: int, repeats: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    heads = HeadPlan(num_maps, group_size, repeats, mixing)
    return _gradients_of_blocks([], grad_out, upstream, out, q_s, k_s, q_t, k_t, v, scale_s, scale_t, heads)


def _gradients_of_blocks(
    kept: Sequence[Tensor], grad_out: Tensor | None, upstream: Tensor | None, out: Tensor,
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, v: Tensor | None,
    scale_s: float, scale_t: float, heads: HeadPlan,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients in q, k and v; `kept` is what `_attend_blocks` appended, or empty: then the maps are made anew."""
    grad_q, grad_k, grad_v = grads = _gradient_outputs(q_s, v)
    uniform = None if upstream is None else uniform_weight(upstream)
    kept_of_block = zip(kept[::2], kept[1::2], strict=True)
    for images, tokens in blocks(q_s):
        q, k = packed(q_s[images, :, tokens], scale_s), packed(k_s[images])
        if kept:
            p_s, slope = next(kept_of_block)
        else:
            p_s, slope = slope_block(q @ k.mT, _scores_t(q_t, k_t, images, tokens, scale_t), heads)
        factor = uniform if upstream is None or uniform is not None else _per_head(upstream[images, :, tokens], heads)
        if grad_out is not None and v is not None:
            grad_rows = packed(grad_out[images, :, tokens])
            _add_over_tokens(grad_v, p_s.mT, grad_rows, images, tokens)
            pull = (grad_rows * wide(out[images, :, tokens])).sum(-1, keepdim=True)
            through_out = (grad_rows @ packed(v[images]).mT).sub_(pull).mul_(p_s)
            if isinstance(factor, Tensor):
                through_out.addcmul_(slope, factor)
            elif factor is not None:
                through_out.add_(slope, alpha=factor)
            slope = through_out
        else:
            assert factor is not None
            slope = slope * factor
        multiply_into(grad_q[images, :, tokens], slope, k, scale_s)
        _add_over_tokens(grad_k, slope.mT, q, images, tokens)
    return grads


def _per_head(rows: Tensor, heads: HeadPlan) -> Tensor:
    """[b, M, r] as a factor of [b, H_s, r, N]."""
    return wide(rows)[..., None].repeat_interleave(heads.group_size, 1)


_gradients = torch.library.custom_op("dbscale::attention_gradients_chunked", _gradients_forward, mutates_args=())


def _gradient_outputs(q_s: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Like q_s, q_s and v, contiguous, in the accumulating dtype."""
    dtype, v_shape = _accumulating(q_s), (0,) if v is None else v.shape
    grad_q, grad_k, grad_v = (q_s.new_empty(shape, dtype=dtype) for shape in (q_s.shape, q_s.shape, v_shape))
    return grad_q, grad_k, grad_v


@_gradients.register_fake
def _(grad_out, upstream, out, q_s, k_s, q_t, k_t, mixing, v, scale_s, scale_t, num_maps, group_size, repeats):
    return _gradient_outputs(q_s, v)


def _setup_attention(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], *inputs[:6])
    ctx.numbers = inputs[6:]


def _backward_attention(ctx, grad_out, upstream):
    out, *operands = ctx.saved_tensors
    grad_out = None if operands[-1] is None else grad_out
    if grad_out is None and upstream is None:
        return (None,) * 11
    return _as_inputs(_gradients(grad_out, upstream, out, *operands, *ctx.numbers), operands[0].dtype, grad_out)


def _as_inputs(grads: Iterable[Tensor], dtype: torch.dtype, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_q, grad_k, grad_v = (each.to(dtype) for each in grads)
    return grad_q, grad_k, None, None, None, (None if grad_out is None else grad_v), *(None,) * 5


_attention.register_autograd(_backward_attention, setup_context=_setup_attention)


class _DirectAttention(torch.autograd.Function):
    """`_attention` without the dispatcher, which is written in Python (see `kd_loss_chunked`); keeps short maps."""

    @staticmethod
    def forward(ctx, q_s, k_s, q_t, k_t, mixing, v, scale_s, scale_t, *heads):
        is_short = q_s.shape[2] <= SHORT * q_s.shape[3]
        kept = list[Tensor]() if is_short and any(ctx.needs_input_grad) else None
        ctx.numbers = scale_s, scale_t, HeadPlan(*heads, mixing=mixing)
        out, rows = _attend_blocks(kept, q_s, k_s, q_t, k_t, v, *ctx.numbers)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, q_s, k_s, q_t, k_t, v, *(kept or ()))
        return out, rows

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstreams):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_out, upstream = upstreams
        out, q_s, k_s, q_t, k_t, v, *kept = ctx.saved_tensors
        grad_out = None if v is None else grad_out
        if grad_out is None and upstream is None:
            return (None,) * 11
        grads = _gradients_of_blocks(kept, grad_out, upstream, out, q_s, k_s, q_t, k_t, v, *ctx.numbers)
        return _as_inputs(grads, q_s.dtype, grad_out)
