"""From spec to run: arms start alike, heads are replaced, every stage trains, and the paper's grids fit together.

The paper's grids could be run whole on no machine here. A toy run means a handful of images in the real encodings, one
student with its teacher, two layers deep, two steps; image size, tiers, augmentation, optimizer and losses are the grid's
own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dbscale.data import load_manifest
from dbscale.data.order import Stream
from dbscale.shards.pack import ensure_packed, source_of
from dbscale.study.cell import Cell
from dbscale.study.grid import Grid, datasets_in_use, expand, load_grid, merged_cells
from dbscale.study.recipe import Augment, Budget, Data, DeiT, Optim, Recipe, TimmModel, Training
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Store
from dbscale.training import loop, run
from dbscale.training.engine import make_batching
from dbscale.training.models import make_model
from dbscale.training.run import run_cell

SMALL = DeiT(heads=1, head_width=8, depth=2, patch_size=4)


@pytest.fixture
def spied(monkeypatch):
    """Hashes of the student's first weights and of every batch, by cell."""
    seen: dict[str, list[list[int]]] = {}
    original, step = run.train, loop._optimizer_step

    def noting_train(started):
        key = started.checkpointer.folder.parent.name
        seen[key] = [_hash(each for _, each in sorted(started.student.state_dict().items()))]
        return original(started)

    def noting_step(started, images, target):
        labels = target if isinstance(target, torch.Tensor) else torch.stack([target.y_a, target.y_b])
        seen[started.checkpointer.folder.parent.name].append(_hash([images, labels]))
        return step(started, images, target)

    monkeypatch.setattr(run, "train", noting_train)
    monkeypatch.setattr(loop, "_optimizer_step", noting_step)
    return seen


def _hash(tensors):
    return [hash(each.detach().numpy().tobytes()) for each in tensors]


def test_paired_arms_start_alike_and_see_the_same_batches(bench, spied):
    options = {"augment": Augment(crop_padding=1, mixup=0.8, cutmix=1.0)}
    teacher = bench.cell(model=SMALL, **options)
    plain, distilled = bench.cell(**options), bench.cell("distill", teacher=teacher, **options)
    for cell in (teacher, plain, distilled):
        assert bench.run(cell).status == "done"
    assert spied[plain.key] == spied[distilled.key]
    assert len(spied[plain.key]) == 13
    assert bench.weights(plain).keys() == bench.weights(distilled).keys()
    assert bench.fingerprint(plain)["row"]["weights_sha256"] != bench.fingerprint(distilled)["row"]["weights_sha256"]


def test_finetune_starts_from_its_parent_with_a_new_head(bench, spied, monkeypatch):
    parent = bench.cell()
    child = bench.cell("finetune", init=parent)
    starts = {}
    original = run.train

    def noting(started):
        starts[started.checkpointer.folder.parent.name] = {
            name: value.clone() for name, value in started.student.state_dict().items()
        }
        return original(started)

    monkeypatch.setattr(run, "train", noting)
    bench.run(parent)
    outcome = bench.run(child)
    trained = bench.weights(parent)
    for name, value in starts[child.key].items():
        if name.startswith("head."):
            assert value.shape[0] == 3
        else:
            assert torch.equal(value, trained[name]), name
    assert outcome.row.arm == "plain"
    assert outcome.row.upstream.error_rate == bench.store.read_row(parent.key).error_rate
    assert outcome.row.upstream.num_samples == 40


def test_finetune_at_another_size_interpolates_positions(bench, data_dir):
    from dbscale.training.models import load_backbone

    parent = bench.cell()
    bench.run(parent)
    student = make_model(parent.recipe.model, num_classes=3, image_size=32, seed=0)
    load_backbone(student, bench.store.cell_dir(parent.key) / "model.safetensors")
    state = student.state_dict()
    assert state["pos_embed"].shape == (1, 65, 16)
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(state[name], bench.weights(parent)[name])


def test_linear_probe_changes_the_head_alone(bench):
    parent = bench.cell()
    child = bench.cell("finetune", init=parent, scope="linear_probe")
    bench.run(parent)
    outcome = bench.run(child)
    before, after = bench.weights(parent), bench.weights(child)
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    whole = bench.cell("finetune", init=parent)
    assert outcome.row.train_flops == pytest.approx(bench.run(whole).row.train_flops / 3)


def test_scratch_finetune_has_no_upstream(bench):
    row = bench.run(bench.cell("finetune")).row
    assert (row.arm, row.upstream, row.teacher) == ("scratch", None, None)


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_ema_is_what_is_exported(decay, bench, monkeypatch):
    """The average of every step's weights, at a decay that rises to the recipe's: of so short a run, never .9999."""
    expected, original = {}, loop._optimizer_step

    def noting(started, images, target):
        expected.setdefault("w", started.student.head.weight.detach().clone())
        step = started.state.step
        losses = original(started, images, target)
        current = min(decay, (1 + step) / (10 + step))
        expected["w"] = current * expected["w"] + (1 - current) * started.student.head.weight.detach()
        return losses

    monkeypatch.setattr(loop, "_optimizer_step", noting)
    averaged, plain = bench.cell(ema_decay=decay), bench.cell()
    bench.run(averaged)
    torch.testing.assert_close(bench.weights(averaged)["head.weight"], expected["w"], rtol=1e-5, atol=1e-7)
    bench.run(plain)
    assert not torch.equal(bench.weights(plain)["head.weight"], bench.weights(averaged)["head.weight"])


def test_resnet_pretrains_and_finetunes(bench):
    resnet = TimmModel(kind="timm", name="resnet10t")
    parent = bench.cell(model=resnet, budget=Budget(steps=3), drop_path=0.0, global_batch=8)
    child = bench.cell("finetune", init=parent, model=resnet, budget=Budget(steps=2), drop_path=0.0, global_batch=8)
    assert bench.run(parent).status == "done"
    outcome = bench.run(child)
    assert outcome.status == "done", outcome.reason
    assert outcome.row.model == "resnet10t" and outcome.row.num_params == sum(
        value.numel()
        for name, value in bench.weights(child).items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )


def test_more_data_than_micro_batches_gives_the_same_result_within_rounding(bench_of):
    rows = []
    for micro in (None, 8, 4):
        bench = bench_of(str(micro))
        cell = bench.cell(drop_path=0.0)
        resources = Resources(zero_stage=None, threads=1, micro_batch=micro)
        rows.append(bench.run(cell, resources).row)
    assert {row.resources["accumulation"] for row in rows} == {1, 2, 4}
    assert all(row.train_loss == pytest.approx(rows[0].train_loss, rel=1e-4) for row in rows)


def test_recipe_of_the_paper_trains_one_step_of_each_field(bench):
    """DeiT's settings, all at once, at toy size."""
    recipe = Recipe(
        stage="pretrain",
        model=DeiT(heads=2, head_width=8, depth=2, patch_size=4),
        data=Data(dataset="up", num_samples=40, image_size=16),
        training=Training(
            budget=Budget(steps=3),
            optim=Optim(lr=1e-3, lr_reference_batch=512, layer_decay=0.75),
            global_batch=16,
            precision="bf16",
            augment=Augment(
                random_resized_crop=(0.08, 1.0), mixup=0.8, cutmix=1.0, random_erasing=0.25, repeats=2, hflip=0.5
            ),
            label_smoothing=0.1,
            drop_path=0.1,
            ema_decay=0.9,
        ),
        seed=3,
    )
    cell = bench.cell(**{name: getattr(recipe.training, name) for name in Training.model_fields})
    assert bench.run(cell).status == "done"


def test_a_whole_finetune_at_another_size(bench):
    parent = bench.cell()
    bench.run(parent)
    plain = bench.cell("finetune", init=parent)
    data = plain.recipe.data.model_copy(update={"image_size": 24})
    larger = Cell(plain.recipe.model_copy(update={"data": data}), plain.fingerprint, init=parent)
    bench.store.write_spec(larger.spec())
    outcome = bench.run(larger)
    assert outcome.status == "done", outcome.reason
    assert bench.weights(larger)["pos_embed"].shape == (1, 37, 16)
    assert outcome.row.upstream.transrate is not None
    same_size = bench.run(plain).row
    assert outcome.row.train_flops > 2 * same_size.train_flops


GRIDS = {path.stem: path for path in sorted((Path(__file__).parents[2] / "configs/grids/paper").glob("*.yaml"))}
READS = {"raw": "raw", "jpeg256": "jpeg256", "jpeg": "original"}
"""The encoding that each streaming tier reads."""


def encoding_of(grid: Grid, dataset: str) -> str:
    spec = grid.datasets[dataset]
    return str(spec.get("encoding", source_of(dataset, spec, ".").default_encoding))


@pytest.mark.parametrize("name", GRIDS)
def test_tiers_read_what_is_packed_and_batches_can_be_cut(name):
    grid = load_grid(GRIDS[name])
    for cell in merged_cells(expand(grid, {})):
        data, training = cell.recipe.data, cell.recipe.training
        assert READS[data.tier] == encoding_of(grid, data.dataset), data.dataset
        Stream(data.num_samples, 0, training.global_batch, training.augment.repeats)
        for world_size in (1, 2, 4, 8):
            make_batching(training.global_batch, world_size, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_a_toy_run_of_the_whole_grid(name, tmp_path):
    grid = toy(GRIDS[name], tmp_path)
    for dataset in datasets_in_use(grid):
        ensure_packed(dataset, grid.datasets[dataset], tmp_path, jobs=1)
    fingerprints = {each: load_manifest(tmp_path / "shards" / each).fingerprint for each in datasets_in_use(grid)}
    cells, store = merged_cells(expand(grid, fingerprints)), Store(tmp_path / "out")
    assert {cell.recipe.stage for cell in cells} >= {"pretrain", "finetune"}
    for cell in cells:
        store.write_spec(cell.spec())
        outcome = run_cell(store, cell.key, data_dir=tmp_path, resources=Resources(zero_stage=None), stop=StopRequest())
        assert outcome.status == "done", f"{cell.key}: {outcome.reason}"


def toy(path: Path, folder: Path) -> Grid:
    grid = load_grid(path)
    student = next(iter(grid.teachers), grid.students[0])
    downstream = [{"dataset": axis.dataset, "num_samples": [8]} for axis in grid.downstream]
    changes: dict[str, Any] = {
        "seeds": [0], "students": [student], "upstream.num_samples": [10], "downstream": downstream,
        "pretrain.budget": {"steps": 2}, "finetune.budget": {"steps": 2},
        "pretrain.global_batch": 8, "finetune.global_batch": 8,
        "teachers": {student: grid.teachers[student]} if student in grid.teachers else {},
        "variants": [each.model_dump() for each in (*grid.variants[:1], *grid.variants[1:][-1:])],
    }  # fmt: skip
    for name, model in grid.models.items():
        place = "depth" if isinstance(model, DeiT) else "kwargs.depth"
        if isinstance(model, DeiT) or "depth" in model.kwargs:
            changes[f"models.{name}.{place}"] = 2
    specs = {each: toy_source(grid, each, folder) for each in datasets_in_use(grid)}
    changes |= {f"datasets.{each}": spec for each, spec in specs.items()}
    return load_grid(path, [f"{key}={value}" for key, value in changes.items()])


def toy_source(grid: Grid, dataset: str, folder: Path) -> dict[str, Any]:
    """Ten images of two classes, packed as the real dataset is."""
    encoding = encoding_of(grid, dataset)
    if encoding == "raw":
        return {"source": "fractals", "families": 2, "num_train": 10, "num_test": 4, "image_size": 32}
    size = (300, 260) if encoding == "jpeg256" else (64, 64)
    draw = np.random.default_rng(0)
    for split, number in (("train", 5), ("test", 2)):
        for label in "ab":
            where = folder / dataset / split / label
            where.mkdir(parents=True)
            for index in range(number):
                pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(where / f"{index}.jpg")
    return {"source": "imagefolder", "path": dataset, "encoding": encoding}
