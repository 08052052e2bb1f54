"""AdamW, its learning rate and the moving average of weights.

The rate is a pure function of the optimizer step, the same at any world size. There is no scheduler object: a prepared one
would step world_size times a step. The loop writes the rate before each step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from timm.optim import (
    param_groups_layer_decay,  # pyright: ignore[reportPrivateImportUsage]
    param_groups_weight_decay,  # pyright: ignore[reportPrivateImportUsage]
)
from torch import Tensor, nn

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


def keep_rates_on(device: torch.device, optimizer: torch.optim.Optimizer) -> None:
    """Keep the groups' learning rates as tensors [] on the device, where a recorded step reads them at each replay."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Write the step's rate into every group."""
    for group in optimizer.param_groups:
        own = rate * group["lr_scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def local_piece(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: all of it, or its ZeRO-3 partition (then the average is partitioned as well,
    and nothing is gathered until the end)."""
    return getattr(parameter, "ds_tensor", parameter).data


class EMA:
    """average ← d·average + (1-d)·weights after each optimizer step, float32; d rises to `decay`.

    d(t) = min(decay, (1 + t) / (10 + t)) at 0-based step t, as TensorFlow's moving average with `num_updates`: a
    constant .9999 would leave 61 % of the initial weights in the average of a run of 5,000 steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._decay = decay
        self.average = [local_piece(parameter).detach().float().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the 0-based optimizer step `step`."""
        decay = min(self._decay, (1 + step) / (10 + step))
        pieces = [local_piece(parameter).float() for parameter in self._parameters]
        torch._foreach_lerp_(self.average, pieces, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model's weights are the average."""
        pieces = [local_piece(parameter) for parameter in self._parameters]
        kept = [piece.clone() for piece in pieces]
        for piece, average in zip(pieces, self.average, strict=True):
            piece.copy_(average)
        try:
            yield
        finally:
            for piece, original in zip(pieces, kept, strict=True):
                piece.copy_(original)
