"""Both losses beside their eager twins and their peers: `make bench-kernels`, or `python tests/bench/bench_kernels.py`.

Forward and backward are measured together. Prints the machine, the bandwidth of a large copy and one markdown table
per loss: medians, ratios to eager from the same rounds, what is kept for backward and the most held at once. On CUDA
the times are those between events, caches flushed, and floors are the bytes that any implementation must move by the
measured copy; on the CPU they are CPU seconds of one thread. docs/benchmarks/kernels.md holds the figures.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from kernel_bench import attention, logits
from kernel_bench.measure import Measured, Result, Skipped, compare, copy_bandwidth

LOSSES = {"logits": logits, "attention": attention}
PACKAGES = ("torch", "triton", "liger-kernel")
HEADER = "| case | variant | median ms | × eager | × floor | kept MiB | peak MiB | peak × eager |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9, help="turns that every variant takes (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=tuple(LOSSES), default=tuple(LOSSES), help="losses to measure")
    parser.add_argument("--skip", nargs="+", default=(), metavar="VARIANT", help="variants to leave out")
    parser.add_argument(
        "--case", nargs="+", default=("",), help="only the cases whose description contains such a text"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; --device cpu measures the CPU's backends")
    torch.set_num_threads(1)  # on the CPU: its seconds are counted, and cells train on one
    warnings.filterwarnings("ignore", category=UserWarning)  # torch.compile's advice
    device = torch.device(arguments.device)
    bandwidth = copy_bandwidth(device, (1 << 30) if device.type == "cuda" else (256 << 20))
    print(f"{machine(device)}; copy {bandwidth / 1e9:.1f} GB/s read and written.\n\n{HEADER}")
    print("|" + "---|" * HEADER.count("| "))
    for loss in arguments.only:
        for case in LOSSES[loss].CASES[device.type]:
            if not any(text in str(case) for text in arguments.case):
                continue
            torch.manual_seed(0)
            makers = {k: each for k, each in LOSSES[loss].makers(case, device).items() if k not in arguments.skip}
            results = compare(makers, device, arguments.rounds)
            for line in lines(str(case), results, case.floor_bytes / bandwidth):
                print(line, flush=True)


def lines(case: str, results: dict[str, Result], floor_s: float) -> Iterator[str]:
    """Table lines of one case; ratios are to the variant `eager`."""
    eager = results.get("eager")
    for name, result in results.items():
        if isinstance(result, Skipped):
            yield f"| {case} | {name} | skipped: {result} | | | | | |"
            continue
        ratios = ["", ""]
        if isinstance(eager, Measured):
            ratios = [f"{result.times_as_long_as(eager):.3f}", f"{result.peak_bytes / max(eager.peak_bytes, 1):.3f}"]
        figures = [
            f"{result.time_s * 1e3:.3f}{f' ({result.launched})' if result.launched else ''}", ratios[0],
            f"{result.time_s / floor_s:.2f}", f"{result.kept_bytes / 2**20:.2f}", f"{result.peak_bytes / 2**20:.2f}",
            ratios[1],
        ]  # fmt: skip
        yield f"| {case} | {name} | {' | '.join(figures)} |"


def machine(device: torch.device) -> str:
    """Device, threads and versions in one line."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_model()}, 1 thread"
    versions = ", ".join(map(versioned, PACKAGES))
    return f"{name}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {versions}"


def versioned(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def cpu_model() -> str:
    """As Linux names it, else the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    main()
