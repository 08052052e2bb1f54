"""Leases: one holder at a time, renewed, passed on when the holder is dead or silent, and never kept by a sleeper."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dbscale.errors import FileError
from dbscale.files import ProcessMark
from dbscale.launch.lease import Leases, is_own, read_lease, remove


def elsewhere(path: Path, **changes: Any) -> None:
    """A lease that a process of another machine holds."""
    mark = asdict(replace(ProcessMark.of(), host="elsewhere", **changes))
    path.write_text(json.dumps({"token": "theirs", **mark}))


def never(reason: str) -> None:
    raise AssertionError(reason)


def test_a_store_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("dbscale.launch.lease.os.open", refuse)
    with pytest.raises(FileError, match=r"cannot write .*\.lease: Read-only file system; choose a folder"):
        Leases(10).take(tmp_path / ".lease")


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path, first, second = tmp_path / "cell" / ".lease", Leases(), Leases()
    with first.hold(path, never) as held:
        assert held
        with second.hold(path, never) as other:
            assert not other
        assert path.exists(), "who does not hold it does not give it back"
    assert list(path.parent.iterdir()) == []
    with second.hold(path, never) as held:
        assert held


def grab(path: Path, barrier: Any, taken: Any) -> None:
    barrier.wait()
    if Leases().take(path) is not None:
        taken.put(os.getpid())
    barrier.wait()  # all live on, or a dead holder's lease would pass on


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_ask_at_once_one_gets_it(tmp_path: Path, stale: bool) -> None:
    path, context = tmp_path / ".lease", multiprocessing.get_context("fork")
    if stale:
        path.write_text(json.dumps({"token": "old", **asdict(replace(ProcessMark.of(), pid=2**22 + 1, start=1))}))
    barrier, taken = context.Barrier(8), context.SimpleQueue()
    processes = [context.Process(target=grab, args=(path, barrier, taken)) for _ in range(8)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    holder = read_lease(path)[1]
    assert holder is not None
    assert taken.get() == holder.pid or stale
    assert taken.empty() or stale, "a stale lease may pass through two hands, and the first notices"


def test_a_dead_process_of_this_machine_loses_it_at_once(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    path.write_text(json.dumps({"token": "old", **asdict(replace(ProcessMark.of(), pid=2**22 + 1, start=1))}))
    assert Leases().take(path) is not None


def test_silence_on_another_machine_is_watched_not_computed(tmp_path: Path) -> None:
    """However old the file's time looks: only what this worker has itself watched counts."""
    path, now = tmp_path / ".lease", [0.0]
    elsewhere(path)
    os.utime(path, (0, 0))
    leases = Leases(limit_s=60, clock=lambda: now[0])
    assert leases.take(path) is None
    now[0] = 59
    assert leases.take(path) is None
    os.utime(path, (5, 5))  # a renewal, by a clock of its own
    now[0] = 100
    assert leases.take(path) is None
    now[0] = 160
    assert leases.take(path) is None
    now[0] = 161
    assert leases.take(path) is not None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"token": "x"}', '{"token": "x", "host": "h", "pid": 1, "more": 1}']
)
def test_a_damaged_lease_passes_on_after_the_limit(tmp_path: Path, content: str) -> None:
    path, now = tmp_path / ".lease", [0.0]
    path.write_text(content)
    leases = Leases(limit_s=60, clock=lambda: now[0])
    assert leases.take(path) is None
    now[0] = 61
    assert leases.take(path) is not None


def test_a_lease_that_was_renewed_meanwhile_is_put_back(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    elsewhere(path)
    stamp, _ = read_lease(path)
    os.utime(path, (7, 7))
    assert not remove(path, stamp)
    assert read_lease(path)[0] == ("theirs", 7_000_000_000)
    assert [each.name for each in tmp_path.iterdir()] == [".lease"]


def test_it_is_renewed_and_a_sleeper_is_told_that_it_lost_it(tmp_path: Path, wait_until: Callable[..., None]) -> None:
    path, told = tmp_path / ".lease", []
    with Leases(limit_s=0.3).hold(path, told.append) as held:
        assert held
        before = path.stat().st_mtime_ns
        wait_until(lambda: path.stat().st_mtime_ns > before)
        path.unlink()
        elsewhere(path)
        wait_until(lambda: told)
    assert "was taken over" in told[0]
    assert read_lease(path)[0][0] == "theirs", "what is another's is not given back"


def test_ownership_is_of_the_file_not_of_the_name(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    descriptor = Leases().take(path)
    assert descriptor is not None
    assert is_own(path, descriptor)
    path.rename(tmp_path / "aside")
    assert not is_own(path, descriptor)
    path.write_text((tmp_path / "aside").read_text())
    assert not is_own(path, descriptor)


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    path = tmp_path / ".lease"
    path.symlink_to(tmp_path / "precious")
    assert Leases().take(path) is None
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_lease_is_renewed_six_times_within_its_limit_by_a_thread_that_nothing_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, leases, waits = tmp_path / ".lease", Leases(limit_s=12.0), []
    descriptor = leases.take(path)
    assert descriptor is not None
    os.utime(path, (1, 1))

    class Released(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return len(waits) > 2

    leases._renew(path, descriptor, Released(), never)
    assert waits == [2.0, 2.0, 2.0] and path.stat().st_mtime > 1
    os.close(descriptor)
    path.unlink()
    before = set(threading.enumerate())
    with leases.hold(path, never):
        (renewer,) = set(threading.enumerate()) - before
        assert renewer.daemon


def test_others_may_read_who_holds_a_lease(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        descriptor = Leases().take(tmp_path / ".lease")
    finally:
        os.umask(before)
    assert descriptor is not None and (tmp_path / ".lease").stat().st_mode & 0o777 == 0o644
    os.close(descriptor)
