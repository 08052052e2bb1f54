"""Batches on their way to the device: fetched, copied there, augmented and mixed.

On a CUDA device a thread does all that on a stream of its own, two batches ahead, so that a step waits neither for the
host nor for the copy; elsewhere each is made when it is asked for. Every draw is keyed by sample and step, so what a batch
holds is the same either way. What is done with it is the loop's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from dbscale.data import Batch, MixTarget, TrainLoader, Transform, mix_batch
from dbscale.keyed import derive_seed
from dbscale.study.recipe import Recipe
from dbscale.training.losses import Target
from dbscale.training.tasks import targets_of

AHEAD = 2
"""Batches that wait on the device: one is taken while the next is made."""


class Fed(NamedTuple):
    """A rank's share of a step's batch, on its device."""

    images: Tensor
    """float32 [b, 3, S, S], augmented and mixed."""
    target: Target
    bad_ids: Tensor
    """int64 [any], on the host: samples (position in the split) that were unreadable."""


def feed(
    loader: TrainLoader, steps: range, recipe: Recipe, transform: Transform | None, device: torch.device
) -> Iterator[Fed]:
    """The batches of `steps`, in order; `transform` augments on the device what the loader hands out untouched.

    Raises what the loader raises, at the step that it concerns.
    """
    made = (_on_device(batch, step, recipe, transform, device) for step, batch in zip(steps, loader, strict=False))
    return _ahead(made, device) if device.type == "cuda" else made


def _ahead(made: Iterator[Fed], device: torch.device) -> Iterator[Fed]:
    """The same items, each made in a thread while the ones before are used."""
    stream = torch.cuda.Stream(device)

    def fetch() -> tuple[Fed | None, torch.cuda.Event]:
        is_there = torch.cuda.Event()
        with torch.cuda.stream(stream):
            fed = next(made, None)
            is_there.record()
        return fed, is_there

    with ThreadPoolExecutor(1, "feed") as thread:
        coming = deque(thread.submit(fetch) for _ in range(AHEAD))
        while True:
            fed, is_there = coming.popleft().result()
            if fed is None:
                return
            coming.append(thread.submit(fetch))
            step_stream = torch.cuda.current_stream(device)
            step_stream.wait_event(is_there)
            for tensor in _tensors(fed):
                tensor.record_stream(step_stream)  # else their memory is given away once the thread's stream is done
            yield fed


def _tensors(fed: Fed) -> list[Tensor]:
    target = fed.target
    if isinstance(target, Tensor):
        return [fed.images, target]
    if isinstance(target, MixTarget):
        return [fed.images, target.y_a, target.y_b]
    return [fed.images, *(tensor for image in target for tensor in image.values())]


def _on_device(batch: Batch, step: int, recipe: Recipe, transform: Transform | None, device: torch.device) -> Fed:
    assert isinstance(batch.images, Tensor), "lists of pixels are transformed in the loader"
    if device.type == "cuda":  # only pinned memory is copied while the host goes on
        batch = batch._replace(images=batch.images.pin_memory(), labels=batch.labels.pin_memory())
    # uint8 where the device augments, a quarter of the bytes
    images, target = batch.images.to(device, non_blocking=True), targets_of(batch, device)  # type: ignore[union-attr]
    if transform is not None:
        images = transform(images, epoch=batch.epoch, sample_ids=batch.sample_ids)
    augment = recipe.training.augment
    if not (augment.mixup or augment.cutmix):
        return Fed(images, target, batch.bad_ids)
    assert isinstance(target, Tensor), "only labels are mixed"
    mixed = mix_batch(
        images,
        target,
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        prob=augment.mix_share,
        switch_prob=augment.mix_switch_share,
        seed=derive_seed(recipe.seed, "mix"),
        step=step,
    )
    return Fed(*mixed, batch.bad_ids)
