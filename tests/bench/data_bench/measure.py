"""Rates of contenders that take turns, and the rows of the table."""

import time
from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table."""

    what: str
    who: str
    figure: str
    ratio: str = ""
    goal: str = ""


Contender = Callable[[], int]
"""Does some work and returns the number of samples."""


def rates(contenders: dict[str, Contender], rounds: int) -> dict[str, float]:
    """Best samples per CPU second of each contender; they take turns, so that drift hits all alike."""
    best = dict.fromkeys(contenders, 0.0)
    for run in contenders.values():
        run()  # warm caches and allocators
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.process_time()
            count = run()
            best[name] = max(best[name], count / (time.process_time() - start))
    return best


def beside(what: str, found: dict[str, float], base: str, goals: dict[str, str] | None = None) -> list[Row]:
    """A row per contender, each with its ratio to `base`."""
    return [
        Row(what, name, f"{rate:,.0f}/s", f"{rate / found[base]:.2f} × {base}", (goals or {}).get(name, ""))
        for name, rate in found.items()
    ]


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
