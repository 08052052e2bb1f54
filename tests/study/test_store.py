"""The store: whole files or none, states derived from files alone, and clear words when it cannot be written."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dbscale.errors import FileError, StoreError
from dbscale.files import atomic_open, write_json
from dbscale.study.grid import Grid, expand
from dbscale.study.store import Attempt, Progress, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out")


def attempt(**changes: object) -> Attempt:
    base = Attempt(number=1, status="running", host=socket.gethostname(), pid=os.getpid(), started=time.time())
    return base.model_copy(update=changes)


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_specs_round_trip(store: Store, grid: Grid) -> None:
    cell = expand(grid, {"up": "a"})[0].cell
    store.write_spec(cell.spec())
    assert store.read_spec(cell.key) == cell.spec()
    with pytest.raises(StoreError, match="no cell 'absent'"):
        store.read_spec("absent")


def test_state_follows_the_last_attempt(store: Store) -> None:
    assert store.state("c") == "new"
    store.write_attempt("c", attempt())
    assert store.state("c") == "running"
    store.write_attempt("c", attempt(number=2, pid=dead_pid()))
    assert store.state("c") == "interrupted"
    store.write_attempt("c", attempt(number=10, status="failed", reason="loss is NaN"))
    assert store.state("c") == "failed"
    assert [each.number for each in store.attempts("c")] == [1, 2, 10]
    write_json(store.cell_dir("c") / "row.json", {})
    assert store.state("c") == "done"


def test_a_run_on_another_host_lives_by_its_heartbeat(store: Store) -> None:
    store.write_attempt("c", attempt(host="elsewhere", started=time.time() - 3600))
    assert store.state("c") == "interrupted"
    store.write_progress("c", Progress(step=1, num_steps=9, loss=None, images_per_s=0.0, updated=time.time()))
    assert store.state("c") == "running"


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError, match="power cut"), atomic_open(path, "w") as file:
        file.write('{"a": 2')
        raise RuntimeError("power cut")
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [each.name for each in tmp_path.iterdir()] == ["row.json"]


def test_an_unwritable_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FileError, match=r"cannot write .*file/cells/c/x\.json"):
        write_json(tmp_path / "file" / "cells" / "c" / "x.json", {})


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left on device; the disk is full"):
        write_json(tmp_path / "row.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_damaged_json_says_what_to_do(store: Store) -> None:
    write_json(store.cell_dir("c") / "row.json", {})
    (store.cell_dir("c") / "row.json").write_text("{")
    with pytest.raises(FileError, match="not valid JSON"):
        store.read_row("c")
