"""Inside a SLURM job, without SLURM: identity, fencing, what is tried again and what is not, staging."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from dbscale.errors import StoreError
from dbscale.study.resources import StopRequest
from dbscale.study.store import Store
from launch.ranks import Rank
from launch.slurm.ending import is_ending_unwanted
from launch.slurm.fence import SUPERSEDED_EXIT, Claim, Fence
from launch.slurm.identity import JobIdentity
from launch.slurm.job import Patience, failed_in_this_job
from launch.slurm.queue import parse_element, parse_ended
from launch.staging import staged
from launch.worker import Result, record_death

TRAINING = {"budget": {"steps": 10}, "optim": {"lr": 1e-3}, "global_batch": 8, "precision": "fp32"}
GRID = {
    "question": "Does it work?", "upstream": {"dataset": "up", "num_samples": [16]}, "image_size": 32,
    "models": {"h1": {"kind": "deit", "heads": 1, "head_width": 16, "depth": 2, "patch_size": 8}}, "seeds": [0],
    "pretrain": TRAINING, "finetune": TRAINING,
}  # fmt: skip
JOB = JobIdentity("12_3", "17", 1)


@pytest.fixture
def patience(workplace: Any) -> Callable[..., Patience]:
    first = Rank(0, 0, 1, 1)
    return lambda rank=first: Patience(workplace.store, rank, StopRequest(), Claim(workplace.store, str(JOB)))


def test_a_job_knows_its_array_element_and_its_restart() -> None:
    element = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "1"}
    assert JobIdentity.of(element) == JOB
    assert str(JOB) == "12_3.1"
    assert str(JobIdentity.of({"SLURM_JOB_ID": "17"})) == "17.0"


def test_lines_of_squeue_and_sacct() -> None:
    element = parse_element("12|3|RUNNING|n1|None")
    assert (element.array, element.index, element.running) == (12, 3, True)
    assert parse_element("12|N/A|PENDING||Dependency|odd").index == 0
    assert [(each.index, each.state) for each in parse_ended("12_3|CANCELLED by 0|0:15")] == [(3, "CANCELLED")]
    assert parse_ended("12_[4-9]|PENDING|0:0") == []


def test_only_a_later_start_supersedes(tmp_path: Path) -> None:
    first, second = Fence(tmp_path / "f", 0), Fence(tmp_path / "f", 1)
    assert not first.superseded()
    first.raise_token()
    second.raise_token()
    assert first.superseded()
    assert not second.superseded()
    (tmp_path / "f").write_text("half")
    assert not first.superseded()


def test_a_superseded_process_ends_before_it_writes(tmp_path: Path) -> None:
    Fence(tmp_path / "f", 1).raise_token()
    code = (
        "import sys; from pathlib import Path; from launch.slurm.fence import Fence\n"
        "Fence(Path(sys.argv[1]), 0).check(); Path(sys.argv[2]).touch()"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "f"), str(tmp_path / "x")], check=False)
    assert run.returncode == SUPERSEDED_EXIT
    assert not (tmp_path / "x").exists()


def test_a_process_frozen_before_it_spoke_does_not_take_the_token_back(tmp_path: Path) -> None:
    Fence(tmp_path / "f", 1).raise_token()
    code = "import sys; from pathlib import Path; from launch.slurm.fence import Fence\n"
    code += "Fence(Path(sys.argv[1]), 0).raise_token()"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")], check=False)
    assert run.returncode == SUPERSEDED_EXIT
    assert (tmp_path / "f").read_text() == "1\n"


@pytest.mark.parametrize(
    ("signed", "lost"),
    [(["12_3.1"], False), (["12_3.0", "12_3.1"], False), (["7.0"], False), (["12_3.1", "15_0.0"], True),
     (["12_3.1", None], True), ([], False)],
)  # fmt: skip
def test_a_claim_is_lost_to_whoever_opened_a_later_attempt(
    workplace: Any, inline_cell: str, signed: list[str | None], lost: bool
) -> None:
    """After `cancel` and a new submit a cell is another job's, whatever a cut-off node still runs."""
    store, claim = workplace.store, Claim(workplace.store, str(JOB), inline_cell)
    for job in signed:
        record_death(store, inline_cell, "killed", "log")
        store.write_attempt(inline_cell, store.last_attempt(inline_cell).model_copy(update={"job": job}))
    assert claim.lost() is lost
    assert not Claim(store, str(JOB)).lost()


def test_a_cell_that_an_older_process_holds_is_waited_for(
    patience: Callable[..., Patience], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.slurm.job.BUSY_WAIT_S", 0.0)
    answers = ["busy", "busy", "done"]
    assert patience().run(lambda key: Result(key, answers.pop(0)), "a").status == "done"


@pytest.mark.parametrize(
    "reason",
    ["cannot write x: No space left on device", "OSError: [Errno 30] Read-only file system: 'x'",
     "RuntimeError: [gloo] Connection closed by peer", "DistBackendError: NCCL error"],
)  # fmt: skip
def test_a_failing_machine_ends_the_job_to_be_requeued(patience: Callable[..., Patience], reason: str) -> None:
    with pytest.raises(SystemExit) as ended:
        patience().run(lambda key: Result(key, "failed", reason), "a")
    assert ended.value.code != 0


def test_a_failing_cell_is_left_to_people(patience: Callable[..., Patience]) -> None:
    assert patience().run(lambda key: Result(key, "failed", "loss is not finite at step 7"), "a").status == "failed"


def test_what_failed_in_an_earlier_start_of_the_job_is_not_tried_again(workplace: Any, inline_cell: str) -> None:
    store = workplace.store
    assert not failed_in_this_job(store, inline_cell, JOB)
    for reason, job, expected in (
        ("loss is not finite", "12_3.0", True),
        ("loss is not finite", "12_4.0", False),
        ("loss is not finite", None, False),
        ("cannot write x: No space left on device", "12_3.0", False),
    ):
        record_death(store, inline_cell, reason, "log")
        attempt = store.last_attempt(inline_cell)
        store.write_attempt(inline_cell, attempt.model_copy(update={"job": job}))
        assert failed_in_this_job(store, inline_cell, JOB) is expected
        assert not failed_in_this_job(store, inline_cell, JobIdentity("12_3", "17", 0))


def test_a_rank_that_fails_alone_records_why_and_ends_the_job(
    workplace: Any, inline_cell: str, patience: Callable[..., Patience], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.slurm.job.RECORD_WAIT_S", 0.0)
    monkeypatch.setattr("launch.slurm.job.job_log", lambda: "the log")
    with pytest.raises(SystemExit):
        patience(Rank(1, 1, 2, 2)).run(lambda key: Result(key, "failed", "out of memory"), inline_cell)
    attempt = workplace.store.last_attempt(inline_cell)
    assert (attempt.status, attempt.reason) == ("failed", "rank 1: out of memory")


@pytest.fixture
def inline_cell(workplace: Any, fakes: ModuleType) -> str:
    """A cell whose recipe is in the store and whose dataset is packed."""
    from launch.cli import main

    workplace.behave(fail=["pretrain"])
    main(["submit", *workplace.where, "--cluster", "inline"])
    return next(path.name for path in workplace.store.root.glob("cells/pretrain-*"))


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Store, Path, list[str]]:
    """A store with the finetunes of a grid of digits, really packed: (store, data folder, keys)."""
    from launch.study import load_study
    from shards.pack import ensure_packed

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


def test_a_store_that_refuses_is_waited_for(
    workplace: Any, patience: Callable[..., Patience], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.slurm.job.PROBE_INTERVAL_S", 0.0)
    tries: list[str] = []
    wrote: list[Path] = []

    def run(key: str) -> Result:
        tries.append(key)
        if len(tries) == 1:
            raise StoreError(f"cannot write {key}: No space left on device")
        return Result(key, "done")

    def probe(folder: Path) -> None:
        wrote.append(folder)
        if len(wrote) < 3:
            raise StoreError("cannot write: Read-only file system")

    monkeypatch.setattr("launch.slurm.job.probe", probe)
    assert patience().run(run, "a").status == "done"
    assert (len(tries), len(wrote)) == (2, 3)


@pytest.mark.parametrize(
    ("said", "unwanted"),
    [("COMPLETING|TimeLimit", True), ("FAILED|JobLaunchFailure", True), ("COMPLETING|NonZeroExitCode", True),
     ("RUNNING|None", False), ("COMPLETING|None", False), ("CANCELLED|None", False), ("PENDING|BeginTime", False)],
)  # fmt: skip
def test_what_slurm_ends_for_reasons_of_its_own_is_told_from_a_wish(
    said: str, unwanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.slurm.ending.call", lambda command: said + "\n")
    assert is_ending_unwanted(JOB) is unwanted
