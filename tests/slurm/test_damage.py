"""Files of a store, of packed data and of copies on a node, damaged while real training runs on a real SLURM: every cell
ends as in a run that nobody touched, or is refused with the file, what is wrong with it and the command that mends it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytestmark = pytest.mark.slurm
STEPS = 300
PATIENCE_S = 900.0
"""For real training on a machine that others use as well."""
OFTEN = {"checkpoint_interval_s": 0.05, "checkpoint_stall_share": 1.0}


@pytest.fixture
def hurt(real: Callable[..., Any]) -> Any:
    """A workplace with data of its own, whose jobs save often and read from copies on their node."""
    place = real("hurt", steps=STEPS)
    (place.folder / "data").unlink()  # a link to what others share
    path = place.folder / "cluster.yaml"
    values = yaml.safe_load(path.read_text())
    values["slurm"]["staging"] = str(place.folder / "node")
    path.write_text(yaml.safe_dump(values | {"target_min": 0.01, "resources": values["resources"] | OFTEN}))
    return place


@pytest.fixture
def undamaged(
    real: Callable[..., Any], results: Callable[[Any], dict[str, Any]]
) -> Iterator[Callable[[], dict[str, Any]]]:
    """The rows of the same grid, run meanwhile in a process of its own."""
    place = real("quiet", steps=STEPS)
    words = ("submit", "--cluster", "inline", "--no-smoke", "--no-report")
    with place.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:

        def rows() -> dict[str, Any]:
            assert run.wait(PATIENCE_S) == 0
            return results(place)

        yield rows
        run.kill()


def submit(place: Any, cluster: str) -> None:
    with place.start("submit", "--cluster", cluster, "--no-smoke", stdout=subprocess.DEVNULL) as run:
        _, errors = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, errors


def folder_of(place: Any, begin: str) -> Path:
    """The folder of a cell whose key begins so."""
    return min((place.store.root / "cells").glob(f"{begin}*"))


def replace(path: Path, data: bytes) -> None:
    """As a new file, for the old one may be mapped."""
    path.unlink()
    path.write_bytes(data)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    replace(path, bytes(data))


def reverse_labels(path: Path) -> None:
    """Every label in range, every sample whole: only the checksum tells."""
    index = np.load(path)
    assert (index["label"] != index["label"][::-1]).any()
    index["label"] = index["label"][::-1].copy()
    path.unlink()
    np.save(path, index)


def test_damage_to_store_and_copies_under_running_jobs_changes_no_bit(
    hurt: Any, undamaged: Callable[[], dict[str, Any]], results: Callable[[Any], dict[str, Any]], sandbox: Any,
    wait_until: Callable[..., None], all_ended: Callable[..., None],
) -> None:  # fmt: skip
    """A checkpoint, what its job reads on the node, a finished teacher's row and the record of the students' job, all
    while a job stands still in the middle of training; nobody types anything after that."""
    submit(hurt, str(hurt.folder / "cluster.yaml"))
    teacher, student = folder_of(hurt, "pretrain-deit_h1"), folder_of(hurt, "pretrain-deit_h2")
    wait_until(lambda: len(list(student.glob("checkpoints/step-*"))) > 1, PATIENCE_S)
    at_work = hurt.store.last_attempt(student.name)
    os.kill(at_work.pid, signal.SIGSTOP)
    wait_until(lambda: len(sandbox.jobs("RUNNING", "COMPLETING")) == 1, PATIENCE_S)

    newest = max(student.glob("checkpoints/step-*"))
    flip(newest / "model.safetensors")
    (copy,) = (hurt.folder / "node" / "dbscale").glob("digits-*")
    reverse_labels(copy / "train.index.npy")
    for path in (copy / "train-000000.tar", *copy.glob("cache/train-*.npy")):
        flip(path)
    row = teacher / "row.json"
    replace(row, row.read_bytes()[:200])
    first, second, _ = sorted(hurt.store.grid_dir("ranks").glob("submits/*.json"))
    replace(second, first.read_bytes())

    said = hurt.run("status", "--wait", "30").stdout
    assert f"{row} is damaged" in said and "the cell runs again" in said
    refusal = f"{second} is the record of ranks/{first.stem}, not of ranks/{second.stem}; `dbscale submit` of the grid"
    assert refusal in said
    os.kill(at_work.pid, signal.SIGKILL)
    all_ended(PATIENCE_S)

    logs = {path.parent.name: path.read_text() for path in hurt.store.grid_dir("ranks").glob("jobs/*/*_log.out")}
    assert logs[second.stem].count(refusal) == 1, "another start of that job would have read the same"
    skipped = f"skipping the damaged checkpoint {newest}: model.safetensors does not match its checksum"
    assert any(skipped in path.read_text() for path in hurt.store.grid_dir("ranks").glob(f"jobs/{first.stem}/*.out"))
    assert sum(text.count("handed in again: a reducer") for text in logs.values()) == 1
    assert [len(hurt.store.attempts(each.name)) for each in (teacher, student)] == [2, 2]
    assert results(hurt) == undamaged()


def test_damage_to_packed_data_and_recipes_before_jobs_start_is_refused_by_name_and_mended_by_submit(
    hurt: Any, undamaged: Callable[[], dict[str, Any]], results: Callable[[Any], dict[str, Any]], sandbox: Any,
    all_ended: Callable[..., None],
) -> None:  # fmt: skip
    """While the jobs wait for a node, the labels are reversed in the index and a recipe is cut."""
    nodes = ("scontrol", "update", f"nodename=n[1-{sandbox.num_nodes}]")
    sandbox.slurm(*nodes, "state=drain", "reason=test")
    try:
        submit(hurt, str(hurt.folder / "cluster.yaml"))
        index = hurt.folder / "data" / "shards" / "digits" / "train.index.npy"
        reverse_labels(index)
        recipe = folder_of(hurt, "finetune-") / "recipe.json"
        replace(recipe, recipe.read_bytes()[:-9])
    finally:
        sandbox.slurm(*nodes, "state=resume")
    all_ended(PATIENCE_S)
    assert hurt.done() == []
    said = hurt.run("status", "--wait", "30").stdout
    assert f"{index}: index damaged or of another dataset (checksum " in said
    assert "the manifest expects" in said and "run `dbscale shards pack digits" in said
    assert f"{recipe} is damaged" in said and "`dbscale submit` of its grid writes it anew" in said
    submit(hurt, "inline")
    assert results(hurt) == undamaged()
