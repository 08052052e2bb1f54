"""`dbscale plan --calibrate`: real cells, cut short, tell later plans how fast this machine is."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dbscale.launch.cli import main
from dbscale.launch.commands import plan as plan_command
from dbscale.launch.commands.plan import describe_calibration, device_time
from dbscale.launch.preflight import pair_problems
from dbscale.launch.study import base_cost, load_study, plan_study
from dbscale.study.cost import DEVICES, Calibration, CostModel, Measured, read_calibration
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


def test_the_time_left_is_told_for_this_machines_workers(where: list[str], tmp_path: Path) -> None:
    def told(cluster: str, *overrides: str) -> str:
        study = load_study(
            grid=Path(where[1]), cluster=cluster, store=tmp_path / "out", data=tmp_path, overrides=overrides
        )
        plan = SimpleNamespace(predicted_s=600.0, todo=())
        return device_time(study, plan, base_cost(study))  # type: ignore[arg-type]

    assert told("local", "cluster.workers=2") == "10 min of cpu time left, 5 min on 2 workers"
    assert told("local", "cluster.workers=1") == "10 min of cpu time left, 10 min on 1 worker"
    assert told("inline") == "10 min of cpu time left"


def test_a_calibration_is_told_in_one_line_a_cell() -> None:
    measured = Measured(
        cell="pretrain-a", stage="pretrain", num_steps=40, step_flops=3e9, step_time_s=0.0456, overhead_s=1.0
    )
    found = Calibration(
        host="here", device="cpu", created=0.0, flops_per_s=1e11, step_overhead_s=0.002, cell_overhead_s=0.5,
        stage_scale={"pretrain": 1.5}, measured=(measured,),
    )  # fmt: skip
    first, second = describe_calibration(found, CostModel(DEVICES["cpu"]).probed(found)).splitlines()
    assert first == "calibrated on here (cpu): 100.0 GFLOP/s, 2.00 ms a step, 0.50 s a cell"
    assert second == "  pretrain-a: 45.60 ms a step over 40, model 48.00 ms"  # 1.5 · (3e9 / 1e11 + .002) s


def test_a_probe_trains_as_long_as_its_share_and_counts_the_rest_as_overhead(monkeypatch: Any) -> None:
    asked: list[int] = []

    def ran(study: object, store: object, cell: object, num_steps: int) -> tuple[Any, float]:
        asked.append(num_steps)
        timing = SimpleNamespace(step_time_s=0.02, train_time_s=1.25)
        return SimpleNamespace(num_steps=num_steps, timing=timing), 3.0

    monkeypatch.setattr(plan_command, "_run", ran)
    monkeypatch.setattr(plan_command, "step_flops", lambda cell: 7.0)
    cell = SimpleNamespace(key="pretrain-a", recipe=SimpleNamespace(stage="pretrain"))
    found = plan_command.measure(None, None, cell, 2.0)  # type: ignore[arg-type]
    assert asked == [plan_command.WARMUP_STEPS, 100] and (found.num_steps, found.overhead_s) == (100, 1.75)


def test_what_is_left_of_the_time_is_shared_among_the_probes_to_come(where: list[str], monkeypatch: Any) -> None:
    clock, shares = [100.0], list[float]()

    def measure(study: object, store: object, cell: Any, share_s: float) -> Measured:
        shares.append(share_s)
        clock[0] += 5.0  # each takes longer than it was given
        stage = cell.recipe.stage
        return Measured(cell=cell.key, stage=stage, num_steps=9, step_flops=1e9, step_time_s=0.1, overhead_s=0.0)

    monkeypatch.setattr(plan_command, "measure", measure)
    monkeypatch.setattr(plan_command.time, "monotonic", lambda: clock[0])
    assert main(["shards", "pack", "--grid", where[1], "--data", where[5]]) == 0
    assert main(["plan", "--calibrate", "12", "--cluster", "inline", *where]) == 0
    count = len(shares)
    assert count > 2
    expected = [max((12 - 5 * number) / (count - number), plan_command.LEAST_SHARE_S) for number in range(count)]
    assert shares == pytest.approx(expected)


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


@pytest.mark.parametrize("path", [*PAPER, *(ROOT / "configs" / "grids").glob("*.yaml")], ids=lambda path: path.stem)
def test_every_shipped_grid_pairs_models_whose_attention_can_be_compared(path: Path, tmp_path: Path) -> None:
    study = load_study(grid=path, cluster="inline", store=tmp_path / "out", data=tmp_path)
    assert not list(pair_problems(plan_study(study)[0].cells))


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
