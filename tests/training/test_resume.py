"""A cell stopped or killed anywhere, any number of times, ends bitwise as one that was not."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from dbscale.data import open_dataset
from dbscale.study.recipe import Attention as AttentionSettings
from dbscale.study.recipe import Augment, Budget, Distill
from dbscale.study.resources import Resources
from dbscale.study.store import Store
from dbscale.training import attempts, checkpoint, loop, results, run, weights
from shards.pack import ensure_packed

OFTEN = Resources(zero_stage=None, threads=1, checkpoint_interval_s=1e-9, checkpoint_stall_share=1e9)
"""Saves after every step."""


def test_stopped_twice_ends_as_if_never_stopped(bench_of, stop_after):
    whole, cut = bench_of("whole"), bench_of("cut")
    options = {"ema_decay": 0.9, "augment": Augment(crop_padding=1, hflip=0.5, mixup=0.8, cutmix=1.0)}
    cell = whole.cell(**options)
    cut.cell(**options)
    assert whole.run(cell).status == "done"

    first = cut.run(cell, stop=stop_after(5))
    assert (first.status, first.reason) == ("interrupted", "SIGUSR2")
    assert cut.run(cell, stop=stop_after(4)).status == "interrupted"
    last = cut.run(cell)

    assert last.status == "done"
    assert cut.fingerprint(cell) == whole.fingerprint(cell)
    tries = cut.store.attempts(cell.key)
    assert [each.status for each in tries] == ["interrupted", "interrupted", "done"]
    assert [each.resumed_from_step for each in tries] == [None, 5, 9]
    assert tries[0].signal == "SIGUSR2"
    assert last.row is not None and last.row.timing.num_attempts == 3


TRAPS = {
    "in a step": (loop, "_optimizer_step", 6),
    "at an epoch's end": (loop, "_optimizer_step", 4),  # 40 samples in batches of 16: an epoch ends inside step 3
    "before the first checkpoint": (loop, "_optimizer_step", 1),
    "while the state is written": (checkpoint, "_save_accelerator_state", 3),
    "while checksums are taken": (checkpoint, "_checksum", 8),
    "before the manifest": (checkpoint, "write_json", 4),
    "before the rename": (Path, "rename", 3),
    "before old ones are removed": (checkpoint, "list_checkpoints", 5),
    "while the weights are written": (weights, "write_weights", 1),
    "between weights and trained.json": (results, "write_json", 1),
    "in the evaluation": (run, "evaluate_cell", 1),
    "before the row": (run, "make_row", 1),
    "after the row": (run, "clear_scratch", 1),
}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", TRAPS)
def test_killed_ends_as_if_never_killed(where, precision, bench_of, kill_on_call):
    whole, cut = bench_of("whole"), bench_of("cut")
    cell = whole.cell(ema_decay=0.9, precision=precision)
    cut.cell(ema_decay=0.9, precision=precision)
    whole.run(cell, OFTEN)

    assert cut.run_killed(cell, kill_on_call(*TRAPS[where]), OFTEN) == signal.SIGKILL
    assert cut.store.state(cell.key) == ("done" if where == "after the row" else "interrupted")
    assert cut.run(cell, OFTEN).status == "done"

    expected, found = whole.fingerprint(cell), cut.fingerprint(cell)
    if where in ("in the evaluation", "before the row", "after the row"):
        assert found.pop("end") is None, "training was finished and must not run again"
        del expected["end"]
    assert found == expected


def test_killed_in_gradient_accumulation(bench_of, kill_on_call):
    resources = OFTEN.model_copy(update={"micro_batch": 4})
    whole, cut = bench_of("whole"), bench_of("cut")
    cell = whole.cell("distill", teacher=whole.cell(seed=1))
    cut.cell("distill", teacher=cut.cell(seed=1))
    for bench in (whole, cut):
        bench.run(cell.teacher)
    whole.run(cell, resources)

    from accelerate import Accelerator

    assert cut.run_killed(cell, kill_on_call(Accelerator, "backward", 22), resources) == signal.SIGKILL
    outcome = cut.run(cell, resources)
    assert outcome.status == "done" and outcome.row.resources["accumulation"] == 4
    assert cut.fingerprint(cell) == whole.fingerprint(cell)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"distill": Distill(alpha=0.3, attention=AttentionSettings(layers="all"))},
        {"budget": Budget(epochs=3.0)},
    ],
    ids=["bf16", "attention", "epochs"],
)
def test_stopped_runs_of_other_kinds(options: dict[str, Any], bench_of, stop_after):
    whole, cut = bench_of("whole"), bench_of("cut")
    stage = "distill" if "distill" in options else "pretrain"
    cells = []
    for bench in (whole, cut):
        teacher = bench.cell(seed=1) if stage == "distill" else None
        if teacher is not None:
            bench.run(teacher)
        cells.append(bench.cell(stage, teacher=teacher, **options))
    whole.run(cells[0])
    assert cut.run(cells[1], stop=stop_after(3)).status == "interrupted"
    assert cut.run(cells[1]).status == "done"
    assert cut.fingerprint(cells[1]) == whole.fingerprint(cells[0])


@pytest.mark.parametrize("stage", [1, 3])
def test_stopped_under_zero_in_one_process(stage, bench_of, stop_after):
    """What a cell runs under unless it is told otherwise; two processes are in test_engines."""
    resources = Resources(zero_stage=stage, threads=1, micro_batch=8)
    whole, cut = bench_of("whole"), bench_of("cut")
    options = {"precision": "bf16", "ema_decay": 0.9}
    cell = whole.cell(**options)
    cut.cell(**options)
    assert whole.run(cell, resources).status == "done"
    for steps in (4, 3):
        assert cut.run(cell, resources, stop_after(steps)).status == "interrupted"
    assert cut.run(cell, resources).status == "done"
    assert cut.store.attempts(cell.key)[-1].resumed_from_step == 7
    assert cut.fingerprint(cell) == whole.fingerprint(cell)


def test_damaged_checkpoint_falls_back_to_the_one_before(bench_of, stop_after, capfd):
    whole, cut = bench_of("whole"), bench_of("cut")
    cell = whole.cell()
    cut.cell()
    whole.run(cell, OFTEN)
    cut.run(cell, OFTEN, stop_after(6))
    newest, before = checkpoint.list_checkpoints(cut.store.cell_dir(cell.key) / "checkpoints")
    damaged = newest / "optimizer.bin"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)

    assert cut.run(cell, OFTEN).status == "done"
    assert f"skipping the damaged checkpoint {newest}: optimizer.bin does not match" in capfd.readouterr().err
    assert cut.store.attempts(cell.key)[-1].resumed_from_step == int(before.name.removeprefix("step-"))
    assert cut.fingerprint(cell) == whole.fingerprint(cell)


def test_checkpoint_of_another_recipe_is_refused(bench, stop_after):
    cell, other = bench.cell(), bench.cell(seed=5)
    bench.run(cell, stop=stop_after(3))
    folder = bench.store.cell_dir(other.key) / "checkpoints"
    (bench.store.cell_dir(cell.key) / "checkpoints").rename(folder)
    outcome = bench.run(other)
    assert outcome.status == "failed"
    assert f"is a checkpoint of cell {cell.id}, not of {other.id}" in outcome.reason


def test_two_checkpoints_are_kept_and_none_after_the_end(bench, stop_after):
    cell = bench.cell()
    bench.run(cell, OFTEN, stop_after(7))
    folder = bench.store.cell_dir(cell.key) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000006", "step-000000007"]
    bench.run(cell)
    assert not folder.exists()


def test_locked_cell_is_busy(bench):
    cell = bench.cell()
    with attempts.admit(bench.store, cell.key, num_devices=1, job=None, log=None) as admission:
        assert admission.refusal is None
        assert bench.run(cell).status == "busy"


FOREIGN = {"subset fingerprint": "0123abcd", "seed": 1, "global batch": 48, "repeats": 3, "block size": 64}


@pytest.mark.parametrize("name", FOREIGN)
def test_checkpoint_of_another_stream_is_refused(name, bench, stop_after):
    """The cell's id vouches for the recipe; this for the batches themselves, whatever the id was made from."""
    cell = bench.cell()
    bench.run(cell, stop=stop_after(3))
    (folder,) = checkpoint.list_checkpoints(bench.store.cell_dir(cell.key) / "checkpoints")
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    own = manifest["state"]["stream"][name]
    manifest["state"]["stream"][name] = FOREIGN[name]
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    before = (bench.store.cell_dir(cell.key) / "metrics.jsonl").exists()
    outcome = bench.run(cell)
    assert outcome.status == "failed"
    assert f"the saved state has {name} {FOREIGN[name]!r}, this run has {own!r}" in outcome.reason
    assert (bench.store.cell_dir(cell.key) / "metrics.jsonl").exists() == before


def test_bad_samples_are_counted_once_however_often_the_run_stops(tmp_path, stop_after):
    from tests.training.conftest import DATASETS, PLAIN, Bench  # a dataset of its own, to be damaged

    data_dir = tmp_path / "data"
    folder = ensure_packed("up", DATASETS["up"], data_dir)
    train = open_dataset(folder, "train", image_size=16)
    for position in train.subset(40).indices[[3]]:
        entry = train.index[position]
        shard = sorted(folder.glob("**/train*.tar"))[int(entry["shard"])]
        content = bytearray(shard.read_bytes())
        content[int(entry["offset"]) + 40] ^= 255
        shard.write_bytes(content)
    rows = []
    for name, stops in (("whole", []), ("cut", [4, 3])):
        bench = Bench(Store(tmp_path / name), data_dir)
        cell = bench.cell()
        for steps in stops:
            assert bench.run(cell, PLAIN, stop_after(steps)).status == "interrupted"
        rows.append(bench.run(cell).row)
    assert [row.replaced_samples for row in rows] == [1, 1]
    assert rows[0].weights_sha256 == rows[1].weights_sha256
