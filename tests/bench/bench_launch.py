"""How launching scales: plan, submit, status and reduce of a grid of ten thousand cells, with stand-ins for SLURM.

`make bench-launch`, or `python tests/bench/bench_launch.py [--cells 10000]`. Prints a table with the targets; exit code
1 when one is missed. Rows are synthetic: nothing is trained.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

FAKES = Path(__file__).parents[1] / "launch" / "fakes"
TRAINING = {"budget": {"steps": 100}, "optim": {"lr": 1e-3}, "global_batch": 64, "precision": "fp32"}
LIMITS = {"plan": 2.0, "submit": 10.0, "status": 1.0, "status, SLURM silent": 1.0,
          "status, all done": 1.0, "submit again": 10.0, "reduce": 30.0, "sbatch calls": 20}  # fmt: skip


def make_grid(num_cells: int) -> dict[str, Any]:
    """About `num_cells` cells: two arms of three students, five D_p, 24 D_f, as many seeds as it takes."""
    downstream = [10 * (i + 1) for i in range(24)]
    a_seed = 5 * (3 + 2) * (1 + len(downstream))
    model = {"kind": "deit", "head_width": 16, "depth": 2, "patch_size": 8}
    return {
        "name": "big", "question": "How does launching scale?", "image_size": 32,
        "datasets": {"up": {"source": "fractals", "num_train": 100000}, "down": {"source": "digits"}},
        "upstream": {"dataset": "up", "num_samples": [1000, 2000, 4000, 8000, 16000]},
        "downstream": [{"dataset": "down", "num_samples": downstream}],
        "models": {f"h{heads}": {**model, "heads": heads} for heads in (1, 2, 4)},
        "students": ["h1", "h2", "h4"], "teachers": {"h2": "h1", "h4": "h1"},
        "seeds": list(range(round(num_cells / a_seed))),
        "pretrain": TRAINING, "finetune": TRAINING, "distill": {"alpha": 0.5},
    }  # fmt: skip


def load_fakes() -> Any:
    spec = importlib.util.spec_from_file_location("bench_fakes", FAKES / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def workplace(num_cells: int) -> Iterator[tuple[Path, list[str]]]:
    """A folder with the grid, packed (empty) datasets, a cluster and a fake SLURM; and the options naming them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "grid.yaml").write_text(yaml.safe_dump(make_grid(num_cells)))
        cluster = {"executor": "slurm", "target_min": 0.05, "slurm": {"partition": "gpu"}}
        (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
        (folder / "slurm").mkdir()
        os.environ["FAKE_SLURM"] = str(folder / "slurm")
        os.environ["PATH"] = f"{FAKES / 'bin'}{os.pathsep}{os.environ['PATH']}"
        yield (
            folder,
            ["--grid", str(folder / "grid.yaml"), "--store", str(folder / "out"), "--data", str(folder / "data")],
        )


def timed(run: Callable[[], object]) -> float:
    """Wall seconds; what it took of the CPU, children's included, goes to stderr, for machines that are not quiet."""
    started, cpu = time.perf_counter(), sum(os.times()[:4])
    with contextlib.redirect_stdout(io.StringIO()):
        run()
    wall = time.perf_counter() - started
    print(f"  {wall:.2f} s, {sum(os.times()[:4]) - cpu:.2f} s of CPU", file=sys.stderr, flush=True)
    return wall


def typed(words: list[str]) -> None:
    """`dbscale …` as typed, Python's start included."""
    command = [sys.executable, "-m", "dbscale.launch.cli", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=FAKES.parents[2])


def write_rows(fakes: Any, root: Path, grid: Path) -> None:
    """A row for every cell, parents first."""
    from dbscale.study.grid import load_grid
    from dbscale.study.plan import read_plan
    from dbscale.study.store import Store

    store = Store(root)
    plan = read_plan(store, load_grid(grid).name)
    assert plan is not None
    for key in plan.cells:
        store.write_row(fakes.make_row(store, store.read_spec(key)))


def measure(num_cells: int) -> dict[str, float]:
    """Seconds of each step, and counts of calls and files."""
    fakes = load_fakes()
    modules = fakes.modules()
    sys.modules["dbscale.shards.pack"] = modules["dbscale.shards.pack"]
    from dbscale.launch.cli import main

    with workplace(num_cells) as (folder, where):
        slurm = [*where, "--cluster", str(folder / "cluster.yaml")]
        found: dict[str, float] = {}
        for name in ("up", "down"):
            fakes.ensure_packed(name, make_grid(num_cells)["datasets"][name], folder / "data")
        found["plan"] = timed(lambda: typed(["plan", *slurm]))
        found["submit"] = timed(lambda: main(["submit", "--no-smoke", *slurm]))
        calls = (folder / "slurm" / "calls").read_text().splitlines()
        found["sbatch calls"] = sum(call.startswith("sbatch ") for call in calls)
        found["cells"] = len(list((folder / "out" / "cells").iterdir()))
        found["files of SLURM jobs per cell"] = count_files(folder / "out" / "grids") / found["cells"]
        queue_everything(folder)
        found["status"] = timed(lambda: typed(["status", *where]))
        (folder / "slurm" / "silent").touch()
        found["status, SLURM silent"] = timed(lambda: typed(["status", *where]))
        (folder / "slurm" / "silent").unlink()
        found["submit again"] = timed(lambda: main(["submit", "--no-smoke", *slurm]))
        write_rows(fakes, folder / "out", folder / "grid.yaml")
        (folder / "slurm" / "queue").unlink()
        found["status, all done"] = timed(lambda: typed(["status", *where]))
        found["reduce"] = timed(lambda: collect(folder / "out"))
        return found


def collect(root: Path) -> None:
    from dbscale.report.reduce import reduce_grid
    from dbscale.study.store import Store

    reduce_grid(Store(root), "big")


def queue_everything(folder: Path) -> None:
    """Every submitted element waits in the fake queue."""
    from dbscale.launch.slurm.queue import read_records
    from dbscale.study.store import Store

    lines = [
        f"{record.job}|{index}|PENDING"
        for record in read_records(Store(folder / "out"), "big")
        for index in range(max(1, len(record.elements)))
    ]
    (folder / "slurm" / "queue").write_text("\n".join(lines) + "\n")


def count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def report(found: dict[str, float]) -> int:
    missed = 0
    for name, value in found.items():
        limit = LIMITS.get(name)
        verdict = "" if limit is None else "ok" if value <= limit else "MISSED"
        missed += verdict == "MISSED"
        print(f"{name:30} {value:10.2f}  {'' if limit is None else f'target {limit:g}'}  {verdict}")
    return 1 if missed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=10_000)
    sys.exit(report(measure(parser.parse_args().cells)))
