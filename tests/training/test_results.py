"""Evaluation is what a plain sum says, rows account for all work and time, damage is found before it is believed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbscale.study.cost import DEVICES
from dbscale.study.recipe import Budget, DeiT, Pretrained
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Attempt
from dbscale.training import results, run
from dbscale.training.checkpoint import LoopState
from dbscale.training.device import count_train_flops
from dbscale.training.engine import Batching
from dbscale.training.evaluation import Evaluation
from dbscale.training.prepare import Context
from dbscale.training.progress import LossRecord
from dbscale.training.results import Trained, calibration_error, make_row, summarize


@given(st.lists(st.tuples(st.floats(0.01, 1), st.booleans()), min_size=1, max_size=60))
def test_calibration_error_is_the_weighted_gap_of_the_bins(pairs):
    confidence, correct = np.array([c for c, _ in pairs]), np.array([float(hit) for _, hit in pairs])
    expected = 0.0
    for low in range(15):
        chosen = np.floor(confidence * 15).clip(max=14) == low
        if chosen.any():
            expected += chosen.mean() * abs(confidence[chosen].mean() - correct[chosen].mean())
    assert calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-9)


def test_samples_that_were_not_judged_are_in_no_mean():
    table = np.array([[1, 1, 1, 0.5, 0.9], [0, 0, 0, 0, 0], [1, 0, 1, 1.5, 0.6]])
    result = summarize(table, num_classes=10)
    assert (result.error_rate, result.top5_error_rate, result.loss) == (0.5, 0.0, 1.0)
    assert result.counted_N.tolist() == [True, False, True]
    assert summarize(table, num_classes=5).top5_error_rate is None


def test_rows_account_for_time_and_work(bench):
    cell = bench.cell(budget=Budget(epochs=2.0))
    row = bench.run(cell).row
    assert (row.num_steps, row.samples_seen) == (5, 80)
    assert row.train_flops == count_train_flops(cell.recipe, None, 6)
    timing = row.timing
    assert timing.train_time_s > 0 and timing.device_time_s >= timing.train_time_s
    assert timing.images_per_s == pytest.approx(80 / timing.train_time_s)
    assert timing.step_time_s == pytest.approx(timing.train_time_s / 5)
    assert 0 <= timing.data_wait_share <= 1
    assert (timing.mfu, timing.energy_j, timing.num_devices, timing.device) == (None, None, 1, "cpu")
    assert row.resources["engine"] == "plain"


NOW = 3005.0
ATTEMPTS = [  # status, started, ended, devices
    ("blocked", 100.0, 190.0, 8),
    ("failed", 1000.0, 1010.0, 1),
    ("interrupted", 2000.0, 2030.0, 2),
    ("running", 3000.0, None, 7),
]


@pytest.fixture
def row_of(bench, monkeypatch):
    """The row of a run on two devices in which no two figures are alike; `device` names the devices."""

    def make(device: str = "cpu") -> Any:
        monkeypatch.setattr(results, "time", SimpleNamespace(time=lambda: NOW))
        monkeypatch.setattr(results, "device_name", lambda _: device)
        state = LoopState(
            step=7, record=LossRecord(tail_sum=6.0, tail_steps=4), train_time_s=3.5, data_wait_s=0.7, energy_j=42.0,
            bad_ids=[3, 8, 11],
        )  # fmt: skip
        bits = [np.array(each, dtype=bool) for each in ([1, 1, 1, 0, 0], [1, 1, 1, 1, 0])]
        tries = [
            Attempt(number=n, status=status, host="h", pid=n, started=started, ended=ended, num_devices=devices)
            for n, (status, started, ended, devices) in enumerate(ATTEMPTS, 1)
        ]
        accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=2)
        context = Context(
            bench.store, bench.data_dir, Resources(zero_stage=2), Batching(2, 4, 3), accelerator, StopRequest()
        )
        trained = Trained(state, 6, 123, "abc")
        cell = bench.cell(precision="bf16")
        (bench.store.cell_dir(cell.key) / "correct.npz").write_bytes(b"abc")
        return make_row(cell.spec(), trained, Evaluation(0.25, 0.125, 1.5, 0.0625, *bits), 2.25, context, tries)

    return make


def test_a_row_accounts_for_every_attempt_device_and_sample(row_of):
    row = row_of()
    assert (row.num_steps, row.samples_seen, row.replaced_samples, row.train_loss) == (7, 7 * 16, 3, 1.5)
    assert (row.num_test_samples, row.num_classes, row.weights_sha256) == (4, 6, "abc"), "one could not be decoded"
    # The SHA-256 of "abc", as FIPS 180-2 gives it.
    assert row.correct_sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    found = (row.error_rate, row.top5_error_rate, row.test_loss, row.calibration_error)
    assert found == (0.25, 0.125, 1.5, 0.0625)
    timing = row.timing
    # Blocked attempts did nothing; the last one still runs.
    assert timing.device_time_s == 10 * 1 + 30 * 2 + 5 * 7, "by each try's own devices"
    assert (timing.num_attempts, timing.num_devices, timing.peak_memory_bytes) == (3, 2, 123)
    assert (timing.train_time_s, timing.eval_time_s, timing.step_time_s, timing.energy_j) == (3.5, 2.25, 0.5, 42.0)
    assert timing.images_per_s == pytest.approx(7 * 16 / 3.5)
    assert timing.data_wait_share == pytest.approx(0.2)
    assert (timing.mfu, timing.device) == (None, "cpu")
    how = {name: row.resources[name] for name in ("engine", "world_size", "accumulation", "micro_batch", "precision")}
    assert how == {"engine": "zero2", "world_size": 2, "accumulation": 4, "micro_batch": 3, "precision": "bf16"}


def test_what_is_known_of_each_sample_is_kept_in_the_splits_order(tmp_path):
    counted, correct = np.array([True, False, True] * 3), np.array([True, False, False] * 3)
    classes = Evaluation(0.5, None, 1.0, 0.1, correct, counted)
    dense = Evaluation(0.5, None, 1.0, None, None, counted, errors_N=np.linspace(0, 1, 9, dtype=np.float32))
    for name, evaluation in (("classes", classes), ("dense", dense)):
        results.write_correct(tmp_path / f"{name}.npz", evaluation)
    with np.load(tmp_path / "classes.npz") as found:
        assert set(found) == {"num_samples", "correct", "counted"} and int(found["num_samples"]) == 9
        assert np.unpackbits(found["correct"], count=9).tolist() == correct.tolist()
        assert np.unpackbits(found["counted"], count=9).tolist() == counted.tolist()
    with np.load(tmp_path / "dense.npz") as found:
        assert set(found) == {"num_samples", "errors", "counted"}
        assert found["errors"].dtype == np.float32 and found["errors"].tolist() == pytest.approx(np.linspace(0, 1, 9))


def test_a_sample_is_judged_by_its_first_five_classes_its_loss_and_its_confidence():
    """Seven classes: e^logit is 4 of one, 1 of four, and less of the sixth and the seventh."""
    logits = torch.zeros(3, 7)
    logits[:, 2] = np.log(4)
    logits[:, 6] = -1.0  # the sixth largest
    logits[:, 5] = -2.0
    share = 4 / (4 + 4 + np.exp(-1) + np.exp(-2))
    found = results._judge(logits, torch.tensor([2, 0, 6]))
    assert found[:, 0].tolist() == [1, 1, 1] and found[:, 1].tolist() == [1, 0, 0]
    assert found[:, 2].tolist()[::2] == [1, 0], "the sixth is not among five"
    assert found[:, 3].tolist() == pytest.approx([-np.log(share), -np.log(share / 4), -np.log(share / 4) + 1])
    assert found[:, 4].tolist() == pytest.approx([share] * 3)
    few = results._judge(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0]))
    assert few[0, :3].tolist() == [1, 0, 1], "of three classes all are among five"


def test_what_a_run_was_follows_from_its_stage_and_what_it_began_with(bench):
    teacher = bench.cell(seed=1)
    distill = bench.cell("distill", teacher=teacher)
    for cell in (teacher, distill):
        bench.run(cell)
    arms = {
        "plain": teacher, "distilled": distill, "scratch": bench.cell("finetune", init=None),
    }  # fmt: skip
    assert {name: results._arm(cell.spec(), bench.store) for name, cell in arms.items()} == {
        name: name for name in arms
    }
    of_plain, of_distilled = (bench.cell("finetune", init=each) for each in (teacher, distill))
    assert [results._arm(cell.spec(), bench.store) for cell in (of_plain, of_distilled)] == ["plain", "distilled"]
    assert results._teacher_model(distill.spec(), bench.store) == teacher.recipe.model
    assert results._teacher_model(teacher.spec(), bench.store) is None
    foreign = distill.recipe.model_copy(update={"teacher": Pretrained(sha256="ab", model=DeiT(heads=7))})
    spec = distill.spec().model_copy(update={"recipe": foreign, "teacher": None})
    assert results._teacher_model(spec, bench.store) == DeiT(heads=7)


def test_utilisation_counts_both_devices(row_of):
    row = row_of("NVIDIA H100 80GB HBM3")
    assert row.timing.mfu == pytest.approx(row.train_flops / (3.5 * 2 * DEVICES["h100"].peak_flops))


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", None), ("trained.json", None), ("trained.json", b""), ("trained.json", b"[]"),
     ("trained.json", b"null"), ("trained.json", b"\xff\xfe")],
    ids=["weights", "a bit", "nothing", "a list", "null", "no text"],
)  # fmt: skip
def test_what_was_trained_is_believed_only_if_it_is_whole(name, content, bench_of, kill_on_call, caplog):
    whole, cut = bench_of("whole"), bench_of("cut")
    cell = whole.cell()
    cut.cell()
    whole.run(cell)
    assert cut.run_killed(cell, kill_on_call(run, "evaluate_cell")) != 0
    path = cut.store.cell_dir(cell.key) / name
    damaged = bytearray(path.read_bytes())
    damaged[-40] ^= 1
    path.write_bytes(bytes(damaged) if content is None else content)
    assert cut.run(cell).status == "done"
    assert f"training again what was finished: {path}" in caplog.text
    assert cut.fingerprint(cell) == whole.fingerprint(cell), "optimizer's end included: it was trained again"
