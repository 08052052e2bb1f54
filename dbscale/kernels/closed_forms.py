"""KL of two softmaxes without cancellation, and its gradient, in plain torch operations.

With u = z_s − z_t, ū = Σ p_t u and x = u − ū, KL = −ū + lse_s − lse_t = log1p(Σ p_t (eˣ − 1 − x)). The first form is cheap
and loses every digit where the softmaxes agree; the second keeps them. Both are used, each where it is the better one.
Used by the chunked backends; the Triton kernels hold the same forms for themselves.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

NEAR = 0.25
"""Rows whose KL is below it are computed by the second form."""

SERIES_RADIUS = 0.5


def softmax_parts(scores: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(scores / T), the row maximum of the scores and the row sum of exp((scores − maximum)/T).

    A row of −inf alone gets the maximum 0, the sum 0 and probabilities 0.
    """
    maximum = scores.amax(-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    probability = torch.sub(scores, maximum)
    if temperature != 1.0:
        probability.div_(temperature)
    probability.exp_()
    total = probability.sum(-1, keepdim=True)
    # An empty row divides by 1: its probabilities stay 0, not NaN.
    probability.div_(total.masked_fill(total == 0, 1.0))
    return probability, maximum, total


class ScoresKL(NamedTuple):
    """What `kl_of_scores` found; per row where it says [..., 1]."""

    kl: Tensor
    """[..., 1]."""
    p_s: Tensor
    p_t: Tensor
    """Equal to p_s in a row where the teacher has no mass at all: it pulls nowhere."""
    maximum_s: Tensor
    """[..., 1]."""
    total_s: Tensor
    """[..., 1], the sum of exp((scores_s − maximum_s)/T)."""


def kl_of_scores(scores_s: Tensor, scores_t: Tensor, temperature: float = 1.0) -> ScoresKL:
    """KL(softmax(scores_t/T) ‖ softmax(scores_s/T)) over the last axis; its gradient in scores_s is (p_s − p_t)/T.

    Leading axes broadcast. Columns where scores_t is −inf have no mass; a row of −inf alone has KL 0.
    """
    p_s, maximum_s, total_s = softmax_parts(scores_s, temperature)
    p_t, maximum_t, total_t = softmax_parts(scores_t, temperature)
    gap = scores_s - scores_t
    mean_gap = _expectation(p_t, gap)
    # Maxima are subtracted from each other before the sums join in: the log-sum-exps themselves may be large.
    kl = (maximum_s - maximum_t - mean_gap) / temperature + (total_s / total_t).log()
    is_near = kl < NEAR
    if _may_hold(is_near):
        offset = gap.sub_(mean_gap).div_(temperature)
        kl = torch.where(is_near, _near_kl(p_s, p_t, offset, kl), kl)
    is_empty = total_t == 0
    if _may_hold(is_empty):
        kl, p_t = kl.masked_fill(is_empty, 0.0), torch.where(is_empty, p_s, p_t)
    return ScoresKL(kl, p_s, p_t, maximum_s, total_s)


def _may_hold(condition: Tensor) -> bool:
    """Whether the rare case is worth computing: looked up on the CPU, assumed elsewhere, where looking would wait."""
    return condition.device.type != "cpu" or bool(condition.any())


def _expectation(probability: Tensor, value: Tensor) -> Tensor:
    product = probability * value
    total = product.sum(-1, keepdim=True)
    if not _may_hold(total.isnan()):
        return total
    # 0 · ∞ arises where the teacher is −inf.
    return torch.where(probability > 0, product, 0.0).sum(-1, keepdim=True)


def _near_kl(p_s: Tensor, p_t: Tensor, offset: Tensor, plain: Tensor) -> Tensor:
    """log1p(Σ p_t (eˣ − 1 − x)), x = offset; far columns take p_t·eˣ from p_s, which cannot overflow."""
    far = p_s * plain.exp() - torch.where(p_t > 0, p_t * (1 + offset), 0.0)
    small = offset.abs() < SERIES_RADIUS
    near = p_t * expm1_minus_x(torch.where(small, offset, 0.0))
    return torch.where(small, near, far).sum(-1, keepdim=True).clamp_min(0.0).log1p()


def expm1_minus_x(x: Tensor) -> Tensor:
    """eˣ − 1 − x for |x| ≤ 1/2 to full relative precision (Taylor series; expm1(x) − x would lose digits)."""
    num_terms = 16 if x.dtype == torch.float64 else 8
    series = torch.full_like(x, 1 / math.factorial(num_terms + 1))
    for power in range(num_terms, 1, -1):
        series.mul_(x).add_(1 / math.factorial(power))
    return series.mul_(x).mul_(x)


def kl_of_maps(p: Tensor, log_p: Tensor, p_t: Tensor) -> Tensor:
    """KL(p_t ‖ p) over the last axis, [..., 1], of probabilities that are not a softmax of known scores.

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
    return torch.where(small, near, far).sum(-1, keepdim=True)
