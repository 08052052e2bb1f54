"""The logit distillation loss by fused Triton kernels, as a torch operator with its gradient.

One program per row finds value and gradient in two walks over the row. The first finds maxima and sums together: each
thread keeps its own running maximum, so that no step waits for another thread. The second writes the gradient; what the
first brought from memory it finds in cache, so that memory sees two reads and one write. Nothing but the gradient is kept,
and backward multiplies it in place by its upstream gradient, without touching memory where that is 1. Leaves checks and
the choice of the reduction to `kd_loss`; the textbook form is `kd_loss_eager`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbscale.kernels.kd_loss_eager import KDTarget, KDWeights

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
ONE_LABEL: tl.constexpr = tl.constexpr(0)
TWO_LABELS: tl.constexpr = tl.constexpr(1)
SOFT: tl.constexpr = tl.constexpr(2)
WIDE: tl.constexpr = tl.constexpr(8)
"""Neighbouring columns of one thread, which sums them without an exchange."""
MAX_BLOCK = 2048
"""Columns a program holds at a time: 8 per thread with 8 warps, of which an H200 makes 1.2 times the speed of 16 with twice
as many columns."""
SCALERS = 1056
"""Programs that scale a gradient: eight per processor of an H100, for what mostly finds nothing to do."""


def kd_triton(
    student_BC: Tensor, teacher_BC: Tensor, target: KDTarget, weights: KDWeights, is_reduced: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (differentiable in the student), its cross-entropy and its KL: scalars, or rows [B]."""
    if torch.float64 in (student_BC.dtype, teacher_BC.dtype):
        raise ValueError("kd_loss: backend='triton' accumulates in float32; use backend='eager' for float64 logits")
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
    block, num_warps = launch_shape(num_classes)
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


def launch_shape(num_classes: int) -> tuple[int, int]:
    """(columns per step, warps) of a program: 8 columns per thread."""
    block = min(max(triton.next_power_of_2(num_classes), 256), MAX_BLOCK)
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
        scale_kernel[(min(num_rows, SCALERS),)](
            grad, upstream, stride, ratio, num_rows, num_classes, BLOCK=block, num_warps=num_warps
        )


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


@triton.jit
def _columns(start, GROUPS: tl.constexpr):
    """[GROUPS, WIDE] numbers from start on."""
    return start + tl.arange(0, GROUPS)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]


@triton.jit
def _is_whole(start, skew, num_classes, GROUPS: tl.constexpr):
    """Whether all columns of a tile exist: it needs no mask then."""
    return (start >= skew) & (start - skew + GROUPS * WIDE <= num_classes)


@triton.jit
def _tile(matrix, row, start, skew, num_classes, other, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """float32 columns start − skew … of a row, `other` outside it; matrix = (pointer, row stride, column stride).

    The skew puts every tile on a 16-byte boundary, so that memory is read in vectors also where C is odd.
    """
    lanes = _columns(start, GROUPS)
    address = matrix[0] + tl.multiple_of(row * matrix[1] - skew, VECTOR) + lanes.to(tl.int64) * matrix[2]
    if _is_whole(start, skew, num_classes, GROUPS):
        values = tl.load(address).to(tl.float32)
    else:
        inside = (lanes >= skew) & (lanes - skew < num_classes)
        values = tl.where(inside, tl.load(address, mask=inside, other=0.0).to(tl.float32), other)
    return values


@triton.jit
def _gap(z_s, z_t, usual_gap, start, skew, num_classes, GROUPS: tl.constexpr):
    """z_s less the usual gap, and that less z_t; 0 outside the row, where both logits are −inf."""
    lowered = z_s - usual_gap
    gap = lowered - z_t
    if not _is_whole(start, skew, num_classes, GROUPS):
        lanes = _columns(start, GROUPS)
        inside = (lanes >= skew) & (lanes - skew < num_classes)
        lowered, gap = tl.where(inside, lowered, 0.0), tl.where(inside, gap, 0.0)
    return lowered, gap


@triton.jit
def _exp_at_one(exp_at_t, exponent, SQUARINGS: tl.constexpr):
    """exp(x), from exp(x/T) where T is a power of two: multiplications are cheaper than exponentials."""
    if SQUARINGS < 0:
        return tl.exp2(exponent * LOG2_E)
    for _ in tl.static_range(SQUARINGS):
        exp_at_t *= exp_at_t
    return exp_at_t


@triton.jit
def _finite_or_zero(maximum):
    """A row maximum to subtract: 0 instead of −inf, so that an empty row gives exp(−inf) = 0 and not NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def _absorb(z, maximum):
    """A tile less its groups' new running maxima (0 for −inf), those maxima, and how far the old ones lie below."""
    new_maximum = tl.maximum(maximum, tl.max(z, 1))
    base = _finite_or_zero(new_maximum)
    return z - base[:, None], new_maximum, maximum - base


@triton.jit
def _statistics(student, teacher, row, skew, num_classes, rate, usual_gap, SMOOTH: tl.constexpr,
                SQUARINGS: tl.constexpr, CAREFUL: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """First walk: maxima of both, Σ exp at T of both, Σ exp of the student at 1, Σ exp_t · gap, and Σ (z − usual gap).

    The last is found only for SMOOTH. CAREFUL counts 0 · ∞ as 0, which arises where the teacher is −inf.
    """
    max_s = tl.full((GROUPS,), -float("inf"), tl.float32)
    sum_s = tl.zeros((GROUPS,), tl.float32)
    max_t, sum_t, sum_1, gaps, spread = max_s, sum_s, sum_s, sum_s, sum_s
    for start in range(0, num_classes + skew, GROUPS * WIDE):
        z_s = _tile(student, row, start, skew, num_classes, -float("inf"), GROUPS, VECTOR)
        z_t = _tile(teacher, row, start, skew, num_classes, -float("inf"), GROUPS, VECTOR)
        lowered, gap = _gap(z_s, z_t, usual_gap, start, skew, num_classes, GROUPS)
        if SMOOTH:
            spread += tl.sum(lowered, 1)
        z_s, max_s, fall_s = _absorb(z_s, max_s)
        z_t, max_t, fall_t = _absorb(z_t, max_t)
        exp_s, exp_t = tl.exp2(z_s * rate), tl.exp2(z_t * rate)
        shrink_s, shrink_t = tl.exp2(fall_s * rate), tl.exp2(fall_t * rate)
        weighted = exp_t * gap
        if CAREFUL:
            weighted = tl.where(exp_t > 0.0, weighted, 0.0)
        sum_s = sum_s * shrink_s + tl.sum(exp_s, 1)
        sum_t = sum_t * shrink_t + tl.sum(exp_t, 1)
        sum_1 = sum_1 * _exp_at_one(shrink_s, fall_s, SQUARINGS) + tl.sum(_exp_at_one(exp_s, z_s, SQUARINGS), 1)
        gaps = gaps * shrink_t + tl.sum(weighted, 1)
    # The groups' maxima give way to the row's.
    top_s, top_t = _finite_or_zero(tl.max(max_s, 0)), _finite_or_zero(tl.max(max_t, 0))
    fall_s, fall_t = max_s - top_s, max_t - top_t
    shrink_s, shrink_t = tl.exp2(fall_s * rate), tl.exp2(fall_t * rate)
    sum_1 = tl.sum(sum_1 * _exp_at_one(shrink_s, fall_s, SQUARINGS), 0)
    sum_s, sum_t, gaps = tl.sum(sum_s * shrink_s, 0), tl.sum(sum_t * shrink_t, 0), tl.sum(gaps * shrink_t, 0)
    return top_s, top_t, sum_s, sum_t, sum_1, gaps, (tl.sum(spread, 0) if SMOOTH else 0.0)


@triton.jit
def _soft_sums(
    student, soft, row, skew, num_classes, max_s, GROUPS: tl.constexpr, VECTOR: tl.constexpr, SOFT_VECTOR: tl.constexpr
):
    """Σ y and Σ y·(z − max) of a soft target."""
    mass = tl.zeros((GROUPS,), tl.float32)
    expected = mass
    for start in range(0, num_classes + skew, GROUPS * WIDE):
        z = _tile(student, row, start, skew, num_classes, 0.0, GROUPS, VECTOR) - max_s
        y = _tile(soft, row, start, skew, num_classes, 0.0, GROUPS, SOFT_VECTOR)
        mass += tl.sum(y, 1)
        expected += tl.sum(tl.where(y != 0.0, y * z, 0.0), 1)
    return tl.sum(mass, 0), tl.sum(expected, 0)


@triton.jit
def _slope(z_s, z_t, y, rate, shifts, slopes, SQUARINGS: tl.constexpr):
    """kl_slope · (p_s − p_t) + mass_slope · p_1 − label_slope · y − spread_slope.

    p_s − p_t is exp_s − exp_t·ratio, times 1/Σexp_s inside kl_slope: a product less a product would be contracted to a
    fused multiply-add, and equal softmaxes would leave its rounding behind instead of zero.
    """
    max_s, max_t, ratio = shifts
    kl_slope, mass_slope, label_slope, spread_slope = slopes
    exp_s = tl.exp2((z_s - max_s) * rate)
    exp_t = tl.exp2((z_t - max_t) * rate)
    exp_1 = _exp_at_one(exp_s, z_s - max_s, SQUARINGS)
    return kl_slope * (exp_s - exp_t * ratio) + (mass_slope * exp_1 - (label_slope * y + spread_slope))


@triton.jit
def _write_slopes(student, teacher, soft, grad, row, skew, num_classes, rate, shifts, slopes,
                  HAS_SOFT: tl.constexpr, SQUARINGS: tl.constexpr,
                  GROUPS: tl.constexpr, VECTOR: tl.constexpr, SOFT_VECTOR: tl.constexpr):  # fmt: skip
    """Last walk: the gradient, but for what hard labels add at theirs."""
    for start in range(0, num_classes + skew, GROUPS * WIDE):
        z_s = _tile(student, row, start, skew, num_classes, -float("inf"), GROUPS, VECTOR)
        z_t = _tile(teacher, row, start, skew, num_classes, -float("inf"), GROUPS, VECTOR)
        y = 0.0
        if HAS_SOFT:
            y = _tile(soft, row, start, skew, num_classes, 0.0, GROUPS, SOFT_VECTOR)
        slope = _slope(z_s, z_t, y, rate, shifts, slopes, SQUARINGS)
        lanes = _columns(start, GROUPS)
        address = grad + tl.multiple_of(row * num_classes - skew, VECTOR) + lanes
        if _is_whole(start, skew, num_classes, GROUPS):
            tl.store(address, slope)
        else:
            tl.store(address, slope, mask=(lanes >= skew) & (lanes - skew < num_classes))


@triton.jit
def _logit(matrix, row, column, num_classes):
    """One logit; NaN where there is no such class, since raising would wait for the device."""
    exists = (column >= 0) & (column < num_classes)
    return tl.load(matrix[0] + row * matrix[1] + column * matrix[2], mask=exists, other=float("nan")).to(tl.float32)


@triton.jit
def _rewrite(student, teacher, grad, row, label, y, num_classes, rate, shifts, slopes, SQUARINGS: tl.constexpr):
    z_s, z_t = _logit(student, row, label, num_classes), _logit(teacher, row, label, num_classes)
    slope = _slope(z_s, z_t, y, rate, shifts, slopes, SQUARINGS)
    tl.store(grad + row * num_classes + label, slope, mask=(label >= 0) & (label < num_classes))


@triton.jit
def _rewrite_labels(student, teacher, grad, labels_a, labels_b, lam, row, num_classes, rate, shifts, slopes,
                    TARGET: tl.constexpr, SQUARINGS: tl.constexpr):  # fmt: skip
    """The gradient at the hard labels, which `_write_slopes` wrote as if no label were there."""
    label_a, share_a = tl.load(labels_a + row), 1.0
    if TARGET == TWO_LABELS:
        label_b, share_b = tl.load(labels_b + row), 1.0 - tl.load(lam + row)
        share_a = tl.where(label_a == label_b, 1.0, 1.0 - share_b)
        share_b = tl.where(label_a == label_b, 1.0, share_b)
        _rewrite(student, teacher, grad, row, label_b, share_b, num_classes, rate, shifts, slopes, SQUARINGS)
    _rewrite(student, teacher, grad, row, label_a, share_a, num_classes, rate, shifts, slopes, SQUARINGS)


@triton.jit
def _cross_entropy(student, soft, labels_a, labels_b, lam, row, skew, num_classes, smoothing, max_s, sum_1, shifted_sum,
                   TARGET: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, SOFT_VECTOR: tl.constexpr):  # fmt: skip
    """The cross-entropy, and Σq of the smoothed target q; shifted_sum = Σ (z − max)."""
    if TARGET == SOFT:
        mass, expected = _soft_sums(student, soft, row, skew, num_classes, max_s, GROUPS, VECTOR, SOFT_VECTOR)
    else:
        mass = 1.0
        expected = _logit(student, row, tl.load(labels_a + row), num_classes) - max_s
    if TARGET == TWO_LABELS:
        share_a = tl.load(lam + row)
        expected_b = _logit(student, row, tl.load(labels_b + row), num_classes) - max_s
        expected = share_a * expected + (1.0 - share_a) * expected_b
    mass = (1.0 - smoothing) * mass + smoothing
    return mass * tl.log(sum_1) - (1.0 - smoothing) * expected - smoothing / num_classes * shifted_sum, mass


@triton.jit
def kd_kernel(
    student, teacher, soft, grad, labels_a, labels_b, lam, ces, kls,
    num_classes, rate, smoothing, ce_slope, kl_slope,
    TARGET: tl.constexpr, SMOOTH: tl.constexpr, SQUARINGS: tl.constexpr, WANT_GRAD: tl.constexpr,
    GROUPS: tl.constexpr, VECTOR: tl.constexpr, SOFT_VECTOR: tl.constexpr,
):  # fmt: skip
    """One row per program: ces, kls [B] and, where wanted, grad [B, C] of ce_slope·CE + kl_slope·T·KL; rate = log₂e / T."""
    row = tl.program_id(0).to(tl.int64)
    skew = (row * num_classes % VECTOR).to(tl.int32)
    # A large common shift is taken off by a whole number, which is exact, before differences are rounded.
    first_gap = _logit(student, row, 0, num_classes) - _logit(teacher, row, 0, num_classes)
    usual_gap = tl.where(tl.abs(first_gap) < 1e6, tl.floor(first_gap + 0.5), 0.0)
    max_s, max_t, sum_s, sum_t, sum_1, gaps, spread = _statistics(
        student, teacher, row, skew, num_classes, rate, usual_gap, SMOOTH, SQUARINGS, False, GROUPS, VECTOR
    )
    if gaps != gaps:  # noqa: PLR0124  0 · ∞: the teacher is −inf somewhere
        max_s, max_t, sum_s, sum_t, sum_1, gaps, spread = _statistics(
            student, teacher, row, skew, num_classes, rate, usual_gap, SMOOTH, SQUARINGS, True, GROUPS, VECTOR
        )
    is_empty = sum_t == 0.0
    # Equal sums give exactly 1, which the hardware's division does not promise.
    ratio = tl.where(sum_s == sum_t, 1.0, sum_s / sum_t)
    mean_gap = gaps / sum_t
    # Maxima are subtracted from each other before the sums join in: the log-sum-exps themselves may be large.
    kl = ((max_s - usual_gap) - max_t - mean_gap) * (rate / LOG2_E) + tl.log(ratio)
    kl = tl.where(kl < 0.0, 0.0, kl)  # rounding of nearly equal rows; NaN stays NaN
    shifted_sum = spread + num_classes * (usual_gap - max_s)
    ce, mass = _cross_entropy(
        student, soft, labels_a, labels_b, lam, row, skew, num_classes, smoothing, max_s, sum_1, shifted_sum,
        TARGET, GROUPS, VECTOR, SOFT_VECTOR,
    )  # fmt: skip
    tl.store(ces + row, ce)
    tl.store(kls + row, tl.where(is_empty, 0.0, kl))
    if WANT_GRAD:
        slopes = (tl.where(is_empty, 0.0, kl_slope / sum_s), ce_slope * mass / sum_1, ce_slope * (1.0 - smoothing),
                  ce_slope * smoothing / num_classes)  # fmt: skip
        shifts = (max_s, max_t, tl.where(is_empty, 0.0, ratio))
        _write_slopes(student, teacher, soft, grad, row, skew, num_classes, rate, shifts, slopes, TARGET == SOFT,
                      SQUARINGS, GROUPS, VECTOR, SOFT_VECTOR)  # fmt: skip
        if TARGET != SOFT:
            tl.debug_barrier()  # the label's column has been written by another thread
            _rewrite_labels(student, teacher, grad, labels_a, labels_b, lam, row, num_classes, rate, shifts, slopes,
                            TARGET, SQUARINGS)  # fmt: skip


@triton.jit
def reduce_kernel(ces, kls, loss, ce, kl, num_rows, ce_scale, kl_scale, ce_weight, kl_weight, BLOCK: tl.constexpr):
    """The sums of ces and kls, scaled, and the loss they make; one program, one order, hence one result."""
    ce_sums = tl.zeros((BLOCK,), tl.float32)
    kl_sums = ce_sums
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        ce_sums += tl.load(ces + rows, mask=rows < num_rows, other=0.0)
        kl_sums += tl.load(kls + rows, mask=rows < num_rows, other=0.0)
    ce_sum, kl_sum = tl.sum(ce_sums, 0) * ce_scale, tl.sum(kl_sums, 0) * kl_scale
    tl.store(ce, ce_sum)
    tl.store(kl, kl_sum)
    # A part of weight 0 is left out: 0 · inf would be NaN.
    tl.store(loss, tl.where(ce_weight == 0.0, 0.0, ce_weight * ce_sum)
             + tl.where(kl_weight == 0.0, 0.0, kl_weight * kl_sum))  # fmt: skip


@triton.jit
def scale_kernel(grad, upstream, upstream_stride, ratio, num_rows, num_classes, BLOCK: tl.constexpr):
    """grad[row] *= upstream[row] · ratio, in place; without touching memory where that is 1."""
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        factor = tl.load(upstream + row * upstream_stride).to(tl.float32) * ratio
        if factor != 1.0:
            for start in range(0, num_classes, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                address = grad + row * num_classes + columns
                value = tl.load(address, mask=columns < num_classes, other=0.0).to(tl.float32)
                tl.store(address, value * factor, mask=columns < num_classes)
