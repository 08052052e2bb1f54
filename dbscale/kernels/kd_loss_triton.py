"""The logit distillation loss by fused Triton kernels, as a torch operator with its gradient.

One program per row finds value and gradient in two walks over the row. The first finds maxima and sums together: each
thread keeps its own running maximum, so that no step waits for another thread, and the next tile is on its way while this
one is added up. The second writes the gradient; what the first brought from memory it finds in cache, so that memory sees
two reads and one write. Nothing but the gradient is kept, and backward multiplies it in place by its upstream gradient,
without touching memory where that is 1. Leaves checks and the choice of the reduction to `kd_loss`; the textbook form is
`kd_loss_eager`.
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
KEEP: tl.constexpr = tl.constexpr("evict_last")  # what the first walk reads, the second reads again
DROP: tl.constexpr = tl.constexpr("evict_first")
WIDE: tl.constexpr = tl.constexpr(8)
"""Neighbouring columns of one thread, which sums them without an exchange."""
WIDE_BLOCK, NARROW_BLOCK = 2048, 256
"""Columns a program holds at a time, 8 per thread. A narrow row is one warp's, which waits for no other and is 1.5 times as
fast at C = 1,000 as four; of a wide row 8 warps are 1.2 times as fast as 16 (H200, docs/benchmarks/kernels.md)."""
NARROW_ROW = 2048
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
        GROUPS=block // 8, VECTOR=vector, SOFT_VECTOR=min(vector, _vector(num_classes, soft)),
        ALIGNED=num_classes % 8 == 0, num_warps=num_warps,
    )  # fmt: skip


def launch_shape(num_classes: int) -> tuple[int, int]:
    """(columns per step, warps) of a program."""
    block = NARROW_BLOCK if num_classes <= NARROW_ROW else WIDE_BLOCK
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
def _address(matrix, row, start, skew, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """Of columns start − skew … of a row; matrix = (pointer, row stride, column stride).

    The skew puts every tile on a 16-byte boundary, so that memory is read in vectors also where C is odd.
    """
    lanes = _columns(start, GROUPS).to(tl.int64)
    return matrix[0] + tl.multiple_of(row * matrix[1] - skew, VECTOR) + lanes * matrix[2]


@triton.jit
def _inside(start, skew, num_classes, GROUPS: tl.constexpr, ALIGNED: tl.constexpr):
    """Which columns of a tile exist; of aligned rows whole groups do, which the compiler then reads as vectors."""
    if ALIGNED:
        groups = start + tl.arange(0, GROUPS)[:, None] * WIDE < num_classes
        return tl.broadcast_to(groups, (GROUPS, WIDE))
    lanes = _columns(start, GROUPS)
    return (lanes >= skew) & (lanes - skew < num_classes)


@triton.jit
def _tile(matrix, row, start, skew, num_classes, other, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
          ALIGNED: tl.constexpr, POLICY: tl.constexpr):  # fmt: skip
    """A tile as float32, `other` outside the row."""
    inside = _inside(start, skew, num_classes, GROUPS, ALIGNED)
    address = _address(matrix, row, start, skew, GROUPS, VECTOR)
    values = tl.load(address, mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)
    return tl.where(inside, values, other)


@triton.jit
def _last_tile(skew, num_classes, BLOCK: tl.constexpr):
    """Where a row's last tile begins. It and the first are masked; what lies between them is whole."""
    return (num_classes + skew - 1) // BLOCK * BLOCK


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
    """A maximum to subtract: 0 instead of −inf, so that an empty row gives exp(−inf) = 0 and not NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def _lowered(sums, fall_s, fall_t, moved, rate, SQUARINGS: tl.constexpr):
    """Sums of exponentials as they are once the maxima that they were made with lie lower by `fall`; their gaps, once the
    student's maximum lies lower by `moved` than the teacher's."""
    sum_s, sum_t, sum_1, gaps = sums
    shrink_s, shrink_t = tl.exp2(fall_s * rate), tl.exp2(fall_t * rate)
    return (
        sum_s * shrink_s, sum_t * shrink_t, sum_1 * _exp_at_one(shrink_s, fall_s, SQUARINGS),
        (gaps + sum_t * moved) * shrink_t,
    )  # fmt: skip


@triton.jit
def _absorb(z_s, z_t, inside, state, rate, anchor, SMOOTH: tl.constexpr, SQUARINGS: tl.constexpr,
            CAREFUL: tl.constexpr):  # fmt: skip
    """The state of the first walk with one more tile, group by group; `inside` None: the tile is whole."""
    old_s, old_t, sum_s, sum_t, sum_1, gaps, spread = state
    max_s, max_t = tl.maximum(old_s, tl.max(z_s, 1)), tl.maximum(old_t, tl.max(z_t, 1))
    base_s, base_t = _finite_or_zero(max_s), _finite_or_zero(max_t)
    moved = (_finite_or_zero(old_s) - base_s) - (_finite_or_zero(old_t) - base_t)
    sum_s, sum_t, sum_1, gaps = _lowered(
        (sum_s, sum_t, sum_1, gaps), old_s - base_s, old_t - base_t, moved, rate, SQUARINGS
    )
    below_s, below_t = z_s - base_s[:, None], z_t - base_t[:, None]
    exp_s, exp_t = tl.exp2(below_s * rate), tl.exp2(below_t * rate)
    # Between logits that lie below their own maxima: of a large common shift nothing is left to round.
    gap = below_s - below_t
    if inside is not None:
        gap = tl.where(inside, gap, 0.0)
    weighted = exp_t * gap
    if CAREFUL:
        weighted = tl.where(exp_t > 0.0, weighted, 0.0)
    if SMOOTH:
        if inside is None:
            spread += tl.sum(below_s, 1) + WIDE * (base_s - anchor)
        else:
            spread += tl.sum(tl.where(inside, below_s + (base_s - anchor)[:, None], 0.0), 1)
    return (
        max_s, max_t, sum_s + tl.sum(exp_s, 1), sum_t + tl.sum(exp_t, 1),
        sum_1 + tl.sum(_exp_at_one(exp_s, below_s, SQUARINGS), 1), gaps + tl.sum(weighted, 1), spread,
    )  # fmt: skip


@triton.jit
def _statistics(student, teacher, row, skew, num_classes, rate, anchor, SMOOTH: tl.constexpr,
                SQUARINGS: tl.constexpr, CAREFUL: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
                ALIGNED: tl.constexpr):  # fmt: skip
    """First walk: maxima of both, Σ exp at T of both, Σ exp of the student at 1, Σ exp_t · gap, and Σ (z − anchor).

    A gap is the student's logit less its maximum, less the same of the teacher. The last sum is found only for SMOOTH.
    CAREFUL counts 0 · ∞ as 0, which arises where the teacher is −inf.
    """
    block: tl.constexpr = GROUPS * WIDE
    last = _last_tile(skew, num_classes, block)
    low = tl.full((GROUPS,), -float("inf"), tl.float32)
    none = tl.zeros((GROUPS,), tl.float32)
    state = (low, low, none, none, none, none, none)
    for edge in range(0, tl.minimum(last, 1) + 1):
        start = edge * last
        z_s = _tile(student, row, start, skew, num_classes, -float("inf"), GROUPS, VECTOR, ALIGNED, KEEP)
        z_t = _tile(teacher, row, start, skew, num_classes, -float("inf"), GROUPS, VECTOR, ALIGNED, KEEP)
        inside = _inside(start, skew, num_classes, GROUPS, ALIGNED)
        state = _absorb(z_s, z_t, inside, state, rate, anchor, SMOOTH, SQUARINGS, CAREFUL)
    if last > block:
        ahead = tl.minimum(block, last)
        next_s = tl.load(_address(student, row, ahead, skew, GROUPS, VECTOR), eviction_policy=KEEP)
        next_t = tl.load(_address(teacher, row, ahead, skew, GROUPS, VECTOR), eviction_policy=KEEP)
        for start in range(block, last, block):
            z_s, z_t = next_s.to(tl.float32), next_t.to(tl.float32)
            # On their way while this tile is added up; after the last whole tile, that one once more.
            ahead = tl.minimum(start + block, last - block)
            next_s = tl.load(_address(student, row, ahead, skew, GROUPS, VECTOR), eviction_policy=KEEP)
            next_t = tl.load(_address(teacher, row, ahead, skew, GROUPS, VECTOR), eviction_policy=KEEP)
            state = _absorb(z_s, z_t, None, state, rate, anchor, SMOOTH, SQUARINGS, CAREFUL)
    # The groups' maxima give way to the row's.
    max_s, max_t, sum_s, sum_t, sum_1, gaps, spread = state
    top_s, top_t = _finite_or_zero(tl.max(max_s, 0)), _finite_or_zero(tl.max(max_t, 0))
    moved = (_finite_or_zero(max_s) - top_s) - (_finite_or_zero(max_t) - top_t)
    sum_s, sum_t, sum_1, gaps = _lowered(
        (sum_s, sum_t, sum_1, gaps), max_s - top_s, max_t - top_t, moved, rate, SQUARINGS
    )
    return (
        top_s, top_t, tl.sum(sum_s, 0), tl.sum(sum_t, 0), tl.sum(sum_1, 0), tl.sum(gaps, 0),
        tl.sum(spread, 0) if SMOOTH else 0.0,
    )  # fmt: skip


@triton.jit
def _soft_sums(student, soft, row, skew, num_classes, max_s, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
               SOFT_VECTOR: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Σ y and Σ y·(z − max) of a soft target."""
    mass = tl.zeros((GROUPS,), tl.float32)
    expected = mass
    for start in range(0, num_classes + skew, GROUPS * WIDE):
        z = _tile(student, row, start, skew, num_classes, 0.0, GROUPS, VECTOR, ALIGNED, KEEP) - max_s
        y = _tile(soft, row, start, skew, num_classes, 0.0, GROUPS, SOFT_VECTOR, ALIGNED, KEEP)
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
                  GROUPS: tl.constexpr, VECTOR: tl.constexpr, SOFT_VECTOR: tl.constexpr,
                  ALIGNED: tl.constexpr):  # fmt: skip
    """Last walk: the gradient, but for what hard labels add at theirs."""
    block: tl.constexpr = GROUPS * WIDE
    last = _last_tile(skew, num_classes, block)
    written = (grad, num_classes, 1)
    for edge in range(0, tl.minimum(last, 1) + 1):
        start = edge * last
        z_s = _tile(student, row, start, skew, num_classes, -float("inf"), GROUPS, VECTOR, ALIGNED, DROP)
        z_t = _tile(teacher, row, start, skew, num_classes, -float("inf"), GROUPS, VECTOR, ALIGNED, DROP)
        y = 0.0
        if HAS_SOFT:
            y = _tile(soft, row, start, skew, num_classes, 0.0, GROUPS, SOFT_VECTOR, ALIGNED, DROP)
        slope = _slope(z_s, z_t, y, rate, shifts, slopes, SQUARINGS)
        inside = _inside(start, skew, num_classes, GROUPS, ALIGNED)
        tl.store(_address(written, row, start, skew, GROUPS, VECTOR), slope, mask=inside, eviction_policy=DROP)
    for start in range(block, last, block):
        z_s = tl.load(_address(student, row, start, skew, GROUPS, VECTOR), eviction_policy=DROP).to(tl.float32)
        z_t = tl.load(_address(teacher, row, start, skew, GROUPS, VECTOR), eviction_policy=DROP).to(tl.float32)
        y = 0.0
        if HAS_SOFT:
            y = tl.load(_address(soft, row, start, skew, GROUPS, SOFT_VECTOR), eviction_policy=DROP).to(tl.float32)
        slope = _slope(z_s, z_t, y, rate, shifts, slopes, SQUARINGS)
        tl.store(_address(written, row, start, skew, GROUPS, VECTOR), slope, eviction_policy=DROP)


@triton.jit
def _logit(matrix, row, column, num_classes):
    """One logit; NaN where there is no such class, since raising would wait for the device."""
    exists = (column >= 0) & (column < num_classes)
    return tl.load(matrix[0] + row * matrix[1] + column * matrix[2], mask=exists, other=float("nan")).to(tl.float32)


@triton.jit
def _labelled(student, teacher, labels, row, num_classes):
    """(label, the student's logit there, the teacher's)."""
    label = tl.load(labels + row)
    return label, _logit(student, row, label, num_classes), _logit(teacher, row, label, num_classes)


@triton.jit
def _rewrite(labelled, y, grad, row, num_classes, rate, shifts, slopes, SQUARINGS: tl.constexpr):
    """The gradient at a hard label, which `_write_slopes` wrote as if no label were there."""
    label, z_s, z_t = labelled
    slope = _slope(z_s, z_t, y, rate, shifts, slopes, SQUARINGS)
    tl.store(grad + row * num_classes + label, slope, mask=(label >= 0) & (label < num_classes))


@triton.jit
def kd_kernel(
    student, teacher, soft, grad, labels_a, labels_b, lam, ces, kls,
    num_classes, rate, smoothing, ce_slope, kl_slope,
    TARGET: tl.constexpr, SMOOTH: tl.constexpr, SQUARINGS: tl.constexpr, WANT_GRAD: tl.constexpr,
    GROUPS: tl.constexpr, VECTOR: tl.constexpr, SOFT_VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row per program: ces, kls [B] and, where wanted, grad [B, C] of ce_slope·CE + kl_slope·T·KL; rate = log₂e / T."""
    row = tl.program_id(0).to(tl.int64)
    skew = (row * num_classes % VECTOR).to(tl.int32)
    # What single logits are needed is asked for before the walk, so that nobody waits for it afterwards.
    first, share = _logit(student, row, 0, num_classes), 1.0
    anchor = tl.where(tl.abs(first) < float("inf"), first, 0.0)
    if TARGET != SOFT:
        at_a = _labelled(student, teacher, labels_a, row, num_classes)
        at_b = at_a
    if TARGET == TWO_LABELS:
        at_b = _labelled(student, teacher, labels_b, row, num_classes)
        share = tl.load(lam + row)
    max_s, max_t, sum_s, sum_t, sum_1, gaps, spread = _statistics(
        student, teacher, row, skew, num_classes, rate, anchor, SMOOTH, SQUARINGS, False, GROUPS, VECTOR, ALIGNED
    )
    if gaps != gaps:  # noqa: PLR0124  0 · ∞: the teacher is −inf somewhere
        max_s, max_t, sum_s, sum_t, sum_1, gaps, spread = _statistics(
            student, teacher, row, skew, num_classes, rate, anchor, SMOOTH, SQUARINGS, True, GROUPS, VECTOR, ALIGNED
        )
    is_empty = sum_t == 0.0
    # Equal sums give exactly 1, which the hardware's division does not promise.
    ratio = tl.where(sum_s == sum_t, 1.0, sum_s / sum_t)
    # log Σexp_s − log Σexp_t − Σ p_t (z_s − z_t), all counted from the maxima: the log-sum-exps themselves may be large.
    kl = tl.log(ratio) - gaps / sum_t * (rate / LOG2_E)
    kl = tl.where(kl < 0.0, 0.0, kl)  # rounding of nearly equal rows; NaN stays NaN
    if TARGET == SOFT:
        mass, expected = _soft_sums(student, soft, row, skew, num_classes, max_s, GROUPS, VECTOR, SOFT_VECTOR, ALIGNED)
    else:
        mass, expected = 1.0, at_a[1] - max_s
    if TARGET == TWO_LABELS:
        expected = share * expected + (1.0 - share) * (at_b[1] - max_s)
    mass = (1.0 - smoothing) * mass + smoothing
    from_max = spread + num_classes * (anchor - max_s)  # Σ (z − max)
    ce = mass * tl.log(sum_1) - (1.0 - smoothing) * expected - smoothing / num_classes * from_max
    tl.store(ces + row, ce)
    tl.store(kls + row, tl.where(is_empty, 0.0, kl))
    if WANT_GRAD:
        slopes = (tl.where(is_empty, 0.0, kl_slope / sum_s), ce_slope * mass / sum_1, ce_slope * (1.0 - smoothing),
                  ce_slope * smoothing / num_classes)  # fmt: skip
        shifts = (max_s, max_t, tl.where(is_empty, 0.0, ratio))
        _write_slopes(student, teacher, soft, grad, row, skew, num_classes, rate, shifts, slopes, TARGET == SOFT,
                      SQUARINGS, GROUPS, VECTOR, SOFT_VECTOR, ALIGNED)  # fmt: skip
        if TARGET != SOFT:
            tl.debug_barrier()  # the label's column has been written by another thread
            is_one = at_a[0] == at_b[0]
            if TARGET == TWO_LABELS:
                _rewrite(
                    at_b, tl.where(is_one, 1.0, 1.0 - share), grad, row, num_classes, rate, shifts, slopes, SQUARINGS
                )
            _rewrite(at_a, tl.where(is_one, 1.0, share), grad, row, num_classes, rate, shifts, slopes, SQUARINGS)


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
