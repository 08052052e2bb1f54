"""A grid small enough to read at a glance, as plain data and as a Grid."""

from __future__ import annotations

from typing import Any

import pytest

from dbscale.strict import validate
from dbscale.study.grid import Grid

TRAINING = {"budget": {"steps": 10}, "optim": {"lr": 1e-3}, "global_batch": 8, "precision": "fp32"}


@pytest.fixture
def grid_data() -> dict[str, Any]:
    return {
        "name": "tiny",
        "question": "Does it work?",
        "datasets": {"up": {"source": "fractals"}, "down": {"source": "digits"}},
        "upstream": {"dataset": "up", "num_samples": [16, 32]},
        "downstream": [{"dataset": "down", "num_samples": [10, 20, 30]}],
        "image_size": 32,
        "models": {
            "h1": {"kind": "deit", "heads": 1, "head_width": 16, "depth": 2, "patch_size": 8},
            "h2": {"kind": "deit", "heads": 2, "head_width": 16, "depth": 2, "patch_size": 8},
        },
        "students": ["h1", "h2"],
        "teachers": {"h2": "h1"},
        "seeds": [0, 1],
        "pretrain": TRAINING,
        "finetune": TRAINING,
        "distill": {"alpha": 0.5, "temperature": 3.0},
    }


@pytest.fixture
def grid(grid_data: dict[str, Any]) -> Grid:
    return validate(Grid, grid_data, where="tiny.yaml")
