"""The training loop: one for every stage, read top to bottom.

What is trained and how is decided before it (`prepare`), what becomes of the result after it (`results`). A step is a
function of the student's state and a batch; everything random in it is keyed by the step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from dbscale.data import TrainLoader, Transform
from dbscale.keyed import derive_seed
from dbscale.study.recipe import Recipe
from dbscale.study.resources import StopRequest
from dbscale.training.checkpoint import Checkpointer, LoopState
from dbscale.training.device import energy_j
from dbscale.training.engine import highest_of_ranks, lockstep, reduce_over_ranks
from dbscale.training.feed import feed
from dbscale.training.graph import CapturedStep
from dbscale.training.losses import TERMS, Losses, Objective, Target
from dbscale.training.optimizer import EMA, learning_rate, set_learning_rate
from dbscale.training.progress import Reporter


@dataclass(frozen=True)
class Run:
    """All that a loop works with; made by `prepare.prepare_run`."""

    recipe: Recipe
    accelerator: Accelerator
    student: nn.Module
    """The bare timm model."""
    model: nn.Module
    """The student as its engine wraps it."""
    learning: tuple[nn.Parameter, ...]
    """The student's parameters that require gradients."""
    optimizer: torch.optim.Optimizer
    objective: Objective
    loader: TrainLoader
    device_transform: Transform | None
    """Augmentation on the device, for pixels the loader hands out untouched."""
    num_classes: int
    accumulation: int
    captures: bool
    """Whether the step is recorded as a CUDA graph."""
    ema: EMA | None
    checkpointer: Checkpointer
    reporter: Reporter
    state: LoopState
    stop: StopRequest
    checkpoint_interval_s: float
    checkpoint_stall_share: float
    """Most of its time that training may stand still for periodic checkpoints."""


class Request(IntEnum):
    """What a rank asks for after a step; the highest of all ranks is what all do."""

    GO_ON = 0
    SAVE = 1
    STOP = 2


def train(run: Run) -> bool:
    """Train to the last step; False when it was asked to stop and has saved. Raises TrainingError at a bad loss."""
    state, recipe = run.state, run.recipe
    # A frozen backbone keeps its batch statistics and drops no paths.
    run.model.train(recipe.training.scope == "full")
    energy, interval_s = energy_j(run.accelerator.device), run.checkpoint_interval_s
    saved_at = mark = time.perf_counter()
    steps = range(state.step, recipe.num_steps)
    fed = feed(run.loader, steps, recipe, run.device_transform, run.accelerator.device)
    take_step = _recorded(run) if run.captures else partial(_optimizer_step, run)
    for step, batch in zip(steps, lockstep(fed, run.accelerator), strict=False):
        state.data_wait_s += time.perf_counter() - mark
        if len(batch.bad_ids):
            state.bad_ids = sorted({*state.bad_ids, *batch.bad_ids.tolist()})

        seed_step(recipe.seed, step, run.accelerator.process_index, run.accelerator.device)
        set_learning_rate(run.optimizer, learning_rate(step, recipe))
        losses = take_step(batch.images, batch.target)
        if run.ema is not None:
            run.ema.update(step)

        state.step = step + 1
        run.reporter.add(step, losses)
        now = time.perf_counter()
        state.train_time_s += now - mark
        mark = now

        if state.step == recipe.num_steps:
            break
        is_due = now - saved_at > interval_s
        request = _agree(run, Request.STOP if run.stop.requested else Request(int(is_due)))
        if request is not Request.GO_ON:
            energy = _add_energy(run, energy)
            _save(run)
            if request is Request.STOP:
                run.checkpointer.finish()
                return False
            saved_at = mark = time.perf_counter()
            state.checkpoint_time_s += saved_at - now
            interval_s = max(run.checkpoint_interval_s, (saved_at - now) / run.checkpoint_stall_share)
    _add_energy(run, energy)
    return True


def _recorded(run: Run) -> CapturedStep:
    return CapturedStep(partial(_optimizer_step, run), run.optimizer)


def _optimizer_step(run: Run, images: Tensor, target: Target) -> Losses:
    """Forward and backward over the micro-batches, one optimizer step; this rank's mean losses, detached."""
    accelerator, clip_norm = run.accelerator, run.recipe.training.optim.clip_norm
    collected: list[Losses] = []
    for micro_images, micro_target in _micro_batches(images, target, run.accumulation):
        with accelerator.accumulate(run.model):
            losses = run.objective(run.model, micro_images, micro_target)
            accelerator.backward(losses.loss)
            # DeepSpeed clips, steps and clears inside backward; there the next three lines do nothing.
            if clip_norm and accelerator.sync_gradients and accelerator.distributed_type != "DEEPSPEED":
                accelerator.unscale_gradients()
                nn.utils.clip_grad_norm_(run.learning, clip_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
        collected.append(losses)
    return _mean(collected)


def _micro_batches(images: Tensor, target: Target, num: int) -> list[tuple[Tensor, Target]]:
    if num == 1:
        return [(images, target)]
    if isinstance(target, Tensor):
        return list(zip(images.chunk(num), target.chunk(num), strict=True))
    if isinstance(target, list):
        size = len(target) // num
        parts = [target[start : start + size] for start in range(0, len(target), size)]
        return list(zip(images.chunk(num), parts, strict=True))
    labels = zip(target.y_a.chunk(num), target.y_b.chunk(num), strict=True)
    targets = [target._replace(y_a=y_a, y_b=y_b) for y_a, y_b in labels]
    return list(zip(images.chunk(num), targets, strict=True))


def _mean(collected: list[Losses]) -> Losses:
    if len(collected) == 1:
        return collected[0]

    def mean(name: str) -> Tensor | None:
        values = [value.detach() for each in collected if (value := getattr(each, name)) is not None]
        return torch.stack(values).mean() if values else None

    loss, ce = mean("loss"), mean("ce")
    assert loss is not None and ce is not None
    return Losses(loss, ce, *(mean(name) for name in TERMS[2:]))


def _agree(run: Run, request: Request) -> Request:
    """The highest request of all ranks, so that all save at the same step."""
    if run.accelerator.num_processes == 1:
        return request
    return Request(highest_of_ranks(request))


def _add_energy(run: Run, since: float | None) -> float | None:
    """Charge the run for what all its devices used since the last reading; the new reading."""
    now = energy_j(run.accelerator.device)
    if now is not None and since is not None:
        used = reduce_over_ranks(run.accelerator, torch.tensor(now - since), "sum")
        run.state.energy_j = (run.state.energy_j or 0.0) + float(used)
    return now


def _save(run: Run) -> None:
    run.reporter.flush(run.state.step - 1)
    gather_bad_samples(run)
    run.checkpointer.save(run.state)


def gather_bad_samples(run: Run) -> None:
    """Every rank learns which samples the others could not decode; all ranks call it."""
    run.state.bad_ids = sorted(set(gather_object(run.state.bad_ids)))


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Make torch's draws within a step (stochastic depth, dropout) a function of (seed, step, rank).

    So no generator's state has to outlive a step: nothing to save in checkpoints, and a teacher's draws, if it had
    any, could not shift the student's.
    """
    key = derive_seed(seed, "step", step, rank)
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)
