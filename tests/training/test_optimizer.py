"""The learning rate is a function of the step; groups decay what they should and slow down towards the input."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbscale.study.recipe import Budget, Data, DeiT, Optim, Recipe, TimmModel, Training
from dbscale.study.resources import Resources
from dbscale.training.graph import can_capture
from dbscale.training.models import freeze_backbone, make_model
from dbscale.training.optimizer import EMA, keep_rates_on, learning_rate, make_optimizer, set_learning_rate

MODEL = DeiT(heads=2, head_width=8, depth=3, patch_size=4)


def recipe(steps=100, batch=64, **optim):
    return Recipe(
        stage="pretrain",
        model=MODEL,
        data=Data(dataset="x", num_samples=1000, image_size=16),
        training=Training(budget=Budget(steps=steps), optim=Optim(**{"lr": 1e-3, **optim}), global_batch=batch),
        seed=0,
    )


@given(steps=st.integers(1, 400), share=st.floats(0, 1))
def test_rate_rises_to_the_peak_and_falls_to_the_floor(steps, share):
    cell = recipe(steps, warmup_share=share, min_lr=1e-5)
    rates = [learning_rate(step, cell) for step in range(steps)]
    warmup = round(share * steps)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(0 < rate <= 1e-3 * (1 + 1e-12) for rate in rates)
    if warmup > 0:
        assert rates[warmup - 1] == pytest.approx(1e-3)
    if warmup < steps:
        assert rates[warmup] == pytest.approx(1e-3)
        assert rates[-1] >= 1e-5 * (1 - 1e-12)


def test_rate_scales_with_the_batch():
    small, large = recipe(batch=64, lr_reference_batch=64), recipe(batch=256, lr_reference_batch=64)
    assert learning_rate(50, large) == pytest.approx(4 * learning_rate(50, small))


def test_the_rate_by_hand():
    """Two of ten steps of warm-up, then half a cosine over the other eight: .1 + .9·(1 + cos(π·k/8))/2."""
    cell = recipe(10, lr=1.0, min_lr=0.1, warmup_share=0.2)
    falling = [0.1 + 0.45 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert [learning_rate(step, cell) for step in range(10)] == pytest.approx([0.5, 1.0, *falling])
    assert falling[4] == pytest.approx(0.55)
    alone = recipe(1, lr=1.0, min_lr=0.1, warmup_share=0.0)
    assert learning_rate(0, alone) == 1.0
    # Only the peak scales with the batch: 3 times as large a batch, 3 times the rate at the top.
    large = recipe(10, batch=192, lr=1.0, lr_reference_batch=64, min_lr=0.1, warmup_share=0.2)
    assert learning_rate(1, large) == pytest.approx(3.0) and learning_rate(6, large) == pytest.approx(0.1 + 2.9 / 2)


def test_what_the_recipe_says_of_adamw_reaches_it():
    model = make_model(MODEL, num_classes=5, image_size=16)
    optim = Optim(lr=2e-3, weight_decay=0.07, betas=(0.8, 0.95), eps=1e-6)
    groups = make_optimizer(model, optim).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.07}
    assert {(group["lr"], group["betas"], group["eps"], group["lr_scale"]) for group in groups} == {
        (2e-3, (0.8, 0.95), 1e-6, 1.0)}  # fmt: skip
    assert {group["weight_decay"] for group in make_optimizer(model, optim.model_copy(update={"layer_decay": 0.5}))
            .param_groups} == {0.0, 0.07}  # fmt: skip


def test_an_average_by_hand():
    """1, then 3 with d = 1/10, then 5 with d = 1/2, which is the least of .5 and 81/90."""
    layer = torch.nn.Linear(1, 2, bias=False)
    layer.register_parameter("frozen", torch.nn.Parameter(torch.zeros(1), requires_grad=False))
    torch.nn.init.constant_(layer.weight, 1.0)
    average = EMA(layer, 0.5)
    assert len(average.average) == 1, "what does not learn has no average"
    for value, step, expected in ((3.0, 0, 2.8), (5.0, 80, 3.9)):
        torch.nn.init.constant_(layer.weight, value)
        average.update(step)
        assert average.average[0].flatten().tolist() == pytest.approx([expected] * 2)
    with average.swapped_in():
        assert layer.weight.flatten().tolist() == pytest.approx([3.9] * 2)
    assert layer.weight.flatten().tolist() == [5.0] * 2
    with pytest.raises(KeyError), average.swapped_in():
        raise KeyError
    assert layer.weight.flatten().tolist() == [5.0] * 2


def test_biases_norms_positions_and_class_tokens_do_not_decay():
    model = make_model(MODEL, num_classes=5, image_size=16)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, resting = set(), set()
    for group in make_optimizer(model, Optim(lr=1e-3, weight_decay=0.05)).param_groups:
        (decaying if group["weight_decay"] else resting).update(names[id(each)] for each in group["params"])
    assert decaying == {name for name in names.values() if name.endswith("weight") and "norm" not in name}
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias"} <= resting


def test_layer_decay_slows_each_block_below_the_head():
    model = make_model(MODEL, num_classes=5, image_size=16)
    optimizer = make_optimizer(model, Optim(lr=1e-3, layer_decay=0.5))
    set_learning_rate(optimizer, 1.0)
    rate = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    rates = {name: rate[id(parameter)] for name, parameter in model.named_parameters()}
    assert rates["head.weight"] == 1.0
    assert [rates[f"blocks.{block}.attn.qkv.weight"] for block in range(3)] == [0.125, 0.25, 0.5]
    assert rates["patch_embed.proj.weight"] == rates["pos_embed"] == 0.0625


def test_linear_probe_optimizes_the_head_alone():
    model = make_model(TimmModel(kind="timm", name="resnet10t"), num_classes=5, image_size=32)
    freeze_backbone(model)
    groups = make_optimizer(model, Optim(lr=1e-3)).param_groups
    assert sum(each.numel() for group in groups for each in group["params"]) == 5 * 512 + 5


def test_rates_on_the_device_are_those_of_the_groups():
    numbers, tensors = (
        make_optimizer(make_model(MODEL, num_classes=3, image_size=16), Optim(lr=1e-3, layer_decay=0.5)) for _ in "12"
    )
    keep_rates_on(torch.device("cpu"), tensors)
    places = [group["lr"].data_ptr() for group in tensors.param_groups]
    for rate in (0.25, 0.1):
        set_learning_rate(numbers, rate)
        set_learning_rate(tensors, rate)
        rates = [group["lr"] for group in tensors.param_groups]
        assert [float(each) for each in rates] == pytest.approx(
            [group["lr"] for group in numbers.param_groups], rel=1e-6
        )
    assert [each.data_ptr() for each in rates] == places  # a recorded step reads where it was recorded


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, True), ({"cuda_graph": False}, False), ({"zero_stage": 0}, False), ({"compile": True}, False),
        ({"teacher_cache": True}, False), ({"device": "cpu"}, False), ({"ranks": 2}, False), ({"precision": "fp16"}, False),
        ({"precision": "bf16"}, True), ({"loss_terms": {"mine": 1.0}}, False),
    ],
)  # fmt: skip
def test_only_steps_that_repeat_themselves_are_recorded(changes, wanted):
    how = {name: changes[name] for name in ("cuda_graph", "zero_stage", "compile", "teacher_cache") if name in changes}
    of_training = {name: changes[name] for name in ("precision", "loss_terms") if name in changes}
    cell = recipe()
    cell = cell.model_copy(update={"training": cell.training.model_copy(update=of_training)})
    accelerator = SimpleNamespace(
        device=torch.device(changes.get("device", "cuda")), num_processes=changes.get("ranks", 1)
    )
    assert can_capture(cell, Resources(**{"zero_stage": None, **how}), accelerator) == wanted
