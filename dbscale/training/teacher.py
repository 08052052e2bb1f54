"""The frozen model a distill cell listens to: eval mode, no gradients, in no optimizer and in no checkpoint.

It is never handed to the engine: under ZeRO-3 each rank keeps it whole.
"""

from __future__ import annotations

import torch
from torch import nn

from dbscale.errors import TrainingError
from dbscale.study.cell import CellSpec
from dbscale.study.store import Store
from dbscale.training.losses import wants_teacher
from dbscale.training.models import restore_model
from dbscale.training.weights import verified_weights


def load_teacher(store: Store, spec: CellSpec, *, num_classes: int, device: torch.device) -> nn.Module | None:
    """The teacher of a distill cell, ready to guide; None if none is needed. Raises TrainingError for a misfit."""
    if spec.teacher is None or not wants_teacher(spec.recipe.distill):
        return None
    parent = store.read_spec(spec.teacher)
    row = store.read_row(spec.teacher)
    if row is None:
        raise TrainingError(f"the teacher {spec.teacher} has no row; train it first")
    if row.num_classes != num_classes:
        raise TrainingError(
            f"the teacher {spec.teacher} knows {row.num_classes} classes ({row.dataset}), this cell's dataset "
            f"{spec.recipe.data.dataset} has {num_classes}; distill on the teacher's own dataset"
        )
    size, wanted = parent.recipe.data.image_size, spec.recipe.data.image_size
    if size != wanted:
        raise TrainingError(f"the teacher {spec.teacher} sees {size} px, this cell {wanted} px; they must be equal")
    weights = verified_weights(store, row)
    teacher = restore_model(parent.recipe.model, weights, num_classes=num_classes, image_size=size)
    return teacher.to(device).eval().requires_grad_(False)
