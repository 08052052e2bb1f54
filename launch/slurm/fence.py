"""Fencing: only the newest start of a job, and the newest job at a cell, may write.

SLURM counts restarts of a job; each start writes its count beside the job's log, and every rank of an older one that
reads a newer count dies at once, without a word to the store. A process that outlived its node's failure may belong to
a job that was given up altogether, and its cell be in another job's hands: attempts, numbered and signed with their
job, tell.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dbscale.files import atomic_open
from dbscale.study.store import Store

POLL_INTERVAL_S = 1.0
SUPERSEDED_EXIT = 81


@dataclass(frozen=True)
class Fence:
    """The token of one start of one bundle."""

    path: Path
    restart: int

    def raise_token(self) -> None:
        """Declare this start the newest; by rank 0, before anything else is written. A process that was frozen until
        a later start had done so ends instead."""
        self.check()
        with atomic_open(self.path, "w") as file:
            file.write(f"{self.restart}\n")

    def superseded(self) -> bool:
        """Whether a later start has declared itself; an unreadable token says nothing."""
        with contextlib.suppress(OSError, ValueError):
            return int(self.path.read_text()) > self.restart
        return False

    def check(self) -> None:
        """End this process, without flushing anything, if it is not the newest."""
        if self.superseded():
            end(f"superseded by a later start of this job (restart > {self.restart})")


@dataclass
class Claim:
    """A job's claim on the cell it works at; `job` as attempts are signed."""

    store: Store
    job: str
    key: str | None = None
    """The cell; None between cells."""

    def lost(self) -> bool:
        """Whether somebody else opened an attempt after this job's; what cannot be read says nothing."""
        if self.key is None:
            return False
        with contextlib.suppress(OSError, ValueError):
            last = self.store.last_attempt(self.key)
            if last is not None and last.job != self.job:  # before this job's own attempt is there, it is an older one
                return self.job in [each.job for each in self.store.attempts(self.key)]
        return False

    def check(self) -> None:
        """End this process, without flushing anything, if its cell is another job's by now."""
        if self.lost():
            end(f"cell {self.key} is in the hands of another job by now")


def watch(*checks: Callable[[], None], interval_s: float = POLL_INTERVAL_S) -> None:
    """Call `checks` every few seconds in the background."""

    def loop() -> None:
        while True:
            for check in checks:
                check()
            time.sleep(interval_s)

    threading.Thread(target=loop, daemon=True, name="fence").start()


def end(reason: str) -> None:
    """At once: no handler runs, no buffer reaches the store."""
    print(reason, file=sys.stderr, flush=True)
    os._exit(SUPERSEDED_EXIT)
