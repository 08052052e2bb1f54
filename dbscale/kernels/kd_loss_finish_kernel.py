"""What follows the walk over the logits: the sums over rows in forward, the upstream factor in backward.

Launched by `kd_loss_triton`.
"""

import triton
import triton.language as tl


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
