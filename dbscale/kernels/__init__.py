"""Fused KL losses for distillation: logits (`kd_loss`) and attention maps (`attention_kl`, `sdpa_with_attention_kl`).

Torch and, where there is one, Triton; nothing else of dbscale. `timm_attention` joins them to timm's models and is
the only module that imports timm; import it by name. Every backend has the same mathematics, see `backend.BACKENDS`.
"""

from dbscale.kernels.attention_kl import AttentionWithKL, attention_kl, sdpa_with_attention_kl
from dbscale.kernels.backend import BACKENDS, resolve_backend
from dbscale.kernels.kd_loss import KDLoss, kd_loss

__all__ = [
    "BACKENDS",
    "AttentionWithKL",
    "KDLoss",
    "attention_kl",
    "kd_loss",
    "resolve_backend",
    "sdpa_with_attention_kl",
]
