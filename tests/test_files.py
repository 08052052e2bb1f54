"""Files appear whole or not at all and survive a power cut; locks follow no links and end with their holder."""

from __future__ import annotations

import contextlib
import errno
import grp
import json
import os
import pwd
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import BaseModel

from dbscale import files
from dbscale.errors import FileError
from dbscale.files import (
    Holder,
    ProcessMark,
    atomic_open,
    driver_lock,
    holder,
    is_held,
    locked,
    make_folder,
    model_text,
    read_model,
    write_json,
    write_model,
)


class Pair(BaseModel):
    a: int


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_synced_then_renamed_then_its_folder_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    """In this order, or a power cut may leave the name without the content, or neither."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        order.append("sync folder" if target == str(tmp_path) else "sync file")
        assert target == str(tmp_path) or Path(target).read_text().endswith("}\n"), "nothing is left in a buffer"
        fsync(descriptor)

    def renamed(source: str, target: str) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_json(tmp_path / "row.json", {"a": 1}, durable=durable)
    with atomic_open(tmp_path / "row.json", durable=durable) as file:
        file.write(model_text(Pair(a=1)).encode())
    if durable:
        write_model(tmp_path / "row.json", Pair(a=1))
    assert order == (["sync file", "rename", "sync folder"] * 3 if durable else ["rename"] * 2)


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError, match="power cut"), atomic_open(path, "w") as file:
        file.write('{"a": 2')
        raise RuntimeError("power cut")
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [each.name for each in tmp_path.iterdir()] == ["row.json"]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b'{"a": "x"}', b"[" * 5000])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError):
        read_model(Pair, path)
    path.write_bytes(damage)
    with pytest.raises(FileError, match=r"x\.json is damaged \("):
        read_model(Pair, path)


def test_a_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    with driver_lock(tmp_path, "dbscale submit", "tiny"):
        assert is_held(tmp_path)
        with (
            pytest.raises(FileError, match=rf"`dbscale submit` \(pid {os.getpid()} on "),
            driver_lock(tmp_path, "b", "t"),
        ):
            pass
    assert not is_held(tmp_path)
    assert holder(tmp_path) is None
    with driver_lock(tmp_path, "again", "tiny"):
        found = holder(tmp_path)
        assert found is not None
        assert (found.command, found.grid, found.process) == ("again", "tiny", ProcessMark.of())
        assert found.process.alive


def test_whoever_may_wait_for_the_store_gets_it_once_the_holder_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    first = contextlib.ExitStack()
    first.enter_context(driver_lock(tmp_path, "dbscale submit", "tiny"))

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            first.close()

    monkeypatch.setattr(files.time, "sleep", pause)
    with driver_lock(tmp_path, "the job between two waves", "tiny", wait_s=60.0):
        assert pauses == [files.LOCK_INTERVAL_S] * 2
        found = holder(tmp_path)
        assert found is not None and found.command == "the job between two waves"
        with pytest.raises(FileError, match="in use"), driver_lock(tmp_path, "third", "tiny", wait_s=-1.0):
            pass


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"process": {"pid": 0, "host": "h"}, "command": "x", "grid": "g", "started": 0}',
     '{"process": {"pid": "1; x", "host": "h"}, "command": "x", "grid": "g", "started": 0}', "[" * 5000, "\\xff"],
)  # fmt: skip
def test_what_a_killed_holder_left_behind_is_no_lock_and_damage_no_error(tmp_path: Path, text: str) -> None:
    (tmp_path / ".driver.lock").write_text(text)
    assert not is_held(tmp_path)
    assert holder(tmp_path) is None
    with driver_lock(tmp_path, "new", "tiny"):
        pass


def test_a_lock_file_that_is_a_link_is_refused_and_its_target_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("data")
    (tmp_path / ".driver.lock").symlink_to(target)
    with (
        pytest.raises(FileError, match=r"\.driver\.lock is a symbolic link; remove it"),
        driver_lock(tmp_path, "x", "g"),
    ):
        pass
    with pytest.raises(FileError, match="symbolic link"), locked(tmp_path / ".driver.lock"):
        pass
    assert holder(tmp_path) is None and not is_held(tmp_path)
    assert target.read_text() == "data"


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from dbscale.files import locked\n"
    code += "with locked(Path(sys.argv[1])) as held: print(held, flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "True\n"
        with locked(tmp_path / "lock") as held:
            assert not held
        first.kill()
        first.wait()
    with locked(tmp_path / "lock") as held:
        assert held


def test_without_locks_on_the_file_system_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with locked(tmp_path / "lock") as held:
        assert held


def test_a_process_is_known_by_its_start_and_only_on_its_own_machine() -> None:
    mine = ProcessMark.of()
    assert mine.alive is True
    assert ProcessMark(mine.host, mine.pid, mine.boot, (mine.start or 0) + 1).alive is False
    assert ProcessMark("elsewhere", mine.pid, mine.boot, mine.start).alive is None
    assert ProcessMark(mine.host, mine.pid, "another boot", mine.start).alive is None
    for nobody in (0, -1, 2**40):
        assert ProcessMark(mine.host, nobody).alive is False
    who = Holder(mine, "dbscale submit", "tiny", 0.0)
    assert json.loads(json.dumps(files.asdict(who)))["process"]["pid"] == os.getpid()


def test_who_besides_the_owner_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of one's own means nobody else; any other group, and everybody, is said."""
    folder = tmp_path / "store"
    assert files.others_who_write(folder) is None, "no such folder"
    folder.mkdir()
    owner = pwd.getpwuid(os.getuid())
    members: list[str] = []
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_gid=gid, gr_name=owner.pw_name, gr_mem=members))
    for mode, said in (
        (0o755, None),
        (0o2775, None),
        (0o777, "everybody on this machine"),
        (0o1777, "everybody on this machine"),
    ):
        folder.chmod(mode)
        assert files.others_who_write(folder) == said, oct(mode)
    folder.chmod(0o775)
    members.append("colleague")
    assert files.others_who_write(folder) == f"the group {owner.pw_name}"
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_gid=gid, gr_name="lab", gr_mem=[]))
    assert files.others_who_write(folder) == "the group lab"

    def unknown(gid: int) -> None:
        raise KeyError(gid)

    monkeypatch.setattr(grp, "getgrgid", unknown)
    assert files.others_who_write(folder) == f"group {folder.stat().st_gid}"


def test_a_claim_that_names_no_boot_is_not_judged_by_its_pid() -> None:
    """This process lives, but nothing says that the claim was written on this machine since it was started."""
    own = ProcessMark.of()
    assert own.alive is True
    assert replace(own, boot=None).alive is None
    assert replace(own, start=None).alive is False, "a process of this machine knows when it was started"


@pytest.mark.parametrize("started", [-1.0, 1e300, float("nan")])
def test_a_holder_from_no_time_is_none(tmp_path: Path, started: float) -> None:
    with driver_lock(tmp_path, "dbscale submit", "tiny"):
        path = tmp_path / files.LOCK_NAME
        assert holder(tmp_path) is not None
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, "started": started}))
        assert holder(tmp_path) is None


def test_a_private_folder_is_a_new_one_of_its_owner_alone(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "jobs", private=True)
    assert (tmp_path / "a" / "jobs").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for taken in (tmp_path / "a", tmp_path / "link"):
        with pytest.raises(FileError, match="File exists"):
            make_folder(taken, private=True)
        make_folder(taken)


def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        files.read_bytes(path)
    with pytest.raises(IsADirectoryError):
        files.read_bytes(tmp_path)
    path.unlink()
    path.write_bytes(b"\0\xff")
    assert files.read_bytes(path) == b"\0\xff"
