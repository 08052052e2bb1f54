"""What a hunt may run: the values of its axis, its seeds, and the runs that make a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dbscale.errors import ConfigError, FileError
from dbscale.strict import validate
from dbscale.study.grid import Grid, Hunt, expand, load_grid
from dbscale.study.hunt import (
    Bought,
    Finding,
    HuntLog,
    Target,
    WaveRecord,
    axis_values,
    pairs_of,
    read_log,
    seeds_of,
    with_wave,
    write_log,
)
from dbscale.study.store import Store

GRIDS = Path(__file__).parents[2] / "configs" / "grids"


def hunted(grid_data: dict[str, Any], hunt: dict[str, Any] | None = None, **changes: Any) -> Grid:
    return validate(Grid, grid_data | {"hunt": {"budget_hours": 1} | (hunt or {})} | changes, where="tiny.yaml")


def test_a_hunt_changes_no_cell_of_its_grid(grid_data: dict[str, Any], grid: Grid) -> None:
    with_hunt = hunted(grid_data)
    assert [point.cell.key for point in expand(with_hunt, {})] == [point.cell.key for point in expand(grid, {})]


@pytest.mark.parametrize(
    ("hunt", "values"),
    [
        ({}, (16, 23, 32)),
        ({"per_octave": 1}, (16, 32)),
        ({"range": [8, 64], "per_octave": 1}, (8, 16, 32, 64)),
        ({"range": [10, 80], "per_octave": 1}, (10, 16, 20, 32, 40, 80)),  # the grid's own count beside the even ones
        ({"range": [17, 70], "per_octave": 1}, (17, 32, 70)),  # 34 is as good as 32
        ({"range": [15, 33], "per_octave": 1}, (16, 32)),  # so are the ends
    ],
)
def test_the_values_of_the_axis(grid_data: dict[str, Any], hunt: dict[str, Any], values: tuple[int, ...]) -> None:
    assert axis_values(hunted(grid_data, hunt)) == values


def test_the_axis_may_be_labels_or_parameters(grid_data: dict[str, Any]) -> None:
    assert axis_values(hunted(grid_data, {"along": "downstream_samples", "per_octave": 1})) == (10, 17, 20, 30)
    sizes = axis_values(hunted(grid_data, {"along": "num_params"}))
    # 2 blocks of width 16 (and 32), 16 patches of 8 px: as `cost.num_params` has it
    assert len(sizes) == 2 and sizes[0] < sizes[1]
    with pytest.raises(ConfigError, match="the hunt has 1 value of num_params"):
        axis_values(hunted(grid_data, {"along": "num_params", "students": ["h2"]}))
    timm = grid_data["models"] | {"h2": {"kind": "timm", "name": "resnet18"}}
    with pytest.raises(ConfigError, match="'h2', a timm model, is not known"):
        axis_values(hunted(grid_data, {"along": "num_params"}, models=timm))


def test_the_grids_seeds_come_first(grid_data: dict[str, Any]) -> None:
    assert seeds_of(hunted(grid_data, {"most_seeds": 5}, seeds=[7, 3])) == (7, 3, 8, 9, 10)
    assert seeds_of(hunted(grid_data, {"most_seeds": 1}, seeds=[7, 3])) == (7,)
    assert seeds_of(hunted(grid_data, {"most_seeds": 5}, seeds=[0])) == (0, 1, 2, 3, 4)
    assert seeds_of(hunted(grid_data, {"most_seeds": 3}, seeds=[2**32 - 2])) == (2**32 - 2, 2**32 - 1)


def test_a_pair_is_both_arms_at_all_labels_and_shares_cells_with_the_grid(grid_data: dict[str, Any]) -> None:
    grid = hunted(grid_data, {"range": [16, 64], "per_octave": 1})
    pairs = pairs_of(grid, {"up": "a", "down": "b"}, (0, 1), 1)
    assert [(pair.x, pair.seed) for pair in pairs] == [(x, seed) for x in (16, 32, 64) for seed in (0, 1)]
    assert {str(pair.target) for pair in pairs} == {"down"}
    first = pairs[0]
    # h1 has no teacher, so no distilled arm; it stands in the pair as the teacher of h2 alone
    assert {point.student for point in first.points} == {"h2"}
    assert [point.arm for point in first.points] == ["plain", "distilled"] * 3
    stages = [cell.recipe.stage for cell in first.cells]
    assert (stages.count("pretrain"), stages.count("distill"), stages.count("finetune")) == (2, 1, 6)
    fixed = {point.cell.key for point in expand(grid, {"up": "a", "down": "b"})}
    asked = {point.cell.key for pair in pairs for point in pair.points}
    assert {key for pair in pairs if pair.x < 64 for key in (p.cell.key for p in pair.points)} == fixed & asked


def test_further_finetunes_belong_to_a_pair_but_do_not_make_it(grid_data: dict[str, Any]) -> None:
    (pair, *_) = pairs_of(hunted(grid_data), {}, (0,), 3)
    assert {point.finetune for point in pair.points} == {0, 1, 2}
    assert len(pair.cells) == 3 + 6
    assert len(pair.runs(2)) == 3 + 12
    assert len(pair.runs(3)) == 3 + 18


def test_targets_that_are_not_pooled_have_a_student_and_labels_each(grid_data: dict[str, Any]) -> None:
    grid = hunted(grid_data, {"pooled": False}, teachers={"h2": "h1", "h1": "h2"})
    targets = {pair.target for pair in pairs_of(grid, {}, (0,), 1)}
    assert targets == {Target("down", student, size) for student in ("h1", "h2") for size in (10, 20, 30)}
    assert str(Target("down", "h1", 10)) == "down h1 10"


def test_students_downstream_sets_and_labels_can_be_chosen(grid_data: dict[str, Any]) -> None:
    further = [*grid_data["downstream"], {"dataset": "up", "num_samples": [5]}]
    everything = pairs_of(hunted(grid_data, downstream=further), {}, (0,), 1)
    assert {str(pair.target) for pair in everything} == {"down", "up"}
    grid = hunted(grid_data, {"downstream": ["down"], "num_labels": [20], "students": ["h2"]}, downstream=further)
    (pair, *_) = pairs_of(grid, {}, (0,), 1)
    assert len(pair.points) == 2
    assert {point.cell.recipe.data.num_samples for point in pair.points} == {20}
    with pytest.raises(ConfigError, match="unknown student in hunt 'h9'"):
        hunted(grid_data, {"students": ["h9"]})
    with pytest.raises(ConfigError, match="unknown downstream dataset in hunt 'up'"):
        hunted(grid_data, {"downstream": ["up"]})


def test_variants_are_two_sides_of_everything_else_equal(grid_data: dict[str, Any]) -> None:
    variants = [{"name": "weak", "set": {"distill.alpha": 0.1}}, {"name": "strong", "set": {"distill.alpha": 0.9}}]
    sides = {"a": {"variant": "weak", "arm": "distilled"}, "b": {"variant": "strong", "arm": "distilled"}}
    pairs = pairs_of(hunted(grid_data, sides, variants=variants), {}, (0,), 1)
    assert [point.variant for point in pairs[0].points] == ["weak", "strong"] * 3
    assert {point.arm for point in pairs[0].points} == {"distilled"}
    # of sides that do not name the variant the first counts
    plain = pairs_of(hunted(grid_data, variants=variants), {}, (0,), 1)
    assert {point.variant for pair in plain for point in pair.points} == {"weak"}


def test_along_labels_a_pair_is_one_d_f(grid_data: dict[str, Any]) -> None:
    grid = hunted(grid_data, {"along": "downstream_samples", "range": [10, 40], "per_octave": 1})
    pairs = pairs_of(grid, {}, (0,), 1)
    assert [pair.x for pair in pairs] == [10, 20, 30, 40]
    assert {point.upstream_num_samples for point in pairs[0].points} == {16, 32}
    assert {point.cell.recipe.data.num_samples for point in pairs[0].points} == {10}


@pytest.mark.parametrize(
    ("hunt", "said"),
    [
        ({"a": {"arm": "plain"}, "b": {"arm": "plain"}}, "other values of the same columns"),
        ({"a": {"arm": "plain"}, "b": {"student": "h2"}}, "other values of the same columns"),
        ({"range": [64, 64]}, "does not rise"),
        ({"target_octave": 1.0}, "unknown key 'hunt.target_octave'"),
        ({"budget_hours": 0}, "greater than 0"),
    ],
)
def test_what_a_hunt_refuses(grid_data: dict[str, Any], hunt: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        hunted(grid_data, hunt)


def test_a_hunt_that_names_its_budget_alone_asks_for_what_the_documents_say() -> None:
    assert Hunt(budget_hours=2.0).model_dump() == {
        "along": "upstream_samples", "range": None, "per_octave": 2.0, "a": {"arm": "plain"}, "b": {"arm": "distilled"},
        "students": None, "downstream": None, "num_labels": None, "pooled": True, "metric": "error_rate",
        "target_octaves": 1.0, "min_effect": None, "level": 0.9, "least_doubt": None, "wave": 8, "waves_ahead": 0,
        "finetunes": "auto", "budget_hours": 2.0, "most_seeds": 32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [("per_octave", 1e-9, 0.0), ("per_octave", 8.0, 8.1), ("target_octaves", 1e-9, 0.0), ("min_effect", 1e-9, 0.0),
     ("level", 0.5001, 0.5), ("level", 0.9999, 1.0), ("least_doubt", 1e-9, 0.0), ("wave", 1, 0), ("waves_ahead", 0, -1),
     ("waves_ahead", 8, 9), ("finetunes", 1, 0), ("budget_hours", 1e-9, 0.0), ("most_seeds", 1, 0),
     ("range", (1, 2), (0, 2)), ("range", (1, 2), (2, 2)), ("num_labels", (1,), ())],
)  # fmt: skip
def test_every_field_of_a_hunt_ends_where_it_says(name: str, taken: Any, refused: Any) -> None:
    assert getattr(Hunt.model_validate({"budget_hours": 1.0, name: taken}), name) == taken
    with pytest.raises(ValidationError):
        Hunt.model_validate({"budget_hours": 1.0, name: refused})


def test_sides_without_a_partner_are_refused(grid_data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no run with .*plain.* has a partner"):
        pairs_of(hunted(grid_data, arms=["plain"], teachers={}), {}, (0,), 1)


def test_the_shipped_hunt_asks_for_cells_of_the_demo() -> None:
    grid, demo = load_grid(GRIDS / "demo_hunt.yaml"), load_grid(GRIDS / "demo.yaml")
    assert axis_values(grid) == (512, 1024, 2048, 4096, 8192, 16384)
    names = {"fractals": "a", "fractals_unseen": "b", "digits": "c"}
    fixed = {point.cell.key for point in expand(demo, names)}
    asked = {
        p.cell.key for pair in pairs_of(grid, names, (0,), 1) if pair.x in (512, 2048, 8192, 16384) for p in pair.points
    }
    assert asked <= fixed


# --- the log --------------------------------------------------------------------------------------------------------


def wave(spent: float, kind: str | None = None, **bought: Any) -> WaveRecord:
    finding = validate(Finding, {"target": "t", "kind": kind}, where="test")
    pairs = (Bought(x=16, targets=("t",), num_pairs=2, gain=None, cost_s=1.0, reason="start"),) if bought else ()
    return WaveRecord(
        number=0, created=0.0, spent_s=spent, verdict_level=0.95, findings=(finding,), bought=pairs
    )  # fmt: skip


def test_a_wave_that_is_planned_again_replaces_its_first_plan(tmp_path: Path) -> None:
    log = HuntLog(grid="g", along="upstream_samples", span=(1, 2), target_octaves=1.0, level=0.9, budget_s=1.0)
    log = with_wave(log, wave(0.0))
    log = with_wave(log, wave(0.0, pairs=2))
    assert [(each.number, len(each.bought)) for each in log.waves] == [(1, 1)]
    log = with_wave(log, wave(5.0))
    log = with_wave(log, wave(5.0, "undecided"))
    assert [each.number for each in log.waves] == [1, 2, 3]
    log = with_wave(log, wave(5.0, "undecided", pairs=2))
    assert [(each.number, each.spent_s, len(each.bought)) for each in log.waves] == [
        (1, 0.0, 1),
        (2, 5.0, 0),
        (3, 5.0, 1),
    ]
    assert [each.failed_pairs for each in log.waves] == [0, 0, 0]
    store = Store(tmp_path)
    assert read_log(store, "g") is None
    write_log(store, log)
    assert read_log(store, "g") == log
    (store.grid_dir("g") / "hunt.json").write_text("{}")
    with pytest.raises(FileError):
        read_log(store, "g")
