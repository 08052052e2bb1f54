"""Parameters and operations of a forward pass, counted by torch on a model without memory; exact for any timm model.

`study.cost` predicts the same number for DeiT without torch; a test holds the two together.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dbscale.study.recipe import Model, Recipe
from dbscale.training.models import skeleton


@dataclass(frozen=True)
class Size:
    """What a model is made of."""

    num_params: int
    forward_flops: float
    """Floating-point operations of one image's forward pass; a multiply-add counts two."""


def measure(model: Model, *, num_classes: int, image_size: int) -> Size:
    """Count parameters and operations."""
    return _measure(skeleton(model, num_classes=num_classes, image_size=image_size), image_size)


@cache
def _measure(network: nn.Module, image_size: int) -> Size:
    network = copy.deepcopy(network).eval()
    images = torch.zeros(1, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    num_params = sum(parameter.numel() for parameter in network.parameters())
    return Size(num_params, float(counter.get_total_flops()))


def count_train_flops(recipe: Recipe, teacher: Model | None, num_classes: int) -> float:
    """Of a whole run: forward and backward (two forwards) of the student, forward of the teacher.

    A linear probe trains the head alone: its student costs one forward.
    """
    size = recipe.data.image_size
    student = measure(recipe.model, num_classes=num_classes, image_size=size).forward_flops
    a_sample = student * (1 if recipe.training.scope == "linear_probe" else 3)
    if teacher is not None:
        a_sample += measure(teacher, num_classes=num_classes, image_size=size).forward_flops
    return a_sample * recipe.num_steps * recipe.training.global_batch
