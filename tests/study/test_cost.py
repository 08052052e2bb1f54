"""The cost model against published sizes and memory by hand; calibration by a probe and by rows."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbscale.errors import FileError
from dbscale.study.cell import Cell
from dbscale.study.cost import (
    Calibration,
    CostModel,
    Device,
    as_deit,
    device_memory,
    duration,
    fit_step_times,
    forward_flops,
    has_known_flops,
    num_params,
    read_calibration,
    step_flops,
    write_calibration,
)
from dbscale.study.grid import Grid, expand, merged_cells
from dbscale.study.recipe import Budget, Data, DeiT, Distill, Optim, Recipe, TimmModel, Training
from dbscale.study.resources import Resources
from dbscale.study.store import Store


@pytest.mark.parametrize(
    ("heads", "millions"), [(2, 2.52), (3, 5.54), (4, 9.75), (5, 15.1), (6, 21.7), (7, 29.5), (8, 38.4)]
)
def test_parameters_of_the_published_family(heads: int, millions: float) -> None:
    # Published with the head left out at 2 heads (2.52M) and rounded: a 100-class head is within one per cent.
    assert num_params(DeiT(heads=heads), 224, 100) / 1e6 == pytest.approx(millions, rel=0.01)


VIT_G = DeiT(heads=16, head_width=88, depth=40, patch_size=14, mlp_ratio=48 / 11)


def test_parameters_of_full_size_transformers() -> None:
    """ViT-L/16 has 304M, ViT-g/14 1,013M (Zhai et al. 2021, table 2: 1,011M with another head)."""
    assert num_params(DeiT(heads=16, depth=24), 224, 1000) == pytest.approx(304.3e6, rel=0.001)
    assert num_params(VIT_G, 224, 1000) == pytest.approx(1013e6, rel=0.002)


def test_a_transformer_that_timm_makes_by_size_counts_as_one() -> None:
    kwargs = {"embed_dim": 512, "num_heads": 8, "depth": 12}
    named = TimmModel(kind="timm", name="deit_tiny_distilled_patch16_224", kwargs=kwargs)
    assert as_deit(named) == DeiT(heads=8)
    assert forward_flops(named, 224) == forward_flops(DeiT(heads=8), 224)
    for name, some in (("deit_tiny_distilled_patch16_224", {"depth": 12}), ("swin_tiny_patch4_window7_224", kwargs)):
        other = TimmModel(kind="timm", name=name, kwargs=some)
        assert as_deit(other) is None and not has_known_flops(other)
    assert has_known_flops(TimmModel(kind="timm", name="resnet18.a1_in1k")) and has_known_flops(named)


def cell_of(**training: Any) -> Cell:
    """A student of 4 heads with a teacher of 2, on 16 px with patches of 8 (5 tokens), a batch of 64."""
    about = Training(budget=Budget(steps=1), optim=Optim(lr=1e-3), global_batch=64, **training)
    data = Data(dataset="up", num_samples=64, image_size=16)
    small, large = (DeiT(heads=heads, head_width=8, depth=3, patch_size=8) for heads in (2, 4))
    teacher = Cell(Recipe(stage="pretrain", model=small, data=data, training=about, seed=0), None)
    recipe = Recipe(stage="distill", model=large, data=data, training=about, seed=0, distill=Distill())
    return Cell(recipe, None, teacher=teacher)


@pytest.mark.parametrize(
    ("how", "training", "student_bytes"),
    [
        # Bytes a parameter: weights, gradients, AdamW's two moments; 16-bit copies under autocast.
        ({"zero_stage": None}, {"precision": "fp32"}, 4 + 4 + 8),
        ({"zero_stage": None}, {}, 4 + 4 + 8 + 2),
        ({"zero_stage": None}, {"ema_decay": 0.9}, 4 + 4 + 8 + 2 + 4),
        # DeepSpeed keeps the weights it steps apart from those it computes with.
        ({"zero_stage": 0}, {"precision": "fp32"}, 4 + 4 + 12),
        ({"zero_stage": 1}, {"precision": "fp32"}, 4 + 4 + 12 / 4),
        ({"zero_stage": 2}, {"precision": "fp32"}, 4 + (4 + 12) / 4),
        ({"zero_stage": 3}, {"precision": "fp32"}, (4 + 4 + 12) / 4),
        ({"zero_stage": 3}, {"ema_decay": 0.9}, (4 + 4 + 12 + 4) / 4 + 2),
    ],
)
def test_memory_by_hand(how: dict[str, Any], training: dict[str, Any], student_bytes: float) -> None:
    cell = cell_of(**training)
    found = device_memory(cell, Resources(num_processes=4, micro_batch=8, **how))
    assert found is not None and cell.teacher
    student, teacher = (num_params(each.recipe.model, 16, 1000) for each in (cell, cell.teacher))
    assert found.states == pytest.approx(student * student_bytes + 4 * teacher)
    layer, norm, pixel = (64, 8, 4) if training.get("precision") == "fp32" else (36, 4, 2)
    students, teachers = 5 * 32 * (3 * layer + norm), 5 * 16 * (layer + norm)
    assert found.activations == 8 * (students + teachers + 2 * 3 * pixel * 16**2)
    assert (found.micro_batch, found.total) == (8, found.states + found.activations)


def test_memory_follows_the_batch_and_the_models() -> None:
    cell = cell_of()
    assert [device_memory(cell, Resources(num_processes=n, micro_batch=m)).micro_batch  # type: ignore[union-attr]
            for n, m in ((1, None), (4, None), (4, 32), (1, 128))] == [64, 16, 16, 64]  # fmt: skip
    resnet = cell.recipe.model_copy(update={"model": TimmModel(kind="timm", name="resnet18")})
    assert device_memory(Cell(resnet, None, teacher=cell.teacher), Resources()) is None


def test_flops_of_deit_small() -> None:
    """4.6 G multiply-adds at 224 px (Touvron et al. 2021), counted twice."""
    assert forward_flops(DeiT(heads=6), 224) == pytest.approx(9.2e9, rel=0.02)


POSITIVE = st.floats(0.1, 10.0)
on_any_machine = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@on_any_machine
@given(POSITIVE, POSITIVE, st.lists(st.integers(1, 1000), min_size=2, max_size=6, unique=True))
def test_speed_and_overhead_are_found_again(speed: float, overhead: float, sizes: list[int]) -> None:
    speed, overhead = speed * 1e9, overhead * 1e-3
    flops = [size * 1e7 for size in sizes]
    found = fit_step_times([(each, each / speed + overhead) for each in flops])
    assert found == pytest.approx((speed, overhead), rel=1e-3)


@on_any_machine
@given(st.lists(st.tuples(st.floats(1e6, 1e12), st.floats(1e-4, 10)), min_size=1, max_size=6))
def test_whatever_was_measured_predicts_positive_finite_times(measured: list[tuple[float, float]]) -> None:
    speed, overhead = fit_step_times(measured)
    assert 0 < speed < float("inf") and 0 <= overhead < float("inf")


def test_one_size_is_met_exactly() -> None:
    speed, overhead = fit_step_times([(2e9, 0.5)])
    assert 2e9 / speed + overhead == pytest.approx(0.5)


def calibration(**changes: Any) -> Calibration:
    known = {"host": socket.gethostname(), "device": "cpu", "created": 0.0, "flops_per_s": 1e9}
    return Calibration(**{**known, "step_overhead_s": 0.01, "cell_overhead_s": 2.0, **changes})


def test_a_probe_replaces_what_is_assumed(grid: Grid) -> None:
    cell = merged_cells(expand(grid, {}))[0]
    cost = CostModel().probed(calibration(stage_scale={"pretrain": 2.0}))
    steps = cell.recipe.num_steps * (step_flops(cell) / 1e9 + 0.01)
    assert cost.seconds(cell) == pytest.approx(2 * (steps + 2.0))


def test_it_speaks_of_this_cpu_and_of_any_gpu_of_its_kind() -> None:
    assert calibration().fits("cpu") and not calibration().fits("h100")
    assert not calibration(host="elsewhere").fits("cpu")
    assert calibration(host="elsewhere", device="h100").fits("h100")


def test_it_is_kept_in_the_store(tmp_path: Any) -> None:
    store = Store(tmp_path)
    assert read_calibration(store) is None
    write_calibration(store, calibration())
    assert read_calibration(store) == calibration()


def rows_of(cells: list[Cell], base: CostModel, times: list[float]) -> list[Any]:
    """Rows that took `times` as long as `base` predicts."""
    seconds = [factor * base.seconds(cell) for cell, factor in zip(cells, times, strict=True)]
    rows = [SimpleNamespace(timing=SimpleNamespace(device_time_s=each)) for each in seconds]
    return list(zip(cells, rows, strict=True))


def test_rows_scale_each_stage_by_its_own_median(grid: Grid) -> None:
    """One cell on a machine that others used as well must not stretch the plan: not the mean."""
    cells, base = merged_cells(expand(grid, {})), CostModel()
    of = {
        stage: [cell for cell in cells if cell.recipe.stage == stage] for stage in ("pretrain", "distill", "finetune")
    }
    slow, quick = rows_of(of["pretrain"][:3], base, [1.0, 2.0, 12.0]), rows_of(of["finetune"][:1], base, [0.5])
    found = base.calibrated([*slow, *quick])
    for stage, factor in (("pretrain", 2.0), ("finetune", 0.5), ("distill", 1.5)):
        # Of distill nothing was measured: the median over all, of .5, 1, 2 and 12.
        assert found.seconds(of[stage][0]) == pytest.approx(factor * base.seconds(of[stage][0]))
    # Calibrating again by the same rows changes nothing.
    again = found.calibrated([*slow, *quick])
    assert all(again.seconds(cell) == pytest.approx(found.seconds(cell)) for cell in (*of["pretrain"], *of["finetune"]))
    assert base.calibrated([]) is base


def test_seconds_are_steps_and_overheads(grid: Grid) -> None:
    cell = next(each for each in merged_cells(expand(grid, {})) if each.recipe.stage == "distill")
    cost = CostModel(Device("d", 1e9, 0.5, 0.02, 3.0))
    assert cell.recipe.num_steps == 10
    assert cost.seconds(cell) == pytest.approx(10 * (step_flops(cell) / 0.5e9 + 0.02) + 3.0)
    student, teacher = (forward_flops(each.recipe.model, 32) for each in (cell, cell.teacher) if each)
    assert step_flops(cell) == pytest.approx(8 * (3 * student + teacher)), "a batch of 8, the teacher's forward too"


def test_a_damaged_calibration_is_named(tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text('{"host": "h"}')
    with pytest.raises(FileError, match=r"calibration\.json is damaged"):
        read_calibration(Store(tmp_path))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.4, "0.4 s"), (9.9, "9.9 s"), (10, "10 s"), (89.4, "89 s"), (90, "2 min"),
     (5399, "90 min"), (5400, "1.5 h"), (172799, "48.0 h"),
     (172800, "2.0 days")],
)  # fmt: skip
def test_durations_as_people_read_them(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
