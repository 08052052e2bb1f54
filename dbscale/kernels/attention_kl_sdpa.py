"""Attention KL through scaled_dot_product_attention: the independent oracle, and lean without any kernel of ours.

Exactly, Σ_j p_t z_s = scale_s · q_s · SDPA(q_t, k_t, v=k_s): the expectation of the student's scores under the
teacher's map needs no map. The gradient of the student's log-sum-exp is the same expression under the student's own
map. Only the log-sum-exps are formed a block of rows at a time. Loses digits where the maps nearly agree, as every
difference of log-sum-exps does. Serves head maps that give each student head one teacher head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dbscale.kernels.attention_arguments import MapPair
from dbscale.kernels.kd_loss_eager import wide

ROWS_PER_BLOCK = 128


def kl_rows_sdpa(pair: MapPair) -> Tensor:
    """KL(teacher map ‖ student map) of every row: [B, H_s, N], differentiable in q_s and k_s."""
    if pair.heads.group_size > 1 or pair.heads.mixing is not None:
        raise ValueError(
            "attention KL: backend='sdpa' compares each student head with one teacher head, and this head_map averages "
            "or mixes heads; use backend='auto'"
        )
    q_s, k_s, scale_s, scale_t = wide(pair.q_s), wide(pair.k_s), pair.scale_s, pair.scale_t
    q_t, k_t = (wide(each).repeat_interleave(pair.heads.repeats, dim=1) for each in (pair.q_t, pair.k_t))
    cross = _expected_score(q_t, k_t, scale_t, q_s, k_s, scale_s)
    pull = _expected_score(q_s.detach(), k_s.detach(), scale_s, q_s, k_s, scale_s)
    with torch.no_grad():
        teacher = _expected_score(q_t, k_t, scale_t, q_t, k_t, scale_t) - _log_sum_exp(q_t, k_t, scale_t)
        constant = teacher + _log_sum_exp(q_s, k_s, scale_s)
    # `pull` has the gradient of the student's log-sum-exp; its value gives way to the log-sum-exp itself.
    return constant - cross + (pull - pull.detach())


def _expected_score(q_map: Tensor, k_map: Tensor, scale_map: float, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Σ_j softmax(scale_map · q_map k_mapᵀ)_j · (scale · q·k_j), [B, H, N_q]."""
    width = max(q_map.shape[-1], q.shape[-1])
    # Equal widths keep SDPA on its fused path; zero columns change no score.
    q_map, k_map, values = (F.pad(each, (0, width - each.shape[-1])) for each in (q_map, k_map, k))
    mean_key = F.scaled_dot_product_attention(q_map, k_map, values, scale=scale_map)[..., : k.shape[-1]]
    return scale * (q * mean_key).sum(-1)


def _log_sum_exp(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.cat([(rows @ k.mT * scale).logsumexp(-1) for rows in q.split(ROWS_PER_BLOCK, dim=2)], dim=2)
