"""`dbscale plan --calibrate`: real cells, cut short, tell later plans how fast this machine is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dbscale.launch.cli import main
from dbscale.launch.study import base_cost, load_study, plan_study
from dbscale.study.cost import read_calibration
from dbscale.study.store import Store
from tests.launch.conftest import GRID, ROOT

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


PAPER = sorted((ROOT / "configs" / "grids" / "paper").glob("*.yaml"))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_grid_of_the_paper_is_planned_with_the_hours_its_header_states(
    path: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["plan", str(path), "--store", str(tmp_path / "out"), "--data", str(tmp_path)]) == 0
    stated = re.search(r"^# Cost +([\d,]+ H100-hours or [\d,]+ A100-hours)", path.read_text(), re.MULTILINE)
    planned = re.search(r"on GPUs about ([\d,]+ H100-hours or [\d,]+ A100-hours)", capsys.readouterr().out)
    assert stated and planned and stated[1] == planned[1]
    header = path.read_text().partition("extends:")[0]
    assert all(f"# {label}" in header for label in ("Question", "Command", "Cost", "Refuted"))
    assert f"configs/grids/paper/{path.name}" in header


def memory_said(text: str) -> tuple[float, int]:
    found = re.search(r"needs about ([\d.]+) GB on (?:one device|each of (\d+) devices)", text)
    assert found, text
    return float(found[1]), int(found[2] or 1)


def test_a_full_size_transformer_dry_runs_within_the_memory_of_its_devices(tmp_path: Path, capsys: Any) -> None:
    where = [str(PAPER[0].with_name("vit_giant.yaml")), "--store", str(tmp_path / "out"), "--data", str(tmp_path)]
    assert main(["submit", "--dry-run", "--cluster", "zero3-64", *where]) == 0
    shown = capsys.readouterr().out
    assert memory_said(shown) == (pytest.approx(39, abs=1), 8)
    assert "--ntasks-per-node=8" in shown and "--nodes=8" in shown
    assert not (tmp_path / "out" / "cells").exists()
    assert main(["plan", "--cluster", "slurm", *where]) == 0
    gigabytes, devices = memory_said(capsys.readouterr().out)
    assert devices == 1 and gigabytes > 9000, "the whole batch at once"


def test_memory_is_said_of_gpus_alone(where: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main(["plan", "--cluster", "local", *where]) == 0
    assert "memory:" not in capsys.readouterr().out
    for key in ("zero_stage: null", "zero_stage: 3"):
        cluster = tmp_path / "gpus.yaml"
        cluster.write_text(f"executor: local\ndevice: h100\nresources: {{num_processes: 2, {key}}}\n")
        assert main(["plan", "--cluster", str(cluster), *where]) == 0
        engine = "plain DDP" if "null" in key else "ZeRO stage 3"
        assert f"devices under {engine}" in capsys.readouterr().out
