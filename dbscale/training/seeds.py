"""Random streams by name: every draw is keyed by (seed, purpose), never by arm, so paired arms share their draws.

The order of samples and the draws of augmentation are the data wing's; these are its keys and torch's own generator.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, purpose: str, *keys: int) -> int:
    """63 bits from (seed, purpose, keys): streams of different purposes are independent."""
    text = "\0".join(map(str, (seed, purpose, *keys)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Make torch's draws within a step (stochastic depth, dropout) a function of (seed, step, rank).

    So no generator's state has to outlive a step: nothing to save in checkpoints, and a teacher's draws, if it had
    any, could not shift the student's.
    """
    key = derive_seed(seed, "step", step, rank)
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)
