"""Weights on disk: what the safetensors library reads back, and the hash that the row names."""

from __future__ import annotations

import hashlib
import resource

import pytest
import safetensors.torch
import torch

from dbscale.errors import FileError
from dbscale.study.recipe import DeiT, TimmModel
from dbscale.training import models
from dbscale.training.models import make_model, sha256_of, write_weights

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
