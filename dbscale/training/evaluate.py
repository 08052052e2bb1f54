"""Exact evaluation at any world size: every test sample counts once, and one bit of each is kept.

Runs on the exported weights in a plain timm model, so what is reported is what was saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from dbscale.data import EvalLoader
from dbscale.training.accelerators import reduce_over_ranks
from dbscale.training.lockstep import lockstep

NUM_CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """Results over a whole split."""

    error_rate: float
    """Top-1, in [0, 1]."""
    top5_error_rate: float | None
    """None with fewer than 6 classes, where it says nothing."""
    loss: float
    """Mean cross-entropy, nats."""
    calibration_error: float
    """Expected calibration error over 15 equal-width bins of confidence (Guo et al., 1706.04599)."""
    correct_N: NDArray[np.bool_]
    """One per sample, in the split's order."""
    counted_N: NDArray[np.bool_]
    """False for samples that could not be decoded; they are in no mean."""


@torch.inference_mode()
def evaluate(model: nn.Module, loader: EvalLoader, num_samples: int, accelerator: Accelerator) -> Evaluation:
    """Evaluate `model` on a loader's pass; every rank gets the whole result."""
    model.eval()
    table_N5, num_classes = torch.zeros(num_samples, 5, dtype=torch.float64), 0
    for batch in lockstep(iter(loader), accelerator):
        assert isinstance(batch.images, Tensor), "an evaluation loader transforms"
        logits_BC = model(batch.images.to(accelerator.device, non_blocking=True)).float()
        num_classes = logits_BC.shape[1]
        rows_B5 = _judge(logits_BC, batch.labels.to(logits_BC.device)).double().cpu()
        counted = batch.weights > 0
        table_N5[batch.sample_ids[counted]] = rows_B5[counted]
    # Each sample was judged by one rank, the others hold zeros: a sum gathers exactly.
    table_N5 = reduce_over_ranks(accelerator, table_N5, "sum").cpu()
    return summarize(table_N5.numpy(), num_classes)


def _judge(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """[B, 5]: judged (1), top-1 correct, top-5 correct, cross-entropy, confidence."""
    log_p_BC = logits_BC.log_softmax(1)
    top_BK = logits_BC.topk(min(5, logits_BC.shape[1]), 1).indices
    hits_BK = top_BK == labels_B[:, None]
    loss_B = -log_p_BC.gather(1, labels_B[:, None])[:, 0]
    confidence_B = log_p_BC.amax(1).exp()
    hits_BK = hits_BK.float()
    return torch.stack([torch.ones_like(loss_B), hits_BK[:, 0], hits_BK.amax(1), loss_B, confidence_B], 1)


def summarize(table_N5: NDArray[np.float64], num_classes: int) -> Evaluation:
    """Means over the judged samples of `_judge`'s table."""
    counted_N = table_N5[:, 0] > 0
    _, correct, in_top5, loss, confidence = table_N5[counted_N].T
    return Evaluation(
        error_rate=float(1 - correct.mean()),
        top5_error_rate=float(1 - in_top5.mean()) if num_classes > 5 else None,
        loss=float(loss.mean()),
        calibration_error=calibration_error(confidence, correct),
        correct_N=table_N5[:, 1] > 0,
        counted_N=counted_N,
    )


def calibration_error(confidence_N: NDArray[np.float64], correct_N: NDArray[np.float64]) -> float:
    """Σ_bins share of samples · |mean confidence - accuracy|, equal-width bins (Guo et al. 2017, eq. 3)."""
    bins_N = np.minimum((confidence_N * NUM_CALIBRATION_BINS).astype(np.int64), NUM_CALIBRATION_BINS - 1)
    gap = np.bincount(bins_N, confidence_N - correct_N, minlength=NUM_CALIBRATION_BINS)
    return float(np.abs(gap).sum() / len(confidence_N))
