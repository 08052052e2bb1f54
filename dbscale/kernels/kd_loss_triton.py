"""The logit distillation loss by the fused kernel, as a torch operator with its gradient.

Value and gradient come out of one pass over [B, C]. Nothing but the gradient is kept, and backward multiplies it in
place by its upstream gradient, without touching memory where that is 1. Leaves checks and reduction to `kd_loss`.
"""

import math

import torch
import triton
from torch import Tensor

from dbscale.kernels.kd_loss_finish_kernel import reduce_kernel, scale_kernel
from dbscale.kernels.kd_loss_kernel import ONE_LABEL, SOFT, TWO_LABELS, kd_kernel
from dbscale.kernels.kd_target import KDTarget, KDWeights

MAX_BLOCK = 4096
"""Columns a program holds at a time: 8 per thread with 16 warps. Soft targets take half of it, or registers spill."""


def kd_triton(
    student_BC: Tensor, teacher_BC: Tensor, target: KDTarget, weights: KDWeights, is_reduced: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (differentiable in the student), its cross-entropy and its KL: scalars, or rows [B]."""
    if torch.float64 in (student_BC.dtype, teacher_BC.dtype):
        raise ValueError("kd_loss: backend='triton' accumulates in float32; use backend='chunked' for float64 logits")
    want_grad = torch.is_grad_enabled() and student_BC.requires_grad
    loss, ce, kl, _ = _kd_triton(
        student_BC, teacher_BC, target.labels_a_B, target.labels_b_B, target.lam_B, target.soft_BC,
        list(weights), is_reduced, want_grad,
    )  # fmt: skip
    return loss, ce, kl


@torch.library.custom_op("dbscale::kd_triton", mutates_args=())
def _kd_triton(
    student: Tensor, teacher: Tensor,
    labels_a: Tensor | None, labels_b: Tensor | None, lam: Tensor | None, soft: Tensor | None,
    numbers: list[float], is_reduced: bool, want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weights = KDWeights(*numbers)
    loss, ce, kl, grad = outputs = _outputs(student, is_reduced, want_grad)
    ces, kls = (ce, kl) if not is_reduced else student.new_empty((2, len(student)), dtype=torch.float32)
    if len(student):
        _launch(student, teacher, KDTarget(labels_a, labels_b, lam, soft), weights, ces, kls, grad, want_grad)
    if not is_reduced:
        return *weights.combined(ces, kls, False), grad
    reduce_kernel[(1,)](
        ces, kls, loss, ce, kl, len(student), weights.row_scale, weights.row_scale * weights.kl_scale,
        weights.ce_weight, weights.kl_weight, BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return outputs


def _launch(
    student: Tensor, teacher: Tensor, target: KDTarget, weights: KDWeights, ces: Tensor, kls: Tensor, grad: Tensor,
    want_grad: bool,
) -> None:  # fmt: skip
    num_rows, num_classes = student.shape
    soft = ces.expand(1, num_rows) if target.soft_BC is None else target.soft_BC  # what is not there is not read
    labels = (ces if each is None else each for each in (target.labels_a_B, target.labels_b_B, target.lam_B))
    block, num_warps = launch_shape(num_classes, MAX_BLOCK if target.soft_BC is None else MAX_BLOCK // 2)
    lift = _lift(student.dtype, weights)
    vector = _vector(num_classes, student, teacher, grad)
    kd_kernel[(num_rows,)](
        (student, *student.stride()), (teacher, *teacher.stride()), (soft, *soft.stride()), grad, *labels, ces, kls,
        num_classes, 1.0 / (weights.temperature * math.log(2.0)), weights.label_smoothing,
        weights.ce_slope * lift, weights.kl_slope * lift,
        TARGET=SOFT if target.soft_BC is not None else ONE_LABEL if target.labels_b_B is None else TWO_LABELS,
        SMOOTH=weights.label_smoothing > 0, SQUARINGS=_squarings(weights.temperature), WANT_GRAD=want_grad,
        GROUPS=block // 8, VECTOR=vector, SOFT_VECTOR=min(vector, _vector(num_classes, soft)), num_warps=num_warps,
    )  # fmt: skip


def launch_shape(num_classes: int, max_block: int = MAX_BLOCK) -> tuple[int, int]:
    """(columns per step, warps) of a program: 8 columns per thread."""
    block = min(max(triton.next_power_of_2(num_classes), 256), max_block)
    return block, block // 256


def _vector(num_classes: int, *matrices: Tensor) -> int:
    """Columns read at once: 8 where every row of all starts equally far from a boundary of 8, else 1."""
    shared_skew = all(
        each.ndim == 1  # no gradient is wanted
        or (each.stride(1) == 1 and (each.stride(0) - num_classes) % 8 == 0 and each.data_ptr() % 16 == 0)
        for each in matrices
    )
    return 8 if shared_skew else 1


def _squarings(temperature: float) -> int:
    """log₂ T where T is 1, 2, 4 or 8, else −1."""
    return int(math.log2(temperature)) if temperature in (1.0, 2.0, 4.0, 8.0) else -1


def _lift(dtype: torch.dtype, weights: KDWeights) -> float:
    """By what the stored gradient is too large: 1, or for float16 the largest power of two that fits.

    float16 loses what lies below 6e-8, and a loss scale arrives only in backward.
    """
    if dtype != torch.float16:
        return 1.0
    return 2.0 ** math.floor(math.log2(32768.0 / (weights.ce_slope + weights.kl_slope)))


def _outputs(student: Tensor, is_reduced: bool, want_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = () if is_reduced else (student.shape[0],)
    loss, ce, kl = (student.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return loss, ce, kl, student.new_empty(student.shape if want_grad else (0,))


@_kd_triton.register_fake
def _(student, teacher, labels_a, labels_b, lam, soft, numbers, is_reduced, want_grad):
    return _outputs(student, is_reduced, want_grad)


@torch.library.custom_op("dbscale::kd_scale_", mutates_args=("grad",))
def _kd_scale_(grad: Tensor, upstream: Tensor, ratio: float) -> None:
    num_rows, num_classes = grad.shape
    if num_rows:
        block, num_warps = launch_shape(num_classes)
        stride = upstream.stride(0) if upstream.ndim else 0
        scale_kernel[(num_rows,)](grad, upstream, stride, ratio, num_classes, BLOCK=block, num_warps=num_warps)


def _setup_context(ctx, inputs, output) -> None:
    _, ce, kl, grad = output
    ctx.mark_non_differentiable(ce, kl, grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad)
    ctx.ratio = 1.0 / _lift(inputs[0].dtype, KDWeights(*inputs[6]))


def _backward(ctx, upstream, *_unused):
    # A second backward finds the saved gradient changed in place, and torch's version check raises.
    (grad,) = ctx.saved_tensors
    if upstream is not None:
        _kd_scale_(grad, upstream, ctx.ratio)
    return (grad if upstream is not None else None), *(None,) * 8


_kd_triton.register_autograd(_backward, setup_context=_setup_context)
