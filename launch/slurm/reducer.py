"""The last job of a grid: reduce and report whatever finished, and clear away what submitit left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dbscale.study.store import Store
from launch.commands.results import write_results
from launch.slurm.records import jobs_dir, read_records


@dataclass(frozen=True)
class ReduceJob:
    """Runs after all arrays, however they ended."""

    store: str
    grid: str

    def __call__(self) -> str:
        store = Store(Path(self.store))
        page, _ = write_results(store, self.grid)
        clear_pickles(store, self.grid)
        return str(page)

    def checkpoint(self) -> ReduceJob:
        return self


def clear_pickles(store: Store, grid: str) -> None:
    """Per bundle only its log stays: the store says how each cell ended."""
    for record in read_records(store, grid)[:-1]:  # the last is the reducer that is running
        if record.kind == "reduce" or all(settled(store, key) for keys in record.elements for key in keys):
            folder = jobs_dir(store, record)
            for path in [*folder.glob("*.pkl"), *folder.glob("*.fence"), *folder.glob(".submission_file_*")]:
                path.unlink(missing_ok=True)


def settled(store: Store, key: str) -> bool:
    return store.state(key) in ("done", "failed", "blocked")
