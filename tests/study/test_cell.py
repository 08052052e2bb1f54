"""Golden ids: if one changes, results in every store lose their name.  Change them only with RECIPE_VERSION."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from dbscale.study.cell import Cell, canonical_json, cell_id
from dbscale.study.grid import expand, load_grid, merged_cells
from dbscale.study.recipe import (
    RECIPE_VERSION,
    Budget,
    Data,
    DeiT,
    Distill,
    Optim,
    Pretrained,
    Recipe,
    TimmModel,
    Training,
)

TRAINING = Training(budget=Budget(epochs=2.0), optim=Optim(lr=1e-3), global_batch=32)
GOLDEN_VERSION = 1
GOLDEN = {
    "pretrain-deit_h1w64d12-up-n100-s0": "e216dffdf35b",
    "distill-deit_h2w64d12-up-n100-s0": "ef741b45eda1",
    "finetune-deit_h2w64d12-down-n10-s0": "90bcae476e8f",
    "finetune-resnet18-down-n10-s0": "fead8a997613",
}


def golden_cells() -> list[Cell]:
    up, down = (
        Data(dataset="up", num_samples=100, image_size=224),
        Data(dataset="down", num_samples=10, image_size=224),
    )
    teacher = Cell(Recipe(stage="pretrain", model=DeiT(heads=1), data=up, training=TRAINING, seed=0), "f00d")
    student = Cell(
        Recipe(stage="distill", model=DeiT(heads=2), data=up, training=TRAINING, seed=0, distill=Distill()),
        "f00d", teacher=teacher,
    )  # fmt: skip
    finetune = Recipe(stage="finetune", model=DeiT(heads=2), data=down, training=TRAINING, seed=0)
    resnet = finetune.model_copy(update={"model": TimmModel(kind="timm", name="resnet18")})
    return [teacher, student, Cell(finetune, "beef", init=student), Cell(resnet, "beef")]


def test_golden_ids() -> None:
    assert RECIPE_VERSION == GOLDEN_VERSION, "a new recipe version needs new golden ids and a line in CHANGELOG.md"
    assert {cell.key.rpartition("-")[0]: cell.id for cell in golden_cells()} == GOLDEN


@pytest.mark.parametrize("kept", [1, 4096])
def test_an_id_is_the_hash_of_canonical_json(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr("dbscale.study.cell.MOST_TEXTS", kept)
    cells = golden_cells()
    other = cells[2].recipe.model_copy(update={"seed": 1})
    for recipe in [*(cell.recipe for cell in cells), other] * 2:
        for parents, fingerprint in ([], None), (["b", "a"], "f00d"):
            identity = {"version": RECIPE_VERSION, "recipe": recipe.model_dump(mode="json", exclude_none=True),
                        "parents": sorted(parents), "data": fingerprint}  # fmt: skip
            wanted = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12]
            assert cell_id(recipe, parents, fingerprint) == wanted


def test_specs_name_parents_by_key() -> None:
    teacher, student, finetune, _ = golden_cells()
    assert student.spec().teacher == teacher.key
    assert finetune.spec().init == student.key
    assert finetune.spec().id == finetune.id


def test_keys_are_safe_folder_names() -> None:
    grids = Path(__file__).parents[2] / "configs" / "grids"
    for cell in merged_cells(expand(load_grid(grids / "demo.yaml"), {})):
        assert cell.key.replace("-", "").replace("_", "").isalnum()
        assert len(cell.key) < 120


def test_what_guides_a_cell_is_its_teachers_model() -> None:
    teacher, student, finetune, _ = golden_cells()
    assert (teacher.teacher_model, student.teacher_model, finetune.teacher_model) == (None, DeiT(heads=1), None)
    foreign = Pretrained(sha256="ab", model=DeiT(heads=7))
    assert Cell(student.recipe.model_copy(update={"teacher": foreign}), "f00d").teacher_model == DeiT(heads=7)
    assert finetune.lineage == (teacher, student, finetune)
