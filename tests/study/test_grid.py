"""Grids: what they expand to, what they refuse, and the names their cells keep."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbscale.errors import ConfigError
from dbscale.strict import validate
from dbscale.study.cell import Cell
from dbscale.study.grid import Grid, check_sizes, datasets_in_use, expand, load_grid, merged_cells

GRIDS = Path(__file__).parents[2] / "configs" / "grids"


def test_expansion_covers_every_combination_once(grid: Grid) -> None:
    points = expand(grid, {"up": "a", "down": "b"})
    seen = {
        (p.arm, p.student, p.upstream_num_samples, p.cell.recipe.data.num_samples, p.cell.recipe.seed) for p in points
    }
    plain = set(itertools.product(["plain"], ["h1", "h2"], [16, 32], [10, 20, 30], [0, 1]))
    distilled = set(itertools.product(["distilled"], ["h2"], [16, 32], [10, 20, 30], [0, 1]))
    assert seen == plain | distilled
    assert len(points) == len(seen)


def test_a_teacher_that_is_also_a_student_is_one_cell(grid: Grid) -> None:
    cells = merged_cells(expand(grid, {}))
    pretrains = [cell for cell in cells if cell.recipe.stage == "pretrain"]
    distills = [cell for cell in cells if cell.recipe.stage == "distill"]
    assert len(pretrains) == 2 * 2 * 2
    assert len(distills) == 2 * 2
    assert {cell.teacher.key for cell in distills if cell.teacher} <= {cell.key for cell in pretrains}


def test_parents_come_before_children(grid: Grid) -> None:
    cells = merged_cells(expand(grid, {}))
    position = {cell.key: i for i, cell in enumerate(cells)}
    assert all(position[parent.key] < position[cell.key] for cell in cells for parent in cell.parents)


def test_both_arms_share_data_seed_and_model(grid: Grid) -> None:
    points = [p for p in expand(grid, {}) if p.student == "h2" and p.upstream_num_samples == 16]
    plain, distilled = ([p.cell for p in points if p.arm == arm] for arm in ("plain", "distilled"))
    for one, other in zip(plain, distilled, strict=True):
        assert one.recipe == other.recipe
        assert one.init is not None and other.init is not None
        assert one.init.recipe.data == other.init.recipe.data
        assert one.init.recipe.training == other.init.recipe.training


def test_scratch_adds_finetunes_without_parents(grid_data: dict[str, Any]) -> None:
    grid = validate(Grid, grid_data | {"scratch": True}, where="t")
    scratch = [p for p in expand(grid, {}) if p.upstream_num_samples == 0]
    assert len(scratch) == 2 * 2 * 3
    assert {p.arm for p in scratch} == {"scratch"}
    assert all(not p.cell.parents for p in scratch)


def test_variants_change_only_what_they_name(grid_data: dict[str, Any]) -> None:
    variants = [
        {"name": "low", "set": {"distill.alpha": 0.1}},
        {"name": "high", "set": {"distill.alpha": 0.9}},
    ]
    points = expand(validate(Grid, grid_data | {"variants": variants}, where="t"), {})
    of = {name: {p.cell.key for p in points if p.variant == name and p.arm == "plain"} for name in ("low", "high")}
    assert of["low"] == of["high"], "plain cells do not depend on alpha and are shared"
    alphas = {p.variant: p.cell.init.recipe.distill for p in points if p.arm == "distilled" and p.cell.init}
    assert alphas["low"] and alphas["low"].alpha == 0.1
    assert alphas["high"] and alphas["high"].alpha == 0.9


def test_a_new_axis_value_keeps_every_old_cell(grid_data: dict[str, Any]) -> None:
    old = {cell.key for cell in merged_cells(expand(validate(Grid, grid_data, where="t"), {}))}
    grid_data["upstream"] = {"dataset": "up", "num_samples": [16, 32, 64]}
    new = {cell.key for cell in merged_cells(expand(validate(Grid, grid_data, where="t"), {}))}
    assert old < new


@given(seed=st.integers(0, 2**31), size=st.integers(1, 10**9), lr=st.floats(1e-6, 1.0))
@settings(max_examples=50, deadline=None)
def test_ids_follow_the_recipe_and_the_data(seed: int, size: int, lr: float) -> None:
    grid = load_grid(GRIDS / "demo.yaml", ["upstream.num_samples=[512]", "seeds=[0]", "students=[h2]", "scratch=false"])
    cell = expand(grid, {"fractals": "a", "digits": "b"})[0].cell
    recipe = cell.recipe
    changed = [
        recipe.model_copy(update={"seed": seed + 1}),
        recipe.model_copy(update={"data": recipe.data.model_copy(update={"num_samples": size + 1000})}),
        recipe.model_copy(update={"training": recipe.training.model_copy(
            update={"optim": recipe.training.optim.model_copy(update={"lr": lr + 1.0})})}),
    ]  # fmt: skip
    ids = {Cell(each, "b", init=cell.init).id for each in changed} | {cell.id}
    assert len(ids) == 4
    assert Cell(recipe, "other data", init=cell.init).id != cell.id
    assert Cell(recipe, "b").id != cell.id
    assert Cell(recipe, "b", init=cell.init).id == cell.id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qestion": "?"}, "unknown key 'qestion'; did you mean 'question'"),
        ({"students": ["h3"]}, "unknown student 'h3'"),
        ({"teachers": {"h2": "h9"}}, "unknown teacher 'h9'"),
        ({"students": []}, "students"),
        ({"seeds": [0, 0]}, "seeds repeats a value"),
        ({"seeds": [-1]}, "seeds.0: input should be greater than or equal to 0, found -1"),
        ({"seeds": ["zero"]}, "seeds.0: input should be a valid integer, found 'zero'"),
        ({"image_size": 32.5}, "image_size"),
        ({"upstream": {"dataset": "up", "num_samples": [0]}}, "upstream.num_samples.0"),
        ({"name": "../evil"}, "name"),
        ({"name": "a b"}, "name"),
        ({"datasets": {"$(id)": {"source": "fractals"}}}, "datasets"),
        ({"distill": None}, "distilled arm needs"),
        ({"arms": ["plain", "distiled"]}, "arms.1"),
        (
            {"pretrain": {"budget": {"steps": 1, "epochs": 1.0}, "optim": {"lr": 1e-3}, "global_batch": 8}},
            "exactly one",
        ),
        (
            {
                "pretrain": {
                    "budget": {"epochs": 1.0, "min_steps": 9, "max_steps": 8},
                    "optim": {"lr": 1e-3},
                    "global_batch": 8,
                }
            },
            "min_steps 9 exceeds max_steps 8",
        ),
        (
            {"models": {"h1": {"kind": "deit", "heads": 1, "depht": 2}}},
            "models.h1.depht'; did you mean 'depth'",
        ),
    ],
)
def test_mistakes_are_named(grid_data: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(Grid, grid_data | change, where="tiny.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("tiny.yaml: ")


def test_a_size_that_does_not_fit_names_the_largest_that_does(grid: Grid) -> None:
    check_sizes(grid, {"up": 32, "down": 30})
    with pytest.raises(ConfigError, match=r"\[32\] of dataset 'up' do not fit.*20 is the largest"):
        check_sizes(grid, {"up": 20})


def test_extends_merges_and_own_keys_win(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"extends: {GRIDS / 'demo.yaml'}\nname: mine\nmodels: {{h6: {{head_width: 16}}}}\n"
    )
    mine, demo = load_grid(tmp_path / "mine.yaml"), load_grid(GRIDS / "demo.yaml")
    assert mine.name == "mine"
    assert mine.pretrain == demo.pretrain
    assert mine.models["h2"] == demo.models["h2"]
    assert mine.models["h6"].model_dump()["head_width"] == 16


def test_a_grid_that_extends_may_itself_be_extended(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "one.yaml").write_text(f"extends: {GRIDS / 'demo.yaml'}\nname: one\nseeds: [7]\n")
    (tmp_path / "two.yaml").write_text("extends: base/one.yaml\nname: two\n")
    grid = load_grid(tmp_path / "two.yaml")
    assert (grid.name, grid.seeds) == ("two", (7,))


def test_grids_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("extends: two.yaml\nname: one\n")
    (tmp_path / "two.yaml").write_text("extends: one.yaml\nname: two\n")
    with pytest.raises(ConfigError, match=r"two.yaml: a grid cannot extend itself, and one.yaml comes back"):
        load_grid(tmp_path / "one.yaml")


def test_every_shipped_grid_validates_and_expands_without_data() -> None:
    paths = [path for path in sorted(GRIDS.rglob("*.yaml")) if path.parent.name != "bases"]
    assert len(paths) >= 9
    for path in paths:
        grid = load_grid(path)
        assert grid.name == path.stem
        assert merged_cells(expand(grid, {}))
        assert set(datasets_in_use(grid)) <= set(grid.datasets)
