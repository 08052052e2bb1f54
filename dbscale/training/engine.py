"""One Accelerator per cell, and whatever else several ranks share: plain, DDP or DeepSpeed ZeRO 0–3 by configuration.

Many cells share one process and one process group; each gets fresh Accelerate state. Ranks come from the environment
(`accelerate launch`, or the variables that launch's workers set); without them the world is this process alone. What
Accelerate, DeepSpeed and torch keep in the process is set, patched or put back here and nowhere else, each with its reason.
The end of the file holds what ranks do together: reductions, batches in step, a checkpoint cut anew for another number of
ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import accelerate.optimizer
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor

from dbscale.errors import TrainingError
from dbscale.files import read_json
from dbscale.study.recipe import Training
from dbscale.study.resources import Resources, visible_gpus

DEEPSPEED_CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "deepspeed"
LONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
LOMO = cache(accelerate.optimizer.is_lomo_available)
AMP_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
Item = TypeVar("Item")
ENGINE_TAG = "pytorch_model"
"""The folder Accelerate gives DeepSpeed's part of a checkpoint."""


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


def engine_name(resources: Resources) -> str:
    """As checkpoints and rows name it."""
    return "plain" if resources.zero_stage is None else f"zero{resources.zero_stage}"


def with_launch_options(training: Training, resources: Resources, batching: Batching) -> Resources:
    """The resources with what `accelerate launch` was told, which reaches this process by its environment.

    `--dynamo_backend inductor` is `resources.compile`, which leaves the names of the weights alone. What the recipe
    decides, or nothing here serves, raises TrainingError before any step: otherwise it would be ignored in silence.
    """
    recipe, engine = "it is part of the recipe: set it in the grid", "set it in configs/deepspeed/zero<N>.json"
    served = "of the engines dbscale serves DDP and DeepSpeed ZeRO 0 to 3"
    allowed = {
        "MIXED_PRECISION": ({"no", training.precision}, recipe),
        "GRADIENT_CLIPPING": ({"none", "1.0", str(training.optim.clip_norm)}, recipe),  # 1.0 is what launch says unasked
        "GRADIENT_ACCUMULATION_STEPS": (
            {"1", str(batching.accumulation)}, "it follows from the global batch and resources.micro_batch"
        ),
        "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ({"none"}, engine),
        "DEEPSPEED_OFFLOAD_PARAM_DEVICE": ({"none"}, engine),
        "USE_FSDP": ({"false"}, served),
        "USE_MEGATRON_LM": ({"false"}, served),
        "USE_PARALLELISM_CONFIG": ({"false"}, served),
        "DYNAMO_BACKEND": ({"no", "inductor"}, "dbscale compiles with inductor or not at all (resources.compile)"),
        "DYNAMO_MODE": ({"default"}, "dbscale compiles in the default mode (resources.compile)"),
    }  # fmt: skip
    for name, (values, remedy) in allowed.items():
        value = os.environ.get(f"ACCELERATE_{name}", "").lower()
        if value and value not in values:
            raise TrainingError(
                f"accelerate launch sets {name.lower()} to {value!r}, this cell can have {' or '.join(sorted(values))}: "
                f"{remedy}; leave the option out"
            )
    _refuse_foreign_config(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"), resources.zero_stage)
    compiles = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() == "inductor"
    return resources.model_copy(update={"compile": resources.compile or compiles})


def _refuse_foreign_config(path: str | None, stage: int | None) -> None:
    """Refuse a DeepSpeed config that asks for more than a ZeRO stage, which is all that is taken from it."""
    if not path or stage is None:
        return
    ours, theirs = _deepspeed_config(stage), read_json(Path(path))
    if not isinstance(theirs, dict):
        raise TrainingError(f"{path} is no DeepSpeed config: expected keys and values, found {type(theirs).__name__}")
    for section, value in theirs.items():
        known = ours.get(section)
        options = value.items() if isinstance(value, dict) else [(section, value)]
        for name, setting in options:
            same = known.get(name) if isinstance(known, dict) else known
            if setting not in ("auto", False, same) and not section.startswith(("train_", "gradient_", "steps_per")):
                raise TrainingError(
                    f"{path} sets {section}.{name} to {setting!r}: of a DeepSpeed config only the ZeRO stage is taken; "
                    f"remove it there, or change {DEEPSPEED_CONFIGS / f'zero{stage}.json'}"
                )


@contextlib.contextmanager
def open_accelerator(
    training: Training, resources: Resources, batching: Batching, tracker: dict[str, Any]
) -> Iterator[Accelerator]:
    """An Accelerator for one cell; `tracker` is what it is told of trackers (`progress.tracker_options`).

    On leaving, its memory is freed and the process is ready for the next cell. Raises TrainingError.
    """
    _configure_process(resources)
    on_cpu = resources.device == "cpu" or not torch.cuda.is_available()
    if resources.device == "cuda" and on_cpu:
        raise TrainingError("resources.device is 'cuda', but torch sees no CUDA device; use 'auto' or 'cpu'")
    gpus = visible_gpus() if on_cpu and resources.device == "auto" else ()
    if gpus:
        built = torch.version.cuda or torch.version.hip or "CPUs alone"
        raise TrainingError(
            f"this machine has {len(gpus)} GPUs ({', '.join(gpus)}), but this torch, built for {built}, can use none of "
            "them; install a torch for them or mend the driver, or set resources.device to cpu to train on the CPU"
        )
    if training.precision == "fp16" and on_cpu:
        raise TrainingError("precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
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


def _make_accelerator(
    training: Training, resources: Resources, batching: Batching, on_cpu: bool, tracker: dict[str, Any]
) -> Accelerator:
    plain_on_cpu = on_cpu and resources.zero_stage is None
    # Accelerate keeps its state for the life of a process and would give every cell the engine of the first. The process
    # group stays; only a process that changes between plain and DeepSpeed cells needs a fresh PartialState.
    known = PartialState._shared_state
    was_deepspeed = known.get("distributed_type") == DistributedType.DEEPSPEED
    changed = known.get("_cpu", plain_on_cpu) != plain_on_cpu or was_deepspeed != (resources.zero_stage is not None)
    AcceleratorState._reset_state(reset_partial_state=changed)
    plugin = None if resources.zero_stage is None else _deepspeed_plugin(resources.zero_stage, training, batching)
    return Accelerator(
        cpu=plain_on_cpu,
        # bf16 is an autocast around the student (see `prepare`), so that weights, optimizer and results do not depend on
        # the ZeRO stage; fp16 needs the engine's loss scaling.
        mixed_precision="fp16" if training.precision == "fp16" else "no",
        gradient_accumulation_steps=batching.accumulation,
        deepspeed_plugin=plugin,
        # Without it a world of CPU ranks is silently 1.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and "RANK" in os.environ else [],
        **tracker,
    )


def _deepspeed_config(stage: int) -> dict[str, Any]:
    return json.loads((DEEPSPEED_CONFIGS / f"zero{stage}.json").read_text())


def _deepspeed_plugin(stage: int, training: Training, batching: Batching) -> DeepSpeedPlugin:
    config = _deepspeed_config(stage)
    config["train_micro_batch_size_per_gpu"] = batching.micro_batch
    config["gradient_accumulation_steps"] = batching.accumulation
    config["gradient_clipping"] = training.optim.clip_norm or 0.0
    return DeepSpeedPlugin(hf_ds_config=config)


# What the process keeps between cells


def _configure_process(resources: Resources) -> None:
    """Threads and determinism; cheap, hence done for each cell."""
    # Accelerate looks for this package on disk twice a step.
    accelerate.optimizer.is_lomo_available = LOMO
    if resources.threads is not None:
        torch.set_num_threads(resources.threads)
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS is deterministic only with a workspace of its own
    torch.use_deterministic_algorithms(resources.deterministic, warn_only=True)
    # Determinism also fills every fresh tensor with NaN to unmask reads of unwritten memory: a cost, no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = not resources.deterministic
    torch.set_float32_matmul_precision("high")


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


@contextlib.contextmanager
def _rank_environment(zero_stage: int | None, on_cpu: bool) -> Iterator[None]:
    """What Accelerate, DeepSpeed and torch read, for the time of one cell; what was there before comes back."""
    wanted: dict[str, str | None] = {
        "ACCELERATE_USE_DEEPSPEED": None if zero_stage is None else "true",
        # With it, DeepSpeed is silently off.
        "ACCELERATE_USE_CPU": None,
        # `with_launch_options` has read and judged these; Accelerate would act on them a second time.
        "ACCELERATE_MIXED_PRECISION": None,
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": None,
        "ACCELERATE_DYNAMO_BACKEND": None,
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": None,
        "ACCELERATE_CONFIG_DS_FIELDS": None,
        "ACCELERATE_TORCH_DEVICE": "cpu" if on_cpu else None,
        "DS_ACCELERATOR": "cpu" if on_cpu else "cuda",
        # DeepSpeed unpickles its part of a checkpoint with weights_only=False: a file of a store would run code.
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
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
            _tame_deepspeed()
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
    if os.environ["WORLD_SIZE"] == "1" and not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo" if on_cpu else "nccl", store=store, rank=0, world_size=1)


def _tame_deepspeed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed  # (seconds to import, hence only where ZeRO is used)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its op for inference on CPUs: training never calls it, yet it would be compiled here and leave 67 MB a rank in
    # /dev/shm for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.serialization.add_safe_globals(_deepspeed_classes())


def _deepspeed_classes() -> list[Any]:
    """Classes that DeepSpeed puts into its part of a checkpoint; nothing else is unpickled."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


# What ranks do together


def reduce_over_ranks(accelerator: Accelerator, tensor: Tensor, reduction: Literal["sum", "mean"]) -> Tensor:
    """Elementwise over all ranks, equal on each; the tensor itself in a world of one."""
    if accelerator.num_processes == 1:
        return tensor
    reduced = accelerator.reduce(tensor.to(accelerator.device), reduction=reduction)
    assert isinstance(reduced, Tensor)
    return reduced


def from_main(value: Any, accelerator: Accelerator) -> Any:
    """Rank 0's value, on every rank."""
    if accelerator.num_processes == 1:
        return value
    box = [value]
    broadcast_object_list(box)
    return box[0]


def lockstep(batches: Iterator[Item], accelerator: Accelerator) -> Iterator[Item]:
    """`batches`, of which every rank has equally many; where one rank cannot get its next, all raise that error.

    A rank that left alone would let the others wait in their next collective for ever. Raises this rank's own error, or
    TrainingError with the message of the rank that has one.
    """
    if accelerator.num_processes == 1:
        yield from batches
        return
    while True:
        batch, fault = None, None
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            fault = error
        if highest_of_ranks(int(fault is not None)):
            said = gather_object([None if fault is None else f"rank {accelerator.process_index}: {fault}"])
            raise fault or TrainingError(next(text for text in said if text is not None))
        assert batch is not None
        yield batch


def highest_of_ranks(number: int) -> int:
    """The highest number of all ranks, over the host: a device collective would wait for the step just launched."""
    box = torch.tensor([number])
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_host_group())
    return int(box)


@cache
def _host_group() -> dist.ProcessGroup | None:
    if dist.get_backend() == "gloo":
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def load_repartitioned(accelerator: Accelerator, engine: Any, folder: Path) -> None:
    """Load DeepSpeed's state saved in `folder` by another number of ranks. Raises TrainingError.

    Plain and DDP states are whole on every rank; DeepSpeed's partitions go through its universal checkpoint. A run that
    goes on so sees the same batches, and losses that agree within rounding, not bitwise.
    """
    universal = folder.with_name(f".{folder.name}.universal")
    if accelerator.is_main_process:
        shutil.rmtree(universal, ignore_errors=True)
        _convert(folder / ENGINE_TAG, universal / ENGINE_TAG)
    accelerator.wait_for_everyone()
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(universal), ENGINE_TAG)
    finally:
        engine._config.load_universal_checkpoint = False
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(universal, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    """DeepSpeed's own converter, in a process of its own: it is a script."""
    target.mkdir(parents=True, mode=0o700)
    program = (
        "import runpy, torch; from dbscale.training.engine import _deepspeed_classes as safe; "
        "torch.serialization.add_safe_globals(safe()); "
        "runpy.run_module('deepspeed.checkpoint.ds_to_universal', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrainingError(
            f"cannot convert {source} for another number of processes: {last}; resume with the number it was saved "
            "with, or remove it to start afresh"
        )


def repartition(pieces: list[Tensor], like: Tensor, rank: int) -> Tensor:
    """This rank's piece, shaped as `like`, of a flat tensor that was cut into `pieces`, in rank order, zero-padded."""
    flat = torch.cat([piece.reshape(-1) for piece in pieces])
    size = like.numel()
    own = flat[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(own, (0, size - len(own))).view_as(like)
