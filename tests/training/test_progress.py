"""What a run tells while it trains: trackers that go on in their run, and a pace that knows where it was resumed."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest

from dbscale.study.recipe import Budget
from dbscale.study.resources import Resources
from dbscale.study.store import Attempt, Progress
from dbscale.training import loop, progress, run
from dbscale.training.progress import RUN_FILE, open_tracker


class Recorder:
    """An accelerator that notes what it is told of trackers."""

    is_main_process = True

    def __init__(self):
        self.started, self.finished = [], 0
        self.trackers = [self]

    def init_trackers(self, project, config, init_kwargs):
        self.started.append((project, config, init_kwargs))

    def get_tracker(self, name, unwrap):
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow"])
def test_a_resumed_cell_goes_on_in_its_run_and_notes_its_settings_once(tracker, bench, tmp_path):
    spec, recorder = bench.cell().spec(), Recorder()
    for _ in range(2):
        with open_tracker(recorder, spec, tmp_path, tracker):
            assert recorder.finished == len(recorder.started) - 1
    (_, config, first), (_, again, second) = recorder.started
    assert config["training.optim.lr"] == 1e-3 and config["seed"] == 0
    assert again is None
    assert first["wandb"]["id"] == second["wandb"]["id"] == spec.id and second["wandb"]["resume"] == "allow"
    assert first["mlflow"]["run_id"] is None
    assert second["mlflow"]["run_id"] == ("abc" if tracker == "mlflow" else None)
    assert json.loads((tmp_path / RUN_FILE).read_text()).keys() == {tracker}


def test_other_trackers_begin_a_run_with_its_settings_each_time(bench, tmp_path):
    spec, recorder = bench.cell().spec(), Recorder()
    for _ in range(2):
        with open_tracker(recorder, spec, tmp_path, "aim"):
            pass
    assert [config["seed"] for _, config, _ in recorder.started] == [0, 0]
    assert recorder.finished == 2


def test_tensorboard_shows_one_curve_however_often_a_run_stops(bench, stop_after):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                 reason="tensorboard is not installed")  # fmt: skip
    cell, how = bench.cell(budget=Budget(steps=40)), Resources(zero_stage=None, threads=1, tracker="tensorboard")
    for steps in (15, 12):
        assert bench.run(cell, how, stop_after(steps)).status == "interrupted"
    assert bench.run(cell, how).status == "done"
    folder = bench.store.cell_dir(cell.key) / "tracker"
    runs = {path.parent for path in folder.rglob("events*")}
    assert len(runs) == 2, "the curves, and the settings beside them"
    events = reader.EventAccumulator(str(min(runs, key=lambda path: len(path.parts)))).Reload()
    lines = bench.fingerprint(cell)["metrics"]
    assert [each.step for each in events.Scalars("loss")] == [line["step"] for line in lines] == [10, 20, 30, 40]
    assert [each.value for each in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "not UTF-8": lambda data: b"\xff\xfe" + data,
    "other numbers": lambda data: data.translate(bytes.maketrans(b"123456789", b"987654321")),
    "a bomb": lambda data: b"[" * 5000,
    "a pipe": lambda data: data,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_row_is_computed_from_heartbeat_or_metrics(damage, bench_of, stop_after, monkeypatch):
    monkeypatch.setattr(progress, "HEARTBEAT_INTERVAL_S", 0.0)
    monkeypatch.setattr(progress, "MIN_REPORT_STEPS", 2)
    whole, cut = bench_of("whole"), bench_of("cut")
    cell = whole.cell()
    cut.cell()
    whole.run(cell)
    assert cut.run(cell, stop=stop_after(5)).status == "interrupted"
    for name in ("progress.json", "metrics.jsonl"):
        path = cut.store.cell_dir(cell.key) / name
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    if damage == "a pipe":
        path.unlink()
        os.mkfifo(path)
    row = cut.run(cell).row
    expected, found = whole.fingerprint(cell), cut.fingerprint(cell)
    del expected["metrics"], found["metrics"]
    assert found == expected
    first, last = cut.store.attempts(cell.key)
    assert first.ended is not None and last.ended is not None
    assert first.ended - first.started < row.timing.device_time_s <= sum(a.ended - a.started for a in (first, last))


@pytest.mark.parametrize(
    ("updated", "ended"), [(160.0, 160.0), (50.0, 100.0), (None, 100.0), (4e9, 1000.0), ("damaged", 100.0)]
)
def test_a_killed_attempt_ended_at_its_last_heartbeat_unless_that_cannot_be(updated, ended, bench, monkeypatch):
    """Device time is made of these; the clock shows 1000 when the cell goes on."""
    cell = bench.cell()
    dead = Attempt(number=1, status="running", host="elsewhere", pid=7, started=100.0)
    bench.store.write_attempt(cell.key, dead)
    if updated is not None:
        beat = Progress(step=1, num_steps=9, loss=None, images_per_s=0.0, updated=160.0)
        bench.store.write_progress(
            cell.key, beat if updated == "damaged" else beat.model_copy(update={"updated": updated})
        )
    if updated == "damaged":
        path = bench.store.cell_dir(cell.key) / "progress.json"
        path.write_text(path.read_text().replace("160.0", "960.0"))
    monkeypatch.setattr(run, "time", SimpleNamespace(time=lambda: 1000.0))
    run._close_dead(bench.store, cell.key, dead)
    (found,) = bench.store.attempts(cell.key)
    assert (found.status, found.started, found.ended) == ("interrupted", 100.0, ended)


def test_images_per_second_are_those_of_the_attempt(bench, stop_after, monkeypatch):
    """A second a step, whatever was trained before: 16 images a second, also just after a resumption."""
    clock, original = [0.0], loop._optimizer_step

    def one_second(*arguments):
        clock[0] += 1
        return original(*arguments)

    monkeypatch.setattr(loop, "_optimizer_step", one_second)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    cell = bench.cell(budget=Budget(steps=20))
    assert bench.run(cell, stop=stop_after(17)).status == "interrupted"
    bench.run(cell)
    lines = (bench.store.cell_dir(cell.key) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images_per_s"] for line in lines] == [16.0, 16.0]
