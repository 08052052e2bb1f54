"""Run a plan on this machine, at most `workers` bundles at once.

Decides which bundle starts next and what is left of one whose process died, and shows how far everything is. The driver
stays until all is done; if it dies, its workers notice, save and stop. A worker hears what to do as JSON on its standard
input: ids and paths, in no file that anybody else could write. `dbscale.launch.worker` holds what a bundle does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from dbscale.errors import log_to_stderr
from dbscale.files import ProcessMark
from dbscale.launch import worker
from dbscale.launch.cluster import Cluster, Task
from dbscale.launch.status import Running, describe, look_at
from dbscale.launch.worker import SETTLED, Rank
from dbscale.strict import Strict
from dbscale.study.cell import Key
from dbscale.study.cost import duration
from dbscale.study.resources import Resources, StopRequest, visible_gpus
from dbscale.study.store import CellState, Store

TICK_S, REFRESH_S, LINE_INTERVAL_S = 0.25, 1.0, 30.0
MAX_CELL_LINES = 8
LINGER_S = 30.0
"""Ranks that lost one of theirs wait in a collective, and have this long to notice."""


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
    """What a worker is told: ids and paths."""

    keys: tuple[Key, ...]
    store: str
    data: str
    resources: Resources
    driver: ProcessMark
    log: str
    """Where the worker's output goes."""
    staging: str | None = None

    def run(self) -> None:
        """Run the cells in this process. The store then says what became of them."""
        stop, store, alone = StopRequest(), Store(Path(self.store)), self.resources.num_processes == 1
        with worker.stop_on_signals(stop):
            worker.watch(worker.stop_without(stop, self.driver))
            with worker.staged(self.keys, store, Path(self.data), self.staging, stop) as data_dir:
                worker.run_bundle(
                    self.keys, store, data_dir, self.resources, stop, log=self.log,
                    around=None if alone else worker.end_with_peers, second_turns=alone,
                )  # fmt: skip


@dataclass
class LocalJob:
    """The processes of a bundle, one a rank."""

    processes: list[subprocess.Popen[bytes]]
    log: Path
    """Where the first rank writes."""
    _lost_at: float | None = None

    def done(self) -> bool:
        """Whether all have ended; what is left of a bundle that lost a rank is killed after a while."""
        codes = [process.poll() for process in self.processes]
        if None not in codes:
            return True
        if any(codes):
            self._lost_at = self._lost_at or time.monotonic()
            if time.monotonic() - self._lost_at > LINGER_S:
                for process in self.processes:
                    process.kill()
        return False

    def ask_to_stop(self) -> None:
        for process in self.processes:
            process.terminate()


def start_job(bundle: LocalBundle, log: Path, environment: Mapping[str, str]) -> LocalJob:
    """Start the workers of a bundle with `environment` on top of this process's; the first writes to `log`."""
    count = bundle.resources.num_processes
    port = free_port() if count > 1 else 0
    job = LocalJob([], log)
    for number in range(count):
        path = log if number == 0 else log.with_suffix(f".{number}.log")
        rank = Rank(number, number, count, count).environment(master="127.0.0.1", port=port)
        command = [sys.executable, "-u", "-m", "dbscale.launch.local"]
        told = bundle.model_copy(update={"log": str(path)}).model_dump_json().encode()
        with path.open("xb") as output, _children_ignore_terminal():
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, env={**os.environ, **environment, **rank}
            )
        job.processes.append(process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:  # one that died at once is found to be dead
            process.stdin.write(told)
    return job


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
    job: LocalJob
    slot: int


@dataclass
class LocalRun:
    """The work of one driver: start what is ready, watch it, start again what died."""

    store: Store
    data_dir: Path
    cluster: Cluster
    job_folder: Path
    """A new one for each driver; it holds the workers' logs."""
    stop: StopRequest
    display: Display
    waiting: list[Task]
    parents: Mapping[str, tuple[str, ...]]
    """Parents of every cell that may run, by key."""
    running: list[Started] = field(default_factory=list)
    settled: dict[str, CellState] = field(default_factory=dict)
    num_started: int = 0

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
            started.job.ask_to_stop()

    def _start_ready(self) -> None:
        free = sorted(set(range(self.cluster.num_workers())) - {started.slot for started in self.running})
        while free and not self.stop.requested:
            task = next_ready(self.waiting, [started.task for started in self.running])
            if task is None:
                return
            self.waiting.remove(task)
            self.running.append(Started(task, self._start(task, free[0]), free.pop(0)))

    def _start(self, task: Task, slot: int) -> LocalJob:
        shape = self.cluster.shape(task.stage)
        self.num_started += 1
        log = self.job_folder / f"{self.num_started}.log"
        bundle = LocalBundle(
            keys=task.keys, store=str(self.store.root.absolute()), data=str(self.data_dir.absolute()),
            resources=shape.resources, driver=ProcessMark.of(), log=str(log), staging=shape.slurm.staging,
        )  # fmt: skip
        settings = {**import_environment(), **worker.thread_environment(shape.resources)}
        return start_job(bundle, log, {**settings, **gpu_environment(shape.resources, slot)})

    def _finish(self, started: Started) -> None:
        """Note how the cells of a bundle stand now that its process has ended; start again what it left undone."""
        task, log = started.task, str(started.job.log)
        states: dict[str, CellState] = {key: self.store.state(key) for key in task.keys}
        self.settled.update({key: state for key, state in states.items() if state in SETTLED})
        ours: dict[str, CellState] = {key: state for key, state in states.items() if state != "running"}
        rest = None if self.stop.requested else rest_after_crash(task, ours, self.parents)
        if rest is None:
            return
        cause = worker.cause_of_death(self.store)
        if rest.restarts <= self.cluster.requeue_limit:
            self.display.say(f"a worker died {cause}; its {len(rest.keys)} unfinished cells start again (log {log})")
            self.waiting.insert(0, rest)
            return
        for key in rest.keys:
            worker.record_death(self.store, key, f"its process died {rest.restarts} times {cause}", log)
            self.settled[key] = "failed"


def import_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """A job imports what is installed, never what happens to lie in the working folder, which an empty or relative
    entry of PYTHONPATH means."""
    entries = environ.get("PYTHONPATH", "").split(os.pathsep)
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(os.path.isabs, entries))}


def gpu_environment(resources: Resources, slot: int) -> dict[str, str]:
    """Which GPUs the bundle in this slot sees; with more slots than sets of GPUs, several share a set. Nothing is said
    where there are none to choose from."""
    gpus = visible_gpus()
    if resources.device == "cpu" or not gpus:
        return {}
    chosen = [gpus[(slot * resources.num_processes + i) % len(gpus)] for i in range(resources.num_processes)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(chosen))}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _children_ignore_terminal() -> Iterator[None]:
    """A terminal's Ctrl-C reaches all processes; workers obey it once their handlers are installed, not before."""
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
    log_to_stderr()
    LocalBundle.model_validate_json(sys.stdin.buffer.read()).run()
