"""Plans: every unfinished cell in exactly one bundle, parents before children, teachers a wave before students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbscale.errors import FileError
from dbscale.strict import validate
from dbscale.study.cell import Cell
from dbscale.study.cost import CostModel
from dbscale.study.grid import Grid, expand, load_grid, merged_cells
from dbscale.study.plan import Plan, make_plan, read_plan, record, write_plan
from dbscale.study.store import CellState, Store

STATES: list[CellState] = ["new", "done", "failed", "interrupted", "blocked", "running", "damaged"]


def plan_of(grid: Grid, states: dict[str, CellState], target_s: float = 5.0, workers: int = 1) -> Plan:
    return make_plan(grid, expand(grid, {}), states=states, cost=CostModel(), target_s=target_s, workers=workers)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_waiting_cell_has_one_place(data: st.DataObject) -> None:
    grid = load_grid(Path(__file__).parents[2] / "configs/grids/demo.yaml", ["seeds=[0]", "scratch=false"])
    keys = [cell.key for cell in merged_cells(expand(grid, {}))]
    states: dict[str, CellState] = {
        key: data.draw(st.sampled_from(STATES)) for key in data.draw(st.sets(st.sampled_from(keys)))
    }
    plan = plan_of(grid, states, data.draw(st.floats(0.1, 1e4)), data.draw(st.integers(1, 5)))
    todo = [cell.key for cell in plan.todo]
    # What runs is somebody's: planned again it would wait for its own lock.
    assert sorted(todo) == sorted(key for key in keys if states.get(key) not in ("done", "running"))
    for wave in plan.waves:
        for bundle in wave.bundles:
            position = {cell.key: i for i, cell in enumerate(bundle.cells)}
            for cell in bundle.cells:
                if cell.init is not None and cell.init.key in todo:
                    assert position[cell.init.key] < position[cell.key], "a lineage shares its job, upstream first"


def test_teachers_are_a_wave_before_their_students(grid: Grid) -> None:
    plan = plan_of(grid, {})
    wave_of = {c.key: i for i, wave in enumerate(plan.waves) for bundle in wave.bundles for c in bundle.cells}
    distills = [cell for cell in plan.cells if cell.teacher is not None]
    assert distills
    assert all(wave_of[cell.teacher.key] < wave_of[cell.key] for cell in distills if cell.teacher)


def test_nothing_is_planned_when_all_is_done(grid: Grid) -> None:
    plan = plan_of(grid, {cell.key: "done" for cell in merged_cells(expand(grid, {}))})
    assert plan.waves == ()
    assert plan.predicted_s == 0


class Priced(CostModel):
    """10 s a pretrain, 20 s a distill, 1 s a finetune."""

    def seconds(self, cell: Cell) -> float:
        return {"pretrain": 10.0, "distill": 20.0, "finetune": 1.0}[cell.recipe.stage]


@pytest.mark.parametrize(
    ("target_s", "workers", "first", "second"),
    [
        (30.0, 1, [26.0] * 4, [23.0] * 4),  # 104 s want 4 bundles, 92 s want 4
        (30.0, 3, [26.0, 26.0, 13.0, 13.0, 13.0, 13.0], [23.0] * 4),  # 6, the next multiple of 3; 4 lineages make 4
        (52.0, 1, [52.0] * 2, [46.0] * 2),
        (1000.0, 1, [104.0], [92.0]),
        (1000.0, 2, [52.0] * 2, [46.0] * 2),
        (0.1, 1, [13.0] * 8, [23.0] * 4),
    ],
)
def test_bundles_aim_at_the_target_and_fill_the_workers(
    grid: Grid, target_s: float, workers: int, first: list[float], second: list[float]
) -> None:
    """8 lineages of a pretrain and 3 finetunes, 13 s each; then 4 of a distill and 3 finetunes, 23 s each."""
    plan = make_plan(
        grid, expand(grid, {}), states={}, cost=Priced(), target_s=target_s, workers=workers, notes=["a note"]
    )
    found = [sorted((bundle.predicted_s for bundle in wave.bundles), reverse=True) for wave in plan.waves]
    assert found == [first, second]
    assert plan.predicted_s == 8 * 13 + 4 * 23
    assert plan.notes == ("a note",)
    assert plan.count() == {"new": 8 + 4 + 8 * 3 + 4 * 3}


def test_the_longest_lineage_is_packed_first(grid: Grid) -> None:
    """Three lineages of 3, 2 and 2 s in two bundles: 4 and 3 s. The shortest first would make 5 and 2."""
    points = expand(grid, {})
    states: dict[str, CellState] = {cell.key: "done" for cell in merged_cells(points)}
    roots = list(dict.fromkeys(point.cell.init.key for point in points if point.cell.init and point.arm == "plain"))
    for root, count in zip(roots, (2, 3, 2), strict=False):
        finetunes = [point.cell.key for point in points if point.cell.init and point.cell.init.key == root]
        states |= dict.fromkeys(finetunes[:count], "failed")
    plan = make_plan(grid, points, states=states, cost=Priced(), target_s=3.5)
    assert [[bundle.predicted_s for bundle in wave.bundles] for wave in plan.waves] == [[3.0, 4.0]]


def test_what_runs_is_left_out_of_the_time_that_is_left(grid: Grid) -> None:
    cells = merged_cells(expand(grid, {}))
    states: dict[str, CellState] = {cell.key: "done" for cell in cells}
    pretrains = [cell.key for cell in cells if cell.recipe.stage == "pretrain"]
    states |= {pretrains[0]: "running", pretrains[1]: "interrupted"}
    plan = make_plan(grid, expand(grid, {}), states=states, cost=Priced(), target_s=1.0)
    assert [cell.key for cell in plan.todo] == [pretrains[1]]
    assert plan.predicted_s == 10.0


def test_the_record_names_each_point_by_the_grids_seed_and_its_draw(grid: Grid) -> None:
    drawn = grid.model_copy(update={"finetunes": 2, "min_effect": 0.01})
    written = record(plan_of(drawn, {}), CostModel())
    assert {(point.seed, point.finetune) for point in written.points} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert written.min_effect == 0.01


def test_the_record_says_what_each_point_rests_on(grid_data: dict[str, Any]) -> None:
    grid = validate(Grid, grid_data | {"scratch": True}, where="t")
    points = expand(grid, {})
    written = record(plan_of(grid, {}), Priced(), level=0.95, targets=["down"])
    by_cell = {point.cell: point for point in written.points}
    for point in points:
        told, upstream = by_cell[point.cell.key], point.cell.init
        assert (told.arm, told.student, told.variant, told.dataset) == (point.arm, point.student, "base", "down")
        assert (told.num_samples, told.upstream_num_samples) == (point.cell.recipe.data.num_samples,
                                                                 point.upstream_num_samples)  # fmt: skip
        assert told.upstream_cell == (upstream.key if upstream else None)
        assert told.upstream_dataset == ("up" if upstream else None)
        assert told.teacher_cell == (upstream.teacher.key if upstream and upstream.teacher else None)
        assert told.model == {"h1": "deit_h1w16d2", "h2": "deit_h2w16d2"}[point.student]
    assert {point.arm for point in written.points} == {"plain", "distilled", "scratch"}
    stages = [cell.recipe.stage for cell in merged_cells(points)]
    assert list(written.predicted_s) == [
        {"pretrain": 10.0, "distill": 20.0, "finetune": 1.0}[stage] for stage in stages
    ]
    assert written.predicted_device_s == sum(written.predicted_s)
    assert (written.level, written.targets) == (0.95, ("down",))


def test_the_record_survives_the_disk_and_shows_what_went_stale(grid: Grid, tmp_path: Path) -> None:
    store = Store(tmp_path)
    plan = plan_of(grid, {})
    write_plan(store, record(plan, CostModel()))
    earlier = read_plan(store, grid.name)
    assert earlier is not None and len(earlier.points) == len(plan.points)
    smaller = grid.model_copy(update={"seeds": (0,)})
    again = make_plan(smaller, expand(smaller, {}), states={}, cost=CostModel(), target_s=1.0, earlier=earlier)
    assert set(again.stale) == {c.key for c in plan.cells} - {c.key for c in again.cells}
    assert read_plan(store, "absent") is None
    (store.grid_dir(grid.name) / "plan.json").write_bytes(b"\xff")
    with pytest.raises(FileError, match=r"plan\.json is damaged .*; `dbscale submit` of the grid writes it anew"):
        read_plan(store, grid.name)
