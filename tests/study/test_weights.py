"""Weights from elsewhere in a grid: which cells they reach, what of them is identity, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dbscale.errors import ConfigError
from dbscale.strict import validate
from dbscale.study.cost import step_flops
from dbscale.study.grid import Grid, expand, merged_cells, weights_in_use
from dbscale.study.recipe import DeiT, TimmModel
from dbscale.study.store import Store
from dbscale.study.weights import name_path

TEACHER = {"checkpoint": "deit.safetensors", "model": {"kind": "deit", "heads": 3}}
PRINTS = {"up": "u", "down": "d"}


def grid(data: dict[str, Any], **changes: Any) -> Grid:
    return validate(Grid, {**data, **changes}, where="grid")


def cells(value: Grid, weights: dict[str, str] | None = None) -> list[Any]:
    return list(merged_cells(expand(value, PRINTS, weights)))


def test_a_fixed_teacher_is_an_arm_without_teacher_cells(grid_data: dict[str, Any]) -> None:
    value = grid(grid_data, teachers={"h2": TEACHER}, students=["h2"])
    found = cells(value, {"deit.safetensors": "abc"})
    assert {cell.recipe.stage for cell in found} == {"pretrain", "distill", "finetune"}
    distilled = [cell for cell in found if cell.recipe.stage == "distill"]
    assert {cell.recipe.teacher.sha256 for cell in distilled} == {"abc"}
    assert all(cell.teacher is None and cell.teacher_model == DeiT(heads=3) for cell in distilled)
    assert all(cell.recipe.model.heads == 2 for cell in found if cell.recipe.stage == "pretrain"), (
        "no teacher is trained"
    )
    plain = next(cell for cell in found if cell.recipe.stage == "pretrain")
    assert step_flops(distilled[0]) > step_flops(plain)


def test_the_hash_is_the_identity_and_the_place_is_not(grid_data: dict[str, Any]) -> None:
    one = grid(grid_data, teachers={"h2": TEACHER})
    moved = grid(grid_data, teachers={"h2": {**TEACHER, "checkpoint": "elsewhere/deit.pth"}})
    ids = [[cell.id for cell in cells(value, weights)] for value, weights in
           ((one, {"deit.safetensors": "abc"}), (moved, {"elsewhere/deit.pth": "abc"}), (one, {"deit.safetensors": "abd"}),
            (one, None))]  # fmt: skip
    assert ids[0] == ids[1]
    assert len({tuple(each) for each in ids}) == 3


def test_init_reaches_upstream_runs_of_its_model_in_every_arm(grid_data: dict[str, Any]) -> None:
    value = grid(grid_data, init={"h2": {"checkpoint": "hf-hub:timm/deit_tiny_patch16_224.fb_in1k"}})
    (weights,) = weights_in_use(value)
    assert weights.network == TimmModel(kind="timm", name="deit_tiny_patch16_224")
    for cell in cells(value, {weights.checkpoint: "f00"}):
        begun = cell.recipe.start is not None
        assert begun == (cell.recipe.stage != "finetune" and cell.recipe.model.heads == 2)


def test_old_grids_keep_their_ids(grid_data: dict[str, Any]) -> None:
    plain = grid(grid_data)
    assert [cell.id for cell in cells(plain)] == [cell.id for cell in cells(plain, {"other": "hash"})]
    assert all("start" not in cell.recipe.model_dump(exclude_none=True) for cell in cells(plain))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": {"h2": {"checkpoint": "x.safetensors"}}}, "needs its `model:`"),
        ({"teachers": {"h2": {**TEACHER, "mean": [0.5, 0.5, 0.5]}}}, "mean and std go together"),
        ({"init": {"h9": TEACHER}}, "unknown model in init 'h9'; did you mean"),
        ({"teachers": {"h2": TEACHER}, "arms": ["plain", "plain_matched"]}, "nobody knows it for the teacher of 'h2'"),
        (
            {"teachers": {"h1": TEACHER, "h2": TEACHER}, "arms": ["plain_matched"]},
            "nobody knows it for the teacher of 'h1'",
        ),
    ],
)
def test_what_cannot_be_is_refused(grid_data: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid(grid_data, **changes)


def test_a_name_that_was_imported_is_found_where_it_was_written(tmp_path: Path) -> None:
    """By a hash of the name: stores have such files."""
    assert name_path(Store(tmp_path), "deit.safetensors") == f"{tmp_path}/weights/names/6739161713423cc3.json"
