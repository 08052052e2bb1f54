"""Real training on a real SLURM: one task per rank over two nodes, DDP and ZeRO, killed and resumed to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
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
TIMED = ("timing", "resources")


@pytest.fixture
def real(place: Any, tmp_path: Path) -> Callable[[str], Any]:
    """A workplace of its own name with the real training, sharing one folder of data."""

    def make(name: str) -> Any:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
        (folder / "data").symlink_to(tmp_path / "shared-data", target_is_directory=True)
        (tmp_path / "shared-data").mkdir(exist_ok=True)
        (folder / "cluster.yaml").write_text((place.folder / "cluster.yaml").read_text())
        environment = {**place.environment, "PYTHONPATH": str(ROOT)}
        return replace(place, folder=folder, environment=environment)

    return make


def results(place: Any) -> dict[str, Any]:
    """Every row without what is measured by the clock."""
    rows = {key: json.loads(text) for key, text in place.rows().items()}
    return {key: {name: value for name, value in row.items() if name not in TIMED} for key, row in rows.items()}


@pytest.mark.parametrize("zero_stage", ["null", "1", "3"])
def test_a_killed_rank_costs_time_and_no_bit(
    real: Callable[[str], Any],
    sandbox: Any,
    wait_until: Callable[..., None],
    all_ended: Callable[[], None],
    zero_stage: str,
) -> None:
    shape = [f"cluster.resources.zero_stage={zero_stage}", "cluster.resources.num_processes=2", "cluster.slurm.nodes=2"]
    options = [word for each in shape for word in ("--set", each)]
    quiet, shaken = real("quiet"), real("shaken")
    for place in (quiet, shaken):
        done = place.run("submit", "--cluster", str(place.folder / "cluster.yaml"), *options)
        assert done.returncode == 0, done.stderr
        if place is shaken:
            wait_until(lambda: any((shaken.store.root / "cells").glob("*/progress.json")), 300)
            assert sandbox.kill_rank(sandbox.jobs("RUNNING")[0])
        all_ended()
    assert len(results(quiet)) == 5
    assert results(shaken) == results(quiet)
    assert max(len(shaken.store.attempts(key)) for key in shaken.done()) > 1
