"""Weights on disk: the bytes that the safetensors library would write, and the hash that the row names."""

from __future__ import annotations

import hashlib

import pytest
import safetensors.torch
import torch

from dbscale.study.recipe import DeiT, TimmModel
from dbscale.training.models import make_model
from dbscale.training.weights import serialize, sha256_of, write_weights

MODELS = {
    "vit": DeiT(heads=2, head_width=8, depth=2, patch_size=4),
    "integers and empty shapes beside floats": TimmModel(kind="timm", name="resnet10t"),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_bytes_are_the_librarys(model, tmp_path):
    state = make_model(model, num_classes=5, image_size=16).state_dict()
    path = tmp_path / "model.safetensors"
    digest = write_weights(path, state)
    assert path.read_bytes() == safetensors.torch.save(state, metadata={"format": "pt"})
    assert digest == sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_every_kind_of_tensor_is_laid_out_as_the_library_does():
    tensors = {
        "b": torch.tensor([True, False, True]),
        "ü": torch.arange(3, dtype=torch.uint8),
        "i": torch.tensor(7),
        "j": torch.arange(5, dtype=torch.int32),
        "e": torch.zeros(0, 4),
        "f": torch.randn(3, 1, 2),
    }
    assert b"".join(serialize(tensors)) == safetensors.torch.save(tensors, metadata={"format": "pt"})


def test_halves_are_written_as_floats(tmp_path):
    state = {"w": torch.randn(4, 4, dtype=torch.bfloat16).T}
    write_weights(tmp_path / "w", state)
    loaded = safetensors.torch.load_file(tmp_path / "w")["w"]
    assert loaded.dtype == torch.float32 and torch.equal(loaded, state["w"].float())
