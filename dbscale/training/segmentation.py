"""Segmentation: a class for every pixel; head, loss, and an error of 1 − mIoU that is exact at any world size.

Intersections and unions are counted image by image, in whole numbers, and added up once: by any number of ranks, in any
order, to the same mIoU. Backbones and the pyramid are `dense`'s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import LayerNorm2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.nn import functional

from dbscale.data import Batch
from dbscale.data.target import IGNORE
from dbscale.study.task import DEFAULT_WIDTH, Segmentation
from dbscale.training.dense import DenseModel, Pyramid
from dbscale.training.evaluation import Evaluation
from dbscale.training.losses import Losses, Objective, Target


class Segmenter(DenseModel):
    """Logits [B, C, h, w] of images [B, 3, S, S], at the resolution of the head."""

    def __init__(self, backbone: nn.Module, task: Segmentation, num_classes: int) -> None:
        super().__init__(backbone, levels=1 if task.head == "linear" else 4)
        if task.head == "linear":
            self.head: nn.Module = LinearHead(self.channels[0], num_classes)
        else:
            self.head = PyramidHead(self.channels, self.strides, task.width or DEFAULT_WIDTH, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.feature_maps(images_BCHW))

    @torch.inference_mode()
    def predict(self, images_BCHW: Tensor) -> Tensor:
        """int64 [B, S, S]: the class of every pixel."""
        return enlarge(self(images_BCHW), (images_BCHW.shape[2], images_BCHW.shape[3])).argmax(1)


class LinearHead(nn.Module):
    """One linear layer on every patch token of the last block."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(channels, num_classes, 1)
        nn.init.trunc_normal_(self.classify.weight, std=0.02)
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classify(maps[-1])


class PyramidHead(nn.Module):
    """Four scales joined top-down, brought to the finest and added up (Semantic FPN, Kirillov et al., 1901.02446)."""

    def __init__(self, channels: list[int], strides: list[int], width: int, num_classes: int) -> None:
        super().__init__()
        self.pyramid = Pyramid(channels, strides, width, finest=4)
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), LayerNorm2d(width), nn.GELU())
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        finest, *coarser = self.pyramid(maps)
        for each in coarser:
            finest = finest + functional.interpolate(each, finest.shape[2:], mode="bilinear", align_corners=False)
        return self.classify(self.smooth(finest))


def enlarge(logits_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    """float32 [B, C, *size], bilinear."""
    return functional.interpolate(logits_BChw.float(), size, mode="bilinear", align_corners=False)


def pixel_loss(logits_BChw: Tensor, masks_BSS: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy summed over the pixels that count, over the number of all pixels; nats.

    The divisor is a constant, so that the gradient of a global batch does not depend on how ranks and micro-batches cut it:
    a mean over counted pixels would weigh an image by how much of its neighbours is ignored.
    """
    enlarged_BCSS = enlarge(logits_BChw, (masks_BSS.shape[1], masks_BSS.shape[2]))
    # Summed by a second step: on a GPU the sum inside of cross_entropy over pixels is not deterministic.
    each_BSS = functional.cross_entropy(
        enlarged_BCSS, masks_BSS.long(), ignore_index=IGNORE, reduction="none", label_smoothing=label_smoothing
    )
    return each_BSS.sum() / masks_BSS.numel()


def make_objective(label_smoothing: float) -> Objective:
    """(model, images, masks uint8 [B, S, S]) -> Losses."""

    def objective(model: nn.Module, images: Tensor, masks_BSS: Target) -> Losses:
        assert isinstance(masks_BSS, Tensor), "a segmentation's targets are masks"
        loss = pixel_loss(model(images), masks_BSS, label_smoothing=label_smoothing)
        return Losses(loss, loss.detach())

    return objective


def judge(model: nn.Module, images: Tensor, batch: Batch, num_classes: int) -> Tensor:
    """float64 [B, 2 + 2C]: judged (1), mean cross-entropy of the pixels that count, intersections, unions by class (px).

    At the resolution of the masks as they are stored: logits are enlarged to it.
    """
    logits_BChw = model(images)
    masks: Any = batch.targets
    rows = [_judge_one(logits_BChw[slot : slot + 1], mask, num_classes) for slot, mask in enumerate(masks)]
    return torch.stack(rows)


def _judge_one(logits_1Chw: Tensor, mask_HW: NDArray[np.uint8] | Tensor, num_classes: int) -> Tensor:
    truth_HW = torch.as_tensor(np.array(mask_HW), dtype=torch.int64, device=logits_1Chw.device)
    logits_CHW = enlarge(logits_1Chw, (truth_HW.shape[0], truth_HW.shape[1]))[0]
    counts = truth_HW != IGNORE
    truth_P, logits_CP = truth_HW[counts], logits_CHW[:, counts]
    found_P = logits_CP.argmax(0)
    confusion = torch.bincount(truth_P * num_classes + found_P, minlength=num_classes**2).view(num_classes, num_classes)
    both = confusion.diag()
    loss = functional.cross_entropy(logits_CP.T, truth_P) if len(truth_P) else truth_P.new_zeros((), dtype=torch.float)
    either = confusion.sum(0) + confusion.sum(1) - both
    return torch.cat([torch.stack([torch.ones_like(loss), loss]).double(), both.double(), either.double()])


def summarize(table_NK: NDArray[np.float64], num_classes: int) -> Evaluation:
    """1 − mean over the classes that occur (in truth or prediction) of Σ intersection / Σ union, from `judge`'s rows."""
    counted_N = table_NK[:, 0] > 0
    both_NC, either_NC = table_NK[counted_N, 2 : 2 + num_classes], table_NK[counted_N, 2 + num_classes :]
    error = 1 - mean_iou(both_NC.sum(0), either_NC.sum(0))
    return Evaluation.of_dense(error, table_NK, image_errors(both_NC, either_NC))


def mean_iou(both_C: NDArray[np.float64], either_C: NDArray[np.float64]) -> float:
    """Mean over classes with a union, of intersection over union."""
    occurs = either_C > 0
    return float((both_C[occurs] / either_C[occurs]).mean())


def image_errors(both_NC: NDArray[np.float64], either_NC: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N]: what each image adds to 1 − mIoU; their mean is that error, their variance over N the variance of it.

    mIoU is no mean over images. To first order it is one: image i moves it by mean_c (I_ic − IoU_c·U_ic) / U_c (the
    infinitesimal jackknife), so that paired differences of two models can be bootstrapped by image as for classes.
    """
    both_C, either_C = both_NC.sum(0), either_NC.sum(0)
    occurs = either_C > 0
    iou_C = both_C[occurs] / either_C[occurs]
    moves_N = ((both_NC[:, occurs] - iou_C * either_NC[:, occurs]) / either_C[occurs]).mean(1)
    return 1 - iou_C.mean() - len(both_NC) * moves_N
