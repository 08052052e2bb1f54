"""Fencing: only the newest start of a job may write.  A process that outlived its node's failure ends itself.

SLURM counts restarts of a job; each start writes its count beside the job's log, and every rank of an older one that
reads a newer count dies at once, without a word to the store.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from dbscale.study.store import atomic_open

POLL_INTERVAL_S = 1.0
SUPERSEDED_EXIT = 81


@dataclass(frozen=True)
class Fence:
    """The token of one start of one bundle."""

    path: Path
    restart: int

    def raise_token(self) -> None:
        """Declare this start the newest; by rank 0, before anything else is written."""
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
            print(
                f"superseded by a later start of this job (restart > {self.restart})",
                file=sys.stderr,
                flush=True,
            )
            os._exit(SUPERSEDED_EXIT)

    def watch(self, interval_s: float = POLL_INTERVAL_S) -> None:
        """Check every few seconds in the background."""

        def watch() -> None:
            while True:
                self.check()
                time.sleep(interval_s)

        threading.Thread(target=watch, daemon=True, name="fence").start()
