"""The whole loop as a user runs it: real shards, real training through Accelerate and DeepSpeed, real report.

Three cells (teacher, distilled student, finetune) through the command itself, in processes of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dbscale.study.store import Store

ROOT = Path(__file__).parents[1]
GRID = """
name: tiny
question: Does the whole loop run?
datasets:
  fractals: {source: fractals, families: 4, num_train: 64, num_test: 32, image_size: 32}
  digits: {source: digits, image_size: 32}
upstream: {dataset: fractals, num_samples: [48]}
downstream: [{dataset: digits, num_samples: [40]}]
image_size: 32
models:
  h1: {kind: deit, heads: 1, head_width: 16, depth: 2, patch_size: 8}
  h2: {kind: deit, heads: 2, head_width: 16, depth: 2, patch_size: 8}
students: [h2]
teachers: {h2: h1}
arms: [distilled]
seeds: [0]
pretrain: {budget: {steps: STEPS}, global_batch: 16, precision: fp32, optim: {lr: 1e-3}}
distill: {alpha: 0.5, temperature: 3.0, attention: {beta: 0.1}}
finetune: {budget: {steps: 8}, global_batch: 16, precision: fp32, optim: {lr: 1e-3}}
"""


class Study:
    """A grid, a store and the command, in one folder."""

    def __init__(self, folder: Path, data: Path, num_steps: int) -> None:
        folder.mkdir(parents=True)
        self.grid = folder / "tiny.yaml"
        self.grid.write_text(GRID.replace("STEPS", str(num_steps)))
        self.folder, self.data, self.store = folder, data, Store(folder / "out")

    def command(self, name: str, *options: str) -> list[str]:
        where = ["--grid", str(self.grid), "--store", str(self.store.root), "--data", str(self.data)]
        return [sys.executable, "-m", "dbscale.launch.cli", name, *where, *options]

    def run(self, name: str, *options: str) -> str:
        done = subprocess.run(
            self.command(name, *options), cwd=ROOT, capture_output=True, text=True, check=False, timeout=500
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def all_keys(self) -> list[str]:
        return [path.name for path in (self.store.root / "cells").iterdir()]

    def keys(self) -> dict[str, str]:
        """Cell keys by stage."""
        return {key.partition("-")[0]: key for key in self.all_keys()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Study:
    """A study run once, undisturbed."""
    study = Study(tmp_path_factory.mktemp("study") / "calm", data, num_steps=60)
    study.run("submit")
    return study


def test_three_cells_end_in_rows_and_a_report(finished: Study) -> None:
    keys = finished.keys()
    assert set(keys) == {"pretrain", "distill", "finetune"}
    rows = {stage: finished.store.read_row(key) for stage, key in keys.items()}
    for stage, row in rows.items():
        assert row is not None, stage
        assert 0 <= row.error_rate <= 1
        assert row.train_loss > 0
    finetune, distill = rows["finetune"], rows["distill"]
    assert finetune is not None and distill is not None
    assert finetune.arm == "distilled"
    assert finetune.upstream is not None and finetune.upstream.num_samples == 48
    assert distill.teacher == keys["pretrain"]
    grid_folder = finished.store.grid_dir("tiny")
    for name in ("plan.json", "rows.csv", "rows.parquet", "laws.json", "boundary.json", "report.html"):
        assert (grid_folder / name).stat().st_size > 0, name
    assert "http" not in (grid_folder / "report.html").read_text().partition("<body")[0].replace("http-equiv", "")


def test_the_weights_load_into_plain_timm(finished: Study) -> None:
    code = (
        "import sys, timm\n"
        "model = timm.create_model('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=32, depth=2,\n"
        "                          num_heads=2, num_classes=10, checkpoint_path=sys.argv[1])\n"
    )
    weights = finished.store.cell_dir(finished.keys()["finetune"]) / "model.safetensors"
    subprocess.run([sys.executable, "-c", code, str(weights)], check=True, timeout=200)


def test_typed_again_it_runs_nothing(finished: Study) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished.store.root / "cells").rglob("*.json")}
    said = finished.run("submit")
    assert "done" in said
    assert {path: path.stat().st_mtime_ns for path in (finished.store.root / "cells").rglob("*.json")} == before


def test_a_new_seed_runs_only_new_cells(finished: Study, tmp_path: Path) -> None:
    said = finished.run("plan", "--set", "seeds=[0, 1]")
    assert "new" in said and "done" in said
    line = next(line for line in said.splitlines() if line.startswith("finetune"))
    assert line.split()[1:] == ["1", "1"], "one finetune done, one new"


@pytest.fixture
def killed(tmp_path: Path, data: Path, finished: Study) -> Iterator[Study]:
    """The same study, everything killed by SIGKILL while its first cell trains past a checkpoint."""
    study = Study(tmp_path / "killed", data, num_steps=60)
    driver = subprocess.Popen(
        study.command("submit", "--set", "cluster.resources.checkpoint_interval_s=0.01"),
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: list(study.store.root.glob("cells/pretrain-*/checkpoints/step-*")), driver)
        worker = json.loads(next(study.store.root.glob("cells/pretrain-*/attempts/1.json")).read_text())["pid"]
        os.kill(worker, signal.SIGKILL)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        yield study
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)


def wait_for(condition: object, process: subprocess.Popen[bytes]) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "the run did not get that far"
        assert process.poll() is None, "the command ended before it could be killed"
        time.sleep(0.01)


def test_killed_and_resumed_ends_with_the_same_bits(killed: Study, finished: Study) -> None:
    pretrain = next(path.name for path in (killed.store.root / "cells").glob("pretrain-*"))
    assert killed.store.read_row(pretrain) is None, "it was killed in the middle"
    killed.run("submit")
    assert len(killed.store.attempts(pretrain)) >= 2
    assert (killed.store.attempts(pretrain)[-1].resumed_from_step or 0) > 0
    for key in killed.keys().values():
        ours, theirs = killed.store.read_row(key), finished.store.read_row(key)
        assert ours is not None and theirs is not None
        assert ours.model_copy(update={"timing": theirs.timing}) == theirs


@pytest.mark.slow
def test_workers_killed_at_random_write_the_bits_of_one(tmp_path: Path, data: Path) -> None:
    """Real training: three workers on one store, four of them killed, against one worker that nobody disturbed."""
    options = ("--no-report", "--set", "cluster.resources.checkpoint_interval_s=0.05", "--set", "seeds=[0, 1]")
    calm, wild = (Study(tmp_path / name, data, num_steps=300) for name in ("calm", "wild"))
    calm.run("work", *options)

    def start() -> subprocess.Popen[bytes]:
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(wild.command("work", *options), cwd=ROOT, **silent)

    crew = [start() for _ in range(3)]
    for victim in (0, 1, 0, 2):
        before = {path for path in wild.store.root.glob("cells/*/checkpoints/step-*")}
        wait_for(lambda: set(wild.store.root.glob("cells/*/checkpoints/step-*")) - before, crew[victim])  # noqa: B023
        crew[victim].kill()
        crew[victim].wait()
        crew[victim] = start()
    assert [each.wait(timeout=600) for each in crew] == [0, 0, 0]
    keys = sorted(path.name for path in (calm.store.root / "cells").iterdir())
    attempts = [attempt for key in keys for attempt in wild.store.attempts(key)]
    assert sum(attempt.status == "done" for attempt in attempts) == len(keys)
    assert any(attempt.resumed_from_step for attempt in attempts), "somebody went on where another was killed"
    for key in keys:
        ours, theirs = wild.store.read_row(key), calm.store.read_row(key)
        assert ours is not None and theirs is not None
        assert ours.model_copy(update={"timing": theirs.timing}) == theirs


def test_a_model_and_the_figures_of_a_table_are_exported(finished: Study) -> None:
    key = finished.keys()["finetune"]
    folder = finished.store.root / "exports" / key
    assert finished.run("export", key).rstrip().endswith(str(folder))
    assert (folder / "model.safetensors").stat().st_size and (folder / "README.md").stat().st_size
    table = next(finished.store.root.glob("grids/*/rows.csv"))
    copy = finished.folder / "elsewhere" / "rows.csv"
    copy.parent.mkdir()
    copy.write_bytes(table.read_bytes())
    said = subprocess.run(
        [sys.executable, "-m", "dbscale.launch.cli", "export", "--table", str(copy)], cwd=ROOT, capture_output=True,
        text=True, check=True, timeout=300,
    ).stdout.splitlines()  # fmt: skip
    figures = copy.parent / "figures"
    assert said and {Path(line).parent for line in said} == {figures}
    assert set(map(Path, said)) == {path for path in figures.iterdir() if path.suffix in (".svg", ".pdf")}


@pytest.mark.parametrize("command", ["reduce", "report"])
def test_cells_left_out_for_damage_are_named(finished: Study, tmp_path: Path, command: str) -> None:
    shutil.copytree(finished.store.root, tmp_path / "out")
    key = finished.keys()["finetune"]
    path = tmp_path / "out" / "cells" / key / "row.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    said = finished.run(command, "--store", str(tmp_path / "out"))
    assert f"damaged, left out: {key}: {path}" in said
    assert "left out for damage: 1 cell; `dbscale submit` runs what is missing" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible")
def test_cells_side_by_side_on_a_gpu_give_the_rows_of_cells_in_turn(tmp_path: Path, data: Path) -> None:
    """README's `--cluster shared_gpu`: seeds share the device, and no row knows of its companions."""
    rows = []
    for name, options in (("together", []), ("in turn", ["--set", "cluster.cells_per_device=1"])):
        study = Study(tmp_path / name, data, 60)
        study.run("submit", "--cluster", "shared_gpu", "--set", "seeds=[0,1,2]", "--no-report", *options)
        found = {key: study.store.read_row(key) for key in study.all_keys()}
        assert {row.timing.device for row in found.values()} == {torch.cuda.get_device_name()}
        rows.append({key: row.model_dump(exclude={"timing"}) for key, row in found.items()})
    assert len(rows[0]) == 9 and rows[0] == rows[1]


def test_a_teacher_from_a_file_goes_through_submit(finished: Study, tmp_path: Path, data: Path) -> None:
    """Planned, imported, tried for a step, trained: with the teacher's weights the student is bitwise the same."""
    keys = finished.keys()
    weights = finished.store.cell_dir(keys["pretrain"]) / "model.safetensors"
    (data / "teacher.safetensors").write_bytes(weights.read_bytes())
    study = Study(tmp_path / "foreign", data, num_steps=60)
    model = "{kind: deit, heads: 1, head_width: 16, depth: 2, patch_size: 8}"
    teacher = f"{{h2: {{checkpoint: teacher.safetensors, model: {model}}}}}"
    study.grid.write_text(study.grid.read_text().replace("teachers: {h2: h1}", f"teachers: {teacher}"))
    assert "not imported yet: teacher.safetensors" in study.run("plan")
    study.run("submit", "--no-report")
    assert set(study.keys()) == {"distill", "finetune"}
    ours, theirs = (each.store.read_row(each.keys()["distill"]) for each in (study, finished))
    assert ours is not None and theirs is not None
    assert ours.weights_sha256 == theirs.weights_sha256
    assert ours.weights_from["teacher"].source == "teacher.safetensors"
    assert "not imported" not in study.run("plan")
