"""What a run tells while it trains: metrics.jsonl at fixed steps, a heartbeat file and a bar by the clock, trackers.

Losses stay on the device until a report is due, so that reporting never stalls a step. A non-finite loss is found at
the next report and named by its exact step. All of it is for watching: no result is computed from metrics.jsonl or the
heartbeat. A resumed cell goes on in the run of its tracker (through Accelerate, none by default).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor
from tqdm import tqdm

from dbscale.errors import TrainingError
from dbscale.files import atomic_open, read_bytes, read_json, write_json
from dbscale.study.cell import CellSpec
from dbscale.study.recipe import Recipe
from dbscale.study.store import Progress, Store
from dbscale.training.engine import reduce_over_ranks
from dbscale.training.losses import TERMS, Losses
from dbscale.training.optimizer import learning_rate

HEARTBEAT_INTERVAL_S = 2.0
MIN_REPORT_STEPS, NUM_REPORTS = 10, 200
PROJECT = "dbscale"
RUN_FILE = "tracker.json"
"""Tracker → id of the cell's run there; written once its settings are."""


@dataclass
class LossRecord:
    """Means that a row and a metrics line are made of; plain numbers, saved with each checkpoint."""

    pending: list[list[float | None]] = field(default_factory=list)
    """Losses of the steps since the last metrics line, one list of TERMS per step."""
    tail_sum: float = 0.0
    tail_steps: int = 0
    """Over the last tenth of the run."""

    @property
    def train_loss(self) -> float:
        return self.tail_sum / max(self.tail_steps, 1)


class NonFiniteLoss(TrainingError):
    """The run diverged."""


class Reporter:
    """Collects the losses of one cell; rank 0 writes them."""

    def __init__(
        self, accelerator: Accelerator, recipe: Recipe, store: Store, key: str, record: LossRecord, *, num_done: int = 0
    ) -> None:
        """`num_done` steps are behind the run; `record` is what they left."""
        self._accelerator, self._recipe, self._store, self._key = accelerator, recipe, store, key
        self.record = record
        self._interval = max(MIN_REPORT_STEPS, recipe.num_steps // NUM_REPORTS)
        self._on_device: list[Tensor] = []
        self._terms: tuple[str, ...] = ()
        self._next_heartbeat, self._mark = 0.0, (time.monotonic(), num_done)
        self._images_per_s, self._loss = 0.0, None
        hidden = not accelerator.is_main_process or not sys.stderr.isatty()
        self._bar = tqdm(
            total=recipe.num_steps, initial=num_done, unit="step", dynamic_ncols=True, leave=False, disable=hidden
        )

    def add(self, step: int, losses: Losses) -> None:
        """Take the losses of 0-based `step`, this rank's share of the batch."""
        terms = {name: value for name, value in zip(TERMS, losses, strict=True) if value is not None}
        self._terms = tuple(terms)
        self._on_device.append(torch.stack([value.detach().float() for value in terms.values()]))
        if (step + 1) % self._interval == 0 or step + 1 == self._recipe.num_steps:
            self.flush(step)
            self._write_line(step)
        self._bar.update(step + 1 - self._bar.n)
        self._heartbeat(step + 1)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def flush(self, step: int) -> None:
        """Fetch what is still on the device, averaged over ranks; every rank calls it at the same step.

        Raises NonFiniteLoss.
        """
        if not self._on_device:
            return
        values_ST = reduce_over_ranks(self._accelerator, torch.stack(self._on_device), "mean")
        first = step + 1 - len(self._on_device)
        for offset, row in enumerate(values_ST.tolist()):
            self._take(first + offset, dict(zip(self._terms, row, strict=True)))
        self._on_device.clear()

    def _take(self, step: int, terms: dict[str, float]) -> None:
        loss = terms["loss"]
        if not math.isfinite(loss):
            rate = learning_rate(step, self._recipe)
            raise NonFiniteLoss(
                f"loss is {loss} at step {step + 1} of {self._recipe.num_steps}, learning rate {rate:.3g} "
                f"({', '.join(f'{name} {value:.4g}' for name, value in terms.items())}); lower lr, lengthen the "
                "warm-up, set clip_norm, or train in bf16 or fp32"
            )
        self._loss = loss
        self.record.pending.append([terms.get(name) for name in TERMS])
        if step >= self._recipe.num_steps - max(self._recipe.num_steps // 10, 1):
            self.record.tail_sum += loss
            self.record.tail_steps += 1

    def _write_line(self, step: int) -> None:
        rows, self.record.pending = self.record.pending, []
        now, (then, earlier) = time.monotonic(), self._mark
        self._images_per_s = (step + 1 - earlier) * self._recipe.training.global_batch / max(now - then, 1e-9)
        self._mark = (now, step + 1)
        if not self._accelerator.is_main_process:
            return
        line: dict[str, Any] = {"step": step + 1, "lr": learning_rate(step, self._recipe)}
        for position, name in enumerate(TERMS):
            values = [row[position] for row in rows if row[position] is not None]
            if values:
                line[name] = math.fsum(values) / len(values)  # type: ignore[arg-type]
        line["images_per_s"] = round(self._images_per_s, 1)
        self._accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step + 1)
        self._bar.set_postfix_str(f"loss {self._loss:.3f}, {self._images_per_s:,.0f} img/s", refresh=False)
        with metrics_path(self._store, self._key).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _heartbeat(self, num_done: int) -> None:
        if not self._accelerator.is_main_process or time.monotonic() < self._next_heartbeat:
            return
        self._next_heartbeat = time.monotonic() + HEARTBEAT_INTERVAL_S
        progress = Progress(
            step=num_done,
            num_steps=self._recipe.num_steps,
            loss=self._loss,
            images_per_s=self._images_per_s,
            updated=time.time(),
        )
        self._store.write_progress(self._key, progress)


def metrics_path(store: Store, key: str) -> Path:
    return store.cell_dir(key) / "metrics.jsonl"


def truncate_metrics(store: Store, key: str, num_done: int) -> None:
    """Drop lines of steps that will be trained again, and a last line that was cut off by a kill."""
    path, kept = metrics_path(store, key), []
    try:
        lines = read_bytes(path).splitlines()
    except FileNotFoundError:
        return
    except OSError:  # a pipe, say: what cannot be read is begun anew
        lines = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= num_done:
                kept.append(line + b"\n")
        except (ValueError, LookupError, TypeError, RecursionError):
            break
    # A new file, for the old one may belong to a colleague who ran the cell before.
    with atomic_open(path, durable=False) as file:
        file.writelines(kept)


def tracker_options(tracker: str | None, folder: Path) -> dict[str, Any]:
    """Arguments of `Accelerator`. Raises TrainingError when the tracker's package is not installed."""
    if tracker is None:
        return {}
    if importlib.util.find_spec(tracker) is None:
        raise TrainingError(f"tracker {tracker!r} is not installed: `pip install {tracker}`, or set tracker to null")
    logs = str(folder / "tracker")
    return {"log_with": tracker, "project_config": ProjectConfiguration(project_dir=str(folder), logging_dir=logs)}


@contextlib.contextmanager
def open_tracker(accelerator: Accelerator, spec: CellSpec, folder: Path, tracker: str | None) -> Iterator[None]:
    """Inside, `accelerator.log` reaches the cell's tracker run: a new one, or the one it had before."""
    if tracker is None:
        yield
        return
    path = folder / RUN_FILE
    known = read_json(path) if path.exists() else {}
    known = known if isinstance(known, dict) else {}
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {},
        "wandb": {"id": spec.id, "name": spec.key, "resume": "allow", "dir": str(folder)},
        "mlflow": {"run_id": known.get("mlflow"), "run_name": spec.key},
    }
    # Accelerate hands tensorboard the project as the name of a sub-folder of the cell's own.
    project = "run" if tracker == "tensorboard" else PROJECT
    # Settings are noted once a run: tensorboard would show each resumption as one more run without curves.
    config = None if tracker in known and tracker in options else flatten(spec.recipe.model_dump())
    accelerator.init_trackers(project, config=config, init_kwargs=options)
    if config is not None and accelerator.is_main_process:
        started: Any = accelerator.get_tracker(tracker, unwrap=True)
        write_json(path, known | {tracker: started.info.run_id if tracker == "mlflow" else spec.id})
    try:
        yield
    finally:
        # Not accelerator.end_training(): it would take the process group along, which the next cell needs.
        for each in accelerator.trackers:
            each.finish()


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as `a.b: value`, as trackers want them."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat
