"""AdamW and its learning rate: a pure function of the optimizer step, the same at any world size.

No scheduler object: a prepared one would step world_size times a step. The loop writes the rate before each step.
"""

from __future__ import annotations

import math

import torch
from timm.optim import (
    param_groups_layer_decay,  # pyright: ignore[reportPrivateImportUsage]
    param_groups_weight_decay,  # pyright: ignore[reportPrivateImportUsage]
)
from torch import nn

from dbscale.study.recipe import Optim, Recipe


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW on what requires gradients; no decay on biases, norms, position and class tokens.

    Groups carry `lr_scale`, the layer-wise factor of their learning rate (Bao et al., 2106.08254).
    """
    no_decay = getattr(model, "no_weight_decay", set)()
    if optim.layer_decay is None:
        groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=no_decay)
    else:
        groups = param_groups_layer_decay(
            model, optim.weight_decay, no_weight_decay_list=no_decay, layer_decay=optim.layer_decay
        )
    groups = [{"lr_scale": 1.0, **group} for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Rate of 0-based optimizer step `step`: linear warm-up, then half a cosine to `min_lr`, scaled with the batch."""
    optim, num_steps = recipe.training.optim, recipe.num_steps
    peak = optim.lr
    if optim.lr_reference_batch is not None:
        peak *= recipe.training.global_batch / optim.lr_reference_batch
    warmup = round(optim.warmup_share * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(num_steps - warmup, 1)
    return optim.min_lr + (peak - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Write the step's rate into every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
