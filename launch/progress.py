"""What a person sees while a local run goes on: one bar over all cells, one line for each running cell.

Reads the store, decides nothing. Without a terminal it prints a line now and then instead of bars.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from dbscale.study.store import Store
from launch.schedule import Task
from launch.status import Running, describe, look_at
from launch.text import duration
from launch.worker import Result

REFRESH_S = 1.0
LINE_INTERVAL_S = 30.0
MAX_CELL_LINES = 8


@dataclass
class Display:
    """Progress over `total` cells of which `done` were finished before; `predicted_s` by key for those to do."""

    store: Store
    total: int
    done: int
    predicted_s: Mapping[str, float]
    workers: int
    interactive: bool = field(default_factory=lambda: bool(sys.stderr.isatty()))
    started: float = field(default_factory=time.monotonic)
    _last: float = 0.0
    _last_line: float = 0.0
    _bar: tqdm | None = None
    _lines: list[tqdm] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A line that stays, above the bars."""
        tqdm.write(text, file=sys.stderr)

    def update(self, tasks: Sequence[Task], results: Mapping[str, Result]) -> None:
        """Called often; looks at the store once a second."""
        now = time.monotonic()
        if now - self._last < REFRESH_S:
            return
        self._last = now
        running, finished = self._look(tasks)
        finished |= {key for key, result in results.items() if result.status == "done"}
        failed = sum(result.status in ("failed", "blocked") for result in results.values())
        self._show(len(finished), failed, running, self._remaining(finished, running, now))

    def close(self) -> None:
        for bar in [*self._lines, *([self._bar] if self._bar else [])]:
            bar.close()

    def _look(self, tasks: Sequence[Task]) -> tuple[list[Running], set[str]]:
        """Cells in progress and cells finished, among those of the running bundles."""
        running: list[Running] = []
        finished: set[str] = set()
        for key in (key for task in tasks for key in task.keys):
            state = self.store.state(key)
            if state == "done":
                finished.add(key)
            elif state == "running":
                running.append(look_at(self.store, key))
        return running, finished

    def _remaining(self, finished: set[str], running: Sequence[Running], now: float) -> float:
        """Seconds to go: what is left, at the speed of this run so far, or as predicted while that says little."""
        total = sum(self.predicted_s.values())
        done = sum(self.predicted_s.get(key, 0) for key in finished)
        done += sum(self.predicted_s.get(cell.key, 0) * cell.share for cell in running)
        speed = done / (now - self.started) if done > 0.03 * total else float(self.workers)
        return (total - done) / speed

    def _show(self, finished: int, failed: int, running: Sequence[Running], remaining_s: float) -> None:
        count = self.done + finished
        note = f"{len(running)} running" + (f", {failed} failed" if failed else "") + f", {duration(remaining_s)} left"
        if self.interactive:
            self._draw(count, note, running)
        elif time.monotonic() - self._last_line > LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            print(f"{count}/{self.total} cells done, {note}", file=sys.stderr, flush=True)

    def _draw(self, count: int, note: str, running: Sequence[Running]) -> None:
        if self._bar is None:
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self._bar = tqdm(total=self.total, desc="cells", bar_format=layout, dynamic_ncols=True)
            shown = min(self.workers, MAX_CELL_LINES)
            self._lines = [
                tqdm(total=100, position=1 + i, bar_format="  {desc}", leave=False, dynamic_ncols=True)
                for i in range(shown)
            ]
        self._bar.n = count
        self._bar.set_postfix_str(note)
        for i, line in enumerate(self._lines):
            line.set_description_str(describe(running[i]) if i < len(running) else "")
