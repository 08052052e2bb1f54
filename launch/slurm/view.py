"""What SLURM holds of a grid, for `status`: one squeue call, and one sacct call only when jobs ended without a word."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dbscale.study.store import Store
from launch.slurm.queue import Asked, Element, SlurmError, parse_queue, queue_command, read_ended
from launch.slurm.records import SubmitRecord, active_cells, active_jobs, jobs_dir, read_all_records, read_records


@dataclass(frozen=True)
class SlurmView:
    """One look at the queue."""

    store: Store
    records: tuple[SubmitRecord, ...]
    queue: tuple[Element, ...]
    wait_s: float
    """How long SLURM has for an answer."""
    error: str | None = None
    """Why SLURM could not be asked; the store alone then has to do."""
    active: Mapping[str, Element] = field(default_factory=dict)
    """Cells that wait or run, with the element that holds them."""

    @property
    def answered(self) -> bool:
        return self.error is None

    @property
    def headline(self) -> str:
        """One line for people."""
        if self.error is not None:
            return f"{self.error}; what follows is from the store alone (--wait gives SLURM longer)"
        running = sum(element.running for element in self.queue)
        jobs = active_jobs(self.records, self.queue)
        if not jobs:
            return "nothing of it waits or runs in SLURM (`dbscale submit` goes on)"
        reducer = [str(job) for job, record in jobs.items() if record.kind == "reduce"]
        text = f"{running} jobs run and {len(self.queue) - running} wait in SLURM"
        return text + (f", the reducer is job {', '.join(reducer)}" if reducer else "")

    def lost(self, keys: Collection[str]) -> dict[str, tuple[str, str]]:
        """Of `keys`, those whose job has ended without running them: (reason, log) in SLURM's words."""
        places = {key: place for record in self.records for key, place in _places(self.store, record) if key in keys}
        if not places or not self.answered:
            return {}
        try:
            arrays = {array for array, _, _ in places.values()}
            ended = {(each.array, each.index): each for each in read_ended(arrays, self.wait_s)}
        except SlurmError:
            ended = {}
        found = {}
        for key, (array, index, log) in places.items():
            end = ended.get((array, index))
            said = f"{end.state}, exit code {end.exit_code}" if end else "nothing about it any more"
            found[key] = (f"its job {array}_{index} is gone without running it; SLURM says {said}", str(log))
        return found


def _places(store: Store, record: SubmitRecord) -> list[tuple[str, tuple[int, int, Path]]]:
    """Where each cell of a record was to run: (array, index, log)."""
    if record.job is None:
        return []
    name = f"{record.job}_{{}}_0_log.out" if len(record.elements) > 1 else f"{record.job}_0_log.out"
    folder = jobs_dir(store, record)
    return [
        (key, (record.job, index, folder / name.format(index)))
        for index, keys in enumerate(record.elements)
        for key in keys
    ]


@dataclass(frozen=True)
class Look:
    """A look at the queue under way: the store is read meanwhile."""

    store: Store
    records: tuple[SubmitRecord, ...]
    asked: Asked | SlurmError

    def view(self, wait_s: float) -> SlurmView:
        """What SLURM says, if it does so within `wait_s`."""
        try:
            if isinstance(self.asked, SlurmError):
                raise self.asked
            everything = parse_queue(self.asked.answer(wait_s))
        except SlurmError as error:
            return SlurmView(self.store, self.records, (), wait_s, str(error))
        jobs = {record.job for record in self.records}
        queue = tuple(element for element in everything if element.array in jobs)
        active = active_cells(read_all_records(self.store), everything)
        return SlurmView(self.store, self.records, queue, wait_s, active=active)

    def drop(self) -> None:
        """Nobody wants to know any more."""
        if isinstance(self.asked, Asked):
            self.asked.drop()


def start_look(store: Store, grid: str) -> Look | None:
    """None for a grid that was never given to SLURM."""
    records = read_records(store, grid)
    if not records:
        return None
    try:
        return Look(store, records, Asked.of(queue_command()))
    except SlurmError as error:
        return Look(store, records, error)
