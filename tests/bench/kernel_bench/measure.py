"""Time and memory of forward and backward, on CUDA and on the CPU. Knows of no loss.

Variants take turns within a round, and a ratio is the median of the ratios of the rounds, so that a neighbour's burst
hits all of a round alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROUND_S = 0.02
"""A variant is repeated within a round until it has run about so long."""
FLUSH_BYTES = 512 << 20
"""Written between two runs on CUDA: more than any cache holds, and long enough for the host to launch a step ahead."""


class Skipped(Exception):
    """A variant that cannot run here, with the reason."""


@dataclass(frozen=True)
class Step:
    """One variant: forward and backward, and what forward alone leaves for backward."""

    run: Callable[[], object]
    """Forward and backward."""
    forward: Callable[[], object]
    """What backward starts from, with its graph."""
    operands: tuple[Tensor, ...]
    """What there is anyway, not counted as kept."""
    waits: bool = False
    """Whether it waits for the device somewhere, which no CUDA graph can."""


@dataclass(frozen=True)
class Measured:
    """Figures of one variant on one case."""

    times_s: tuple[float, ...]
    """One per round."""
    kept_bytes: int
    """What autograd keeps for backward, beside the operands."""
    peak_bytes: int
    """Most that forward and backward hold at once, beside the operands."""
    launched: str = ""
    """`graph` or `calls` on CUDA."""

    @property
    def time_s(self) -> float:
        return statistics.median(self.times_s)

    def times_as_long_as(self, other: Measured) -> float:
        """Median over the rounds of this time ÷ the other's."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.times_s, other.times_s, strict=True))


Result = Measured | Skipped


def compare(makers: Mapping[str, Callable[[], Step]], device: torch.device, rounds: int) -> dict[str, Result]:
    """Measure the variants in turns; one that raises Skipped keeps its reason."""
    steps, results = {}, dict[str, Result]()
    for name, make in makers.items():
        try:
            steps[name] = make()
        except Skipped as reason:
            results[name] = reason
    timers = {name: _cuda_timer(step) if device.type == "cuda" else _cpu_timer(step) for name, step in steps.items()}
    times = {name: list[float]() for name in steps}
    for _ in range(rounds):
        for name, (timer, _) in timers.items():
            times[name].append(timer())
    for name, step in steps.items():
        results[name] = Measured(
            tuple(times[name]), kept_bytes(step.forward, step.operands), peak_bytes(step.run, device), timers[name][1]
        )
    return {name: results[name] for name in makers}


def _cpu_timer(step: Step) -> tuple[Callable[[], float], str]:
    """CPU seconds of one run: on one thread those of a quiet machine's clock, and a neighbour disturbs them less."""
    step.run()
    started = time.process_time()
    step.run()
    repeats = max(1, round(ROUND_S / (time.process_time() - started)))

    def timer() -> float:
        started = time.process_time()
        for _ in range(repeats):
            step.run()
        return (time.process_time() - started) / repeats

    return timer, ""


def _cuda_timer(step: Step) -> tuple[Callable[[], float], str]:
    """Seconds of one run between two events, caches flushed; as one CUDA graph unless the variant waits."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    run, launched = (step.run, "calls") if step.waits else (_captured(step.run), "graph")

    def timer() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return timer, launched


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def kept_bytes(forward: Callable[[], object], operands: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps for backward, each storage once, those of `operands` not counted."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    del result
    known = {each.untyped_storage().data_ptr() for each in operands}
    return sum(size for pointer, size in storages.items() if pointer not in known)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that `run` holds at once, temporaries included, beside what is there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: list[Any] = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = peak = 0
    for each in sorted(events, key=lambda each: each.start_ns()):
        held += each.nbytes()
        peak = max(peak, held)
    return peak


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes read and written per second by a large copy: what bounds everything that must touch its operands.

    On CUDA the better of the driver's copy and of an elementwise kernel, which is often the faster.
    """
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    ways: list[Callable[[], object]] = [lambda: target.copy_(source)]
    if device.type == "cuda":
        ways.append(lambda: torch.neg(source, out=target))
    steps = [Step(way, lambda: target, (), waits=True) for way in ways]
    timers = [(_cuda_timer(step) if device.type == "cuda" else _cpu_timer(step))[0] for step in steps]
    for timer in timers:
        timer()
    return 2 * num_bytes / min(statistics.median(timer() for _ in range(9)) for timer in timers)
