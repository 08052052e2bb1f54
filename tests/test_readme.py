"""What the documents promise exists: links, make targets, commands, configs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@DOCUMENT
def test_relative_links_resolve(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing


@DOCUMENT
def test_named_configs_and_sources_exist(document: Path) -> None:
    path = r"(?<![\w/<>])(?:configs|launch|dbscale|shards|tests)/[\w/.-]+\.(?:yaml|json|py)\b"
    named = set(re.findall(path, document.read_text())) - {"configs/grids/x.yaml"}
    assert not {path for path in named if not (ROOT / path).exists()}


@DOCUMENT
def test_named_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", document.read_text(), re.MULTILINE))
    assert not named - {target for line in targets for target in line.split()}


@DOCUMENT
def test_named_commands_exist(document: Path) -> None:
    named = set(re.findall(r"(?:^|`)dbscale ([a-z]+)", document.read_text(), re.MULTILINE))
    command = [sys.executable, "-m", "launch.cli", "--help"]
    usage = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = set(re.findall(r"^    ([a-z]+) ", usage, re.MULTILINE))
    assert {"plan", "submit", "status"} <= commands, usage
    assert not named - commands - {"runs"}


def test_make_help_lists_every_target_in_one_line() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [
        "setup",
        "check",
        "fix",
        "test",
        "shards",
        "plan",
        "grid",
        "status",
        "reduce",
        "report",
        "bench",
        "clean",
    ]
    for target in targets:
        assert re.search(rf"^{target}:.*## \S", makefile, re.MULTILINE), target
