"""What a device can do and what a cell asked of it: peak FLOPs, peak memory, energy, operations of a training run.

A number is None where nobody can say it.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dbscale.study.cost import DEVICES, train_flops
from dbscale.study.recipe import Model, Precision, Recipe
from dbscale.training.models import skeleton
from dbscale.training.tasks import Task, join_head

PROC = Path("/proc/self")


@dataclass(frozen=True)
class Size:
    """What a model is made of."""

    num_params: int
    forward_flops: float
    """Floating-point operations of one image's forward pass; a multiply-add counts two."""


def measure(model: Model, *, num_classes: int, image_size: int, task: Task | None = None) -> Size:
    """Count parameters and operations, exactly and for any timm model: torch counts on a model without memory."""
    if task is None:
        return _measure(skeleton(model, num_classes=num_classes, image_size=image_size), image_size)
    return _measure_dense(model.model_dump_json(), type(model), task, num_classes, image_size)  # type: ignore[arg-type]


@cache
def _measure_dense(model_json: str, kind: type[Model], task: Task, num_classes: int, image_size: int) -> Size:
    backbone = copy.deepcopy(skeleton(kind.model_validate_json(model_json), num_classes=0, image_size=image_size))
    with torch.device("meta"):
        network = join_head(backbone, task, num_classes)
    return _measure(network, image_size)


@cache
def _measure(network: nn.Module, image_size: int) -> Size:
    network = copy.deepcopy(network).eval()
    images = torch.zeros(1, 3, image_size, image_size, device="meta")
    # A detector's matching and suppression are no part of what is counted.
    forward = getattr(network, "head_outputs", network)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(images)
    num_params = sum(parameter.numel() for parameter in network.parameters())
    return Size(num_params, float(counter.get_total_flops()))


def count_train_flops(recipe: Recipe, teacher: Model | None, num_classes: int) -> float:
    """Operations of a whole run, as `study.cost` adds them up, from counted forward passes instead of predicted ones."""

    def forward(model: Model, image_size: int) -> float:
        task = recipe.task if model is recipe.model else None
        return measure(model, num_classes=num_classes, image_size=image_size, task=task).forward_flops

    return train_flops(recipe, teacher, forward)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops(name: str, precision: Precision) -> float | None:
    """Dense 16-bit peak of a known accelerator, operations a second; None for others, for CPUs and for float32."""
    if precision == "fp32":
        return None
    words = name.lower().replace("-", " ").split()
    return next((device.peak_flops for kind, device in DEVICES.items() if kind != "cpu" and kind in words), None)


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new high-water mark, so that a cell is not charged for the ones before it in the same process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (PROC / "clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held since the last reset: of the device if it is one, else resident in the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = (PROC / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def energy_j(device: torch.device) -> float | None:
    """Joules the device has used since its driver was loaded, where NVML counts them; differences are what means
    something."""
    if device.type != "cuda":
        return None
    try:
        import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except Exception:  # an optional reading: no library, no permission or no counter all mean the same
        return None
