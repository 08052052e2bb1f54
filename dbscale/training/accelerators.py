"""One Accelerator per cell, made from resources: plain, DDP or DeepSpeed ZeRO 0–3 are configurations, not code paths.

Many cells share one process and one process group; each gets fresh Accelerate state. Ranks come from the environment
(`accelerate launch`, or the variables that launch.worker sets); without them the world is this process alone.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import accelerate.optimizer
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from dbscale.errors import TrainingError
from dbscale.study.recipe import Training
from dbscale.study.resources import Resources
from dbscale.training.trackers import tracker_options

DEEPSPEED_CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
LONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
LOMO = cache(accelerate.optimizer.is_lomo_available)
AMP_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


@dataclass(frozen=True)
class Batching:
    """How the global batch is cut: `world_size` × `accumulation` micro-batches of `micro_batch` samples."""

    world_size: int
    accumulation: int
    micro_batch: int


def make_batching(global_batch: int, world_size: int, micro_batch: int | None) -> Batching:
    """The fewest equal micro-batches of at most `micro_batch` samples a rank. Raises TrainingError."""
    if global_batch % world_size:
        valid = ", ".join(str(n) for n in range(1, global_batch + 1) if global_batch % n == 0)
        raise TrainingError(f"{world_size} processes do not divide the global batch {global_batch}; valid: {valid}")
    a_rank = global_batch // world_size
    limit = min(micro_batch or a_rank, a_rank)
    accumulation = next(n for n in range(1, a_rank + 1) if a_rank % n == 0 and a_rank // n <= limit)
    return Batching(world_size, accumulation, a_rank // accumulation)


def world_size_from_environment() -> int:
    """Ranks that train together, known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextlib.contextmanager
def open_accelerator(
    training: Training, resources: Resources, batching: Batching, folder: Path
) -> Iterator[Accelerator]:
    """An Accelerator for one cell, whose tracker (if any) writes to `folder`.

    On leaving, its memory is freed and the process is ready for the next cell. Raises TrainingError.
    """
    _configure_process(resources)
    on_cpu = resources.device == "cpu" or not torch.cuda.is_available()
    if resources.device == "cuda" and on_cpu:
        raise TrainingError("resources.device is 'cuda', but torch sees no CUDA device; use 'auto' or 'cpu'")
    if training.precision == "fp16" and on_cpu:
        raise TrainingError("precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    tracker = tracker_options(resources.tracker, folder)
    with _rank_environment(resources.zero_stage, on_cpu):
        _settle_memory(resources.zero_stage is not None)
        try:
            accelerator = _make_accelerator(training, resources, batching, on_cpu, tracker)
        except Exception:
            AcceleratorState._reset_state(reset_partial_state=True)  # half made, it would spoil the next cell
            raise
        try:
            yield accelerator
        finally:
            accelerator.free_memory()


@contextlib.contextmanager
def keeps_linear() -> Iterator[None]:
    """Give `torch.nn.functional.linear` back on leaving.

    A ZeRO-3 engine replaces it for the rest of the process, by one that frees gathered weights sooner and rounds
    otherwise under autocast. What comes after training, and other cells, must not depend on what the process did before.
    """
    linear = torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def reduce_over_ranks(accelerator: Accelerator, tensor: Tensor, reduction: Literal["sum", "mean"]) -> Tensor:
    """Elementwise over all ranks, equal on each; the tensor itself in a world of one."""
    if accelerator.num_processes == 1:
        return tensor
    reduced = accelerator.reduce(tensor.to(accelerator.device), reduction=reduction)
    assert isinstance(reduced, Tensor)
    return reduced


def _make_accelerator(
    training: Training, resources: Resources, batching: Batching, on_cpu: bool, tracker: dict[str, Any]
) -> Accelerator:
    plain_on_cpu = on_cpu and resources.zero_stage is None
    # A process that changes between plain and DeepSpeed cells needs a fresh PartialState; the process group stays.
    changed = PartialState._shared_state.get("_cpu", plain_on_cpu) != plain_on_cpu
    AcceleratorState._reset_state(reset_partial_state=changed)
    plugin = None if resources.zero_stage is None else _deepspeed_plugin(resources.zero_stage, training, batching)
    return Accelerator(
        cpu=plain_on_cpu,
        # bf16 is an autocast around the student (see loop), so that weights, optimizer and results do not depend on
        # the ZeRO stage; fp16 needs the engine's loss scaling.
        mixed_precision="fp16" if training.precision == "fp16" else "no",
        gradient_accumulation_steps=batching.accumulation,
        deepspeed_plugin=plugin,
        # Without it a world of CPU ranks is silently 1.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and "RANK" in os.environ else [],
        **tracker,
    )


def _deepspeed_plugin(stage: int, training: Training, batching: Batching) -> DeepSpeedPlugin:
    config: dict[str, Any] = json.loads((DEEPSPEED_CONFIGS / f"zero{stage}.json").read_text())
    config["train_micro_batch_size_per_gpu"] = batching.micro_batch
    config["gradient_accumulation_steps"] = batching.accumulation
    config["gradient_clipping"] = training.optim.clip_norm or 0.0
    return DeepSpeedPlugin(hf_ds_config=config)


@cache
def _settle_memory(uses_deepspeed: bool) -> None:
    """Once per set of imports: what the imports left behind is never garbage.

    Accelerate collects after each cell, and walking torch's half a million objects again would take longer than
    making the next cell's model.
    """
    gc.collect()
    gc.freeze()
    # At the end it is garbage after all: Triton's bindings complain of a thousand leaks otherwise.
    atexit.register(gc.unfreeze)


def _configure_process(resources: Resources) -> None:
    """Threads and determinism; cheap, hence done for each cell."""
    # Accelerate looks for this package on disk twice a step.
    accelerate.optimizer.is_lomo_available = LOMO
    if resources.threads is not None:
        torch.set_num_threads(resources.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(resources.deterministic, warn_only=True)
    # Determinism also fills every fresh tensor with NaN to unmask reads of unwritten memory: a cost, no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = not resources.deterministic
    torch.set_float32_matmul_precision("high")


@contextlib.contextmanager
def _rank_environment(zero_stage: int | None, on_cpu: bool) -> Iterator[None]:
    """What Accelerate and DeepSpeed read, for the time of one cell."""
    wanted: dict[str, str | None] = {
        "ACCELERATE_USE_DEEPSPEED": None if zero_stage is None else "true",
        "ACCELERATE_USE_CPU": None,
        "ACCELERATE_MIXED_PRECISION": None,
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": None,
        "ACCELERATE_CONFIG_DS_FIELDS": None,
        "ACCELERATE_TORCH_DEVICE": "cpu" if on_cpu else None,
        "DS_ACCELERATOR": "cpu" if on_cpu else "cuda",
    }
    if on_cpu and not torch.cuda.is_available():
        # Otherwise torch's optimizers open the driver's library at each step, only to find no device.
        wanted["CUDA_VISIBLE_DEVICES"] = ""
    if zero_stage is not None and "RANK" not in os.environ:
        wanted |= LONE_RANK
    before = {name: os.environ.get(name) for name in wanted}
    _set_environment(wanted)
    try:
        if zero_stage is not None:
            _quiet_deepspeed()
            _open_lone_group(on_cpu)
        yield
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _open_lone_group(on_cpu: bool) -> None:
    """DeepSpeed wants a process group even for one process: one that lives in memory needs no port."""
    if os.environ["WORLD_SIZE"] == "1" and not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        torch.distributed.init_process_group("gloo" if on_cpu else "nccl", store=store, rank=0, world_size=1)


def _quiet_deepspeed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed  # (seconds to import, hence only where ZeRO is used)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its op for inference on CPUs: training never calls it, yet it would be compiled here and leave 67 MB a rank in
    # /dev/shm for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
