"""What a run tells while it trains: trackers that go on in their run, and a pace that knows where it was resumed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dbscale.errors import TrainingError
from dbscale.study.recipe import Budget
from dbscale.study.resources import Resources
from dbscale.study.store import Attempt, Progress
from dbscale.training import loop, progress, run
from dbscale.training.losses import Losses
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


class Alone:
    """The accelerator of a lone process, as far as a reporter needs it."""

    is_main_process = True

    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))


@pytest.fixture
def reporter(bench, monkeypatch):
    """Of a run of 30 steps at 16 images; a report is due every 10, and a second passes with each look at the clock."""
    clock = iter(range(1000))
    monkeypatch.setattr(progress, "reduce_over_ranks", lambda accelerator, values, how: values)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock)), time=lambda: 5.0))
    cell = bench.cell(budget=Budget(steps=30))
    return progress.Reporter(Alone(), cell.recipe, bench.store, cell.key, progress.LossRecord())


def losses_of(loss, ce, kl=None):
    return Losses(*(None if each is None else torch.tensor(each) for each in (loss, ce, kl)))


def test_lines_are_means_since_the_last_and_the_rows_loss_is_that_of_the_last_tenth(reporter, bench):
    for step in range(30):
        reporter.add(step, losses_of(float(step), 2.0 * step, kl=1.0 if step < 10 else None))
    reporter.close()
    (path,) = bench.store.root.glob("cells/*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"], line["ce"], line.get("kl")) for line in lines] == [
        (10, 4.5, 9.0, 1.0), (20, 14.5, 29.0, None), (30, 24.5, 49.0, None)
    ]  # fmt: skip
    assert [(step, values["loss"], "step" in values) for step, values in reporter._accelerator.logged] == [
        (10, 4.5, False), (20, 14.5, False), (30, 24.5, False)]  # fmt: skip
    assert reporter.record.train_loss == (27 + 28 + 29) / 3 and reporter.record.tail_steps == 3
    assert reporter.record.pending == []
    assert progress.LossRecord().train_loss == 0.0
    (beat,) = (bench.store.read_progress(path.parent.name),)
    assert beat is not None and (beat.num_steps, beat.updated) == (30, 5.0) and beat.step > 20


def test_each_line_has_the_pace_since_the_last(bench, monkeypatch):
    """Two seconds a step of 16 images, then one."""
    clock = [0.0]
    monkeypatch.setattr(progress, "reduce_over_ranks", lambda accelerator, values, how: values)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    cell = bench.cell(budget=Budget(steps=30))
    reporter = progress.Reporter(Alone(), cell.recipe, bench.store, cell.key, progress.LossRecord())
    for step in range(30):
        clock[0] += 2.0 if step < 10 else 1.0
        reporter.add(step, losses_of(1.0, 1.0))
    lines = progress.metrics_path(bench.store, cell.key).read_text().splitlines()
    assert [json.loads(line)["images_per_s"] for line in lines] == [8.0, 16.0, 16.0]


def test_reports_are_due_200_times_a_run_and_never_within_ten_steps(bench):
    def interval(steps):
        cell = bench.cell(budget=Budget(steps=steps))
        return progress.Reporter(Alone(), cell.recipe, bench.store, cell.key, progress.LossRecord())._interval

    assert [interval(steps) for steps in (5, 2000, 2399, 4000)] == [10, 10, 11, 20]


def test_a_loss_that_is_no_number_names_its_step_its_terms_and_what_helps(reporter):
    for step in range(9):
        reporter.add(step, losses_of(float("inf") if step == 3 else 1.0, 1.0))
    with pytest.raises(
        progress.NonFiniteLoss, match=r"loss is inf at step 4 of 30, learning rate .*\(loss inf, ce 1\); lower lr"
    ):
        reporter.add(9, losses_of(1.0, 1.0))


def test_lines_of_steps_that_come_again_are_dropped_and_what_follows_a_cut_off_one(bench):
    cell = bench.cell()
    path = progress.metrics_path(bench.store, cell.key)
    progress.truncate_metrics(bench.store, cell.key, 20)
    assert not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'{{"step": {step}}}\n' for step in (10, 20, 30)]
    path.write_text("".join(lines))
    progress.truncate_metrics(bench.store, cell.key, 20)
    assert path.read_text() == "".join(lines[:2])
    path.write_text(lines[0] + '{"ste\n' + lines[1])
    progress.truncate_metrics(bench.store, cell.key, 20)
    assert path.read_text() == lines[0]


def test_settings_are_flat_for_trackers():
    assert progress.flatten({"a": 1, "b": {"c": None, "d": {"e": (1, 2), "f": True}}}) == {
        "a": 1, "b.c": "None", "b.d.e": "(1, 2)", "b.d.f": True}  # fmt: skip
    assert progress.tracker_options(None, Path("cell")) == {}
    with pytest.raises(
        TrainingError, match="tracker 'nowhere_to_be_found' is not installed: `pip install nowhere_to_be"
    ):
        progress.tracker_options("nowhere_to_be_found", Path("cell"))


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
