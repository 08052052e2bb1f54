"""FLOPs are what torch counts, evaluation is what a plain sum says, and rows carry it all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dbscale.study import cost
from dbscale.study.recipe import Budget, Data, DeiT, Optim, Recipe, TimmModel, Training
from dbscale.training.device import peak_flops, peak_memory_bytes, reset_peak_memory
from dbscale.training.evaluate import calibration_error, summarize
from dbscale.training.flops import count_train_flops, measure
from dbscale.training.models import make_model


@pytest.mark.parametrize("heads", [1, 2])
def test_predicted_flops_are_the_counted_ones(heads):
    model = DeiT(heads=heads, head_width=16, depth=3, patch_size=8)
    counted = measure(model, num_classes=10, image_size=32).forward_flops
    head = 2 * model.width * 10
    assert counted - head == cost.forward_flops(model, 32)


def test_training_flops_are_what_torch_counts_in_a_step():
    model = DeiT(heads=2, head_width=16, depth=3, patch_size=8)
    recipe = Recipe(
        stage="pretrain",
        model=model,
        data=Data(dataset="x", num_samples=10, image_size=32),
        training=Training(budget=Budget(steps=7), optim=Optim(lr=1e-3), global_batch=4),
        seed=0,
    )
    network = make_model(model, num_classes=10, image_size=32)
    images = torch.randn(4, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    # The first layer needs no gradient of its input, which the usual factor of three does not know.
    embedding = 2 * 3 * 8 * 8 * model.width * 16 * 4
    assert count_train_flops(recipe, None, 10) / 7 == pytest.approx(counter.get_total_flops() + embedding, rel=0.02)
    teacher = DeiT(heads=1, head_width=16, depth=3, patch_size=8)
    more = count_train_flops(recipe, teacher, 10) - count_train_flops(recipe, None, 10)
    assert more == 7 * 4 * measure(teacher, num_classes=10, image_size=32).forward_flops


def test_flops_of_any_timm_model():
    resnet = TimmModel(kind="timm", name="resnet18")
    counted = measure(resnet, num_classes=1000, image_size=224).forward_flops
    assert counted == pytest.approx(cost.forward_flops(resnet, 224), rel=0.01)


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


def test_peaks_are_known_by_name_and_only_for_16_bits():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == cost.DEVICES["h100"].peak_flops
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp16") == cost.DEVICES["a100"].peak_flops
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("cpu", "bf16") is None


def test_peak_memory_starts_anew_with_each_cell():
    cpu = torch.device("cpu")
    big = torch.ones(64 << 18)  # 64 MiB
    before = peak_memory_bytes(cpu)
    del big
    reset_peak_memory(cpu)
    assert peak_memory_bytes(cpu) < before - (48 << 20)


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
