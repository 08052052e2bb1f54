"""Who may run a cell, and the record of each try: rank 0's work, and what other ranks tell it.  What happens inside a
try is `run`'s."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from dbscale.errors import FileError
from dbscale.files import ProcessMark, locked, read_json, write_json
from dbscale.study.store import Attempt, Failure, Row, Store

FAULT_NAME = ".fault-{}.json"
"""Of a rank, beside its cell's attempts, for the time of one try."""
PACKAGES = ("torch", "timm", "accelerate", "deepspeed", "numpy")
Ending = Literal["done", "failed", "interrupted", "blocked"]


@dataclass
class Admission:
    """Leave to run a cell, or the reason there is none."""

    key: str
    refusal: tuple[Literal["done", "failed", "blocked", "busy"], str | None, Row | None] | None
    """(status, reason, row) of a cell that is not to be run now."""
    attempt: Attempt | None = None
    store: Store | None = None

    def resumed_from(self, step: int) -> None:
        """Note in the record where this try goes on."""
        if self.store is not None and self.attempt is not None and step:
            self.attempt = self.attempt.model_copy(update={"resumed_from_step": step})
            self.store.write_attempt(self.key, self.attempt)


@contextlib.contextmanager
def admit(store: Store, key: str, *, num_devices: int, job: str | None, log: str | None) -> Iterator[Admission]:
    """Hold the cell's lock; inside, an attempt is open unless the cell is done, blocked or someone else's."""
    if not (store.cell_dir(key) / "recipe.json").exists():
        yield Admission(
            key, ("failed", f"no cell {key!r} in {store.root}; `dbscale plan` lists the cells of a grid", None)
        )
        return
    with locked(store.cell_dir(key) / ".lock") as held:
        row = store.read_row(key)
        if row is not None:
            yield Admission(key, ("done", None, row))
        elif not held:
            yield Admission(key, ("busy", f"another process runs {key}", None))
        else:
            yield _open_attempt(store, key, num_devices=num_devices, job=job, log=log)


def close_attempt(
    store: Store, admission: Admission, status: Ending, reason: str | None, failure: Failure | None = None
) -> None:
    """Write down how the try ended. A store that cannot be written to is left to `status` to find out."""
    if admission.attempt is None:
        return
    signal = reason if status == "interrupted" and (reason or "").startswith("SIG") else None
    update = {"status": status, "ended": time.time(), "reason": reason, "signal": signal, "failure": failure}
    admission.attempt = admission.attempt.model_copy(update=update)
    with contextlib.suppress(FileError):
        store.write_attempt(admission.key, admission.attempt)


def tell_main(store: Store, key: str, rank: int, reason: str, failure: Failure) -> None:
    """Leave word why this rank ends: rank 0, cut off in a collective, would know only that a connection was lost."""
    with contextlib.suppress(FileError):
        write_json(
            store.cell_dir(key) / FAULT_NAME.format(rank), {"reason": f"rank {rank}: {reason}", "failure": failure}
        )


def told_to_main(store: Store, key: str) -> tuple[str, Failure] | None:
    """Why another rank of this try ended, if one left word."""
    paths = sorted(store.cell_dir(key).glob(FAULT_NAME.format("*")))
    if not paths:
        return None
    told = read_json(paths[0])
    return told["reason"], Failure(told["failure"])


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
    admission = Admission(key, None, attempt, store)
    for path in store.cell_dir(key).glob(FAULT_NAME.format("*")):
        path.unlink(missing_ok=True)
    reason = _missing_parents(store, key)
    if reason is not None:
        admission.refusal = ("blocked", reason, None)
        close_attempt(store, admission, "blocked", reason)
    else:
        store.write_attempt(key, attempt)
    return admission


def _close_dead(store: Store, key: str, attempt: Attempt) -> None:
    """A try that was killed could not say when: its last heartbeat does."""
    progress = store.read_progress(key)
    ended = max(attempt.started, progress.updated if progress else 0.0)
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
    """Of the code that runs, where it runs from a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
