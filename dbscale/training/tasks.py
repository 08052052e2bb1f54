"""What each task is while a cell runs: its network, what it learns from, what it minimises and how it is judged.

`study.task` names the tasks, a file each holds what is behind the names; this room only chooses, so that the loop, the
preparation of a run and the row have no cases of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dbscale.data import Batch, Dataset, DenseTransform, Subset, Transform
from dbscale.errors import TrainingError
from dbscale.keyed import derive_seed
from dbscale.study.cell import CellSpec
from dbscale.study.recipe import Recipe
from dbscale.study.store import Store
from dbscale.study.task import BESIDE, TARGETS, Detection, Segmentation, task_name
from dbscale.training import detection, segmentation
from dbscale.training.dense import DenseModel, drawn
from dbscale.training.evaluation import Evaluation, Judge
from dbscale.training.losses import Objective
from dbscale.training.models import fill, load_parent, make_model, restore_model
from dbscale.training.models import make_student as make_classifier

Task = Segmentation | Detection


def join_head(backbone: nn.Module, task: Task, num_classes: int, seed: int = 0) -> DenseModel:
    """A timm backbone and the task's head, which is equal for equal (task, seed) in both arms. Raises TrainingError."""
    kind = segmentation.Segmenter if isinstance(task, Segmentation) else detection.Detector
    return drawn(derive_seed(seed, "head"), lambda: kind(backbone, task, num_classes))  # type: ignore[arg-type]


def make_student(spec: CellSpec, store: Store, num_classes: int) -> nn.Module:
    """A cell's network with its initial weights: backbone and head drawn from the seed, then the parent's backbone."""
    recipe = spec.recipe
    if recipe.task is None:
        return make_classifier(spec, store, num_classes)
    size, drop_path = recipe.data.image_size, recipe.training.drop_path
    backbone = make_model(recipe.model, num_classes=0, image_size=size, seed=recipe.seed, drop_path=drop_path)
    network = join_head(backbone, recipe.task, num_classes, recipe.seed)
    load_parent(network.backbone, spec, store)
    if recipe.training.scope == "linear_probe":
        network.backbone.requires_grad_(False)
    return network


def restore_student(recipe: Recipe, weights: Path, num_classes: int) -> nn.Module:
    """The network that `weights` were saved from. Raises TrainingError when they do not fit."""
    size = recipe.data.image_size
    if recipe.task is None:
        return restore_model(recipe.model, weights, num_classes=num_classes, image_size=size)
    network = join_head(make_model(recipe.model, num_classes=0, image_size=size), recipe.task, num_classes)
    fill(network, weights)
    return network


def check_dataset(task: Task | None, dataset: Dataset) -> None:
    """Raise TrainingError where a dataset lacks what a task learns from."""
    wanted, found = TARGETS[task_name(task)], dataset.manifest.target
    if wanted != found:
        raise TrainingError(
            f"{dataset.folder} has {BESIDE[found]} beside each image, and {task_name(task)} needs {BESIDE[wanted]}; set "
            "`task` of the downstream entry, or name another dataset"
        )


def with_targets(task: Task | None, transform: Transform, *, train: bool) -> Transform | DenseTransform:
    """The transform of images, for a dense task joined by that of its targets."""
    return transform if task is None else DenseTransform(transform, train)


def targets_of(batch: Batch, device: torch.device) -> Tensor | list[dict[str, Tensor]]:
    """What a training batch is to be learnt as, on the device: labels [b], masks [b, S, S] or a dict of boxes an image."""
    found = batch.labels if batch.targets is None else batch.targets
    if isinstance(found, Tensor):
        return found.to(device, non_blocking=True)
    return [detection.as_tensors(each, device) for each in found]  # type: ignore[arg-type]


def make_dense_objective(recipe: Recipe) -> Objective:
    """What a dense task minimises."""
    if isinstance(recipe.task, Segmentation):
        return segmentation.make_objective(recipe.training.label_smoothing)
    return detection.objective  # type: ignore[return-value]


def judge_of(task: Task, num_classes: int) -> Judge:
    """How a batch is judged; see the task's `judge`."""
    return partial(segmentation.judge, num_classes=num_classes) if isinstance(task, Segmentation) else detection.judge


def summary_of(task: Task, num_classes: int, subset: Subset) -> Callable[[NDArray[np.float64]], Evaluation]:
    """What the rows of all samples of `subset` come to."""
    if isinstance(task, Segmentation):
        return partial(segmentation.summarize, num_classes=num_classes)
    return partial(detection.summarize, num_classes=num_classes, subset=subset)
