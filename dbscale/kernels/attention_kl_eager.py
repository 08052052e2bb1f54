"""Attention-map KL with the maps written out, and the checked operands and head maps that both implementations read.

Student and teacher may have different head counts. Every head map is brought into one normal form (`HeadPlan`), so that
an implementation knows groups of heads and nothing of names. The loss is plain differentiable torch on explicit
[B, H, N, N] maps, softmax in float32 at least (float64 stays float64, the tests' reference); `attention_kl_triton`
never writes a map. The choice between the two, row weights and reductions are left to `attention_kl`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dbscale.kernels.kd_loss_eager import wide

HeadMap = str | Tensor | Sequence[Sequence[float]]
"""`"repeat"`, `"mean"`, or a mixing matrix [student heads, teacher heads] whose rows are distributions."""
TokenSlice = slice | tuple[slice, slice] | None
"""Tokens whose maps are compared: one slice for both models, or (student's, teacher's); None = all."""


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """Which student maps are compared with which teacher maps."""

    num_maps: int
    """Maps compared per image: the `H` of the divisor B·H·N."""
    group_s: int = 1
    """Neighbouring student heads averaged into one map."""
    group_t: int = 1
    """Neighbouring teacher heads averaged into one map."""
    repeats: int = 1
    """Map `m` is compared with the averaged teacher map `m // repeats`."""
    mixing: Tensor | None = None
    """[num_maps, teacher heads], rows are distributions: mixes teacher heads in place of the two fields above."""


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
        return replace(
            self, q_s=self.q_s[:, :, self.slice_s], k_s=self.k_s[:, :, self.slice_s], slice_s=tokens
        )  # fmt: skip

    @property
    def rows_shape(self) -> tuple[int, int, int]:
        """[B, M, N']: one KL per compared row."""
        return self.q_s.shape[0], self.heads.num_maps, self.q_t.shape[2]


def kl_rows_eager(pair: MapPair) -> Tensor:
    """KL(teacher map ‖ student map) of every row: [B, M, N], differentiable in q_s and k_s."""
    return _kl_of_scores(_scores(pair.q_s, pair.k_s, pair.scale_s), pair)


def out_and_kl_rows_eager(pair: MapPair, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention output [B, H_s, N, d_v] and the KL rows of the sliced maps, from one student score matrix."""
    scores = _scores(pair.q_s, pair.k_s, pair.scale_s)
    out = scores.softmax(-1).to(v.dtype) @ v
    return out, _kl_of_scores(scores[:, :, pair.slice_s, pair.slice_s], pair)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return wide(q @ k.mT) * scale


def _kl_of_scores(scores_s: Tensor, pair: MapPair) -> Tensor:
    heads = pair.heads
    log_p_s = _average_heads(scores_s.log_softmax(-1), heads.group_s)
    log_p_t = _scores(pair.q_t, pair.k_t, pair.scale_t).log_softmax(-1)
    if heads.mixing is None:
        log_p_t = _average_heads(log_p_t, heads.group_t).repeat_interleave(heads.repeats, dim=1)
    else:
        mixed = torch.einsum("mt,btij->bmij", heads.mixing.to(log_p_t.dtype), log_p_t.exp())
        # An underflowed probability has no weight in the KL; its logarithm must only stay finite.
        log_p_t = mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()
    return (log_p_t.exp() * (log_p_t - log_p_s)).sum(-1)


def _average_heads(log_p: Tensor, group: int) -> Tensor:
    """log of the mean map of each group of neighbouring heads."""
    if group == 1:
        return log_p
    return log_p.unflatten(1, (-1, group)).logsumexp(2) - math.log(group)


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
    slice_s, slice_t = _resolve(name, slice_s, q_s.shape[2]), _resolve(name, slice_t, q_t.shape[2])
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


def plan_heads(head_map: HeadMap, num_heads_s: int, num_heads_t: int, like: Tensor) -> HeadPlan:
    """Bring `head_map` into normal form, a mixing matrix to the device of `like` (float64 where `like` is, else float32).

    `repeat`: teacher head t guides the student heads t·r … t·r + r − 1, r = H_s / H_t, which must be whole.
    `mean`: heads of both are averaged in gcd(H_s, H_t) contiguous groups and the averaged maps are compared.
    A matrix [H_s, H_t]: student head h is compared with Σ_t matrix[h, t] · map_t; it gets no gradient.

    Raises ValueError for head counts that the map cannot join, an unknown name, or a matrix of another shape;
    a matrix that lies on the CPU is also checked for negative entries and row sums (elsewhere: no host sync).
    """
    if not isinstance(head_map, str):
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        matrix = torch.as_tensor(head_map, dtype=dtype).detach()
        _check_matrix(matrix, num_heads_s, num_heads_t)
        return HeadPlan(num_heads_s, mixing=matrix.to(like.device, non_blocking=True).contiguous())
    if head_map == "mean":
        num_maps = math.gcd(num_heads_s, num_heads_t)
        return HeadPlan(num_maps, group_s=num_heads_s // num_maps, group_t=num_heads_t // num_maps)
    if head_map != "repeat":
        raise ValueError(
            f"head_map={head_map!r}: unknown; use 'repeat', 'mean' or a matrix [student heads, teacher heads]"
        )
    if num_heads_s % num_heads_t:
        raise ValueError(
            f"head_map='repeat': {num_heads_s} student heads are no multiple of {num_heads_t} teacher heads; "
            f"use 'mean' or a mixing matrix of shape [{num_heads_s}, {num_heads_t}]"
        )
    return HeadPlan(num_heads_s, repeats=num_heads_s // num_heads_t)


def _check_matrix(matrix: Tensor, num_heads_s: int, num_heads_t: int) -> None:
    if matrix.shape != (num_heads_s, num_heads_t):
        raise ValueError(
            f"head_map: mixing matrix has shape {list(matrix.shape)}; expected [student heads, teacher heads] = "
            f"[{num_heads_s}, {num_heads_t}]"
        )
    if matrix.device.type != "cpu":
        return
    if bool((matrix < 0).any()) or bool(((matrix.sum(1) - 1).abs() > 1e-4).any()):
        raise ValueError("head_map: every row of the mixing matrix must be non-negative and sum to 1")


def _check_pair(name: str, owner: str, q: Tensor, k: Tensor) -> None:
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(
            f"{name}: the {owner}'s q has shape {list(q.shape)} and its k {list(k.shape)}; expected one shape "
            "[batch, heads, tokens, width]"
        )
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"{name}: the {owner}'s q is {q.dtype} and its k {k.dtype}; expected one floating dtype")


def _resolve(name: str, tokens: slice | None, num_tokens: int) -> slice:
    if tokens is None:
        return slice(0, num_tokens)
    start, stop, step = tokens.indices(num_tokens)
    if step != 1:
        raise ValueError(f"{name}: token_slice={tokens} has step {step}; only contiguous tokens are compared")
    return slice(start, max(start, stop))
