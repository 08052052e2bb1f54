"""A cell's life: admitted, attempted, trained, evaluated, written down.  `row.json` comes last, so it means done.

Never raises for a cell's own failure: that is an attempt with a reason, and the next cell goes on. Which cells run
where, and who asks to stop, is launch's.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from dbscale.study.cell import CellSpec
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Failure, Row, Store, failure_of
from dbscale.training.accelerators import keeps_linear, make_batching, open_accelerator, world_size_from_environment
from dbscale.training.attempts import Admission, admit, close_attempt, tell_main, told_to_main
from dbscale.training.checkpoint import list_checkpoints
from dbscale.training.device import reset_peak_memory
from dbscale.training.loop import train
from dbscale.training.prepare import Context, open_cell_dataset, prepare_run
from dbscale.training.progress import NonFiniteLoss
from dbscale.training.results import (
    Trained,
    clear_scratch,
    evaluate_cell,
    finish_training,
    make_row,
    read_trained,
)
from dbscale.training.trackers import open_tracker

Status = Literal["done", "failed", "interrupted", "blocked", "busy"]


@dataclass(frozen=True)
class Outcome:
    """How a try at a cell ended."""

    status: Status
    reason: str | None = None
    row: Row | None = None
    failure: Failure | None = None
    """Of a failed one, the kind."""


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
    is_main = os.environ.get("RANK", "0") == "0"
    world_size = world_size_from_environment()
    with contextlib.ExitStack() as stack:
        admission = (
            stack.enter_context(admit(store, key, num_devices=world_size, job=job, log=log)) if is_main else None
        )
        if world_size == 1 and admission is not None and admission.refusal is not None:
            return Outcome(*admission.refusal)
        with _failures_recorded(store, key, admission, resources, stop) as outcome:
            spec, folder = store.read_spec(key), store.cell_dir(key)
            batching = make_batching(spec.recipe.training.global_batch, world_size, resources.micro_batch)
            accelerator = stack.enter_context(open_accelerator(spec.recipe.training, resources, batching, folder))
            refusal = _from_main(admission.refusal if admission else None, accelerator)
            if refusal is not None:
                return Outcome(*refusal)
            context = Context(store, data_dir, resources, batching, accelerator, stop)
            outcome.value = _train_and_evaluate(spec, context, admission)
        return outcome.value


def _train_and_evaluate(spec: CellSpec, context: Context, admission: Admission | None) -> Outcome:
    store, accelerator = context.store, context.accelerator
    folder = store.cell_dir(spec.key)
    reset_peak_memory(accelerator.device)
    trained = _from_main(read_trained(folder) if accelerator.is_main_process else None, accelerator)
    if trained is None:
        trained = _train(spec, context, admission)
        if trained is None:
            return Outcome("interrupted", context.stop.reason)
    evaluation, eval_time_s = evaluate_cell(spec, trained, context)
    row = None
    if admission is not None:
        row = make_row(spec, trained, evaluation, eval_time_s, context, store.attempts(spec.key))
        store.write_row(row)
        close_attempt(store, admission, "done", None)
        clear_scratch(folder)
    return Outcome("done", None, _from_main(row, accelerator))


def _train(spec: CellSpec, context: Context, admission: Admission | None) -> Trained | None:
    """Train to the end and write the weights; None when asked to stop, with all saved."""
    store, accelerator = context.store, context.accelerator
    with keeps_linear():
        run = prepare_run(spec, open_cell_dataset(spec, context.data_dir, "train"), context)
        if admission is not None:
            admission.resumed_from(run.state.step)
        tracker = open_tracker(accelerator, spec, store.cell_dir(spec.key), context.resources.tracker)
        with contextlib.ExitStack() as parts, tracker:
            for part in (run.loader, run.reporter, run.checkpointer):
                parts.callback(part.close)
            if not train(run):
                if admission is not None:
                    close_attempt(store, admission, "interrupted", context.stop.reason)
                return None
        return _from_main(finish_training(run, spec, store), accelerator)


@dataclass
class _Box:
    value: Outcome


@contextlib.contextmanager
def _failures_recorded(
    store: Store, key: str, admission: Admission | None, resources: Resources, stop: StopRequest
) -> Iterator[_Box]:
    """Turn whatever goes wrong inside into an outcome and an attempt that say why; the log gets the traceback.

    Once a stop was asked for, what goes wrong counts as interrupted: a terminal's Ctrl-C also reaches compilers and
    other children, whose end is then no fault of the cell.
    """
    box = _Box(Outcome("failed", "nothing was run"))
    try:
        yield box
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        reason = _explain(error, resources)
        if isinstance(error, NonFiniteLoss):
            whole = list_checkpoints(store.cell_dir(key) / "checkpoints")
            reason += f"; last good checkpoint: {whole[0] if whole else 'none'}"
        status: Literal["interrupted", "failed"] = "interrupted" if stop.requested else "failed"
        rank, failure = int(os.environ.get("RANK", "0")), _failure_of(error)
        if rank:
            tell_main(store, key, rank, reason, failure)
        elif not isinstance(error, ValueError):
            reason, failure = told_to_main(store, key) or (reason, failure)
        failure = failure if status == "failed" else None
        box.value = Outcome(status, reason, failure=failure)
        if admission is not None:
            close_attempt(store, admission, status, reason, failure)
    except BaseException as error:
        if admission is not None:
            close_attempt(store, admission, "interrupted", type(error).__name__)
        raise


PEER_CODE = ("/torch/distributed/", "/torch/nn/parallel/", "/torch/autograd/graph.py", "/deepspeed/comm/")
WRITER_CODE = ("/torch/serialization.py",)


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


def _explain(error: Exception, resources: Resources) -> str:
    """Why a cell failed, in one line a person can act on."""
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


def _from_main(value: Any, accelerator: Accelerator) -> Any:
    """Rank 0's value, on every rank."""
    if accelerator.num_processes == 1:
        return value
    box = [value]
    broadcast_object_list(box)
    return box[0]
