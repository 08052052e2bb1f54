"""Inside a SLURM job, without SLURM: identity, fencing, what is tried again and what is not, staging."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dbscale.study.stop import StopRequest
from launch.ranks import Rank
from launch.slurm.fence import SUPERSEDED_EXIT, Fence
from launch.slurm.job import JobIdentity, Patience, failed_in_this_job
from launch.slurm.queue import parse_element, parse_ended
from launch.slurm.staging import copy_dataset, staged
from launch.worker import Result, record_death

JOB = JobIdentity("12_3", "17", 1)


@pytest.fixture
def patience(workplace: Any) -> Callable[..., Patience]:
    first = Rank(0, 0, 1, 1)
    return lambda rank=first: Patience(workplace.store, JOB, rank, StopRequest())


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


def test_staging_copies_what_a_bundle_reads_once(
    workplace: Any, inline_cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = workplace.folder / "data"
    assert staged([inline_cell], workplace.store, data, None) == data
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "node"))
    folder = staged([inline_cell], workplace.store, data, "$NODE_DISK/x")
    assert sorted(path.name for path in (folder / "shards").iterdir() if path.is_dir()) == ["up"]
    stamp = (folder / "shards" / "up" / "manifest.json").stat().st_mtime_ns
    assert staged([inline_cell], workplace.store, data, "$NODE_DISK/x") == folder
    assert (folder / "shards" / "up" / "manifest.json").stat().st_mtime_ns == stamp


def test_a_copy_that_was_broken_off_is_made_again(workplace: Any, inline_cell: str, tmp_path: Path) -> None:
    source, target = workplace.folder / "data" / "shards" / "up", tmp_path / "copy"
    target.mkdir()
    (target / "train-000000.tar").write_text("half")
    copy_dataset(source, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in source.iterdir())
