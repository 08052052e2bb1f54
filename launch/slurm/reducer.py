"""The last job of a grid on SLURM, after all arrays, however they ended: hand in again what was lost, reduce, report.

A job can be lost for good: SLURM kills its script and its ranks before either has asked for another start. Whatever has
then neither a row nor a failure to show, waits in no queue and was not cancelled is submitted again from the records of
the grid, or from its plan where a record is damaged, with a new reducer after it; the arrays themselves are
`dbscale.launch.slurm.submit`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dbscale.errors import FileError
from dbscale.files import driver_lock
from dbscale.launch.cluster import WEIGHT, Task
from dbscale.launch.slurm.job import JobIdentity
from dbscale.launch.slurm.queue import Queued, SlurmError, SubmitRecord, read_records
from dbscale.launch.slurm.submit import ReduceWork, Submission, settle_queue
from dbscale.launch.study import standings_of
from dbscale.study.plan import read_plan
from dbscale.study.recipe import Stage
from dbscale.study.store import Standing, Store

MAX_HAND_INS = 3
"""And never more often than a job may be requeued: what is lost again and again needs a person."""


def main(words: Sequence[str]) -> None:
    """`python -m dbscale.launch.slurm.reducer WORK`, with WORK as JSON."""
    from dbscale.report.findings import refresh
    from dbscale.report.page import write_report

    work = ReduceWork.model_validate_json(words[0])
    store = Store(Path(work.store))
    try:
        for made in hand_in_again(store, work, JobIdentity.of_job()):
            what = f"{sum(map(len, made.elements))} cells" if made.kind == "bundles" else "a reducer after them"
            print(f"handed in again: {what}, as job {made.job}", flush=True)
    except (SlurmError, FileError) as error:  # where a job may not submit jobs, say
        print(f"nothing was handed in again: {error}; `dbscale submit` resumes the grid", file=sys.stderr, flush=True)
    refresh(store, work.grid)
    print(write_report(store, work.grid))


def hand_in_again(store: Store, work: ReduceWork, job: JobIdentity) -> list[SubmitRecord]:
    """Submit what the grid has lost, and a reducer that comes after it and after all that still waits or runs.

    Returns the records, none when all is settled. Started again half-way, it finds in the queue what it had submitted.
    Raises SlurmError, and FileError while another command holds the store.
    """
    with driver_lock(store.root, "the reducer job", work.grid):
        is_damaged = any(record.damage is not None for record in read_records(store, work.grid))
        queued = settle_queue(store, work.grid, without=work.uid)  # this very job was to come after everything
        plan = read_plan(store, work.grid)
        keys = plan.cells if plan is not None else ()
        found = standings_of(store, keys, queued.cells)
        is_tried = work.hand_ins < min(MAX_HAND_INS, work.cluster.requeue_limit)
        tasks = lost_tasks(store, queued, found, unrecorded=is_damaged) if is_tried else []
        waiting = [key for key in keys if key in queued.cells]
        if not tasks and (not waiting or queued.will_be_reduced(waiting)):
            return []
        again = Submission(store, work.grid, Path(work.data), work.cluster, queued, after=int(job.raw),
                           hand_ins=work.hand_ins + bool(tasks))  # fmt: skip
        return list(again.run(tasks, keys))


def lost_tasks(store: Store, queued: Queued, found: Mapping[str, Standing], *, unrecorded: bool = False) -> list[Task]:
    """What is left of the newest submission of each cell: not what is done, waits, runs or was cancelled, nor what failed
    or lacks a parent that did. `unrecorded`: also what no record names, as where one was damaged."""
    endings = queued.endings({record.job for record in queued.records if record.job is not None})
    parents = {key: parents_of(store, key) for key, standing in found.items() if standing.state != "done"}

    def is_lost(key: str) -> bool:
        return key in parents and key not in queued.cells and not is_hopeless(key)

    def is_hopeless(key: str) -> bool:
        if key not in parents:
            return False
        return found[key].state == "failed" or any(map(is_hopeless, parents[key]))

    tasks, taken = [], set[str]()
    for record in reversed(queued.records):
        for index, (element, predicted_s) in enumerate(zip(record.elements, record.predicted_s, strict=False)):
            left = tuple(key for key in element if key not in taken and is_lost(key))
            taken.update(element)
            cancelled = endings.get((record.job or 0, index), "").startswith("CANCELLED")
            if left and record.stage is not None and not cancelled:
                before = frozenset(parent for key in left for parent in parents[key]).difference(left)
                tasks.append(Task(left, before, record.stage, record.wave, predicted_s))
    if unrecorded:
        tasks += lineages(store, [key for key in found if key not in taken and is_lost(key)], parents)
    return sorted(tasks, key=lambda task: (task.wave, task.stage == "finetune"))


def lineages(store: Store, keys: Sequence[str], parents: Mapping[str, Sequence[str]]) -> list[Task]:
    """One task for each run among `keys` (parents first) with all that builds on it. Raises FileError."""
    root_of: dict[str, str] = {}
    for key in keys:
        root_of[key] = next((root_of[parent] for parent in parents[key] if parent in root_of), key)
    tasks = []
    for root in dict.fromkeys(root_of.values()):
        together = tuple(key for key in keys if root_of[key] == root)
        stages: list[Stage] = [store.read_spec(key).recipe.stage for key in together]
        before = frozenset(parent for key in together for parent in parents[key]).difference(together)
        stage = max(stages, key=WEIGHT.__getitem__)
        tasks.append(Task(together, before, stage, wave=2 if before else 1, predicted_s=0.0))
    return tasks


def parents_of(store: Store, key: str) -> tuple[str, ...]:
    """Empty also for a cell whose recipe cannot be read; its job then says so."""
    try:
        return tuple(store.read_spec(key).parents)
    except FileError:
        return ()


if __name__ == "__main__":
    main(sys.argv[1:])
