"""What an evaluation finds, and the pass over a split that every task shares: each sample judged once, by one rank.

A task turns a batch into one row of numbers a sample; the rows of all ranks are added into one table, which is exact because
the others hold zeros. What the rows mean is the task's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from dbscale.data import Batch, EvalLoader
from dbscale.training.engine import lockstep, reduce_over_ranks

Judge = Callable[[nn.Module, Tensor, Batch], Tensor]
"""(model, images on the device, batch) -> one row of numbers a sample, [B, K]; the first is 1."""


@dataclass(frozen=True)
class Evaluation:
    """Results over a whole split."""

    error_rate: float
    """In [0, 1]: top-1 of a classification, 1 − mIoU of a segmentation, 1 − mAP of a detection."""
    top5_error_rate: float | None
    """None with fewer than 6 classes, where it says nothing, and for other tasks."""
    loss: float
    """Mean over the samples of what the task minimises, nats."""
    calibration_error: float | None
    """Expected calibration error over 15 equal-width bins of confidence (Guo et al., 1706.04599); None for other tasks."""
    correct_N: NDArray[np.bool_] | None
    """One per sample of a classification, in the split's order; None for other tasks."""
    counted_N: NDArray[np.bool_]
    """False for samples that could not be decoded; they are in no mean."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Means of plugins' metrics, by name, over a classification."""
    errors_N: NDArray[np.float32] | None = None
    """What each sample adds to the error of another task: their mean over the counted ones is the error."""

    @classmethod
    def of_dense(cls, error_rate: float, table_NK: NDArray[np.float64], errors_n: NDArray[np.floating]) -> Evaluation:
        """From a table whose first columns are counted and loss, and each counted sample's part of the error."""
        counted_N = table_NK[:, 0] > 0
        errors_N = np.full(len(table_NK), np.nan, np.float32)
        errors_N[counted_N] = errors_n
        return cls(
            error_rate=error_rate, top5_error_rate=None, loss=float(table_NK[counted_N, 1].mean()),
            calibration_error=None, correct_N=None, counted_N=counted_N, errors_N=errors_N,
        )  # fmt: skip


@torch.inference_mode()
def judge_split(
    model: nn.Module, loader: EvalLoader, num_samples: int, accelerator: Accelerator, judge: Judge
) -> NDArray[np.float64]:
    """[num_samples, K], equal on every rank; rows of samples that could not be decoded are zeros."""
    model.eval()
    table_NK: Tensor | None = None
    for batch in lockstep(iter(loader), accelerator):
        assert isinstance(batch.images, Tensor), "an evaluation loader transforms"
        rows_BK = judge(model, batch.images.to(accelerator.device, non_blocking=True), batch).double().cpu()
        if table_NK is None:
            table_NK = torch.zeros(num_samples, rows_BK.shape[1], dtype=torch.float64)
        counted = batch.weights > 0
        table_NK[batch.sample_ids[counted]] = rows_BK[counted]
    assert table_NK is not None, "a split has samples"
    return reduce_over_ranks(accelerator, table_NK, "sum").cpu().numpy()
