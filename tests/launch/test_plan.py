"""`dbscale plan --calibrate`: real cells, cut short, tell later plans how fast this machine is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dbscale.launch.cli import main
from dbscale.launch.study import base_cost, load_study, plan_study
from dbscale.study.cost import read_calibration
from dbscale.study.store import Store
from tests.launch.conftest import GRID

UP = {"source": "fractals", "families": 4, "num_train": 32, "num_test": 8, "image_size": 32}
STAGES = {"pretrain", "distill", "finetune"}


@pytest.fixture
def where(tmp_path: Path) -> list[str]:
    grid = tmp_path / "grid.yaml"
    down = {"source": "digits", "image_size": 32}
    grid.write_text(yaml.safe_dump({**GRID, "datasets": {"up": UP, "down": down}}))
    return ["--grid", str(grid), "--store", str(tmp_path / "out"), "--data", str(tmp_path / "data")]


def test_it_asks_for_packed_data_first(where: list[str], capsys: Any) -> None:
    assert main(["plan", "--calibrate", "1", "--cluster", "inline", *where]) == 1
    assert "not packed yet: up, down; `dbscale shards pack --grid" in capsys.readouterr().err


def test_later_plans_use_what_was_measured(where: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main(["shards", "pack", "--grid", where[1], "--data", where[5]]) == 0
    store = Store(tmp_path / "out")
    study = load_study(grid=Path(where[1]), cluster="inline", store=store.root, data=tmp_path / "data")
    before, _ = plan_study(study)
    assert main(["plan", "--calibrate", "2", "--cluster", "inline", *where]) == 0
    assert "calibrated on" in capsys.readouterr().out
    found = read_calibration(store)
    assert found is not None and {each.stage for each in found.measured} == STAGES
    assert all(each.num_steps >= 10 and each.step_time_s > 0 for each in found.measured)
    assert not (store.root / "cells").exists(), "the probe leaves no cell in the store"
    after, cost = plan_study(study)
    assert cost == base_cost(study) == study.cluster.cost_model().probed(found)
    assert after.predicted_s != before.predicted_s
    cells = {cell.key: cell for cell in after.cells}
    for each in found.measured:
        predicted = cost.seconds(cells[each.cell])
        assert predicted > 10 * 0.2 * each.step_time_s, "ten steps and a cell's overhead, at about the measured pace"
