"""A real SLURM for the tests: raised once, torn down at the end; and a workplace whose jobs run on it.

Needs root and Debian's slurm-wlm, slurmdbd, munge and mariadb-server (`tests/slurm/sandbox.sh install`). Without them
the tests skip with the reason, unless DBSCALE_REQUIRE_SLURM=1 says that they must run. With SANDBOX_DIR set, the
sandbox of that folder is used and left standing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
CLUSTER = {
    "executor": "slurm",
    "target_min": 60,
    "requeue_limit": 8,
    "resources": {"threads": 1, "zero_stage": None, "device": "cpu", "checkpoint_interval_s": 1},
    "slurm": {"partition": "low", "time_limit_min": 10, "signal_delay_s": 60, "array_parallelism": 4},
    "reducer": {"memory_gb": 0.5},
}

TRAINING = {"budget": {"steps": 60}, "optim": {"lr": 1e-3}, "global_batch": 16, "precision": "fp32"}
GRID = {
    "name": "ranks", "question": "Do two nodes train as one?", "image_size": 32,
    "datasets": {"digits": {"source": "digits", "image_size": 32}},
    "upstream": {"dataset": "digits", "num_samples": [64]},
    "downstream": [{"dataset": "digits", "num_samples": [32]}],
    "models": {"h1": {"kind": "deit", "heads": 1, "head_width": 16, "depth": 2, "patch_size": 8},
               "h2": {"kind": "deit", "heads": 2, "head_width": 16, "depth": 2, "patch_size": 8}},
    "students": ["h2"], "teachers": {"h2": "h1"}, "seeds": [0],
    "pretrain": TRAINING, "finetune": TRAINING, "distill": {"alpha": 0.5},
}  # fmt: skip
TIMED = ("timing", "resources", "seal")


def load(path: Path) -> ModuleType:
    """A module that is no package's."""
    spec = importlib.util.spec_from_file_location(f"dbscale_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cluster = load(HERE / "cluster.py")
_launch = load(HERE.parent / "launch" / "conftest.py")
workplace, wait_until, num_cells = _launch.workplace, _launch.wait_until, _launch.num_cells
"""The same stand-ins for training as the launch tests use."""


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    reason = cluster.missing()
    if reason is not None:
        if os.environ.get("DBSCALE_REQUIRE_SLURM") == "1":
            pytest.fail(f"DBSCALE_REQUIRE_SLURM=1, but {reason}")
        pytest.skip(reason)
    kept = os.environ.get("SANDBOX_DIR")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("slurm") / "sandbox"
    wanted = {"DIR": folder, "GRACE": 4, "CRED_EXPIRE": 5, "KILLWAIT": 3, "TIMEOUT": 120, "ARRAY": 3}
    with contextlib.nullcontext() if kept else cluster.own_ports(8) as port, pytest.MonkeyPatch.context() as patch:
        if port is not None:
            wanted["PORT"] = port
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        raised = cluster.Sandbox({**os.environ, **{f"SANDBOX_{name}": str(value) for name, value in wanted.items()}})
        try:
            raised.script("up")
            yield raised
        finally:
            if not kept:
                raised.script("down", "--wipe")
        assert kept or not cluster.left_over(folder)


@pytest.fixture(scope="session")
def faults() -> ModuleType:
    """chaos.py"""
    return load(HERE / "chaos.py")


@pytest.fixture
def place(workplace: Any, sandbox: Any) -> Iterator[Any]:
    """A workplace whose `make grid` goes to the sandbox."""
    (workplace.folder / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    environment = {**workplace.environment, "SLURM_CONF": sandbox.environment["SLURM_CONF"]}
    yield replace(workplace, environment=environment)
    sandbox.clear()


@pytest.fixture
def submit(place: Any) -> Callable[..., Any]:
    """`make grid CLUSTER=…` as typed on a login node."""
    return lambda *options: place.run("submit", "--cluster", str(place.folder / "cluster.yaml"), *options)


@pytest.fixture
def all_ended(sandbox: Any, wait_until: Callable[..., None]) -> Callable[..., None]:
    """Wait until nothing waits or runs."""
    return lambda timeout_s=300.0: wait_until(lambda: not sandbox.jobs(), timeout_s)


@pytest.fixture
def real(place: Any, tmp_path: Path) -> Callable[..., Any]:
    """Makes workplaces with the real training that share one folder of data; wide: more cells."""

    def make(name: str, *, steps: int = 60, wide: bool = False) -> Any:
        folder = tmp_path / name
        folder.mkdir()
        training = {**TRAINING, "budget": {"steps": steps}}
        grid = {**GRID, "pretrain": training, "finetune": training}
        if wide:
            grid["upstream"] = {"dataset": "digits", "num_samples": [64, 128]}
        (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
        (folder / "data").symlink_to(tmp_path / "shared-data", target_is_directory=True)
        (tmp_path / "shared-data").mkdir(exist_ok=True)
        (folder / "cluster.yaml").write_text((place.folder / "cluster.yaml").read_text())
        environment = {**place.environment, "PYTHONPATH": str(HERE.parents[1])}
        return replace(place, folder=folder, environment=environment)

    return make


@pytest.fixture
def results() -> Callable[[Any], dict[str, Any]]:
    """Every row without what is measured by the clock, and the bits that say which test samples were right."""

    def read(place: Any) -> dict[str, Any]:
        rows = {key: json.loads(text) for key, text in place.rows().items()}
        bits = {key: (place.store.cell_dir(key) / "correct.npz").read_bytes() for key in rows}
        return {
            key: ({name: value for name, value in row.items() if name not in TIMED}, bits[key])
            for key, row in rows.items()
        }

    return read
