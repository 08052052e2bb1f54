"""What a point of the grid costs in money: images, labels, training, and the teacher, in the four cases of
2502.08606.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dbscale.errors import LawError, nearest

TEACHER_CASES = ("free", "inference", "training", "training_and_inference")
FORWARD_FLOPS, TRAIN_FLOPS = 2.0, 6.0  # per parameter and token: forward; forward and backward


@dataclass(frozen=True)
class Prices:
    """Money per unit, and how long training is. Any currency, as long as the budget has the same."""

    upstream_image: float = 0.0
    """Per upstream sample (collecting it, storing it)."""
    downstream_label: float = 0.0
    """Per labelled downstream sample."""
    train_flop: float = 0.0
    """Per floating-point operation, training or inference alike."""
    tokens_per_image: float = 197.0
    """Positions each parameter is applied at: 197 for DeiT at 224 px and patch 16."""
    upstream_epochs: float = 1.0
    downstream_epochs: float = 1.0
    teacher_params: float = 0.0
    teacher_case: str = "training_and_inference"
    """What of the teacher this study pays: free, inference, training, training_and_inference."""

    def __post_init__(self) -> None:
        if self.teacher_case not in TEACHER_CASES:
            raise LawError(f"teacher_case {self.teacher_case!r}; {nearest(self.teacher_case, TEACHER_CASES)}")
        for name in (
            "upstream_image",
            "downstream_label",
            "train_flop",
            "teacher_params",
            "upstream_epochs",
            "downstream_epochs",
        ):
            if not getattr(self, name) >= 0:
                raise LawError(f"Prices.{name} must not be negative, got {getattr(self, name)!r}")

    def upstream_step(self, arm: str, num_params: np.ndarray | float) -> np.ndarray | float:
        """Money per upstream sample: the image, the student's training on it, and the teacher's share."""
        compute = TRAIN_FLOPS * num_params
        if arm == "distilled" and self.teacher_case in ("inference", "training_and_inference"):
            compute = compute + FORWARD_FLOPS * self.teacher_params
        if arm == "distilled" and self.teacher_case in ("training", "training_and_inference"):
            compute = compute + TRAIN_FLOPS * self.teacher_params
        return self.upstream_image + self.train_flop * self.tokens_per_image * self.upstream_epochs * compute

    def downstream_step(self, num_params: np.ndarray | float) -> np.ndarray | float:
        """Money per downstream sample: its label and the finetuning on it."""
        return (
            self.downstream_label
            + self.train_flop * self.tokens_per_image * self.downstream_epochs * TRAIN_FLOPS * num_params
        )

    def total(self, arm: str, upstream_samples, num_params, downstream_samples):
        """Money for one study point."""
        return (
            self.upstream_step(arm, num_params) * upstream_samples
            + self.downstream_step(num_params) * downstream_samples
        )
