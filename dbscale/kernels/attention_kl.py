"""KL between attention maps of a teacher and a student, without the maps; alone, or together with the output.

The public functions: they check, slice, choose the backend and reduce. The mathematics is in `attention_kl_eager`
(textbook), `attention_kl_sdpa` (identity), `attention_kl_chunked` (closed forms in blocks) and `attention_kl_triton`
(fused kernels). Knows nothing of models; `timm_attention` does.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dbscale.kernels.attention_arguments import MapPair, TokenSlice, as_autocast, make_map_pair
from dbscale.kernels.attention_kl_chunked import kl_rows_chunked, out_and_kl_rows_chunked, total_kl_chunked
from dbscale.kernels.attention_kl_eager import kl_rows_eager, out_and_kl_rows_eager
from dbscale.kernels.attention_kl_sdpa import kl_rows_sdpa
from dbscale.kernels.backend import resolve_backend
from dbscale.kernels.head_map import HeadMap
from dbscale.kernels.kd_loss_eager import wide

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
    see `head_map.plan_heads`) says how heads are joined and so how many maps M are compared: H_s, or gcd(H_s, H_t)
    for "mean". `token_slice` restricts queries and keys alike; the rows are softmaxes over the kept keys.
    `row_weight` multiplies the rows: [N], [B, N] or [B, M, N], counted after slicing; it gets no gradient.
    `reduction`: "batchmean" is the sum of the weighted rows / (B·M·N), "sum" their sum, "none" the rows [B, M, N].
    The result is float32 (float64 for float64 inputs).

    Raises ValueError for shapes, head counts, names or backends that do not fit. Source: the self-attention
    distribution transfer of MiniLM (2002.10957, eq. 5).
    """
    pair = make_map_pair(
        "attention_kl", q_s, k_s, q_t, k_t,
        scale_s=scale_s, scale_t=scale_t, head_map=head_map, token_slice=token_slice,
    )  # fmt: skip
    chosen = resolve_backend(backend, "attention_kl", q_s.device.type)
    weight = _row_weight(row_weight, pair, reduction)
    with torch.autocast(q_s.device.type, enabled=False):
        return _reduced_kl(pair.sliced(), weight, reduction, chosen)


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
    """The student's attention output and the KL of its maps to the teacher's; one kernel where there is one.

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
    chosen = resolve_backend(backend, name, q.device.type)
    weight = _row_weight(row_weight, pair, reduction)
    v = as_autocast(v)
    with torch.autocast(q.device.type, enabled=False):
        is_sliced = pair.rows_shape[2] != q.shape[2]
        if chosen == "sdpa" or (chosen == "chunked" and is_sliced):
            out = F.scaled_dot_product_attention(pair.q_s, pair.k_s, v, scale=pair.scale_s)
            return AttentionWithKL(out, _reduced_kl(pair.sliced(), weight, reduction, chosen))
        out, rows = _joint_rows(chosen)(pair, v)
        return AttentionWithKL(out, _reduce(rows, weight, reduction))


def _reduced_kl(pair: MapPair, weight: Tensor | None, reduction: str, backend: str) -> Tensor:
    if backend == "chunked" and reduction != "none":
        return total_kl_chunked(pair, _total_weight(pair, weight, reduction))
    return _reduce(_rows(backend)(pair), weight, reduction)


def _total_weight(pair: MapPair, weight: Tensor | None, reduction: str) -> Tensor:
    """The factor of every row in the reduced KL, [B, M, N]."""
    scale = 1.0 / max(math.prod(pair.rows_shape), 1) if reduction == "batchmean" else 1.0
    if weight is None:
        dtype = wide(pair.q_s[:0]).dtype  # in the dtype of q, 1 / (B·M·N) would be rounded, or vanish
        return pair.q_s.new_full((), scale, dtype=dtype).expand(pair.rows_shape)
    return wide(weight) * scale


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


@cache
def _rows(backend: str) -> Callable[[MapPair], Tensor]:
    if backend == "triton":
        from dbscale.kernels.attention_kl_triton import kl_rows_triton

        return kl_rows_triton
    if backend == "compile":
        return torch.compile(kl_rows_eager)
    return {"eager": kl_rows_eager, "sdpa": kl_rows_sdpa, "chunked": kl_rows_chunked}[backend]


@cache
def _joint_rows(backend: str) -> Callable[[MapPair, Tensor], tuple[Tensor, Tensor]]:
    if backend == "triton":
        from dbscale.kernels.attention_kl_triton import out_and_kl_rows_triton

        return out_and_kl_rows_triton
    if backend == "compile":
        return torch.compile(out_and_kl_rows_eager)
    return out_and_kl_rows_chunked if backend == "chunked" else out_and_kl_rows_eager
