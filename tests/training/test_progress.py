"""What a run tells while it trains: trackers that go on in their run, and a pace that knows where it was resumed."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from dbscale.study.recipe import Budget
from dbscale.study.resources import Resources
from dbscale.training import loop, progress
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
