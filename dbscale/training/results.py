"""After the last step: weights out, evaluation, row.  A kill in here costs an evaluation, not a training.

Evaluation is exact at any world size: every test sample counts once, and one bit of each is kept. It runs on the exported
weights in a plain timm model, so what is reported is what was saved.
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from dbscale import plugins
from dbscale.data import Batch, EvalLoader, make_eval_loader, make_transform
from dbscale.errors import FileError
from dbscale.files import atomic_open
from dbscale.kernels import attention_backend, resolve_backend
from dbscale.study.cell import Arm, CellSpec, model_label
from dbscale.study.recipe import Model, Recipe
from dbscale.study.store import Attempt, Row, Store, Timing, Upstream, WeightsOrigin
from dbscale.study.weights import read_origin
from dbscale.training.checkpoint import LoopState, read_sealed, write_sealed
from dbscale.training.device import count_train_flops, device_name, measure, peak_flops, peak_memory_bytes
from dbscale.training.engine import engine_name
from dbscale.training.evaluation import Evaluation, judge_split
from dbscale.training.loop import Run, gather_bad_samples
from dbscale.training.losses import wants_maps, wants_teacher
from dbscale.training.models import WEIGHTS_NAME, export_weights, sha256_of
from dbscale.training.prepare import Context, open_cell_dataset, set_precision
from dbscale.training.probes import probe_upstream
from dbscale.training.tasks import judge_of, restore_student, summary_of, with_targets

TRAINED_NAME, CORRECT_NAME = "trained.json", "correct.npz"
Metrics = Mapping[str, Callable[[Tensor, Tensor], Tensor]]
EVAL_BATCH_PIXELS = 1 << 20
"""Pixels of an evaluation batch: 1,024 images of 32 px, 20 of 224 px, on a CPU; 16 times as many on a GPU."""
NUM_CALIBRATION_BINS = 15
log = logging.getLogger(__name__)


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
    write_sealed(folder / TRAINED_NAME, asdict(trained))
    return trained


def read_trained(folder: Path) -> Trained | None:
    """What an earlier attempt left; None while there is something left to train, or where it is damaged, which is named:
    training then goes on from the last checkpoint."""
    path, weights = folder / TRAINED_NAME, folder / WEIGHTS_NAME
    if not path.exists():
        return None
    try:
        trained = read_sealed(path, Trained)
        if sha256_of(weights) != trained.weights_sha256:
            raise FileError(f"{weights} is not what {path} describes")
    except (OSError, FileError) as error:
        log.warning("training again what was finished: %s", error)
        return None
    return trained


def evaluate_cell(spec: CellSpec, trained: Trained, context: Context) -> tuple[Evaluation, float]:
    """The exported weights on the whole test split, and the seconds it took; `correct.npz` is written."""
    started, recipe, accelerator = time.perf_counter(), spec.recipe, context.accelerator
    size, folder = recipe.data.image_size, context.store.cell_dir(spec.key)
    test = open_cell_dataset(spec, context.data_dir, "test").subset()
    model = restore_student(recipe, folder / WEIGHTS_NAME, trained.num_classes)
    set_precision(model.to(accelerator.device).requires_grad_(False), recipe, accelerator)
    task = recipe.task
    plain = make_transform(image_size=size, train=False, tier=recipe.data.tier, whole=task is not None)
    pixels = EVAL_BATCH_PIXELS * (1 if accelerator.device.type == "cpu" else 16)
    loader = make_eval_loader(
        test,
        batch_size=max(1, min(pixels // size**2, -(-len(test) // accelerator.num_processes))),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=context.resources.num_workers,
        transform=with_targets(task, plain, train=False),
    )
    metrics = {name: plugins.part_of(plugins.METRICS, "metric", name) for name in recipe.metrics or ()}
    if task is None:
        evaluation = evaluate(model, loader, len(test), accelerator, metrics)
    else:
        judge, summary = judge_of(task, trained.num_classes), summary_of(task, trained.num_classes, test)
        evaluation = summary(judge_split(model, loader, len(test), accelerator, judge))
    if accelerator.is_main_process:
        write_correct(folder / CORRECT_NAME, evaluation)
    return evaluation, time.perf_counter() - started


def evaluate(
    model: nn.Module, loader: EvalLoader, num_samples: int, accelerator: Accelerator, metrics: Metrics | None = None
) -> Evaluation:
    """Evaluate a classifier on a loader's pass; every rank gets the whole result. `metrics` are plugins', by name."""
    further, classes = metrics or {}, set()

    def judge(model: nn.Module, images: Tensor, batch: Batch) -> Tensor:
        logits_BC = model(images).float()
        classes.add(logits_BC.shape[1])
        labels_B = batch.labels.to(logits_BC.device)
        values = [each(logits_BC, labels_B).float()[:, None] for each in further.values()]
        return torch.cat([_judge(logits_BC, labels_B), *values], 1)

    table_NK = judge_split(model, loader, num_samples, accelerator, judge)
    found = summarize(table_NK[:, :5], classes.pop())
    means = table_NK[found.counted_N, 5:].mean(0).tolist()
    return replace(found, metrics=dict(zip(further, means, strict=True)))


def _judge(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """[B, 5]: judged (1), top-1 correct, top-5 correct, cross-entropy, confidence."""
    log_p_BC = logits_BC.log_softmax(1)
    top_BK = logits_BC.topk(min(5, logits_BC.shape[1]), 1).indices
    hits_BK = top_BK == labels_B[:, None]
    loss_B = -log_p_BC.gather(1, labels_B[:, None])[:, 0]
    confidence_B = log_p_BC.amax(1).exp()
    hits_BK = hits_BK.float()
    return torch.stack([torch.ones_like(loss_B), hits_BK[:, 0], hits_BK.amax(1), loss_B, confidence_B], 1)


def summarize(table_N5: NDArray[np.float64], num_classes: int) -> Evaluation:
    """Means over the judged samples of `_judge`'s table."""
    counted_N = table_N5[:, 0] > 0
    _, correct, in_top5, loss, confidence = table_N5[counted_N].T
    return Evaluation(
        error_rate=float(1 - correct.mean()),
        top5_error_rate=float(1 - in_top5.mean()) if num_classes > 5 else None,
        loss=float(loss.mean()),
        calibration_error=calibration_error(confidence, correct),
        correct_N=table_N5[:, 1] > 0,
        counted_N=counted_N,
    )


def calibration_error(confidence_N: NDArray[np.float64], correct_N: NDArray[np.float64]) -> float:
    """Σ_bins share of samples · |mean confidence - accuracy|, equal-width bins (Guo et al. 2017, eq. 3)."""
    bins_N = np.minimum((confidence_N * NUM_CALIBRATION_BINS).astype(np.int64), NUM_CALIBRATION_BINS - 1)
    gap = np.bincount(bins_N, confidence_N - correct_N, minlength=NUM_CALIBRATION_BINS)
    return float(np.abs(gap).sum() / len(confidence_N))


def write_correct(path: Path, evaluation: Evaluation) -> None:
    """What is known of each test sample, in the split's order: `counted` (0 where it could not be decoded), one bit each,
    and one bit `correct` of a classification, or float32 `errors` of another task."""
    arrays: dict[str, NDArray[np.generic]] = {"num_samples": np.array(len(evaluation.counted_N), np.int64)}
    if evaluation.correct_N is not None:
        arrays["correct"] = np.packbits(evaluation.correct_N)
    arrays["counted"] = np.packbits(evaluation.counted_N)
    if evaluation.errors_N is not None:
        arrays["errors"] = evaluation.errors_N
    with atomic_open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


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
    teacher = _teacher_model(spec, store) if wants_teacher(recipe.distill) else None
    size = measure(recipe.model, num_classes=trained.num_classes, image_size=recipe.data.image_size, task=recipe.task)
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
        task=recipe.task_name,
        error_rate=evaluation.error_rate,
        top5_error_rate=evaluation.top5_error_rate,
        test_loss=evaluation.loss,
        calibration_error=evaluation.calibration_error,
        metrics=evaluation.metrics,
        num_test_samples=int(evaluation.counted_N.sum()),
        train_loss=trained.state.record.train_loss,
        weights_sha256=trained.weights_sha256,
        correct_sha256=sha256_of(store.cell_dir(spec.key) / CORRECT_NAME),
        replaced_samples=len(trained.state.bad_ids),
        upstream=_upstream(spec, context),
        teacher=spec.teacher,
        weights_from=_origins(recipe, store),
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


def _teacher_model(spec: CellSpec, store: Store) -> Model | None:
    if spec.teacher is not None:
        return store.read_spec(spec.teacher).recipe.model
    return spec.recipe.teacher.model if spec.recipe.teacher is not None else None


def _origins(recipe: Recipe, store: Store) -> dict[str, WeightsOrigin]:
    """Where weights that no cell trained came from, by what they are to the cell."""
    origins = {role: read_origin(store, used.sha256) for role, used in (("teacher", recipe.teacher), ("start", recipe.start))
               if used is not None and used.sha256 is not None}  # fmt: skip
    return {role: WeightsOrigin(source=each.checkpoint, licence=each.licence, sha256=each.sha256)
            for role, each in origins.items()}  # fmt: skip


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
    # Both see one label an image.
    probe = probe_upstream(spec, context) if spec.recipe.task is None else None
    return Upstream(
        dataset=parent.dataset,
        num_samples=parent.num_samples,
        stage=parent.stage,
        error_rate=parent.error_rate,
        linear_probe_error=probe.linear_probe_error if probe else None,
        transrate=probe.transrate if probe else None,
    )


def _how(recipe: Recipe, context: Context) -> dict[str, str | int | float | bool | None]:
    how: dict[str, str | int | float | bool | None] = {
        "engine": engine_name(context.resources),
        "world_size": context.batching.world_size,
        "micro_batch": context.batching.micro_batch,
        "accumulation": context.batching.accumulation,
        "precision": recipe.training.precision,
        "threads": torch.get_num_threads(),
        "deterministic": context.resources.deterministic,
        "compile": context.resources.compile,
        "torch": torch.__version__,
    }
    attention = recipe.distill.attention if recipe.distill else None
    if attention is not None and wants_maps(recipe.distill):
        kind, mixes_heads = context.accelerator.device.type, attention.head_map == "matrix"
        how["attention_backend"] = attention_backend(context.resources.kd_backend, kind, mixes_heads=mixes_heads)
    return how


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
