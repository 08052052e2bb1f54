"""A bundle in one process: every cell gets its turn, blocked ones a second, a stop is obeyed; ranks, signals, staging."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from dbscale.files import ProcessMark
from dbscale.launch.worker import (
    LOST_EXIT,
    Rank,
    Result,
    cause_of_death,
    end_with_peers,
    port_of_job,
    record_death,
    run_bundle,
    staged,
    stop_on_signals,
    stop_without,
    thread_environment,
    watch,
    work_through,
)
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Failure, Store

TRAINING = {"budget": {"steps": 10}, "optim": {"lr": 1e-3}, "global_batch": 8, "precision": "fp32"}
GRID = {
    "question": "Does it work?", "upstream": {"dataset": "up", "num_samples": [16]}, "image_size": 32,
    "models": {"h1": {"kind": "deit", "heads": 1, "head_width": 16, "depth": 2, "patch_size": 8}}, "seeds": [0],
    "pretrain": TRAINING, "finetune": TRAINING,
}  # fmt: skip


def runner(statuses: dict[str, list[str]]) -> Callable[[str], Result]:
    """Answers each turn of a key with the next of its statuses."""
    return lambda key: Result(key, statuses[key].pop(0) if len(statuses[key]) > 1 else statuses[key][0])


def test_failures_and_blocks_stop_nobody_else() -> None:
    statuses = {"a": ["failed"], "b": ["blocked"], "c": ["done"]}
    results = work_through(list("abc"), runner(statuses), StopRequest(), ready=lambda key: False)
    assert [result.status for result in results] == ["failed", "blocked", "done"]


def test_the_log_says_when_a_cell_began_and_how_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = run_bundle(["pretrain-x"], Store(tmp_path), tmp_path, Resources(), StopRequest())
    began, ended = (line.split(" ", 3)[3] for line in capsys.readouterr().err.splitlines() if line.startswith("==="))
    assert result.status == "failed" and result.reason
    assert (began, ended) == ("start pretrain-x", f"failed pretrain-x {result.reason}")


def test_a_blocked_cell_gets_another_turn_when_its_parent_came_late() -> None:
    statuses = {"student": ["blocked", "done"], "other": ["done"]}
    results = work_through(["student", "other"], runner(statuses), StopRequest(), ready=lambda key: True)
    assert [result.status for result in results] == ["done", "done"]


def test_a_rank_whose_cell_failed_ends_with_its_peers() -> None:
    """They may wait for it in a collective; what is left of the bundle starts again."""
    with pytest.raises(SystemExit) as ended:
        work_through(
            list("ab"), partial(end_with_peers, runner({"a": ["failed"]})), StopRequest(), ready=lambda _: True
        )
    assert ended.value.code == LOST_EXIT
    run = partial(end_with_peers, runner({"a": ["done"], "b": ["blocked"]}))
    results = work_through(list("ab"), run, StopRequest(), ready=lambda _: False)
    assert [result.status for result in results] == ["done", "blocked"]


def test_a_stop_between_cells_leaves_the_rest_alone() -> None:
    stop = StopRequest()

    def run(key: str) -> Result:
        stop.ask("SIGTERM")
        return Result(key, "interrupted")

    assert [result.key for result in work_through(["a", "b"], run, stop, ready=lambda key: True)] == ["a"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_asks_and_the_handlers_before_come_back(number: signal.Signals) -> None:
    before, stop = signal.getsignal(number), StopRequest()
    with stop_on_signals(stop):
        os.kill(os.getpid(), number)
        assert stop.reason == number.name
    assert signal.getsignal(number) is before


def test_only_a_second_interrupt_kills() -> None:
    """Of any other signal a scheduler may send as many as it likes."""
    code = (
        "import os, signal, sys\n"
        "from dbscale.launch.worker import stop_on_signals\n"
        "from dbscale.study.resources import StopRequest\n"
        "with stop_on_signals(StopRequest()):\n"
        "    for name in sys.argv[1:]:\n"
        "        os.kill(os.getpid(), getattr(signal, name))\n"
        "print('alive')\n"
    )
    for names, code_of_end in ((["SIGTERM"] * 3 + ["SIGINT"], 0), (["SIGUSR2", "SIGINT", "SIGINT"], -signal.SIGINT)):
        run = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
        assert (run.returncode, run.stdout) == (code_of_end, "" if code_of_end else "alive\n")


def test_a_death_closes_the_attempt_that_was_open_or_is_one_of_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record_death(store, "c", "killed", "the log")
    (first,) = store.attempts("c")
    assert (first.number, first.status, first.reason, first.log) == (1, "failed", "killed", "the log")
    assert first.failure is Failure.LOST and first.ended is not None
    store.write_attempt("c", first.model_copy(update={"number": 2, "status": "running", "ended": None, "log": None}))
    record_death(store, "c", "no memory", "its log", Failure.MEMORY)
    record_death(store, "c", "again", None)
    seen = [(each.number, each.reason, each.log, each.failure) for each in store.attempts("c")]
    assert seen == [(1, "killed", "the log", Failure.LOST), (2, "no memory", "its log", Failure.MEMORY),
                    (3, "again", None, Failure.LOST)]  # fmt: skip


def test_a_full_disk_is_named_as_what_killed_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, left = Store(tmp_path), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: left._replace(free=3 << 20))
    assert cause_of_death(store) == f"(the disk of {tmp_path} has 3 MiB left)"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: left._replace(free=1 << 30))
    assert cause_of_death(store) == "(out of memory? killed?)"


def test_the_death_of_a_watched_process_asks_to_stop(wait_until: Callable[..., None]) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    stop = StopRequest()
    watch(stop_without(stop, ProcessMark.of(), ProcessMark.of(child.pid)), interval_s=0.01)
    assert not stop.requested
    child.kill()
    wait_until(lambda: stop.requested, 10)
    child.communicate()


def test_ranks_are_those_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "5",
             "SLURM_LOCALID": "1"}  # fmt: skip
    local = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1",
             "SUBMITIT_LOCAL_LOCALID": "1"}  # fmt: skip
    for environment, rank in ((slurm, Rank(5, 1, 8, 4)), (local, Rank(1, 1, 2, 2))):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert Rank.of_job() == rank


def test_a_lone_process_meets_nobody_and_each_restart_meets_elsewhere() -> None:
    assert Rank(0, 0, 1, 1).environment(master="h", port=1) == {}
    told = Rank(3, 1, 4, 2).environment(master="node1", port=29500)
    assert (told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"]) == ("3", "1", "4")
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("node1", "29500")
    ports = [port_of_job("1234", restart) for restart in range(20)]
    assert len(set(ports)) == 20
    assert all(1024 < port < 65536 for port in ports)


def test_threads_reach_the_math_libraries() -> None:
    assert thread_environment(Resources(threads=3))["OMP_NUM_THREADS"] == "3"
    assert thread_environment(Resources()) == {}


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Store, Path, list[str]]:
    """A store with the finetunes of a grid of digits, really packed: (store, data folder, keys)."""
    from dbscale.launch.study import load_study
    from dbscale.shards.pack import ensure_packed

    grid = {**GRID, "datasets": {"up": {"source": "digits", "image_size": 32}}, "name": "digits", "students": ["h1"],
            "downstream": [{"dataset": "up", "num_samples": [10, 20]}], "teachers": {}, "arms": ["plain"]}  # fmt: skip
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(grid))
    store, data = tmp_path / "store", tmp_path / "packed"
    ensure_packed("up", grid["datasets"]["up"], data, progress=False)
    study = load_study(grid=tmp_path / "digits.yaml", cluster="inline", store=store, data=data)
    cells = [point.cell for point in study.points()]
    for cell in cells:
        study.store.write_spec(cell.spec())
    return study.store, data, [cell.key for cell in cells]


def test_a_staged_bundle_reads_the_same_images_from_the_nodes_disk(
    packed: tuple[Store, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dbscale.data import open_dataset

    store, data, keys = packed
    with staged(keys, store, data, None, StopRequest()) as folder:
        assert folder == data
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "node disk"))
    there = open_dataset(data / "shards" / "up").subset(20)
    expected = there.dataset.reader.fetch(there.indices)[0]
    with staged(keys, store, data, "$NODE_DISK/x", StopRequest()) as folder:
        assert tmp_path / "node disk" in folder.parents
        data.rename(tmp_path / "away")
        for split, count in (("train", 20), ("test", None)):
            subset = open_dataset(folder / "shards" / "up", split).subset(count)
            found = subset.dataset.reader.fetch(subset.indices)[0]
            assert len(found) == len(subset.indices)
            assert split == "test" or np.array_equal(found, expected)
        assert open_dataset(folder / "shards" / "up").fingerprint == there.dataset.fingerprint
    assert list((tmp_path / "node disk/x/dbscale").iterdir()) == []


def test_a_job_that_comes_back_finds_its_copies(packed: tuple[Store, Path, list[str]], tmp_path: Path) -> None:
    store, data, keys = packed
    stop = StopRequest()
    with staged(keys, store, data, str(tmp_path / "node"), stop):
        stop.ask("SIGUSR2")
    (copy,) = (tmp_path / "node/dbscale").glob("up-*")
    stamps = {path: path.stat().st_mtime_ns for path in copy.glob("*.tar")}
    with staged(keys, store, data, str(tmp_path / "node"), StopRequest()) as folder:
        assert (folder / "shards/up").resolve() == copy
        assert {path: path.stat().st_mtime_ns for path in copy.glob("*.tar")} == stamps
    assert list((tmp_path / "node/dbscale").iterdir()) == []


@pytest.mark.parametrize("fault", ["full disk", "no such variable"])
def test_what_cannot_be_staged_is_read_where_it_is(
    packed: tuple[Store, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], fault: str,
) -> None:  # fmt: skip
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store, data, keys = packed
    place = str(tmp_path / "node")
    if fault == "full disk":
        monkeypatch.setattr(shutil, "copyfileobj", full)
    else:
        place = "$NO_SUCH_DISK/x"
    with staged(keys, store, data, place, StopRequest()) as folder:
        assert folder == data
    said = capsys.readouterr().err
    expected = "the disk is full" if fault == "full disk" else "a variable that is not set in the job's environment"
    assert expected in said and f"reading {data / 'shards'}" in said
    assert not list(tmp_path.glob("node/dbscale/*"))
