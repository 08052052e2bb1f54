"""The documentation: the pages build without a warning, and what the tutorials print is what a reader can type."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dbscale.study.grid import load_grid

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
DBSCALE = f"{sys.executable} -m dbscale.launch.cli"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (TUTORIALS / page).read_text(), re.DOTALL)


def typed(lines: str, folder: Path) -> str:
    """The output of shell lines in which `dbscale` is this checkout's."""
    script = f'dbscale() {{ {DBSCALE} "$@"; }}\nset -e\n{lines}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table_tutorial_as_printed(tmp_path: Path) -> None:
    (table,) = blocks("your-table.md", "text")
    (tmp_path / "runs.csv").write_text(table)
    fit, compare = blocks("your-table.md", "sh")
    assert "at 256e6" in typed(fit, tmp_path)
    assert "tokens" in typed(compare, tmp_path)
    (code,) = blocks("your-table.md", "python")
    (tmp_path / "code.py").write_text(code)
    assert typed(f"{sys.executable} code.py", tmp_path).startswith("crossing ")


def test_the_images_tutorials_grid_plans(tmp_path: Path) -> None:
    first, variants = blocks("your-images.md", "yaml")
    (tmp_path / "birds.yaml").write_text(first.replace("CONFIGS", str(ROOT / "configs")) + variants)
    grid = load_grid(tmp_path / "birds.yaml")
    assert [variant.name for variant in grid.variants] == ["base", "hot"]
    assert "what the design" in (TUTORIALS / "your-images.md").read_text()
    (tmp_path / "birds.yaml").write_text(first.replace("CONFIGS", str(ROOT / "configs")))
    plan, *_ = blocks("your-images.md", "sh")
    assert "grid birds: How many upstream images" in typed(plan, tmp_path)


def test_the_hunt_tutorials_grid_plans_its_first_wave(tmp_path: Path) -> None:
    (text,) = blocks("a-hunt.md", "yaml")
    (tmp_path / "hunted.yaml").write_text(text.replace("CONFIGS", str(ROOT / "configs")))
    (line,) = blocks("a-hunt.md", "sh")
    assert "upstream_samples 512" in typed(line, tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_hunt_pages_other_contrast_plans_its_first_wave(tmp_path: Path) -> None:
    """Two temperatures along the number of labels; the first pairs lie on the axis, over the whole of its range."""
    import dbscale

    text = (ROOT / "docs" / "hunt.md").read_text()
    (grid,) = (
        block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "along:" in block and "name:" in block
    )
    (tmp_path / "temperatures.yaml").write_text(grid.replace("CONFIGS", str(ROOT / "configs")))
    where: dict[str, Any] = {
        "grid": tmp_path / "temperatures.yaml",
        "store": tmp_path / "out",
        "data": tmp_path / "data",
    }
    wave = dbscale.hunt_next(**where)
    assert [choice.x for choice in wave.bought] == [50, 200, 800]
    assert wave.bought[0].targets == ("digits",)
    assert dbscale.hunt_verdicts(**where) == {}


def test_citation_and_version_agree() -> None:
    from dbscale import __version__

    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path / "html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    law, grid = ((tmp_path / "html" / "reference" / f"{name}.html").read_text() for name in ("laws", "grid"))
    assert "power_plus" in law and "transfer_gap" in law
    assert "min_effect" in grid and "Difference of error rates that matters" in grid
    assert (tmp_path / "html" / "searchindex.js").exists()
