"""Tables that several law tests share: small simulated grids, and the public tables where they are at hand."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def public_tables() -> Path:
    """The folder of published scaling-law tables (env DBSCALE_SHARED, or ../shared beside the checkout)."""
    beside = Path(__file__).resolve().parents[3] / "shared"
    folder = Path(os.environ.get("DBSCALE_SHARED", beside)) / "data" / "laws"
    if not folder.is_dir():
        pytest.skip("the public tables (shared/data/laws) are not here; set DBSCALE_SHARED to their shared folder")
    return folder


@pytest.fixture(scope="session")
def chinchilla(public_tables: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns and losses of 2404.10102 without the five largest losses."""
    with (public_tables / "chinchilla.csv").open() as file:
        rows = np.array([[float(v) for v in row.values()] for row in csv.DictReader(file)])
    size, flops, loss = rows[np.argsort(rows[:, 2])[:-5]].T
    return {"num_params": size, "num_samples": flops / (6 * size)}, loss


@pytest.fixture(scope="session")
def grid() -> dict[str, np.ndarray]:
    """A study's grid: 5 × D_p, 3 × M, 3 × D_f, 2 seeds."""
    axes = ([1e3, 4e3, 1.6e4, 6.4e4, 2.56e5], [2.5e6, 1e7, 3.8e7], [300.0, 1000.0, 3000.0], [0.0, 1.0])
    columns = [c.ravel() for c in np.meshgrid(*axes, indexing="ij")]
    return dict(zip(("upstream_samples", "num_params", "downstream_samples"), columns[:3], strict=True))


@pytest.fixture(scope="session")
def arms(grid) -> dict[str, np.ndarray]:
    """Errors of both arms on the grid, 1 % noise: distilled is flatter, so ΔE crosses zero at D_p = 22,766."""
    rng = np.random.default_rng(0)
    rest = 0.03 + 20 * grid["num_params"] ** -0.35 + 1.5 * grid["downstream_samples"] ** -0.35
    clean = {
        "plain": rest + 6 * grid["upstream_samples"] ** -0.35,
        "distilled": rest + 2.2 * grid["upstream_samples"] ** -0.25,
    }
    return {arm: y * np.exp(0.01 * rng.standard_normal(len(y))) for arm, y in clean.items()}
