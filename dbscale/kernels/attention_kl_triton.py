"""Attention output and KL of maps by fused Triton kernels, as torch operators with their gradients.

Flash-style: a program holds a block of query rows (forward) or keys (backward), and the maps exist a tile at a time. A
softmax is kept as (maximum, sum) of raw scores; for backward only inputs, output and a few numbers per row are kept, and of
averaged heads one number per entry of a map. Every sum has one owner and one order: no atomics, so results repeat bitwise.

*Paired* heads (`head_map="repeat"`, or equal counts) compare each student head with one teacher head, output and KL in
one walk over the keys. *Grouped* heads (`"mean"` of unequal counts) compare the mean of a group's student maps with the
mean of its teacher maps p_t, in a second walk, as the mean needs every head's sum. With share_h = p_h / Σ p_h of the
group, the gradient in a head's scores is p_h·Σ_j p_t share_h − p_t share_h; log₂ (p_t / Σ p_h) is what the second walk
leaves for backward, where making it anew for each head took five times as long as all else. Mixing matrices run eager.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from dbscale.kernels.attention_kl_eager import MapPair
from dbscale.kernels.kd_loss_triton import LOG2_E

MISSING: tl.constexpr = tl.constexpr(-1e30)  # the score of no key: no mass, and finite, so that two of them differ by 0
TINY: tl.constexpr = tl.constexpr(1e-37)
VECTOR: tl.constexpr = tl.constexpr(16)  # entries of a stored map begin their rows at multiples of it
HELD_BYTES = 160 * 1024
"""Query rows of a group's heads up to so many stay in an SM's memory (227 KiB) from tile to tile."""


FASTEST = {
    "alone": (64, 32, 4, 3),
    "paired": (64, 32, 4, 3),
    "grouped": (64, 32, 4, 1),
    "backward": (64, 64, 4, 1),
    "backward_grouped": (64, 32, 4, 1),
}
"""Rows, keys, warps and stages."""


def kl_rows_triton(pair: MapPair) -> Tensor:
    """KL(teacher map ‖ student map) of every row: [B, M, N]."""
    return _attention(pair, None)[1]


def out_and_kl_rows_triton(pair: MapPair, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention output [B, H_s, N, d_v] over all tokens and the KL rows of the sliced maps."""
    if pair.rows_shape[2] == pair.q_s.shape[2]:
        out, rows, *_ = _attention(pair, unit_stride(v))
        return out, rows
    out = F.scaled_dot_product_attention(pair.q_s, pair.k_s, v, scale=pair.scale_s)
    return out, kl_rows_triton(pair.sliced())


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its width is not the contiguous axis, as the kernels read it."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _attention(pair: MapPair, v: Tensor | None) -> tuple[Tensor, ...]:
    if torch.float64 in (pair.q_s.dtype, pair.q_t.dtype):
        raise ValueError("attention KL: backend='triton' accumulates in float32; use backend='eager' for float64")
    q_s, k_s, q_t, k_t = (unit_stride(each) for each in (pair.q_s, pair.k_s, pair.q_t, pair.k_t))
    heads = [pair.heads.group_s, pair.heads.group_t, pair.heads.repeats]
    return _forward(q_s, k_s, v, q_t, k_t, pair.scale_s, pair.scale_t, heads)


@triton.constexpr_function
def padded(width):
    """The tile width of a head width: a power of two, at least the 16 that a tensor core takes."""
    return max(triton.next_power_of_2(width), 16)


def tile_shape(
    kind: str, dtype: torch.dtype, width_s: int, width_v: int, width_t: int, group: int = 1
) -> dict[str, int]:
    """Rows and keys per tile and the warps that hold them, unspilled in a Hopper's registers.

    `kind`: forward of one model `alone` or `paired` with its teacher, of maps `grouped` by `group` heads of both together;
    `backward`, `backward_grouped`.
    For 16-bit heads of 64 the fastest of those tried on an H200 (docs/benchmarks/kernels.md), else the largest that fit.
    `tests/kernels/test_compile_gate.py` compiles them for sm_90 and holds them to it (float32 up to width 64).
    """
    narrow, widest = padded(min(width_s, width_v)), padded(max(width_s, width_v, width_t))
    if dtype != torch.float32 and narrow == widest == 64 and group <= 5:
        return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), FASTEST[kind], strict=True))
    backward = kind.startswith("backward")
    rows, keys, warps, stages = 64, 64, 4, 2
    if dtype == torch.float32:  # no tensor cores at full precision: every thread holds whole rows
        rows, keys, warps, stages = 32 if backward and widest <= 64 else 16, 16, 4 if widest == 64 else 8, 1
    elif backward:
        rows, keys, warps = (32, 64, 8) if widest > 64 else (32, 64, 4) if narrow >= 64 else (32, 32, 4)
    elif widest > 64:
        warps = 8
    if kind == "grouped":  # the maps of all its heads stand beside one another
        keys, warps, stages = 16 if group > 8 or dtype == torch.float32 else 32, 8, 1
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def _widths(q_s: Tensor, v: Tensor, q_t: Tensor) -> dict[str, int]:
    """Head widths, fixed when a kernel is compiled."""
    return {"D_S": q_s.shape[3], "D_V": v.shape[3], "D_T": q_t.shape[3]}


def _strided(tensor: Tensor) -> tuple:  # (tensor, strides but the last), as `_load_rows` takes it
    return tensor, *tensor.stride()[:3]


def _empty_like(tensor: Tensor) -> Tensor:
    """[B, H, N, width], stored as [B, N, H, width]: the layout in which heads are joined without a copy."""
    return torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _forward_outputs(q_s: Tensor, v: Tensor | None, heads: list[int]) -> tuple[Tensor, ...]:
    """out, KL rows, the student's row numbers (paired: the teacher's, too), and where heads are grouped log₂ (p_t / Σ p_h),
    [B, M, N, N rounded up to whole vectors]."""
    group_s, group_t, _ = heads
    batch, num_heads, num_tokens, _ = q_s.shape
    grouped = group_s * group_t > 1
    out = q_s.new_empty(0) if v is None else _empty_like(v)
    rows = q_s.new_empty((batch, num_heads // group_s, num_tokens), dtype=torch.float32)
    numbers = q_s.new_empty((3 if grouped else 4, batch, num_heads, num_tokens), dtype=torch.float32)
    shape = (*rows.shape, -(-num_tokens // VECTOR.value) * VECTOR.value) if grouped else (0,)
    return out, rows, numbers, q_s.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("dbscale::attention_kl_triton", mutates_args=())
def _forward(
    q_s: Tensor, k_s: Tensor, v: Tensor | None, q_t: Tensor, k_t: Tensor, scale_s: float, scale_t: float,
    heads: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, rows, numbers, log_ratio = outputs = _forward_outputs(q_s, v, heads)
    if not rows.numel():
        return outputs
    group_s, group_t, repeats = heads
    if group_s * group_t == 1:
        _launch_forward(q_s, k_s, v, out, numbers, scale_s, (q_t, k_t, rows, scale_t, repeats))
        return outputs
    _launch_forward(q_s, k_s, v, out, numbers, scale_s)
    numbers_t = q_t.new_empty((2, *q_t.shape[:3]), dtype=torch.float32)
    _launch_forward(q_t, k_t, None, out, numbers_t, scale_t)
    (width_s, width_t), (batch, num_maps, num_tokens) = (q_s.shape[3], q_t.shape[3]), rows.shape
    shape = tile_shape("grouped", q_s.dtype, width_s, width_s, width_t, group_s + group_t)
    row_bytes = (group_s * padded(width_s) + group_t * padded(width_t)) * q_s.element_size()
    grouped_kernel[(triton.cdiv(num_tokens, shape["BLOCK_M"]) * batch * num_maps,)](
        *map(_strided, (q_s, k_s, q_t, k_t)), rows, numbers, numbers_t, log_ratio, num_maps, num_tokens, scale_s, scale_t,
        GROUP_S=group_s, GROUP_T=group_t, HELD=shape["BLOCK_M"] * row_bytes <= HELD_BYTES, LOG_GROUP=math.log(group_s),
        **_widths(q_s, q_s, q_t), **shape,
    )  # fmt: skip
    return outputs


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor | None, out: Tensor, numbers: Tensor, scale: float, taught: tuple | None = None
) -> None:
    """Output (with `v`) and row numbers of one model; with `taught`, also the teacher's numbers and the KL rows."""
    batch, num_heads, num_tokens, _ = q.shape
    q_t, k_t, rows, scale_t, repeats = (q, k, numbers, scale, 1) if taught is None else taught
    values, out = (q, q) if v is None else (v, out)
    shape = tile_shape("paired" if taught else "alone", q.dtype, q.shape[3], values.shape[3], q_t.shape[3])
    # One axis, blocks of a head side by side: the others end at 65,535, and neighbours share keys in the cache.
    forward_kernel[(triton.cdiv(num_tokens, shape["BLOCK_M"]) * batch * num_heads,)](
        *map(_strided, (q, k, values, q_t, k_t, out)), rows, numbers, num_heads, num_tokens, repeats, scale, scale_t,
        scale_t / scale,  # exactly 1 for equal scales, which the hardware's division does not promise
        HAS_OUT=v is not None, HAS_KL=taught is not None, **_widths(q, values, q_t), **shape,
    )  # fmt: skip


@_forward.register_fake
def _(q_s, k_s, v, q_t, k_t, scale_s, scale_t, heads):
    return _forward_outputs(q_s, v, heads)


def _gradient_outputs(q_s: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q_s), _empty_like(q_s), q_s.new_empty(0) if v is None else _empty_like(v)


@torch.library.custom_op("dbscale::attention_kl_triton_backward", mutates_args=())
def _gradients(
    grad_out: Tensor | None, upstream: Tensor | None, q_s: Tensor, k_s: Tensor, v: Tensor | None, q_t: Tensor,
    k_t: Tensor, out: Tensor, numbers: Tensor, log_ratio: Tensor, scale_s: float, scale_t: float, heads: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _gradient_outputs(q_s, v)
    if not numbers.numel():
        return grads
    batch, num_heads, num_tokens, _ = q_s.shape
    values, has_out, has_kl = q_s if v is None else v, grad_out is not None, upstream is not None
    group_s, group_t, repeats = heads if has_kl else (1, 1, 1)
    grad_rows, pulls = q_s, numbers
    if grad_out is not None:
        grad_rows, pulls = unit_stride(grad_out), torch.empty_like(numbers[0])
        row_dot_kernel[(triton.cdiv(num_tokens, 64) * batch * num_heads,)](
            _strided(out), _strided(grad_rows), pulls, num_heads, num_tokens,
            D_V=out.shape[3], BLOCK_M=64,
        )  # fmt: skip
    weights = numbers[0] if upstream is None else upstream
    operands = (
        *map(_strided, (q_s, grad_rows, q_t, k_s, values, k_t)), (numbers, log_ratio, pulls, weights, *weights.stride()),
    )  # fmt: skip
    _launch_backward(grads, operands, (num_heads, num_tokens, repeats, scale_s, scale_t), {
        "HAS_OUT": has_out, "HAS_KL": has_kl, "GROUP_S": group_s, "GROUPED": group_s * group_t > 1,
        **_widths(q_s, values, q_t),
    })  # fmt: skip
    return grads


def _launch_backward(grads: tuple[Tensor, ...], operands: tuple, numbers: tuple, fixed: dict[str, int]) -> None:
    """grad_k and grad_v by blocks of keys, grad_q by blocks of rows, with the same tiles.

    One walk for all three would have to add to grad_q in memory: on an H200 that was slower, also for many short sequences.
    """
    grad_q, grad_k, grad_v = grads
    batch, num_heads, num_tokens, _ = grad_q.shape
    kind = "backward_grouped" if fixed["GROUPED"] else "backward"
    shape = tile_shape(kind, grad_q.dtype, fixed["D_S"], fixed["D_V"], fixed["D_T"])
    keys_kernel[(batch * num_heads, triton.cdiv(num_tokens, shape["BLOCK_N"]))](
        *operands, *map(_strided, (grad_k, grad_v if grad_v.numel() else grad_k)), *numbers, **fixed, **shape
    )
    queries_kernel[(batch * num_heads, triton.cdiv(num_tokens, shape["BLOCK_M"]))](
        *operands, _strided(grad_q), *numbers, **fixed, **shape
    )


@_gradients.register_fake
def _(grad_out, upstream, q_s, k_s, v, q_t, k_t, out, numbers, log_ratio, scale_s, scale_t, heads):
    return _gradient_outputs(q_s, v)


def _setup_context(ctx, inputs, output) -> None:
    q_s, k_s, v, q_t, k_t, *ctx.settings = inputs
    out, _, numbers, log_ratio = output
    ctx.mark_non_differentiable(numbers, log_ratio)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q_s, k_s, v, q_t, k_t, out, numbers, log_ratio)


def _backward(ctx, grad_out, upstream, *_numbers):
    q_s, k_s, v, *others = ctx.saved_tensors
    grad_out = None if v is None else grad_out
    if grad_out is None and upstream is None:
        return (None,) * 8
    grad_q, grad_k, grad_v = _gradients(grad_out, upstream, q_s, k_s, v, *others, *ctx.settings)
    return grad_q, grad_k, (grad_v if grad_out is not None else None), *(None,) * 5


_forward.register_autograd(_backward, setup_context=_setup_context)


@triton.jit
def _rows_address(matrix, batch, head, tokens, num_tokens, WIDTH: tl.constexpr):
    """Addresses of [tokens, padded] in a [B, H, N, WIDTH] tensor and which exist; matrix = (pointer, strides of B, H, N)."""
    PADDED: tl.constexpr = padded(WIDTH)
    columns = tl.arange(0, PADDED)
    base = matrix[0] + batch * matrix[1] + head * matrix[2]
    inside = (tokens < num_tokens)[:, None]
    if WIDTH != PADDED:
        inside = inside & (columns < WIDTH)[None, :]
    return base + tokens.to(tl.int64)[:, None] * matrix[3] + columns[None, :], inside


@triton.jit
def _load_rows(matrix, batch, head, tokens, num_tokens, WIDTH: tl.constexpr):
    """[tokens, padded width], 0 outside the tensor."""
    address, inside = _rows_address(matrix, batch, head, tokens, num_tokens, WIDTH)
    return tl.load(address, mask=inside, other=0.0)


@triton.jit
def _store_rows(matrix, batch, head, tokens, num_tokens, values, WIDTH: tl.constexpr):
    address, inside = _rows_address(matrix, batch, head, tokens, num_tokens, WIDTH)
    tl.store(address, values.to(matrix[0].dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b):
    """Matrix product accumulated in float32; float32 operands stay float32 rather than TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _ratio_of(above, below):
    """above / below, exactly 1 where they are equal, which the hardware's division does not promise."""
    return tl.where(above == below, 1.0, above / below)


@triton.jit
def _scores(q, k, batch, head, keys, num_tokens, WIDTH: tl.constexpr):
    """Raw scores q·kᵀ of a block of rows and a block of keys."""
    scores = _dot(q, tl.trans(_load_rows(k, batch, head, keys, num_tokens, WIDTH)))
    return tl.where((keys < num_tokens)[None, :], scores, MISSING)


@triton.jit
def _absorb(scores, maximum, total, rate):
    """Online softmax: exp of the scores, the new maximum and sum, and the factor for what was summed before."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    shrink = tl.exp2((maximum - new_maximum) * rate)
    exps = tl.exp2((scores - new_maximum[:, None]) * rate)
    return exps, new_maximum, total * shrink + tl.sum(exps, 1), shrink


@triton.jit
def forward_kernel(
    q_s, k_s, v, q_t, k_t, out, kl_rows, numbers, num_heads, num_tokens, repeats, scale_s, scale_t, scale_ratio,
    HAS_OUT: tl.constexpr, HAS_KL: tl.constexpr,
    D_S: tl.constexpr, D_V: tl.constexpr, D_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [B, H, N, D_V], kl_rows [B, H, N], numbers [·, B, H, N]: maximum and sum of the student, of the teacher."""
    num_blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch, head, head_t = batch_head // num_heads, batch_head % num_heads, batch_head % num_heads // repeats
    rows = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    q_rows = _load_rows(q_s, batch, head, rows, num_tokens, D_S)
    max_s = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    sum_s = tl.zeros((BLOCK_M,), tl.float32)
    max_t, sum_t, gaps, usual_gap = max_s, sum_s, sum_s, sum_s
    total = tl.zeros((BLOCK_M, padded(D_V)), tl.float32)
    q_t_rows = q_rows
    if HAS_KL:
        q_t_rows = _load_rows(q_t, batch, head_t, rows, num_tokens, D_T)
    for start in range(0, num_tokens, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        z_s = _scores(q_rows, k_s, batch, head, keys, num_tokens, D_S)
        exp_s, max_s, sum_s, shrink_s = _absorb(z_s, max_s, sum_s, scale_s * LOG2_E)
        if HAS_KL:
            z_t = _scores(q_t_rows, k_t, batch, head_t, keys, num_tokens, D_T)
            exp_t, max_t, sum_t, shrink_t = _absorb(z_t, max_t, sum_t, scale_t * LOG2_E)
            # Student's less teacher's scores, in the student's raw scores: equal scores and scales leave exactly 0. The
            # usual gap of a row is a whole number: taking it off is exact, and a large common shift costs no digits.
            usual_gap = tl.where(start == 0, tl.floor(max_s - max_t * scale_ratio + 0.5), usual_gap)
            gap = (z_s - usual_gap[:, None]) - z_t * scale_ratio
            gaps = gaps * shrink_t + tl.sum(exp_t * gap, 1)
        if HAS_OUT:
            values = _load_rows(v, batch, head, keys, num_tokens, D_V)
            total = total * shrink_s[:, None] + _dot(exp_s.to(values.dtype), values)

    exists = rows < num_tokens
    at = batch_head * num_tokens + rows
    plane = (tl.num_programs(0) // num_blocks).to(tl.int64) * num_tokens
    tl.store(numbers + at, max_s, mask=exists)
    tl.store(numbers + plane + at, sum_s, mask=exists)
    if HAS_OUT:
        _store_rows(out, batch, head, rows, num_tokens, total / sum_s[:, None], D_V)
    if HAS_KL:
        tl.store(numbers + 2 * plane + at, max_t, mask=exists)
        tl.store(numbers + 3 * plane + at, sum_t, mask=exists)
        # KL = lse_s − lse_t − Σ p_t (z_s − z_t). Maxima are subtracted from each other before the sums join in: the
        # log-sum-exps themselves may be large.
        mean_gap = (max_s - usual_gap) - max_t * scale_ratio - gaps / sum_t
        kl = mean_gap * scale_s + tl.log(_ratio_of(sum_s, sum_t))
        tl.store(kl_rows + at, tl.where(kl < 0.0, 0.0, kl), mask=exists)


@triton.jit
def _head_rows(model, batch, head, rows, num_tokens, WIDTH: tl.constexpr):
    """Of one head: its query rows, and the maximum and log₂ of the sum of their softmax."""
    q, _, numbers, num_heads, plane, _ = model
    at, exists = (batch * num_heads + head) * num_tokens + rows, rows < num_tokens
    maximum = tl.load(numbers + at, mask=exists, other=0.0)
    total = tl.load(numbers + plane + at, mask=exists, other=1.0)
    return _load_rows(q, batch, head, rows, num_tokens, WIDTH), maximum, tl.log2(total)


@triton.jit
def _held_rows(model, batch, first, rows, num_tokens, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """`_head_rows` of `COUNT` heads from `first` on."""
    held = ()
    for index in tl.static_range(COUNT):
        held += (_head_rows(model, batch, first + index, rows, num_tokens, WIDTH),)
    return held


@triton.jit
def _log_map(held, index: tl.constexpr, model, batch, first, rows, keys, num_tokens, WIDTH: tl.constexpr,
             HELD: tl.constexpr):  # fmt: skip
    """log₂ of the map of head first + index on a tile, from its scores made anew; anything where no key is."""
    if HELD:
        q_rows, maximum, log_total = held[index]
    else:
        q_rows, maximum, log_total = _head_rows(model, batch, first + index, rows, num_tokens, WIDTH)
    scores = _dot(q_rows, tl.trans(_load_rows(model[1], batch, first + index, keys, num_tokens, WIDTH)))
    return (scores - maximum[:, None]) * model[5] - log_total[:, None]


@triton.jit
def _parts_of_largest(log_maps, COUNT: tl.constexpr):
    """Maps as parts of the largest, log₂ of that, and the parts' sum: where every map underflows, its parts do not."""
    top, parts = log_maps[0], ()
    for index in tl.static_range(1, COUNT):
        top = tl.maximum(top, log_maps[index])
    total = tl.zeros_like(top)
    for index in tl.static_range(COUNT):
        parts += (tl.exp2(log_maps[index] - top),)
        total += parts[index]
    return parts, top, total


@triton.jit
def _entries(log_ratio, batch_map, rows, keys, num_tokens):
    """Addresses of a tile of a map in [B, M, N, N rounded up], and which exist."""
    stride = (num_tokens + VECTOR - 1) // VECTOR * VECTOR
    first = log_ratio + batch_map.to(tl.int64) * num_tokens * stride
    inside = (rows < num_tokens)[:, None] & (keys < num_tokens)[None, :]
    return first + (rows[:, None] * stride + keys[None, :]), inside  # within one map 32 bits are enough


@triton.jit
def grouped_kernel(
    q_s, k_s, q_t, k_t, kl_rows, numbers, numbers_t, log_ratio, num_maps, num_tokens, scale_s, scale_t,
    GROUP_S: tl.constexpr, GROUP_T: tl.constexpr, HELD: tl.constexpr, LOG_GROUP: tl.constexpr,
    D_S: tl.constexpr, D_V: tl.constexpr, D_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """kl_rows [B, M, N] of averaged maps; for backward numbers[2] [B, H_s, N] = Σ_j p_t share_h, and log_ratio."""
    num_blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch_map = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch, group = batch_map // num_maps, batch_map % num_maps
    rows = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    pairs = (tl.num_programs(0) // num_blocks).to(tl.int64)
    # (q, k, numbers, heads, entries of one kind of number, log₂e · scale)
    student = (q_s, k_s, numbers, num_maps * GROUP_S, pairs * GROUP_S * num_tokens, scale_s * LOG2_E)
    teacher = (q_t, k_t, numbers_t, num_maps * GROUP_T, pairs * GROUP_T * num_tokens, scale_t * LOG2_E)
    first_s, first_t = group * GROUP_S, group * GROUP_T
    held_s = _held_rows(student, batch, first_s, rows, num_tokens, GROUP_S if HELD else 0, D_S)
    held_t = _held_rows(teacher, batch, first_t, rows, num_tokens, GROUP_T if HELD else 0, D_T)
    kl, pulls = tl.zeros((BLOCK_M,), tl.float32), ()
    for _ in tl.static_range(GROUP_S):
        pulls += (kl,)
    for start in range(0, num_tokens, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        log_maps, p_t, longer = (), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), ()
        for i in tl.static_range(GROUP_S):
            log_maps += (_log_map(held_s, i, student, batch, first_s, rows, keys, num_tokens, D_S, HELD),)
        for i in tl.static_range(GROUP_T):
            p_t += tl.exp2(_log_map(held_t, i, teacher, batch, first_t, rows, keys, num_tokens, D_T, HELD))
        p_t = tl.where((keys < num_tokens)[None, :], p_t * (1.0 / GROUP_T), 0.0)
        parts, top, total = _parts_of_largest(log_maps, GROUP_S)
        quotient = p_t / total
        ratio = tl.log2(tl.maximum(quotient, TINY)) - top
        kl += tl.sum(p_t * ratio, 1)
        address, inside = _entries(log_ratio, batch_map, rows, keys, num_tokens)
        tl.store(address, ratio, mask=inside)
        for i in tl.static_range(GROUP_S):
            longer += (pulls[i] + tl.sum(quotient * parts[i], 1),)
        pulls = longer
    exists = rows < num_tokens
    kl = kl / LOG2_E + LOG_GROUP  # a mean is the sum / GROUP_S
    tl.store(kl_rows + batch_map * num_tokens + rows, tl.where(kl < 0.0, 0.0, kl), mask=exists)
    for index in tl.static_range(GROUP_S):
        at = 2 * student[4] + (batch_map * GROUP_S + index) * num_tokens + rows
        tl.store(numbers + at, pulls[index], mask=exists)


@triton.jit
def row_dot_kernel(out, grad_out, pulls, num_heads, num_tokens, D_V: tl.constexpr, BLOCK_M: tl.constexpr):
    """pulls [B, H, N] = Σ out · grad_out: what the softmax's normalisation takes back from every row."""
    num_blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads
    rows = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    left = _load_rows(out, batch, head, rows, num_tokens, D_V).to(tl.float32)
    right = _load_rows(grad_out, batch, head, rows, num_tokens, D_V).to(tl.float32)
    tl.store(pulls + batch_head * num_tokens + rows, tl.sum(left * right, 1), mask=rows < num_tokens)


@triton.jit
def _row_numbers(sums, place, rows, num_tokens, plane, HAS_OUT: tl.constexpr, HAS_KL: tl.constexpr,
                 GROUPED: tl.constexpr):  # fmt: skip
    """Per query row, as columns: maximum, 1/sum, pull; weight; paired only: teacher's maximum and the ratio of sums.

    0 weights where no row is. sums = (numbers, log_ratio, pulls, upstream gradient, its strides).
    """
    numbers, upstream = sums[0], sums[3]
    exists = rows < num_tokens
    at = (place[0] * place[4] + place[1]) * num_tokens + rows
    max_s = tl.load(numbers + at, mask=exists, other=0.0)
    sum_s = tl.load(numbers + plane + at, mask=exists, other=1.0)
    inverse = tl.where(exists, 1.0 / sum_s, 0.0)
    pull, max_t, sum_ratio, weight = tl.zeros_like(inverse), inverse, inverse, inverse
    if HAS_OUT:
        pull = tl.load(sums[2] + at, mask=exists, other=0.0)
    if HAS_KL:
        address = upstream + place[0] * sums[4] + place[2] * sums[5] + rows.to(tl.int64) * sums[6]
        weight = tl.load(address, mask=exists, other=0.0).to(tl.float32)
        third = tl.load(numbers + 2 * plane + at, mask=exists, other=0.0)
        if GROUPED:
            pull -= weight * third
        else:
            max_t, weight = third, weight * inverse
            sum_ratio = _ratio_of(sum_s, tl.load(numbers + 3 * plane + at, mask=exists, other=1.0))
    return max_s[:, None], inverse[:, None], pull[:, None], weight[:, None], max_t[:, None], sum_ratio[:, None]


@triton.jit
def _load(matrices, place, tokens, num_tokens, HAS_OUT: tl.constexpr, PAIRED: tl.constexpr,
          D_S: tl.constexpr, D_V: tl.constexpr,
          D_T: tl.constexpr):  # fmt: skip
    """The tokens' rows of (q_s, grad_out, q_t) or (k_s, v, k_t), as far as a tile needs them."""
    own = _load_rows(matrices[0], place[0], place[1], tokens, num_tokens, D_S)
    second, taught = own, own
    if HAS_OUT:
        second = _load_rows(matrices[1], place[0], place[1], tokens, num_tokens, D_V)
    if PAIRED:
        taught = _load_rows(matrices[2], place[0], place[3], tokens, num_tokens, D_T)
    return own, second, taught


@triton.jit
def _tile(at_rows, at_keys, sums, place, row, rows, keys, num_tokens, scales,
          HAS_OUT: tl.constexpr, HAS_KL: tl.constexpr, GROUP_S: tl.constexpr, GROUPED: tl.constexpr):  # fmt: skip
    """The student's map p on a tile and the gradient in its scores, from what `_load` gave at its rows and keys; anything
    where no key is.

    Paired: p (grad_p − pull) + weight (p_s − p_t), the last as (exp_s − exp_t·ratio) · weight/sum: a product less a product
    would be contracted to a fused multiply-add, and equal maps would leave its rounding behind instead of zero.
    Grouped: p (grad_p − pull) − weight p_t share, where the pull holds weight · Σ p_t share already. Logarithms are added
    before the exponential: where every head's share underflows, the teacher's may not.
    """
    max_s, inverse, pull, weight, max_t, sum_ratio = row
    log_exp = (_dot(at_rows[0], tl.trans(at_keys[0])) - max_s) * (scales[0] * LOG2_E)
    exp_s = tl.exp2(log_exp)
    p = exp_s * inverse
    slope = p * -pull
    if HAS_OUT:
        slope = p * (_dot(at_rows[1], tl.trans(at_keys[1])) - pull)
    if GROUPED:
        address, inside = _entries(sums[1], place[0] * (place[4] // GROUP_S) + place[2], rows, keys, num_tokens)
        slope -= weight * tl.exp2(log_exp + tl.log2(inverse) + tl.load(address, mask=inside, other=MISSING))
    elif HAS_KL:
        z_t = _dot(at_rows[2], tl.trans(at_keys[2]))
        slope += weight * (exp_s - tl.exp2((z_t - max_t) * (scales[1] * LOG2_E)) * sum_ratio)
    return p, slope


@triton.jit
def _place(num_heads, repeats, GROUP_S: tl.constexpr):
    """(image, student head, map, paired teacher head, student heads) of a program of the backward kernels."""
    batch_head = tl.program_id(0).to(tl.int64)
    head = batch_head % num_heads
    return batch_head // num_heads, head, head // GROUP_S, head // repeats, num_heads


@triton.jit
def keys_kernel(
    q_s, grad_out, q_t, k_s, v, k_t, sums, grad_k, grad_v, num_heads, num_tokens, repeats, scale_s, scale_t,
    HAS_OUT: tl.constexpr, HAS_KL: tl.constexpr, GROUP_S: tl.constexpr, GROUPED: tl.constexpr,
    D_S: tl.constexpr, D_V: tl.constexpr, D_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of one block of keys."""
    PAIRED: tl.constexpr = HAS_KL and not GROUPED
    queries, keys_of, scales = (q_s, grad_out, q_t), (k_s, v, k_t), (scale_s, scale_t)
    place = _place(num_heads, repeats, GROUP_S)
    plane = tl.num_programs(0).to(tl.int64) * num_tokens
    keys = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_keys = _load(keys_of, place, keys, num_tokens, HAS_OUT, PAIRED, D_S, D_V, D_T)
    total_k = tl.zeros((BLOCK_N, padded(D_S)), tl.float32)
    total_v = tl.zeros((BLOCK_N, padded(D_V)), tl.float32)
    for start in range(0, num_tokens, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row = _row_numbers(sums, place, rows, num_tokens, plane, HAS_OUT, HAS_KL, GROUPED)
        at_rows = _load(queries, place, rows, num_tokens, HAS_OUT, PAIRED, D_S, D_V, D_T)
        p, slope = _tile(at_rows, at_keys, sums, place, row, rows, keys, num_tokens, scales,
                         HAS_OUT, HAS_KL, GROUP_S, GROUPED)  # fmt: skip
        total_k += _dot(tl.trans(slope.to(at_rows[0].dtype)), at_rows[0])
        if HAS_OUT:
            total_v += _dot(tl.trans(p.to(at_rows[1].dtype)), at_rows[1])
    _store_rows(grad_k, place[0], place[1], keys, num_tokens, total_k * scale_s, D_S)
    if HAS_OUT:
        _store_rows(grad_v, place[0], place[1], keys, num_tokens, total_v, D_V)


@triton.jit
def queries_kernel(
    q_s, grad_out, q_t, k_s, v, k_t, sums, grad_q, num_heads, num_tokens, repeats, scale_s, scale_t,
    HAS_OUT: tl.constexpr, HAS_KL: tl.constexpr, GROUP_S: tl.constexpr, GROUPED: tl.constexpr,
    D_S: tl.constexpr, D_V: tl.constexpr, D_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_q of one block of rows."""
    PAIRED: tl.constexpr = HAS_KL and not GROUPED
    queries, keys_of, scales = (q_s, grad_out, q_t), (k_s, v, k_t), (scale_s, scale_t)
    place = _place(num_heads, repeats, GROUP_S)
    plane = tl.num_programs(0).to(tl.int64) * num_tokens
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = _row_numbers(sums, place, rows, num_tokens, plane, HAS_OUT, HAS_KL, GROUPED)
    at_rows = _load(queries, place, rows, num_tokens, HAS_OUT, PAIRED, D_S, D_V, D_T)
    total = tl.zeros((BLOCK_M, padded(D_S)), tl.float32)
    for start in range(0, num_tokens, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        at_keys = _load(keys_of, place, keys, num_tokens, HAS_OUT, PAIRED, D_S, D_V, D_T)
        _, slope = _tile(at_rows, at_keys, sums, place, row, rows, keys, num_tokens, scales,
                         HAS_OUT, HAS_KL, GROUP_S, GROUPED)  # fmt: skip
        slope = tl.where((keys < num_tokens)[None, :], slope, 0.0)
        total += _dot(slope.to(at_keys[0].dtype), at_keys[0])
    _store_rows(grad_q, place[0], place[1], rows, num_tokens, total * scale_s, D_S)
