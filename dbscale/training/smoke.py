"""One optimizer step and one evaluation batch of a cell on real data, in a store of its own that is thrown away.

Parents are models as they are drawn. What fails here would fail in the queue: models, teacher and student, augmentation,
tiers, labels, precision. Device memory at the full batch and the engines' own faults are not tried: one process, plain.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dbscale import plugins
from dbscale.data import make_eval_loader, make_transform
from dbscale.study.cell import CellSpec, model_label
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Row, Store, Timing
from dbscale.study.weights import weights_dir
from dbscale.training.engine import make_batching, open_accelerator
from dbscale.training.loop import train
from dbscale.training.models import WEIGHTS_NAME, make_model, write_weights
from dbscale.training.prepare import Context, open_cell_dataset, prepare_run
from dbscale.training.run import explain
from dbscale.training.tasks import judge_of, with_targets


def try_step(lineage: Sequence[CellSpec], data_dir: Path, weights: Path, resources: Resources) -> str | None:
    """Train the last cell of `lineage` (parents first) for its steps; why that is not possible, or None.

    `weights` is the folder of those that were imported.
    """
    plain = resources.model_copy(
        update={"num_processes": 1, "zero_stage": None, "tracker": None, "num_workers": 0, "teacher_cache": False}
    )
    try:
        with tempfile.TemporaryDirectory(prefix="dbscale-smoke-") as folder:
            store = Store(Path(folder))
            Path(weights_dir(store)).symlink_to(weights)
            for spec in lineage:
                plugins.require(spec.recipe.plugins or {})
                store.write_spec(spec)
            for parent in lineage[:-1]:
                _pretend(store, parent, data_dir)
            _step(store, lineage[-1], data_dir, _where_possible(plain, lineage[-1]))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return explain(error, plain)
    return None


def _where_possible(resources: Resources, spec: CellSpec) -> Resources:
    """On the CPU where this machine has no GPU: a login node has none, and its jobs do."""
    if torch.cuda.is_available():
        return resources
    return resources.model_copy(update={"device": "cpu", "kd_backend": "eager", "compile": False})


def _pretend(store: Store, spec: CellSpec, data_dir: Path) -> None:
    """Write weights and row of a parent that was never trained."""
    recipe, data = spec.recipe, open_cell_dataset(spec, data_dir, "train")
    model = make_model(recipe.model, num_classes=data.num_classes, image_size=recipe.data.image_size, seed=recipe.seed)
    digest = write_weights(store.cell_dir(spec.key) / WEIGHTS_NAME, model.state_dict())
    timing = Timing(
        train_time_s=0.0, eval_time_s=0.0, step_time_s=0.0, images_per_s=0.0, data_wait_share=0.0, device_time_s=0.0,
        peak_memory_bytes=0, device="none", host="none",
    )  # fmt: skip
    store.write_row(Row(
        key=spec.key, id=spec.id, stage=recipe.stage, arm="plain", model=model_label(recipe.model),
        dataset=recipe.data.dataset, num_samples=recipe.data.num_samples, seed=recipe.seed, num_params=0,
        num_classes=data.num_classes, num_steps=0, samples_seen=0, train_flops=0.0, error_rate=1.0, test_loss=0.0,
        num_test_samples=0, train_loss=0.0, weights_sha256=digest, timing=timing,
    ))  # fmt: skip


def _step(store: Store, spec: CellSpec, data_dir: Path, resources: Resources) -> None:
    training = spec.recipe.training
    if (
        training.precision == "fp16" and resources.device == "cpu"
    ):  # its loss scaling needs a GPU, all else can be tried
        training = training.model_copy(update={"precision": "bf16"})
        spec = spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"training": training})})
    batching = make_batching(training.global_batch, 1, None)
    with open_accelerator(training, resources, batching, {}) as accelerator:
        context = Context(store, data_dir, resources, batching, accelerator, StopRequest())
        run = prepare_run(spec, open_cell_dataset(spec, data_dir, "train"), context)
        try:
            train(run)
            run.reporter.flush(run.state.step - 1)
            _evaluate_one(spec, data_dir, run.student)
        finally:
            for part in (run.loader, run.reporter, run.checkpointer):
                part.close()


@torch.inference_mode()
def _evaluate_one(spec: CellSpec, data_dir: Path, student: torch.nn.Module) -> None:
    """The first test sample, through the transform and the model as evaluation sends them."""
    data, task = spec.recipe.data, spec.recipe.task
    plain = make_transform(image_size=data.image_size, train=False, tier=data.tier, whole=task is not None)
    dataset = open_cell_dataset(spec, data_dir, "test")
    loader = make_eval_loader(dataset.subset(), batch_size=1, transform=with_targets(task, plain, train=False))
    batch = next(iter(loader))
    assert isinstance(batch.images, Tensor), "an evaluation loader transforms"
    images = batch.images.to(next(student.parameters()).device)
    if task is None:
        student.eval()(images)
    else:
        judge_of(task, dataset.num_classes)(student.eval(), images, batch)
