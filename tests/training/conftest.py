"""A tiny packed dataset, tiny cells on it, and ways to run and to kill them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dbscale.data import load_manifest
from dbscale.shards.pack import ensure_packed
from dbscale.study.cell import Cell
from dbscale.study.recipe import Augment, Budget, Data, DeiT, Distill, Optim, Recipe, Training
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Store
from dbscale.training import results, run
from dbscale.training.loop import Run
from tests.training.end_state import end_hash

DATASETS: dict[str, dict[str, Any]] = {
    "up": {"source": "fractals", "families": 6, "num_train": 96, "num_test": 50, "image_size": 16},
    "down": {"source": "fractals", "families": 3, "first_family": 6, "num_train": 48, "num_test": 30, "image_size": 16},
    "masks": {"source": "fractal_masks", "families": 3, "num_train": 32, "num_test": 21, "image_size": 16},
    "boxes": {"source": "fractal_boxes", "families": 3, "num_train": 32, "num_test": 21, "image_size": 32},
}
PLAIN = Resources(zero_stage=None, threads=1)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, spec in DATASETS.items():
        ensure_packed(name, spec, folder)
    return folder


@dataclass
class StopAfter(StopRequest):
    """Asks to stop once the loop has looked at it `steps` times, that is after that many steps of one attempt."""

    steps: int = 1
    looks: list[None] = field(default_factory=list)

    @property
    def requested(self) -> bool:
        self.looks.append(None)
        if len(self.looks) >= self.steps:
            self.reason = "SIGUSR2"
        return len(self.looks) >= self.steps


@dataclass
class Bench:
    """A store, its data, and cells in it."""

    store: Store
    data_dir: Path
    end_states: dict[str, str] = field(default_factory=dict)
    """Hash of optimizer state and EMA after the last step, by cell."""

    def cell(
        self,
        stage: str = "pretrain",
        *,
        teacher: Cell | None = None,
        init: Cell | None = None,
        model: Any = None,
        distill: Distill | None = None,
        dataset: str | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        fingerprint: str | None = None,
        task: Any = None,
        image_size: int = 16,
        tier: Any = "resident",
        **training: Any,
    ) -> Cell:
        """A tiny cell, written to the store; `training` overrides fields of the recipe's Training."""
        dataset = dataset or ("down" if stage == "finetune" else "up")
        defaults: dict[str, Any] = {
            "budget": Budget(steps=12),
            "optim": Optim(lr=1e-3, warmup_share=0.25, clip_norm=1.0),
            "global_batch": 16,
            "precision": "fp32",
            "augment": Augment(crop_padding=1, hflip=0.5),
            "label_smoothing": 0.1,
            "drop_path": 0.1,
        }
        recipe = Recipe(
            stage=stage,  # type: ignore[arg-type]
            model=model or DeiT(heads=2, head_width=8, depth=2, patch_size=4),
            data=Data(dataset=dataset, num_samples=num_samples or (40 if dataset == "up" else 24),
                      image_size=image_size, tier=tier),
            training=Training(**{**defaults, **training}),
            seed=seed,
            distill=distill or (Distill() if stage == "distill" else None),
            task=task,
        )  # fmt: skip
        fingerprint = fingerprint or load_manifest(self.data_dir / "shards" / dataset).fingerprint
        cell = Cell(recipe, fingerprint, teacher=teacher, init=init)
        self.store.write_spec(cell.spec())
        return cell

    def run(self, cell: Cell, resources: Resources = PLAIN, stop: StopRequest | None = None) -> run.Outcome:
        return run.run_cell(
            self.store, cell.key, data_dir=self.data_dir, resources=resources, stop=stop or StopRequest()
        )

    def run_killed(self, cell: Cell, arm: Callable[[], None], resources: Resources = PLAIN) -> int:
        """Run in a forked child in which `arm` has set a trap that kills it; the signal it died of (0: it lived)."""
        pid = os.fork()
        if pid == 0:
            try:
                arm()
                self.run(cell, resources)
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

    def weights(self, cell: Cell) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(self.store.cell_dir(cell.key) / "model.safetensors")

    def fingerprint(self, cell: Cell) -> dict[str, Any]:
        """All that a finished cell left, timings apart."""
        folder = self.store.cell_dir(cell.key)
        row = json.loads((folder / "row.json").read_text())
        del row["timing"], row["seal"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            del line["images_per_s"]
        correct = hashlib.sha256((folder / "correct.npz").read_bytes()).hexdigest()
        return {"row": row, "metrics": lines, "correct": correct, "end": self.end_states.get(cell.key)}


@pytest.fixture
def bench_of(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Bench]:
    """Benches with stores of their own, whose cells note the optimizer's last state."""
    made: dict[Path, Bench] = {}
    original = results.finish_training

    def noting(finished: Run, spec: Any, store: Store) -> results.Trained | None:
        made[store.root].end_states[spec.key] = end_hash(finished)
        return original(finished, spec, store)

    monkeypatch.setattr(run, "finish_training", noting)

    def make(name: str) -> Bench:
        root = tmp_path / name
        made[root] = Bench(Store(root), data_dir)
        return made[root]

    return make


@pytest.fixture
def bench(bench_of: Callable[[str], Bench]) -> Bench:
    return bench_of("store")


@pytest.fixture
def stop_after() -> Callable[[int], StopRequest]:
    return lambda steps: StopAfter(steps=steps)


@pytest.fixture
def kill_on_call() -> Callable[..., Callable[[], None]]:
    """`kill_on_call(owner, name, n)` arms a trap: the n-th call of owner.name kills the process at its entry."""

    def make(owner: Any, name: str, call: int = 1) -> Callable[[], None]:
        def arm() -> None:
            original, count = getattr(owner, name), iter(range(1, 1_000_000))

            def trapped(*arguments: Any, **keywords: Any) -> Any:
                if next(count) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **keywords)

            setattr(owner, name, trapped)

        return arm

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Ranks:
    """Starts `world_size` processes that run cells together."""

    folder: Path
    data_dir: Path
    ports: list[int] = field(default_factory=list)
    """Of the starts so far."""

    def run(
        self, runs: list[dict[str, Any]], world_size: int = 2, timeout_s: float = 900
    ) -> list[list[dict[str, Any]]]:
        """One list of results per rank; a rank that was killed has none."""
        number = len(list(self.folder.glob("job-*.json")))
        job = self.folder / f"job-{number}.json"
        job.write_text(json.dumps({"data_dir": str(self.data_dir), "runs": runs}))
        port = _free_port()
        self.ports.append(port)
        processes = [
            self._start(job, self.folder / f"job-{number}-{rank}.log", _rank_variables(rank, world_size, port))
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.wait(timeout=timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        outputs = [Path(f"{job}.{rank}") for rank in range(world_size)]
        if not any("kill_rank" in each for each in runs):
            logs = [(self.folder / f"job-{number}-{rank}.log").read_text() for rank in range(world_size)]
            assert all(path.exists() for path in outputs), "\n".join(log[-3000:] for log in logs)
        return [json.loads(path.read_text()) if path.exists() else [] for path in outputs]

    @staticmethod
    def _start(job: Path, log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(Path(__file__).with_name("rank_script.py")), str(job)]
        with log.open("w") as file:
            return subprocess.Popen(command, env=os.environ | variables, stdout=file, stderr=subprocess.STDOUT)


def _rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def ranks(data_dir: Path, tmp_path: Path) -> Ranks:
    folder = tmp_path / "ranks"
    folder.mkdir()
    return Ranks(folder, data_dir)
