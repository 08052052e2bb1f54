"""The checked arguments of the two attention functions, as every backend reads them. Leaves computing to them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbscale.kernels.head_map import HeadMap, HeadPlan, plan_heads

TokenSlice = slice | tuple[slice, slice] | None
"""Tokens whose maps are compared: one slice for both models, or (student's, teacher's); None = all."""


@dataclass(frozen=True, eq=False)
class MapPair:
    """A student's and a teacher's maps, given by their queries and keys, and how they are compared."""

    q_s: Tensor
    """[B, H_s, N, d_s], all tokens; its maps are compared over the tokens `slice_s` only."""
    k_s: Tensor
    q_t: Tensor
    """[B, H_t, N', d_t], already sliced, no gradient."""
    k_t: Tensor
    scale_s: float
    scale_t: float
    heads: HeadPlan
    slice_s: slice
    """Resolved: 0 ≤ start ≤ stop ≤ N, step None."""

    def sliced(self) -> "MapPair":
        """The same pair with the student's tokens outside the slice dropped."""
        tokens = slice(0, self.slice_s.stop - self.slice_s.start)
        q_s, k_s = self.q_s[:, :, self.slice_s], self.k_s[:, :, self.slice_s]
        return MapPair(q_s, k_s, self.q_t, self.k_t, self.scale_s, self.scale_t, self.heads, tokens)

    @property
    def rows_shape(self) -> tuple[int, int, int]:
        """[B, M, N']: one KL per compared row."""
        return self.q_s.shape[0], self.heads.num_maps, self.q_t.shape[2]


def make_map_pair(
    name: str, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor,
    *, scale_s: float | None, scale_t: float | None, head_map: HeadMap, token_slice: TokenSlice,
) -> MapPair:  # fmt: skip
    """Check the operands of `name` against each other; ValueError says which one does not fit, and how."""
    _check_pair(name, "student", q_s, k_s)
    _check_pair(name, "teacher", q_t, k_t)
    if q_s.shape[0] != q_t.shape[0]:
        raise ValueError(f"{name}: batch of {q_s.shape[0]} student and {q_t.shape[0]} teacher images; must be equal")
    slice_s, slice_t = token_slice if isinstance(token_slice, tuple) else (token_slice, token_slice)
    slice_s = _resolve(name, slice_s, q_s.shape[2])
    slice_t = _resolve(name, slice_t, q_t.shape[2])
    if slice_s.stop - slice_s.start != slice_t.stop - slice_t.start:
        raise ValueError(
            f"{name}: maps of {slice_s.stop - slice_s.start} student and {slice_t.stop - slice_t.start} teacher tokens "
            "cannot be compared; pass token_slice=(student slice, teacher slice), e.g. the patches of both"
        )
    return MapPair(
        as_autocast(q_s),
        as_autocast(k_s),
        as_autocast(q_t.detach()[:, :, slice_t]),
        as_autocast(k_t.detach()[:, :, slice_t]),
        q_s.shape[3] ** -0.5 if scale_s is None else float(scale_s),
        q_t.shape[3] ** -0.5 if scale_t is None else float(scale_t),
        plan_heads(head_map, q_s.shape[1], q_t.shape[1], q_s),
        slice_s,
    )


def as_autocast(tensor: Tensor) -> Tensor:
    """The tensor as scaled_dot_product_attention would take it: in autocast's dtype where autocast is on."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def _check_pair(name: str, owner: str, q: Tensor, k: Tensor) -> None:
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(
            f"{name}: the {owner}'s q has shape {list(q.shape)} and its k {list(k.shape)}; expected one shape "
            "[batch, heads, tokens, width]"
        )
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"{name}: the {owner}'s q is {q.dtype} and its k {k.dtype}; expected one floating dtype")


def _resolve(name: str, tokens: slice | None, num_tokens: int) -> slice:
    start, stop, step = (tokens or slice(None)).indices(num_tokens)
    if step != 1:
        raise ValueError(f"{name}: token_slice={tokens} has step {step}; only contiguous tokens are compared")
    return slice(start, max(start, stop))
