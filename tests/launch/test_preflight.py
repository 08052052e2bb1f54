"""What cannot work is refused before anything is queued: by sizes and counts in `plan`, by one real step in `submit`."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dbscale.errors import ConfigError, DataError
from dbscale.launch import preflight
from dbscale.launch.cli import main
from dbscale.launch.preflight import GIB, check, disk_bytes, pair_problems
from dbscale.launch.smoke import cut, kind_of, new_kinds, smoke
from dbscale.launch.study import Study, load_study, plan_study
from dbscale.study.cost import device_memory, num_params
from dbscale.study.recipe import Attention, DeiT
from dbscale.study.resources import Resources
from tests.launch.conftest import GRID

FRACTALS = {"source": "fractals", "families": 4, "num_train": 40, "num_test": 12, "image_size": 16}


@pytest.fixture
def study_of(tmp_path: Path, real_data: Path) -> Any:
    """A study on real fractals; keywords change the grid, `overrides` the cluster."""

    def make(*overrides: str, **changes: Any) -> Study:
        small = {
            "datasets": {"up": FRACTALS, "down": FRACTALS}, "image_size": 16,
            "upstream": {"dataset": "up", "num_samples": [16]}, "downstream": [{"dataset": "down", "num_samples": [8]}],
        }  # fmt: skip
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump({**GRID, **small, **changes}))
        return load_study(grid=path, cluster="local", store=tmp_path / "out", data=real_data, overrides=overrides)

    return make


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dbscale.shards.pack import ensure_packed

    folder = tmp_path_factory.mktemp("real")
    for name in ("up", "down"):
        ensure_packed(name, FRACTALS, folder, jobs=1, progress=False)
    return folder


def problems(study: Study) -> str:
    return "; ".join(check(study, plan_study(study)[0]).problems)


def test_a_sound_study_has_no_problem(study_of: Any) -> None:
    found = check(study := study_of(), plan_study(study)[0])
    assert (found.problems, found.notes) == ((), ())
    found.refuse()


SCENES = {"source": "fractal_masks", "families": 3, "num_train": 16, "num_test": 4, "image_size": 16}


def test_a_study_of_scenes_has_no_problem_and_must_say_its_task(study_of: Any, real_data: Path) -> None:
    from dbscale.shards.pack import ensure_packed

    ensure_packed("scenes", SCENES, real_data, jobs=1, progress=False)
    changes = {"datasets": {"up": FRACTALS, "scenes": SCENES}}
    axis = {"dataset": "scenes", "num_samples": [8]}
    found = check(study := study_of(**changes, downstream=[{**axis, "task": "segmentation"}]), plan_study(study)[0])
    assert (found.problems, found.notes) == ((), ())
    with pytest.raises(
        ConfigError, match="classification needs a label beside each image, and dataset 'scenes' has a mask"
    ):
        plan_study(study_of(**changes, downstream=[axis]))


def test_a_model_larger_than_its_device_is_refused(study_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", ["total", "available"])
    study = study_of("cluster.workers=2", "cluster.resources.zero_stage=null")
    cells = plan_study(study)[0].cells
    distill = next(cell for cell in cells if cell.recipe.stage == "distill")
    needed = device_memory(distill, Resources(zero_stage=None))
    assert needed is not None
    largest = needed.states
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(2 * largest, 0))
    assert problems(study) == ""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(2 * largest - 2, 0))
    assert "distill-deit_h2w16d2-up-n16-s0" in problems(study) and "smaller model" in problems(study)
    assert problems(study).count("weights, gradients and optimizer") == 1, "the others fit"


def test_a_disk_too_small_for_weights_and_checkpoints_is_refused(
    study_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of("cluster.workers=1")
    plan, _ = plan_study(study)
    h2 = num_params(DeiT(heads=2, head_width=16, depth=2, patch_size=8), 16, 4)
    # Two plain runs, one distilled one and a finetune of each: weights of all, three checkpoints of the largest one.
    h1 = num_params(DeiT(heads=1, head_width=16, depth=2, patch_size=8), 16, 4)
    needed = 4 * (2 * h1 + 4 * h2) + 3 * 4 * 3 * h2
    assert disk_bytes(study, plan.todo, at_once=1) == needed
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed))
    assert problems(study) == ""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed - 1))
    assert f"needs about {needed / GIB * 1024:.1f} MiB" in problems(study) and "--store" in problems(study)
    assert "0.0" not in problems(study), "sizes of small studies are told in MiB"


@pytest.mark.parametrize(
    ("attention", "own", "guide", "found"),
    [
        ({}, {"heads": 4}, {"heads": 2}, None),
        ({"head_map": "repeat"}, {"heads": 4}, {"heads": 2}, None),
        ({"head_map": "repeat"}, {"heads": 3}, {"heads": 2}, "'repeat' needs whole multiples"),
        ({"layers": [0, -12]}, {"heads": 2}, {"heads": 2}, None),
        ({"layers": [12]}, {"heads": 2}, {"heads": 2}, "has layers 0 to 11"),
        ({}, {"heads": 2}, {"heads": 2, "patch_size": 8}, "maps of equally many patches"),
        ({"head_map": "repeat", "beta": 0}, {"heads": 3}, {"heads": 2}, None),
    ],
)
def test_maps_that_cannot_be_compared(study_of: Any, attention: Any, own: Any, guide: Any, found: str | None) -> None:
    cell = next(each for each in plan_study(study_of())[0].cells if each.recipe.stage == "distill")
    settings = cell.recipe.distill.model_copy(
        update={"attention": Attention(**{**attention, "layers": tuple(attention.get("layers", [0]))})}
    )
    assert cell.teacher is not None
    teacher = dataclasses.replace(cell.teacher, recipe=cell.teacher.recipe.model_copy(update={"model": DeiT(**guide)}))
    recipe = cell.recipe.model_copy(update={"model": DeiT(**own), "distill": settings})
    said = "; ".join(pair_problems([dataclasses.replace(cell, recipe=recipe, teacher=teacher)]))
    assert (said == "") if found is None else found in said


def test_every_pair_is_looked_at(study_of: Any) -> None:
    """Cells that have no teacher to follow come first."""
    study = study_of(distill={"attention": {"beta": 0.1, "layers": [9]}})
    cells = sorted(plan_study(study)[0].cells, key=lambda cell: cell.recipe.distill is not None)
    assert cells[0].recipe.distill is None
    assert any("layers [9]" in each for each in pair_problems(cells))


def test_classes_that_no_training_sample_shows_are_named(study_of: Any, real_data: Path, tmp_path: Path) -> None:
    from dbscale.data.manifest import load_manifest, save_manifest

    study = study_of()
    copy = tmp_path / "data"
    shutil.copytree(real_data, copy)
    manifest = load_manifest(copy / "shards" / "up")
    train = manifest.splits["train"]
    counts = (0, train.class_counts[0] + train.class_counts[1], *train.class_counts[2:])
    for given, said in ((counts, f"asks for 1 classes that no training sample shows, the first {manifest.classes[0]!r}"),
                        (counts[1:], "its counts by class are 3, 40 in all")):  # fmt: skip
        splits = {**manifest.splits, "train": train.model_copy(update={"class_counts": given})}
        save_manifest(copy / "shards" / "up", manifest.model_copy(update={"splits": splits}))
        assert said in problems(dataclasses.replace(study, data_dir=copy))


def test_plan_says_that_a_source_changed_and_that_others_can_write(
    tmp_path: Path, study_of: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from PIL import Image

    from dbscale.shards.pack import ensure_packed

    def picture(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)

    data = tmp_path / "data"
    for split in ("train", "test"):
        for name in ("a", "b"):
            picture(data / "photos" / split / name / "1.png")
    entry = {"source": "imagefolder", "path": "photos"}
    for name in ("up", "down"):
        ensure_packed(name, entry, data, jobs=1, progress=False)
    study = study_of(datasets={"up": entry, "down": entry}, upstream={"dataset": "up", "num_samples": [2]},
                     downstream=[{"dataset": "down", "num_samples": [2]}])  # fmt: skip
    words = ["plan", "--grid", str(study.grid_path), "--store", str(study.store.root), "--data", str(data)]
    assert main(words) == 0
    assert "note:" not in capsys.readouterr().out
    picture(data / "photos" / "train" / "a" / "2.png")
    study.store.root.mkdir()
    os.chmod(study.store.root, 0o777)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "note: dataset up: its source now holds other files (3 train samples, 2 are packed" in out
    assert "note: everybody on this machine can write to the store" in out


def test_kinds_differ_by_what_a_first_step_shows(study_of: Any) -> None:
    """Not by sizes, steps and seeds: two sizes and two seeds of the tiny grid are tried once each."""
    study = study_of(upstream={"dataset": "up", "num_samples": [8, 16]}, seeds=[0, 1])
    plan, _ = plan_study(study)
    kinds = new_kinds(plan)
    assert len(plan.cells) == 24
    # Two pretrained models, one pair, and finetunes of h1, h2.
    assert sorted(cell.recipe.stage for cell in kinds) == ["distill", "finetune", "finetune", "pretrain", "pretrain"]
    for state, expected in (("done", 4), ("interrupted", 4), ("failed", 5), ("blocked", 5)):
        known = dataclasses.replace(plan, states={**plan.states, kinds[0].key: state})
        assert len(new_kinds(known)) == expected, state
    first = kinds[0]
    other = first.recipe.training.model_copy(update={"precision": "bf16"})
    assert kind_of(first) != kind_of(
        dataclasses.replace(first, recipe=first.recipe.model_copy(update={"training": other}))
    )
    short = cut(next(cell for cell in kinds if cell.recipe.stage == "distill"))
    assert (short.recipe.num_steps, short.recipe.training.global_batch, len(short.lineage)) == (1, 2, 2)


@pytest.fixture
def tried(study_of: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`tried(**changes)` tries the kinds of a changed grid: their number."""

    def run(**changes: Any) -> int:
        study = study_of(**changes)
        return smoke(study, plan_study(study)[0])

    return run


def test_one_real_step_of_each_kind(tried: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tried() == 5
    assert "trying one step of 5 kinds of recipe" in capsys.readouterr().err
    model = {"kind": "timm", "name": "no_such_model"}
    with pytest.raises(
        ConfigError, match=r"pretrain-no_such_model-up.* cannot be trained: timm knows no model 'no_such_model'"
    ):
        tried(models={**GRID["models"], "h1": model})


def test_weights_from_elsewhere_are_tried_as_well(study_of: Any, tmp_path: Path) -> None:
    """A teacher that no cell trained is read from the store; one of other classes is found out."""
    import timm
    import torch
    from safetensors.torch import save_file

    from dbscale.launch.commands.submit import pack_missing

    network = {"kind": "deit", "heads": 1, "head_width": 16, "depth": 2, "patch_size": 8}
    for num_classes, said in ((4, None), (5, "knows 5 classes, this cell's dataset has 4")):
        torch.manual_seed(0)
        name = f"teacher{num_classes}.safetensors"
        model = timm.create_model("deit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=1,
                                  num_classes=num_classes)  # fmt: skip
        save_file(model.state_dict(), tmp_path / name)
        changes = {"teachers": {"h2": {"checkpoint": str(tmp_path / name), "model": network}}}
        study = pack_missing(study_of(**changes))
        plan, _ = plan_study(study)
        if said is None:
            assert smoke(study, plan) == 5
        else:
            with pytest.raises(ConfigError, match=said):
                smoke(study, plan)


def test_a_dataset_that_is_not_there_is_found_before_another_one_is_packed(study_of: Any, tmp_path: Path) -> None:
    from dbscale.launch.commands.submit import pack_missing

    study = dataclasses.replace(study_of(), data_dir=tmp_path)
    folders = {name: {"source": "imagefolder", "path": name} for name in study.used_datasets}
    first, *_, last = folders
    drawn = {"source": "fractals", "families": 2, "num_train": 4, "num_test": 2, "image_size": 8}
    study = dataclasses.replace(study, grid=study.grid.model_copy(update={"datasets": folders | {first: drawn}}))
    with pytest.raises(DataError, match=rf"dataset '{last}': .*{last} does not exist; set its `path`, or --data"):
        pack_missing(study)
    assert not (tmp_path / "shards").exists()


def test_what_only_data_shows_is_found(tried: Any, study_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"packed with encoding 'raw', which the decode tier 'jpeg256' cannot read"):
        tried(tier="jpeg256")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(
        ConfigError, match=r"the trial of one step ended with code 1: nothing; --no-smoke leaves it out"
    ):
        tried()


def test_submit_refuses_before_anything_is_queued(study_of: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    study = study_of()
    words = ["submit", "--grid", str(study.grid_path), "--store", str(study.store.root), "--data", str(study.data_dir)]
    monkeypatch.setattr(preflight, "disk_problems", lambda study, plan: ["no room"])
    assert main(words) == 1
    assert capsys.readouterr().err == "dbscale: no room\n"
    assert not (study.store.root / "cells").exists() and not (study.store.root / "grids").exists()
