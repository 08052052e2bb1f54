"""What SLURM answers and what was submitted: parsed by hand-written lines, damage and hostile names included."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbscale.launch.slurm.queue import (
    Element,
    Queued,
    SubmitRecord,
    cancel_cut_off,
    make_uid,
    parse_ended,
    parse_queue,
    read_queued,
    read_records,
    write_record,
)
from dbscale.study.store import Store

UID = "20260102-030405-000006-00af"


def record(job: int | None = 12, **changes: object) -> SubmitRecord:
    base = SubmitRecord(
        uid=UID, grid="tiny", kind="bundles", wave=1, created=0.0, elements=(("a", "b"), ("c",)), job=job
    )
    return base.model_copy(update=changes)


def test_lines_of_squeue() -> None:
    out = "12|3|RUNNING|None\n12|N/A|PENDING|Priority\n12|4|FAILED|NonZeroExitCode\n13|0|COMPLETING|a|b\n"
    assert parse_queue(out) == (
        Element(12, 3, "RUNNING", "None"),
        Element(12, 0, "PENDING", "Priority"),
        Element(12, 4, "FAILED", "NonZeroExitCode"),
        Element(13, 0, "COMPLETING", "a|b"),
    )
    assert [each.running for each in parse_queue(out)] == [True, False, False, True]
    assert [each.ended for each in parse_queue(out)] == [False, False, True, False]


def test_lines_of_sacct() -> None:
    out = "12_3|CANCELLED by 0|0:15\n12_[4-9]|PENDING|0:0\n13|FAILED|1:0\n"
    assert parse_ended(out) == {(12, 3): "CANCELLED, exit code 0:15", (13, 0): "FAILED, exit code 1:0"}


def test_what_the_queue_holds_of_a_grid(slurm: Path, tmp_path: Path) -> None:
    """Its own jobs, and cells that another grid of the store has queued; jobs of others are nobody's business."""
    store, later, reducer = Store(tmp_path), make_uid(), "99990102-030405-000006-00af"
    made = [
        record(),
        record(None, uid=later, elements=(("d",),)),
        record(99, uid=reducer, kind="reduce", elements=(), after=(12,)),
    ]
    for each in (*made, record(14, grid="other", elements=(("e",),))):
        write_record(store, each)
    assert read_records(store, "tiny") == tuple(made), "in the order of time"
    (slurm / "queue").write_text("12|1|PENDING\n99|N/A|PENDING\n14|0|RUNNING\n7|0|RUNNING\n")
    found = read_queued(store, "tiny")
    assert found.cells == {"c": Element(12, 1, "PENDING"), "e": Element(14, 0, "RUNNING")}
    assert {job: each.uid for job, each in found.jobs.items()} == {12: UID, 99: reducer}
    assert found.reducers == [99]
    assert found.will_be_reduced(["c", "a"]) and not found.will_be_reduced(["c", "e"])
    assert found.headline == "0 jobs run and 2 wait in SLURM, the reducer is job 99"
    (slurm / "queue").write_text("12|1|RUNNING\n12|0|RUNNING\n99|N/A|PENDING\n")
    assert read_queued(store, "tiny").headline == "2 jobs run and 1 wait in SLURM, the reducer is job 99"


@pytest.mark.parametrize("damage", [b"", b"\xff", b"{}", b"[]"])
def test_a_damaged_record_reads_as_one_that_was_cut_off(tmp_path: Path, damage: bytes) -> None:
    """Its jobs bear the name of its file, so they are still found."""
    store = Store(tmp_path)
    write_record(store, record())
    (tmp_path / "grids/tiny/submits" / f"{UID}.json").write_bytes(damage)
    (found,) = read_records(store, "tiny")
    assert (found.job, found.elements, found.job_name) == (None, (), f"dbscale-tiny-{UID}")
    assert found.damage is not None and found.damage.startswith(str(tmp_path / "grids/tiny/submits" / f"{UID}.json"))
    assert found.damage.endswith("; `dbscale submit` of the grid hands in again what is left of it")


@pytest.mark.parametrize(
    "change", [{"uid": "../../.."}, {"uid": f"{UID} --all"}, {"grid": "../other"}, {"elements": (("../../etc",),)}]
)
def test_a_record_leads_nowhere_outside_the_store(tmp_path: Path, change: dict[str, object]) -> None:
    store = Store(tmp_path)
    write_record(store, record().model_copy(update=change | {"uid": UID, "grid": "tiny"}))
    path = tmp_path / "grids/tiny/submits" / f"{UID}.json"
    path.write_text(record().model_copy(update=change).model_dump_json())
    (found,) = read_records(store, "tiny")
    assert found.job is None and found.folder(store) == (tmp_path / "grids/tiny/jobs" / UID).absolute()
    path.rename(path.with_name("notes of mine.json"))
    assert read_records(store, "tiny") == ()


@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_was_cut_off_is_cancelled_by_its_own_name_and_forgotten(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_damaged: bool
) -> None:
    store, whole = Store(tmp_path), record(uid=make_uid())
    for each in (record(None), whole):
        write_record(store, each)
    path = tmp_path / "grids/tiny/submits" / f"{UID}.json"
    assert "damage" not in path.read_text()
    if is_damaged:
        path.write_bytes(b"")
    cancel_cut_off(store, read_records(store, "tiny"))
    said = capsys.readouterr().err
    assert said.startswith(f"{path} is damaged") and "; its jobs are cancelled\n" in said if is_damaged else not said
    assert (slurm / "calls").read_text() == f"scancel --name=dbscale-tiny-{UID}\n"
    assert read_records(store, "tiny") == (whole,)


def test_lost_cells_are_told_with_slurms_words_and_their_log(slurm: Path, tmp_path: Path) -> None:
    (slurm / "ended").write_text("12_1|OUT_OF_MEMORY|0:125\n")
    view = Queued(Store(tmp_path), (record(),))
    assert view.headline == "it has nothing waiting or running in SLURM (the command that began it resumes it)"
    lost = view.lost({"b", "c"})
    log = tmp_path / "grids/tiny/jobs" / UID
    assert lost == {
        "b": ("its job 12_0 is gone without running it; SLURM says nothing about it any more", f"{log}/12_0_0_log.out"),
        "c": (
            "its job 12_1 is gone without running it; SLURM says OUT_OF_MEMORY, exit code 0:125",
            f"{log}/12_1_0_log.out",
        ),
    }
    assert "--jobs=12 " in (slurm / "calls").read_text(), "accounts are asked for the jobs that ran them"
    assert view.lost(set()) == {}
    alone = record(elements=(("a",),))
    assert alone.log(Store(tmp_path), 0) == log / "12_0_log.out", "a job that is no array"
