"""Distillation on logits: cross-entropy and KL to a teacher in one loss; and which implementation a call runs.

The public function checks, chooses, weighs and reduces. The mathematics is in `kd_loss_eager` (textbook) and
`kd_loss_triton` (fused kernel, value and gradient in one pass). Knows nothing of models; of Triton it knows only
whether it can run, so that a machine without it imports and uses everything else.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dbscale.kernels.kd_loss_eager import KDWeights, Target, kd_eager, make_target

BACKENDS = ("auto", "triton", "eager", "compile")
"""What `backend=` takes.

`triton`: the fused kernels (CUDA, or the CPU under TRITON_INTERPRET=1). `eager`: the textbook form in plain torch.
`compile`: torch.compile of the textbook form, which needs a C++ compiler on a CPU and minutes for each new shape. `auto`:
`triton` on CUDA where Triton is installed, else `eager`.
"""

REDUCTIONS = ("batchmean", "mean", "sum", "none")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # once: torch.compile cannot trace the search


class KDLoss(NamedTuple):
    """What `kd_loss` returns; all three are scalars, or [B] with reduction "none", at least float32."""

    loss: Tensor
    """(1 − α)·ce + α·T²·kl, differentiable in the student's logits."""
    ce: Tensor
    """Cross-entropy with the target, detached."""
    kl: Tensor
    """KL(teacher ‖ student) at temperature T, without the factor T², detached."""


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Target,
    *,
    alpha: float,
    temperature: float,
    label_smoothing: float = 0.0,
    reduction: str = "batchmean",
    backend: str = "auto",
) -> KDLoss:  # fmt: skip
    """(1 − α)·CE(student, target) + α·T²·KL(softmax(teacher/T) ‖ softmax(student/T)), and its two parts.

    Logits [B, C] of any strides, float32, bfloat16 or float16 (float64 except on triton); the
    teacher gets no gradient. `target`: class indices [B], a soft distribution [B, C], or a mixup triple
    (y_a [B], y_b [B], λ). `reduction`: "batchmean" and "sum" as torch's, "none" gives rows; "mean" divides the KL by
    B·C and the CE by B, as published DeiT code does. A column where the teacher is −inf has no mass; a row where it
    is −inf everywhere has KL 0. The backward of a loss may run once only on the backend triton.

    Raises ValueError for shapes, targets, names or numbers that do not fit. An index outside [0, C) raises on the
    CPU; on a device, where a check would wait for it, it makes its row NaN. Source: Hinton et al. (1503.02531), §2.

    >>> import torch, dbscale
    >>> student = torch.zeros(2, 4, requires_grad=True)
    >>> found = dbscale.kd_loss(student, torch.zeros(2, 4), torch.tensor([0, 3]), alpha=0.5, temperature=2.0)
    >>> found.loss.backward()  # half of log 4, for the teacher agrees
    >>> round(found.loss.item(), 4), round(found.kl.item(), 4)
    (0.6931, 0.0)
    """
    _check(student_logits, teacher_logits, alpha, temperature, label_smoothing, reduction)
    num_rows, num_classes = student_logits.shape
    chosen = resolve_backend(backend, "kd_loss", student_logits.device.type)
    weights = KDWeights(
        temperature=float(temperature),
        label_smoothing=float(label_smoothing),
        ce_weight=1.0 - alpha,
        # T² keeps the gradient's scale independent of the temperature.
        kl_weight=alpha * temperature**2,
        row_scale=1.0 if reduction in ("sum", "none") else 1.0 / max(num_rows, 1),
        kl_scale=1.0 / num_classes if reduction == "mean" else 1.0,
    )
    checked = make_target(target, student_logits)
    # Autocast would send the sums, which are products with ones, through a lower precision.
    with torch.autocast(student_logits.device.type, enabled=False):
        loss, ce, kl = _implementation(chosen)(
            student_logits, teacher_logits.detach(), checked, weights, reduction != "none"
        )
    return KDLoss(loss, ce.detach(), kl.detach())


def resolve_backend(backend: str, function: str, device_type: str) -> str:
    """The implementation that a call of `function` with tensors on `device_type` runs; for the record of a run.

    Raises ValueError for an unknown name, or for `triton` where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{function}: unknown backend {backend!r}; use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        # On a CPU nothing was faster than eager in a whole training step: docs/benchmarks/kernels.md.
        return "triton" if device_type == "cuda" and HAS_TRITON else "eager"
    if backend == "triton":
        _require_triton(function, device_type)
    return backend


def is_interpreted() -> bool:
    """True where Triton's interpreter runs kernels on CPU (the variable must be set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _require_triton(function: str, device_type: str) -> None:
    if not HAS_TRITON:
        raise ValueError(f"{function}: backend='triton', but triton is not installed; use backend='auto'")
    if device_type != "cuda" and not is_interpreted():
        raise ValueError(
            f"{function}: backend='triton' needs CUDA tensors, got {device_type}; use backend='auto' "
            "(TRITON_INTERPRET=1 runs the kernels on CPU, slowly, for tests)"
        )


@cache
def _implementation(backend: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if backend == "triton":
        from dbscale.kernels.kd_loss_triton import kd_triton

        return kd_triton
    return torch.compile(kd_eager) if backend == "compile" else kd_eager


def _check(
    student_BC: Tensor, teacher_BC: Tensor, alpha: float, temperature: float, label_smoothing: float, reduction: str
) -> None:
    if student_BC.ndim != 2 or student_BC.shape != teacher_BC.shape or student_BC.shape[1] < 1:
        raise ValueError(
            f"kd_loss: student logits have shape {list(student_BC.shape)}, teacher logits {list(teacher_BC.shape)}; "
            "expected one shape [batch, classes]"
        )
    if not (student_BC.is_floating_point() and teacher_BC.is_floating_point()):
        raise ValueError(f"kd_loss: logits are {student_BC.dtype} and {teacher_BC.dtype}; expected floating dtypes")
    if not 0 <= alpha <= 1 or not temperature > 0 or not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"kd_loss: alpha={alpha}, temperature={temperature}, label_smoothing={label_smoothing}; expected "
            "0 ≤ alpha ≤ 1, temperature > 0, 0 ≤ label_smoothing ≤ 1"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"kd_loss: unknown reduction {reduction!r}; use one of {', '.join(REDUCTIONS)}")
