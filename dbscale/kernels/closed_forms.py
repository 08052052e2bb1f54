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

SERIES_RADIUS = 0.5
SMALL_RADIUS = 0.03


def refine_near(kl: Tensor, scores: Callable[[Tensor | None], tuple[Tensor, Tensor]], temperature: float) -> Tensor:
    """kl [...], with the rows below NEAR computed anew by `near_kl`.

    `scores(rows)` gives the student's and teacher's scores [len(rows), N] of flat row numbers, or all [..., N] for
    None. On the CPU only the rows that need it are computed; elsewhere all are, as looking would wait for the device.
    """
    is_near = kl < NEAR
    if kl.device.type != "cpu":
        return torch.where(is_near, near_kl(*scores(None), temperature), kl)
    rows = is_near.flatten().nonzero().squeeze(1)
    if len(rows):
        kl = kl.clone(memory_format=torch.contiguous_format)
        kl.view(-1)[rows] = near_kl(*scores(rows), temperature)
    return kl


def near_kl(scores_s: Tensor, scores_t: Tensor, temperature: float = 1.0) -> Tensor:
    """log1p(Σ p_t (eˣ − 1 − x)) over the last axis: KL of nearly equal softmaxes to full relative precision."""
    p_t = (scores_t / temperature).softmax(-1)
    gap = scores_s - scores_t
    mean_gap = expectation(p_t, gap)[..., None]
    offset = gap.sub_(mean_gap).div_(temperature)
    largest = float(offset.abs().amax()) if offset.device.type == "cpu" else math.inf
    if largest < SERIES_RADIUS:
        return _sum(p_t.mul_(expm1_minus_x(offset, largest))).log1p_()
    # Far columns take p_t·eˣ from the student's score, which also holds where p_t is 0.
    log_sum_t = (scores_t / temperature).logsumexp(-1, keepdim=True)
    far = ((scores_s - mean_gap) / temperature - log_sum_t).exp_() - torch.where(p_t > 0, p_t * (1 + offset), 0.0)
    is_small = offset.abs() < SERIES_RADIUS
    near = p_t * expm1_minus_x(torch.where(is_small, offset, 0.0), SERIES_RADIUS)
    return _sum(torch.where(is_small, near, far)).clamp_min_(0.0).log1p_()


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
    # A product with ones: torch sums short rows an element at a time.
    return rows @ rows.new_ones(rows.shape[-1])


def expm1_minus_x(x: Tensor, largest: float) -> Tensor:
    """eˣ − 1 − x for |x| ≤ largest ≤ 1/2 to full relative precision (Taylor; expm1(x) − x would lose digits)."""
    num_terms = 16 if x.dtype == torch.float64 else 3 if largest < SMALL_RADIUS else 8
    series = torch.full_like(x, 1 / math.factorial(num_terms + 1))
    for power in range(num_terms, 1, -1):
        series = torch.addcmul(x.new_full((), 1 / math.factorial(power)), series, x, out=series)
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
