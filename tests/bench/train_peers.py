"""The loops that ours is measured beside: the shortest one that trains, and one in timm's manner, on synthetic data."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.metrics import AverageMeter
from torch import nn
from torch.nn.functional import cross_entropy

from dbscale.study.recipe import DeiT, Precision, Tier
from dbscale.training.models import make_model


class Pace(NamedTuple):
    """Seconds a step."""

    wall_s: float
    cpu_s: float
    """Of this process: what a step costs however busy the machine is."""


def now() -> Pace:
    return Pace(time.perf_counter(), time.process_time())


def pace(since: Pace, until: Pace, steps: int) -> Pace:
    return Pace(*((end - start) / steps for start, end in zip(since, until, strict=True)))


@dataclass(frozen=True)
class Setting:
    """What all variants share."""

    model: DeiT
    image_size: int
    batch: int
    precision: Precision
    device: torch.device
    steps: int
    warmup: int = 10
    """Steps before the clock starts."""
    num_classes: int = 16
    tier: Tier = "raw"
    """Of images above 64 px, where real ones are read."""


SETTINGS = {
    "tiny": (DeiT(heads=4, head_width=16, depth=4, patch_size=8), 32, 128),
    "deit_h2": (DeiT(heads=2), 224, 256),
    "deit_h8": (DeiT(heads=8), 224, 256),
}


def timed(step: Callable[[int], object], setting: Setting) -> Pace:
    """Of the steps after warm-up."""
    for number in range(setting.warmup):
        step(number)
    synchronize(setting.device)
    started = now()
    for number in range(setting.warmup, setting.steps):
        step(number)
    synchronize(setting.device)
    return pace(started, now(), setting.steps - setting.warmup)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fresh(setting: Setting) -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.autocast]:
    model = make_model(setting.model, num_classes=setting.num_classes, image_size=setting.image_size)
    images = torch.randn(setting.batch, 3, setting.image_size, setting.image_size, device=setting.device)
    labels = torch.randint(0, setting.num_classes, (setting.batch,), device=setting.device)
    autocast = torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.precision == "bf16")
    return model.to(setting.device).train(), images, labels, autocast


def bare(setting: Setting) -> Pace:
    """The shortest loop that trains: synthetic batch, forward, backward, clip, step."""
    model, images, labels, autocast = fresh(setting)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(_: int) -> None:
        with autocast:
            logits = model(images)
        cross_entropy(logits.float(), labels, label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, setting)


def timm_manner(setting: Setting) -> Pace:
    """The inner loop of timm's train.py from timm's own parts, synthetic batch, logging every 50 steps."""
    model, images, labels, autocast = fresh(setting)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=setting.steps, t_in_epochs=False)
    meter, loss_fn = AverageMeter(), nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(number: int) -> None:
        with autocast:
            loss = loss_fn(model(images), labels)
        loss.backward()
        dispatch_clip_grad(model.parameters(), value=1.0, mode="norm")
        optimizer.step()
        optimizer.zero_grad()
        if number % 50 == 0:
            meter.update(loss.item(), setting.batch)
        scheduler.step_update(num_updates=number)

    return timed(step, setting)
