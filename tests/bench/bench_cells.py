"""Many small cells on one GPU: timm's loop and ours one cell after another, then ours side by side.

    python tests/bench/bench_cells.py [--model cifar_h3 …] [--side-by-side 4 8 16] [--mps]

Images a second while all cells train; a cell is a process of its own, as `cells_per_device` starts them. Ours reads real
shards, augments and logs; timm's reuses one synthetic batch that lies on the device. With --mps the processes share the
device through NVIDIA's daemon, where it is installed, instead of taking turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from bench_train import make_cell
from train_peers import Setting, bare, timm_manner

from dbscale.study.recipe import DeiT
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Store
from dbscale.training import run
from dbscale.training.progress import Reporter

DATA = Path(tempfile.gettempdir()) / "dbscale-bench-data"
WARMUP, MARK_EVERY = 100, 50
MODELS: dict[str, tuple[DeiT, int, int, str]] = {
    "cifar_h1": (DeiT(heads=1, head_width=16, depth=4, patch_size=8), 32, 64, "fp32"),
    "cifar_h3": (DeiT(heads=3, head_width=16, depth=4, patch_size=8), 32, 64, "fp32"),
    "boundary_h6": (DeiT(heads=6, head_width=8, depth=2, patch_size=16), 32, 128, "fp32"),
    "deit_h2_64px": (DeiT(heads=2, depth=12, patch_size=8), 64, 256, "bf16"),
    "deit_h8_64px": (DeiT(heads=8, depth=12, patch_size=8), 64, 256, "bf16"),
}
"""Students of the CIFAR-10 grids as they are there, and two of the paper's family at 64 px: model, px, batch, precision."""


def setting_of(name: str, steps: int) -> Setting:
    model, size, batch, precision = MODELS[name]
    return Setting(model, size, batch, precision, torch.device("cuda"), steps, WARMUP)  # type: ignore[arg-type]


def main() -> None:
    arguments = _parse()
    warnings.simplefilter("ignore")
    if arguments.cell:
        print(json.dumps(train_one(arguments.cell, arguments.seconds, graph=True)))
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {os.cpu_count()} cores\n")
    print("| model | cells at once | loop | images/s of all | × timm |\n|---|---|---|---|---|", flush=True)
    for name in arguments.model:
        measure(name, arguments.side_by_side, arguments.seconds, mps=arguments.mps)


def measure(name: str, side_by_side: list[int], seconds: float, *, mps: bool) -> None:
    """Print the lines of one model."""
    setting, batch = setting_of(name, 600), MODELS[name][2]
    make_cell(setting, DATA)  # packed once, before the cells ask
    timm = batch / timm_manner(setting).wall_s

    def tell(count: int, loop: str, rate: float) -> None:
        print(f"| {name} | {count} | {loop} | {rate:,.0f} | {rate / timm:.2f} |", flush=True)

    tell(1, "timm", timm)
    tell(1, "bare", batch / bare(setting).wall_s)
    for loop, graph in (("ours, eager", False), ("ours, recorded", True)):
        marks = train_one(name, seconds, graph=graph)
        tell(1, loop, rate_within(marks, marks[0][0], marks[-1][0]) * batch)
    for count in side_by_side:
        tell(count, "ours, recorded", together(name, count, seconds))
    if mps:
        with shared_by_daemon():
            for count in side_by_side:
                tell(count, "ours, recorded, MPS", together(name, count, seconds))


def together(name: str, count: int, seconds: float) -> float:
    """Images a second of `count` cells, each in its process, in the time that all of them train."""
    command = [sys.executable, __file__, "--cell", name, "--seconds", str(seconds + count / 2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    marks = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    start, end = max(each[0][0] for each in marks), min(each[-1][0] for each in marks)
    if start >= end:
        raise SystemExit(f"{count} cells of {name} did not overlap; give more --seconds")
    return sum(rate_within(each, start, end) for each in marks) * MODELS[name][2]


def rate_within(marks: list[tuple[float, int]], start: float, end: float) -> float:
    """Steps a second between two times, from (time, steps done)."""
    inside = [mark for mark in marks if start <= mark[0] <= end]
    (first, begun), (last, done) = inside[0], inside[-1]
    return (done - begun) / (last - first) if last > first else 0.0


def train_one(name: str, seconds: float, *, graph: bool) -> list[tuple[float, int]]:
    """Train one cell for a while: (time, steps done), every so many steps."""
    setting, stop, marks = setting_of(name, 100_000), StopRequest(), list[tuple[float, int]]()
    original = Reporter.add

    def noting(self: Reporter, step: int, losses: object) -> None:
        original(self, step, losses)  # type: ignore[arg-type]
        if step >= WARMUP and step % MARK_EVERY == 0:
            marks.append((time.time(), step))
            if marks[-1][0] - marks[0][0] > seconds:
                stop.ask("measured")

    Reporter.add = noting  # type: ignore[method-assign]
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        store, cell = Store(Path(folder)), make_cell(setting, DATA)
        store.write_spec(cell.spec())
        how = Resources(zero_stage=None, device="cuda", checkpoint_interval_s=1e9, cuda_graph=graph)
        outcome = run.run_cell(store, cell.key, data_dir=DATA, resources=how, stop=stop)
    Reporter.add = original  # type: ignore[method-assign]
    if outcome.status != "interrupted":
        raise SystemExit(f"the benchmark's cell {outcome.status}: {outcome.reason}")
    print(f"{name}: {marks[0][0] - started:.1f} s before step {WARMUP}", file=sys.stderr)
    return marks


@contextlib.contextmanager
def shared_by_daemon() -> Iterator[None]:
    """Inside, processes share the device through NVIDIA's multi-process service."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        raise SystemExit("nvidia-cuda-mps-control is not installed: leave --mps out")
    with tempfile.TemporaryDirectory() as folder:
        names = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        os.environ.update(names)
        subprocess.run([control, "-d"], check=True)
        try:
            yield
        finally:
            subprocess.run([control], input="quit\n", text=True, check=False)
            for each in names:
                os.environ.pop(each)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--side-by-side", nargs="*", type=int, default=[4, 8], help="cells at once (default: 4 8)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time that each cell trains")
    parser.add_argument("--mps", action="store_true", help="also through NVIDIA's daemon")
    parser.add_argument("--cell", choices=MODELS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
