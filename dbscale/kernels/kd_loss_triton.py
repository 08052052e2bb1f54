"""The logit distillation loss by the fused kernel, as a torch operator with its gradient.

Value and gradient come out of one pass over [B, C]. Nothing but the gradient is kept, and backward multiplies it in
place by its upstream gradient, without touching memory where that is 1. Leaves checks and reduction to `kd_loss`.
"""

import math

import torch
import triton
from torch import Tensor

from dbscale.kernels.kd_loss_kernel import ONE_LABEL, SOFT, TWO_LABELS, kd_kernel, scale_kernel
from dbscale.kernels.kd_target import KDTarget, KDWeights

MAX_BLOCK = 4096
"""Columns a program holds at a time: 8 per thread with 16 warps. Soft targets take half of it, or registers spill."""


def kd_rows_triton(
    student_BC: Tensor, teacher_BC: Tensor, target: KDTarget, weights: KDWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighed loss of each row (differentiable in the student), its cross-entropy and its KL, each [B]."""
    if torch.float64 in (student_BC.dtype, teacher_BC.dtype):
        raise ValueError("kd_loss: backend='triton' accumulates in float32; use backend='chunked' for float64 logits")
    want_grad = torch.is_grad_enabled() and student_BC.requires_grad
    loss, ce, kl, _ = _kd_triton(
        student_BC, teacher_BC, target.labels_a_B, target.labels_b_B, target.lam_B, target.soft_BC,
        weights.temperature, weights.label_smoothing, weights.ce_weight, weights.kl_weight, weights.row_scale, want_grad,
    )  # fmt: skip
    return loss, ce, kl


@torch.library.custom_op("dbscale::kd_triton", mutates_args=())
def _kd_triton(
    student: Tensor, teacher: Tensor,
    labels_a: Tensor | None, labels_b: Tensor | None, lam: Tensor | None, soft: Tensor | None,
    temperature: float, label_smoothing: float, ce_weight: float, kl_weight: float, row_scale: float, want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    losses, ces, kls, grad = outputs = _outputs(student, want_grad)
    num_rows, num_classes = student.shape
    unused = losses
    soft_or_unused = unused.expand(1, num_rows) if soft is None else soft
    if num_rows:
        block, num_warps = launch_shape(num_classes, MAX_BLOCK if soft is None else MAX_BLOCK // 2)
        kd_kernel[(num_rows,)](
            (student, *student.stride()), (teacher, *teacher.stride()), (soft_or_unused, *soft_or_unused.stride()),
            grad, *(unused if each is None else each for each in (labels_a, labels_b, lam)), losses, ces, kls,
            num_classes, 1.0 / (temperature * math.log(2.0)), label_smoothing, ce_weight, kl_weight, row_scale,
            _grad_scale(student.dtype, temperature, ce_weight, kl_weight, row_scale),
            TARGET=SOFT if soft is not None else ONE_LABEL if labels_b is None else TWO_LABELS,
            SQUARINGS=_squarings(temperature), WANT_GRAD=want_grad, BLOCK=block, VECTOR=_vector(student, teacher, grad),
            num_warps=num_warps,
        )  # fmt: skip
    return outputs


def launch_shape(num_classes: int, max_block: int = MAX_BLOCK) -> tuple[int, int]:
    """(columns per step, warps) of a program: 8 columns per thread."""
    block = min(max(triton.next_power_of_2(num_classes), 128), max_block)
    return block, max(block // 256, 1)


def _vector(student: Tensor, teacher: Tensor, grad: Tensor) -> int:
    """Columns read at once: 8 where every row of the three starts equally far from a boundary of 8, else 1."""
    num_classes = student.shape[1]
    shared_skew = all(
        each.stride(1) == 1 and (each.stride(0) - num_classes) % 8 == 0 and each.data_ptr() % 16 == 0
        for each in (student, teacher)
    )
    return 8 if shared_skew and grad.data_ptr() % 16 == 0 else 1


def _squarings(temperature: float) -> int:
    """log₂ T where T is 1, 2, 4 or 8, else −1."""
    return int(math.log2(temperature)) if temperature in (1.0, 2.0, 4.0, 8.0) else -1


def _grad_scale(dtype: torch.dtype, temperature: float, ce_weight: float, kl_weight: float, row_scale: float) -> float:
    """What the stored gradient is multiplied by: its final scale, or for float16 the largest power of two that fits.

    float16 loses what lies below 6e-8, and a loss scale arrives only in backward.
    """
    if dtype != torch.float16:
        return row_scale
    bound = ce_weight + kl_weight / temperature
    return 2.0 ** math.floor(math.log2(32768.0 / bound))


def _outputs(student: Tensor, want_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, ce, kl = (student.new_empty(student.shape[0], dtype=torch.float32) for _ in range(3))
    return loss, ce, kl, student.new_empty(student.shape if want_grad else (0,))


@_kd_triton.register_fake
def _(student, teacher, labels_a, labels_b, lam, soft, temperature, label_smoothing, ce_weight, kl_weight, row_scale,
      want_grad):  # fmt: skip
    return _outputs(student, want_grad)


@torch.library.custom_op("dbscale::kd_scale_", mutates_args=("grad",))
def _kd_scale_(grad: Tensor, upstream: Tensor, ratio: float) -> None:
    num_rows, num_classes = grad.shape
    if num_rows:
        block, num_warps = launch_shape(num_classes)
        scale_kernel[(num_rows,)](
            grad, upstream, upstream.stride(0), ratio, num_classes, BLOCK=block, num_warps=num_warps
        )


def _setup_context(ctx, inputs, output) -> None:
    student, *_, temperature, _, ce_weight, kl_weight, row_scale, _ = inputs
    _, ce, kl, grad = output
    ctx.mark_non_differentiable(ce, kl, grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad)
    ctx.ratio = row_scale / _grad_scale(student.dtype, temperature, ce_weight, kl_weight, row_scale)


def _backward(ctx, upstream, *_unused):
    # A second backward finds the saved gradient changed in place, and torch's version check raises.
    (grad,) = ctx.saved_tensors
    if upstream is not None:
        _kd_scale_(grad, upstream, ctx.ratio)
    return (grad if upstream is not None else None), *(None,) * 11


_kd_triton.register_autograd(_backward, setup_context=_setup_context)
