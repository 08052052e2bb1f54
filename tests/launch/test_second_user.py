"""Another user on the same store: he reads it, is refused in one sentence where he may not write, and harms nothing.

Needs root, to become two other users for a while.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from dbscale.errors import StoreError
from dbscale.training.checkpoint import newest_whole
from tests.launch.conftest import FAKES, GRID, NUM_CELLS, ROOT, Workplace

OWNER, COLLEAGUE = 1, 65534
"""`daemon` and `nobody`."""
INLINE = ("--cluster", "inline")
"""In one process: root's Python may lie where only root's own children can start it."""


def become(uid: int, *command: str) -> list[str]:
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *command]


@pytest.fixture
def shared() -> Iterator[Workplace]:
    """A folder that both may enter; pytest's own is closed to everybody but root."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to act as two other users")
    probe = become(COLLEAGUE, sys.executable, "-c", "import dbscale.launch.cli")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAKES), str(ROOT)]), "HOME": "/nonexistent"}
    if subprocess.run(probe, env=environment, cwd="/", capture_output=True, check=False).returncode:
        pytest.skip("other users cannot read this checkout or its Python")
    folder = Path(tempfile.mkdtemp(prefix="dbscale-two-users-"))
    try:
        folder.chmod(0o755)
        (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
        for name in ("out", "data"):
            (folder / name).mkdir()
            os.chown(folder / name, OWNER, OWNER)
        yield Workplace(folder, environment)
    finally:
        shutil.rmtree(folder)


def start(place: Workplace, uid: int, command: str, *words: str) -> subprocess.Popen[str]:
    line = become(uid, sys.executable, "-m", "dbscale.launch.cli", command, *place.where, *words)
    return subprocess.Popen(
        line, env=place.environment, cwd=place.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(place: Workplace, uid: int, command: str, *words: str) -> tuple[int, str, str]:
    process = start(place, uid, command, *words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def content(place: Workplace) -> dict[Path, tuple[int, bytes]]:
    """Owner and bytes of every file of the store."""
    return {path: (path.stat().st_uid, path.read_bytes()) for path in place.store.root.rglob("*") if path.is_file()}


def test_he_reads_everything_and_is_refused_where_he_may_not_write(
    shared: Workplace, wait_until: Callable[..., None]
) -> None:
    place = shared
    (place.folder / "out" / "fake.json").write_text('{"steps": 150, "step_s": 0.02}')
    driver = start(place, OWNER, "submit", *INLINE)
    wait_until(place.steps)
    code, out, err = run(place, COLLEAGUE, "status")
    assert (code, err) == (0, "") and f"driven by pid {driver.pid}" in out and "running:" in out
    code, _, err = run(place, COLLEAGUE, "cancel")
    assert code == 1 and "Traceback" not in err and "not permitted" in err
    (place.folder / "out" / "fake.json").write_text('{"steps": 3, "step_s": 0}')
    driver.communicate(timeout=300)
    assert driver.returncode == 0
    before = content(place)
    code, out, _ = run(place, COLLEAGUE, "status")
    assert code == 0 and f"{NUM_CELLS}/{NUM_CELLS} cells done" in out
    for words in (INLINE, (*INLINE, "--set", "seeds=[0,1]")):
        code, _, err = run(place, COLLEAGUE, "submit", *words)
        assert code == 1 and err.count("\n") == 1, err
        assert "cannot write to the store" in err and "choose another with --store" in err
    assert content(place) == before


def test_a_store_that_a_group_may_write_is_warned_of_and_shared(shared: Workplace) -> None:
    """The colleague goes on with what the owner left, and the store ends whole."""
    place, root = shared, shared.store.root
    code, _, _ = run(place, OWNER, "submit", *INLINE)
    assert code == 0
    for path in (root, *root.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    code, out, err = run(place, COLLEAGUE, "submit", *INLINE, "--set", "seeds=[0,1]")
    assert (code, len(place.done())) == (0, 2 * NUM_CELLS), err
    assert "note: everybody on this machine can write to the store" in out
    owners = {path.stat().st_uid for path in root.glob("cells/*/row.json")}
    assert owners == {OWNER, COLLEAGUE}


def test_checkpoints_of_another_are_not_taken_for_none(tmp_path: Path, shared: Workplace) -> None:
    """Begun anew, his run would be lost; and a store of its own folder mode would have told nobody."""
    folder = shared.folder / "out" / "checkpoints"
    folder.mkdir(mode=0o700)
    os.chown(folder, OWNER, OWNER)
    assert newest_whole(folder) is None, "root may look"
    os.seteuid(COLLEAGUE)
    try:
        with pytest.raises(StoreError, match=r"belongs to user 1 \(mode 700\).*let that user go on with it, or open"):
            newest_whole(folder)
    finally:
        os.seteuid(0)


def test_staging_folders_are_not_shared_between_users(shared: Workplace) -> None:
    from dbscale.data.stage import hold
    from dbscale.errors import DataError

    folder = shared.folder / "staging"
    folder.mkdir()
    os.chown(folder, OWNER, OWNER)
    with pytest.raises(DataError, match=r"is another user's, or a link: choose a staging folder of your own"):
        hold(folder)
