"""The store: states derived from files alone, damage that costs its own cell, claims without a living owner found out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dbscale import files
from dbscale.errors import FileError, StoreError
from dbscale.files import ProcessMark, cannot_write, write_json
from dbscale.study.cell import Cell
from dbscale.study.grid import Grid, expand, merged_cells
from dbscale.study.store import (
    HEARTBEAT_LIMIT_S,
    Attempt,
    Failure,
    Progress,
    Row,
    Store,
    Timing,
    failure_of,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out")


@pytest.fixture
def cell(grid: Grid) -> Cell:
    """A distill cell, which has a parent."""
    return next(each for each in merged_cells(expand(grid, {"up": "a"})) if each.teacher is not None)


def attempt(**changes: Any) -> Attempt:
    base = Attempt(number=1, status="running", **asdict(ProcessMark.of()), started=time.time())
    return base.model_copy(update=changes)


def row(key: str = "c", **changes: Any) -> Row:
    timing = Timing(
        train_time_s=1.0, eval_time_s=0.5, step_time_s=0.1, images_per_s=80.0, data_wait_share=0.0, device_time_s=2.0,
        peak_memory_bytes=7, device="cpu", host="h",
    )  # fmt: skip
    base = Row(
        key=key, id="0" * 12, stage="pretrain", arm="plain", model="m", dataset="up", num_samples=16, seed=0,
        num_params=100, num_classes=10, num_steps=10, samples_seen=80, train_flops=1e9, error_rate=0.25, test_loss=1.5,
        num_test_samples=100, train_loss=1.25, weights_sha256="f" * 64, timing=timing,
    )  # fmt: skip
    return base.model_copy(update=changes)


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_specs_round_trip(store: Store, cell: Cell) -> None:
    store.write_spec(cell.spec())
    assert store.read_spec(cell.key) == cell.spec()
    with pytest.raises(StoreError, match="no cell 'absent'"):
        store.read_spec("absent")


@pytest.mark.parametrize("damage", ["", "{", '{"version": 1}', None])
def test_a_recipe_that_a_power_cut_emptied_is_written_anew(store: Store, cell: Cell, damage: str | None) -> None:
    store.write_spec(cell.spec())
    path = store.cell_dir(cell.key) / "recipe.json"
    whole, inode = path.read_text(), path.stat().st_ino
    if damage is not None:
        path.write_text(damage)
        with pytest.raises(FileError, match=r"recipe\.json is damaged"):
            store.read_spec(cell.key)
    store.write_spec(cell.spec())
    assert path.read_text() == whole
    assert (path.stat().st_ino == inode) is (damage is None), "a sound one is left alone"


def test_a_recipe_that_is_not_this_cells_is_refused(store: Store, cell: Cell) -> None:
    """Changed by a hand or a flipped bit, or another cell's: its id no longer follows from what it says."""
    store.write_spec(cell.spec())
    path = store.cell_dir(cell.key) / "recipe.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(
        StoreError, match=r"does not match its own checksum.*; `dbscale submit` of its grid writes it anew"
    ):
        store.read_spec(cell.key)
    write_json(path, json.loads(cell.spec().model_dump_json().replace('"seed":0', '"seed":1')), seal=True)
    with pytest.raises(StoreError, match="is not the recipe of this cell; `dbscale submit`"):
        store.read_spec(cell.key)
    other = cell.spec().model_copy(update={"teacher": None})
    path.write_text(other.model_dump_json())
    with pytest.raises(StoreError, match="is not the recipe of this cell"):
        store.read_spec(cell.key)
    (store.root / "cells" / "elsewhere").mkdir()
    (store.root / "cells" / "elsewhere" / "recipe.json").write_text(cell.spec().model_dump_json())
    with pytest.raises(StoreError, match="is not the recipe of this cell"):
        store.read_spec("elsewhere")


@pytest.mark.parametrize("key", ["../../etc", "a/b", "", ".hidden", "a b"])
def test_a_key_leads_nowhere_else(cell: Cell, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        type(cell.spec()).model_validate({**cell.spec().model_dump(), "key": key})


@pytest.mark.parametrize("place", [".", "attempts", "checkpoints"])
def test_nothing_is_written_behind_a_link(store: Store, cell: Cell, tmp_path: Path, place: str) -> None:
    """A link in place of a cell's folder, or of one in it, would let whoever made it choose what is overwritten."""
    target, link = tmp_path / "anyones", store.cell_dir(cell.key) / place
    target.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    writes = (
        lambda: store.write_spec(cell.spec()), lambda: store.write_row(row(cell.key)),
        lambda: store.write_attempt(cell.key, attempt()),
    )  # fmt: skip
    for write in writes:
        with pytest.raises(
            StoreError, match="is a symbolic link: nothing is written or removed behind it; remove the link"
        ):
            write()
    assert not list(target.iterdir())
    standing = store.standing(cell.key)
    assert (standing.state, "is a symbolic link" in standing.reason) == ("damaged", True)
    link.unlink()
    store.write_spec(cell.spec())
    assert store.state(cell.key) == "new"


@pytest.mark.parametrize("place", ["tiny", "tiny/jobs", "tiny/submits"])
def test_a_grids_folder_is_no_link_either(store: Store, tmp_path: Path, place: str) -> None:
    assert store.own_grid_dir("tiny") == store.root / "grids" / "tiny"
    link = store.root / "grids" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path)
    with pytest.raises(StoreError, match="is a symbolic link"):
        store.own_grid_dir("tiny")


def test_rows_and_attempts_survive_a_power_cut_and_what_is_written_again_need_not(
    store: Store, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def noted(descriptor: int) -> None:
        synced.append(re.sub(r".*/\.?|\.json\..*", "", os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", noted)
    store.write_row(row())
    assert synced == ["row", "c"], "the file, then its folder"
    store.write_attempt("c", attempt())
    assert synced[2:] == ["1", "attempts"]
    store.write_spec(cell.spec())
    store.write_progress("c", Progress(step=1, num_steps=9, loss=None, images_per_s=0.0, updated=1.0))
    assert len(synced) == 4, "thousands of recipes, and a heartbeat every two seconds"


def test_a_changed_digit_is_found(store: Store) -> None:
    """Valid JSON all the same: only the seal tells."""
    store.write_row(row())
    path = store.cell_dir("c") / "row.json"
    text = path.read_text()
    path.write_text(text.replace('"error_rate": 0.25', '"error_rate": 0.15'))
    assert "does not match its own checksum" in store.standing("c").reason
    path.write_text(json.dumps(json.loads(text)))  # as an editor or another tool would write it
    assert "does not match its own checksum" in store.standing("c").reason
    found = json.loads(text)
    assert len(found.pop("seal")) == 32
    path.write_text(json.dumps(found))
    assert store.read_row("c") == row(), "of a release that did not seal"


def test_attempts_of_other_cells_and_numbers_are_found(store: Store) -> None:
    store.write_attempt("c", attempt(status="failed", reason="mine"))
    store.write_attempt("d", attempt(status="failed", reason="yours"))
    own, other = (store.cell_dir(key) / "attempts" for key in ("c", "d"))
    whole = (own / "1.json").read_bytes()
    (own / "1.json").write_bytes((other / "1.json").read_bytes())
    assert store.standing("c").reason == f"{own}/1.json is the record of attempt 1 at d"
    (own / "1.json").write_bytes(whole)
    (own / "7.json").write_bytes(whole)
    assert store.standing("c").reason == f"{own}/7.json is the record of attempt 1 at c"
    (own / "8.json.bak").write_bytes(whole)
    (own / "٣.json").write_bytes(whole)
    assert [each.number for each in store.attempts("c")] == [1, 7], "other names are no attempts"


@pytest.mark.parametrize("field", ["device", "host", "model", "dataset"])
@pytest.mark.parametrize("value", ["=1+1", "@SUM(A1)", "+1", "-1", "\tx"])
def test_no_text_of_a_row_begins_like_a_formula(store: Store, field: str, value: str) -> None:
    """`rows.csv` is opened in spreadsheets."""
    whole = row().model_dump(mode="json")
    part = whole["timing"] if field in whole["timing"] else whole
    part[field] = value
    write_json(store.cell_dir("c") / "row.json", whole, seal=True)
    assert f"{field}: " in store.standing("c").reason or f".{field}" in store.standing("c").reason


def test_state_follows_the_last_attempt(store: Store) -> None:
    assert store.state("c") == "new"
    store.write_attempt("c", attempt())
    assert store.state("c") == "running"
    store.write_attempt("c", attempt(number=2, pid=dead_pid()))
    assert store.state("c") == "interrupted"
    store.write_attempt("c", attempt(number=9, status="blocked", reason="its parent failed"))
    assert store.state("c") == "blocked"
    store.write_attempt("c", attempt(number=10, status="failed", reason="loss is NaN"))
    assert store.state("c") == "failed"
    assert [each.number for each in store.attempts("c")] == [1, 2, 9, 10]
    store.write_row(row())
    assert store.state("c") == "done"
    assert store.read_row("c") == row()
    assert {key: each.state for key, each in store.standings(["c", "d"]).items()} == {"c": "done", "d": "new"}


ROW_DAMAGE = {
    "empty": b"", "half": b'{"key": "c"', "not UTF-8": b"\xff\xfe\x00", "no object": b"[]", "null": b"null",
    "bomb": b"[" * 5000,
}  # fmt: skip


@pytest.mark.parametrize("damage", ROW_DAMAGE)
def test_a_damaged_row_costs_its_cell_and_is_named(store: Store, damage: str) -> None:
    for key in ("c", "d"):
        store.write_row(row(key))
    (store.cell_dir("c") / "row.json").write_bytes(ROW_DAMAGE[damage])
    found = store.standings(["c", "d"])
    assert (found["c"].state, found["d"].state) == ("damaged", "done")
    assert found["c"].row is store.read_row("c") is None
    assert "c/row.json is damaged" in (found["c"].note or "") and "runs again" in (found["c"].note or "")
    assert found["d"].note is None
    store.write_attempt("c", attempt())
    assert store.state("c") == "running", "somebody is at it already"


@pytest.mark.parametrize(
    ("field", "value"),
    [("error_rate", 1.5), ("error_rate", -0.1), ("num_samples", -1), ("test_loss", float("nan")), ("key", "d"),
     ("train_loss", float("nan")), ("train_loss", float("inf")),
     ("num_steps", "10")],
)  # fmt: skip
def test_a_row_with_a_number_that_cannot_be_is_damaged(store: Store, field: str, value: Any) -> None:
    path = store.cell_dir("c") / "row.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**row().model_dump(mode="json"), field: value}))
    standing = store.standing("c")
    assert standing.state == "damaged"
    assert str(path) in (standing.note or "")


def test_a_row_that_is_missing_though_its_attempt_finished_is_said_to_be(store: Store) -> None:
    store.write_attempt("c", attempt(status="done", ended=time.time()))
    standing = store.standing("c")
    assert standing.state == "damaged"
    assert "row.json is missing, although attempt 1 finished" in (standing.note or "")


def test_a_damaged_attempt_counts_as_broken_off_and_loses_no_number(store: Store) -> None:
    store.write_attempt("c", attempt(status="failed", reason="why"))
    (store.cell_dir("c") / "attempts" / "2.json").write_bytes(b"\xff")
    (store.cell_dir("c") / "attempts" / "notes.json").write_text("a stray file")
    assert store.state("c") == "interrupted"
    last = store.last_attempt("c")
    assert last is not None and last.number == 2 and "2.json is damaged" in (last.reason or "")
    assert (last.started, last.ended) == (0.0, 0.0), "no device time"
    (store.cell_dir("c") / "progress.json").write_text("{}")
    assert store.read_progress("c") is None


@pytest.mark.parametrize("ago_s", [0.0, 100.0, -60.0])
def test_a_run_on_another_host_lives_by_its_heartbeat(store: Store, ago_s: float) -> None:
    store.write_attempt("c", attempt(host="elsewhere", started=time.time() - 3600))
    assert store.state("c") == "interrupted"
    beat = Progress(step=1, num_steps=9, loss=None, images_per_s=0.0, updated=time.time() - ago_s)
    store.write_progress("c", beat)
    assert store.state("c") == "running"
    store.write_progress("c", beat.model_copy(update={"updated": time.time() - HEARTBEAT_LIMIT_S - 1}))
    assert store.state("c") == "interrupted"


def test_a_sign_of_life_from_the_future_is_none(store: Store) -> None:
    """A clock that jumped must not keep a cell from being run for as long as the jump was wide."""
    ahead = time.time() + 3600
    store.write_attempt("c", attempt(host="elsewhere", started=ahead))
    assert store.state("c") == "interrupted"
    store.write_progress("c", Progress(step=1, num_steps=9, loss=None, images_per_s=0.0, updated=ahead))
    assert store.state("c") == "interrupted"
    store.write_progress("c", Progress(step=1, num_steps=9, loss=None, images_per_s=0.0, updated=time.time()))
    assert store.state("c") == "running", "its heartbeat is of now"


def test_a_pid_that_came_again_is_not_the_run(store: Store) -> None:
    mark = ProcessMark.of()
    store.write_attempt("c", attempt(start=(mark.start or 0) - 1))
    assert store.state("c") == "interrupted"
    store.write_attempt("c", attempt(pid=1, start=None, boot=None))
    assert store.state("c") == "running", "an attempt of an older version says no more than its pid"
    store.write_attempt("c", attempt(pid=0))
    assert store.state("c") == "interrupted"


def test_after_a_reboot_or_in_another_container_only_the_heartbeat_tells(store: Store) -> None:
    store.write_attempt("c", attempt(boot="another boot", started=time.time() - 3600))
    assert store.state("c") == "interrupted"
    store.write_attempt("c", attempt(boot="another boot", pid=dead_pid(), started=time.time()))
    assert store.state("c") == "running"


def test_another_users_run_is_alive(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    store.write_attempt("c", attempt())
    assert store.state("c") == "running"
    monkeypatch.setattr(files, "_start_tick", lambda pid: None)
    assert store.state("c") == "running", "even where /proc hides other users' processes"


def test_a_zombie_is_dead(wait_for_zombie: int, store: Store) -> None:
    store.write_attempt("c", attempt(**asdict(replace(ProcessMark.of(), pid=wait_for_zombie, start=None))))
    assert store.state("c") == "interrupted"


@pytest.fixture
def wait_for_zombie() -> Any:
    child = subprocess.Popen([sys.executable, "-c", ""])
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    yield child.pid
    child.wait()


def test_the_kind_of_a_failure_follows_from_the_types_of_its_causes() -> None:
    def told(error: BaseException, cause: BaseException | None = None) -> Failure:
        error.__cause__ = cause
        return failure_of(error)

    full = OSError(28, "No space left on device")
    assert told(full) is Failure.STORAGE
    assert told(cannot_write(Path("/x"), full), full) is Failure.STORAGE
    assert told(OSError(30, "Read-only file system")) is Failure.STORAGE
    assert told(ConnectionResetError()) is told(RuntimeError(), TimeoutError()) is Failure.CONNECTION
    assert told(MemoryError()) is Failure.MEMORY
    assert told(ValueError("no space left on device")) is Failure.CELL, "messages decide nothing"
    assert told(FileNotFoundError(2, "x")) is told(PermissionError(13, "x")) is Failure.CELL
    assert {each for each in Failure if each.passes} == {Failure.STORAGE, Failure.CONNECTION}


def test_an_attempt_keeps_the_kind_of_its_failure(store: Store) -> None:
    store.write_attempt("c", attempt(status="failed", failure=Failure.STORAGE, reason="full"))
    last = store.last_attempt("c")
    assert last is not None and last.failure is Failure.STORAGE
    write_json(store.cell_dir("c") / "attempts" / "1.json", {**last.model_dump(mode="json"), "failure": "odd"})
    assert store.state("c") == "interrupted"
