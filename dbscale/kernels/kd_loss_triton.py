"""The logit distillation loss as one Triton kernel: value and gradient in one pass over [B, C].

One program per row walks it twice: first for the maxima, sums and the mean gap, then for the gradient; the second walk
reads what the first left in cache, so memory sees two reads and one write. Nothing but the gradient is kept, and
backward multiplies it in place by its upstream gradient, unless that is 1. Twin of `kd_loss_chunked`. Leaves checks
and reduction to `kd_loss`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbscale.kernels.kd_target import KDTarget, KDWeights
from dbscale.kernels.triton_math import LOG2_E, NEAR, finite_or_zero, log1p_small, near_terms

ONE_LABEL, TWO_LABELS, SOFT = 0, 1, 2
MAX_BLOCK = 4096
"""Columns a program holds at a time: 8 per thread with 16 warps."""


@triton.jit
def _load(matrix, row, columns, num_classes, other: tl.constexpr):
    """float32 tile of a row; matrix = (pointer, row stride, column stride)."""
    address = matrix[0] + row * matrix[1] + columns.to(tl.int64) * matrix[2]
    return tl.load(address, mask=columns < num_classes, other=other).to(tl.float32)


@triton.jit
def _exp_at_one(exp_at_t, shifted, SQUARINGS: tl.constexpr):
    """exp(shifted), from exp(shifted/T) where T is a power of two: multiplications are cheaper than exponentials."""
    if SQUARINGS < 0:
        return tl.exp2(shifted * LOG2_E)
    for _ in tl.static_range(SQUARINGS):
        exp_at_t *= exp_at_t
    return exp_at_t


@triton.jit
def _first_walk(student, teacher, soft, row, num_classes, rate, TARGET: tl.constexpr, SQUARINGS: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Row maxima; sums of exponentials at T (student, teacher) and at 1; Σ exp_t·gap; Σz, and Σy, Σy·z of a soft y."""
    max_s, max_t = -float("inf"), -float("inf")
    sum_s, sum_t, sum_1, gaps = 0.0, 0.0, 0.0, 0.0
    logit_sum, mass, expected = 0.0, 0.0, 0.0
    for start in range(0, num_classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z_s = _load(student, row, columns, num_classes, -float("inf"))
        z_t = _load(teacher, row, columns, num_classes, -float("inf"))
        old_s, old_t = max_s, max_t
        max_s, max_t = tl.maximum(max_s, tl.max(z_s, 0)), tl.maximum(max_t, tl.max(z_t, 0))
        base_s, base_t = finite_or_zero(max_s), finite_or_zero(max_t)
        exp_s = tl.exp2((z_s - base_s) * rate)
        exp_t = tl.exp2((z_t - base_t) * rate)
        shrink_s, shrink_t = tl.exp2((old_s - base_s) * rate), tl.exp2((old_t - base_t) * rate)
        shrink_1 = _exp_at_one(shrink_s, old_s - base_s, SQUARINGS)
        sum_1 = sum_1 * shrink_1 + tl.sum(_exp_at_one(exp_s, z_s - base_s, SQUARINGS), 0)
        sum_s = sum_s * shrink_s + tl.sum(exp_s, 0)
        sum_t = sum_t * shrink_t + tl.sum(exp_t, 0)
        # Where the teacher is −inf the gap is infinite and has no weight.
        gaps = gaps * shrink_t + tl.sum(tl.where(exp_t > 0.0, exp_t * (z_s - z_t), 0.0), 0)
        logit_sum += tl.sum(tl.where(columns < num_classes, z_s, 0.0), 0)
        if TARGET == 2:
            y = _load(soft, row, columns, num_classes, 0.0)
            mass += tl.sum(y, 0)
            expected += tl.sum(tl.where(y != 0.0, y * z_s, 0.0), 0)
    return finite_or_zero(max_s), finite_or_zero(max_t), sum_s, sum_t, sum_1, gaps, logit_sum, mass, expected


@triton.jit
def _label(student, row, labels, num_classes):
    """A row's label, and the student's logit there: NaN without such a class, as raising would wait for the device."""
    label = tl.load(labels + row)
    exists = (label >= 0) & (label < num_classes)
    address = student[0] + row * student[1] + label * student[2]
    return label, tl.load(address, mask=exists, other=float("nan")).to(tl.float32)


@triton.jit
def _second_walk(
    student, teacher, soft, grad, row, num_classes, rate, shifts, inverses, slopes, labels, share_a, is_near,
    TARGET: tl.constexpr, SQUARINGS: tl.constexpr, WANT_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient; the sum of `near_terms` where it is needed."""
    max_s, max_t, mean_gap, kappa = shifts
    kl_slope, mass_slope, label_slope, spread_slope = slopes
    excess = 0.0
    for start in range(0, num_classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z_s = _load(student, row, columns, num_classes, -float("inf"))
        z_t = _load(teacher, row, columns, num_classes, -float("inf"))
        exp_s = tl.exp2((z_s - max_s) * rate)
        p_s, p_t = exp_s * inverses[0], tl.exp2((z_t - max_t) * rate) * inverses[1]
        if is_near:
            excess += tl.sum(near_terms(p_s, p_t, (z_s - z_t - mean_gap) * (rate / LOG2_E), kappa), 0)
        if WANT_GRAD:
            p_1 = _exp_at_one(exp_s, z_s - max_s, SQUARINGS) * inverses[2]
            if TARGET == 2:
                y = _load(soft, row, columns, num_classes, 0.0)
            else:
                y = tl.where(columns == labels[0], share_a, 0.0)
            if TARGET == 1:
                y += tl.where(columns == labels[1], 1.0 - share_a, 0.0)
            slope = kl_slope * (p_s - p_t) + (mass_slope * p_1 - label_slope * y - spread_slope)
            tl.store(grad + row * num_classes + columns, slope, mask=columns < num_classes)
    return excess


@triton.jit
def _kd_kernel(
    student, teacher, soft, grad, labels_a, labels_b, lam, losses, ces, kls,
    num_classes, rate, smoothing, ce_weight, kl_weight, row_scale, grad_scale,
    TARGET: tl.constexpr, SQUARINGS: tl.constexpr, WANT_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    max_s, max_t, sum_s, sum_t, sum_1, gaps, logit_sum, mass, expected = _first_walk(
        student, teacher, soft, row, num_classes, rate, TARGET, SQUARINGS, BLOCK
    )
    label_a, label_b, share_a = row, row, 1.0
    if TARGET != 2:
        mass = 1.0
        label_a, expected = _label(student, row, labels_a, num_classes)
    if TARGET == 1:
        share_a = tl.load(lam + row)
        label_b, expected_b = _label(student, row, labels_b, num_classes)
        expected = share_a * expected + (1.0 - share_a) * expected_b
    keep, spread = 1.0 - smoothing, smoothing / num_classes
    mass_smoothed = keep * mass + smoothing
    ce = mass_smoothed * tl.log(sum_1) - keep * (expected - mass * max_s)
    if smoothing > 0.0:
        ce -= spread * (logit_sum - num_classes * max_s)

    inv_temperature = rate / LOG2_E
    is_empty = sum_t == 0.0
    mean_gap = gaps / sum_t
    # Maxima are subtracted from each other before the sums join in: the log-sum-exps themselves may be large.
    kl = tl.where(is_empty, 0.0, (max_s - max_t - mean_gap) * inv_temperature + tl.log(sum_s / sum_t))
    is_near = (kl < NEAR) & (sum_t > 0.0)
    shifts = (max_s, max_t, mean_gap, tl.exp(kl))
    inverses = (1.0 / sum_s, tl.where(is_empty, 0.0, 1.0 / sum_t), 1.0 / sum_1)
    ce_slope = ce_weight * grad_scale
    kl_slope = tl.where(is_empty, 0.0, kl_weight * inv_temperature * grad_scale)
    slopes = (kl_slope, ce_slope * mass_smoothed, ce_slope * keep, ce_slope * spread)
    if WANT_GRAD | is_near:
        excess = _second_walk(
            student, teacher, soft, grad, row, num_classes, rate, shifts, inverses, slopes, (label_a, label_b),
            share_a, is_near, TARGET, SQUARINGS, WANT_GRAD, BLOCK,
        )  # fmt: skip
        kl = tl.where(is_near, log1p_small(tl.maximum(excess, 0.0)), kl)
    # A part of weight 0 is left out: 0 · inf would be NaN.
    loss = tl.where(ce_weight == 0.0, 0.0, ce_weight * ce) + tl.where(kl_weight == 0.0, 0.0, kl_weight * kl)
    tl.store(losses + row, row_scale * loss)
    tl.store(ces + row, ce)
    tl.store(kls + row, kl)


@triton.jit
def _scale_kernel(grad, upstream, upstream_stride, ratio, num_classes, BLOCK: tl.constexpr):
    """grad[row] *= upstream[row] · ratio, in place; without touching memory where that is 1."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(upstream + row * upstream_stride).to(tl.float32) * ratio
    if factor != 1.0:
        for start in range(0, num_classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            address = grad + row * num_classes + columns
            value = tl.load(address, mask=columns < num_classes, other=0.0).to(tl.float32)
            tl.store(address, value * factor, mask=columns < num_classes)


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
        block, num_warps = launch_shape(num_classes)
        _kd_kernel[(num_rows,)](
            (student, *student.stride()), (teacher, *teacher.stride()), (soft_or_unused, *soft_or_unused.stride()),
            grad, *(unused if each is None else each for each in (labels_a, labels_b, lam)), losses, ces, kls,
            num_classes, 1.0 / (temperature * math.log(2.0)), label_smoothing, ce_weight, kl_weight, row_scale,
            _grad_scale(student.dtype, temperature, ce_weight, kl_weight, row_scale),
            TARGET=SOFT if soft is not None else ONE_LABEL if labels_b is None else TWO_LABELS,
            SQUARINGS=_squarings(temperature), WANT_GRAD=want_grad, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return outputs


def launch_shape(num_classes: int) -> tuple[int, int]:
    """(columns per step, warps) of a program: 8 columns per thread."""
    block = min(max(triton.next_power_of_2(num_classes), 128), MAX_BLOCK)
    return block, max(block // 256, 1)


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
        _scale_kernel[(num_rows,)](
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
