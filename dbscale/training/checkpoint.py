"""Checkpoints that survive a kill at any instant: temp folder, checksummed manifest, rename; the last two are kept.

Model, optimizer and scaler are written by Accelerate (by DeepSpeed's engine under ZeRO); what is ours are the loop's
state, this rank's buffers and EMA pieces, and the guarantee that what loads is whole. Training stands still while the
parts are written; checksums, the wait for the disk and the rename go on beside it. A damaged checkpoint is skipped with
a notice for the one before. Teachers are never in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from dbscale.errors import FileError, StoreError, TrainingError
from dbscale.files import read_json, sync_folder, write_json
from dbscale.training.elastic import load_repartitioned, repartition
from dbscale.training.ema import EMA
from dbscale.training.progress import LossRecord

NUM_KEPT = 2
MANIFEST = "manifest.json"
FORMAT = 4
"""Of what `_seal` writes."""


@dataclass
class LoopState:
    """All of a run that is not in model or optimizer; plain numbers."""

    step: int = 0
    """Optimizer steps done."""
    record: LossRecord = field(default_factory=LossRecord)
    train_time_s: float = 0.0
    data_wait_s: float = 0.0
    checkpoint_time_s: float = 0.0
    """Time that training stood still for checkpoints."""
    energy_j: float | None = None
    bad_ids: list[int] = field(default_factory=list)
    """Undecodable samples met so far by any rank (positions in the split), sorted."""
    stream: dict[str, Any] = field(default_factory=dict)
    """What the batches are a function of besides `step`: `TrainLoader.identity`."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LoopState:
        return cls(**{**data, "record": LossRecord(**data["record"])})


@dataclass(frozen=True)
class Checkpointer:
    """Saves and loads one cell's training state under `folder`; every rank takes part in each call."""

    folder: Path
    cell_id: str
    accelerator: Accelerator
    model: nn.Module
    """The bare student."""
    ema: EMA | None
    engine: str
    """plain, or zero0 … zero3: a checkpoint loads into the same engine, with any number of processes."""
    wrapped: nn.Module
    """The student as the engine wraps it."""
    _sealing: list[Future[None]] = field(default_factory=list)
    """At most one: the last save's, while it is on its way to the disk."""
    _sealer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))

    def save(self, state: LoopState) -> Path:
        """Write `step-<n>`; it counts once `finish` has returned, or the next save. Raises FileError where it or the
        save before cannot be written."""
        final = self.folder / f"step-{state.step:09d}"
        temporary = self.folder / f".{final.name}.tmp"
        self._await_seal()
        if self._is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        with _named_where_full(temporary, final):
            self._write_parts(temporary)
        self.accelerator.wait_for_everyone()
        if self._is_main:
            self._sealing.append(self._sealer.submit(self._seal, temporary, final, asdict(state)))
        return final

    def finish(self) -> None:
        """Return on every rank when the last save is safe on disk. Raises FileError when it is not."""
        self._await_seal()
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave nothing running; a save that failed matters to nobody any more."""
        with contextlib.suppress(FileError):
            self._await_seal()
        self._sealer.shutdown()

    def _await_seal(self) -> None:
        while self._sealing:
            self._sealing.pop().result()

    def load_latest(self) -> LoopState | None:
        """Restore the newest whole checkpoint; None when there is none. Raises TrainingError for another recipe's."""
        chosen: list[Any] = [self._newest_whole() if self._is_main else None]
        broadcast_object_list(chosen)
        if chosen[0] is None:
            return None
        folder, manifest = Path(chosen[0][0]), chosen[0][1]
        self._refuse_foreign(folder, manifest)
        if manifest["world_size"] == self.accelerator.num_processes or not self.engine.startswith("zero"):
            self.accelerator.load_state(str(folder))
        else:
            load_repartitioned(self.accelerator, self.wrapped, folder)
        self._load_own(folder, manifest["world_size"])
        return LoopState.from_json(manifest["state"])

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    @torch.no_grad()
    def _load_own(self, folder: Path, world_size: int) -> None:
        """Buffers and EMA: of this rank, or, when the number of ranks has changed, put together from all."""
        accelerator = self.accelerator
        same = world_size == accelerator.num_processes
        ranks = [accelerator.process_index] if same else range(world_size)
        parts = [torch.load(rank_file(folder, rank), map_location="cpu", weights_only=True) for rank in ranks]
        for name, buffer in self.model.named_buffers():
            buffer.copy_(parts[0]["buffers"][name])
        for position, average in enumerate(self.ema.average if self.ema else []):
            pieces = [part["ema"][position] for part in parts]
            is_cut = not same and self.engine == "zero3"
            average.copy_(repartition(pieces, average, accelerator.process_index) if is_cut else pieces[0])

    def _write_parts(self, folder: Path) -> None:
        _save_accelerator_state(self.accelerator, folder)
        buffers: dict[str, Tensor] = {name: buffer.detach().cpu() for name, buffer in self.model.named_buffers()}
        average = [] if self.ema is None else [piece.cpu() for piece in self.ema.average]
        torch.save({"buffers": buffers, "ema": average}, rank_file(folder, self.accelerator.process_index))

    def _seal(self, temporary: Path, final: Path, state: dict[str, Any]) -> None:
        with _named_where_full(temporary, final):
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            sums = {str(path.relative_to(temporary)): _checksum(path, sync=True) for path in files}
            manifest = {
                "format": FORMAT,
                "cell": self.cell_id,
                "engine": self.engine,
                "world_size": self.accelerator.num_processes,
                "state": state,
                "files": sums,
            }
            write_json(temporary / MANIFEST, manifest)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync_folder(self.folder)
            for old in list_checkpoints(self.folder)[NUM_KEPT:]:
                shutil.rmtree(old, ignore_errors=True)

    def _newest_whole(self) -> tuple[str, dict[str, Any]] | None:
        for folder in list_checkpoints(self.folder):
            damage = find_damage(folder)
            if damage is None:
                return str(folder), read_json(folder / MANIFEST)
            print(f"notice: skipping the damaged checkpoint {folder}: {damage}", file=sys.stderr, flush=True)
        return None

    def _refuse_foreign(self, folder: Path, manifest: dict[str, Any]) -> None:
        if manifest["cell"] != self.cell_id:
            raise TrainingError(
                f"{folder} is a checkpoint of cell {manifest['cell']}, not of {self.cell_id}: another recipe's state "
                "cannot be resumed; remove the folder to start afresh"
            )
        if manifest["engine"] != self.engine:
            raise TrainingError(
                f"{folder} was saved by the engine {manifest['engine']}, this run's is {self.engine}; resume with "
                "the zero_stage it was saved with, or remove the folder to start afresh"
            )


@contextlib.contextmanager
def _named_where_full(temporary: Path, final: Path) -> Iterator[None]:
    """What the disk refuses becomes a FileError that says what to do; no half of a checkpoint is left."""
    try:
        yield
    except (OSError, FileError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        why = error.strerror or error if isinstance(error, OSError) else error
        raise StoreError(
            f"cannot write the checkpoint {final}: {why}; free space, then run again: the checkpoint before is kept"
        ) from error


def rank_file(folder: Path, rank: int) -> Path:
    """What only that rank has."""
    return folder / f"rank-{rank}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished ones, newest first."""
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_json(folder / MANIFEST)
        sums = manifest["files"]
    except (OSError, FileError, KeyError) as error:
        return f"no readable {MANIFEST} ({error})"
    if manifest.get("format") != FORMAT:
        return f"it has format {manifest.get('format', 1)}, this version of dbscale reads {FORMAT}"
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _checksum(path) != expected:
            return f"{name} does not match its checksum"
    return None


def _checksum(path: Path, *, sync: bool = False) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _save_accelerator_state(accelerator: Accelerator, folder: Path) -> None:
    extra = {"save_latest": False} if accelerator.distributed_type == "DEEPSPEED" else {}
    accelerator.save_state(str(folder), **extra)  # type: ignore[arg-type]
