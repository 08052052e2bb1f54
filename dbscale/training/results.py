"""After the last step: weights out, evaluation, row.  A kill in here costs an evaluation, not a training."""

from __future__ import annotations

import shutil
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from dbscale.data import make_eval_loader, make_transform
from dbscale.files import atomic_open, read_json, write_json
from dbscale.kernels import resolve_backend
from dbscale.study.cell import Arm, CellSpec, model_label
from dbscale.study.recipe import Recipe
from dbscale.study.store import Attempt, Row, Store, Timing, Upstream
from dbscale.training.checkpoint import LoopState
from dbscale.training.device import device_name, peak_flops, peak_memory_bytes
from dbscale.training.evaluate import Evaluation, evaluate
from dbscale.training.flops import count_train_flops, measure
from dbscale.training.loop import Run, gather_bad_samples
from dbscale.training.losses import wants_maps, wants_teacher
from dbscale.training.models import restore_model
from dbscale.training.prepare import Context, engine_name, open_cell_dataset, set_precision
from dbscale.training.probes import probe_upstream
from dbscale.training.weights import WEIGHTS_NAME, export_weights, sha256_of

TRAINED_NAME = "trained.json"
EVAL_BATCH_PIXELS = 1 << 20
"""Pixels of an evaluation batch: 1,024 images of 32 px, 20 of 224 px, on a CPU; 16 times as many on a GPU."""


@dataclass(frozen=True)
class Trained:
    """What training leaves for the row, once its weights are out: `trained.json`."""

    state: LoopState
    num_classes: int
    peak_memory_bytes: int
    weights_sha256: str


def finish_training(run: Run, spec: CellSpec, store: Store) -> Trained | None:
    """Write `model.safetensors`, then `trained.json`, which says that nothing is left to train; None off the main
    rank."""
    folder, accelerator = store.cell_dir(spec.key), run.accelerator
    gather_bad_samples(run)
    digest = export_weights(folder / WEIGHTS_NAME, accelerator, run.model, run.ema)
    if digest is None:
        return None
    trained = Trained(run.state, run.num_classes, peak_memory_bytes(accelerator.device), digest)
    write_json(folder / TRAINED_NAME, asdict(trained))
    return trained


def read_trained(folder: Path) -> Trained | None:
    """None while there is something left to train (or the weights are not the ones that were written)."""
    path = folder / TRAINED_NAME
    if not path.exists():
        return None
    data: dict[str, Any] = read_json(path)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file() or sha256_of(weights) != data["weights_sha256"]:
        return None
    return Trained(**{**data, "state": LoopState.from_json(data["state"])})


def evaluate_cell(spec: CellSpec, trained: Trained, context: Context) -> tuple[Evaluation, float]:
    """The exported weights on the whole test split, and the seconds it took; `correct.npz` is written."""
    started, recipe, accelerator = time.perf_counter(), spec.recipe, context.accelerator
    size, folder = recipe.data.image_size, context.store.cell_dir(spec.key)
    test = open_cell_dataset(spec, context.data_dir, "test").subset()
    model = restore_model(
        recipe.model, folder / WEIGHTS_NAME, num_classes=trained.num_classes, image_size=size
    )  # fmt: skip
    set_precision(model.to(accelerator.device).requires_grad_(False), recipe, accelerator)
    pixels = EVAL_BATCH_PIXELS * (1 if accelerator.device.type == "cpu" else 16)
    loader = make_eval_loader(
        test,
        batch_size=max(1, min(pixels // size**2, -(-len(test) // accelerator.num_processes))),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=context.resources.num_workers,
        transform=make_transform(image_size=size, train=False, tier=recipe.data.tier),
    )
    evaluation = evaluate(model, loader, len(test), accelerator)
    if accelerator.is_main_process:
        write_correct(folder / "correct.npz", evaluation)
    return evaluation, time.perf_counter() - started


def write_correct(path: Path, evaluation: Evaluation) -> None:
    """One bit per test sample, in the split's order: `correct`, and `counted` (0 where it could not be decoded)."""
    correct, counted = np.packbits(evaluation.correct_N), np.packbits(evaluation.counted_N)
    with atomic_open(path, "wb") as file:
        np.savez(file, num_samples=np.int64(len(evaluation.correct_N)), correct=correct, counted=counted)


def make_row(
    spec: CellSpec,
    trained: Trained,
    evaluation: Evaluation,
    eval_time_s: float,
    context: Context,
    attempts: list[Attempt],
) -> Row:
    """Everything a table of cells needs; `attempts` are all tries, the last one still running."""
    recipe, store, accelerator = spec.recipe, context.store, context.accelerator
    uses_teacher = spec.teacher is not None and wants_teacher(recipe.distill)
    teacher = store.read_spec(spec.teacher).recipe.model if spec.teacher and uses_teacher else None
    size = measure(recipe.model, num_classes=trained.num_classes, image_size=recipe.data.image_size)
    train_flops = count_train_flops(recipe, teacher, trained.num_classes)
    return Row(
        key=spec.key,
        id=spec.id,
        stage=recipe.stage,
        arm=_arm(spec, store),
        model=model_label(recipe.model),
        dataset=recipe.data.dataset,
        num_samples=recipe.data.num_samples,
        seed=recipe.seed,
        num_params=size.num_params,
        num_classes=trained.num_classes,
        num_steps=trained.state.step,
        samples_seen=trained.state.step * recipe.training.global_batch,
        train_flops=train_flops,
        error_rate=evaluation.error_rate,
        top5_error_rate=evaluation.top5_error_rate,
        test_loss=evaluation.loss,
        calibration_error=evaluation.calibration_error,
        num_test_samples=int(evaluation.counted_N.sum()),
        train_loss=trained.state.record.train_loss,
        weights_sha256=trained.weights_sha256,
        replaced_samples=len(trained.state.bad_ids),
        upstream=_upstream(spec, context),
        teacher=spec.teacher,
        kd_backend=resolve_backend(context.resources.kd_backend, "kd_loss", accelerator.device.type)
        if teacher
        else None,
        resources=_how(recipe, context),
        timing=_timing(recipe, trained, train_flops, eval_time_s, accelerator, attempts),
    )


def clear_scratch(folder: Path) -> None:
    """Drop what only an unfinished cell needs."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / TRAINED_NAME).unlink(missing_ok=True)


def _arm(spec: CellSpec, store: Store) -> Arm:
    if spec.recipe.stage == "distill":
        return "distilled"
    if spec.init is not None:
        parent = store.read_row(spec.init)
        assert parent is not None, "a finetune starts from a finished cell"
        return parent.arm
    return "scratch" if spec.recipe.stage == "finetune" else "plain"


def _upstream(spec: CellSpec, context: Context) -> Upstream | None:
    parent = context.store.read_row(spec.init) if spec.init else None
    if parent is None:
        return None
    probe = probe_upstream(spec, context)
    return Upstream(
        dataset=parent.dataset,
        num_samples=parent.num_samples,
        stage=parent.stage,
        error_rate=parent.error_rate,
        linear_probe_error=probe.linear_probe_error,
        transrate=probe.transrate,
    )


def _how(recipe: Recipe, context: Context) -> dict[str, str | int | float | bool | None]:
    maps_backend = resolve_backend(
        context.resources.kd_backend, "sdpa_with_attention_kl", context.accelerator.device.type
    )
    return {
        "engine": engine_name(context.resources),
        "world_size": context.batching.world_size,
        "micro_batch": context.batching.micro_batch,
        "accumulation": context.batching.accumulation,
        "precision": recipe.training.precision,
        "threads": torch.get_num_threads(),
        "deterministic": context.resources.deterministic,
        "compile": context.resources.compile,
        "torch": torch.__version__,
        **({"attention_backend": maps_backend} if wants_maps(recipe.distill) else {}),
    }


def _timing(
    recipe: Recipe,
    trained: Trained,
    train_flops: float,
    eval_time_s: float,
    accelerator: Accelerator,
    tries: list[Attempt],
) -> Timing:
    state, num_devices = trained.state, accelerator.num_processes
    tries = [each for each in tries if each.status != "blocked"]
    name, train_time_s = device_name(accelerator.device), max(state.train_time_s, 1e-9)
    peak = peak_flops(name, recipe.training.precision)
    return Timing(
        train_time_s=state.train_time_s,
        eval_time_s=eval_time_s,
        step_time_s=state.train_time_s / max(state.step, 1),
        images_per_s=state.step * recipe.training.global_batch / train_time_s,
        data_wait_share=min(state.data_wait_s / train_time_s, 1.0),
        device_time_s=sum(((each.ended or time.time()) - each.started) * each.num_devices for each in tries),
        peak_memory_bytes=trained.peak_memory_bytes,
        mfu=None if peak is None else train_flops / (train_time_s * num_devices * peak),
        energy_j=state.energy_j,
        num_attempts=len(tries),
        num_devices=num_devices,
        device=name,
        host=socket.gethostname(),
    )
