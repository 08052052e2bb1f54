"""The logit distillation loss as a textbook writes it: the eager twin of every faster backend.

Plain differentiable torch operations, float32 at least (float64 stays float64, which is the tests' reference).
Keeps several [B, C] tensors for backward and loses digits where student and teacher nearly agree; both are what the
other backends exist to avoid. Leaves checks and reduction to `kd_loss`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dbscale.kernels.kd_target import KDTarget, KDWeights


def wide(tensor: Tensor) -> Tensor:
    """float32, or float64 where it already is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def kd_eager(
    student_BC: Tensor, teacher_BC: Tensor, target: KDTarget, weights: KDWeights, is_reduced: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (differentiable in the student), its cross-entropy and its KL: scalars, or rows [B]."""
    student_BC, teacher_BC = wide(student_BC), wide(teacher_BC)
    ce = _cross_entropy_rows(student_BC, target, weights.label_smoothing)
    kl = _kl_rows(student_BC / weights.temperature, teacher_BC / weights.temperature)
    return weights.combined(ce, kl, is_reduced)


def _kl_rows(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    no_mass = teacher_logits == -torch.inf
    is_empty = no_mass.all(-1, keepdim=True)
    log_p_t = F.log_softmax(teacher_logits.masked_fill(is_empty, 0.0), -1)
    log_p_s = F.log_softmax(student_logits.masked_fill(is_empty, 0.0), -1)
    terms = log_p_t.exp() * (log_p_t - log_p_s).masked_fill(no_mass, 0.0)
    return terms.sum(-1)


def _cross_entropy_rows(student_BC: Tensor, target: KDTarget, label_smoothing: float) -> Tensor:
    def against(labels: Tensor) -> Tensor:
        return F.cross_entropy(student_BC, labels, reduction="none", label_smoothing=label_smoothing)

    if target.soft_BC is not None:
        return against(target.soft_BC.to(student_BC.dtype))
    assert target.labels_a_B is not None
    first = against(target.labels_a_B)
    if target.labels_b_B is None or target.lam_B is None:
        return first
    lam = target.lam_B.to(student_BC.dtype)
    return lam * first + (1 - lam) * against(target.labels_b_B)
