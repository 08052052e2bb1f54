"""The paper's grids, which no machine here could run whole: that their settings fit together, and a toy run of each.

Toy means a handful of images in the real encodings, one student with its teacher, two steps; image size, tiers,
augmentation, optimizer and losses are the grid's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dbscale.data import load_manifest
from dbscale.data.order import Stream
from dbscale.study.grid import Grid, datasets_in_use, expand, load_grid, merged_cells
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Store
from dbscale.training.accelerators import make_batching
from dbscale.training.run import run_cell
from shards.pack import ensure_packed, source_of

GRIDS = {path.stem: path for path in sorted((Path(__file__).parents[2] / "configs/grids/paper").glob("*.yaml"))}
READS = {"raw": "raw", "jpeg256": "jpeg256", "jpeg": "original"}
"""The encoding that each streaming tier reads."""


def encoding_of(grid: Grid, dataset: str) -> str:
    spec = grid.datasets[dataset]
    return str(spec.get("encoding", source_of(dataset, spec, ".").default_encoding))


@pytest.mark.parametrize("name", GRIDS)
def test_tiers_read_what_is_packed_and_batches_can_be_cut(name):
    grid = load_grid(GRIDS[name])
    for cell in merged_cells(expand(grid, {})):
        data, training = cell.recipe.data, cell.recipe.training
        assert READS[data.tier] == encoding_of(grid, data.dataset), data.dataset
        Stream(data.num_samples, 0, training.global_batch, training.augment.repeats)
        for world_size in (1, 2, 4, 8):
            make_batching(training.global_batch, world_size, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_a_toy_run_of_the_whole_grid(name, tmp_path):
    grid = toy(GRIDS[name], tmp_path)
    for dataset in datasets_in_use(grid):
        ensure_packed(dataset, grid.datasets[dataset], tmp_path, jobs=1)
    fingerprints = {each: load_manifest(tmp_path / "shards" / each).fingerprint for each in datasets_in_use(grid)}
    cells, store = merged_cells(expand(grid, fingerprints)), Store(tmp_path / "out")
    assert {cell.recipe.stage for cell in cells} >= {"pretrain", "finetune"}
    for cell in cells:
        store.write_spec(cell.spec())
        outcome = run_cell(store, cell.key, data_dir=tmp_path, resources=Resources(zero_stage=None), stop=StopRequest())
        assert outcome.status == "done", f"{cell.key}: {outcome.reason}"


def toy(path: Path, folder: Path) -> Grid:
    grid = load_grid(path)
    student = next(iter(grid.teachers), grid.students[0])
    downstream = [{"dataset": axis.dataset, "num_samples": [8]} for axis in grid.downstream]
    changes: dict[str, Any] = {
        "seeds": [0], "students": [student], "upstream.num_samples": [10], "downstream": downstream,
        "pretrain.budget": {"steps": 2}, "finetune.budget": {"steps": 2},
        "pretrain.global_batch": 8, "finetune.global_batch": 8,
        "teachers": {student: grid.teachers[student]} if student in grid.teachers else {},
        "variants": [each.model_dump() for each in (*grid.variants[:1], *grid.variants[1:][-1:])],
    }  # fmt: skip
    specs = {each: toy_source(grid, each, folder) for each in datasets_in_use(grid)}
    changes |= {f"datasets.{each}": spec for each, spec in specs.items()}
    return load_grid(path, [f"{key}={value}" for key, value in changes.items()])


def toy_source(grid: Grid, dataset: str, folder: Path) -> dict[str, Any]:
    """Ten images of two classes, packed as the real dataset is."""
    encoding = encoding_of(grid, dataset)
    if encoding == "raw":
        return {"source": "fractals", "families": 2, "num_train": 10, "num_test": 4, "image_size": 32}
    size = (300, 260) if encoding == "jpeg256" else (64, 64)
    draw = np.random.default_rng(0)
    for split, number in (("train", 5), ("test", 2)):
        for label in "ab":
            where = folder / dataset / split / label
            where.mkdir(parents=True)
            for index in range(number):
                pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(where / f"{index}.jpg")
    return {"source": "imagefolder", "path": dataset, "encoding": encoding}
