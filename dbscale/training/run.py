"""A cell's life: admitted, attempted, trained, evaluated, written down.  `row.json` comes last, so it means done.

Never raises for a cell's own failure: that is an attempt with a reason, and the next cell goes on. Rank 0 holds the cell's
lock and keeps the record of the attempt; the other ranks leave word where they fail alone. Which cells run where, and who
asks to stop, is launch's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from dbscale import plugins
from dbscale.errors import FileError
from dbscale.files import ProcessMark, locked, read_json, write_json
from dbscale.study.cell import CellSpec
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Attempt, Failure, Row, Store, failure_of
from dbscale.training.checkpoint import list_checkpoints
from dbscale.training.device import reset_peak_memory
from dbscale.training.engine import (
    from_main,
    keeps_linear,
    make_batching,
    open_accelerator,
    with_launch_options,
    world_size_from_environment,
)
from dbscale.training.loop import train
from dbscale.training.prepare import Context, open_cell_dataset, prepare_run
from dbscale.training.progress import NonFiniteLoss, open_tracker, tracker_options
from dbscale.training.results import Trained, clear_scratch, evaluate_cell, finish_training, make_row, read_trained

Status = Literal["done", "failed", "interrupted", "blocked", "busy"]
PACKAGES = ("torch", "timm", "accelerate", "deepspeed", "numpy")
FAULT_NAME = ".fault-{}.json"
"""Where a rank that fails leaves word for rank 0, beside the cell's attempts, until the next attempt."""
PEER_CODE = ("/torch/distributed/", "/torch/nn/parallel/", "/torch/autograd/graph.py", "/deepspeed/comm/")
WRITER_CODE = ("/torch/serialization.py",)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a cell ended."""

    status: Status
    reason: str | None = None
    row: Row | None = None
    failure: Failure | None = None
    """The kind of a failure."""


def run_cell(
    store: Store,
    key: str,
    *,
    data_dir: Path,
    resources: Resources,
    stop: StopRequest,
    job: str | None = None,
    log: str | None = None,
) -> Outcome:
    """Run the cell `key` of `store` to its row, resuming what is there; on several ranks, all of them call it.

    Args:
        store: holds the cell's `recipe.json` and its parents.
        key: the cell's folder name.
        data_dir: packed datasets are in `<data_dir>/shards/<name>`.
        resources: how to run; none of it changes the cell's identity.
        stop: asked to stop, the loop saves a checkpoint at its next step and the cell is `interrupted`.
        job, log: scheduler's job id and path of its log, for the attempt's record.

    Returns:
        done (also if it was before), failed, interrupted, blocked (a parent has no row) or busy (another process
        runs it), with a reason for people.
    """
    world_size = world_size_from_environment()
    with contextlib.ExitStack() as stack:
        admission = stack.enter_context(admit(store, key, num_devices=world_size, job=job, log=log))
        if world_size == 1 and admission.refusal is not None:
            return admission.refusal  # several ranks hear of it from rank 0, once they can talk
        with _failures_recorded(admission, resources, stop) as outcome:
            outcome.value = _live(admission, data_dir, resources, stop, stack)
        return outcome.value


def _live(
    admission: Admission, data_dir: Path, resources: Resources, stop: StopRequest, stack: contextlib.ExitStack
) -> Outcome:
    """From spec to row, on this rank; what `stack` holds is given back after the outcome is on record."""
    store, key = admission.store, admission.key
    spec, folder = store.read_spec(key), store.cell_dir(key)
    plugins.require(spec.recipe.plugins or {})
    training = spec.recipe.training
    batching = make_batching(training.global_batch, world_size_from_environment(), resources.micro_batch)
    resources = with_launch_options(training, resources, batching)
    tracker = tracker_options(resources.tracker, folder)
    accelerator = stack.enter_context(open_accelerator(training, resources, batching, tracker))
    refusal = from_main(admission.refusal, accelerator)
    if refusal is not None:
        return refusal
    context = Context(store, data_dir, resources, batching, accelerator, stop)
    reset_peak_memory(accelerator.device)
    trained = from_main(read_trained(folder) if admission.attempt else None, accelerator)
    trained = trained or _train(spec, context, admission)
    if trained is None:
        return Outcome("interrupted", stop.reason)
    evaluation, eval_time_s = evaluate_cell(spec, trained, context)
    row = None
    if admission.attempt:
        row = make_row(spec, trained, evaluation, eval_time_s, context, store.attempts(key))
        store.write_row(row)
        admission.close("done")
        clear_scratch(folder)
    return Outcome("done", None, from_main(row, accelerator))


def _train(spec: CellSpec, context: Context, admission: Admission) -> Trained | None:
    """Train to the end and write the weights; None when asked to stop, with all saved."""
    store, accelerator = context.store, context.accelerator
    with keeps_linear():
        run = prepare_run(spec, open_cell_dataset(spec, context.data_dir, "train"), context)
        admission.note_resumption(run.state.step)
        tracker = open_tracker(accelerator, spec, store.cell_dir(spec.key), context.resources.tracker)
        with contextlib.ExitStack() as parts, tracker:
            for part in (run.loader, run.reporter, run.checkpointer):
                parts.callback(part.close)
            if not train(run):
                admission.close("interrupted", context.stop.reason)
                return None
        return from_main(finish_training(run, spec, store), accelerator)


@dataclass
class Admission:
    """Leave to run a cell, with the record of the attempt (rank 0's, elsewhere none), or the reason there is no leave."""

    store: Store
    key: str
    refusal: Outcome | None = None
    """The outcome of a cell that is not to be run now."""
    attempt: Attempt | None = None

    def note_resumption(self, step: int) -> None:
        """Write down where the attempt goes on."""
        if step:
            log.info("%s resumes from step %d", self.key, step)
            self._update(resumed_from_step=step)

    def close(self, status: Status, reason: str | None = None, failure: Failure | None = None) -> None:
        """Write down how the attempt ended. A store that cannot be written to is left to `status` to find out."""
        signal = reason if status == "interrupted" and (reason or "").startswith("SIG") else None
        with contextlib.suppress(FileError):
            self._update(status=status, ended=time.time(), reason=reason, signal=signal, failure=failure)

    def _update(self, **fields: object) -> None:
        if self.attempt is not None:
            self.attempt = self.attempt.model_copy(update=fields)
            self.store.write_attempt(self.key, self.attempt)


@contextlib.contextmanager
def admit(store: Store, key: str, *, num_devices: int, job: str | None, log: str | None) -> Iterator[Admission]:
    """On rank 0, hold the cell's lock; inside, an attempt is open unless the cell is done, blocked or someone else's."""
    if _rank():
        yield Admission(store, key)
        return
    if not (store.cell_dir(key) / "recipe.json").exists():
        reason = f"no cell {key!r} in {store.root}; `dbscale plan` lists the cells of a grid"
        yield Admission(store, key, Outcome("failed", reason))
        return
    with locked(store.cell_dir(key) / ".lock") as held:
        row = store.read_row(key)
        if row is not None:
            yield Admission(store, key, Outcome("done", None, row))
        elif not held:
            yield Admission(store, key, Outcome("busy", f"another process runs {key}"))
        else:
            yield _open_attempt(store, key, num_devices=num_devices, job=job, log=log)


def _open_attempt(store: Store, key: str, *, num_devices: int, job: str | None, log: str | None) -> Admission:
    earlier = store.attempts(key)
    if earlier and earlier[-1].status == "running":
        _close_dead(store, key, earlier[-1])
    attempt = Attempt(
        number=earlier[-1].number + 1 if earlier else 1,
        status="running",
        **asdict(ProcessMark.of()),
        started=time.time(),
        job=job,
        log=log,
        versions=_versions(),
        commit=_commit(),
        num_devices=num_devices,
    )
    for path in store.cell_dir(key).glob(FAULT_NAME.format("*")):
        path.unlink(missing_ok=True)
    admission, reason = Admission(store, key, attempt=attempt), _missing_parents(store, key)
    if reason is None:
        store.write_attempt(key, attempt)
    else:
        admission.close("blocked", reason)
        admission.refusal = Outcome("blocked", reason)
    return admission


def _close_dead(store: Store, key: str, attempt: Attempt) -> None:
    """An attempt that was killed could not say when: its last heartbeat does, by whatever clock, but not later than now."""
    progress = store.read_progress(key)
    ended = max(attempt.started, min(progress.updated if progress else 0.0, time.time()))
    store.write_attempt(key, attempt.model_copy(update={"status": "interrupted", "ended": ended, "reason": "killed"}))


def _missing_parents(store: Store, key: str) -> str | None:
    for parent in store.read_spec(key).parents:
        if store.read_row(parent) is not None:
            continue
        last = store.last_attempt(parent)
        if last is None:
            return f"its parent {parent} has not run yet"
        why = f": {last.reason}" if last.status == "failed" and last.reason else ""
        return f"its parent {parent} is {store.state(parent)}{why}"
    return None


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


@cache
def _commit() -> str | None:
    """Git commit of the code that runs; None where it does not run from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


@dataclass
class _Box:
    value: Outcome


@contextlib.contextmanager
def _failures_recorded(admission: Admission, resources: Resources, stop: StopRequest) -> Iterator[_Box]:
    """Turn whatever goes wrong inside into an outcome and an attempt that say why; the log gets the traceback.

    Once a stop was asked for, what goes wrong counts as interrupted: a terminal's Ctrl-C also reaches compilers and
    other children, whose end is then no fault of the cell.
    """
    box = _Box(Outcome("failed", "nothing was run"))
    try:
        yield box
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        reason, failure = explain(error, resources), _failure_of(error)
        if isinstance(error, NonFiniteLoss):
            whole = list_checkpoints(admission.store.cell_dir(admission.key) / "checkpoints")
            reason += f"; last good checkpoint: {whole[0] if whole else 'none'}"
        if _rank():
            _tell_main(admission, reason, failure)
        elif not isinstance(error, ValueError):
            # Cut off in a collective, this rank knows only that a connection was lost.
            reason, failure = _told_to_main(admission) or (reason, failure)
        status: Status = "interrupted" if stop.requested else "failed"
        box.value = Outcome(status, reason, failure=None if stop.requested else failure)
        admission.close(status, reason, box.value.failure)
    except BaseException as error:
        admission.close("interrupted", type(error).__name__)
        raise


def _tell_main(admission: Admission, reason: str, failure: Failure) -> None:
    """Leave word why this rank ends."""
    path = admission.store.cell_dir(admission.key) / FAULT_NAME.format(_rank())
    with contextlib.suppress(FileError):
        write_json(path, {"reason": f"rank {_rank()}: {reason}", "failure": failure})


def _told_to_main(admission: Admission) -> tuple[str, Failure] | None:
    """Why another rank of this attempt ended, if one left word."""
    paths = sorted(admission.store.cell_dir(admission.key).glob(FAULT_NAME.format("*")))
    if not paths:
        return None
    try:
        told = read_json(paths[0])
        return str(told["reason"]), Failure(told["failure"])
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
    ):  # cut off while it was written: this rank's own reason has to do
        return None


def _failure_of(error: Exception) -> Failure:
    """The kind of a failure. Gloo and torch's writer raise plain RuntimeErrors: there the code that raised it tells."""
    if isinstance(error, torch.OutOfMemoryError):
        return Failure.MEMORY
    if isinstance(error, torch.distributed.DistError):
        return Failure.CONNECTION
    if isinstance(error, SafetensorError):
        return Failure.STORAGE
    known = failure_of(error)
    if known is not Failure.CELL or type(error) is not RuntimeError:
        return known
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if any(part in raised_in for part in WRITER_CODE):
        return Failure.STORAGE
    # On one rank nobody can be lost; a bug that every rank meets is tried again until the job's limit, and then named.
    several = world_size_from_environment() > 1
    return Failure.CONNECTION if several and any(part in raised_in for part in PEER_CODE) else Failure.CELL


def explain(error: Exception, resources: Resources) -> str:
    """Why a cell failed, in one line that a person can act on."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        cut = "the whole batch" if resources.micro_batch is None else str(resources.micro_batch)
        return (
            f"out of memory with a micro-batch of {cut}: set resources.micro_batch to half of it or less; the rest of "
            f"the global batch is then accumulated and the result stays the same ({text.splitlines()[0]})"
        )
    if isinstance(error, ValueError):
        return text
    return f"{type(error).__name__}: {text.splitlines()[0]}"
