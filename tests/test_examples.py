"""Every example runs as it stands, in a folder of its own."""

from __future__ import annotations

import warnings
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

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
