"""Fused KL losses for distillation: logits (`kd_loss`) and attention maps (`attention_kl`, `sdpa_with_attention_kl`).

Torch and, where there is one, Triton; nothing else of dbscale. `timm_attention` joins them to timm's models and is
the only module that imports timm; import it by name. Each loss has two implementations of the same mathematics: eager
(plain torch) and Triton; see `kd_loss.BACKENDS`.
"""

from dbscale.kernels.attention_kl import AttentionWithKL, attention_backend, attention_kl, sdpa_with_attention_kl
from dbscale.kernels.kd_loss import BACKENDS, KDLoss, kd_loss, resolve_backend

__all__ = [
    "BACKENDS",
    "AttentionWithKL",
    "KDLoss",
    "attention_backend",
    "attention_kl",
    "kd_loss",
    "resolve_backend",
    "sdpa_with_attention_kl",
]
