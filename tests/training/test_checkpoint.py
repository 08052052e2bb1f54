"""What stops training and what goes on beside it: saves are sealed in the background, and never too often."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from dbscale.study.resources import Resources
from dbscale.training import checkpoint
from dbscale.training.checkpoint import Checkpointer, find_damage, list_checkpoints

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
    assert [find_damage(path) for path in kept] == [None, None]


@pytest.mark.parametrize(("share", "steps"), [(1e9, list(range(1, 12))), (1e-9, [1])])
def test_saves_that_stall_too_much_become_rarer(share, steps, bench, saved):
    """However short the interval: at a billionth of the time, the first save is the last for years."""
    cell = bench.cell()
    bench.run(cell, EVERY_STEP.model_copy(update={"checkpoint_stall_share": share}))
    assert saved[0] == steps


def _full_at(monkeypatch, number):
    """The disk refuses the `number`-th seal."""
    calls, write_json = iter(range(1, 100)), checkpoint.write_json

    def full(path, value):
        if next(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_json(path, value)

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
