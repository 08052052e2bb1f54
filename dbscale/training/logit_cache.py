"""A teacher's logits kept on disk, found again by the very pixels it saw.

The key is a hash of the augmented, mixed images as the teacher gets them, so an answer can never be stale: another
augmentation, seed, order or batch is another key. Arms and seeds that share a stream (students of several sizes under
one teacher) ask the teacher once. Attention maps are not kept. Only for how a cell runs: results are the same bitwise.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn

from dbscale.errors import FileError
from dbscale.files import atomic_open
from dbscale.study.cell import CellSpec, canonical_json
from dbscale.study.store import Store
from dbscale.training.device import device_name

FOLDER = "teacher_logits"


class CachedTeacher:
    """Answers as `teacher` does, from `folder` where it can."""

    def __init__(self, teacher: nn.Module, folder: Path) -> None:
        self.teacher, self.folder = teacher, folder

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [b, C] of images [b, 3, S, S]. Raises FileError when an answer cannot be kept."""
        path = self.folder / f"{_digest(images)}.safetensors"
        known = _read(path)
        if known is not None:
            return known.to(images.device)
        logits_BC = self.teacher(images)
        with atomic_open(path, "wb", durable=False) as file:
            file.write(safetensors.torch.save({"logits": logits_BC.detach().cpu().contiguous()}))
        return logits_BC


def open_cache(store: Store, spec: CellSpec, teacher: nn.Module, device: torch.device) -> CachedTeacher:
    """The cache of the teacher of a distill cell: of these weights, computed in this way on this kind of device."""
    row = store.read_row(spec.teacher) if spec.teacher else None
    if row is None:
        raise FileError(f"the teacher {spec.teacher} of {spec.key} has no row; train it first")
    identity = {
        "weights": row.weights_sha256,
        "precision": spec.recipe.training.precision,
        "device": device_name(device),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    name = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]
    return CachedTeacher(teacher, store.root / FOLDER / name)


def _digest(images: Tensor) -> str:
    """Of values, shape and type."""
    pixels = images.detach().cpu().contiguous()
    digest = xxhash.xxh3_128(f"{tuple(pixels.shape)} {pixels.dtype}".encode())
    digest.update(pixels.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> Tensor | None:
    """None where there is no answer yet, or only a damaged one."""
    try:
        return safetensors.torch.load(path.read_bytes())["logits"]
    except (OSError, SafetensorError, KeyError):
        return None
