"""How a cell runs on a machine, and how it is asked to stop: none of it reaches a cell's identity.

All of it may change between two attempts at one cell.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from dbscale.strict import Strict

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class Resources(Strict):
    """Written in `configs/clusters/*.yaml` under `resources:`."""

    num_processes: int = Field(default=1, gt=0)
    """Ranks that train one cell together, over all nodes."""
    micro_batch: int | None = Field(default=None, gt=0)
    """Samples per process and forward pass; the rest of the global batch is accumulated. None: all at once."""
    num_workers: int = Field(default=0, ge=0)
    """Decoding processes per rank; 0 decodes in the rank itself, right for resident tiers."""
    zero_stage: Literal[0, 1, 2, 3] | None = 1
    """DeepSpeed ZeRO stage (`configs/deepspeed/zero<N>.json`); None trains with plain Accelerate (DDP)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, gt=0)
    """Torch threads per rank on CPU; None leaves torch's choice."""
    checkpoint_interval_s: float = Field(default=300.0, gt=0)
    """Stretched where saving so often would stall training for more than `checkpoint_stall_share` of the time."""
    checkpoint_stall_share: float = Field(default=0.01, gt=0)
    deterministic: bool = True
    compile: bool = False
    kd_backend: Literal["auto", "triton", "eager", "compile"] = "auto"
    teacher_cache: bool = False
    """Keep a teacher's logits in `<store>/teacher_logits`, by the pixels it saw: for students that share a stream and
    a teacher that is dearer than reading them. Attention maps are not kept."""
    tracker: Tracker | None = None


@dataclass
class StopRequest:
    """Set once, read every step. The one mutable value that crosses wings: a handler may only set a flag."""

    _event: threading.Event = field(default_factory=threading.Event)
    reason: str | None = None

    def ask(self, reason: str) -> None:
        """Ask for a checkpoint and a stop; the first reason stands."""
        self.reason = self.reason or reason
        self._event.set()

    def wait(self) -> None:
        """Return once a stop is asked for."""
        self._event.wait()

    @property
    def requested(self) -> bool:
        return self._event.is_set()
