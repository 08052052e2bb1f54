"""A hash of all that a finished run holds besides its weights: the optimizer's state and the moving average."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from dbscale.training.loop import Run


def end_hash(finished: Run) -> str:
    """Of this rank's tensors, in a fixed order."""
    digest = hashlib.sha256()
    inner = getattr(getattr(finished.optimizer, "optimizer", None), "optimizer", None)
    # Not inner.state_dict(): under ZeRO-3 it looks its partitions up among the whole parameters and fails.
    held = [finished.optimizer.state_dict(), list(inner.state.values()) if inner is not None else None]
    for each in tensors([*held, [] if finished.ema is None else finished.ema.average]):
        digest.update(each.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensors(value: Any) -> list[torch.Tensor]:
    """All of nested containers, dictionaries by key."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [each for key in sorted(value, key=str) for each in tensors(value[key])]
    if isinstance(value, (list, tuple)):
        return [each for item in value for each in tensors(item)]
    return []
