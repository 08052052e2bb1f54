"""Inside a SLURM job, without SLURM: identity, fencing, what is tried again and what is not, who is requeued."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from dbscale.errors import FileError, StoreError
from dbscale.launch.slurm.job import (
    OVERTAKEN_EXIT,
    RETRY_EXIT,
    CellRuns,
    Fence,
    JobIdentity,
    Work,
    decide_when_stopped,
    failed_in_this_job,
    main,
    master_address,
    record_of,
    requeue_lines,
    run_element,
)
from dbscale.launch.slurm.queue import SubmitRecord, make_uid, write_record
from dbscale.launch.worker import LOST_EXIT, Rank, Result, record_death
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Failure, Store

JOB = JobIdentity("12_3", "17", 1)


@pytest.fixture
def runs(workplace: Any) -> Callable[..., CellRuns]:
    """Makes what runs the cells of job 12_3.1, as the given rank."""
    store, first = workplace.store, Rank(0, 0, 1, 1)
    return lambda rank=first: CellRuns(
        store, rank, StopRequest(), Fence(workplace.folder / "token", JOB, store), "the log"
    )


def test_a_job_knows_its_array_element_and_its_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert str(JobIdentity.of_job()) == "17.0"
    for name, value in (("ARRAY_JOB_ID", "12"), ("ARRAY_TASK_ID", "3"), ("RESTART_COUNT", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert JobIdentity.of_job() == JOB
    assert str(JOB) == "12_3.1"


def test_a_job_reads_its_cells_from_its_record_and_ends_where_that_was_withdrawn_or_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login node that died left a call of sbatch behind, which went through after the next submit had cleared up."""
    store, uid = Store(tmp_path / "out"), make_uid()
    work = Work(store=str(store.root), grid="tiny", uid=uid, data="data", resources=Resources(), requeue_limit=1)
    with pytest.raises(FileError, match=r"the store .*/out is not to be seen on"):
        record_of(work)
    other = SubmitRecord(uid=make_uid(), grid="tiny", kind="bundles", wave=1, created=0.0, elements=(("a",),))
    write_record(store, other)
    assert record_of(work) is None
    assert capsys.readouterr().err == f"submission {uid} was cut off and withdrawn: nothing to do\n"
    mine = other.model_copy(update={"uid": uid, "elements": (("b",), ("c",))})
    write_record(store, mine)
    assert record_of(work) == mine
    path = store.root / "grids/tiny/submits" / f"{uid}.json"
    path.write_text(other.model_dump_json())
    assert record_of(work) is None, "another start of the job would read the same"
    said = capsys.readouterr().err
    assert said.startswith(f"{path} is the record of tiny/{other.uid}, not of tiny/{uid}; `dbscale submit` of the grid")

    def unreachable(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("dbscale.files.read_bytes", unreachable)
    with pytest.raises(FileError, match=r"cannot be read \(Stale file handle\)"):
        record_of(work)  # a job that fails is started again
    with pytest.raises(ValidationError):
        Work.model_validate_json(work.model_dump_json().replace(uid, "../../.."))


def test_whether_to_start_again_is_asked_from_the_moment_of_the_stop_until_it_is_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop, answers, asked = StopRequest(), [1, 2, 1, 2, 0], []
    monkeypatch.setattr("dbscale.launch.slurm.job.ask_later", lambda limit: (asked.append(limit), answers.pop(0))[1])
    monkeypatch.setattr("dbscale.launch.slurm.job.time.sleep", asked.append)
    stop.ask("SIGTERM")
    decide_when_stopped(stop, 7)
    assert asked == [7, 0.5, 7, 1.0, 7, 2.0, 7, 2.0, 7]


def fence(tmp_path: Path, restart: int) -> Fence:
    return Fence(tmp_path / "f", JobIdentity("12_3", "17", restart), Store(tmp_path / "out"))


def test_only_a_later_start_overtakes(tmp_path: Path) -> None:
    first, second = fence(tmp_path, 0), fence(tmp_path, 1)
    assert first.overtaken() is None
    first.raise_token()
    assert (tmp_path / "f").read_text() == "0\n"
    second.raise_token()
    assert "superseded by a later start" in (first.overtaken() or "")
    assert second.overtaken() is None
    (tmp_path / "f").write_text("half")
    assert first.overtaken() is None, "what cannot be read says nothing"


@pytest.mark.parametrize("action", ["check", "raise_token"])
def test_an_overtaken_process_ends_before_it_writes(tmp_path: Path, action: str) -> None:
    """Also one that was frozen before it could declare itself: it does not take the token back."""
    fence(tmp_path, 1).raise_token()
    code = (
        "import sys; from pathlib import Path; from tests.launch.test_slurm_job import fence\n"
        f"fence(Path(sys.argv[1]), 0).{action}(); (Path(sys.argv[1]) / 'x').touch()"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=Path(__file__).parents[2])
    assert run.returncode == OVERTAKEN_EXIT
    assert (tmp_path / "f").read_text() == "1\n"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("signed", "lost"),
    [(["12_3.1"], False), (["12_3.0", "12_3.1"], False), (["7.0"], False), (["12_3.1", "15_0.0"], True),
     (["12_3.1", None], True), ([], False)],
)  # fmt: skip
def test_a_claim_is_lost_to_whoever_opened_a_later_attempt(
    workplace: Any, inline_cell: str, signed: list[str | None], lost: bool
) -> None:
    """After `cancel` and a new submit a cell is another job's, whatever a cut-off node still runs."""
    store = workplace.store
    for job in signed:
        record_death(store, inline_cell, "killed", "log")
        store.write_attempt(inline_cell, store.last_attempt(inline_cell).model_copy(update={"job": job}))
    claim = Fence(workplace.folder / "f", JOB, store, inline_cell)
    assert (claim.overtaken() is not None) is lost
    assert Fence(workplace.folder / "f", JOB, store).overtaken() is None
    last = store.cell_dir(inline_cell) / "attempts" / f"{store.last_attempt(inline_cell).number}.json"
    last.write_text("")
    assert claim.overtaken() is None, "what cannot be read says nothing"


def test_a_cell_that_an_older_process_holds_is_waited_for(
    runs: Callable[..., CellRuns], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbscale.launch.slurm.job.BUSY_WAIT_S", 0.0)
    answers = ["busy", "busy", "done"]
    assert runs().run(lambda key: Result(key, answers.pop(0)), "a").status == "done"
    assert not answers


@pytest.mark.parametrize(
    ("failure", "world_size", "ends"),
    [(Failure.CONNECTION, 1, RETRY_EXIT), (Failure.CONNECTION, 2, RETRY_EXIT), (Failure.STORAGE, 2, RETRY_EXIT),
     (Failure.CELL, 1, None), (Failure.MEMORY, 1, None), (Failure.CELL, 2, LOST_EXIT), (Failure.MEMORY, 2, LOST_EXIT)],
)  # fmt: skip
def test_the_kind_of_a_failure_decides_whether_the_job_ends(
    runs: Callable[..., CellRuns], failure: Failure, world_size: int, ends: int | None
) -> None:
    """The machine's fault is for another start; a cell's own for people, and costs the others of the bundle nothing."""
    cell = runs(Rank(0, 0, world_size, world_size))
    answer = Result("a", "failed", "No space left on device, says a message that nobody parses", failure)
    if ends is None:
        assert cell.run(lambda key: answer, "a") is answer
        return
    with pytest.raises(SystemExit) as ended:
        cell.run(lambda key: answer, "a")
    assert ended.value.code == ends


def test_what_failed_in_an_earlier_start_of_the_job_is_not_tried_again(workplace: Any, inline_cell: str) -> None:
    store = workplace.store
    assert not failed_in_this_job(store, inline_cell, JOB)
    for failure, job, expected in (
        (Failure.CELL, "12_3.0", True),
        (Failure.MEMORY, "12_3.0", True),
        (Failure.CELL, "12_4.0", False),
        (Failure.CELL, None, False),
        (Failure.STORAGE, "12_3.0", False),
        (Failure.CONNECTION, "12_3.0", False),
    ):
        record_death(store, inline_cell, "why", "log", failure)
        attempt = store.last_attempt(inline_cell)
        store.write_attempt(inline_cell, attempt.model_copy(update={"job": job}))
        assert failed_in_this_job(store, inline_cell, JOB) is expected
        assert not failed_in_this_job(store, inline_cell, JobIdentity("12_3", "17", 0))


def test_what_rank_0_recorded_meanwhile_stands_and_while_it_hangs_is_waited_for(
    workplace: Any, inline_cell: str, runs: Callable[..., CellRuns], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, slept = workplace.store, []
    monkeypatch.setattr("dbscale.launch.slurm.job.RECORD_WAIT_S", 0.05)
    monkeypatch.setattr("dbscale.launch.slurm.job.time.sleep", slept.append)
    record_death(store, inline_cell, "before", "log")
    last = store.last_attempt(inline_cell)
    store.write_attempt(inline_cell, last.model_copy(update={"number": 2, "status": "running", "ended": None}))
    answer = Result(inline_cell, "failed", "no memory", Failure.MEMORY)
    with pytest.raises(SystemExit):
        runs(Rank(1, 1, 2, 2)).run(lambda key: answer, inline_cell)
    assert slept and store.last_attempt(inline_cell).reason == "rank 1: no memory", "rank 0 left it open"
    store.write_attempt(inline_cell, last.model_copy(update={"number": 3, "reason": "rank 0 says so"}))
    for rank in (0, 1):
        with pytest.raises(SystemExit):
            runs(Rank(rank, rank, 2, 2)).run(lambda key: answer, inline_cell)
        assert store.last_attempt(inline_cell).reason == "rank 0 says so"


@pytest.fixture
def element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs element 1 of an array as a rank of several, with a stand-in for the bundle; says what that was given."""
    given: dict[str, Any] = {}
    room = "dbscale.launch.slurm.job"
    monkeypatch.setattr(f"{room}.worker.run_bundle", lambda keys, *_, **options: given.update(options, keys=keys))
    monkeypatch.setattr(f"{room}.worker.watch", lambda *_: None)
    monkeypatch.setattr(f"{room}.log_of_job", lambda folder: str(folder / "log"))
    monkeypatch.setattr(f"{room}.JobIdentity.of_job", lambda: JOB)
    monkeypatch.setattr(f"{room}.master_address", lambda: "n1")
    monkeypatch.setattr("os.environ", {"SLURM_ARRAY_TASK_ID": "1"})

    def run(rank: int, world_size: int, stop: StopRequest | None = None) -> dict[str, Any]:
        monkeypatch.setattr(f"{room}.Rank.of_job", lambda: Rank(rank, rank, world_size, world_size))
        store, uid = Store(tmp_path / "out"), make_uid()
        work = Work(store=str(store.root), grid="tiny", uid=uid, data="data", resources=Resources(), requeue_limit=1)
        record = SubmitRecord(uid=uid, grid="tiny", kind="bundles", wave=1, created=0.0, elements=(("a",), ("b", "c")))
        record.folder(store).mkdir(parents=True)
        run_element(work, record, stop or StopRequest())
        return given | {"fence": record.folder(store) / "1.fence"}

    return run


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_blocked_cell_gets_a_second_turn_where_no_other_rank_looks_at_another_moment(
    element: Callable[..., dict[str, Any]], world_size: int
) -> None:
    given = element(0, world_size)
    assert (given["keys"], given["job"], given["second_turns"]) == (["b", "c"], "12_3.1", world_size == 1)
    assert given["fence"].read_text() == "1\n"


def test_a_stopped_job_ends_when_rank_0_knows_whether_it_starts_again_and_others_give_it_time(
    element: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    room, clock, answers = "dbscale.launch.slurm.job", [0.0], [1, 1, 0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(f"{room}.time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(f"{room}.decide_when_stopped", lambda *_: None)
    monkeypatch.setattr(f"{room}.ask_later", lambda limit: answers.pop(0))
    stop = StopRequest()
    stop.ask("SIGTERM")
    for rank, waited in ((0, 2 * 2.0), (1, 60.0)):
        clock[0] = 0.0
        with pytest.raises(SystemExit) as ended:
            element(rank, 2, stop)
        assert (ended.value.code, clock[0]) == (RETRY_EXIT, waited)
    assert answers == []
    answers[:] = [1] * 99  # an answer that never comes is waited for no longer than that
    clock[0] = 0.0
    with pytest.raises(SystemExit):
        element(0, 2, stop)
    assert clock[0] == 60.0


@pytest.mark.parametrize("withdrawn", [False, True])
def test_a_job_runs_the_element_of_its_record_and_nothing_where_that_was_withdrawn(
    monkeypatch: pytest.MonkeyPatch, withdrawn: bool
) -> None:
    work = Work(store="s", grid="tiny", uid=make_uid(), data="d", resources=Resources(), requeue_limit=1)
    ran: list[Any] = []
    monkeypatch.setattr(
        "dbscale.launch.slurm.job.record_of", lambda given: None if withdrawn else (given, "its record")
    )
    monkeypatch.setattr("dbscale.launch.slurm.job.run_element", lambda *given: ran.append(given[:2]))
    main([work.model_dump_json()])
    assert ran == ([] if withdrawn else [(work, (work, "its record"))])


def test_ranks_meet_at_the_first_node_by_name_or_at_the_address_that_started_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dbscale.launch.slurm.job.JobEnvironment", lambda: SimpleNamespace(hostnames=["n1", "n2"]))
    monkeypatch.setattr("socket.gethostbyname", {"n1": "10.0.0.1", "n2": "10.0.0.2"}.__getitem__)
    assert master_address() == "10.0.0.1"

    def unknown(name: str) -> str:
        raise OSError(name)

    monkeypatch.setattr("socket.gethostbyname", unknown)
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "10.9.9.9")
    assert master_address() == "10.9.9.9"
    monkeypatch.delenv("SLURM_LAUNCH_NODE_IPADDR")
    assert master_address() == "127.0.0.1"


def test_a_rank_that_fails_alone_records_why_and_ends_the_job(
    workplace: Any, inline_cell: str, runs: Callable[..., CellRuns], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbscale.launch.slurm.job.RECORD_WAIT_S", 0.0)
    with pytest.raises(SystemExit) as ended:
        runs(Rank(1, 1, 2, 2)).run(lambda key: Result(key, "failed", "no memory", Failure.MEMORY), inline_cell)
    assert ended.value.code == LOST_EXIT
    attempt = workplace.store.last_attempt(inline_cell)
    assert (attempt.status, attempt.reason, attempt.failure) == ("failed", "rank 1: no memory", Failure.MEMORY)
    assert attempt.log == "the log"


@pytest.fixture
def inline_cell(workplace: Any, fakes: ModuleType) -> str:
    """A cell whose recipe is in the store and whose dataset is packed."""
    from dbscale.launch.cli import main

    workplace.behave(fail=["pretrain"])
    main(["submit", *workplace.where, "--cluster", "inline"])
    return next(path.name for path in workplace.store.root.glob("cells/pretrain-*"))


def test_a_store_that_refuses_is_waited_for(runs: Callable[..., CellRuns], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbscale.launch.slurm.job.PROBE_INTERVAL_S", 0.0)
    answers = [Result("a", "failed", "full", Failure.STORAGE), Result("a", "done")]
    wrote: list[Path] = []

    def write(path: Path, data: bytes) -> None:
        wrote.append(path.parent)
        if len(wrote) < 3:
            raise StoreError("cannot write: Read-only file system")

    monkeypatch.setattr("dbscale.launch.slurm.job.write_atomic", write)
    cell = runs()
    assert cell.run(lambda key: answers.pop(0), "a").status == "done"
    assert wrote == [cell.store.cell_dir("a")] * 3


def decide(slurm: Path, said: str, when: str, restart: int = 1, limit: int = 3) -> tuple[int, bool]:
    """The answer of `requeue_unless_wished` when squeue says `said`, and whether it requeued element 12_3."""
    (slurm / "queue").write_text(f"{said}\n")
    (slurm / "calls").unlink(missing_ok=True)
    job = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "12",
           "SLURM_RESTART_COUNT": str(restart)}  # fmt: skip
    script = "\n".join([*requeue_lines(limit), f"requeue_unless_wished {when}"])
    code = subprocess.run(["bash", "-c", script], env={**os.environ, **job}, check=False).returncode
    calls = (slurm / "calls").read_text() if (slurm / "calls").exists() else ""
    assert calls.count("squeue") == (restart < limit)
    return code, "scontrol requeue 12_3\n" in calls


@pytest.mark.parametrize(
    ("said", "now", "later"),
    [
        ("1 RUNNING None", (0, True), (2, False)),
        ("1 COMPLETING TimeLimit", (0, True), (0, True)),
        ("1 COMPLETING NonZeroExitCode", (0, True), (0, True)),
        ("1 FAILED RaisedSignal:53(Real-time_signal_19)", (0, True), (0, True)),
        ("1 FAILED JobLaunchFailure", (0, True), (0, True)),
        ("1 COMPLETING None", (0, False), (1, False)),
        ("1 CANCELLED None", (0, False), (0, False)),
        ("1 PREEMPTED None", (0, False), (0, False)),
        ("1 PENDING BeginTime", (0, False), (0, False)),
        ("0 RUNNING None", (0, True), (2, False)),
        ("0 COMPLETING TimeLimit", (0, True), (0, True)),
        ("2 RUNNING None", (0, False), (0, False)),
        ("2 COMPLETING TimeLimit", (0, False), (0, False)),
    ],
)
def test_one_place_decides_whether_a_job_starts_again(
    slurm: Path, said: str, now: tuple[int, bool], later: tuple[int, bool]
) -> None:
    """By what SLURM says of restarts, state and reason; what somebody wished, or has done already, is left alone."""
    assert decide(slurm, said, "now") == now
    assert decide(slurm, said, "later") == later


def test_the_limit_of_restarts_and_a_silent_slurm_decide_too(slurm: Path) -> None:
    assert decide(slurm, "3 RUNNING None", "now", restart=3) == (0, False)
    assert decide(slurm, "2 RUNNING None", "now", restart=2) == (0, True)
    (slurm / "broken").touch()
    assert decide(slurm, "1 RUNNING None", "now") == (1, False), "to be asked again"
