"""KL of two softmaxes without cancellation, in plain torch operations.

With u = z_s − z_t, ū = Σ p_t u and x = u − ū, KL = −ū + lse_s − lse_t = log1p(Σ p_t (eˣ − 1 − x)). The first form is
cheap and loses every digit where the softmaxes agree; the second keeps them. Each is used where it is the better one.
For the chunked backends; the Triton kernels hold the same forms for themselves (`triton_math`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

NEAR = 0.25
"""Rows whose KL is below it are computed by the second form."""

SERIES_RADIUS = 1.0
FEW_ELEMENTS = 1 << 13
"""So many scores are computed in float64 on the CPU, where that costs less than forms that keep the digits."""

ELEMENTS_ON_DEVICE = 1 << 25
"""Elements of a block on an accelerator, where each is some forty launches and must be worth them: 128 MiB."""

LONG_ROW = 512
"""Columns from which torch's own sum is as fast as a product with ones, and more exact."""

Rows = Callable[[Tensor | None], tuple[Tensor, Tensor, Tensor]]
"""Student's scores, teacher's scores and p_t of flat row numbers [len(rows), N], or of all [..., N] for None."""


def refine_near(kl: Tensor, rows_of: Rows, temperature: float) -> Tensor:
    """kl [...], with the rows below NEAR computed anew by `near_kl`.

    On the CPU only the rows that need it are computed; elsewhere all are, as looking would wait for the device.
    """
    is_near = kl < NEAR
    if kl.device.type != "cpu":
        return torch.where(is_near, near_kl(*rows_of(None), temperature), kl)
    rows = is_near.flatten().nonzero().squeeze(1)
    if len(rows) == kl.numel():
        return _near_kl_on_cpu(*rows_of(None), temperature)
    if len(rows):
        kl = kl.clone(memory_format=torch.contiguous_format)
        kl.view(-1)[rows] = _near_kl_on_cpu(*rows_of(rows), temperature)
    return kl


def _near_kl_on_cpu(scores_s: Tensor, scores_t: Tensor, p_t: Tensor, temperature: float) -> Tensor:
    if scores_s.numel() > FEW_ELEMENTS or scores_s.dtype == torch.float64:
        return near_kl(scores_s, scores_t, p_t, temperature)
    # Of few numbers the operations cost more than the arithmetic: float64 has digits enough for the textbook form.
    log_p_s, log_p_t = ((scores.double() / temperature).log_softmax(-1) for scores in (scores_s, scores_t))
    return expectation(log_p_t.exp(), log_p_t - log_p_s).to(scores_s.dtype)


def near_kl(scores_s: Tensor, scores_t: Tensor, p_t: Tensor, temperature: float = 1.0) -> Tensor:
    """log1p(Σ p_t (eˣ − 1 − x)) over the last axis: KL of nearly equal softmaxes to full relative precision."""
    gap = scores_s - scores_t
    mean_gap = expectation(p_t, gap)[..., None]
    if may_hold(mean_gap.abs() > 0.5):
        # A large common shift is taken off by whole numbers, which are exact, before the difference is rounded.
        scores_s = scores_s - mean_gap.round().nan_to_num(0.0, 0.0, 0.0)
        gap = scores_s - scores_t
        mean_gap = expectation(p_t, gap)[..., None]
    offset = gap.sub_(mean_gap).div_(temperature)
    # What rounding left of the mean would count with its square: KL = log1p(Σ p_t (eˣ − 1 − x) + x̄) − x̄.
    mean_offset = expectation(p_t, offset)
    excess = _excess(scores_s, scores_t, p_t, offset, mean_gap, temperature)
    return excess.add_(mean_offset).log1p_().sub_(mean_offset).clamp_min_(0.0)


def _excess(
    scores_s: Tensor, scores_t: Tensor, p_t: Tensor, offset: Tensor, mean_gap: Tensor, temperature: float
) -> Tensor:
    """Σ p_t (eˣ − 1 − x), x = offset."""
    largest = (
        max(map(abs, map(float, offset.aminmax()))) if offset.device.type == "cpu" and offset.numel() else math.inf
    )
    if largest < SERIES_RADIUS:
        return _sum(expm1_minus_x(offset, largest).mul_(p_t))
    # Far columns take p_t·eˣ from the student's score, which also holds where p_t is 0.
    log_sum_t = (scores_t / temperature).logsumexp(-1, keepdim=True)
    far = ((scores_s - mean_gap) / temperature - log_sum_t).exp_() - torch.where(p_t > 0, p_t * (1 + offset), 0.0)
    is_small = offset.abs() < SERIES_RADIUS
    near = expm1_minus_x(torch.where(is_small, offset, 0.0), SERIES_RADIUS).mul_(p_t)
    return _sum(torch.where(is_small, near, far))


def expectation(probability: Tensor, value: Tensor) -> Tensor:
    """Σ p·value over the last axis, where 0 · ∞ counts as 0 (it arises where the teacher is −inf)."""
    product = probability * value
    total = _sum(product)
    if not may_hold(total.isnan()):
        return total
    return _sum(torch.where(probability > 0, product, 0.0))


def may_hold(condition: Tensor) -> bool:
    """Whether a rare case is worth computing: looked up on the CPU, assumed elsewhere, where looking would wait."""
    return condition.device.type != "cpu" or bool(condition.any())


def _sum(rows: Tensor) -> Tensor:
    # torch sums short rows an element at a time, where a product with ones is up to nine times as fast; over long rows
    # the product is the slower one and adds too many numbers in turn: 21,841 equal ones come out 1e-5 wrong.
    return rows @ rows.new_ones(rows.shape[-1]) if rows.shape[-1] < LONG_ROW else rows.sum(-1)


def expm1_minus_x(x: Tensor, largest: float) -> Tensor:
    """eˣ − 1 − x for |x| ≤ largest ≤ 1 to full relative precision (Taylor; expm1(x) − x would lose digits)."""
    digits = torch.finfo(x.dtype).eps / 4
    last = next(power for power in range(3, 25) if 2 * largest ** (power - 1) / math.factorial(power + 1) < digits)
    series = torch.full_like(x, 1 / math.factorial(last))
    for power in range(last - 1, 1, -1):
        series.mul_(x).add_(1 / math.factorial(power))
    return series.mul_(x).mul_(x)


def kl_of_maps(p: Tensor, log_p: Tensor, p_t: Tensor) -> Tensor:
    """KL(p_t ‖ p) over the last axis of probabilities that are not a softmax of known scores.

    Each term is p_t log(p_t/p) + p − p_t ≥ 0, the additions summing to zero; with y = p/p_t − 1 it is p_t (y − log1p(y)),
    which for small y is a series in y/(2 + y).
    """
    excess = (p - p_t) / p_t.clamp_min(torch.finfo(p_t.dtype).tiny)
    small = excess.abs() < 0.25
    y = torch.where(small, excess, 0.0)
    ratio = y / (2 + y)
    square = ratio * ratio
    num_terms = 14 if p.dtype == torch.float64 else 6
    series = torch.full_like(y, 1 / (2 * num_terms + 1))
    for term in range(num_terms - 1, 0, -1):
        series = series * square + 1 / (2 * term + 1)
    near = p_t * (y * ratio - 2 * ratio * square * series)
    far = torch.where(p_t > 0, p_t * (p_t.log() - log_p), 0.0) + (p - p_t)
    return _sum(torch.where(small, near, far))
