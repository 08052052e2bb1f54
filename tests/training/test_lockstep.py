"""Two real processes, one of which cannot read its part: both end, and both say why."""

from __future__ import annotations

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

OPTIONS = {"families": 4, "num_train": 48, "num_test": 12, "image_size": 16}
LIMIT_S = 120


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset with one sample per shard, the 21st of each split missing."""
    from shards.pack import pack
    from shards.sources import make_source

    pack(make_source("fractals", **OPTIONS, shard_samples=1), tmp_path / "shards" / "up", progress=False)
    (tmp_path / "shards" / "up" / "train-000020.tar").unlink()
    return tmp_path / "shards" / "up"


def read_in_lockstep(rank: int, port: int, folder: Path, pipe: Connection) -> None:
    """Send the number of batches this rank got, the kind of its error and what it says."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    import torch
    from accelerate import Accelerator

    from dbscale.data import make_eval_loader, make_loader, open_dataset
    from dbscale.training.lockstep import lockstep

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    test = make_eval_loader(open_dataset(folder, "test", tier="raw").subset(), batch_size=5, rank=rank, world_size=2)
    assert len(list(lockstep(iter(test), accelerator))) == len(test)
    subset = open_dataset(folder, tier="raw").subset()
    loader = make_loader(subset, global_batch=4, rank=rank, world_size=2, seed=0)
    try:
        for _ in lockstep(loader, accelerator):
            pass
    except ValueError as error:
        pipe.send((loader.consumed, type(error).__name__, str(error)))


def test_an_error_of_one_rank_is_raised_by_all(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [
        context.Process(target=read_in_lockstep, args=(rank, port, folder, pipe[1])) for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        assert all(pipe[0].poll(LIMIT_S) for pipe in pipes), "a rank waits for ever"
        found = sorted([pipe[0].recv() for pipe in pipes], key=lambda each: each[1])
    finally:
        for process in processes:
            process.kill()
            process.join()
    (_, kind, own), (_, other_kind, other) = found
    assert (kind, other_kind) == ("DataError", "TrainingError")
    mend = f"run `dbscale shards pack up --data {folder.parent.parent}`"
    assert own.startswith(f"{folder / 'train-000020.tar'}: shard is missing; {mend}")
    assert other in {f"rank 0: {own}", f"rank 1: {own}"}
