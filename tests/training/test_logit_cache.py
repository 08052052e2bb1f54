"""Cached teachers: the same results bitwise, asked once for what several students see, never for something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dbscale.study.recipe import Attention, Augment, DeiT, Distill
from dbscale.study.resources import Resources
from dbscale.training import logit_cache, prepare
from dbscale.training.logit_cache import CachedTeacher

CACHED = Resources(zero_stage=None, threads=1, teacher_cache=True)
MIXED = {"augment": Augment(crop_padding=1, hflip=0.5, mixup=0.8, cutmix=1.0)}


@pytest.fixture
def asked(monkeypatch):
    """How often a teacher was really asked."""
    calls: list[int] = []
    original = prepare.load_teacher

    def counting(*arguments, **keywords):
        teacher = original(*arguments, **keywords)
        if teacher is not None:
            teacher.register_forward_pre_hook(lambda *_: calls.append(1))
        return teacher

    monkeypatch.setattr(prepare, "load_teacher", counting)
    return calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_results_are_bitwise_those_without_a_cache(precision, bench_of, asked, stop_after):
    found = {}
    for name, resources in (("without", Resources(zero_stage=None, threads=1)), ("with", CACHED)):
        bench = bench_of(name)
        teacher = bench.cell(seed=1, precision=precision, **MIXED)
        cell = bench.cell("distill", teacher=teacher, precision=precision, **MIXED)
        bench.run(teacher)
        assert bench.run(cell, resources, stop_after(5)).status == "interrupted"
        assert bench.run(cell, resources).status == "done"
        found[name] = bench.fingerprint(cell)
    assert found["with"] == found["without"]
    assert len(asked) == 24


def test_students_that_share_a_stream_ask_once_and_others_anew(bench, asked):
    teacher = bench.cell(seed=1, **MIXED)
    bench.run(teacher)
    students = [DeiT(heads=heads, head_width=8, depth=2, patch_size=4) for heads in (2, 3)]
    for model in students:
        assert bench.run(bench.cell("distill", teacher=teacher, model=model, **MIXED), CACHED).status == "done"
    assert len(asked) == 12, "the second student saw the same pixels"
    for other in ({"augment": Augment(crop_padding=1)}, {**MIXED, "seed": 7}):
        before = len(asked)
        assert bench.run(bench.cell("distill", teacher=teacher, **other), CACHED).status == "done"
        assert len(asked) == before + 12, "other pixels, other answers"
    retrained = bench.cell(seed=2, **MIXED)
    bench.run(retrained)
    before = len(asked)
    bench.run(bench.cell("distill", teacher=retrained, **MIXED), CACHED)
    assert len(asked) == before + 12, "another teacher"


def test_maps_are_always_asked_for(bench, asked):
    teacher = bench.cell(seed=1)
    bench.run(teacher)
    guided = Distill(alpha=0.5, attention=Attention())
    for model in (None, DeiT(heads=3, head_width=8, depth=2, patch_size=4)):
        assert bench.run(bench.cell("distill", teacher=teacher, distill=guided, model=model), CACHED).status == "done"
    assert not (bench.store.root / logit_cache.FOLDER).exists()


def test_the_last_bit_of_a_pixel_is_another_question_and_damage_is_asked_again(tmp_path):
    network, calls = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), []
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    teacher, images = CachedTeacher(network, tmp_path / "kept"), torch.rand(2, 3, 2, 2)
    with torch.no_grad():
        first = teacher(images)
        assert torch.equal(teacher(images.clone()), first) and len(calls) == 1
        changed = images.clone()
        changed.view(-1).view(torch.int32)[5] ^= 1
        teacher(changed)
        teacher(images.reshape(2, 3, 4, 1))
        assert len(calls) == 3
        for path in (tmp_path / "kept").iterdir():
            path.write_bytes(path.read_bytes()[:-5])
        assert torch.equal(teacher(images), first) and len(calls) == 4
