"""What a downstream set asks of a model: classes of images, of pixels or of boxes.

A task decides the targets, the head, the loss and what "error" means; it is part of a finetune's recipe. Classification
is None there, so that recipes from before there were other tasks keep their ids. What a task does is `training.tasks`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dbscale.errors import nearest
from dbscale.strict import Strict

TaskName = Literal["classification", "segmentation", "detection"]
TARGETS: dict[str, str | None] = {"classification": None, "segmentation": "mask", "detection": "boxes"}
"""The member that a dataset's shards hold beside each image."""
BESIDE: dict[str | None, str] = {None: "a label", "mask": "a mask", "boxes": "boxes"}
"""The same in words."""
ERRORS: dict[str, str] = {
    "classification": "top-1 error rate",
    "segmentation": "1 − mIoU (mean intersection over union of the classes that occur)",
    "detection": "1 − mAP (COCO's mean average precision at IoU .50 to .95)",
}
"""What the error of a task is, for people."""
DEFAULT_WIDTH = 128


class Segmentation(Strict):
    """A class for every pixel; error = 1 − mIoU."""

    kind: Literal["segmentation"] = "segmentation"
    head: Literal["linear", "pyramid"] = "linear"
    """linear: one linear layer on the last patch tokens. pyramid: maps of four scales, joined top-down (FPN)."""
    width: int | None = Field(default=None, gt=0)
    """Channels of the pyramid; None: 128."""

    @model_validator(mode="after")
    def _only_pyramids_have_a_width(self) -> Segmentation:
        if self.head == "linear" and self.width is not None:
            raise ValueError(f"a linear head has no width, found {self.width}; leave it out, or set head: pyramid")
        return self


class Detection(Strict):
    """A box and a class for every object; error = 1 − mAP. The head is FCOS (Tian et al., 1904.01355) on a pyramid."""

    kind: Literal["detection"] = "detection"
    width: int = Field(default=DEFAULT_WIDTH, ge=64, multiple_of=32)
    """Channels of the pyramid and of the head, whose group normalisation cuts them into 32 groups of two or more."""
    num_convs: int = Field(default=4, gt=0)
    """Convolutions of each of the head's two towers, FCOS's four by default."""


DenseTask = Annotated[Segmentation | Detection, Field(discriminator="kind")]


def _written(value: Any) -> Any:
    """`segmentation` is short for `{kind: segmentation}`, and classification for nothing."""
    kind = value.get("kind") if isinstance(value, dict) else value
    if value is None or kind == "classification":
        return None
    if isinstance(kind, str) and kind not in TARGETS:
        raise ValueError(f"unknown task {kind!r}; {nearest(kind, list(TARGETS))}")
    return {"kind": value} if isinstance(value, str) else value


WrittenTask = Annotated[DenseTask | None, BeforeValidator(_written)]
"""A task as people write it in a grid: a name, or a mapping with its options."""


def task_name(task: Segmentation | Detection | None) -> TaskName:
    return "classification" if task is None else task.kind
