"""Experiment trackers through Accelerate, none by default; a resumed cell goes on in its tracker's run.

metrics.jsonl is written always and is what the report reads; a tracker is for watching.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from dbscale.errors import TrainingError
from dbscale.files import read_json, write_json
from dbscale.study.cell import CellSpec

PROJECT = "dbscale"
RUN_FILE = "tracker.json"
"""Tracker → id of the cell's run there; written once its settings are."""


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
    known: dict[str, str] = read_json(path) if path.exists() else {}
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {},
        "wandb": {"id": spec.id, "name": spec.key, "resume": "allow", "dir": str(folder)},
        "mlflow": {"run_id": known.get("mlflow"), "run_name": spec.key},
    }
    # Accelerate hands tensorboard the project as the name of a sub-folder of the cell's own.
    project = "run" if tracker == "tensorboard" else PROJECT
    # Settings are noted once: tensorboard would show each resumption as one more run without curves.
    config = None if tracker in known else flatten(spec.recipe.model_dump())
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
