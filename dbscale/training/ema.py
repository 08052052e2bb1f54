"""Exponential moving average of the weights, kept in the pieces that this rank holds.

Under ZeRO-3 a rank's piece of a parameter is its partition, so the average is partitioned as well and nothing is
gathered until the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def local_piece(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: all of it, or its ZeRO-3 partition."""
    return getattr(parameter, "ds_tensor", parameter).data


class EMA:
    """average ← d·average + (1-d)·weights after each optimizer step, float32; d rises to `decay`.

    d(t) = min(decay, (1 + t) / (10 + t)) at 0-based step t, as TensorFlow's moving average with `num_updates`: a
    constant .9999 would leave 61 % of the initial weights in the average of a run of 5,000 steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._decay = decay
        self.average = [local_piece(parameter).detach().float().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the 0-based optimizer step `step`."""
        decay = min(self._decay, (1 + step) / (10 + step))
        pieces = [local_piece(parameter).float() for parameter in self._parameters]
        torch._foreach_lerp_(self.average, pieces, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model's weights are the average."""
        pieces = [local_piece(parameter) for parameter in self._parameters]
        kept = [piece.clone() for piece in pieces]
        for piece, average in zip(pieces, self.average, strict=True):
            piece.copy_(average)
        try:
            yield
        finally:
            for piece, original in zip(pieces, kept, strict=True):
                piece.copy_(original)
