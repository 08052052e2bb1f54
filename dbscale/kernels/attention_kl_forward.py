"""The Triton forward kernel: attention output and KL of one student head to one teacher head, one walk over the keys.

Flash-style: one program holds a block of query rows, the maps exist a tile at a time. Both softmaxes are kept as
(maximum, sum) of raw scores; the expected gap Σ p_t u rides along. Rows that turn out nearly equal take a second walk
for the form that keeps their digits (see `closed_forms`). Launched by `attention_kl_triton`.
"""

import triton
import triton.language as tl

from dbscale.kernels.triton_math import (
    LOG2_E,
    NEAR,
    dot,
    load_rows,
    log1p_less_mean,
    near_terms,
    ratio_of,
    store_rows,
)

MISSING: tl.constexpr = tl.constexpr(-1e30)
"""Score of a key that does not exist: no mass, and finite, so that the gap of two of them counts nothing."""


@triton.jit
def _scores(q, k, batch, head, keys, num_tokens, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Raw scores q·kᵀ of a block of rows and a block of keys."""
    scores = dot(q, tl.trans(load_rows(k, batch, head, keys, num_tokens, WIDTH, PADDED)))
    return tl.where((keys < num_tokens)[None, :], scores, MISSING)


@triton.jit
def _absorb(scores, maximum, total, rate):
    """Online softmax: exp of the scores, the new maximum and sum, and the factor for what was summed before."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    shrink = tl.exp2((maximum - new_maximum) * rate)
    exps = tl.exp2((scores - new_maximum[:, None]) * rate)
    return exps, new_maximum, total * shrink + tl.sum(exps, 1), shrink


@triton.jit
def _gap(z_s, z_t, usual_gap, scale_ratio):
    """Student's less teacher's scores, in the student's raw scores: equal scores and scales then leave exactly 0.

    The usual gap of a row is a whole number: taking it off is exact, and a large common shift costs no digits.
    """
    return (z_s - usual_gap[:, None]) - z_t * scale_ratio


@triton.jit
def _near_kl(q_rows, k_s, q_t_rows, k_t, place, num_tokens, scales, stats_s, stats_t, usual_gap, mean_gap, kl,
             D_S: tl.constexpr, P_S: tl.constexpr, D_T: tl.constexpr, P_T: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Second walk: log1p(Σ p_t (eˣ − 1 − x)) of every row, with what rounding left of Σ p_t x."""
    excess = tl.zeros_like(kl)
    mean = excess
    inv_s, inv_t, kappa = 1.0 / stats_s[1], 1.0 / stats_t[1], tl.exp(tl.minimum(kl, NEAR))
    for start in range(0, num_tokens, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        z_s = _scores(q_rows, k_s, place[0], place[1], keys, num_tokens, D_S, P_S)
        z_t = _scores(q_t_rows, k_t, place[0], place[2], keys, num_tokens, D_T, P_T)
        gap = _gap(z_s, z_t, usual_gap, scales[1] / scales[0])
        offset = (gap - mean_gap[:, None]) * scales[0]
        p_s = tl.exp2((z_s - stats_s[0][:, None]) * (scales[0] * LOG2_E)) * inv_s[:, None]
        p_t = tl.exp2((z_t - stats_t[0][:, None]) * (scales[1] * LOG2_E)) * inv_t[:, None]
        excess += tl.sum(near_terms(p_s, p_t, offset, kappa[:, None]), 1)
        mean += tl.sum(p_t * offset, 1)
    return log1p_less_mean(excess, mean)


@triton.jit
def forward_kernel(
    q_s, k_s, v, q_t, k_t, out, kl_rows, statistics, num_heads, num_tokens, repeats, scale_s, scale_t,
    HAS_OUT: tl.constexpr, HAS_KL: tl.constexpr,
    D_S: tl.constexpr, P_S: tl.constexpr, D_V: tl.constexpr, P_V: tl.constexpr, D_T: tl.constexpr, P_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [B, H, N, D_V], kl_rows [B, H, N], statistics [4, B, H, N]: maximum and sum of the student, of the teacher."""
    num_blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    place = (batch_head // num_heads, batch_head % num_heads, batch_head % num_heads // repeats)
    rows = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    q_rows = load_rows(q_s, place[0], place[1], rows, num_tokens, D_S, P_S)
    max_s = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    sum_s = tl.zeros((BLOCK_M,), tl.float32)
    max_t, sum_t, gaps, usual_gap = max_s, sum_s, sum_s, sum_s
    total = tl.zeros((BLOCK_M, P_V), tl.float32)
    q_t_rows = q_rows
    scale_ratio = scale_t / scale_s
    if HAS_KL:
        q_t_rows = load_rows(q_t, place[0], place[2], rows, num_tokens, D_T, P_T)
    for start in range(0, num_tokens, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        z_s = _scores(q_rows, k_s, place[0], place[1], keys, num_tokens, D_S, P_S)
        exp_s, max_s, sum_s, shrink_s = _absorb(z_s, max_s, sum_s, scale_s * LOG2_E)
        if HAS_KL:
            z_t = _scores(q_t_rows, k_t, place[0], place[2], keys, num_tokens, D_T, P_T)
            exp_t, max_t, sum_t, shrink_t = _absorb(z_t, max_t, sum_t, scale_t * LOG2_E)
            usual_gap = tl.where(start == 0, tl.floor(max_s - max_t * scale_ratio + 0.5), usual_gap)
            gap = _gap(z_s, z_t, usual_gap, scale_ratio)
            gaps = gaps * shrink_t + tl.sum(exp_t * gap, 1)
        if HAS_OUT:
            values = load_rows(v, place[0], place[1], keys, num_tokens, D_V, P_V)
            total = total * shrink_s[:, None] + dot(exp_s.to(values.dtype), values)

    exists = rows < num_tokens
    at = batch_head * num_tokens + rows
    plane = (tl.num_programs(0) // num_blocks).to(tl.int64) * num_tokens
    tl.store(statistics + at, max_s, mask=exists)
    tl.store(statistics + plane + at, sum_s, mask=exists)
    if HAS_OUT:
        store_rows(out, place[0], place[1], rows, num_tokens, total / sum_s[:, None], D_V, P_V)
    if HAS_KL:
        tl.store(statistics + 2 * plane + at, max_t, mask=exists)
        tl.store(statistics + 3 * plane + at, sum_t, mask=exists)
        mean_gap = gaps / sum_t
        # Maxima are subtracted from each other before the sums join in: the log-sum-exps themselves may be large.
        kl = ((max_s - usual_gap) - max_t * scale_ratio - mean_gap) * scale_s + tl.log(ratio_of(sum_s, sum_t))
        if tl.min(tl.where(exists, kl, NEAR), 0) < NEAR:
            near = _near_kl(q_rows, k_s, q_t_rows, k_t, place, num_tokens, (scale_s, scale_t), (max_s, sum_s),
                            (max_t, sum_t), usual_gap, mean_gap, kl, D_S, P_S, D_T, P_T, BLOCK_N // 2)  # fmt: skip
            kl = tl.where(kl < NEAR, near, kl)
        tl.store(kl_rows + at, kl, mask=exists)
