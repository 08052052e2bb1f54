"""The last job of a grid, against stand-ins for SLURM's commands: what it hands in again, how often, and what it leaves."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbscale.errors import FileError
from dbscale.files import driver_lock
from dbscale.launch.slurm.job import JobIdentity
from dbscale.launch.slurm.queue import SlurmError, SubmitRecord, read_records
from dbscale.launch.slurm.reducer import hand_in_again
from dbscale.launch.slurm.submit import ReduceWork
from dbscale.launch.worker import record_death
from dbscale.study.plan import read_plan
from dbscale.study.store import Failure

TEACHER = "pretrain-deit_h1w16d2-up-n16"


@pytest.fixture
def submitted(submit: Any, slurm: Path, workplace: Any) -> dict[str, SubmitRecord]:
    """The grid is submitted as jobs 101 (wave 1), 102 (wave 2) and 103 (reducer), all of which have left the queue."""
    assert submit()[0] == 0
    (slurm / "queue").write_text("103|N/A|RUNNING|None\n")
    return {str(each.job): each for each in read_records(workplace.store, "tiny")}


@pytest.fixture
def reduce(workplace: Any, slurm: Path) -> Callable[..., list[SubmitRecord]]:
    """Hand in again as reducer job `job` does, with what its script says."""

    def run(job: int = 103) -> list[SubmitRecord]:
        return hand_in_again(workplace.store, work_of(slurm, job), JobIdentity(str(job), str(job), 0))

    return run


def work_of(slurm: Path, job: int) -> ReduceWork:
    lines = (slurm / f"script-{job}").read_text().splitlines()
    return ReduceWork.model_validate_json(shlex.split(next(line for line in lines if line.startswith("srun ")))[-1])


def finish(workplace: Any, fakes: Any, *without: str) -> None:
    """Give every cell but those whose key begins with one of `without` its row."""
    plan = read_plan(workplace.store, "tiny")
    assert plan is not None
    for key in plan.cells:
        made = fakes.make_row(workplace.store, workplace.store.read_spec(key))
        workplace.store.write_row(made)
    for key in plan.cells:
        if key.startswith(without or ("?",)):
            (workplace.store.cell_dir(key) / "row.json").unlink()


def keys(records: list[SubmitRecord]) -> list[str]:
    return sorted(key for record in records for element in record.elements for key in element)


def test_nothing_is_left_of_a_grid_that_is_done(
    submitted: Any, reduce: Any, workplace: Any, fakes: Any, slurm: Path
) -> None:
    finish(workplace, fakes)
    assert reduce() == []
    assert not (slurm / "script-104").exists()


def test_what_was_lost_goes_in_again_with_its_parents_first_and_a_reducer_after_it(
    submitted: dict[str, SubmitRecord], reduce: Any, workplace: Any, fakes: Any, slurm: Path
) -> None:
    """The teacher's job was lost in the middle, so its student and that one's finetunes were blocked."""
    student = next(path.name for path in (workplace.store.root / "cells").glob("distill-*-n16-*"))
    children = [key for key in keys(list(submitted.values())) if student in workplace.store.read_spec(key).parents]
    finish(workplace, fakes, TEACHER, student, *children)
    store = workplace.store
    (teacher,) = [key for key in keys([submitted["101"]]) if key.startswith(TEACHER)]
    record_death(store, student, f"its parent {teacher} is interrupted", "log")
    blocked = store.last_attempt(student)
    store.write_attempt(student, blocked.model_copy(update={"status": "blocked", "failure": None}))
    first, second, reducer = reduce()
    assert (first.wave, first.elements, first.after) == (1, ((teacher,),), ())
    assert second.wave == 2 and set(second.elements[0]) == {student, *children} and second.after == (104,)
    assert (reducer.kind, reducer.after) == ("reduce", (103, 104, 105)), "after this reducer, too"
    for job in (101, 104):
        script = (slurm / f"script-{job}").read_text()
        assert "#SBATCH --partition=gpu\n" in script and "\nmodule load cuda\n" in script
    assert work_of(slurm, 106) == work_of(slurm, 103).model_copy(update={"uid": reducer.uid, "hand_ins": 1})


def test_started_again_it_finds_what_it_had_handed_in(
    submitted: Any, reduce: Any, workplace: Any, fakes: Any, slurm: Path
) -> None:
    finish(workplace, fakes, TEACHER)
    assert len(reduce()) == 2
    (slurm / "queue").write_text("103|N/A|RUNNING|None\n104|N/A|PENDING|None\n105|N/A|PENDING|Dependency\n")
    assert reduce() == []
    (slurm / "queue").write_text("103|N/A|RUNNING|None\n104|N/A|PENDING|None\n")
    (alone,) = reduce()
    assert (alone.kind, alone.after, work_of(slurm, 106).hand_ins) == ("reduce", (103, 104), 0), "nothing new was lost"


def test_what_still_waits_is_left_alone_and_reduced_later(
    submitted: Any, reduce: Any, workplace: Any, fakes: Any, slurm: Path
) -> None:
    """A job that was put back into the queue after this reducer had stopped to wait for it."""
    finish(workplace, fakes, TEACHER)
    (index,) = [i for i, keys in enumerate(submitted["101"].elements) if keys[0].startswith(TEACHER)]
    (slurm / "queue").write_text(f"103|N/A|RUNNING|None\n101|{index}|PENDING|BeginTime\n")
    (made,) = reduce()
    assert (made.kind, made.after) == ("reduce", (101, 103))
    assert "scancel" not in (slurm / "calls").read_text(), "this very job is no older reducer"


@pytest.mark.parametrize("why", ["failed", "cancelled", "cancelled, says squeue"])
def test_what_failed_or_was_cancelled_stays_as_it_is(
    submitted: Any, reduce: Any, workplace: Any, fakes: Any, slurm: Path, why: str
) -> None:
    """With all that builds on it, whatever its state."""
    store = workplace.store
    student = next(path.name for path in (store.root / "cells").glob("distill-*-n16-*"))
    children = [key for key in keys(list(submitted.values())) if student in store.read_spec(key).parents]
    (teacher,) = [key for key in keys([submitted["101"]]) if key.startswith(TEACHER)]
    (index,) = [i for i, keys in enumerate(submitted["101"].elements) if teacher in keys]
    finish(workplace, fakes, TEACHER, *((student, *children) if why == "failed" else ()))
    if why == "failed":
        record_death(store, teacher, "loss is not finite", "log", Failure.CELL)
    elif why == "cancelled":
        (slurm / "ended").write_text(f"101_{index}|CANCELLED by 0|0:15\n")
    else:
        (slurm / "no-accounts").touch()
        (slurm / "queue").write_text(f"103|N/A|RUNNING|None\n101|{index}|CANCELLED|None\n")
    assert reduce() == []


@pytest.mark.parametrize(
    ("limit", "hand_ins", "again"), [(9, 1, True), (9, 2, True), (9, 3, False), (1, 0, True), (1, 1, False)]
)
def test_the_number_of_hand_ins_is_limited(
    submitted: Any, workplace: Any, fakes: Any, slurm: Path, limit: int, hand_ins: int, again: bool
) -> None:
    finish(workplace, fakes, TEACHER)
    work = work_of(slurm, 103)
    cluster = work.cluster.model_copy(update={"requeue_limit": limit})
    work = work.model_copy(update={"cluster": cluster, "hand_ins": hand_ins})
    made = hand_in_again(workplace.store, work, JobIdentity("103", "103", 0))
    assert bool(made) is again
    if again:
        assert work_of(slurm, made[-1].job or 0).hand_ins == hand_ins + 1


def test_a_store_that_a_person_drives_is_left_to_that_person(
    submitted: Any, reduce: Any, workplace: Any, fakes: Any
) -> None:
    finish(workplace, fakes, TEACHER)
    with driver_lock(workplace.store.root, "dbscale submit", "tiny"), pytest.raises(FileError, match="in use by"):
        reduce()


def test_a_cluster_whose_jobs_may_not_submit_still_gets_its_report(
    submitted: Any, reduce: Any, workplace: Any, fakes: Any, slurm: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from dbscale.launch.slurm import reducer

    finish(workplace, fakes, TEACHER)
    (slurm / "broken").touch()
    with pytest.raises(SlurmError):
        reduce()
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "103")
    reducer.main([work_of(slurm, 103).model_dump_json()])
    said = capsys.readouterr()
    assert "nothing was handed in again" in said.err and "`dbscale submit` resumes the grid" in said.err
    assert said.out.strip() == str(workplace.store.grid_dir("tiny") / "report.html")


def test_the_log_of_the_reducer_says_what_was_handed_in(
    submitted: Any, workplace: Any, fakes: Any, slurm: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from dbscale.launch.slurm import reducer

    finish(workplace, fakes, TEACHER)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "103")
    reducer.main([work_of(slurm, 103).model_dump_json()])
    first, second, page = capsys.readouterr().out.splitlines()
    assert first == "handed in again: 1 cells, as job 104"
    assert second == "handed in again: a reducer after them, as job 105"
    assert page == str(workplace.store.grid_dir("tiny") / "report.html")


def test_a_job_lends_its_own_numbers_to_no_other(
    submitted: Any, reduce: Any, workplace: Any, fakes: Any, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(workplace, fakes, TEACHER)
    for name in (
        "SLURM_RESTART_COUNT",
        "SLURM_MEM_PER_NODE",
        "SUBMITIT_EXECUTOR",
        "SBATCH_NO_REQUEUE",
        "SBATCH_ARRAY_INX",
    ):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    assert len(reduce()) == 2
    seen = (slurm / "environment-104").read_text().splitlines()
    assert sorted(seen) == ["SBATCH_ACCOUNT=mine", "SLURM_CONF=/etc/slurm.conf"]
    assert os.environ["SLURM_RESTART_COUNT"] == "7"


def test_a_damaged_record_costs_nothing_but_itself(
    submitted: dict[str, SubmitRecord], reduce: Any, workplace: Any, fakes: Any, slurm: Path
) -> None:
    finish(workplace, fakes, TEACHER)
    path = workplace.store.grid_dir("tiny") / "submits" / f"{submitted['102'].uid}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "uid": "../.."}))
    made = reduce()
    assert [len(record.elements) for record in made] == [1, 0]
    assert f"scancel --name=dbscale-tiny-{submitted['102'].uid}\n" in (slurm / "calls").read_text()


def test_cells_of_a_damaged_record_go_in_again_as_the_plan_has_them(
    submitted: dict[str, SubmitRecord], reduce: Any, workplace: Any, fakes: Any
) -> None:
    """The students' record is lost and one teacher's row; without damage, what no record names is left alone."""
    store = workplace.store
    cells = {path.name for path in (store.root / "cells").iterdir()}
    students = sorted(key for key in cells if key.startswith("distill-"))
    lineages = {each: {each, *(key for key in cells if each in store.read_spec(key).parents)} for each in students}
    finish(workplace, fakes, TEACHER, "distill-", *(key for each in lineages.values() for key in each))
    path = store.grid_dir("tiny") / "submits" / f"{submitted['102'].uid}.json"
    whole = path.read_bytes()
    path.unlink()
    assert len(keys(reduce())) == 1, "the teacher alone"
    path.write_bytes(whole[: len(whole) // 2])
    first, second, reducer = reduce()
    assert [key for key in first.elements[0] if key.startswith(TEACHER)] == list(first.elements[0]), "the newest record"
    assert (second.wave, second.stage, second.after) == (2, "distill", (first.job,))
    assert [set(each) for each in second.elements] == [lineages[each] for each in students]
    assert [each[0] for each in second.elements] == students, "parents first"
    assert set(reducer.after) >= {first.job, second.job}
