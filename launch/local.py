"""Run a plan on this machine, at most `workers` bundles at once.

Decides which bundle starts next and what is left of one whose process died, and shows how far everything is. The driver
stays until all is done; if it dies, its workers notice, save and stop. `dbscale.launch.worker` holds what a bundle
does, submitit starts its processes.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

import submitit
from tqdm import tqdm

from dbscale.files import ProcessMark, read_model, write_model
from dbscale.launch import worker
from dbscale.launch.cluster import Cluster, Task, visible_gpus
from dbscale.launch.status import Running, describe, look_at
from dbscale.launch.submitit_names import environment_variables, log_of_job, start_local
from dbscale.launch.worker import SETTLED, Rank
from dbscale.strict import Strict
from dbscale.study.cost import duration
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import CellState, Store

TICK_S, REFRESH_S, LINE_INTERVAL_S = 0.25, 1.0, 30.0
MAX_CELL_LINES = 8
NEVER_MIN = 60 * 24 * 365
"""submitit wants a time limit; a machine of one's own has none."""


def next_ready(waiting: Sequence[Task], running: Collection[Task]) -> Task | None:
    """The first task whose parents no task is still to run; None while all must wait."""
    pending = {key for task in (*waiting, *running) for key in task.keys}
    return next((task for task in waiting if task.parents.isdisjoint(pending)), None)


def rest_after_crash(task: Task, states: Mapping[str, CellState], parents: Mapping[str, Sequence[str]]) -> Task | None:
    """What is left when a bundle's process died; the cell it died in, and what builds on it, come last.

    So a cell that kills its process (out of memory) costs the others of its bundle nothing but time. Restarts are
    counted anew once a start has settled a cell. Cells that `states` leaves out are another process's.
    """
    rest = [key for key in task.keys if key in states and states[key] not in SETTLED]
    last = {key for key in rest if states[key] == "interrupted"}
    for key in rest:
        if last.intersection(parents.get(key, ())):
            last.add(key)
    ordered = [key for key in rest if key not in last] + [key for key in rest if key in last]
    restarts = task.restarts + 1 if len(ordered) == len(task.keys) else 0
    return replace(task, keys=tuple(ordered), restarts=restarts) if ordered else None


class LocalBundle(Strict):
    """What a process on this machine runs, as JSON in the driver's own folder: ids and paths."""

    keys: tuple[str, ...]
    store: str
    data: str
    resources: Resources
    driver: ProcessMark
    port: int
    """Rendezvous port of this job's ranks, chosen by the driver."""
    staging: str | None = None

    def run(self, log: str) -> None:
        """Run the cells. The store then says what became of them."""
        stop, store, alone = StopRequest(), Store(Path(self.store)), self.resources.num_processes == 1
        with worker.stop_on_signals(stop):
            worker.watch(worker.stop_without(stop, self.driver, ProcessMark.of(os.getppid())))
            os.environ.update(Rank.of_job().environment(master="127.0.0.1", port=self.port))
            with worker.staged(self.keys, store, Path(self.data), self.staging, stop) as data_dir:
                worker.run_bundle(
                    self.keys, store, data_dir, self.resources, stop, log=log,
                    around=None if alone else worker.end_with_peers, second_turns=alone,
                )  # fmt: skip


def main(words: Sequence[str]) -> None:
    """`python -m dbscale.launch.local BUNDLE`: what a task that the driver starts runs."""
    path = Path(words[0])
    read_model(LocalBundle, path).run(log_of_job(path.parent))


def run_inline(tasks: Sequence[Task], store: Store, data_dir: Path, cluster: Cluster, stop: StopRequest) -> None:
    """Run a plan in this process, cell after cell; call it inside `stop_on_signals(stop)`."""
    for task in tasks:
        if stop.requested:
            return
        worker.run_bundle(task.keys, store, data_dir, cluster.shape(task.stage).resources, stop)


@dataclass(frozen=True)
class Started:
    """A bundle in a process of its own."""

    task: Task
    job: submitit.Job[None]
    slot: int
    bundle: Path
    """The file that says what it runs."""


@dataclass
class LocalRun:
    """The work of one driver: start what is ready, watch it, start again what died."""

    store: Store
    data_dir: Path
    cluster: Cluster
    job_folder: Path
    """A new one for each driver, because job ids are pids and pids come again."""
    stop: StopRequest
    display: Display
    waiting: list[Task]
    parents: Mapping[str, tuple[str, ...]]
    """Parents of every cell that may run, by key."""
    running: list[Started] = field(default_factory=list)
    settled: dict[str, CellState] = field(default_factory=dict)

    def run(self) -> None:
        """Return when everything has had its turn, or, when asked to stop, once all workers have stopped."""
        asked = False
        while self.running or (self.waiting and not self.stop.requested):
            if self.stop.requested and not asked:
                self._ask_workers_to_stop()
                asked = True
            for started in [each for each in self.running if each.job.done()]:
                self.running.remove(started)
                self._finish(started)
            self._start_ready()
            self.display.update([started.task for started in self.running], self.settled)
            time.sleep(TICK_S)

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
            self.running.append(self._start(task, free.pop(0)))

    def _start(self, task: Task, slot: int) -> Started:
        shape = self.cluster.shape(task.stage)
        resources = shape.resources
        count = resources.num_processes
        gpus = visible_gpus()[slot * count : (slot + 1) * count] if resources.device != "cpu" else ()
        executor = submitit.LocalExecutor(self.job_folder)
        executor.update_parameters(
            timeout_min=NEVER_MIN, tasks_per_node=count, gpus_per_node=len(gpus), visible_gpus=gpus,
            stderr_to_stdout=True,
        )  # fmt: skip
        path = self.job_folder / f"{slot}-{uuid4().hex[:8]}.json"
        write_model(path, LocalBundle(
            keys=task.keys, store=str(self.store.root.absolute()), data=str(self.data_dir.absolute()),
            resources=resources, driver=ProcessMark.of(), port=free_port() if count > 1 else 0,
            staging=shape.slurm.staging,
        ), durable=False)  # fmt: skip
        settings = {**import_environment(), **worker.thread_environment(resources)}
        command = shlex.join([sys.executable, "-u", "-m", "dbscale.launch.local", str(path)])
        with environment_variables(**settings), _children_ignore_terminal():
            return Started(task, start_local(executor, command), slot, path)

    def _finish(self, started: Started) -> None:
        """Note how the cells of a bundle stand now that its process has ended; start again what it left undone."""
        task, log = started.task, str(started.job.paths.stdout)
        started.bundle.unlink(missing_ok=True)
        states: dict[str, CellState] = {key: self.store.state(key) for key in task.keys}
        self.settled.update({key: state for key, state in states.items() if state in SETTLED})
        ours: dict[str, CellState] = {key: state for key, state in states.items() if state != "running"}
        rest = None if self.stop.requested else rest_after_crash(task, ours, self.parents)
        if rest is None:
            return
        if rest.restarts <= self.cluster.requeue_limit:
            self.display.say(f"a worker died; its {len(rest.keys)} unfinished cells start again (log {log})")
            self.waiting.insert(0, rest)
            return
        for key in rest.keys:
            worker.record_death(
                self.store, key, f"its process died {rest.restarts} times (out of memory? killed?)", log
            )
            self.settled[key] = "failed"


def import_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """A job imports what is installed, never what happens to lie in the working folder, which an empty or relative
    entry of PYTHONPATH means."""
    entries = environ.get("PYTHONPATH", "").split(os.pathsep)
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(os.path.isabs, entries))}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


@dataclass
class Display:
    """One bar over all cells and one line for each running one; without a terminal, a line of text now and then.

    `total` cells of which `done` were finished before; `predicted_s` by key for those to do.
    """

    store: Store
    total: int
    done: int
    predicted_s: Mapping[str, float]
    workers: int
    interactive: bool = field(default_factory=lambda: bool(sys.stderr.isatty()))
    started: float = field(default_factory=time.monotonic)
    _last: float = 0.0
    _last_line: float = 0.0
    _bars: list[tqdm] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A line that stays, above the bars."""
        tqdm.write(text, file=sys.stderr)

    def update(self, tasks: Sequence[Task], settled: Mapping[str, CellState]) -> None:
        """Show how far `tasks` are; called often, looks at the store once a second."""
        now = time.monotonic()
        if now - self._last < REFRESH_S:
            return
        self._last = now
        states = {key: self.store.state(key) for task in tasks for key in task.keys}
        running = [look_at(self.store, key) for key, state in states.items() if state == "running"]
        finished = {key for key, state in states.items() if state == "done"}
        finished |= {key for key, state in settled.items() if state == "done"}
        failed = sum(state != "done" for state in settled.values())
        note = f"{len(running)} running" + (f", {failed} failed" if failed else "")
        note += f", {duration(self._remaining(finished, running, now))} left"
        if self.interactive:
            self._draw(self.done + len(finished), note, running)
        elif now - self._last_line > LINE_INTERVAL_S:
            self._last_line = now
            print(f"{self.done + len(finished)}/{self.total} cells done, {note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        for bar in reversed(self._bars):
            bar.close()

    def _remaining(self, finished: set[str], running: Sequence[Running], now: float) -> float:
        """Seconds to go: what is left, at the speed of this run so far, or as predicted while that says little."""
        total = sum(self.predicted_s.values())
        done = sum(self.predicted_s.get(key, 0) for key in finished)
        done += sum(self.predicted_s.get(cell.key, 0) * cell.share for cell in running)
        speed = done / (now - self.started) if done > 0.03 * total else float(self.workers)
        return (total - done) / speed

    def _draw(self, count: int, note: str, running: Sequence[Running]) -> None:
        if not self._bars:
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self._bars = [tqdm(total=self.total, desc="cells", bar_format=layout, dynamic_ncols=True)]
            for i in range(min(self.workers, MAX_CELL_LINES)):
                self._bars.append(tqdm(total=100, position=1 + i, bar_format="  {desc}", leave=False))
        self._bars[0].n = count
        self._bars[0].set_postfix_str(note)
        for i, line in enumerate(self._bars[1:]):
            line.set_description_str(describe(running[i]) if i < len(running) else "")


if __name__ == "__main__":
    main(sys.argv[1:])
