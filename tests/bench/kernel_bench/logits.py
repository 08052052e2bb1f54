"""The logit loss beside the textbook form, torch.compile of it and a composition of Liger's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from dbscale.kernels import kd_loss
from kernel_bench.measure import Skipped, Step

ALPHA, TEMPERATURE, SMOOTHING = 0.5, 4.0, 0.1
BACKENDS = {"cpu": ("eager", "compile"), "cuda": ("eager", "auto", "compile", "liger")}


@dataclass(frozen=True)
class LogitsCase:
    rows: int
    classes: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.rows}×{self.classes} {str(self.dtype).removeprefix('torch.')}"

    @property
    def floor_bytes(self) -> int:
        """Both logits read once, the gradient written once."""
        return 3 * self.rows * self.classes * self.dtype.itemsize


CASES = {
    "cpu": (
        LogitsCase(128, 10, torch.float32),
        LogitsCase(256, 100, torch.float32),
        LogitsCase(256, 1000, torch.float32),
        LogitsCase(1024, 1000, torch.float32),
        LogitsCase(64, 21841, torch.float32),
        LogitsCase(256, 1000, torch.bfloat16),
        LogitsCase(64, 21841, torch.bfloat16),
    ),
    "cuda": (
        LogitsCase(4096, 21841, torch.bfloat16),
        LogitsCase(4096, 1000, torch.bfloat16),
        LogitsCase(1024, 1000, torch.float32),
        LogitsCase(1024, 100, torch.bfloat16),
    ),
}


def makers(case: LogitsCase, device: torch.device) -> dict[str, Callable[[], Step]]:
    """Backends and peers by name, each to be made only when its turn comes."""
    shape = (case.rows, case.classes)
    student = (torch.randn(shape, device=device) * 3).to(case.dtype).requires_grad_()
    teacher = (torch.randn(shape, device=device) * 3).to(case.dtype)
    labels = torch.randint(case.classes, (case.rows,), device=device)

    def step(loss: Callable[[], Tensor], *, waits: bool = False) -> Step:
        return Step(lambda: torch.autograd.grad(loss(), student), loss, (student, teacher, labels), waits)

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: (
            kd_loss(
                student,
                teacher,
                labels,
                alpha=ALPHA,
                temperature=TEMPERATURE,
                label_smoothing=SMOOTHING,
                backend=backend,
            ).loss
        )

    def make(name: str) -> Step:
        # Liger's cross-entropy asks the device how many labels count.
        return step(_liger(student, teacher, labels), waits=True) if name == "liger" else step(ours(name))

    return {name: lambda name=name: make(name) for name in BACKENDS[device.type]}


def _liger(student: Tensor, teacher: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Cross-entropy and KL by Liger's kernels, of which the second takes log-probabilities that torch must make."""
    try:
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_cross_entropy,
            liger_kl_div,
        )
    except ImportError as reason:
        raise Skipped("liger-kernel is not installed") from reason

    def loss() -> Tensor:
        # Liger's cross-entropy writes the gradient over its input, which the KL needs, too.
        ce = liger_cross_entropy(student.clone(), labels, label_smoothing=SMOOTHING)
        log_p_s = log_softmax(student.float() / TEMPERATURE, -1)
        kl = liger_kl_div(log_p_s, softmax(teacher.float() / TEMPERATURE, -1), reduction="batchmean")
        return (1 - ALPHA) * ce + ALPHA * TEMPERATURE**2 * kl

    return loss
