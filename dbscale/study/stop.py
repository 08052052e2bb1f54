"""A request to save and stop, shared by whoever asks (signal handlers, a watcher) and the training loop that obeys."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass
class StopRequest:
    """Set once, read every step. The one mutable value that crosses wings: a handler may only set a flag."""

    _event: threading.Event = field(default_factory=threading.Event)
    reason: str | None = None

    def ask(self, reason: str) -> None:
        """Ask for a checkpoint and a stop; the first reason stands."""
        self.reason = self.reason or reason
        self._event.set()

    @property
    def requested(self) -> bool:
        return self._event.is_set()
