"""Names typed to `make` arrive at the command as they are, whatever make or a shell could read in them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ODD = ["a b", "it's", 'x"; touch pwned; "', "$(touch pwned)", "$$(touch pwned)", "`touch pwned`", "$(shell touch pwned)",
       "a\\b", "$HOME", "a#b", "-n", "100%"]  # fmt: skip


@pytest.mark.parametrize("name", ["GRID", "CLUSTER", "STORE", "DATA"])
@pytest.mark.parametrize("value", ODD)
def test_a_name_is_one_word_that_nobody_reads(tmp_path: Path, name: str, value: str) -> None:
    """`printf` stands in for the command; nothing is set up, for a set-up file is said to be old enough."""
    words = ["make", "--silent", f"--file={ROOT}/Makefile", "--old-file=.venv/.installed", r"RUN=printf '<%s>\n'"]
    run = subprocess.run(
        [*words, "grid", f"{name}={value}"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert f"<{value}>" in run.stdout.splitlines()
    assert not list(tmp_path.iterdir())
