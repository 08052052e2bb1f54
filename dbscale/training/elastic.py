"""Going on with another number of processes: the loop's state is one integer, the engine's is converted.

Plain and DDP states are whole on every rank. DeepSpeed's partitions go through its universal checkpoint; a resumed run
sees the same batches, and losses that agree within rounding, not bitwise.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dbscale.errors import TrainingError

TAG = "pytorch_model"
"""The folder Accelerate gives DeepSpeed's part of a checkpoint."""


def load_repartitioned(accelerator: Accelerator, engine: Any, folder: Path) -> None:
    """Load DeepSpeed's state saved in `folder` by another number of ranks. Raises TrainingError."""
    universal = folder.with_name(f".{folder.name}.universal")
    if accelerator.is_main_process:
        shutil.rmtree(universal, ignore_errors=True)
        convert(folder / TAG, universal / TAG)
    accelerator.wait_for_everyone()
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(universal), TAG)
    finally:
        engine._config.load_universal_checkpoint = False
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(universal, ignore_errors=True)


def convert(source: Path, target: Path) -> None:
    """DeepSpeed's own converter, in a process of its own: it is a script."""
    target.mkdir(parents=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
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
