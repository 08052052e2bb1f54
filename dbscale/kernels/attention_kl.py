"""KL between attention maps of a teacher and a student; alone, or together with the attention output.

The public functions check, slice, choose the implementation, weigh and reduce. The mathematics is in
`attention_kl_eager` (textbook, maps written out) and `attention_kl_triton` (fused kernels, no map in memory). Knows
nothing of models; `timm_attention` does.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dbscale.kernels.attention_kl_eager import (
    HeadMap,
    MapPair,
    TokenSlice,
    as_autocast,
    kl_rows_eager,
    make_map_pair,
    out_and_kl_rows_eager,
)
from dbscale.kernels.kd_loss import resolve_backend

REDUCTIONS = ("batchmean", "sum", "none")


class AttentionWithKL(NamedTuple):
    """What `sdpa_with_attention_kl` returns."""

    out: Tensor
    """Attention output [B, H_s, N, d_v], as scaled_dot_product_attention gives it."""
    kl: Tensor
    """The reduced KL, at least float32."""


def attention_kl(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor,
    *,
    scale_s: float | None = None,
    scale_t: float | None = None,
    head_map: HeadMap = "repeat",
    token_slice: TokenSlice = None,
    row_weight: Tensor | None = None,
    reduction: str = "batchmean",
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """KL(teacher map ‖ student map), where a map's row i is softmax_j(scale · q_i·k_j) over the keys.

    Shapes: q_s, k_s [B, H_s, N, d_s]; q_t, k_t [B, H_t, N_t, d_t]; any strides; as many tokens in both once sliced.
    Teacher tensors get no gradient. `scale_*` default to d**-0.5. `head_map` ("repeat", "mean" or a mixing matrix,
    see `attention_kl_eager.plan_heads`) says how heads are joined and so how many maps M are compared: H_s, or
    gcd(H_s, H_t) for "mean". `token_slice` restricts queries and keys alike; the rows are softmaxes over the kept keys.
    `row_weight` multiplies the rows: [N], [B, N] or [B, M, N], counted after slicing; it gets no gradient.
    `reduction`: "batchmean" is the sum of the weighted rows / (B·M·N), "sum" their sum, "none" the rows [B, M, N].
    A mixing matrix has no kernel: it runs eager. The result is float32 (float64 for float64 inputs).

    Raises ValueError for shapes, head counts, names or backends that do not fit. Source: the self-attention
    distribution transfer of MiniLM (2002.10957, eq. 5).
    """
    pair = make_map_pair(
        "attention_kl", q_s, k_s, q_t, k_t,
        scale_s=scale_s, scale_t=scale_t, head_map=head_map, token_slice=token_slice,
    )  # fmt: skip
    mixes_heads = pair.heads.mixing is not None
    chosen = attention_backend(backend, q_s.device.type, mixes_heads=mixes_heads, function="attention_kl")
    weight = _row_weight(row_weight, pair, reduction)
    with torch.autocast(q_s.device.type, enabled=False):
        return _reduce(_implementation(chosen)[0](pair.sliced()), weight, reduction)


def sdpa_with_attention_kl(
    q: Tensor, k: Tensor, v: Tensor, q_t: Tensor, k_t: Tensor,
    *,
    scale_s: float | None = None,
    scale_t: float | None = None,
    head_map: HeadMap = "repeat",
    token_slice: TokenSlice = None,
    row_weight: Tensor | None = None,
    reduction: str = "batchmean",
    backend: str = "auto",
) -> AttentionWithKL:  # fmt: skip
    """The student's attention output and the KL of its maps to the teacher's, from one set of scores.

    `out` [B, H_s, N, d_v] equals `scaled_dot_product_attention(q, k, v, scale=scale_s)`, over all tokens whatever
    `token_slice` is; `kl` is that of `attention_kl` with the same arguments. Gradients flow to q, k and v. Raises as
    `attention_kl` does.
    """
    name = "sdpa_with_attention_kl"
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{name}: v has shape {list(v.shape)}, k {list(k.shape)}; all but the width must agree")
    pair = make_map_pair(
        name, q, k, q_t, k_t, scale_s=scale_s, scale_t=scale_t, head_map=head_map, token_slice=token_slice
    )
    chosen = attention_backend(backend, q.device.type, mixes_heads=pair.heads.mixing is not None)
    weight = _row_weight(row_weight, pair, reduction)
    v = as_autocast(v)
    with torch.autocast(q.device.type, enabled=False):
        out, rows = _implementation(chosen)[1](pair, v)
        return AttentionWithKL(out, _reduce(rows, weight, reduction))


def attention_backend(
    backend: str, device_type: str, *, mixes_heads: bool, function: str = "sdpa_with_attention_kl"
) -> str:
    """As `resolve_backend`, for the two functions here: a mixing matrix has no kernel and runs eager."""
    chosen = resolve_backend(backend, function, device_type)
    return "eager" if chosen == "triton" and mixes_heads else chosen


@cache
def _implementation(backend: str) -> tuple[Callable[[MapPair], Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """(KL rows, output and KL rows)."""
    if backend == "triton":
        from dbscale.kernels.attention_kl_triton import kl_rows_triton, out_and_kl_rows_triton

        return kl_rows_triton, out_and_kl_rows_triton
    if backend == "compile":
        return torch.compile(kl_rows_eager), torch.compile(out_and_kl_rows_eager)
    return kl_rows_eager, out_and_kl_rows_eager


def _reduce(rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        rows = rows * weight.to(rows.dtype)
    if reduction == "none":
        return rows
    return rows.sum() / (max(rows.numel(), 1) if reduction == "batchmean" else 1)


def _row_weight(row_weight: Tensor | None, pair: MapPair, reduction: str) -> Tensor | None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"attention KL: unknown reduction {reduction!r}; use one of {', '.join(REDUCTIONS)}")
    if row_weight is None:
        return None
    batch, num_maps, num_rows = pair.rows_shape
    if row_weight.shape not in ((num_rows,), (batch, num_rows), (batch, num_maps, num_rows)):
        raise ValueError(
            f"attention KL: row_weight has shape {list(row_weight.shape)}; expected [{num_rows}], "
            f"[{batch}, {num_rows}] or [{batch}, {num_maps}, {num_rows}]"
        )
    weight = row_weight.detach()
    return (weight[:, None] if weight.ndim == 2 else weight).expand(pair.rows_shape)
