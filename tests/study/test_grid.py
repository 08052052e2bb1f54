"""Grids: what they expand to, what they refuse, and the names their cells keep."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbscale.errors import ConfigError
from dbscale.strict import validate
from dbscale.study.cell import Cell
from dbscale.study.cost import train_flops
from dbscale.study.grid import (
    Grid,
    Point,
    check_sizes,
    datasets_in_use,
    expand,
    load_grid,
    merged_cells,
    overlapping_draws,
    unlike_cells,
)
from dbscale.study.recipe import Budget, Recipe, draw_seed

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


def test_finetunes_of_one_recipe_are_alike_and_upstream_runs_are_not(grid_data: dict[str, Any]) -> None:
    cells = merged_cells(expand(validate(Grid, grid_data | {"scratch": True}, where="t"), {}))
    found = unlike_cells(cells)
    wanted: list[tuple[Any, ...]] = []
    firsts = []
    for cell in cells:
        kind = (cell.recipe, *(parent.recipe.model for parent in cell.parents))
        if kind not in wanted:
            wanted.append(kind)
            firsts.append(cell)
    assert found == firsts
    # Two seeds, two students, three sizes, from random weights and from trained ones.
    assert sum(cell.recipe.stage == "finetune" for cell in found) == 2 * 2 * 3 * 2
    assert sum(cell.recipe.stage == "finetune" for cell in cells) > 24


def draws_of(grid_data: dict[str, Any], **changes: Any) -> list[Point]:
    return list(expand(validate(Grid, grid_data | {"scratch": True, **changes}, where="t"), {}))


def test_the_first_of_several_finetunes_is_the_cell_of_a_grid_without_the_key(grid_data: dict[str, Any]) -> None:
    alone, drawn = draws_of(grid_data), draws_of(grid_data, finetunes=3)
    assert [p.cell.key for p in drawn if p.finetune == 0] == [p.cell.key for p in alone]
    assert len(drawn) == len({p.cell.key for p in drawn}) == 3 * len(alone)
    assert {p.finetune for p in drawn} == {0, 1, 2}
    assert {p.cell.recipe.draw for p in drawn} == {None, 1, 2}
    upstream = {c.key for p in drawn for c in p.cell.parents}
    assert upstream == {c.key for p in alone for c in p.cell.parents}, "draws share their upstream run"


def test_draws_have_labels_head_and_order_of_their_own_and_alike_in_both_arms(grid_data: dict[str, Any]) -> None:
    streams: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for point in draws_of(grid_data, finetunes=3):
        recipe = point.cell.recipe
        streams.setdefault((point.seed, point.finetune), set()).add((recipe.seed, recipe.data.subset_seed))
    assert {place: found for place, found in streams.items() if place[1] == 0} == {(0, 0): {(0, 0)}, (1, 0): {(1, 1)}}
    assert all(len(found) == 1 for found in streams.values()), "arms, students and sizes are paired"
    assert len({next(iter(found)) for found in streams.values()}) == 2 * 3


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**20)),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**20)),
)
def test_no_two_draws_share_a_seed(one: tuple[int, int], other: tuple[int, int]) -> None:
    assert (draw_seed(*one) == draw_seed(*other)) is (one == other)
    assert 0 <= draw_seed(*one) < 2**63
    assert draw_seed(one[0], 0) == one[0]


def test_a_draw_shows_in_the_key_and_only_finetunes_have_one(grid_data: dict[str, Any]) -> None:
    keys = [p.cell.key.rpartition("-")[0] for p in draws_of(grid_data, finetunes=2, seeds=[1]) if p.student == "h1"]
    assert keys[:2] == ["finetune-deit_h1w16d2-down-n10-s1", "finetune-deit_h1w16d2-down-n10-s1d1"]
    pretrain = expand(validate(Grid, grid_data, where="t"), {})[0].cell.init
    assert pretrain is not None
    with pytest.raises(ConfigError, match="a pretrain recipe has no draw"):
        validate(Recipe, {**pretrain.recipe.model_dump(mode="json"), "draw": 1}, where="t")


def test_min_effect_and_noise_name_no_cell(grid_data: dict[str, Any]) -> None:
    changed = draws_of(grid_data, min_effect=0.02, noise="digits")
    assert [p.cell.key for p in changed] == [p.cell.key for p in draws_of(grid_data)]


def test_draws_that_must_share_labels_are_named(grid_data: dict[str, Any]) -> None:
    grid = validate(Grid, grid_data | {"finetunes": 3}, where="t")
    assert overlapping_draws(grid, {"down": 60}) == [
        "the 3 finetune draws of 30 labels overlap: dataset 'down' holds 60 training samples"
    ]
    assert overlapping_draws(grid, {"down": 90}) == overlapping_draws(grid, {}) == []
    assert overlapping_draws(validate(Grid, grid_data, where="t"), {"down": 29}) == []


GOLDEN_GRIDS = {
    "cifar10": (330, "0ab3821a48d0124b"),
    "cifar10_boundary": (352, "190cb0b6a6204139"),
    "demo": (300, "5f6c0ad9df83b634"),
    "demo_hunt": (210, "89bd902247c99c55"),
    "fractals_segmentation": (64, "0b0030d63f59f911"),
    "fractals_detection": (48, "f9f5cbe26f3aadc4"),
    "dense_transfer": (348, "9befae7f39a8c040"),
    "alpha_at_boundary": (612, "014a9c60d0671afe"),
    "alpha_tau": (306, "43dc890bcbe3de98"),
    "architecture_resnet": (600, "b2348240333bac18"),
    "baseline": (1065, "8044a8f1c5af4215"),
    "baseline_3x3": (459, "6529985d55163ef4"),
    "boundary_38m": (660, "69829a779eba84b3"),
    "boundary_sizes": (2205, "1bed5a06f103a65f"),
    "clean_upstream": (168, "b777186aaaf4f18c"),
    "domain_shift": (780, "97e4876ca602f981"),
    "large_to_small": (795, "d51e7b774fd16ea3"),
    "logits_only": (330, "6e681cbd91d44417"),
    "parallel_head": (630, "f37c598a24038b1c"),
    "sensitivity": (616, "d69c3815c334748d"),
    "vit_giant": (105, "821eb78fd37bacfa"),
}
"""Number of cells of each shipped grid and a hash over their keys: rows in people's stores have these names."""
OLD_SIZES = (
    "downstream=[{dataset: cifar100, num_samples: [1000, 10000, 50000]}, "
    "{dataset: tiny_imagenet, num_samples: [2000, 20000, 100000]}]"
)
EARLIER = {
    "boundary_sizes": (903, "771adf2d9f272bc7", [OLD_SIZES, "students=[h3, h4, h6]"]),
    "domain_shift": (780, "f7476bc97afabde1", []),
    "large_to_small": (255, "89a3b0a7860a0e14", [OLD_SIZES.partition(", {dataset: tiny")[0] + "]"]),
    "architecture_resnet": (420, "c198f361f074c97a", [OLD_SIZES]),
    "sensitivity": (616, "5e0713f7413937f0", []),
}
"""What these grids were before attention maps and further sizes and sets joined them (the first was `boundary` then)."""


def digest_of(grid: Grid) -> tuple[int, str]:
    keys = sorted(cell.key for cell in merged_cells(expand(grid, dict.fromkeys(grid.datasets, "f00d"))))
    return len(keys), hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", EARLIER)
def test_rows_of_earlier_grids_keep_their_names(name: str) -> None:
    count, digest, changes = EARLIER[name]
    grid = load_grid(GRIDS / "paper" / f"{name}.yaml", ["distill.attention=null", *changes])
    assert digest_of(grid) == (count, digest)


@pytest.mark.parametrize("name", GOLDEN_GRIDS)
def test_golden_ids_of_shipped_grids(name: str) -> None:
    grid = load_grid(next(GRIDS.rglob(f"{name}.yaml")))
    assert digest_of(grid) == GOLDEN_GRIDS[name]


def test_every_shipped_grid_has_golden_ids() -> None:
    assert {path.stem for path in GRIDS.rglob("*.yaml") if path.parent.name != "bases"} == set(GOLDEN_GRIDS)


ALL_ARMS = ["plain", "distilled", "plain_matched", "self_distilled"]


def test_four_arms_differ_upstream_and_nowhere_else(grid_data: dict[str, Any]) -> None:
    points = expand(validate(Grid, grid_data | {"arms": ALL_ARMS}, where="t"), {})
    assert {p.arm for p in points if p.student == "h1"} == {"plain"}, "h1 has no teacher"
    at = [p for p in points if (p.student, p.upstream_num_samples, p.seed) == ("h2", 16, 1)]
    of = {arm: [p.cell for p in at if p.arm == arm] for arm in ALL_ARMS}
    assert [len(cells) for cells in of.values()] == [3, 3, 3, 3]
    for cells in zip(*of.values(), strict=True):
        assert all(cell.recipe == cells[0].recipe for cell in cells), "labels, head and order are alike in all arms"
    plain, distilled, matched, by_self = (of[arm][0].init for arm in ALL_ARMS)
    assert plain and distilled and matched and by_self
    assert {(each.recipe.seed, each.recipe.data) for each in (distilled, matched, by_self)} == {(1, plain.recipe.data)}
    assert (matched.recipe.stage, matched.parents) == ("pretrain", ())
    assert by_self.recipe == distilled.recipe and by_self.recipe.distill is not None


def test_a_teacher_of_equal_size_saw_the_same_images_from_other_weights(grid_data: dict[str, Any]) -> None:
    points = expand(validate(Grid, grid_data | {"arms": ALL_ARMS}, where="t"), {})
    inits = {(p.arm, p.upstream_num_samples, p.seed): p.cell.init for p in points if p.student == "h2"}
    seeds = set()
    for (arm, size, seed), student in inits.items():
        if arm == "self_distilled" and student and student.teacher:
            teacher, plain = student.teacher.recipe, inits["plain", size, seed].recipe  # type: ignore[union-attr]
            assert teacher == plain.model_copy(update={"seed": draw_seed(seed, 1)})
            seeds.add(teacher.seed)
    assert seeds == {2**32, 2**32 + 1}, "no repetition's own"


def test_steps_of_equal_cost_by_hand(grid_data: dict[str, Any]) -> None:
    """10 steps of 8 images: 3 forwards of the student a sample, 1 of the teacher beside it, 3 of the teacher alone.

    Forward passes of 32 px, patch 8, depth 2: 17 tokens, 16 patches; widths 16 and 32.
    """
    grid = validate(Grid, grid_data | {"arms": ALL_ARMS, "distill_training": None}, where="t")
    teacher, student = (2 * (24 * w**2 * 17 + 4 * 17**2 * w) + 6 * 64 * w * 16 for w in (16, 32))
    steps = round(10 * (3 * student + teacher + 3 * teacher) / (3 * student))
    found = {p.cell.init.recipe.training.budget for p in expand(grid, {}) if p.arm == "plain_matched" and p.cell.init}
    assert found == {Budget(steps=steps)} and steps == 14
    longer = grid_data["pretrain"] | {"budget": {"steps": 25}}
    grid = validate(Grid, grid_data | {"arms": ALL_ARMS, "distill_training": longer}, where="t")
    found = {p.cell.init.recipe.num_steps for p in expand(grid, {}) if p.arm == "plain_matched" and p.cell.init}
    assert found == {round((25 * (3 * student + teacher) + 10 * 3 * teacher) / (3 * student))}


def test_equal_cost_is_half_a_step_off_at_most_in_the_papers_grid() -> None:
    points = expand(load_grid(GRIDS / "paper" / "boundary_38m.yaml", ["seeds=[0]"]), {})
    upstream = {(p.arm, p.upstream_num_samples): p.cell.init for p in points}
    sizes = {size for _, size in upstream}
    assert len(sizes) == 10
    for size in sizes:
        matched, distilled = upstream["plain_matched", size], upstream["distilled", size]
        assert matched and distilled and distilled.teacher
        teacher = distilled.teacher.recipe
        paid = train_flops(distilled.recipe, teacher.model) + train_flops(teacher)
        step = train_flops(matched.recipe) / matched.recipe.num_steps
        assert abs(train_flops(matched.recipe) - paid) <= step / 2


def test_a_head_is_named_only_where_it_is_another(grid_data: dict[str, Any]) -> None:
    def keys(**distill: Any) -> list[str]:
        return [p.cell.key for p in expand(validate(Grid, grid_data | {"distill": distill}, where="t"), {})]

    assert keys(alpha=0.5, head="class") == keys(alpha=0.5) != keys(alpha=0.5, head="parallel")


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


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"name": "a" * 64}, True), ({"name": "a" * 65}, False), ({"name": "Tiny.v2_-"}, True), ({"name": ".tiny"}, False),
        ({"name": "a/b"}, False), ({"name": ""}, False), ({"seeds": [0]}, True), ({"seeds": [-1]}, False),
        ({"seeds": [2**32 - 1]}, True), ({"seeds": [2**32]}, False), ({"seeds": []}, False), ({"seeds": [1, 1]}, False),
        ({"finetunes": 1}, True), ({"finetunes": 0}, False), ({"min_effect": 1e-9}, True), ({"min_effect": 0.0}, False),
        ({"min_effect": 0.999}, True), ({"min_effect": 1.0}, False), ({"students": []}, False), ({"downstream": []}, False),
        ({"upstream": {"dataset": "up", "num_samples": []}}, False),
    ],
)  # fmt: skip
def test_what_a_grid_may_say_at_its_edges(grid_data: dict[str, Any], changes: dict[str, Any], taken: bool) -> None:
    if taken:
        assert validate(Grid, grid_data | changes, where="t")
    else:
        with pytest.raises(ConfigError):
            validate(Grid, grid_data | changes, where="t")


def test_a_grid_that_says_no_more_than_it_must(grid_data: dict[str, Any]) -> None:
    needed = ("name", "question", "datasets", "upstream", "downstream", "image_size", "models", "students", "seeds",
              "pretrain", "finetune")  # fmt: skip
    grid = validate(Grid, {name: grid_data[name] for name in needed} | {"arms": ["plain"]}, where="t")
    assert (grid.scratch, grid.finetunes, grid.min_effect, grid.tier, grid.block_size) == (
        False,
        1,
        0.005,
        "resident",
        None,
    )
    assert {p.arm for p in expand(grid, {})} == {"plain"}


@given(seed=st.integers(0, 2**31), size=st.integers(1, 10**9), lr=st.floats(1e-6, 1.0))
@settings(max_examples=50, deadline=None)
def test_ids_follow_the_recipe_and_the_data(seed: int, size: int, lr: float) -> None:
    grid = load_grid(GRIDS / "demo.yaml", ["upstream.num_samples=[512]", "seeds=[0]", "students=[h2]", "scratch=false"])
    cell = expand(grid, {"fractals": "a", "fractals_unseen": "b"})[0].cell
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
        ({"arms": ["plain", "plain_matched"], "teachers": {}}, "plain_matched arm needs"),
        ({"arms": ["self_distilled"], "distill": None}, "self_distilled arm needs"),
        (
            {
                "arms": ["plain_matched"],
                "models": {"h1": {"kind": "timm", "name": "resnet19"}, "h2": {"kind": "timm", "name": "resnet18"}},
            },
            "those of 'resnet19' are not known; did you mean 'resnet18'",
        ),
        ({"distill": {"alpha": 1.0, "head": "parallel"}}, "head parallel with alpha 1"),
        ({"distill": {"alpha": 0.0, "head": "parallel"}}, "head parallel with alpha 0"),
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


def test_images_that_patches_do_not_divide_are_refused_before_anything_is_planned() -> None:
    with pytest.raises(ConfigError, match=r"image_size 18 is not a multiple of patch_size 8 of model 'h6'"):
        load_grid(GRIDS / "demo.yaml", ["image_size=18"])
