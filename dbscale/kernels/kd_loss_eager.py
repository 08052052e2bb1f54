"""The logit distillation loss as a textbook writes it, and the checked operands that both implementations read.

Three kinds of target come in: class indices [B], soft distributions [B, C], and mixup triples (y_a, y_b, λ). The loss is
plain differentiable torch, float32 at least (float64 stays float64, which is the tests' reference). It keeps several
[B, C] tensors for backward, which the fused kernel (`kd_loss_triton`) avoids. Checks of shapes, the choice of the
implementation and the reduction's numbers are left to `kd_loss`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Target = Tensor | tuple[Tensor, Tensor, Tensor | float]
"""Class indices [B], a soft distribution [B, C], or a mixup triple (y_a [B], y_b [B], λ float, [] or [B])."""


@dataclass(frozen=True, eq=False)
class KDTarget:
    """Class indices, or two of them per row with the share of the first, or distributions."""

    labels_a_B: Tensor | None = None
    """int64 [B]; None with a soft target."""
    labels_b_B: Tensor | None = None
    """int64 [B], the second label of a mixup triple."""
    lam_B: Tensor | None = None
    """float32 [B], the share of the first label of a mixup triple."""
    soft_BC: Tensor | None = None
    """Floating [B, C], rows are distributions."""


class KDWeights(NamedTuple):
    """The numbers of the loss: ce_weight · CE + kl_weight · KL, row by row or reduced."""

    temperature: float
    label_smoothing: float
    ce_weight: float
    """1 − α."""
    kl_weight: float
    """α·T²."""
    row_scale: float
    """1/B, or 1: inside the row, so that the gradient of a mean is final after one pass."""
    kl_scale: float
    """1/C where the reduction divides the KL by the classes, else 1."""

    @property
    def kl_slope(self) -> float:
        """Factor of (p_s − p_t) in the gradient of a row: d(KL)/dz = (p_s − p_t)/T."""
        return self.kl_weight * self.kl_scale * self.row_scale / self.temperature

    @property
    def ce_slope(self) -> float:
        """Factor of (p − q) in the gradient of a row."""
        return self.ce_weight * self.row_scale

    def combined(self, ce: Tensor, kl: Tensor, is_reduced: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, cross-entropy and KL from rows [B] of the last two: three scalars, or [B] each."""
        ce, kl = (ce.sum(), kl.sum()) if is_reduced else (ce, kl)
        ce, kl = ce * self.row_scale, kl * (self.row_scale * self.kl_scale)
        # A part of weight 0 is left out: 0 · inf would be NaN.
        parts = [weight * part for weight, part in ((self.ce_weight, ce), (self.kl_weight, kl)) if weight]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1], ce, kl


def make_target(target: Target, student_BC: Tensor) -> KDTarget:
    """Check and normalise `target`; ValueError names what does not fit the student's [B, C] logits."""
    if isinstance(target, tuple):
        return _mixup_target(target, student_BC)
    if not target.is_floating_point():
        return KDTarget(_labels(target, student_BC, "target"))
    if target.shape != student_BC.shape:
        raise ValueError(
            f"kd_loss: soft target has shape {list(target.shape)}, student logits {list(student_BC.shape)}; "
            "they must be equal (class indices must be integers)"
        )
    return KDTarget(soft_BC=target.detach())


def _mixup_target(target: tuple, student_BC: Tensor) -> KDTarget:
    if len(target) != 3:
        raise ValueError(f"kd_loss: a mixup target is (y_a, y_b, lam), got a tuple of {len(target)}")
    labels_a, labels_b, lam = target
    num_rows = student_BC.shape[0]
    if isinstance(lam, Tensor):
        lam_B = lam.detach().to(student_BC.device, torch.float32).expand(num_rows)
    else:
        # `full` is a kernel; a copy from the host would wait for it, and cannot be captured in a CUDA graph.
        lam_B = torch.full((num_rows,), float(lam), device=student_BC.device)
    labels_a, labels_b = _labels(labels_a, student_BC, "target[0]"), _labels(labels_b, student_BC, "target[1]")
    return KDTarget(labels_a, labels_b, lam_B.contiguous())


def _labels(labels: Tensor, student_BC: Tensor, name: str) -> Tensor:
    num_rows, num_classes = student_BC.shape
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != (num_rows,):
        raise ValueError(
            f"kd_loss: {name} is {labels.dtype} of shape {list(labels.shape)}; expected integers of shape [{num_rows}]"
        )
    # On an accelerator the check would wait for the device; there a bad index makes its row NaN instead.
    if labels.device.type == "cpu" and num_rows and not torch.compiler.is_compiling():
        low, high = torch.aminmax(labels)
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"kd_loss: {name} holds class indices {int(low)}…{int(high)}, but the logits have {num_classes} classes"
            )
    return labels.to(torch.int64)


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
