"""How a cell runs on a machine, and how it is asked to stop: none of it reaches a cell's identity.

All of it may change between two attempts at one cell. Also which GPUs there are, as the drivers say, without torch.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from dbscale.strict import Strict

Tracker = Literal[
    "tensorboard", "wandb", "mlflow", "aim", "clearml", "comet_ml", "dvclive", "swanlab", "trackio",
]  # fmt: skip
"""All that Accelerate has. The first three go on in their run when a cell is resumed, the others begin another one."""
NVIDIA = Path("/proc/driver/nvidia/gpus")
"""One folder a GPU."""
ROCM = Path("/sys/class/kfd/kfd/topology/nodes")
"""One folder a processor; a CPU has gpu_id 0."""
CHOSEN_BY = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
GPU_NAME = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")


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
    cuda_graph: bool = True
    """Record the step of a plain engine on one GPU and replay it, where it can be recorded: the same weights, sooner."""
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


def visible_gpus() -> tuple[str, ...]:
    """Names of the NVIDIA and AMD GPUs that this process may use: indices, UUIDs or MIG ids where the environment names
    them so, else indices."""
    for name in CHOSEN_BY:
        if name in os.environ:
            return _named_gpus(os.environ[name])
    gave = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")
    if "SLURM_JOB_ID" in os.environ and not any(name in os.environ for name in gave):
        return ()  # the node's GPUs are other jobs'
    return tuple(map(str, range(_count_gpus())))


def _named_gpus(listed: str) -> tuple[str, ...]:
    """Up to the first entry that names none: so the driver reads it (-1 hides all that follows)."""
    named = []
    for part in map(str.strip, listed.split(",")):
        if not GPU_NAME.fullmatch(part):
            break
        named.append(part)
    return tuple(dict.fromkeys(named))


def _count_gpus() -> int:
    try:
        return len(list(NVIDIA.iterdir()))
    except OSError:
        return sum(_gpu_id(node) not in ("", "0") for node in ROCM.glob("*"))


def _gpu_id(node: Path) -> str:
    try:
        return (node / "gpu_id").read_text().strip()
    except OSError:
        return ""
