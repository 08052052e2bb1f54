"""From a cell's spec to everything the loop works with: data, student, teacher, optimizer, engine, last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from dbscale.data import Dataset, TrainLoader, Transform, make_loader, make_transform, open_dataset
from dbscale.errors import TrainingError
from dbscale.keyed import derive_seed
from dbscale.study.cell import CellSpec
from dbscale.study.recipe import Recipe
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Store
from dbscale.training.checkpoint import Checkpointer, LoopState
from dbscale.training.device import device_name
from dbscale.training.engine import AMP_DTYPE, Batching, engine_name
from dbscale.training.graph import can_capture
from dbscale.training.loop import Run
from dbscale.training.losses import CachedTeacher, Objective, make_objective, open_cache, wants_maps, wants_teacher
from dbscale.training.models import load_teacher
from dbscale.training.optimizer import EMA, keep_rates_on, make_optimizer
from dbscale.training.pretrained import make_teacher
from dbscale.training.progress import Reporter, truncate_metrics
from dbscale.training.tasks import check_dataset, make_dense_objective, make_student, with_targets

DEVICE_TIERS = ("resident", "raw")
"""Tiers whose stored pixels are tensors, which an accelerator augments faster than the host."""


@dataclass(frozen=True)
class Context:
    """Where a cell runs."""

    store: Store
    data_dir: Path
    resources: Resources
    batching: Batching
    accelerator: Accelerator
    stop: StopRequest


def prepare_run(spec: CellSpec, dataset: Dataset, context: Context) -> Run:
    """Build the run and restore its newest whole checkpoint. Raises TrainingError, DataError or FileError."""
    recipe, accelerator = spec.recipe, context.accelerator
    student = make_student(spec, context.store, dataset.num_classes)
    teacher = find_teacher(spec, context.store, dataset.num_classes, accelerator.device)
    for model in (student, teacher):
        set_precision(model, recipe, accelerator)
    objective = _make_objective(spec, teacher, student, context)
    if context.resources.compile:
        student.compile()
    optimizer = make_optimizer(student, recipe.training.optim)
    model, optimizer = accelerator.prepare(student, optimizer)
    ema = EMA(student, recipe.training.ema_decay) if recipe.training.ema_decay is not None else None
    checkpointer = _make_checkpointer(spec, context, model, ema)
    state = _restore(checkpointer, optimizer, context)
    loader, device_transform = make_batches(recipe, dataset, context, state.step)
    if state.step:
        loader.refuse_foreign(state.stream)
    state.stream = loader.identity
    if accelerator.is_main_process:
        truncate_metrics(context.store, spec.key, state.step)
    return Run(
        recipe=recipe,
        accelerator=accelerator,
        student=student,
        model=model,
        learning=tuple(each for each in student.parameters() if each.requires_grad),
        optimizer=optimizer,
        objective=objective,
        loader=loader,
        device_transform=device_transform,
        num_classes=dataset.num_classes,
        accumulation=context.batching.accumulation,
        captures=can_capture(recipe, context.resources, accelerator),
        ema=ema,
        checkpointer=checkpointer,
        reporter=Reporter(accelerator, recipe, context.store, spec.key, state.record, num_done=state.step),
        state=state,
        stop=context.stop,
        checkpoint_interval_s=context.resources.checkpoint_interval_s,
        checkpoint_stall_share=context.resources.checkpoint_stall_share,
    )


def _restore(checkpointer: Checkpointer, optimizer: torch.optim.Optimizer, context: Context) -> LoopState:
    """The state of the newest checkpoint, its tensors where they belong, or that of a run that begins."""
    state, device = checkpointer.load_latest() or LoopState(), context.accelerator.device
    if device.type == "cuda" and context.resources.zero_stage is None:
        # After loading, which brings rates of its own; whether or not the step is recorded, so that both round alike.
        keep_rates_on(device, optimizer)
    return state


def _make_objective(spec: CellSpec, teacher: nn.Module | None, student: nn.Module, context: Context) -> Objective:
    if spec.recipe.task is not None:
        return make_dense_objective(spec.recipe)
    answer = _make_answer(spec, teacher, context)
    return make_objective(spec.recipe, context.resources, teacher, student, answer)


def find_teacher(spec: CellSpec, store: Store, num_classes: int, device: torch.device) -> nn.Module | None:
    """The frozen teacher: a cell of the store, or weights from elsewhere; None where no term asks one."""
    recipe = spec.recipe
    if recipe.teacher is None:
        return load_teacher(store, spec, num_classes=num_classes, device=device)
    if not wants_teacher(recipe.distill):
        return None
    teacher = make_teacher(store, recipe.teacher, num_classes=num_classes, image_size=recipe.data.image_size)
    return teacher.to(device).eval().requires_grad_(False)


def _make_answer(spec: CellSpec, teacher: nn.Module | None, context: Context) -> CachedTeacher | None:
    """The teacher's kept logits, where they are asked for and are all that is asked of it."""
    if teacher is None or not context.resources.teacher_cache or wants_maps(spec.recipe.distill):
        return None
    return open_cache(context.store, spec, teacher, device_name(context.accelerator.device))


def _make_checkpointer(spec: CellSpec, context: Context, model: nn.Module, ema: EMA | None) -> Checkpointer:
    return Checkpointer(
        folder=context.store.cell_dir(spec.key) / "checkpoints",
        cell_id=spec.id,
        accelerator=context.accelerator,
        ema=ema,
        engine=engine_name(context.resources),
        wrapped=model,
    )


def open_cell_dataset(spec: CellSpec, data_dir: Path, split: str) -> Dataset:
    """The packed dataset a cell reads. Raises DataError, or TrainingError when it is not the one the cell names."""
    data = spec.recipe.data
    dataset = open_dataset(
        data_dir / "shards" / data.dataset, split, tier=data.tier, image_size=data.image_size
    )  # fmt: skip
    if spec.fingerprint is not None and dataset.fingerprint != spec.fingerprint:
        raise TrainingError(
            f"{dataset.folder} has fingerprint {dataset.fingerprint}, cell {spec.key} was planned for "
            f"{spec.fingerprint}; plan again, or restore the dataset"
        )
    check_dataset(spec.recipe.task, dataset)
    return dataset


def set_precision(model: nn.Module | None, recipe: Recipe, accelerator: Accelerator) -> None:
    """bf16 computes under autocast on float32 weights, alike under every engine; fp16 students are the engine's."""
    dtype = AMP_DTYPE[recipe.training.precision]
    is_trained = model is not None and any(parameter.requires_grad for parameter in model.parameters())
    if model is None or dtype is None or (dtype == torch.float16 and is_trained):
        return
    model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)


def make_batches(
    recipe: Recipe, dataset: Dataset, context: Context, num_done: int
) -> tuple[TrainLoader, Transform | None]:
    """This rank's stream from optimizer step `num_done` on, and the transform to run on the device, if any."""
    augment, data = recipe.training.augment, recipe.data
    transform = make_transform(
        image_size=data.image_size,
        train=True,
        augment=augment.model_dump(),
        seed=derive_seed(recipe.seed, "augment"),
        tier=data.tier,
        whole=recipe.task is not None,
    )
    is_dense = recipe.task is not None  # masks and boxes are placed by the host, and pixels with them
    on_device = context.accelerator.device.type != "cpu" and data.tier in DEVICE_TIERS and not is_dense
    loader = make_loader(
        dataset.subset(data.num_samples, data.subset_seed),
        global_batch=recipe.training.global_batch,
        rank=context.accelerator.process_index,
        world_size=context.accelerator.num_processes,
        num_workers=context.resources.num_workers,
        seed=derive_seed(recipe.seed, "order"),
        consumed=num_done * recipe.training.global_batch,
        transform=None if on_device else with_targets(recipe.task, transform, train=True),
        block_size=data.block_size,
        repeats=augment.repeats,
    )
    return loader, transform if on_device else None
