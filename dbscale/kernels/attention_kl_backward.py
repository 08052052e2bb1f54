"""The Triton backward kernels of `attention_kl_forward`: gradients in q, k and v of output and KL together.

The maps are made anew, a tile at a time, from the saved (maximum, sum). Every sum has one owner and one order: no
atomics, so results repeat bitwise. Two plans with the same tiles: where there are many heads, one program per head
computes everything from one set of tiles; where there are few long sequences, keys and queries are spread over
programs, once for grad_k and grad_v and once for grad_q. Launched by `attention_kl_triton`.
"""

import triton
import triton.language as tl

from dbscale.kernels.triton_math import LOG2_E, dot, load_rows, ratio_of, store_rows


@triton.jit
def row_dot_kernel(
    out, grad_out, pulls, num_heads, num_tokens, D_V: tl.constexpr, P_V: tl.constexpr, BLOCK_M: tl.constexpr
):
    """pulls [B, H, N] = Σ out · grad_out: what the softmax's normalisation takes back from every row."""
    num_blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads
    rows = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    left = load_rows(out, batch, head, rows, num_tokens, D_V, P_V).to(tl.float32)
    right = load_rows(grad_out, batch, head, rows, num_tokens, D_V, P_V).to(tl.float32)
    tl.store(pulls + batch_head * num_tokens + rows, tl.sum(left * right, 1), mask=rows < num_tokens)


@triton.jit
def _row_numbers(statistics, pulls, upstream, place, rows, num_tokens, plane, HAS_OUT: tl.constexpr,
                 HAS_KL: tl.constexpr):  # fmt: skip
    """Per query row: maximum, 1/sum, pull; teacher's maximum, sum ratio, upstream/sum. 0 weights where no row is."""
    exists = rows < num_tokens
    at = (place[0] * place[3] + place[1]) * num_tokens + rows
    max_s = tl.load(statistics + at, mask=exists, other=0.0)
    sum_s = tl.load(statistics + plane + at, mask=exists, other=1.0)
    inverse = tl.where(exists, 1.0 / sum_s, 0.0)
    pull, max_t, sum_ratio, weight = inverse, inverse, inverse, inverse
    if HAS_OUT:
        pull = tl.load(pulls + at, mask=exists, other=0.0)
    if HAS_KL:
        max_t = tl.load(statistics + 2 * plane + at, mask=exists, other=0.0)
        sum_ratio = ratio_of(sum_s, tl.load(statistics + 3 * plane + at, mask=exists, other=1.0))
        address = upstream[0] + place[0] * upstream[1] + place[1] * upstream[2] + rows.to(tl.int64) * upstream[3]
        weight = tl.load(address, mask=exists, other=0.0).to(tl.float32) * inverse
    return max_s, inverse, pull, max_t, sum_ratio, weight


@triton.jit
def _slope(z_s, z_t, grad_p, row, scales, HAS_OUT: tl.constexpr, HAS_KL: tl.constexpr):
    """The student's map p and the gradient in its scores: p (grad_p − pull) + weight (p_s − p_t).

    The KL part is (exp_s − exp_t·ratio) · weight/sum: a product less a product would be contracted to a fused
    multiply-add, and equal maps would leave its rounding behind instead of zero.
    """
    max_s, inverse, pull, max_t, sum_ratio, weight = row
    exp_s = tl.exp2((z_s - max_s) * (scales[0] * LOG2_E))
    p = exp_s * inverse
    slope = tl.zeros_like(p)
    if HAS_OUT:
        slope = p * (grad_p - pull)
    if HAS_KL:
        exp_t = tl.exp2((z_t - max_t) * (scales[1] * LOG2_E))
        slope += weight * (exp_s - exp_t * sum_ratio)
    return p, slope


@triton.jit
def _down(row):
    """Row numbers [M] as [M, 1]."""
    return row[0][:, None], row[1][:, None], row[2][:, None], row[3][:, None], row[4][:, None], row[5][:, None]


@triton.jit
def _key_block(
    q_s, k_s, v, q_t, k_t, grad_out, statistics, pulls, upstream, grad_q, grad_k, grad_v, partial_q,
    place, plane, start, num_tokens, scales,
    HAS_OUT: tl.constexpr, HAS_KL: tl.constexpr, WITH_Q: tl.constexpr,
    D_S: tl.constexpr, P_S: tl.constexpr, D_V: tl.constexpr, P_V: tl.constexpr, D_T: tl.constexpr, P_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of one block of keys; WITH_Q also adds the block's part to grad_q of every row."""
    batch, head, head_t = place[0], place[1], place[2]
    keys = start + tl.arange(0, BLOCK_N)
    k_block = load_rows(k_s, batch, head, keys, num_tokens, D_S, P_S)
    v_block, k_t_block = k_block, k_block
    if HAS_OUT:
        v_block = load_rows(v, batch, head, keys, num_tokens, D_V, P_V)
    if HAS_KL:
        k_t_block = load_rows(k_t, batch, head_t, keys, num_tokens, D_T, P_T)
    key_exists = (keys < num_tokens)[None, :]
    total_k = tl.zeros((BLOCK_N, P_S), tl.float32)
    total_v = tl.zeros((BLOCK_N, P_V), tl.float32)
    for first_row in range(0, num_tokens, BLOCK_M):
        rows = first_row + tl.arange(0, BLOCK_M)
        row = _down(_row_numbers(statistics, pulls, upstream, place, rows, num_tokens, plane, HAS_OUT, HAS_KL))
        q_rows = load_rows(q_s, batch, head, rows, num_tokens, D_S, P_S)
        z_s = tl.where(key_exists, dot(q_rows, tl.trans(k_block)), -float("inf"))
        z_t, grad_p, grad_rows = z_s, z_s, q_rows
        if HAS_KL:
            q_t_rows = load_rows(q_t, batch, head_t, rows, num_tokens, D_T, P_T)
            z_t = tl.where(key_exists, dot(q_t_rows, tl.trans(k_t_block)), -float("inf"))
        if HAS_OUT:
            grad_rows = load_rows(grad_out, batch, head, rows, num_tokens, D_V, P_V)
            grad_p = dot(grad_rows, tl.trans(v_block))
        p, slope = _slope(z_s, z_t, grad_p, row, scales, HAS_OUT, HAS_KL)
        slope = slope.to(q_rows.dtype)
        total_k += dot(tl.trans(slope), q_rows)
        if HAS_OUT:
            total_v += dot(tl.trans(p.to(grad_rows.dtype)), grad_rows)
        if WITH_Q:
            part = tl.zeros((BLOCK_M, P_S), tl.float32)
            if start > 0:
                part = load_rows(partial_q, batch, head, rows, num_tokens, D_S, P_S)
            part = tl.dot(slope, k_block, part, input_precision="ieee")
            if start + BLOCK_N < num_tokens:
                store_rows(partial_q, batch, head, rows, num_tokens, part, D_S, P_S)
            else:
                store_rows(grad_q, batch, head, rows, num_tokens, part * scales[0], D_S, P_S)
    store_rows(grad_k, batch, head, keys, num_tokens, total_k * scales[0], D_S, P_S)
    if HAS_OUT:
        store_rows(grad_v, batch, head, keys, num_tokens, total_v, D_V, P_V)


@triton.jit
def keys_kernel(
    q_s, k_s, v, q_t, k_t, grad_out, statistics, pulls, upstream, grad_q, grad_k, grad_v, partial_q,
    num_heads, num_tokens, repeats, scale_s, scale_t,
    HAS_OUT: tl.constexpr, HAS_KL: tl.constexpr, WHOLE_HEAD: tl.constexpr,
    D_S: tl.constexpr, P_S: tl.constexpr, D_V: tl.constexpr, P_V: tl.constexpr, D_T: tl.constexpr, P_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys per program, or with WHOLE_HEAD all blocks of a head in turn, and grad_q with them."""
    batch_head = tl.program_id(0).to(tl.int64)
    place = (batch_head // num_heads, batch_head % num_heads, batch_head % num_heads // repeats, num_heads)
    plane = tl.num_programs(0).to(tl.int64) * num_tokens
    first = tl.program_id(1) * BLOCK_N
    last = num_tokens if WHOLE_HEAD else first + 1
    for start in range(first, last, BLOCK_N):
        _key_block(
            q_s, k_s, v, q_t, k_t, grad_out, statistics, pulls, upstream, grad_q, grad_k, grad_v, partial_q,
            place, plane, start, num_tokens, (scale_s, scale_t), HAS_OUT, HAS_KL, WHOLE_HEAD,
            D_S, P_S, D_V, P_V, D_T, P_T, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if WHOLE_HEAD:
            tl.debug_barrier()  # the next block adds to what other threads have just written


@triton.jit
def queries_kernel(
    q_s, k_s, v, q_t, k_t, grad_out, statistics, pulls, upstream, grad_q,
    num_heads, num_tokens, repeats, scale_s, scale_t,
    HAS_OUT: tl.constexpr, HAS_KL: tl.constexpr,
    D_S: tl.constexpr, P_S: tl.constexpr, D_V: tl.constexpr, P_V: tl.constexpr, D_T: tl.constexpr, P_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_q of one block of rows."""
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head, head_t = batch_head // num_heads, batch_head % num_heads, batch_head % num_heads // repeats
    plane = tl.num_programs(0).to(tl.int64) * num_tokens
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = (batch, head, head_t, num_heads)
    row = _down(_row_numbers(statistics, pulls, upstream, place, rows, num_tokens, plane, HAS_OUT, HAS_KL))
    q_rows = load_rows(q_s, batch, head, rows, num_tokens, D_S, P_S)
    q_t_rows, grad_rows = q_rows, q_rows
    if HAS_KL:
        q_t_rows = load_rows(q_t, batch, head_t, rows, num_tokens, D_T, P_T)
    if HAS_OUT:
        grad_rows = load_rows(grad_out, batch, head, rows, num_tokens, D_V, P_V)
    total = tl.zeros((BLOCK_M, P_S), tl.float32)
    for start in range(0, num_tokens, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        key_exists = (keys < num_tokens)[None, :]
        k_block = load_rows(k_s, batch, head, keys, num_tokens, D_S, P_S)
        z_s = tl.where(key_exists, dot(q_rows, tl.trans(k_block)), -float("inf"))
        z_t, grad_p = z_s, z_s
        if HAS_KL:
            k_t_block = load_rows(k_t, batch, head_t, keys, num_tokens, D_T, P_T)
            z_t = tl.where(key_exists, dot(q_t_rows, tl.trans(k_t_block)), -float("inf"))
        if HAS_OUT:
            grad_p = dot(grad_rows, tl.trans(load_rows(v, batch, head, keys, num_tokens, D_V, P_V)))
        _, slope = _slope(z_s, z_t, grad_p, row, (scale_s, scale_t), HAS_OUT, HAS_KL)
        total += dot(slope.to(k_block.dtype), k_block)
    store_rows(grad_q, batch, head, rows, num_tokens, total * scale_s, D_S, P_S)
