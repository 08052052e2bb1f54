"""The Triton kernel of the logit loss: one program per row, value and gradient, three walks over the row.

Maxima, then sums, then the gradient; what the first walk brings from memory the later ones find in cache, so that
memory sees two reads and one write. Rows where teacher and student nearly agree take a walk more. Launched by
`kd_loss_triton`; the twin is `kd_loss_chunked`.
"""

import triton
import triton.language as tl

from dbscale.kernels.triton_math import LOG2_E, NEAR, finite_or_zero, log1p_small, near_terms

ONE_LABEL: tl.constexpr = tl.constexpr(0)
TWO_LABELS: tl.constexpr = tl.constexpr(1)
SOFT: tl.constexpr = tl.constexpr(2)
OUTSIDE: tl.constexpr = tl.constexpr(-1e30)
"""Logit of a lane outside the row: no mass, and finite, so that a gap of two of them is 0."""


@triton.jit
def _tile(matrix, row, start, skew, num_classes, other: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """float32 columns start − skew … of a row; matrix = (pointer, row stride, column stride).

    The skew puts every tile on a 16-byte boundary, whatever C is, and whole tiles need no mask, so that memory is read
    in vectors also where C is odd.
    """
    lanes = start + tl.arange(0, BLOCK)
    address = matrix[0] + tl.multiple_of(row * matrix[1] - skew, VECTOR) + lanes.to(tl.int64) * matrix[2]
    if (start >= skew) & (start - skew + BLOCK <= num_classes):
        values = tl.load(address).to(tl.float32)
    else:
        inside = (lanes >= skew) & (lanes - skew < num_classes)
        # `other` joins in after the cast: float16 would make an infinity of OUTSIDE.
        values = tl.where(inside, tl.load(address, mask=inside, other=0.0).to(tl.float32), other)
    return values


@triton.jit
def _per_thread_sum(values, BLOCK: tl.constexpr):
    """[BLOCK] → [BLOCK / 8]: neighbours lie in one thread, so this costs no exchange between threads."""
    return tl.sum(tl.reshape(values, (BLOCK // 8, 8)), 1)


@triton.jit
def _exp_at_one(exp_at_t, shifted, SQUARINGS: tl.constexpr):
    """exp(shifted), from exp(shifted/T) where T is a power of two: multiplications are cheaper than exponentials."""
    if SQUARINGS < 0:
        return tl.exp2(shifted * LOG2_E)
    for _ in tl.static_range(SQUARINGS):
        exp_at_t *= exp_at_t
    return exp_at_t


@triton.jit
def _maxima(student, teacher, row, skew, num_classes, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """First walk: the row maxima of both, 0 for a row of −inf alone."""
    max_s = tl.full((BLOCK // 8,), -float("inf"), tl.float32)
    max_t = tl.full((BLOCK // 8,), -float("inf"), tl.float32)
    for start in range(0, num_classes + skew, BLOCK):
        z_s = _tile(student, row, start, skew, num_classes, -float("inf"), BLOCK, VECTOR)
        z_t = _tile(teacher, row, start, skew, num_classes, -float("inf"), BLOCK, VECTOR)
        max_s = tl.maximum(max_s, tl.max(tl.reshape(z_s, (BLOCK // 8, 8)), 1))
        max_t = tl.maximum(max_t, tl.max(tl.reshape(z_t, (BLOCK // 8, 8)), 1))
    return finite_or_zero(tl.max(max_s, 0)), finite_or_zero(tl.max(max_t, 0))


@triton.jit
def _sums(student, teacher, row, skew, num_classes, rate, max_s, max_t,
          SQUARINGS: tl.constexpr, CAREFUL: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """Second walk: Σ exp at T of both, Σ exp of the student at 1, and Σ exp_t · (z_s − z_t)."""
    sum_s = tl.zeros((BLOCK // 8,), tl.float32)
    sum_t, sum_1, gaps = sum_s, sum_s, sum_s
    for start in range(0, num_classes + skew, BLOCK):
        # Lanes outside the row: no mass, and a gap of zero rather than ∞ − ∞.
        z_s = _tile(student, row, start, skew, num_classes, OUTSIDE, BLOCK, VECTOR)
        z_t = _tile(teacher, row, start, skew, num_classes, OUTSIDE, BLOCK, VECTOR)
        exp_s = tl.exp2((z_s - max_s) * rate)
        exp_t = tl.exp2((z_t - max_t) * rate)
        weighted = exp_t * (z_s - z_t)
        if CAREFUL:
            weighted = tl.where(exp_t > 0.0, weighted, 0.0)
        sum_s += _per_thread_sum(exp_s, BLOCK)
        sum_t += _per_thread_sum(exp_t, BLOCK)
        sum_1 += _per_thread_sum(_exp_at_one(exp_s, z_s - max_s, SQUARINGS), BLOCK)
        gaps += _per_thread_sum(weighted, BLOCK)
    return tl.sum(sum_s, 0), tl.sum(sum_t, 0), tl.sum(sum_1, 0), tl.sum(gaps, 0)


@triton.jit
def _target_sums(student, soft, row, num_classes, max_s, HAS_SOFT: tl.constexpr, BLOCK: tl.constexpr):
    """Σ (z − max), and Σ y and Σ y·(z − max) of a soft target."""
    shifted_sum, mass, expected = 0.0, 0.0, 0.0
    for start in range(0, num_classes, BLOCK):
        z = _tile(student, row, start, 0, num_classes, -float("inf"), BLOCK, 1) - max_s
        shifted_sum += tl.sum(tl.where(start + tl.arange(0, BLOCK) < num_classes, z, 0.0), 0)
        if HAS_SOFT:
            y = _tile(soft, row, start, 0, num_classes, 0.0, BLOCK, 1)
            mass += tl.sum(y, 0)
            expected += tl.sum(tl.where(y != 0.0, y * z, 0.0), 0)
    return shifted_sum, mass, expected


@triton.jit
def _excess(student, teacher, row, skew, num_classes, rate, max_s, max_t, inv_s, inv_t, mean_gap, kappa,
            BLOCK: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """Third walk, only where the two softmaxes nearly agree: Σ p_t (eˣ − 1 − x)."""
    total = 0.0
    for start in range(0, num_classes + skew, BLOCK):
        z_s = _tile(student, row, start, skew, num_classes, OUTSIDE, BLOCK, VECTOR)
        z_t = _tile(teacher, row, start, skew, num_classes, OUTSIDE, BLOCK, VECTOR)
        p_s = tl.exp2((z_s - max_s) * rate) * inv_s
        p_t = tl.exp2((z_t - max_t) * rate) * inv_t
        total += tl.sum(near_terms(p_s, p_t, (z_s - z_t - mean_gap) * (rate / LOG2_E), kappa), 0)
    return total


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
                  HAS_SOFT: tl.constexpr, SQUARINGS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """Last walk: the gradient, but for what hard labels add at theirs."""
    for start in range(0, num_classes + skew, BLOCK):
        z_s = _tile(student, row, start, skew, num_classes, OUTSIDE, BLOCK, VECTOR)
        z_t = _tile(teacher, row, start, skew, num_classes, OUTSIDE, BLOCK, VECTOR)
        y = 0.0
        if HAS_SOFT:
            y = _tile(soft, row, start, skew, num_classes, 0.0, BLOCK, 1)
        slope = _slope(z_s, z_t, y, rate, shifts, slopes, SQUARINGS)
        lanes = start + tl.arange(0, BLOCK)
        address = grad + tl.multiple_of(row * num_classes - skew, VECTOR) + lanes
        if (start >= skew) & (start - skew + BLOCK <= num_classes):
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
def _cross_entropy(student, soft, labels_a, labels_b, lam, row, num_classes, smoothing, max_s, sum_1,
                   TARGET: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The cross-entropy, and Σq of the smoothed target q."""
    shifted_sum, mass, expected = 0.0, 1.0, 0.0
    if (TARGET == SOFT) | (smoothing > 0.0):
        shifted_sum, mass, expected = _target_sums(student, soft, row, num_classes, max_s, TARGET == SOFT, BLOCK)
    if TARGET != SOFT:
        mass = 1.0
        expected = _logit(student, row, tl.load(labels_a + row), num_classes) - max_s
    if TARGET == TWO_LABELS:
        share_a = tl.load(lam + row)
        expected_b = _logit(student, row, tl.load(labels_b + row), num_classes) - max_s
        expected = share_a * expected + (1.0 - share_a) * expected_b
    mass = (1.0 - smoothing) * mass + smoothing
    return mass * tl.log(sum_1) - (1.0 - smoothing) * expected - smoothing / num_classes * shifted_sum, mass


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
def _divergence(student, teacher, row, skew, num_classes, rate, max_s, max_t, sum_s, sum_t, ratio, gaps,
                BLOCK: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """KL(teacher ‖ student) by the form of `closed_forms` that keeps its digits."""
    mean_gap = gaps / sum_t
    # Maxima are subtracted from each other before the sums join in: the log-sum-exps themselves may be large.
    kl = (max_s - max_t - mean_gap) * (rate / LOG2_E) + tl.log(ratio)
    if (kl < NEAR) & (sum_t > 0.0):
        excess = _excess(
            student, teacher, row, skew, num_classes, rate, max_s, max_t, 1.0 / sum_s, 1.0 / sum_t, mean_gap,
            tl.exp(kl), BLOCK // 2, VECTOR,
        )  # fmt: skip
        kl = log1p_small(tl.maximum(excess, 0.0))
    return tl.where(sum_t == 0.0, 0.0, kl)


@triton.jit
def kd_kernel(
    student, teacher, soft, grad, labels_a, labels_b, lam, losses, ces, kls,
    num_classes, rate, smoothing, ce_weight, kl_weight, row_scale, grad_scale,
    TARGET: tl.constexpr, SQUARINGS: tl.constexpr, WANT_GRAD: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One row per program: losses, ces, kls [B] and, where wanted, grad [B, C] times grad_scale; rate = log₂e / T."""
    row = tl.program_id(0).to(tl.int64)
    skew = (row * num_classes % VECTOR).to(tl.int32)
    max_s, max_t = _maxima(student, teacher, row, skew, num_classes, BLOCK, VECTOR)
    sum_s, sum_t, sum_1, gaps = _sums(
        student, teacher, row, skew, num_classes, rate, max_s, max_t, SQUARINGS, False, BLOCK, VECTOR
    )
    if gaps != gaps:  # noqa: PLR0124  0 · ∞: the teacher is −inf somewhere
        sum_s, sum_t, sum_1, gaps = _sums(
            student, teacher, row, skew, num_classes, rate, max_s, max_t, SQUARINGS, True, BLOCK, VECTOR
        )
    # Equal sums give exactly 1, which the hardware's division does not promise.
    ratio = tl.where(sum_s == sum_t, 1.0, sum_s / sum_t)
    kl = _divergence(
        student, teacher, row, skew, num_classes, rate, max_s, max_t, sum_s, sum_t, ratio, gaps, BLOCK, VECTOR
    )
    ce, mass = _cross_entropy(
        student, soft, labels_a, labels_b, lam, row, num_classes, smoothing, max_s, sum_1, TARGET, BLOCK
    )
    # A part of weight 0 is left out: 0 · inf would be NaN.
    loss = tl.where(ce_weight == 0.0, 0.0, ce_weight * ce) + tl.where(kl_weight == 0.0, 0.0, kl_weight * kl)
    tl.store(losses + row, row_scale * loss)
    tl.store(ces + row, ce)
    tl.store(kls + row, kl)
    if WANT_GRAD:
        is_empty = sum_t == 0.0
        ce_slope = ce_weight * grad_scale
        kl_slope = tl.where(is_empty, 0.0, kl_weight * (rate / LOG2_E) * grad_scale / sum_s)
        slopes = (kl_slope, ce_slope * mass / sum_1, ce_slope * (1.0 - smoothing), ce_slope * smoothing / num_classes)
        shifts = (max_s, max_t, tl.where(is_empty, 0.0, ratio))
        _write_slopes(student, teacher, soft, grad, row, skew, num_classes, rate, shifts, slopes, TARGET == SOFT,
                      SQUARINGS, BLOCK, VECTOR)  # fmt: skip
        if TARGET != SOFT:
            tl.debug_barrier()  # the label's column has been written by another thread
            _rewrite_labels(student, teacher, grad, labels_a, labels_b, lam, row, num_classes, rate, shifts, slopes,
                            TARGET, SQUARINGS)  # fmt: skip


@triton.jit
def scale_kernel(grad, upstream, upstream_stride, ratio, num_classes, BLOCK: tl.constexpr):
    """grad[row] *= upstream[row] · ratio, in place; without touching memory where that is 1."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(upstream + row * upstream_stride).to(tl.float32) * ratio
    if factor != 1.0:
        for start in range(0, num_classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            address = grad + row * num_classes + columns
            value = tl.load(address, mask=columns < num_classes, other=0.0).to(tl.float32)
            tl.store(address, value * factor, mask=columns < num_classes)
