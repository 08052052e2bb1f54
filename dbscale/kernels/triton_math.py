"""The few formulas that both Triton kernels share. The twin of `closed_forms`; see there for the mathematics."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
NEAR: tl.constexpr = tl.constexpr(0.25)


@triton.jit
def expm1_minus_x(x):
    """eˣ − 1 − x for |x| ≤ 1/2 to full float32 precision."""
    series = x * (1.0 / 362880) + (1.0 / 40320)
    series = series * x + (1.0 / 5040)
    series = series * x + (1.0 / 720)
    series = series * x + (1.0 / 120)
    series = series * x + (1.0 / 24)
    series = series * x + (1.0 / 6)
    series = series * x + 0.5
    return series * x * x


@triton.jit
def log1p_small(x):
    """log(1 + x) for |x| ≤ 1/2: 2 artanh(x/(2 + x)). The hardware's logarithm loses small x."""
    ratio = x / (2.0 + x)
    square = ratio * ratio
    series = square * (1.0 / 11) + (1.0 / 9)
    series = series * square + (1.0 / 7)
    series = series * square + (1.0 / 5)
    series = series * square + (1.0 / 3)
    return 2.0 * ratio * (series * square + 1.0)


@triton.jit
def log1p_less_mean(excess, mean):
    """log(1 + excess + mean) − mean: the KL where the mean, rounding alone, is not quite 0; never negative."""
    return tl.maximum(log1p_small(excess + mean) - mean, 0.0)


@triton.jit
def near_terms(p_s, p_t, offset, kappa):
    """p_t·(eˣ − 1 − x), x = offset; far columns take p_t·eˣ = p_s·kappa, which cannot overflow."""
    small = tl.abs(offset) < 0.5
    series = p_t * expm1_minus_x(tl.where(small, offset, 0.0))
    far = p_s * kappa - tl.where(p_t > 0.0, p_t * (1.0 + offset), 0.0)
    return tl.where(small, series, far)


@triton.jit
def finite_or_zero(maximum):
    """A row maximum to subtract: 0 instead of −inf, so that an empty row gives exp(−inf) = 0 and not NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def load_rows(matrix, batch, head, tokens, num_tokens, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[tokens, PADDED] of a [B, H, N, WIDTH] tensor, 0 outside; matrix = (pointer, strides of B, H, N), int64 offsets."""
    columns = tl.arange(0, PADDED)
    base = matrix[0] + batch * matrix[1] + head * matrix[2]
    address = base + tokens.to(tl.int64)[:, None] * matrix[3] + columns[None, :]
    inside = (tokens < num_tokens)[:, None]
    if WIDTH != PADDED:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(address, mask=inside, other=0.0)


@triton.jit
def store_rows(matrix, batch, head, tokens, num_tokens, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The counterpart of `load_rows`."""
    columns = tl.arange(0, PADDED)
    base = matrix[0] + batch * matrix[1] + head * matrix[2]
    address = base + tokens.to(tl.int64)[:, None] * matrix[3] + columns[None, :]
    inside = (tokens < num_tokens)[:, None]
    if WIDTH != PADDED:
        inside = inside & (columns < WIDTH)[None, :]
    tl.store(address, values.to(matrix[0].dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b):
    """Matrix product accumulated in float32; float32 operands stay float32 rather than TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def ratio_of(above, below):
    """above / below, exactly 1 where they are equal, which the hardware's division does not promise."""
    return tl.where(above == below, 1.0, above / below)
