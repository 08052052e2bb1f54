"""Checkpoints that survive a kill at any instant: temp folder, checksummed manifest, rename; the last two are kept.

Model, optimizer and scaler are written by Accelerate (by DeepSpeed's engine under ZeRO); what is ours are the loop's
state, this rank's pieces of the moving average, and the guarantee that what loads is whole and runs no code. Training
stands still while the parts are written; checksums, the wait for the disk and the rename go on beside it. A damaged
checkpoint is skipped with a warning for the one before. Teachers are never in it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import xxhash
from accelerate import Accelerator
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import nn

from dbscale.errors import FileError, StoreError, TrainingError
from dbscale.files import read_bytes, read_json, sync_folder, unsealed, write_json
from dbscale.training.engine import from_main, load_repartitioned, repartition
from dbscale.training.optimizer import EMA
from dbscale.training.progress import LossRecord

NUM_KEPT = 2
MANIFEST = "manifest.json"
FORMAT = 6
"""Version of what a `Checkpointer` writes; any other is skipped with a warning."""
OWN_FOLDER = 0o700
"""Checkpoints are read again by whoever runs the cell and by nobody else; a folder that is opened by hand stays open."""
Content = TypeVar("Content")
log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is, and what it holds."""

    format: int
    cell: str
    engine: str
    world_size: int
    state: LoopState
    files: dict[str, str]
    """Checksum of each, by its path in the checkpoint."""


@dataclass(frozen=True)
class Checkpointer:
    """Saves and loads one cell's training state under `folder`; every rank takes part in each call."""

    folder: Path
    cell_id: str
    accelerator: Accelerator
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
        log.debug("writing %s", final)
        temporary = self.folder / f".{final.name}.tmp"
        self._await_seal()
        with _named_where_full(temporary, final):
            if self._is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                self.folder.mkdir(mode=OWN_FOLDER, parents=True, exist_ok=True)
                temporary.mkdir(mode=OWN_FOLDER)
            self.accelerator.wait_for_everyone()
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
        found = from_main(newest_whole(self.folder) if self._is_main else None, self.accelerator)
        if found is None:
            return None
        folder, manifest = found
        self._refuse_foreign(folder, manifest)
        if manifest.world_size == self.accelerator.num_processes or not self.engine.startswith("zero"):
            self.accelerator.load_state(str(folder))
        else:
            load_repartitioned(self.accelerator, self.wrapped, folder)
        self._load_average(folder, manifest.world_size)
        return manifest.state

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    @torch.no_grad()
    def _load_average(self, folder: Path, world_size: int) -> None:
        """This rank's pieces, or, when the number of ranks has changed, put together from all."""
        if self.ema is None:
            return
        own, same = self.accelerator.process_index, world_size == self.accelerator.num_processes
        is_cut = not same and self.engine == "zero3"
        ranks = range(world_size) if is_cut else [own if same else 0]
        parts = [safetensors.torch.load_file(rank_file(folder, rank)) for rank in ranks]
        for position, average in enumerate(self.ema.average):
            pieces = [part[str(position)] for part in parts]
            average.copy_(repartition(pieces, average, own) if is_cut else pieces[0])

    def _write_parts(self, folder: Path) -> None:
        _save_accelerator_state(self.accelerator, folder)
        average = [] if self.ema is None else self.ema.average
        pieces = {str(position): piece.cpu().contiguous() for position, piece in enumerate(average)}
        safetensors.torch.save_file(pieces, rank_file(folder, self.accelerator.process_index))
        if self._is_main:
            for script in folder.glob("*.py"):  # DeepSpeed leaves its converter beside the weights: data holds no code
                script.unlink()

    def _seal(self, temporary: Path, final: Path, state: dict[str, Any]) -> None:
        with _named_where_full(temporary, final):
            sums = {name: _checksum(temporary / name, sync=True) for name in _files_in(temporary)}
            for path in temporary.rglob("*"):
                if path.is_dir():
                    sync_folder(path)
            manifest = {
                "format": FORMAT,
                "cell": self.cell_id,
                "engine": self.engine,
                "world_size": self.accelerator.num_processes,
                "state": state,
                "files": sums,
            }
            write_sealed(temporary / MANIFEST, manifest)  # synced, and the folder with it
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync_folder(self.folder)
            for old in list_checkpoints(self.folder)[NUM_KEPT:]:
                shutil.rmtree(old, ignore_errors=True)

    def _refuse_foreign(self, folder: Path, manifest: Manifest) -> None:
        if manifest.cell != self.cell_id:
            raise TrainingError(
                f"{folder} is a checkpoint of cell {manifest.cell}, not of {self.cell_id}: another recipe's state "
                "cannot be resumed; remove the folder to start afresh"
            )
        if manifest.engine != self.engine:
            raise TrainingError(
                f"{folder} was saved by the engine {manifest.engine}, this run's is {self.engine}; resume with "
                "the zero_stage it was saved with, or remove the folder to start afresh"
            )


@contextlib.contextmanager
def _named_where_full(temporary: Path, final: Path) -> Iterator[None]:
    """What the disk refuses becomes a FileError that says what to do; no half of a checkpoint is left."""
    try:
        yield
    except (OSError, FileError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        why = error.strerror or error if isinstance(error, OSError) else error
        raise StoreError(
            f"cannot write the checkpoint {final}: {why}; free space, then run again: the checkpoint before is kept"
        ) from error


def rank_file(folder: Path, rank: int) -> Path:
    """The part of a checkpoint that only this rank has."""
    return folder / f"rank-{rank}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished ones, newest first."""
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def newest_whole(folder: Path) -> tuple[Path, Manifest] | None:
    """The newest undamaged checkpoint under `folder`; what is skipped on the way is logged as a warning.

    Raises StoreError where the folder is another user's: to begin anew would lose what is in it.
    """
    if folder.is_dir() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        status = folder.stat()
        raise StoreError(
            f"{folder} belongs to user {status.st_uid} (mode {status.st_mode & 0o777:o}) and holds the checkpoints of an "
            "unfinished run: let that user go on with it, or open the folder to you (chmod -R g+rwX), or move it away"
        )
    for each in list_checkpoints(folder):
        try:
            return each, read_manifest(each)
        except (OSError, FileError) as error:
            log.warning("skipping the damaged checkpoint %s: %s", each, error)
    return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a whole checkpoint. Raises FileError saying what is wrong with it, OSError where it is missing."""
    raw: Any = read_json(folder / MANIFEST)
    if isinstance(raw, dict) and raw.get("format") != FORMAT:
        raise FileError(f"it has format {raw.get('format')}, this version of dbscale reads {FORMAT}")
    manifest = read_sealed(folder / MANIFEST, Manifest)
    present = set(_files_in(folder))
    ranks = {rank_file(folder, rank).name for rank in range(manifest.world_size)}
    for name in sorted(ranks | present | set(manifest.files)):
        if name not in manifest.files:
            raise FileError(f"{name} is not in the manifest")
        if name not in present:
            raise FileError(f"{name} is missing")
        if _checksum(folder / name) != manifest.files[name]:
            raise FileError(f"{name} does not match its checksum")
    return manifest


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """JSON with a checksum of its own, for what nothing else vouches for. Raises FileError."""
    write_json(path, content, seal=True)


def read_sealed(path: Path, kind: type[Content]) -> Content:
    """What `write_sealed` wrote, as the dataclass `kind`. Raises FileError where it is damaged, OSError if missing."""
    content, has_seal = unsealed(read_bytes(path), path)
    if not has_seal:
        raise FileError(f"{path} is damaged (it has no checksum of its own)")
    try:
        return TypeAdapter(kind).validate_json(content, strict=True)
    except ValidationError as error:
        raise FileError(f"{path} is damaged: {error.errors()[0]['loc']} {error.errors()[0]['msg']}") from None


def _files_in(folder: Path) -> list[str]:
    """All but the manifest, by their path in the folder."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if str(path) != MANIFEST)


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
