"""Attention output and KL by the fused kernels, as torch operators with their gradients.

Head maps that give each student head one teacher head run in one kernel, alone or together with the output. Averaged
or mixed heads have no kernel: their KL runs on the backend `chunked`, their output on torch's fused attention.
For backward only inputs, output and row statistics are kept. Leaves checks, slices and reduction to `attention_kl`.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from dbscale.kernels.attention_arguments import MapPair
from dbscale.kernels.attention_kl_backward import keys_kernel, queries_kernel, row_dot_kernel
from dbscale.kernels.attention_kl_chunked import kl_rows_chunked
from dbscale.kernels.attention_kl_forward import forward_kernel

MANY_HEADS = 256
"""From so many (image, head) pairs on, one program per pair fills an H100 twice over."""
SHORT_SEQUENCE = 1024


def kl_rows_triton(pair: MapPair) -> Tensor:
    """KL(teacher map ‖ student map) of every row: [B, M, N]."""
    if not is_paired(pair):
        return kl_rows_chunked(pair)
    return _attention(_supported(pair), None)[1]


def out_and_kl_rows_triton(pair: MapPair, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention output [B, H_s, N, d_v] over all tokens and the KL rows of the sliced maps."""
    if is_paired(pair) and pair.rows_shape[2] == pair.q_s.shape[2]:
        out, rows, _ = _attention(_supported(pair), unit_stride(v))
        return out, rows
    out = F.scaled_dot_product_attention(pair.q_s, pair.k_s, v, scale=pair.scale_s)
    return out, kl_rows_triton(pair.sliced())


def is_paired(pair: MapPair) -> bool:
    """Whether each student head is compared with one teacher head, which is what the kernels serve."""
    return pair.heads.group_size == 1 and pair.heads.mixing is None


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its width is not the contiguous axis, as the kernels read it."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _supported(pair: MapPair) -> MapPair:
    if torch.float64 in (pair.q_s.dtype, pair.q_t.dtype):
        raise ValueError("attention KL: backend='triton' accumulates in float32; use backend='chunked' for float64")
    q_s, k_s, q_t, k_t = (unit_stride(each) for each in (pair.q_s, pair.k_s, pair.q_t, pair.k_t))
    return MapPair(q_s, k_s, q_t, k_t, pair.scale_s, pair.scale_t, pair.heads, pair.slice_s)


def _attention(pair: MapPair, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(pair.q_s, pair.k_s, v, pair.q_t, pair.k_t, pair.scale_s, pair.scale_t, pair.heads.repeats)


def padded(width: int) -> int:
    """The tile width of a head width: a power of two, at least the 16 that a tensor core takes."""
    return max(triton.next_power_of_2(width), 16)


def tile_shape(dtype: torch.dtype, width_s: int, width_v: int, width_t: int, *, backward: bool) -> dict[str, int]:
    """Rows and keys per tile and the warps that hold them: the largest found that fit a Hopper's registers unspilled.

    `tests/kernels/test_compile_gate.py` compiles them for sm_90 and holds them to it (float32 up to width 64).
    """
    narrow, widest = padded(min(width_s, width_v)), padded(max(width_s, width_v, width_t))
    rows, keys, warps, stages = 64, 64, 4, 2
    if dtype == torch.float32:  # no tensor cores at full precision: every thread holds whole rows
        rows, keys, warps, stages = 32 if backward and widest <= 64 else 16, 16, 4 if widest == 64 else 8, 1
    elif backward:
        rows, keys, warps = (32, 64, 8) if widest > 64 else (32, 64, 4) if narrow >= 64 else (32, 32, 4)
    elif widest > 64:
        warps = 8
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def widths_of(q_s: Tensor, v: Tensor, q_t: Tensor) -> dict[str, int]:
    """The compile-time widths of the kernels: D as it is, P as it is padded."""
    sizes = {"S": q_s.shape[3], "V": v.shape[3], "T": q_t.shape[3]}
    return {f"D_{key}": size for key, size in sizes.items()} | {f"P_{key}": padded(size) for key, size in sizes.items()}


def strided(tensor: Tensor) -> tuple:
    """(tensor, strides but the last), as `load_rows` takes it."""
    return tensor, *tensor.stride()[:3]


def _empty_like(tensor: Tensor, width: int | None = None) -> Tensor:
    """[B, H, N, width], stored as [B, N, H, width]: the layout in which heads are joined without a copy."""
    batch, num_heads, num_tokens, own_width = tensor.shape
    return tensor.new_empty((batch, num_tokens, num_heads, own_width if width is None else width)).transpose(1, 2)


def _forward_outputs(q_s: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    out = q_s.new_empty(0) if v is None else _empty_like(v)
    rows_shape = q_s.shape[:3]
    return (
        out,
        q_s.new_empty(rows_shape, dtype=torch.float32),
        q_s.new_empty((4, *rows_shape), dtype=torch.float32),
    )


@torch.library.custom_op("dbscale::attention_kl_triton", mutates_args=())
def _forward(
    q_s: Tensor, k_s: Tensor, v: Tensor | None, q_t: Tensor, k_t: Tensor, scale_s: float, scale_t: float, repeats: int
) -> tuple[Tensor, Tensor, Tensor]:
    out, kl_rows, statistics = outputs = _forward_outputs(q_s, v)
    batch, num_heads, num_tokens, _ = q_s.shape
    values, out_or_unused = (q_s, q_s) if v is None else (v, out)
    shape = tile_shape(q_s.dtype, q_s.shape[3], values.shape[3], q_t.shape[3], backward=False)
    if kl_rows.numel():
        # One axis, blocks of a head side by side: the others end at 65,535, and neighbours share keys in the cache.
        forward_kernel[(triton.cdiv(num_tokens, shape["BLOCK_M"]) * batch * num_heads,)](
            strided(q_s), strided(k_s), strided(values), strided(q_t), strided(k_t), strided(out_or_unused),
            kl_rows, statistics, num_heads, num_tokens, repeats, scale_s, scale_t,
            HAS_OUT=v is not None, HAS_KL=True, **widths_of(q_s, values, q_t), **shape,
        )  # fmt: skip
    return outputs


@_forward.register_fake
def _(q_s, k_s, v, q_t, k_t, scale_s, scale_t, repeats):
    return _forward_outputs(q_s, v)


def _gradient_outputs(q_s: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q_s), _empty_like(q_s), q_s.new_empty(0) if v is None else _empty_like(v)


@torch.library.custom_op("dbscale::attention_kl_triton_backward", mutates_args=())
def _gradients(
    grad_out: Tensor | None, upstream: Tensor | None, q_s: Tensor, k_s: Tensor, v: Tensor | None, q_t: Tensor,
    k_t: Tensor, out: Tensor, statistics: Tensor, scale_s: float, scale_t: float, repeats: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_q, grad_k, grad_v = grads = _gradient_outputs(q_s, v)
    batch, num_heads, num_tokens, _ = q_s.shape
    values = q_s if v is None else v
    widths = widths_of(q_s, values, q_t)
    shape = tile_shape(q_s.dtype, q_s.shape[3], values.shape[3], q_t.shape[3], backward=True)
    has_out, has_kl = grad_out is not None, upstream is not None
    if not statistics.numel():
        return grads
    grad_rows = q_s if grad_out is None else unit_stride(grad_out)
    weights = statistics[0] if upstream is None else upstream
    pulls = torch.empty_like(statistics[0]) if has_out else statistics
    if has_out:
        row_dot_kernel[(triton.cdiv(num_tokens, 64) * batch * num_heads,)](
            strided(out), strided(grad_rows), pulls, num_heads, num_tokens,
            D_V=widths["D_V"], P_V=widths["P_V"], BLOCK_M=64,
        )  # fmt: skip
    operands = (
        *map(strided, (q_s, k_s, values, q_t, k_t, grad_rows)), statistics, pulls, (weights, *weights.stride()),
    )  # fmt: skip
    numbers = (num_heads, num_tokens, repeats, scale_s, scale_t)
    whole_head = batch * num_heads >= MANY_HEADS and num_tokens <= SHORT_SEQUENCE
    one_block = num_tokens <= shape["BLOCK_N"]
    partial_q = grad_q if one_block or not whole_head else torch.empty_like(grad_q, dtype=torch.float32)
    grad_v_or_unused = grad_k if v is None else grad_v
    keys_kernel[(batch * num_heads, 1 if whole_head else triton.cdiv(num_tokens, shape["BLOCK_N"]))](
        *operands, *map(strided, (grad_q, grad_k, grad_v_or_unused, partial_q)), *numbers,
        HAS_OUT=has_out, HAS_KL=has_kl, WHOLE_HEAD=whole_head, **widths, **shape,
    )  # fmt: skip
    if not whole_head:
        queries_kernel[(batch * num_heads, triton.cdiv(num_tokens, shape["BLOCK_M"]))](
            *operands, strided(grad_q), *numbers, HAS_OUT=has_out, HAS_KL=has_kl, **widths, **shape,
        )  # fmt: skip
    return grads


@_gradients.register_fake
def _(grad_out, upstream, q_s, k_s, v, q_t, k_t, out, statistics, scale_s, scale_t, repeats):
    return _gradient_outputs(q_s, v)


def _setup_context(ctx, inputs, output) -> None:
    q_s, k_s, v, q_t, k_t, *numbers = inputs
    out, _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.has_v = v is not None
    ctx.save_for_backward(q_s, k_s, q_t, k_t, out, statistics, *([v] if ctx.has_v else []))
    ctx.numbers = numbers


def _backward(ctx, grad_out, upstream, _statistics):
    q_s, k_s, q_t, k_t, out, statistics, *values = ctx.saved_tensors
    v = values[0] if ctx.has_v else None
    if v is None:
        grad_out = None
    if grad_out is None and upstream is None:
        return (None,) * 8
    grad_q, grad_k, grad_v = _gradients(
        grad_out, upstream, q_s, k_s, v, q_t, k_t, out, statistics, *ctx.numbers
    )  # fmt: skip
    return grad_q, grad_k, (grad_v if grad_out is not None else None), *(None,) * 5


_forward.register_autograd(_backward, setup_context=_setup_context)
