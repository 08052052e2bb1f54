"""Every example runs as it stands, in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from dbscale.study.store import Store

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_notebook_goes_from_a_table_to_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("docs", "dbscale"):
        (tmp_path / name).symlink_to(EXAMPLES.parent / name)
    # A kernel writes its connection file, history and settings into these; not into the user's.
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(EXAMPLES / "table_to_figure.ipynb", as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # the kernel's client is not ours to keep clean
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "table_to_figure.svg").read_text().startswith("<svg")
    results = [output["data"]["text/plain"] for cell in notebook.cells for output in cell.get("outputs", [])
               if output["output_type"] == "execute_result"]  # fmt: skip
    assert results[-1] == "('undecided', 2)"


def dbscale(*words: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run([sys.executable, "-m", "dbscale.launch.cli", *words], cwd=folder, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_study_of_ones_own_parts_runs_in_workers(tmp_path: Path) -> None:
    """Model, source, loss term and metric of a file beside the grid, in processes that a driver starts."""
    grid = EXAMPLES / "plugins" / "stripes.yaml"
    where = ["--grid", str(grid), "--store", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
    dbscale("submit", *where, "--no-report", folder=tmp_path)
    store = Store(tmp_path / "out")
    rows = [store.read_row(path.parent.name) for path in store.root.glob("cells/*/row.json")]
    assert sorted(row.stage for row in rows if row) == ["finetune", "pretrain"]
    for row in rows:
        assert row is not None
        assert row.model == "pooled_patches" and row.dataset == "stripes" and row.num_classes == 2
        assert 0 < row.metrics["brier"] < 2
        recipe = json.loads((store.cell_dir(row.key) / "recipe.json").read_text())["recipe"]
        assert set(recipe["plugins"]) == {"parts"}
    (cell,) = store.root.glob("cells/pretrain-*")
    refused = subprocess.run([sys.executable, "-m", "dbscale.launch.cli", "run", cell.name, "--store", str(store.root),
                              "--data", str(tmp_path / "data")], cwd=tmp_path, capture_output=True, text=True, check=False,
                             env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)})  # fmt: skip
    assert refused.returncode == 0, "what is done needs no plugin"


def test_a_law_of_ones_own_is_fitted(tmp_path: Path) -> None:
    sizes = np.geomspace(100, 1e5, 8)
    lines = [f"{x!r},{0.1 + 5 * x ** (-2 / 3)!r}" for x in sizes.tolist()]
    (tmp_path / "runs.csv").write_text("size,error\n" + "\n".join(lines) + "\n")
    words = ["fit", "runs.csv", "--law", "two_thirds", "--x", "size", "--y", "error", "--json"]
    found = json.loads(dbscale("--plugin", str(EXAMPLES / "plugins" / "parts.py"), *words, folder=tmp_path))
    assert found["params"]["E"] == pytest.approx(0.1, rel=1e-3)
    assert found["params"]["b"] == pytest.approx(5, rel=1e-3)
