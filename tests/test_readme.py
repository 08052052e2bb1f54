"""What the documents promise exists: links, make targets, commands, configs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@DOCUMENT
def test_relative_links_resolve(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing


@DOCUMENT
def test_named_configs_and_sources_exist(document: Path) -> None:
    named = set(re.findall(r"\b(?:configs|launch|dbscale|shards|tests)/[\w/.-]+\.(?:yaml|json|py)\b", document.read_text()))
    assert not {path for path in named if not (ROOT / path).exists()}


@DOCUMENT
def test_named_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*)(?=:)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets |= set(re.findall(r"\b(bench-[a-z]+)\b", (ROOT / "Makefile").read_text()))
    text = document.read_text()
    named = set(re.findall(r"^make ([a-z][a-z-]*)", text, re.MULTILINE)) | set(re.findall(r"`make ([a-z][a-z-]*)", text))
    assert not named - targets


@DOCUMENT
def test_named_commands_exist(document: Path) -> None:
    text = document.read_text()
    named = set(re.findall(r"^dbscale ([a-z]+)", text, re.MULTILINE)) | set(re.findall(r"`dbscale ([a-z]+)", text))
    usage = subprocess.run([sys.executable, "-m", "launch.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = re.search(r"\{([a-z,]+)\}", usage.stdout)
    assert commands, usage.stdout
    assert not named - set(commands[1].split(","))


def test_make_help_lists_every_target_in_one_line() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in "setup check fix test shards plan grid status reduce report bench clean".split():
        assert re.search(rf"^{target}:.*## \S", makefile, re.MULTILINE), target
