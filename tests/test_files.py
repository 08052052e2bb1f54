"""One driver per store, and the lock ends with its holder."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbscale.errors import FileError
from dbscale.files import driver_lock, holder, is_held


def test_a_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    with driver_lock(tmp_path, "dbscale submit", "tiny"):
        assert is_held(tmp_path)
        with pytest.raises(FileError, match=r"`dbscale submit` \(pid \d+ on "), driver_lock(tmp_path, "other", "tiny"):
            pass
    assert not is_held(tmp_path)
    assert holder(tmp_path) is None
    with driver_lock(tmp_path, "again", "tiny"):
        assert (holder(tmp_path) or {})["command"] == "again"


def test_what_a_killed_holder_left_behind_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / ".driver.lock").write_text('{"pid": 1, "host": "gone", "command": "x", "started": 0}')
    assert not is_held(tmp_path)
    with driver_lock(tmp_path, "new", "tiny"):
        pass
