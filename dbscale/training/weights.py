"""`model.safetensors`: how a cell's weights are written, and how a child makes sure it reads what the row names.

Written by hand, in the bytes of `safetensors.torch.save` (a test): the library goes through a copy of the whole, which
takes longer than everything else that happens to weights between two cells.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dbscale.study.row import Row
from dbscale.study.store import Store, atomic_open
from dbscale.training.ema import EMA
from dbscale.training.errors import TrainingError

WEIGHTS_NAME = "model.safetensors"
DTYPE_NAMES = {torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
"""Of the tensors a timm model has once its weights are float32, in the order the format lays them out."""


def export_weights(path: Path, accelerator: Accelerator, model: nn.Module, ema: EMA | None) -> str | None:
    """Gather the trained weights (their average, if one is kept) and write them as plain float32 timm weights.

    Returns the file's SHA-256 on the main rank, None on others.
    """
    digest = None
    with ema.swapped_in() if ema is not None else contextlib.nullcontext():
        state: Any = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            digest = write_weights(path, state)  # inside: the state is views of what is swapped
    accelerator.wait_for_everyone()
    return digest


def write_weights(path: Path, state: dict[str, Tensor]) -> str:
    """Atomic safetensors file, names as timm's; its SHA-256."""
    digest = hashlib.sha256()
    with atomic_open(path, "wb") as file:
        for part in serialize({name: _plain(value) for name, value in state.items()}):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def serialize(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The pieces of a safetensors file: length of the header, header, the tensors as they lie in memory."""
    kinds = list(DTYPE_NAMES)
    names = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPE_NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield tensors[name].reshape(-1).view(torch.uint8).numpy().data


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified_weights(store: Store, row: Row) -> Path:
    """Path of a finished cell's weights. Raises TrainingError when they are not the ones its row names."""
    path = store.cell_dir(row.key) / WEIGHTS_NAME
    if not path.is_file():
        raise TrainingError(f"{path} is missing, though the cell is done; remove {path.parent} to run it again")
    if sha256_of(path) != row.weights_sha256:
        raise TrainingError(f"{path} is not what its row.json describes; remove {path.parent} to run it again")
    return path
