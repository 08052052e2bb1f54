"""Run a plan on this machine: submitit's local executor, at most `workers` bundles at once.

The driver stays until all is done; if it dies, its workers notice, save and stop.  What a bundle does is `worker`'s.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import submitit
from submitit.core.utils import environment_variables, pickle_load
from submitit.local.local import LocalJob

from dbscale.study.resources import StopRequest
from dbscale.study.store import CellState, Store
from launch.cluster import Cluster
from launch.machine import visible_gpus
from launch.progress import Display
from launch.ranks import thread_environment
from launch.schedule import SETTLED, Task, next_ready, rest_after_crash
from launch.signals import ProcessMark
from launch.worker import LocalBundle, Result, record_death

TICK_S = 0.25
NEVER_MIN = 60 * 24 * 365
"""submitit wants a time limit; a machine of one's own has none."""


@dataclass(frozen=True)
class Started:
    """A bundle in a process of its own."""

    task: Task
    job: LocalJob[tuple[Result, ...]]
    slot: int


@dataclass
class LocalRun:
    """One driver's work: start what is ready, watch, start again what died."""

    store: Store
    data_dir: Path
    cluster: Cluster
    job_folder: Path
    """A new one per driver, for job ids are pids and pids come again."""
    stop: StopRequest
    display: Display
    waiting: list[Task]
    parents: Mapping[str, tuple[str, ...]]
    """Of every cell that may run."""
    running: list[Started] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)

    def run(self) -> dict[str, Result]:
        """What became of each cell that was started. Returns early when asked to stop, after all workers have."""
        asked = False
        while self.running or (self.waiting and not self.stop.requested):
            if self.stop.requested and not asked:
                self._ask_workers_to_stop()
                asked = True
            self._collect()
            self._start_ready()
            self.display.update([started.task for started in self.running], self.results)
            time.sleep(TICK_S)
        return self.results

    def _ask_workers_to_stop(self) -> None:
        self.display.say(f"{self.stop.reason}: workers save their progress and stop (Ctrl-C again kills them)")
        for started in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(started.job.job_id), signal.SIGTERM)

    def _start_ready(self) -> None:
        free = sorted(set(range(self.cluster.num_workers())) - {started.slot for started in self.running})
        while free and not self.stop.requested:
            task = next_ready(self.waiting, [started.task for started in self.running])
            if task is None:
                return
            self.waiting.remove(task)
            self.running.append(Started(task, self._submit(task, free[0]), free.pop(0)))

    def _submit(self, task: Task, slot: int) -> LocalJob[tuple[Result, ...]]:
        shape = self.cluster.shape(task.stage)
        resources = shape.resources
        count = resources.num_processes
        gpus = visible_gpus()[slot * count : (slot + 1) * count] if resources.device != "cpu" else ()
        executor = submitit.LocalExecutor(self.job_folder)
        executor.update_parameters(
            timeout_min=NEVER_MIN, tasks_per_node=count, gpus_per_node=len(gpus), visible_gpus=gpus,
            stderr_to_stdout=True,
        )  # fmt: skip
        bundle = LocalBundle(
            task.keys, str(self.store.root.absolute()), str(self.data_dir.absolute()), resources,
            ProcessMark.of(), free_port() if count > 1 else 0, shape.slurm.staging,
        )  # fmt: skip
        with (
            environment_variables(**import_environment(), **thread_environment(resources)),
            _children_ignore_terminal(),
        ):
            job = executor.submit(bundle)
        assert isinstance(job, LocalJob)
        return job

    def _collect(self) -> None:
        for started in [each for each in self.running if each.job.done()]:
            self.running.remove(started)
            self._finish(started)

    def _finish(self, started: Started) -> None:
        error, found = read_result(started.job)
        self.results.update({result.key: result for result in found})
        log = str(started.job.paths.stdout)
        if error is not None:
            self._give_up(started.task, f"the bundle's process ended with {error}", log)
        elif not self.stop.requested:
            self._start_rest(started.task, log)
        _remove_pickles(started.job)

    def _start_rest(self, task: Task, log: str) -> None:
        """Start again what a dead (or singly stopped) process left undone; cells that run elsewhere are left alone."""
        busy = {key for key in task.keys if key in self.results and self.results[key].status == "busy"}
        states: dict[str, CellState] = {key: self.store.state(key) for key in task.keys if key not in busy}
        settled = {key: self._recorded(key, state) for key, state in states.items() if state in SETTLED}
        self.results = {**settled, **self.results}
        rest = rest_after_crash(task, states, self.parents)
        if rest is None:
            return
        if rest.restarts > self.cluster.requeue_limit:
            self._give_up(rest, f"its process died {rest.restarts} times (out of memory? killed?)", log)
            return
        self.display.say(f"a worker died; its {len(rest.keys)} unfinished cells start again (log {log})")
        self.waiting.insert(0, rest)

    def _recorded(self, key: str, state: CellState) -> Result:
        """The result of a cell whose process ended before it could hand it over."""
        attempt = self.store.last_attempt(key)
        return Result(key, state, attempt.reason if attempt is not None else None)

    def _give_up(self, task: Task, reason: str, log: str) -> None:
        for key in task.keys:
            if self.store.state(key) not in SETTLED:
                record_death(self.store, key, reason, log)
                self.results[key] = Result(key, "failed", reason)


def read_result(job: LocalJob[tuple[Result, ...]]) -> tuple[str | None, tuple[Result, ...]]:
    """(last line of an exception outside any cell, results); neither when the process died without a word."""
    path = job.paths.result_pickle
    if not path.exists():
        return None, ()
    ended, value = pickle_load(path)
    return (None, value) if ended == "success" else (str(value).strip().splitlines()[-1], ())


def import_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """A job imports what is installed, never what happens to lie in the working folder, which an empty or relative
    entry of PYTHONPATH means."""
    entries = environ.get("PYTHONPATH", "").split(os.pathsep)
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(os.path.isabs, entries))}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _remove_pickles(job: LocalJob[tuple[Result, ...]]) -> None:
    for path in [job.paths.submitted_pickle, *job.paths.folder.glob(f"{job.job_id}_*_result.pkl")]:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _children_ignore_terminal() -> Iterator[None]:
    """submitit's controller kills its tasks one second after Ctrl-C; it must not see it. Workers install handlers."""
    signals = (signal.SIGINT, signal.SIGHUP)
    earlier = {each: signal.signal(each, signal.SIG_IGN) for each in signals}
    try:
        yield
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)
