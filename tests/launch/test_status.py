"""What `dbscale status` counts and predicts, from tiny stores worked out by hand."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dbscale.files import ProcessMark
from dbscale.launch.slurm.queue import Element, Queued, SubmitRecord
from dbscale.launch.status import (
    Status,
    device_seconds,
    headline,
    hunt_as_data,
    hunt_lines,
    read_status,
    render,
    state_of,
    table,
)
from dbscale.study.hunt import Bought, Finding, HuntLog, WaveRecord, write_log
from dbscale.study.plan import PlanRecord, PointRecord
from dbscale.study.store import Attempt, Progress, Row, Standing, Store, Timing


def point(cell: str, upstream: str | None, teacher: str | None = None) -> PointRecord:
    arm = "distilled" if teacher else "plain" if upstream else "scratch"
    return PointRecord(
        cell=cell, variant="base", arm=arm, student="h1", model="m", upstream_dataset="up" if upstream else None,
        upstream_num_samples=16 if upstream else 0, upstream_cell=upstream, teacher_cell=teacher, dataset="down",
        num_samples=10, seed=0,
    )  # fmt: skip


PLAN = PlanRecord(
    grid="tiny", question="Does it work?", created=0.0,
    points=(point("fp", "p"), point("fd", "d", "t"), point("fs", None)),
    cells=("t", "p", "fp", "d", "fd", "fs"),
    predicted_device_s=0.0, predicted_s=(100.0, 100.0, 10.0, 200.0, 20.0, 30.0),
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def finish(store: Store, key: str, device_time_s: float) -> None:
    timing = Timing(
        train_time_s=1.0, eval_time_s=1.0, step_time_s=0.1, images_per_s=1.0, data_wait_share=0.0,
        device_time_s=device_time_s, peak_memory_bytes=1, device="cpu", host="h",
    )  # fmt: skip
    row = Row(
        key=key, id="0" * 12, stage="pretrain", arm="plain", model="m", dataset="up", num_samples=16, seed=0,
        num_params=100, num_classes=10, num_steps=10, samples_seen=80, train_flops=1e9, error_rate=0.25, test_loss=1.5,
        num_test_samples=100, train_loss=1.25, weights_sha256="f" * 64, timing=timing,
    )  # fmt: skip
    store.write_row(row)


def attempt(**changes: Any) -> Attempt:
    base = Attempt(number=1, status="running", **asdict(ProcessMark.of()), started=time.time())
    return base.model_copy(update=changes)


def run(store: Store, key: str, step: int, num_devices: int, ago_s: float) -> None:
    """A cell that is at `step` of 100, started a while ago."""
    store.write_attempt(key, attempt(started=time.time() - ago_s, num_devices=num_devices))
    store.write_progress(key, Progress(step=step, num_steps=100, loss=1.0, images_per_s=50.0, updated=time.time()))


def test_counts_devices_and_the_time_that_is_left(store: Store) -> None:
    finish(store, "t", 150.0)  # predicted 100
    finish(store, "fs", 45.0)  # predicted 30: everything takes 1.5 times as long
    run(store, "p", step=25, num_devices=2, ago_s=10.0)
    run(store, "d", step=50, num_devices=4, ago_s=5.0)
    status = read_status(store, PLAN, store.standings(PLAN.cells), None)
    assert status.num_cells == 6
    assert (status.count("done"), status.count("running"), status.count("new")) == (2, 2, 2)
    assert status.counts[(1, "pretrain"), "done"] == status.counts[(1, "pretrain"), "running"] == 1
    assert status.counts[(2, "distill"), "running"] == status.counts[(2, "finetune"), "new"] == 1
    assert status.num_devices == 2 + 4
    assert [(cell.key, cell.share) for cell in status.running] == [("p", 0.25), ("d", 0.5)]
    assert status.left_s == pytest.approx(1.5 * (0.75 * 100 + 10 + 0.5 * 200 + 20))
    assert status.device_s == pytest.approx(150 + 45 + 2 * 10 + 4 * 5, abs=6)
    assert status.scheduler is None and status.troubles == ()


def test_nothing_done_leaves_predictions_as_they_are(store: Store) -> None:
    assert read_status(store, PLAN, store.standings(PLAN.cells), None).left_s == 460.0


def test_the_finish_is_what_is_left_over_the_devices_at_work(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hours of device time on two devices, from the first moment of 1970, a Thursday."""
    clock = SimpleNamespace(time=lambda: 0.0, localtime=time.gmtime, strftime=time.strftime)
    monkeypatch.setattr("dbscale.launch.status.time", clock)
    counts: dict[Any, int] = {((1, "pretrain"), "running"): 1}
    status = Status("tiny", "Does it work?", counts, (), 2, (), 0.0, 7200.0, None)
    assert headline(status, store)[0].endswith("; at the present pace it ends about Thu 01:00")


def test_device_time_is_that_of_all_tries_of_all_devices(store: Store) -> None:
    """A try that was blocked took its time too; one that was killed ended with its last heartbeat."""
    store.write_attempt("p", attempt(number=1, status="blocked", started=1000.0, ended=1003.0, num_devices=1))
    store.write_attempt("p", attempt(number=2, status="failed", started=1100.0, ended=1110.0, num_devices=4))
    store.write_attempt("p", attempt(number=3, pid=2**22 + 1, started=2000.0, num_devices=2))
    store.write_progress("p", Progress(step=1, num_steps=9, loss=None, images_per_s=1.0, updated=2050.0))
    standing = store.standing("p")
    assert standing.state == "interrupted"
    assert device_seconds(store, "p", standing, "interrupted") == 1 * 3 + 4 * 10 + 2 * 50
    assert device_seconds(store, "fp", store.standing("fp"), "new") == 0.0
    finish(store, "p", 150.0)
    (store.cell_dir("p") / "attempts" / "2.json").unlink()
    assert device_seconds(store, "p", store.standing("p"), "done") == 150.0, "the row keeps its own sum"


def test_troubles_name_reason_and_log(store: Store) -> None:
    store.write_attempt("p", attempt(status="failed", reason="loss is nan", log="/a/log", ended=time.time()))
    store.write_attempt("fp", attempt(status="blocked", reason="its parent p failed", ended=time.time()))
    finish(store, "t", 1.0)
    (store.cell_dir("t") / "row.json").write_bytes(b"")
    status = read_status(store, PLAN, store.standings(PLAN.cells), None)
    found = {each.key: (each.kind, each.reason, each.log) for each in status.troubles}
    assert found["p"] == ("failed", "loss is nan", "/a/log")
    assert found["fp"] == ("blocked", "its parent p failed", None)
    state, reason, _ = found["t"]
    assert state == "damaged" and "row.json is damaged" in reason and "the cell runs again" in reason
    assert len(found) == 3


def test_of_many_troubles_the_first_are_listed_and_the_rest_counted(store: Store) -> None:
    for key in ("t", "p", "d"):
        store.write_attempt(key, attempt(status="failed", reason=f"why {key}", log=f"/log/{key}", ended=time.time()))
    status = read_status(store, PLAN, store.standings(PLAN.cells), None)

    def listed(limit: int | None) -> list[str]:
        lines = render(status, store, limit=limit).splitlines()
        return lines[lines.index("failed:") + 1 :]

    of = {key: [f"  {key}", f"    why {key}", f"    log: /log/{key}"] for key in "tpd"}
    assert listed(None) == listed(3) == [*of["t"], *of["p"], *of["d"]]
    assert listed(2) == [*of["t"], *of["p"], "  … and 1 more (--all lists them)"]


def element(state: str) -> Element:
    return Element(101, 0, state)


def test_a_damaged_record_of_a_submission_is_named(store: Store) -> None:
    uid = "20260101-000000-000000-abcd"
    sound = SubmitRecord(uid=uid, grid="tiny", kind="bundles", wave=1, created=0.0, elements=(), job=7)
    found = store.standings(PLAN.cells)
    assert read_status(store, PLAN, found, Queued(store, (sound,))).troubles == ()
    hurt = sound.model_copy(update={"job": None, "damage": "it is damaged; do this"})
    (trouble,) = read_status(store, PLAN, found, Queued(store, (hurt,))).troubles
    assert (trouble.key, trouble.kind, trouble.reason) == (f"submission {uid}", "damaged", "it is damaged; do this")


def test_the_queue_knows_better_than_a_heartbeat(store: Store) -> None:
    active = {"r": element("RUNNING"), "q": element("PENDING"), "c": element("COMPLETING")}
    view = Queued(store, (), tuple(active.values()), active)
    of_job, of_hand = Standing("running", None, attempt(job="101_0.0")), Standing("running", None, attempt())
    assert state_of("r", of_job, view) == "running"
    assert state_of("r", Standing("new"), view) == "queued", "its job starts just now"
    assert state_of("q", of_job, view) == "queued", "it was requeued"
    assert state_of("gone", of_job, view) == "interrupted", "its job is no longer there"
    assert state_of("gone", of_hand, view) == "running", "SLURM knows nothing of a run by hand"
    assert state_of("c", Standing("done"), view) == "done"
    silent = Queued(store, error="SLURM does not answer")
    assert state_of("gone", of_job, silent) == "running"
    assert silent.headline.startswith("SLURM does not answer; what follows is from the store alone")


def hunt_log(*waves: WaveRecord) -> HuntLog:
    return HuntLog(grid="tiny", along="upstream_samples", span=(16, 64), target_octaves=1.5, level=0.9, budget_s=7200.0,
                   waves=waves)  # fmt: skip


def wave(*findings: Finding, number: int = 1, **fields: Any) -> WaveRecord:
    given = {"number": number, "created": 0.0, "spent_s": 1800.0, "verdict_level": 0.95, "bought": ()} | fields
    return WaveRecord(findings=findings, **given)


FOUND = Finding(target="down", kind="crossing", root=4000.0, low=2000.0, high=8000.0, doubt=0.25, num_pairs=7)


def test_a_hunt_says_what_is_known_what_it_cost_and_what_comes_next() -> None:
    bought = Bought(x=16, targets=("down",), num_pairs=2, gain=None, cost_s=100.0, reason="start")
    one_sign = Finding(target="birds", kind="one_sign", num_pairs=1)
    assert hunt_lines(hunt_log(wave(FOUND, bought=(bought,)))) == [
        "hunt, wave 1: 0.50 of 2.00 device-hours used; 2 pairs in about 2 min",
        "  down: crossing at 4,000 [2,000, 8,000], 2.0 octaves wide (1.5 wanted); 0.25 octaves of wrong advice left; "
        "7 pairs measured",
    ]
    assert hunt_lines(hunt_log(wave(one_sign, number=3, failed_pairs=1)))[:1] == [
        "hunt, wave 3: 0.50 of 2.00 device-hours used, 1 pair failed and not replaced; it waits for runs that are under way"
    ]
    first, *rest = hunt_lines(hunt_log(wave(one_sign, Finding(target="fish"), stopped="one_sign, budget")))
    assert first == (
        "hunt, wave 1: 0.50 of 2.00 device-hours used; it is over: one side is better over the whole range; nothing more "
        "fits its budget (each verdict at level 95.0%, so that all hold at 90%)"
    )
    assert rest == ["  birds: one sign; 1 pair measured", "  fish: nothing can be judged yet; 0 pairs measured"]
    unsure = Finding(target="down", kind="crossing", root=4000.0)  # with no interval
    assert hunt_lines(hunt_log(wave(unsure)))[1] == "  down: crossing; 0 pairs measured"


def test_of_a_hunt_a_program_gets_the_last_wave(store: Store) -> None:
    assert hunt_as_data(store, "tiny") is None
    write_log(store, hunt_log(wave(), wave(FOUND, number=2)))
    found = hunt_as_data(store, "tiny")
    assert found is not None and [each.number for each in found.waves] == [2] and found.budget_s == 7200
    (store.grid_dir("tiny") / "hunt.json").write_text("{}")
    assert hunt_as_data(store, "tiny") is None


def test_tables_align_numbers_to_the_right_and_words_to_the_left() -> None:
    assert table([("a", 1), ("bb", 100)], header=("k", "n")) == "k     n\na     1\nbb  100"
    assert table([], header=("k", "n")) == "k  n"


@pytest.fixture
def status(workplace: Any, fakes: ModuleType, capsys: pytest.CaptureFixture[str]) -> Any:
    """`dbscale status` after a submit in this process: (exit code, stdout, stderr)."""
    from dbscale.launch.cli import main

    assert main(["submit", "--cluster", "inline", *workplace.where]) == 0
    capsys.readouterr()

    def read() -> tuple[int, str, str]:
        code = main(["status", *workplace.where])
        out, err = capsys.readouterr()
        return code, out, err

    return read


def test_a_complete_grid_says_so(status: Any) -> None:
    code, out, _ = status()
    assert code == 0
    assert "18/18 cells done" in out and "complete" in out
    assert re.search(r"wave +stage +done\n *1 +pretrain +4\n", out)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"null"])
@pytest.mark.parametrize("file", ["row.json", "attempts/1.json", "plan.json"])
def test_a_damaged_file_is_named_and_the_rest_shown(
    status: Any, workplace: Any, content: bytes, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from dbscale.launch.cli import main

    key = next(key for key in workplace.done() if key.startswith("finetune"))
    before = {each: text for each, text in workplace.rows().items() if each != key}
    if file == "plan.json":
        (workplace.store.grid_dir("tiny") / file).write_bytes(content)
    else:
        (workplace.store.cell_dir(key) / file).write_bytes(content)
    code, out, err = status()
    assert code == 0
    assert "17/18" in out if file == "row.json" else "18/18" in out, "an attempt of a finished cell is history"
    assert (key in out and "row.json is damaged" in out) or file != "row.json"
    assert "plan.json is damaged" in err or file != "plan.json"
    assert main(["plan", *workplace.where, "--cluster", "inline"]) == 0
    assert f"{file} is damaged" in capsys.readouterr().out or file == "attempts/1.json"
    assert main(["submit", *workplace.where, "--cluster", "inline"]) == 0
    assert len(workplace.done()) == 18
    assert {each: text for each, text in workplace.rows().items() if each != key} == before
    assert "complete" in status()[1]
