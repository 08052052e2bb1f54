"""A tiny grid on disk, stand-ins for training in this process and in subprocesses, and `dbscale` as a user types it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from dbscale.study.store import Store

FAKES = Path(__file__).parent / "fakes"
ROOT = Path(__file__).parents[2]
TRAINING = {"budget": {"steps": 10}, "optim": {"lr": 1e-3}, "global_batch": 8, "precision": "fp32"}
GRID = {
    "name": "tiny",
    "question": "Does it work?",
    "datasets": {"up": {"source": "fractals"}, "down": {"source": "digits"}},
    "upstream": {"dataset": "up", "num_samples": [16, 32]},
    "downstream": [{"dataset": "down", "num_samples": [10, 20]}],
    "image_size": 32,
    "models": {
        "h1": {"kind": "deit", "heads": 1, "head_width": 16, "depth": 2, "patch_size": 8},
        "h2": {"kind": "deit", "heads": 2, "head_width": 16, "depth": 2, "patch_size": 8},
    },
    "students": ["h1", "h2"],
    "teachers": {"h2": "h1"},
    "seeds": [0],
    "pretrain": TRAINING,
    "finetune": TRAINING,
    "distill": {"alpha": 0.5, "temperature": 3.0},
}
"""4 pretrain cells, 2 distill cells, 12 finetunes."""
NUM_CELLS = 18


@dataclass(frozen=True)
class Workplace:
    """A folder with a grid, a store and data, and the command line over them."""

    folder: Path
    environment: dict[str, str]

    @property
    def store(self) -> Store:
        return Store(self.folder / "out")

    @property
    def where(self) -> list[str]:
        return [
            "--grid",
            str(self.folder / "grid.yaml"),
            "--store",
            str(self.store.root),
            "--data",
            str(self.folder / "data"),
        ]

    def start(self, command: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """`dbscale COMMAND` in a process of its own, with the stand-ins."""
        words = [sys.executable, "-m", "dbscale.launch.cli", command, *self.where, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words, env=self.environment, cwd=self.folder, **{**pipes, **options})

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(command, *arguments)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def behave(self, **wanted: Any) -> None:
        """How the stand-in for training should (mis)behave."""
        self.store.root.mkdir(parents=True, exist_ok=True)
        new = self.store.root / "fake.json.new"
        new.write_text(json.dumps(wanted))
        new.replace(self.store.root / "fake.json")

    def done(self) -> list[str]:
        return sorted(path.parent.name for path in self.store.root.glob("cells/*/row.json"))

    def rows(self) -> dict[str, str]:
        """Every row's text by key."""
        return {key: (self.store.cell_dir(key) / "row.json").read_text() for key in self.done()}

    def steps(self) -> dict[str, list[int]]:
        """The steps each cell took, over all attempts."""
        paths = self.store.root.glob("cells/*/steps.txt")
        return {path.parent.name: [int(line) for line in path.read_text().split()] for path in paths}


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    path = os.pathsep.join([str(FAKES), str(ROOT)])
    return Workplace(tmp_path, {**os.environ, "PYTHONPATH": path})


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The stand-ins, installed in this process for one test."""
    spec = importlib.util.spec_from_file_location("launch_fakes", FAKES / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for name, stand_in in module.modules().items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    return module


@pytest.fixture
def num_cells() -> Iterator[int]:
    yield NUM_CELLS


@pytest.fixture
def wait_until() -> Callable[..., None]:
    import time

    def wait(condition: Callable[[], Any], timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.05)

    return wait


SLURM_CLUSTER = {
    "executor": "slurm",
    "target_min": 0.005,
    "requeue_limit": 5,
    "slurm": {"partition": "gpu", "gpus_per_node": 1, "memory_gb": 4, "setup": ["module load cuda"]},
}


@pytest.fixture
def slurm(tmp_path: Path, workplace: Any, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the fake SLURM; its commands come first on PATH."""
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(SLURM_CLUSTER))
    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setenv("PATH", f"{FAKES / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def submit(slurm: Path, workplace: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*options: str, command: str = "submit") -> tuple[int, str, str]:
        cluster = ["--cluster", str(workplace.folder / "cluster.yaml")] if command != "status" else []
        from dbscale.launch.cli import main

        code = main([command, *workplace.where, *cluster, *options])
        out, err = capsys.readouterr()
        return code, out, err

    return run
