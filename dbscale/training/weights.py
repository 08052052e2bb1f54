"""`model.safetensors`: how a cell's weights are written, and how a child makes sure it reads what the row names."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
from accelerate import Accelerator
from torch import Tensor, nn

from dbscale.errors import TrainingError
from dbscale.files import atomic_open
from dbscale.study.store import Row, Store
from dbscale.training.ema import EMA

WEIGHTS_NAME = "model.safetensors"


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
    """Atomic safetensors file, names as timm's; its SHA-256. Raises FileError when it cannot be written."""
    plain = {name: _plain(value) for name, value in state.items()}
    with atomic_open(path, "wb") as file:
        try:
            safetensors.torch.save_file(plain, file.name, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        return sha256_of(Path(file.name))


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
