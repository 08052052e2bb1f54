"""The logit distillation loss in closed form, value and gradient in one pass, a block of rows at a time.

Plain torch operations on any device; a block is small enough for a core's cache, and nothing but the gradient is kept
for backward. What `kd_loss` runs on the CPU. Leaves checks and reduction to `kd_loss`.
"""

import torch
from torch import Tensor

from dbscale.kernels.closed_forms import expectation, may_hold, refine_near
from dbscale.kernels.kd_loss_eager import wide
from dbscale.kernels.kd_target import KDTarget, KDWeights

ELEMENTS_PER_BLOCK = 1 << 18
"""1 MiB of float32: measured best on a core with 512 KiB of L2, flat within 20 % over a factor of 4."""


def kd_rows_chunked(
    student_BC: Tensor, teacher_BC: Tensor, target: KDTarget, weights: KDWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighed loss of each row (differentiable in the student), its cross-entropy and its KL, each [B]."""
    want_grad = torch.is_grad_enabled() and student_BC.requires_grad
    loss, ce, kl, _ = _kd_chunked(
        student_BC, teacher_BC, target.labels_a_B, target.labels_b_B, target.lam_B, target.soft_BC,
        weights.temperature, weights.label_smoothing, weights.ce_weight, weights.kl_weight, weights.row_scale, want_grad,
    )  # fmt: skip
    return loss, ce, kl


@torch.library.custom_op("dbscale::kd_chunked", mutates_args=())
def _kd_chunked(
    student: Tensor, teacher: Tensor,
    labels_a: Tensor | None, labels_b: Tensor | None, lam: Tensor | None, soft: Tensor | None,
    temperature: float, label_smoothing: float, ce_weight: float, kl_weight: float, row_scale: float, want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    target = KDTarget(labels_a, labels_b, lam, soft)
    weights = KDWeights(temperature, label_smoothing, ce_weight, kl_weight, row_scale)
    loss, ce, kl, grad = _outputs(student, want_grad)
    wide_dtype = loss.dtype
    rows_per_block = max(1, ELEMENTS_PER_BLOCK // student.shape[1])
    for start in range(0, student.shape[0], rows_per_block):
        block = slice(start, start + rows_per_block)
        _one_block(wide(student[block]), wide(teacher[block]), _rows_of(target, block, wide_dtype), weights,
                   ce[block], kl[block], grad[block] if want_grad else None)  # fmt: skip
    loss.zero_()
    for weight, part in ((ce_weight, ce), (kl_weight, kl)):
        if weight:
            loss.add_(part, alpha=row_scale * weight)
    return loss, ce, kl, grad


def _outputs(student: Tensor, want_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    loss, ce, kl = (student.new_empty(student.shape[0], dtype=dtype) for _ in range(3))
    # float16 would lose gradients below 6e-8 before a loss scale could lift them.
    grad_dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
    return loss, ce, kl, student.new_empty(student.shape if want_grad else (0,), dtype=grad_dtype)


@_kd_chunked.register_fake
def _(student, teacher, labels_a, labels_b, lam, soft, temperature, label_smoothing, ce_weight, kl_weight, row_scale,
      want_grad):  # fmt: skip
    return _outputs(student, want_grad)


def _setup_context(ctx, inputs, output) -> None:
    _, ce, kl, grad = output
    ctx.mark_non_differentiable(ce, kl, grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad)
    ctx.dtype = inputs[0].dtype


def _backward(ctx, upstream, *_unused):
    (grad,) = ctx.saved_tensors
    student_grad = None if upstream is None else (grad * upstream[:, None]).to(ctx.dtype)
    return student_grad, *(None,) * 11


_kd_chunked.register_autograd(_backward, setup_context=_setup_context)


def _rows_of(target: KDTarget, block: slice, dtype: torch.dtype) -> KDTarget:
    def rows(part: Tensor | None) -> Tensor | None:
        return None if part is None else part[block].to(dtype) if part.is_floating_point() else part[block]

    return KDTarget(*map(rows, (target.labels_a_B, target.labels_b_B, target.lam_B, target.soft_BC)))


def _one_block(
    student: Tensor, teacher: Tensor, target: KDTarget, weights: KDWeights,
    ce: Tensor, kl: Tensor, grad: Tensor | None,
) -> None:  # fmt: skip
    """Fill ce, kl [r] and grad [r, C] of one block of rows."""
    p_s, maximum, total = _softmax(student, weights.temperature)
    p_t, maximum_t, total_t = _softmax(teacher, weights.temperature)
    gap = (maximum - maximum_t).squeeze(-1) - expectation(p_t, student - teacher)
    # Maxima are subtracted from each other before the sums join in: the log-sum-exps themselves may be large.
    plain = gap / weights.temperature + (total / total_t).log_().squeeze(-1)

    def scores(rows: Tensor | None) -> tuple[Tensor, Tensor]:
        return (student, teacher) if rows is None else (student[rows], teacher[rows])

    is_empty = total_t.squeeze(-1) == 0
    kl.copy_(refine_near(plain, scores, weights.temperature))
    if may_hold(is_empty):
        kl.masked_fill_(is_empty, 0.0)
        p_t = torch.where(is_empty[:, None], p_s, p_t)  # a teacher without mass pulls nowhere
    p_1 = p_s
    if weights.temperature != 1.0:
        p_1, maximum, total = _softmax(student, 1.0)
    ce.copy_(_cross_entropy(student, maximum, total, target, weights.label_smoothing))
    if grad is not None:
        # d(KL)/dz = (p_s − p_t)/T, formed before anything is added to it: it may be small.
        slope = (p_s - p_t).mul_(weights.kl_weight / weights.temperature * weights.row_scale)
        grad.copy_(_add_ce_slope(slope, p_1, target, weights))


def _softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(logits / T), the row maximum of the logits and the row sum of exp((logits − maximum)/T).

    A row of −inf alone gets the maximum 0, the sum 0 and probabilities 0.
    """
    maximum = logits.amax(-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    probability = torch.sub(logits, maximum)
    if temperature != 1.0:
        probability.div_(temperature)
    probability.exp_()
    total = probability.sum(-1, keepdim=True)
    return probability.div_(total.masked_fill(total == 0, 1.0)), maximum, total


def _cross_entropy(student: Tensor, maximum: Tensor, total: Tensor, target: KDTarget, label_smoothing: float) -> Tensor:
    """−Σ_j q_j log p_j of each row, q = (1 − ε)·target + ε/C."""
    log_total = total.squeeze(-1).log()
    expected = torch.zeros_like(log_total)
    mass = 1.0 if target.soft_BC is None else label_smoothing + (1 - label_smoothing) * target.soft_BC.sum(-1)
    if target.soft_BC is not None:
        expected += (target.soft_BC * (student - maximum)).sum(-1)
    for labels, share in _hard_labels(target, student.dtype):
        expected += share * (student.gather(1, labels[:, None]) - maximum).squeeze(1)
    expected *= 1 - label_smoothing
    if label_smoothing:
        expected += label_smoothing * (student.mean(-1) - maximum.squeeze(-1))
    return mass * log_total - expected


def _add_ce_slope(slope: Tensor, p_1: Tensor, target: KDTarget, weights: KDWeights) -> Tensor:
    """slope += weight · (p_1·Σq − q), in place."""
    weight, smoothing = weights.ce_weight * weights.row_scale, weights.label_smoothing
    if not weight:
        return slope
    if target.soft_BC is None:
        slope.add_(p_1, alpha=weight)
    else:
        mass = smoothing + (1 - smoothing) * target.soft_BC.sum(-1, keepdim=True)
        slope.add_(p_1 * mass, alpha=weight)
        slope.add_(target.soft_BC, alpha=-weight * (1 - smoothing))
    for labels, share in _hard_labels(target, slope.dtype):
        slope.scatter_add_(1, labels[:, None], -weight * (1 - smoothing) * share[:, None])
    return slope.sub_(weight * smoothing / slope.shape[1]) if smoothing else slope


def _hard_labels(target: KDTarget, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(labels [r], their share [r]) once or twice; none with a soft target."""
    if target.labels_a_B is None:
        return []
    if target.labels_b_B is None or target.lam_B is None:
        return [(target.labels_a_B, torch.ones_like(target.labels_a_B, dtype=dtype))]
    return [(target.labels_a_B, target.lam_B), (target.labels_b_B, 1 - target.lam_B)]
