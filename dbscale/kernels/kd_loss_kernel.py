"""The Triton kernel of the logit loss: one program per row, value and gradient in two walks over the row.

The first walk finds maxima and sums together: each thread keeps its own running maximum, so that no step waits for
another thread. The second writes the gradient; what the first brought from memory it finds in cache, so that memory
sees two reads and one write. Rows where teacher and student nearly agree take a walk more between them. Launched by
`kd_loss_triton`; the twin is `kd_loss_chunked`.
"""

import triton
import triton.language as tl

from dbscale.kernels.triton_math import LOG2_E, NEAR, finite_or_zero, log1p_less_mean, near_terms

ONE_LABEL: tl.constexpr = tl.constexpr(0)
TWO_LABELS: tl.constexpr = tl.constexpr(1)
SOFT: tl.constexpr = tl.constexpr(2)


@triton.jit
def _columns(start, GROUPS: tl.constexpr, WIDE: tl.constexpr):
    """[GROUPS, WIDE] numbers from start on; WIDE neighbours lie in one thread, which sums them without an exchange."""
    return start + tl.arange(0, GROUPS)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]


@triton.jit
def _is_whole(start, skew, num_classes, GROUPS: tl.constexpr, WIDE: tl.constexpr):
    """Whether all columns of a tile exist: it needs no mask then."""
    return (start >= skew) & (start - skew + GROUPS * WIDE <= num_classes)


@triton.jit
def _tile(matrix, row, start, skew, num_classes, other,
          GROUPS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """float32 columns start − skew … of a row, `other` outside it; matrix = (pointer, row stride, column stride).

    The skew puts every tile on a 16-byte boundary, so that memory is read in vectors also where C is odd.
    """
    lanes = _columns(start, GROUPS, WIDE)
    address = matrix[0] + tl.multiple_of(row * matrix[1] - skew, VECTOR) + lanes.to(tl.int64) * matrix[2]
    if _is_whole(start, skew, num_classes, GROUPS, WIDE):
        values = tl.load(address).to(tl.float32)
    else:
        inside = (lanes >= skew) & (lanes - skew < num_classes)
        values = tl.where(inside, tl.load(address, mask=inside, other=0.0).to(tl.float32), other)
    return values


@triton.jit
def _gap(z_s, z_t, usual_gap, start, skew, num_classes, GROUPS: tl.constexpr, WIDE: tl.constexpr):
    """z_s less the usual gap, and that less z_t; 0 outside the row, where both logits are −inf."""
    lowered = z_s - usual_gap
    gap = lowered - z_t
    if not _is_whole(start, skew, num_classes, GROUPS, WIDE):
        lanes = _columns(start, GROUPS, WIDE)
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
def _absorb(z, maximum):
    """A tile less its groups' new running maxima (0 for −inf), those maxima, and how far the old ones lie below."""
    new_maximum = tl.maximum(maximum, tl.max(z, 1))
    base = finite_or_zero(new_maximum)
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
    for start in range(0, num_classes + skew, GROUPS * 8):
        z_s = _tile(student, row, start, skew, num_classes, -float("inf"), GROUPS, 8, VECTOR)
        z_t = _tile(teacher, row, start, skew, num_classes, -float("inf"), GROUPS, 8, VECTOR)
        lowered, gap = _gap(z_s, z_t, usual_gap, start, skew, num_classes, GROUPS, 8)
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
    top_s, top_t = finite_or_zero(tl.max(max_s, 0)), finite_or_zero(tl.max(max_t, 0))
    fall_s, fall_t = max_s - top_s, max_t - top_t
    shrink_s, shrink_t = tl.exp2(fall_s * rate), tl.exp2(fall_t * rate)
    sum_1 = tl.sum(sum_1 * _exp_at_one(shrink_s, fall_s, SQUARINGS), 0)
    sum_s, sum_t, gaps = tl.sum(sum_s * shrink_s, 0), tl.sum(sum_t * shrink_t, 0), tl.sum(gaps * shrink_t, 0)
    return top_s, top_t, sum_s, sum_t, sum_1, gaps, (tl.sum(spread, 0) if SMOOTH else 0.0)


@triton.jit
def _soft_sums(student, soft, row, skew, num_classes, max_s,
               GROUPS: tl.constexpr, VECTOR: tl.constexpr, SOFT_VECTOR: tl.constexpr):  # fmt: skip
    """Σ y and Σ y·(z − max) of a soft target."""
    mass = tl.zeros((GROUPS,), tl.float32)
    expected = mass
    for start in range(0, num_classes + skew, GROUPS * 8):
        z = _tile(student, row, start, skew, num_classes, 0.0, GROUPS, 8, VECTOR) - max_s
        y = _tile(soft, row, start, skew, num_classes, 0.0, GROUPS, 8, SOFT_VECTOR)
        mass += tl.sum(y, 1)
        expected += tl.sum(tl.where(y != 0.0, y * z, 0.0), 1)
    return tl.sum(mass, 0), tl.sum(expected, 0)


@triton.jit
def _near_kl(student, teacher, row, skew, num_classes, rate, usual_gap, max_s, max_t, sum_s, sum_t, mean_gap, kl,
             GROUPS: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """A walk more where the two softmaxes nearly agree: log1p(Σ p_t (eˣ − 1 − x)), with what rounding left of Σ p_t x."""
    excess = tl.zeros((GROUPS,), tl.float32)
    mean = excess
    kappa = tl.exp(kl)
    for start in range(0, num_classes + skew, GROUPS * 4):  # half a tile, or registers spill
        z_s = _tile(student, row, start, skew, num_classes, -float("inf"), GROUPS, 4, VECTOR)
        z_t = _tile(teacher, row, start, skew, num_classes, -float("inf"), GROUPS, 4, VECTOR)
        _, gap = _gap(z_s, z_t, usual_gap, start, skew, num_classes, GROUPS, 4)
        offset = (gap - mean_gap) * (rate / LOG2_E)
        p_s = tl.exp2((z_s - max_s) * rate) * (1.0 / sum_s)
        p_t = tl.exp2((z_t - max_t) * rate) * (1.0 / sum_t)
        excess += tl.sum(near_terms(p_s, p_t, offset, kappa), 1)
        mean += tl.sum(tl.where(p_t > 0.0, p_t * offset, 0.0), 1)
    return log1p_less_mean(tl.sum(excess, 0), tl.sum(mean, 0))


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
    for start in range(0, num_classes + skew, GROUPS * 8):
        z_s = _tile(student, row, start, skew, num_classes, -float("inf"), GROUPS, 8, VECTOR)
        z_t = _tile(teacher, row, start, skew, num_classes, -float("inf"), GROUPS, 8, VECTOR)
        y = 0.0
        if HAS_SOFT:
            y = _tile(soft, row, start, skew, num_classes, 0.0, GROUPS, 8, SOFT_VECTOR)
        slope = _slope(z_s, z_t, y, rate, shifts, slopes, SQUARINGS)
        lanes = _columns(start, GROUPS, 8)
        address = grad + tl.multiple_of(row * num_classes - skew, VECTOR) + lanes
        if _is_whole(start, skew, num_classes, GROUPS, 8):
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
    if (kl < NEAR) & (sum_t > 0.0):
        kl = _near_kl(
            student, teacher, row, skew, num_classes, rate, usual_gap, max_s, max_t, sum_s, sum_t, mean_gap, kl,
            GROUPS, VECTOR,
        )  # fmt: skip
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
