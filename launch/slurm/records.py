"""Submit records: which cells went to which array, written before and after SLURM is called.

With them and one look at the queue a second `dbscale submit` knows what waits or runs already, even when the first
one died half-way.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal

from dbscale.files import read_json, write_model
from dbscale.strict import Strict, validate
from dbscale.study.recipe import Stage
from dbscale.study.store import Store
from launch.slurm.queue import Element


class SubmitRecord(Strict):
    """`<store>/grids/<name>/submits/<uid>.json`: one array."""

    uid: str
    grid: str
    kind: Literal["bundles", "reduce"]
    wave: int
    stage: Stage | None = None
    created: float
    """Unix time."""
    elements: tuple[tuple[str, ...], ...]
    """Keys of each element's bundle."""
    predicted_s: tuple[float, ...] = ()
    after: tuple[int, ...] = ()
    """Arrays this one waits for, however they end."""
    job: int | None = None
    """SLURM's id of the array; None until sbatch has answered and every element has its work."""

    @property
    def job_name(self) -> str:
        """Unique, so that an array whose id was never learnt can still be found."""
        return f"dbscale-{self.grid}-{self.uid}"


def make_uid() -> str:
    """Sorts by time; unique even among login nodes."""
    return f"{datetime.now():%Y%m%d-%H%M%S-%f}-{secrets.token_hex(2)}"


def records_dir(store: Store, grid: str) -> Path:
    return store.grid_dir(grid) / "submits"


def jobs_dir(store: Store, record: SubmitRecord) -> Path:
    """Where submitit keeps this array's pickles and logs."""
    return store.grid_dir(record.grid).absolute() / "jobs" / record.uid


def write_record(store: Store, record: SubmitRecord) -> None:
    write_model(records_dir(store, record.grid) / f"{record.uid}.json", record)


def read_records(store: Store, grid: str) -> tuple[SubmitRecord, ...]:
    """All arrays of the grid, oldest first."""
    folder = records_dir(store, grid)
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return tuple(validate(SubmitRecord, read_json(path), where=str(path)) for path in paths)


def read_all_records(store: Store) -> tuple[SubmitRecord, ...]:
    """Those of every grid of the store: grids share cells, and a cell that one has queued is queued for all."""
    folders = sorted(store.root.glob("grids/*/submits"))
    return tuple(record for folder in folders for record in read_records(store, folder.parent.name))


def forget(store: Store, record: SubmitRecord) -> None:
    (records_dir(store, record.grid) / f"{record.uid}.json").unlink(missing_ok=True)


def active_cells(records: Iterable[SubmitRecord], queue: Collection[Element]) -> dict[str, Element]:
    """Each cell that waits or runs in SLURM, with the element that holds it."""
    by_place: Mapping[tuple[int, int], Element] = {(element.array, element.index): element for element in queue}
    active = {}
    for record in records:
        for index, keys in enumerate(record.elements):
            element = by_place.get((record.job or -1, index))
            if element is not None:
                active.update(dict.fromkeys(keys, element))
    return active


def active_jobs(records: Iterable[SubmitRecord], queue: Collection[Element]) -> dict[int, SubmitRecord]:
    """Arrays (and reducers) of which anything waits or runs, by SLURM's id."""
    present = {element.array for element in queue}
    return {record.job: record for record in records if record.job is not None and record.job in present}
