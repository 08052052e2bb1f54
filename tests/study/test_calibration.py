"""Calibration: step times give back the machine they were made from, rows scale each stage by itself."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbscale.study.cost import Calibration, CostModel, fit_step_times, read_calibration, step_flops, write_calibration
from dbscale.study.grid import Grid, expand, merged_cells
from dbscale.study.store import Store

POSITIVE = st.floats(0.1, 10.0)


@given(POSITIVE, POSITIVE, st.lists(st.integers(1, 1000), min_size=2, max_size=6, unique=True))
def test_speed_and_overhead_are_found_again(speed: float, overhead: float, sizes: list[int]) -> None:
    speed, overhead = speed * 1e9, overhead * 1e-3
    flops = [size * 1e7 for size in sizes]
    found = fit_step_times([(each, each / speed + overhead) for each in flops])
    assert found == pytest.approx((speed, overhead), rel=1e-3)


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


def test_rows_scale_each_stage_by_itself(grid: Grid) -> None:
    cells = merged_cells(expand(grid, {}))
    base = CostModel()
    slow = {"pretrain": 3.0, "finetune": 0.5}

    def row(cell: Any, times: float) -> Any:
        return SimpleNamespace(timing=SimpleNamespace(device_time_s=times * base.seconds(cell)))

    rows = [(cell, row(cell, slow[cell.recipe.stage])) for cell in cells if cell.recipe.stage in slow]
    found = base.calibrated(rows)
    for cell in cells:
        if cell.recipe.stage in slow:
            assert found.seconds(cell) == pytest.approx(slow[cell.recipe.stage] * base.seconds(cell))
    # Calibrating again by the same rows changes nothing.
    again = found.calibrated(rows)
    assert all(again.seconds(cell) == pytest.approx(found.seconds(cell)) for cell in cells)
    assert base.calibrated([]) is base
