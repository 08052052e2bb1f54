"""Evaluation is what a plain sum says, rows account for all work and time, damage is found before it is believed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbscale.study.recipe import Budget
from dbscale.training.device import count_train_flops
from dbscale.training.results import calibration_error, summarize


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
