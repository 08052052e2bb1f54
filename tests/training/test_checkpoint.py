"""A cell stopped or killed anywhere ends bitwise as one that was not; saves are sealed in the background and in order;
what is damaged is named and passed over."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dbscale.data import open_dataset
from dbscale.errors import FileError
from dbscale.files import read_json
from dbscale.shards.pack import ensure_packed
from dbscale.study.recipe import Attention as AttentionSettings
from dbscale.study.recipe import Augment, Budget, Distill, TimmModel
from dbscale.study.resources import Resources
from dbscale.study.store import Store
from dbscale.training import checkpoint, loop, models, results, run
from dbscale.training.checkpoint import Checkpointer, list_checkpoints, newest_whole, read_manifest, write_sealed

EVERY_STEP = Resources(zero_stage=None, threads=1, checkpoint_interval_s=1e-9, checkpoint_stall_share=1e9)


@pytest.fixture
def saved(monkeypatch):
    """Steps at which a run saved, and the threads that took checksums."""
    steps, threads = [], set()
    save, checksum = Checkpointer.save, checkpoint._checksum

    def noting_save(self, state):
        steps.append(state.step)
        return save(self, state)

    def noting_checksum(path, **options):
        threads.add(threading.current_thread())
        return checksum(path, **options)

    monkeypatch.setattr(Checkpointer, "save", noting_save)
    monkeypatch.setattr(checkpoint, "_checksum", noting_checksum)
    return steps, threads


def test_checksums_are_not_taken_by_the_thread_that_trains(bench, saved, stop_after):
    cell = bench.cell()
    bench.run(cell, EVERY_STEP, stop_after(3))
    assert saved[1] and threading.main_thread() not in saved[1]
    assert not any(each.is_alive() for each in saved[1]), "nothing runs on behind the next cell"
    kept = list_checkpoints(bench.store.cell_dir(cell.key) / "checkpoints")
    assert [path.name for path in kept] == ["step-000000003", "step-000000002"], "a stop waits for its save"
    assert [read_manifest(path).state.step for path in kept] == [3, 2]


@pytest.mark.parametrize(("share", "steps"), [(1e9, list(range(1, 12))), (1e-9, [1])])
def test_saves_that_stall_too_much_become_rarer(share, steps, bench, saved):
    """However short the interval: at a billionth of the time, the first save is the last for years."""
    cell = bench.cell()
    bench.run(cell, EVERY_STEP.model_copy(update={"checkpoint_stall_share": share}))
    assert saved[0] == steps


def _full_at(monkeypatch, number):
    """The disk refuses the `number`-th seal."""
    calls, write_json = iter(range(1, 100)), checkpoint.write_json

    def full(path, value, **options):
        if next(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_json(path, value, **options)

    monkeypatch.setattr(checkpoint, "write_json", full)


@pytest.mark.parametrize("steps", [3, 7], ids=["of the stop itself", "of a step"])
def test_a_disk_that_fills_up_in_the_background_is_named(steps, bench, monkeypatch, stop_after):
    cell = bench.cell()
    _full_at(monkeypatch, 3)
    outcome = bench.run(cell, EVERY_STEP, stop_after(steps))
    assert "cannot write the checkpoint" in outcome.reason and "step-000000003: No space left" in outcome.reason
    kept = list_checkpoints(bench.store.cell_dir(cell.key) / "checkpoints")
    assert [path.name for path in kept] == ["step-000000002", "step-000000001"]
    assert not list((bench.store.cell_dir(cell.key) / "checkpoints").glob(".*"))
    assert bench.run(cell).status == "done"
    assert bench.store.attempts(cell.key)[-1].resumed_from_step == 2


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
    "while the weights are written": (models, "write_weights", 1),
    "between weights and trained.json": (results, "write_sealed", 1),
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
    whole.run(cell, EVERY_STEP)

    assert cut.run_killed(cell, kill_on_call(*TRAPS[where]), EVERY_STEP) == signal.SIGKILL
    assert cut.store.state(cell.key) == ("done" if where == "after the row" else "interrupted")
    assert cut.run(cell, EVERY_STEP).status == "done"

    expected, found = whole.fingerprint(cell), cut.fingerprint(cell)
    if where in ("in the evaluation", "before the row", "after the row"):
        assert found.pop("end") is None, "training was finished and must not run again"
        del expected["end"]
    assert found == expected


def test_killed_in_gradient_accumulation(bench_of, kill_on_call):
    resources = EVERY_STEP.model_copy(update={"micro_batch": 4})
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
        {"distill": Distill(head="parallel"), "ema_decay": 0.9},
        {"budget": Budget(epochs=3.0)},
    ],
    ids=["bf16", "attention", "parallel head", "epochs"],
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


@pytest.fixture
def stopped(bench_of, stop_after):
    """A finished cell, and the same cell stopped after six steps, with two checkpoints."""
    whole, cut = bench_of("whole"), bench_of("cut")
    cell = whole.cell(ema_decay=0.9)
    cut.cell(ema_decay=0.9)
    whole.run(cell, EVERY_STEP)
    cut.run(cell, EVERY_STEP, stop_after(6))
    newest, before = list_checkpoints(cut.store.cell_dir(cell.key) / "checkpoints")
    return whole, cut, cell, newest, before


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def reworded(manifest: Path) -> None:
    """Another step, in JSON that is as valid as before."""
    text = manifest.read_text()
    assert '"step": 6' in text
    manifest.write_text(text.replace('"step": 6', '"step": 4'))


def renamed(manifest: Path) -> None:
    """A manifest that is sound by its own checksum, and lists a file outside."""
    content = read_json(manifest)
    content["files"]["../../row.json"] = content["files"].pop("optimizer.bin")
    write_sealed(manifest, content)


DAMAGE = {
    "a bit of the optimizer": (lambda f: flip(f / "optimizer.bin"), "optimizer.bin does not match its checksum"),
    "a bit of the average": (lambda f: flip(f / "rank-0.safetensors"), "rank-0.safetensors does not match"),
    "a bit of the manifest": (lambda f: flip(f / "manifest.json"), "manifest.json"),
    "a number of the manifest": (lambda f: reworded(f / "manifest.json"), "does not match its own checksum"),
    "a file too few": (lambda f: (f / "optimizer.bin").unlink(), "optimizer.bin is missing"),
    "a file too many": (lambda f: (f / "extra.py").write_text("x"), "extra.py is not in the manifest"),
    "a file of another place": (lambda f: renamed(f / "manifest.json"), "../../row.json is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "No such file"),
    "an empty list": (lambda f: (f / "manifest.json").write_text("[]"), "it has no checksum of its own"),
    "null": (lambda f: (f / "manifest.json").write_text("null"), "it has no checksum of its own"),
    "no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe{}"), "is not valid JSON"),
    "nothing": (lambda f: (f / "manifest.json").write_bytes(b""), "is not valid JSON"),
    "no files": (
        lambda f: write_sealed(f / "manifest.json", {"format": checkpoint.FORMAT, "files": {}}), "is damaged"
    ),
    "an earlier format": (
        lambda f: (f / "manifest.json").write_text('{"format": 4, "files": {}}'),
        f"it has format 4, this version of dbscale reads {checkpoint.FORMAT}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(kind, stopped, caplog):
    *_, newest, before = stopped
    damage, words = DAMAGE[kind]
    damage(newest)
    folder, manifest = newest_whole(newest.parent)
    assert (folder, manifest.state.step) == (before, 5)
    (warning,) = caplog.messages
    assert warning.startswith(f"skipping the damaged checkpoint {newest}: ") and words in warning


def test_a_run_goes_on_from_the_sound_one_before(stopped, caplog):
    whole, cut, cell, newest, _ = stopped
    flip(newest / "optimizer.bin")
    assert cut.run(cell, EVERY_STEP).status == "done"
    assert "skipping the damaged checkpoint" in caplog.text
    assert cut.store.attempts(cell.key)[-1].resumed_from_step == 5
    assert cut.fingerprint(cell) == whole.fingerprint(cell)


def test_manifests_swapped_between_checkpoints_are_found(stopped):
    *_, newest, before = stopped
    shutil.copyfile(before / checkpoint.MANIFEST, newest / checkpoint.MANIFEST)
    with pytest.raises(FileError, match="does not match its checksum"):
        read_manifest(newest)


def test_everything_is_on_the_disk_before_the_name_says_so(bench, monkeypatch):
    """Each file, each folder below, the manifest, the folder itself; then the rename; then the folder above."""
    order: list[str] = []

    def name_of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(name_of(fd)), sync(fd))[1])
    monkeypatch.setattr(
        Path, "rename", lambda self, to: (order.append(f"{self.name} → {to.name}"), rename(self, to))[1]
    )
    saves = bench.cell(budget=Budget(steps=2))
    outcome = bench.run(saves, EVERY_STEP.model_copy(update={"zero_stage": 1}))
    assert outcome.status == "done", outcome.reason
    moved = order.index(".step-000000001.tmp → step-000000001")
    before, after = order[:moved], order[moved + 1 :]
    parts = {"rank-0.safetensors", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"}
    assert parts | {"pytorch_model", ".step-000000001.tmp"} <= set(before)
    manifest = next(position for position, each in enumerate(before) if each.startswith(".manifest.json."))
    assert all(before.index(each) < manifest for each in parts), "the manifest vouches for what is safe"
    assert before.index(".step-000000001.tmp") > manifest
    assert after[0] == "checkpoints"


def test_checkpoints_are_the_owners_and_hold_no_code(bench, stop_after):
    cell = bench.cell()
    bench.run(cell, EVERY_STEP.model_copy(update={"zero_stage": 1}), stop_after(2))
    folder = bench.store.cell_dir(cell.key) / "checkpoints"
    assert [oct(path.stat().st_mode & 0o777) for path in (folder, *list_checkpoints(folder))] == ["0o700"] * 3
    assert list(folder.rglob("*.pt")) and not list(folder.rglob("*.py"))


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path(os.environ["TRAP"]),)


@pytest.mark.parametrize("stage", [None, 1])
def test_a_checkpoint_runs_no_code(stage, bench, stop_after, monkeypatch, tmp_path):
    """Whoever can write to the store can seal what he likes, yet nothing but tensors and known classes is unpickled."""
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    cell, how = bench.cell(), EVERY_STEP.model_copy(update={"zero_stage": stage})
    bench.run(cell, how, stop_after(2))
    newest = list_checkpoints(bench.store.cell_dir(cell.key) / "checkpoints")[0]
    name = "optimizer.bin" if stage is None else "pytorch_model/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(newest / name, weights_only=False)
    torch.save({**content, "trap": Trap()}, newest / name)
    manifest = read_json(newest / checkpoint.MANIFEST)
    manifest["files"][name] = checkpoint._checksum(newest / name)
    write_sealed(newest / checkpoint.MANIFEST, manifest)
    outcome = bench.run(cell, how)
    assert outcome.status == "failed" and "Weights only load failed" in outcome.reason, outcome.reason
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("stage", [None, 0, pytest.param(3, marks=pytest.mark.slow)])
def test_statistics_of_batches_are_restored(stage, bench_of, stop_after):
    """A ResNet's running means are no parameters, and decide what the evaluation finds."""
    whole, cut = bench_of("whole"), bench_of("cut")
    options = {"model": TimmModel(kind="timm", name="resnet10t"), "drop_path": 0.0, "global_batch": 8}
    options |= {"budget": Budget(steps=4)}
    how = Resources(zero_stage=stage, threads=1)
    cell = whole.cell(**options)
    cut.cell(**options)
    assert whole.run(cell, how).status == "done"
    assert cut.run(cell, how, stop_after(2)).status == "interrupted"
    assert cut.run(cell, how).status == "done"
    expected, found = whole.weights(cell), cut.weights(cell)
    name = next(each for each in expected if each.endswith("running_mean"))
    assert expected[name].abs().sum() > 0
    assert all(torch.equal(found[each], value) for each, value in expected.items())


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
    bench.run(cell, EVERY_STEP, stop_after(7))
    folder = bench.store.cell_dir(cell.key) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000006", "step-000000007"]
    bench.run(cell)
    assert not folder.exists()


def test_locked_cell_is_busy(bench):
    cell = bench.cell()
    with run.admit(bench.store, cell.key, num_devices=1, job=None, log=None) as admission:
        assert admission.refusal is None
        assert bench.run(cell).status == "busy"


FOREIGN = {"subset fingerprint": "0123abcd", "seed": 1, "global batch": 48, "repeats": 3, "block size": 64}


@pytest.mark.parametrize("name", FOREIGN)
def test_checkpoint_of_another_stream_is_refused(name, bench, stop_after):
    """The cell's id vouches for the recipe; this for the batches themselves, whatever the id was made from."""
    cell = bench.cell()
    bench.run(cell, stop=stop_after(3))
    (folder,) = checkpoint.list_checkpoints(bench.store.cell_dir(cell.key) / "checkpoints")
    manifest = read_json(folder / checkpoint.MANIFEST)
    own = manifest["state"]["stream"][name]
    manifest["state"]["stream"][name] = FOREIGN[name]
    write_sealed(folder / checkpoint.MANIFEST, manifest)
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
