"""Packing in processes of its own: killed with SIGKILL, and several at once; the bytes are always the same."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dbscale.data import load_manifest
from dbscale.shards.pack import pack
from dbscale.shards.sources import source_of
from dbscale.shards.verify import verify

OPTIONS = {"source": "fractals", "families": 4, "num_train": 1024, "num_test": 32, "shard_samples": 32}
NUM_SHARDS = 33
PROGRAM = f"""
import sys
from dbscale.shards.pack import pack
from dbscale.shards.sources import source_of
pack(source_of("x", {OPTIONS}), sys.argv[1], name="x", jobs=int(sys.argv[2]), progress=False)
"""


def start_packing(folder: Path, jobs: int) -> psutil.Popen:
    return psutil.Popen([sys.executable, "-c", PROGRAM, str(folder), str(jobs)], stderr=subprocess.PIPE)


def pack_here(folder: Path) -> None:
    pack(source_of("x", OPTIONS), folder, name="x", jobs=1, progress=False)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    pack_here(folder)
    return digests(folder)


def wait_for_tars(folder: Path, count: int, process: psutil.Popen) -> None:
    while len(list(folder.glob("*.tar"))) < count:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.002)


@pytest.mark.parametrize("jobs", [1, 2])
def test_kill_9_and_packing_again_give_the_same_bytes(tmp_path: Path, whole: dict[str, str], jobs: int) -> None:
    folder = tmp_path / "killed"
    for tars in (3, 9):
        process = start_packing(folder, jobs)
        wait_for_tars(folder, tars, process)
        helpers = process.children(recursive=True)
        process.kill()
        process.wait()
        process.stderr.close()
        # A pool's processes end with their parent: nobody would ever give them work again.
        _, alive = psutil.wait_procs(helpers, timeout=60)
        assert not alive
        assert not (folder / "manifest.json").exists()
    assert len(list(folder.glob("*.tar"))) < NUM_SHARDS
    kept = {
        path: path.stat().st_mtime_ns
        for path in folder.glob("*.tar")
        if (folder / ".pack" / f"{path.stem}.npy").exists()
    }
    pack_here(folder)
    assert digests(folder) == whole
    assert len(kept) >= 3
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())


def test_two_writers_at_once_do_no_harm(tmp_path: Path, whole: dict[str, str]) -> None:
    folder = tmp_path / "shared"
    writers = [start_packing(folder, 1) for _ in range(3)]
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors.decode()
    assert digests(folder) == whole
    assert load_manifest(folder).split("train").num_samples == 1024
    assert verify(folder) == []
