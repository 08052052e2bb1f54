"""Detection: boxes with classes; torchvision's FCOS head on a simple feature pyramid, error 1 − mAP by pycocotools.

FCOS (Tian et al., 1904.01355) and COCO's mean average precision are the libraries'; here they are joined to any timm
backbone, per image, so that neither loss nor error depends on how a batch or a split is cut.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.image_list import ImageList

from dbscale.data import Batch, Subset
from dbscale.data.target import Boxes
from dbscale.keyed import frozen_generator
from dbscale.study.task import Detection
from dbscale.training.dense import NUM_LEVELS, DenseModel, Pyramid
from dbscale.training.evaluation import Evaluation
from dbscale.training.losses import Losses

MAX_DETECTIONS = 100
"""Boxes of an image that count, as COCO has it."""
SCORE_FROM = 0.05
"""Weaker finds are dropped; torchvision's own 0.2 is for looking at, and cuts the curve that mAP averages."""
NUM_GROUPS = 25
"""Groups of images in the jackknife of `image_errors`."""
_PER_FIND = 6


class Detector(DenseModel):
    """FCOS on a pyramid at twice, one, half and a quarter of a ViT's resolution (or the backbone's own four)."""

    def __init__(self, backbone: nn.Module, task: Detection, num_classes: int) -> None:
        super().__init__(backbone, levels=NUM_LEVELS)
        self.pyramid = Pyramid(self.channels, self.strides, task.width, finest=2)
        self.head = _Float32Head(task.width, 1, num_classes, task.num_convs)
        # Anchors are points: a size says only which lengths of sides a level is asked for, 4 to 8 times its stride.
        sizes = tuple((stride,) for stride in self.pyramid.strides)
        anchors = AnchorGenerator(sizes, ((1.0,),) * NUM_LEVELS)  # type: ignore[arg-type]
        # The parts of FCOS that have no weights: what it matches, sums up and suppresses. A list hides it from `modules`.
        placeholder = nn.Identity()
        placeholder.out_channels = task.width  # type: ignore[assignment]
        self._fcos = [
            FCOS(placeholder, num_classes, anchor_generator=anchors, head=self.head, score_thresh=SCORE_FROM,
                 detections_per_img=MAX_DETECTIONS)
        ]  # fmt: skip

    def head_outputs(self, images_BCHW: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """FCOS's outputs, each [B, points, …], and the maps of the pyramid."""
        maps = self.pyramid(self.feature_maps(images_BCHW))
        return self.head(maps), maps

    def forward(
        self, images_BCHW: Tensor, targets: Sequence[dict[str, Tensor]], *, detect: bool = False
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """FCOS's three losses of each image, [B, 3]: class, box, centre; with `detect` also what is found in it.

        `targets` are `boxes` [n, 4] in px of the images and `labels` int64 [n] for each image.
        """
        outputs, maps = self.head_outputs(images_BCHW)
        anchors, per_level = self._anchors(images_BCHW, maps)
        # One image at a time: torchvision divides by the objects of the whole batch, so that its gradient would depend on
        # how ranks and micro-batches cut it.
        losses = [
            self._fcos[0].compute_loss([target], {name: value[slot : slot + 1] for name, value in outputs.items()},
                                       [anchors[slot]], per_level)
            for slot, target in enumerate(targets)
        ]  # fmt: skip
        losses_B3 = torch.stack([torch.stack(list(each.values())) for each in losses])
        return losses_B3, self._finds(images_BCHW, outputs, anchors, per_level) if detect else []

    @torch.inference_mode()
    def predict(self, images_BCHW: Tensor) -> list[dict[str, Tensor]]:
        """What is found in each image: `boxes` [n, 4] (left, top, right, bottom in px of the images), `scores`, `labels`."""
        outputs, maps = self.head_outputs(images_BCHW)
        return self._finds(images_BCHW, outputs, *self._anchors(images_BCHW, maps))

    def _anchors(self, images_BCHW: Tensor, maps: list[Tensor]) -> tuple[list[Tensor], list[int]]:
        """The points of each image, and how many of them each level has."""
        images = ImageList(images_BCHW, [(images_BCHW.shape[2], images_BCHW.shape[3])] * len(images_BCHW))
        return self._fcos[0].anchor_generator(images, maps), [each.shape[2] * each.shape[3] for each in maps]

    def _finds(
        self, images_BCHW: Tensor, outputs: dict[str, Tensor], anchors: list[Tensor], per_level: list[int]
    ) -> list[dict[str, Tensor]]:
        split = {name: list(value.split(per_level, dim=1)) for name, value in outputs.items()}
        levels = [list(each.split(per_level)) for each in anchors]
        sizes = [(images_BCHW.shape[2], images_BCHW.shape[3])] * len(images_BCHW)
        return self._fcos[0].postprocess_detections(split, levels, sizes)  # type: ignore[arg-type]


class _Float32Head(FCOSHead):
    """Losses and coordinates are computed in float32, whatever the maps were computed in."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {name: value.float() for name, value in super().forward(x).items()}


def as_tensors(target: Boxes, device: torch.device) -> dict[str, Tensor]:
    """What FCOS takes; crowds are not trained on."""
    kept = ~target.crowd_N
    boxes, labels = torch.from_numpy(target.boxes_N4[kept]), torch.from_numpy(target.labels_N[kept])
    return {"boxes": boxes.to(device), "labels": labels.to(device)}


def objective(model: nn.Module, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> Losses:
    """Mean over the images of FCOS's losses; `ce` is the part about classes."""
    losses_3 = model(images, targets)[0].mean(0)
    return Losses(losses_3.sum(), losses_3[0].detach())


def judge(model: nn.Module, images: Tensor, batch: Batch) -> Tensor:
    """float64 [B, 3 + 600]: judged (1), loss, number of finds, then of each find its box, score and class.

    Boxes are left, top, right, bottom in px of the stored image, not of the square that the model sees.
    """
    assert batch.targets is not None
    stored: list[Boxes] = list(batch.targets)  # type: ignore[arg-type]
    side = images.shape[-1]
    scales = [np.array([width, height] * 2, np.float32) / side for height, width in (each.size for each in stored)]
    seen = [each._replace(boxes_N4=each.boxes_N4 / scale) for each, scale in zip(stored, scales, strict=True)]
    losses_B3, found = model(images, [as_tensors(each, images.device) for each in seen], detect=True)
    rows = torch.zeros(len(images), 3 + MAX_DETECTIONS * _PER_FIND, dtype=torch.float64)
    rows[:, 0], rows[:, 1] = 1, losses_B3.sum(1).double().cpu()
    for row, each, scale in zip(rows, found, scales, strict=True):
        boxes = each["boxes"].double().cpu() * torch.from_numpy(scale).double()
        finds = torch.cat([boxes, each["scores"].double().cpu()[:, None], each["labels"].double().cpu()[:, None]], 1)
        row[2] = len(finds)
        row[3 : 3 + finds.numel()] = finds.flatten()
    return rows


def summarize(table_NK: NDArray[np.float64], num_classes: int, subset: Subset) -> Evaluation:
    """1 − mAP of what `judge` found in the images of `subset`, against their boxes as stored."""
    counted_N = table_NK[:, 0] > 0
    reader = subset.dataset.targets
    assert reader is not None, "a detection's dataset has boxes"
    truths: list[Any] = list(reader.fetch(subset.indices[counted_N])[0])
    finds = [row[3:].reshape(-1, _PER_FIND)[: int(row[2])] for row in table_NK[counted_N]]
    evaluator = match(truths, finds, num_classes)
    error = 1 - mean_precision(evaluator)
    return Evaluation.of_dense(error, table_NK, image_errors(evaluator, error))


def match(truths: Sequence[Boxes], finds: Sequence[NDArray[np.float64]], num_classes: int) -> Any:
    """pycocotools' evaluator after it has matched finds [n, 6] and true boxes, image by image."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
        truth: Any = COCO()
        truth.dataset = {
            "images": [{"id": number} for number in range(len(truths))],
            "categories": [{"id": label} for label in range(num_classes)],
            "annotations": [
                {"id": number, **each} for number, each in enumerate(_annotations(truths), start=1)
            ],
        }  # fmt: skip
        truth.createIndex()
        rows = [
            {"image_id": number, "category_id": int(find[5]), "bbox": _as_coco(find[:4]), "score": float(find[4])}
            for number, each in enumerate(finds) for find in each
        ]  # fmt: skip
        evaluator = COCOeval(truth, truth.loadRes(rows) if rows else _nothing(truth), "bbox")
        evaluator.params.areaRng, evaluator.params.areaRngLbl = evaluator.params.areaRng[:1], ["all"]
        evaluator.params.maxDets = [MAX_DETECTIONS]
        evaluator.evaluate()
    return evaluator


def _annotations(truths: Sequence[Boxes]) -> list[dict[str, Any]]:
    found = []
    for number, target in enumerate(truths):
        for box, label, crowd in zip(target.boxes_N4.tolist(), target.labels_N.tolist(), target.crowd_N, strict=True):
            area = (box[2] - box[0]) * (box[3] - box[1])
            found.append(
                {"image_id": number, "category_id": label, "bbox": _as_coco(box), "area": area, "iscrowd": int(crowd)}
            )
    return found


def _as_coco(box: Any) -> list[float]:
    """left, top, width, height."""
    left, top, right, bottom = (float(value) for value in box)
    return [left, top, right - left, bottom - top]


def _nothing(truth: Any) -> Any:
    """The results of a model that finds no box, which `loadRes` does not take."""
    empty = copy.copy(truth)
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def mean_precision(evaluator: Any) -> float:
    """COCO's mAP: over classes with objects, recall levels and IoU .50 … .95. 0 where no image has an object."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    precision = evaluator.eval["precision"]
    known = precision[precision > -1]
    return float(known.mean()) if known.size else 0.0


def image_errors(evaluator: Any, error: float) -> NDArray[np.float64]:
    """[N]: numbers whose mean is 1 − mAP and whose variance over N is its variance, for paired bootstraps by image.

    mAP is no mean over images, and leaving out each in turn would take hours: so images are cut into groups, always the
    same ones, and every image of a group stands for the group's pseudo-value of the jackknife (Miller 1974), its distance
    from the mean enlarged by √(N / groups) because there are fewer groups than images.
    """
    num_images = len(evaluator.params.imgIds)
    num_groups = min(NUM_GROUPS, num_images)
    if num_groups < 2:
        return np.full(num_images, error)
    group_N = frozen_generator("jackknife groups", num_images).permutation(num_images) % num_groups
    without_G = np.array([1 - mean_precision(_part(evaluator, group_N != group)) for group in range(num_groups)])
    pseudo_G = (num_groups - 1) * (without_G.mean() - without_G)
    values_N = pseudo_G[group_N] * np.sqrt(num_images / num_groups)
    return error + values_N - values_N.mean()


def _part(evaluator: Any, kept_N: NDArray[np.bool_]) -> Any:
    """The evaluator of some of its images; what was matched stays so."""
    part = copy.copy(evaluator)
    numbers = np.flatnonzero(kept_N)
    parameters = evaluator.params
    by_image = np.array(evaluator.evalImgs, object).reshape(len(parameters.catIds), len(parameters.areaRng), -1)
    part.evalImgs = by_image[:, :, numbers].ravel().tolist()
    part.params = copy.copy(parameters)
    part.params.imgIds = [parameters.imgIds[number] for number in numbers]
    part._paramsEval = part.params
    return part
