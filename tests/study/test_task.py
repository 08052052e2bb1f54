"""Tasks as a grid writes them: a name or a mapping, old ids unchanged, and what cannot be trained refused at planning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dbscale.errors import ConfigError
from dbscale.strict import validate
from dbscale.study.cell import cell_id
from dbscale.study.grid import Grid, expand, load_grid, misfit
from dbscale.study.recipe import Augment, Budget, Data, DeiT, Optim, Recipe, Training
from dbscale.study.task import Detection, Segmentation

GRIDS = Path(__file__).parents[2] / "configs" / "grids"


def grid_with(axis: dict[str, Any] | None = None, **changes: Any) -> Grid:
    training = {"budget": {"steps": 10}, "optim": {"lr": 1e-3}, "global_batch": 8}
    data = {
        "name": "g", "question": "?", "datasets": {"up": {"source": "digits"}, "down": {"source": "digits"}},
        "upstream": {"dataset": "up", "num_samples": [100]},
        "downstream": [{"dataset": "down", "num_samples": [10], **(axis or {})}],
        "image_size": 16, "models": {"s": {"kind": "deit", "heads": 1, "patch_size": 8}}, "students": ["s"],
        "arms": ["plain"], "seeds": [0], "pretrain": training, "finetune": training, **changes,
    }  # fmt: skip
    return validate(Grid, data, where="g")


def finetune_of(grid: Grid) -> Recipe:
    (point,) = expand(grid, {})
    return point.cell.recipe


def test_a_task_is_a_name_or_a_mapping() -> None:
    plain = finetune_of(grid_with())
    assert finetune_of(grid_with({"task": "classification"})) == plain and plain.task is None
    assert finetune_of(grid_with({"task": {"kind": "classification"}})) == plain
    assert finetune_of(grid_with({"task": "segmentation"})).task == Segmentation(head="linear", width=None)
    pyramid = finetune_of(grid_with({"task": {"kind": "segmentation", "head": "pyramid", "width": 32}}))
    assert pyramid.task == Segmentation(head="pyramid", width=32)
    assert finetune_of(grid_with({"task": "detection"})).task == Detection(width=128, num_convs=4)
    assert (plain.task_name, pyramid.task_name) == ("classification", "segmentation")


def test_ids_of_recipes_without_a_task_are_those_from_before_there_were_any() -> None:
    recipe = finetune_of(grid_with())
    dumped = recipe.model_dump(mode="json", exclude_none=True)
    assert "task" not in dumped
    ids = {cell_id(finetune_of(grid_with({"task": task})), [], None) for task in
           (None, "segmentation", {"kind": "segmentation", "head": "pyramid"}, "detection")}  # fmt: skip
    assert len(ids) == 4 and cell_id(recipe, [], None) in ids


def test_a_downstream_set_has_a_size_and_a_training_of_its_own() -> None:
    own = {"budget": {"steps": 20}, "optim": {"lr": 2e-3}, "global_batch": 4}
    recipe = finetune_of(grid_with({"image_size": 32, "finetune": own, "task": "segmentation"}))
    assert (recipe.data.image_size, recipe.training.optim.lr, recipe.num_steps) == (32, 2e-3, 20)
    (point,) = expand(grid_with({"image_size": 32, "finetune": own}), {})
    assert point.cell.init is not None and point.cell.init.recipe.data.image_size == 16


@pytest.mark.parametrize(
    ("axis", "changes", "sentence"),
    [
        ({"task": "segmantation"}, {}, "unknown task 'segmantation'; did you mean 'segmentation'"),
        ({"task": {"kind": "segmentation", "width": 8}}, {}, "a linear head has no width, found 8"),
        ({"task": {"kind": "detection", "width": 48}}, {}, "width"),
        ({"image_size": 20}, {}, "image_size 20 is not a multiple of patch_size 8 of model 's'"),
        ({}, {"upstream": {"dataset": "up", "num_samples": [100], "task": "segmentation"}}, "upstream takes no task"),
        ({}, {"upstream": {"dataset": "up", "num_samples": [100], "image_size": 8}}, "upstream takes no image_size"),
        (
            {},
            {"downstream": [{"dataset": "down", "num_samples": [5]},
                            {"dataset": "down", "num_samples": [10], "image_size": 24}]},
            "downstream names 'down' twice with different settings",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(axis: Any, changes: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        grid_with(axis, **changes)


@pytest.mark.parametrize("name", ["rand_augment", "random_erasing", "mixup", "cutmix"])
def test_what_masks_do_not_follow_is_refused_when_the_grid_is_read(name: str) -> None:
    augment = {name: "rand-m9-inc1" if name == "rand_augment" else 0.5}
    training = {"budget": {"steps": 10}, "optim": {"lr": 1e-3}, "global_batch": 8, "augment": augment}
    with pytest.raises(
        ConfigError, match=f"dataset 'down': segmentation takes no {name}: its targets would not follow"
    ):
        grid_with({"task": "segmentation"}, finetune=training)
    grid_with({"task": "segmentation", "finetune": {**training, "augment": {"hflip": 0.5}}}, finetune=training)
    grid_with({}, finetune=training)


def test_recipes_refuse_what_grids_refuse() -> None:
    data = Data(dataset="d", num_samples=8, image_size=16)
    training = Training(budget=Budget(steps=1), optim=Optim(lr=1e-3), global_batch=4, label_smoothing=0.1)
    options: dict[str, Any] = {"model": DeiT(heads=1), "data": data, "seed": 0}
    with pytest.raises(ValueError, match="a pretrain recipe has no task"):
        Recipe(stage="pretrain", training=training, task=Segmentation(), **options)
    with pytest.raises(ValueError, match="detection takes no label_smoothing"):
        Recipe(stage="finetune", training=training, task=Detection(), **options)
    assert Recipe(stage="finetune", training=training, task=Segmentation(), **options).task == Segmentation()
    mixing = training.model_copy(update={"augment": Augment(mixup=0.8, cutmix=1.0)})
    with pytest.raises(ValueError, match="segmentation takes no mixup and no cutmix"):
        Recipe(stage="finetune", training=mixing, task=Segmentation(), **options)


def test_a_packed_dataset_must_have_what_its_task_needs() -> None:
    segmented, classified = grid_with({"task": "segmentation"}), grid_with()
    assert misfit(segmented, "down", "mask") is None and misfit(classified, "down", None) is None
    assert misfit(segmented, "up", None) is None
    for grid, name, target, sentence in (
        (segmented, "down", None, "segmentation needs a mask beside each image, and dataset 'down' has a label"),
        (classified, "down", "boxes", "classification needs a label beside each image, and dataset 'down' has boxes"),
        (segmented, "up", "mask", "classification needs a label beside each image, and dataset 'up' has a mask"),
    ):
        assert sentence in str(misfit(grid, name, target))


def test_shipped_grids_with_tasks() -> None:
    study = load_grid(GRIDS / "fractals_segmentation.yaml")
    tasks = {point.cell.recipe.task for point in expand(study, {})}
    assert tasks == {Segmentation()}
    found = {point.cell.recipe.task for point in expand(load_grid(GRIDS / "fractals_detection.yaml"), {})}
    assert found == {Detection(width=64, num_convs=1)}
    paper = load_grid(GRIDS / "paper" / "dense_transfer.yaml")
    kinds = {point.cell.recipe.data.dataset: point.cell.recipe.task_name for point in expand(paper, {})}
    assert kinds == {"voc2012": "segmentation", "ade20k": "segmentation", "coco": "detection"}
