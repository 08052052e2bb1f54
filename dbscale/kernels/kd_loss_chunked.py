"""The logit distillation loss in closed form, value and gradient in one pass, a block of rows at a time.

Plain torch operations on any device; a block is small enough for a core's cache, and nothing but the gradient is kept
for backward. What `kd_loss` runs on the CPU. Leaves checks and reduction to `kd_loss`.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dbscale.kernels.closed_forms import ELEMENTS_ON_DEVICE, FEW_ELEMENTS, expectation, may_hold, refine_near
from dbscale.kernels.kd_target import KDTarget, KDWeights

ELEMENTS_PER_BLOCK = 1 << 17
"""Half a MiB of float32: measured best on a core with 2 MiB of L2, flat within 20 % over a factor of 4."""


def kd_chunked(
    student_BC: Tensor, teacher_BC: Tensor, target: KDTarget, weights: KDWeights, is_reduced: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (differentiable in the student), its cross-entropy and its KL: scalars, or rows [B]."""
    want_grad = torch.is_grad_enabled() and student_BC.requires_grad
    operator = _kd_chunked if torch.compiler.is_compiling() else _Direct.apply
    loss, ce, kl, _ = operator(
        student_BC, teacher_BC, target.labels_a_B, target.labels_b_B, target.lam_B, target.soft_BC,
        list(weights), is_reduced, want_grad,
    )  # fmt: skip
    return loss, ce, kl


def _forward(
    student: Tensor, teacher: Tensor,
    labels_a: Tensor | None, labels_b: Tensor | None, lam: Tensor | None, soft: Tensor | None,
    numbers: list[float], is_reduced: bool, want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    target, weights = KDTarget(labels_a, labels_b, lam, soft), KDWeights(*numbers)
    ce, kl, _, grad = _outputs(student, False, want_grad)
    on_cpu = student.device.type == "cpu"
    is_small = on_cpu and student.numel() <= FEW_ELEMENTS
    dtype = torch.float64 if is_small else ce.dtype
    rows_per_block = max(1, (ELEMENTS_PER_BLOCK if on_cpu else ELEMENTS_ON_DEVICE) // student.shape[1])
    for start in range(0, student.shape[0], rows_per_block):
        block = slice(start, start + rows_per_block)
        _one_block(student[block].to(dtype), teacher[block].to(dtype), _rows_of(target, block, dtype), weights,
                   ce[block], kl[block], grad[block] if want_grad else None,
                   is_exact=is_small and student.dtype != dtype)  # fmt: skip
    return *weights.combined(ce, kl, is_reduced), grad


_kd_chunked = torch.library.custom_op("dbscale::kd_chunked", _forward, mutates_args=())


def _outputs(student: Tensor, is_reduced: bool, want_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    loss, ce, kl = (student.new_empty(() if is_reduced else student.shape[0], dtype=dtype) for _ in range(3))
    # float16 would lose gradients below 6e-8 before a loss scale could lift them.
    grad_dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
    return loss, ce, kl, student.new_empty(student.shape if want_grad else (0,), dtype=grad_dtype)


@_kd_chunked.register_fake
def _(student, teacher, labels_a, labels_b, lam, soft, numbers, is_reduced, want_grad):
    return _outputs(student, is_reduced, want_grad)


def _setup_context(ctx, inputs, output) -> None:
    _, ce, kl, grad = output
    ctx.mark_non_differentiable(ce, kl, grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad)
    ctx.dtype = inputs[0].dtype


def _backward(ctx, upstream, *_unused):
    (grad,) = ctx.saved_tensors
    if upstream is None:
        return (None,) * 9
    return (grad * (upstream[:, None] if upstream.ndim else upstream)).to(ctx.dtype), *(None,) * 8


_kd_chunked.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The operator for code that runs as it stands: a dispatcher written in Python costs more than a small batch."""

    @staticmethod
    def forward(ctx, *inputs):  # with `setup_context` apart, torch binds every call to a signature, at the same cost
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstreams):  # pyright: ignore[reportIncompatibleMethodOverride]
        upstream, *_ = upstreams
        (grad,) = ctx.saved_tensors
        is_final = upstream is not None and upstream.ndim == 0 and grad.dtype == ctx.dtype
        if is_final and not may_hold(upstream != 1):
            return grad, *(None,) * 8
        return _backward(ctx, upstream)


def _rows_of(target: KDTarget, block: slice, dtype: torch.dtype) -> KDTarget:
    def rows(part: Tensor | None) -> Tensor | None:
        return None if part is None else part[block].to(dtype) if part.is_floating_point() else part[block]

    return KDTarget(*map(rows, (target.labels_a_B, target.labels_b_B, target.lam_B, target.soft_BC)))


def _one_block(
    student: Tensor, teacher: Tensor, target: KDTarget, weights: KDWeights,
    ce: Tensor, kl: Tensor, grad: Tensor | None, *, is_exact: bool,
) -> None:  # fmt: skip
    """Fill ce, kl [r] and grad [r, C] of one block of rows; is_exact: the dtype is wider than that of the logits."""
    temperature = weights.temperature
    # Maxima are taken off before anything is summed: the log-sum-exps themselves may be large.
    shifted, shifted_t = _below_maximum(student), _below_maximum(teacher)
    p_s, total = _softmax(shifted, temperature)
    p_t, total_t = _softmax(shifted_t, temperature)
    plain = (total / total_t).log_() - expectation(p_t, torch.sub(shifted, shifted_t, out=shifted_t)) / temperature

    def rows_of(rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return (student, teacher, p_t) if rows is None else (student[rows], teacher[rows], p_t[rows])

    kl.copy_(plain if is_exact else refine_near(plain, rows_of, temperature))
    is_empty = total_t == 0
    if may_hold(is_empty):
        kl.masked_fill_(is_empty, 0.0)
        p_t = torch.where(is_empty[:, None], p_s, p_t)  # a teacher without mass pulls nowhere
    p_1, total = (p_s, total) if temperature == 1.0 else _softmax(shifted, 1.0)
    ce.copy_(_cross_entropy(shifted, total, target, weights.label_smoothing))
    if grad is not None:
        slope = torch.sub(p_s, p_t, out=grad if grad.dtype == p_s.dtype else None)
        slope.mul_(weights.kl_slope)  # formed before anything is added to it: it may be small
        _add_ce_slope(slope, p_1, target, weights)
        if slope is not grad:
            grad.copy_(slope)


def _below_maximum(logits: Tensor) -> Tensor:
    """logits less their row maximum; a row of −inf alone stays as it is."""
    maximum = logits.amax(-1, keepdim=True)
    return logits - maximum.clamp_min_(torch.finfo(logits.dtype).min)


def _softmax(shifted: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """softmax(shifted / T) and the row sum of exp(shifted / T), both 0 for a row of −inf alone."""
    probability = shifted.exp() if temperature == 1.0 else torch.div(shifted, temperature).exp_()
    total = probability.sum(-1, keepdim=True)
    return probability.div_(total.clamp_min(torch.finfo(total.dtype).tiny)), total.squeeze(-1)


def _cross_entropy(shifted: Tensor, total: Tensor, target: KDTarget, label_smoothing: float) -> Tensor:
    """−Σ_j q_j log p_j of each row, q = (1 − ε)·target + ε/C, of logits shifted to the maximum 0."""
    log_total = total.log()
    expected = torch.zeros_like(log_total)
    mass = 1.0 if target.soft_BC is None else label_smoothing + (1 - label_smoothing) * target.soft_BC.sum(-1)
    if target.soft_BC is not None:
        expected += (target.soft_BC * shifted).sum(-1)
    for labels, share in _hard_labels(target):
        logit = shifted.gather(1, labels[:, None]).squeeze(1)
        expected += logit if share is None else logit * share
    expected *= 1 - label_smoothing
    if label_smoothing:
        expected += label_smoothing * shifted.mean(-1)
    return mass * log_total - expected


def _add_ce_slope(slope: Tensor, p_1: Tensor, target: KDTarget, weights: KDWeights) -> None:
    """slope += weight · (p_1·Σq − q), in place."""
    weight, smoothing = weights.ce_slope, weights.label_smoothing
    if not weight:
        return
    if target.soft_BC is None:
        slope.add_(p_1, alpha=weight)
    else:
        mass = smoothing + (1 - smoothing) * target.soft_BC.sum(-1, keepdim=True)
        slope.add_(p_1 * mass, alpha=weight)
        slope.add_(target.soft_BC, alpha=-weight * (1 - smoothing))
    for labels, share in _hard_labels(target):
        pull = slope.new_full((len(slope), 1), -weight * (1 - smoothing))
        slope.scatter_add_(1, labels[:, None], pull if share is None else pull * share[:, None])
    if smoothing:
        slope.sub_(weight * smoothing / slope.shape[1])


def _hard_labels(target: KDTarget) -> list[tuple[Tensor, Tensor | None]]:
    """(labels [r], their share [r], None for the whole) once or twice; none with a soft target."""
    if target.labels_a_B is None:
        return []
    if target.labels_b_B is None or target.lam_B is None:
        return [(target.labels_a_B, None)]
    return [(target.labels_a_B, target.lam_B), (target.labels_b_B, 1 - target.lam_B)]
