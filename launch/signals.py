"""Who may ask a job to save and stop: signals, and a watcher for the death of the driver.

A handler sets a flag and nothing else; the training loop obeys at the next step.  Torch-free, because handlers must
stand before the heavy imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import psutil

from dbscale.study.resources import StopRequest

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
POLL_INTERVAL_S = 1.0


@contextlib.contextmanager
def stop_on_signals(stop: StopRequest) -> Iterator[None]:
    """Inside, stop signals ask `stop`; afterwards the earlier handlers are back. Main thread only."""
    earlier = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    install_handlers(stop)
    try:
        yield
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)


def install_handlers(stop: StopRequest) -> None:
    """Every stop signal asks `stop`, a second SIGINT kills; call again after imports that install their own."""
    interrupts = 0

    def ask(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += signum == signal.SIGINT
        stop.ask(signal.Signals(signum).name)
        if interrupts > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    for each in STOP_SIGNALS:
        signal.signal(each, ask)


@dataclass(frozen=True)
class ProcessMark:
    """A process beyond doubt: pids are reused, pid and start time together are not."""

    pid: int
    started: float
    """Unix time."""

    @classmethod
    def of(cls, pid: int | None = None) -> ProcessMark:
        process = psutil.Process(pid)
        return cls(process.pid, process.create_time())

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False


def watch_processes(stop: StopRequest, marks: tuple[ProcessMark, ...], interval_s: float = POLL_INTERVAL_S) -> None:
    """Ask `stop` as soon as one of `marks` is gone: a driver that was killed cannot tell its workers."""

    def watch() -> None:
        while not stop.requested:
            for mark in marks:
                if not mark.alive:
                    stop.ask(f"the process that started this one (pid {mark.pid}) is gone")
            time.sleep(interval_s)

    threading.Thread(target=watch, daemon=True, name="process-watcher").start()
