"""`import dbscale`: every public name has a doctest that holds, loads lazily and is typed; tables of any origin."""

from __future__ import annotations

import ast
import doctest
import subprocess
import sys
from pathlib import Path

import pandas
import pyarrow
import pytest

import dbscale
from dbscale.errors import ConfigError, TableError
from dbscale.launch import api

ROOT = Path(__file__).parents[1]
NAMES = [name for name in dbscale.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_each_name_holds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function = getattr(dbscale, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert len(example.examples) >= 3, "an example a reader can type"
    assert doctest.DocTestRunner().run(example).failed == 0


def test_types_and_names_agree() -> None:
    stub = ast.parse((ROOT / "dbscale" / "__init__.pyi").read_text())
    typed = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(NAMES)
    assert set(NAMES) <= set(dir(dbscale))


def test_nothing_heavy_is_imported_until_it_is_needed() -> None:
    code = (
        "import sys, dbscale\n"
        "assert not {'numpy', 'pydantic', 'torch'} & set(sys.modules)\n"
        "dbscale.plan('demo', store='nowhere', data='nowhere'), dbscale.fit_law\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fit_laws'"):
        _ = dbscale.fit_laws  # type: ignore[attr-defined]


COLUMNS = {"seed": [0, 1], "arm": ["a", "b"], "loss": [0.5, None]}


@pytest.mark.parametrize("make", [dict, pandas.DataFrame, pyarrow.table])
def test_tables_of_any_origin_read_alike(make: type) -> None:
    sheet = api.sheet_of(make(COLUMNS))
    assert sheet.numbers("seed") == [0, 1]
    assert sheet.texts("arm") == ["a", "b"]
    assert sheet.numbers("loss") == [0.5, None]


def test_rows_of_a_store_have_the_documented_columns(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no plan of grid 'demo'"):
        dbscale.read_rows(tmp_path, grid="demo")


def test_a_grid_is_a_path_or_a_shipped_name(tmp_path: Path) -> None:
    path = ROOT / "configs" / "grids" / "paper" / "boundary_38m.yaml"
    assert dbscale.load_grid(path) == dbscale.load_grid(str(path)) == dbscale.load_grid("paper/boundary_38m")
    with pytest.raises(ConfigError, match="cannot read nowhere"):
        dbscale.load_grid("nowhere.yaml")


def test_compare_answers_options() -> None:
    runs = {
        "arm": ["a"] * 6 + ["b"] * 6,
        "n": [1, 10, 100] * 4,
        "seed": [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3,
        "loss": [1.0, 0.9, 0.8, 1.01, 0.91, 0.81, 0.5, 0.4, 0.3, 0.5, 0.41, 0.31],
    }
    found = dbscale.compare(runs, a={"arm": "a"}, b={"arm": "b"}, along="n", metric="loss", level=0.5, min_effect=0.1)
    assert found.verdict is not None
    assert (found.verdict.level, found.verdict.min_effect, found.verdict.better) == (0.5, 0.1, "b")
    swapped = dbscale.compare(runs, a={"arm": "b"}, b={"arm": "a"}, along="n", metric="loss")
    assert swapped.verdict is not None
    assert swapped.verdict.better == "a"
    with pytest.raises(TableError, match="no column 'size'"):
        dbscale.compare(runs, a={"arm": "a"}, b={"arm": "b"}, along="size", metric="loss")
