"""FLOPs are what torch counts, peaks are known by name, peak memory starts anew with each cell."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dbscale.study import cost
from dbscale.study.recipe import Budget, Data, DeiT, Optim, Recipe, TimmModel, Training
from dbscale.training.device import count_train_flops, measure, peak_flops, peak_memory_bytes, reset_peak_memory
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
