"""What the documents promise exists: links, make targets, commands, configs."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from dbscale.data import make_loader, open_dataset
from dbscale.shards.pack import ensure_packed
from dbscale.study.grid import datasets_in_use, load_grid

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
    command = [sys.executable, "-m", "dbscale.launch.cli", "--help"]
    usage = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = set(re.findall(r"^    ([a-z]+) ", usage, re.MULTILINE))
    assert {"plan", "submit", "status"} <= commands, usage
    assert not named - commands - {"runs"}


def test_the_study_of_ones_own_images_packs_and_loads(tmp_path: Path) -> None:
    """README's YAML as it stands, over photographs of several sizes."""
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert text
    (tmp_path / "birds.yaml").write_text(text[1].replace("configs/", f"{ROOT}/configs/"))
    photo = Image.fromarray(load_sample_image("flower.jpg"))
    for part, name, side in itertools.product(("train", "test"), ("finch", "wren"), (40, 90)):
        (folder := tmp_path / "birds" / part / name).mkdir(parents=True, exist_ok=True)
        photo.resize((side + 10, side)).save(folder / f"{side}.jpg")
    grid = load_grid(tmp_path / "birds.yaml")
    assert "birds" in datasets_in_use(grid)
    dataset = open_dataset(ensure_packed("birds", grid.datasets["birds"], tmp_path, progress=False))
    subset = dataset.subset(4)
    loader = make_loader(subset, global_batch=4, rank=0, world_size=1, num_workers=0, seed=0, transform=None)
    (batch,) = itertools.islice(iter(loader), 1)
    assert (batch.images.shape[0], sorted(batch.labels.tolist())) == (4, [0, 0, 1, 1])
    assert {batch.images.shape[1], *batch.images.shape[2:]} <= {3, grid.image_size}


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
