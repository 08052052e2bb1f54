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
    DEVICES,
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
    train_flops,
    write_calibration,
)
from dbscale.study.grid import Grid, expand, merged_cells
from dbscale.study.recipe import Budget, Data, DeiT, Distill, Optim, Recipe, TimmModel, Training
from dbscale.study.resources import Resources
from dbscale.study.store import Store
from dbscale.study.task import Detection, Segmentation


@pytest.mark.parametrize(
    ("heads", "millions"), [(2, 2.52), (3, 5.54), (4, 9.75), (5, 15.1), (6, 21.7), (7, 29.5), (8, 38.4)]
)
def test_parameters_of_the_published_family(heads: int, millions: float) -> None:
    # Published with the head left out at 2 heads (2.52M) and rounded: a 100-class head is within one per cent.
    assert num_params(DeiT(heads=heads), 224, 100) / 1e6 == pytest.approx(millions, rel=0.01)


def test_parameters_are_those_that_timm_counts() -> None:
    """deit_tiny, deit_small and deit_base, patch 16, 224 px, 1,000 classes."""
    assert [num_params(DeiT(heads=heads), 224, 1000) for heads in (3, 6, 12)] == [5_717_416, 22_050_664, 86_567_656]


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


def test_the_cost_of_a_head_by_hand() -> None:
    """A linear head is free beside its backbone. 3 × 3 convolutions on 14 × 14 patches, three forwards a sample:
    of a pyramid 16 + 4 + 1 + ¼ maps and 16 once more; of FCOS 4 + 1 + ¼ + 1/16 maps, once and in two towers of four."""
    training = Training(budget=Budget(steps=1), optim=Optim(lr=1e-3), global_batch=1)
    data = Data(dataset="d", num_samples=8, image_size=224)
    coarse, resnet = DeiT(heads=3), TimmModel(kind="timm", name="resnet18")

    def cost(task: Any, model: Any = coarse) -> float:
        return train_flops(Recipe(stage="finetune", model=model, data=data, training=training, seed=0, task=task))

    plain, a_map = cost(None), 2 * 9 * 14**2  # pixels of patch 16, where timm models count as such
    assert cost(Segmentation()) == plain == 3 * forward_flops(coarse, 224)
    assert cost(Segmentation(head="pyramid")) - plain == pytest.approx(3 * a_map * 128**2 * 37.25)
    assert cost(Segmentation(head="pyramid", width=64)) - plain == pytest.approx(3 * a_map * 64**2 * 37.25)
    assert cost(Detection()) - plain == pytest.approx(3 * a_map * 128**2 * 5.3125 * 9)
    assert cost(Detection(width=64, num_convs=1)) - plain == pytest.approx(3 * a_map * 64**2 * 5.3125 * 3)
    finer = DeiT(heads=3, patch_size=8)
    assert cost(Detection(), finer) - cost(None, finer) == pytest.approx(4 * 3 * a_map * 128**2 * 5.3125 * 9)
    assert cost(Detection(), resnet) - cost(None, resnet) == pytest.approx(3 * a_map * 128**2 * 5.3125 * 9)


@pytest.mark.parametrize(
    ("name", "multiply_adds"), [("resnet18", 1.82e9), ("resnet34", 3.67e9), ("resnet50", 4.11e9), ("resnet101", 7.84e9)]
)
def test_flops_of_residual_networks(name: str, multiply_adds: float) -> None:
    """Published multiply-adds at 224 px, counted twice; a quarter of them at half the size, tags of weights aside."""
    model = TimmModel(kind="timm", name=f"{name}.a1_in1k")
    assert forward_flops(model, 224) == pytest.approx(2 * multiply_adds, rel=0.005)
    assert forward_flops(model, 112) == pytest.approx(forward_flops(model, 224) / 4)


def test_an_unknown_model_counts_as_deit_small() -> None:
    assert forward_flops(TimmModel(kind="timm", name="swin_tiny_patch4_window7_224"), 224) == 9.2e9


def test_what_is_assumed_of_devices() -> None:
    """Peaks and memory as the vendors' data sheets have them, dense bf16; the rest are estimates that every plan without
    a calibration rests on."""
    about = {name: (d.name, d.peak_flops, d.utilisation, d.step_overhead_s, d.cell_overhead_s, d.memory_bytes)
             for name, d in DEVICES.items()}  # fmt: skip
    assert about == {
        "cpu": ("cpu", 1e11, 0.30, 0.012, 0.3, None), "a100": ("a100", 312e12, 0.35, 0.004, 20.0, 80e9),
        "h100": ("h100", 989e12, 0.25, 0.004, 20.0, 80e9), "h200": ("h200", 989e12, 0.25, 0.004, 20.0, 141e9),
    }  # fmt: skip
    assert DEVICES["a100"].flops_per_s == pytest.approx(109.2e12) and CostModel().device == DEVICES["cpu"]


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


def test_speed_and_overhead_that_would_be_negative_are_none() -> None:
    """Larger models that were quicker: overhead is all there is, Σ1/t over Σ1/t². A time that more than doubles with
    twice the operations: they alone, Σ(f/t)² over Σf/t."""
    speed, overhead = fit_step_times([(1e9, 0.6), (2e9, 0.5)])
    assert speed == pytest.approx(1e3 * 4e9) and overhead == pytest.approx((1 / 0.6 + 2) / (1 / 0.36 + 4))
    speed, overhead = fit_step_times([(1e9, 0.1), (2e9, 0.4)])
    assert speed == pytest.approx((1e20 + 0.25e20) / (1e10 + 0.5e10)) and overhead == 0


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
    # Twice as slow, then three times as slow as that: of a stage without rows, six times.
    twice = base.calibrated(rows_of(of["finetune"][:1], base, [2.0]))
    thrice = twice.calibrated(rows_of(of["finetune"][:1], twice, [3.0]))
    assert thrice.scale == pytest.approx(6.0)
    assert thrice.hours(of["distill"][:2]) == pytest.approx(12 * base.seconds(of["distill"][0]) / 3600)


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
