"""Weights on disk: what the safetensors library reads back, and the hash that the row names."""

from __future__ import annotations

import hashlib
import resource

import pytest
import safetensors.torch
import torch

from dbscale.errors import FileError, TrainingError
from dbscale.study.recipe import DeiT, TimmModel
from dbscale.training import models
from dbscale.training.models import add_parallel_head, make_model, merge_parallel_head, sha256_of, write_weights

MODELS = {
    "vit": DeiT(heads=2, head_width=8, depth=2, patch_size=4),
    "integers and empty shapes beside floats": TimmModel(kind="timm", name="resnet10t"),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_weights_are_read_back_and_hashed(model, tmp_path):
    state = make_model(model, num_classes=5, image_size=16).state_dict()
    path = tmp_path / "model.safetensors"
    digest = write_weights(path, state)
    assert digest == sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_models_of_one_seed_start_alike_and_share_nothing(model):
    """The draws are kept, and each caller gets a copy of its own."""
    first, second = (make_model(model, num_classes=5, image_size=16, seed=3) for _ in range(2))
    anew = models._create(model, 5, 16, seed=3)
    for name, value in anew.state_dict().items():
        assert torch.equal(first.state_dict()[name], value), name
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in anew.state_dict().items())
    other = make_model(model, num_classes=5, image_size=16, seed=4).state_dict()
    assert any(not torch.equal(value, other[name]) for name, value in anew.state_dict().items())


def test_halves_are_written_as_floats(tmp_path):
    state = {"w": torch.randn(4, 4, dtype=torch.bfloat16).T}
    write_weights(tmp_path / "w", state)
    loaded = safetensors.torch.load_file(tmp_path / "w")["w"]
    assert loaded.dtype == torch.float32 and torch.equal(loaded, state["w"].float())


@pytest.mark.parametrize(
    ("there", "told"),
    [({"a": (2, 3), "b": (4,)}, None),
     ({"a": (2, 4), "b": (4,)}, r"a is \[2, 4\] there, \[2, 3\] here; both must name the same model"),
     ({"a": (2, 3)}, "b is missing; both"), ({"a": (2, 3), "b": (4,), "c": (1,)}, "c is not known here; both"),
     ({"a": (2, 4), "c": (1,)}, r"a is \[2, 4\] there, \[2, 3\] here and 2 more; both")],
)  # fmt: skip
def test_weights_that_do_not_fit_are_told_by_the_first_tensor_that_does_not(there, told, tmp_path):
    wanted, state = (
        {name: torch.zeros(shape) for name, shape in each.items()} for each in ({"a": (2, 3), "b": (4,)}, there)
    )
    if told is None:
        models.refuse_misfit(tmp_path, state, wanted)
        return
    with pytest.raises(TrainingError, match=f"does not fit this cell's model: {told}"):
        models.refuse_misfit(tmp_path, state, wanted)


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_weights_that_cannot_be_read_name_the_file_and_what_to_do(content, tmp_path):
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        TrainingError, match=r"cannot read the weights .*/w\.safetensors: .*; run the cell they come from again"
    ):
        models.read_weights(path)


def test_no_path_is_dropped_unless_a_recipe_says_so():
    images = torch.randn(2, 3, 16, 16)
    plain, dropping = (
        make_model(MODELS["vit"], num_classes=5, image_size=16, **how) for how in ({}, {"drop_path": 0.9})
    )
    with torch.no_grad():
        expected = plain.eval()(images)
        assert torch.equal(plain.train()(images), expected)
        assert torch.equal(dropping.eval()(images), expected) and not torch.equal(dropping.train()(images), expected)


def test_a_model_that_timm_does_not_know_is_answered_with_the_nearest():
    with pytest.raises(TrainingError, match="timm knows no model 'resnet1'; near it: resnet"):
        make_model(TimmModel(kind="timm", name="resnet1"), num_classes=5, image_size=16)
    with pytest.raises(TrainingError, match="image_size 18 is not a multiple of patch_size 4"):
        make_model(MODELS["vit"], num_classes=5, image_size=18)


def test_weights_that_cannot_be_written_leave_nothing(tmp_path):
    """As on a full disk: the library's error becomes ours, and names the file."""
    path, limits = tmp_path / "w", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(FileError, match=f"cannot write {path}"):
            write_weights(path, {"w": torch.zeros(4096)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_two_linear_heads_average_to_the_one_that_is_written(model):
    plain, twin = (make_model(model, num_classes=5, image_size=16, seed=3).eval() for _ in range(2))
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    add_parallel_head(twin, seed=3)
    assert all(torch.equal(twin.state_dict()[name], value) for name, value in before.items()), "the arms start alike"
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = twin(images)
        assert torch.equal(first, plain(images))
        plain.load_state_dict(merge_parallel_head(twin.state_dict()))
        torch.testing.assert_close(plain(images), (first + second) / 2)
    assert not torch.equal(first, second)


def test_the_second_head_is_drawn_from_its_own_stream():
    """DeiT's: normal, sd .02, no bias; alike for equal seeds, and the process's generator is not asked."""
    drawn = []
    for seed in (3, 3, 4):
        model = make_model(MODELS["vit"], num_classes=500, image_size=16, seed=3)
        torch.manual_seed(len(drawn))
        state = torch.random.get_rng_state()
        add_parallel_head(model, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        drawn.append(model.head.parallel)
    assert torch.equal(drawn[0].weight, drawn[1].weight) and not torch.equal(drawn[0].weight, drawn[2].weight)
    assert float(drawn[0].weight.detach().std()) == pytest.approx(0.02, rel=0.05) and not drawn[0].bias.any()


def test_a_distillation_token_brings_its_own_second_head():
    kwargs = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 4}
    model = make_model(
        TimmModel(kind="timm", name="deit_tiny_distilled_patch16_224", kwargs=kwargs), num_classes=5, image_size=16
    )
    names = set(model.state_dict())
    add_parallel_head(model, seed=0)
    assert set(model.state_dict()) == names == set(merge_parallel_head(model.state_dict()))
    images = torch.randn(2, 3, 16, 16)
    first, second = model.train()(images)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), (first + second) / 2)


def test_a_classifier_that_is_not_linear_gets_no_second_one():
    model = make_model(MODELS["vit"], num_classes=5, image_size=16)
    model.head = torch.nn.Sequential(torch.nn.Linear(16, 5))
    with pytest.raises(TrainingError, match="head parallel: the classifier of VisionTransformer is a Sequential"):
        add_parallel_head(model, seed=0)
