"""What goes wrong says what, where, what to do and of which kind it is; it stops its own cell and loses nothing."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from dbscale.errors import TrainingError
from dbscale.study.recipe import Attention as AttentionSettings
from dbscale.study.recipe import Budget, DeiT, Distill, Optim, TimmModel
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Failure
from dbscale.training import loop
from dbscale.training.run import _failure_of

EVERY_STEP = Resources(zero_stage=None, threads=1, checkpoint_interval_s=1e-9, checkpoint_stall_share=1e9)
"""Saves after every step."""


def failed(outcome):
    assert outcome.status == "failed"
    assert outcome.row is None
    assert outcome.reason
    return outcome.reason


def test_non_finite_loss_names_step_rate_and_last_good_checkpoint(bench, monkeypatch):
    cell = bench.cell()
    original = loop._optimizer_step

    def poisoned(run, images, target):
        losses = original(run, images, target)
        return losses._replace(loss=losses.loss * float("nan")) if run.state.step == 6 else losses

    monkeypatch.setattr(loop, "_optimizer_step", poisoned)
    reason = failed(bench.run(cell, EVERY_STEP))
    assert "loss is nan at step 7 of 12, learning rate 0.000" in reason
    assert reason.endswith("step-000000006")
    attempt = bench.store.last_attempt(cell.key)
    assert (attempt.status, attempt.reason) == ("failed", reason)


def test_what_breaks_while_stopping_is_an_interruption(bench, monkeypatch):
    stop = StopRequest()

    def interrupted_child(run, images, target):
        stop.ask("SIGINT")
        raise RuntimeError("ninja: build stopped: interrupted by user.")

    monkeypatch.setattr(loop, "_optimizer_step", interrupted_child)
    cell = bench.cell()
    outcome = bench.run(cell, stop=stop)
    assert outcome.status == bench.store.last_attempt(cell.key).status == "interrupted"
    assert "ninja" in outcome.reason
    monkeypatch.undo()
    assert bench.run(cell).status == "done"


def test_a_run_that_diverges_on_its_own_is_stopped(bench):
    cell = bench.cell(optim=Optim(lr=1e30, warmup_share=0.0), budget=Budget(steps=40))
    reason = failed(bench.run(cell))
    assert "loss is" in reason and "lower lr" in reason and "checkpoint: none" in reason


def test_out_of_memory_names_the_micro_batch(bench, monkeypatch):
    def hungry(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(loop, "_optimizer_step", hungry)
    reason = failed(bench.run(bench.cell(), Resources(zero_stage=None, threads=1, micro_batch=8)))
    assert "out of memory with a micro-batch of 8" in reason and "accumulated" in reason


def test_teacher_of_other_classes_is_refused(bench):
    teacher = bench.cell(dataset="down", num_samples=24)
    bench.run(teacher)
    reason = failed(bench.run(bench.cell("distill", teacher=teacher)))
    assert f"the teacher {teacher.key} knows 3 classes (down), this cell's dataset up has 6" in reason


def test_parents_that_failed_or_have_not_run_block(bench):
    teacher = bench.cell(optim=Optim(lr=1e30, warmup_share=0.0), budget=Budget(steps=40))
    cell = bench.cell("distill", teacher=teacher)
    outcome = bench.run(cell)
    assert (outcome.status, outcome.reason) == ("blocked", f"its parent {teacher.key} has not run yet")
    why = failed(bench.run(teacher))
    outcome = bench.run(cell)
    assert outcome.status == "blocked" and f"its parent {teacher.key} is failed: {why}" == outcome.reason
    assert bench.store.state(cell.key) == "blocked"


def test_damaged_parent_weights_are_refused(bench):
    parent = bench.cell()
    bench.run(parent)
    path = bench.store.cell_dir(parent.key) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "is not what its row.json describes" in failed(bench.run(bench.cell("finetune", init=parent)))


def test_parents_of_another_model_are_refused(bench):
    parent = bench.cell(budget=Budget(steps=1))
    bench.run(parent)
    wider, deeper = (DeiT(heads=h, head_width=8, depth=d, patch_size=4) for h, d in ((3, 2), (2, 3)))
    reason = failed(bench.run(bench.cell("finetune", init=parent, model=wider)))
    assert "model.safetensors does not fit this cell's model: cls_token is [1, 1, 16] there, [1, 1, 24] here" in reason
    assert len(reason.splitlines()) == 1
    reason = failed(bench.run(bench.cell("finetune", init=parent, model=deeper)))
    assert "blocks.2.norm1.weight is missing and 11 more" in reason


def test_another_dataset_under_the_same_name_is_refused(bench):
    cell = bench.cell(fingerprint="0" * 32)
    assert "has fingerprint" in failed(bench.run(cell))


def test_missing_dataset_names_the_folder(bench, tmp_path):
    from dbscale.study.resources import StopRequest
    from dbscale.training.run import run_cell

    cell = bench.cell()
    outcome = run_cell(
        bench.store, cell.key, data_dir=tmp_path, resources=Resources(zero_stage=None), stop=StopRequest()
    )
    assert str(tmp_path / "shards" / "up") in failed(outcome)


def test_unknown_cell(bench):
    from dbscale.study.resources import StopRequest
    from dbscale.training.run import run_cell

    outcome = run_cell(
        bench.store, "nothing", data_dir=bench.data_dir, resources=Resources(zero_stage=None), stop=StopRequest()
    )
    assert "no cell 'nothing'" in failed(outcome)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"precision": "fp16"}, "precision fp16 needs a GPU"),
        ({"model": DeiT(heads=1, head_width=8, depth=1, patch_size=5)}, "16 is not a multiple of patch_size 5"),
        ({"model": TimmModel(kind="timm", name="deit_tinny_patch16_224")}, "deit_tiny_patch16_224"),
        ({"model": TimmModel(kind="timm", name="resnet10t", kwargs={"depht": 3})}, "'depht'"),
        ({"model": TimmModel(kind="timm", name="vgg11"), "drop_path": 0.1}, "set drop_path to 0"),
        ({"num_samples": 97}, "97"),
    ],
    ids=["fp16", "patch size", "model", "model's argument", "no stochastic depth", "num_samples"],
)
def test_recipes_that_cannot_be_trained(options, expected, bench):
    assert expected in failed(bench.run(bench.cell(**options)))


def test_attention_maps_of_models_without_plain_attention(bench):
    teacher = bench.cell(model=TimmModel(kind="timm", name="resnet10t"), budget=Budget(steps=1), drop_path=0.0)
    bench.run(teacher)
    cell = bench.cell("distill", teacher=teacher, distill=Distill(attention=AttentionSettings()))
    assert "ResNet" in failed(bench.run(cell))


def test_attention_layers_that_do_not_exist(bench):
    teacher = bench.cell(budget=Budget(steps=1))
    bench.run(teacher)
    cell = bench.cell("distill", teacher=teacher, distill=Distill(attention=AttentionSettings(layers=(0, 7))))
    assert "the student has layers 0 to 1" in failed(bench.run(cell))


def test_tracker_that_is_not_installed(bench, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    how = Resources(zero_stage=None, threads=1, tracker="wandb")
    assert "pip install wandb" in failed(bench.run(bench.cell(), how))


def test_a_failure_does_not_spoil_the_next_cell(bench):
    bench.run(bench.cell(precision="fp16"))
    assert bench.run(bench.cell()).status == "done"


def test_a_full_disk_is_named_and_the_checkpoint_before_kept(bench, monkeypatch):
    from dbscale.training import checkpoint

    cell = bench.cell()
    calls = iter(range(100))
    original = checkpoint._save_accelerator_state

    def full(accelerator, folder):
        if next(calls) == 2:
            raise OSError(28, os.strerror(28))
        original(accelerator, folder)

    monkeypatch.setattr(checkpoint, "_save_accelerator_state", full)
    reason = failed(bench.run(cell, EVERY_STEP))
    assert "cannot write the checkpoint" in reason and "No space left on device" in reason
    kept = checkpoint.list_checkpoints(bench.store.cell_dir(cell.key) / "checkpoints")
    assert [path.name for path in kept] == ["step-000000002", "step-000000001"]
    assert not list((bench.store.cell_dir(cell.key) / "checkpoints").glob(".*"))


def raised(function, *arguments):
    with pytest.raises(Exception) as caught:
        function(*arguments)
    return caught.value


def throw(error):
    raise error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), Failure.MEMORY),
        (MemoryError(), Failure.MEMORY),
        (torch.distributed.DistBackendError("NCCL error"), Failure.CONNECTION),
        (torch.distributed.DistNetworkError("failed to listen"), Failure.CONNECTION),
        (ConnectionResetError(errno.ECONNRESET, "reset"), Failure.CONNECTION),
        (SafetensorError("Error while serializing: I/O error: No space left on device"), Failure.STORAGE),
        (OSError(errno.EROFS, "Read-only file system"), Failure.STORAGE),
        (TrainingError("loss is nan at step 7"), Failure.CELL),
        (RuntimeError("connection closed by peer, no space left on device"), Failure.CELL),
    ],
    ids=lambda value: type(value).__name__,
)
def test_types_decide_and_words_do_not(error, kind):
    assert _failure_of(raised(throw, error)) is kind


def test_a_full_disk_under_torchs_own_writer_is_the_storages():
    assert _failure_of(raised(torch.save, {"a": torch.zeros(100_000)}, "/dev/full")) is Failure.STORAGE


@pytest.mark.parametrize(("world_size", "kind"), [("2", Failure.CONNECTION), ("1", Failure.CELL)])
def test_a_plain_error_of_a_collective_is_a_lost_peer_where_there_are_peers(monkeypatch, world_size, kind):
    """Gloo's have no type of their own: where they were raised tells."""
    code = compile("def all_reduce(): raise RuntimeError('x')", "/x/torch/distributed/distributed_c10d.py", "exec")
    names = {}
    exec(code, names)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert _failure_of(raised(names["all_reduce"])) is kind
    assert _failure_of(raised(throw, RuntimeError("x"))) is Failure.CELL, "a bug of ours stays one"


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "storage"), (RuntimeError("a bug"), "cell"),
     (torch.OutOfMemoryError("CUDA out of memory"), "memory")],
)  # fmt: skip
def test_the_kind_is_written_into_the_attempt(bench, monkeypatch, error, kind):
    monkeypatch.setattr(loop, "_optimizer_step", lambda *_: throw(error))
    cell = bench.cell()
    outcome = bench.run(cell)
    attempt = bench.store.last_attempt(cell.key)
    assert outcome.status == attempt.status == "failed"
    assert outcome.failure == attempt.failure == Failure(kind)
    assert attempt.process.alive, "this very process"
    monkeypatch.undo()
    assert bench.run(cell).status == "done"
    assert bench.store.last_attempt(cell.key).failure is None
