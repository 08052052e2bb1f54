"""A failed attempt says what kind of failure it was, by the types of the errors: launch decides by it, never by words."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from dbscale.errors import TrainingError
from dbscale.study.store import Failure
from dbscale.training import loop
from dbscale.training.run import _failure_of


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
