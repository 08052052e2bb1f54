"""Attention-map KL with the maps written out: the eager twin of every faster backend.

Plain differentiable torch operations on explicit [B, H, N, N] maps, softmax in float32 at least (float64 stays
float64, the tests' reference). Leaves checks and reductions to `attention_kl`.
"""

import math

import torch
from torch import Tensor

from dbscale.kernels.attention_arguments import MapPair
from dbscale.kernels.head_map import HeadPlan
from dbscale.kernels.kd_loss_eager import wide


def kl_rows_eager(pair: MapPair) -> Tensor:
    """KL(teacher map ‖ student map) of every row: [B, M, N], differentiable in q_s and k_s."""
    return _kl_of_maps(_scores(pair.q_s, pair.k_s, pair.scale_s), pair)


def out_and_kl_rows_eager(pair: MapPair, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention output [B, H_s, N, d_v] and the KL rows of the sliced maps, from one student score matrix."""
    scores = _scores(pair.q_s, pair.k_s, pair.scale_s)
    out = scores.softmax(-1).to(v.dtype) @ v
    return out, _kl_of_maps(scores[:, :, pair.slice_s, pair.slice_s], pair)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return wide(q @ k.mT) * scale


def _kl_of_maps(scores_s: Tensor, pair: MapPair) -> Tensor:
    log_p_s = _average_heads(scores_s.log_softmax(-1), pair.heads)
    log_p_t = _mix_heads(_scores(pair.q_t, pair.k_t, pair.scale_t).log_softmax(-1), pair.heads)
    return (log_p_t.exp() * (log_p_t - log_p_s)).sum(-1)


def _average_heads(log_p: Tensor, heads: HeadPlan) -> Tensor:
    if heads.group_size == 1:
        return log_p
    grouped = log_p.unflatten(1, (heads.num_maps, heads.group_size))
    return grouped.logsumexp(2) - math.log(heads.group_size)


def _mix_heads(log_p: Tensor, heads: HeadPlan) -> Tensor:
    if heads.mixing is None:
        return log_p.repeat_interleave(heads.repeats, dim=1)
    mixed = torch.einsum("mt,btij->bmij", heads.mixing.to(log_p.dtype), log_p.exp())
    # An underflowed probability has no weight in the KL; its logarithm must only stay finite.
    return mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()
