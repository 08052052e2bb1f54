"""Weights on disk: what the safetensors library reads back, and the hash that the row names."""

from __future__ import annotations

import hashlib

import pytest
import safetensors.torch
import torch

from dbscale.study.recipe import DeiT, TimmModel
from dbscale.training.models import make_model
from dbscale.training.weights import sha256_of, write_weights

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


def test_halves_are_written_as_floats(tmp_path):
    state = {"w": torch.randn(4, 4, dtype=torch.bfloat16).T}
    write_weights(tmp_path / "w", state)
    loaded = safetensors.torch.load_file(tmp_path / "w")["w"]
    assert loaded.dtype == torch.float32 and torch.equal(loaded, state["w"].float())
