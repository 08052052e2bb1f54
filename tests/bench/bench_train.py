"""Our loop beside a bare hand-written one and one in timm's manner: same model, batch, precision and device.

    python tests/bench/bench_train.py [--model tiny|deit_h2|deit_h8] [--steps 200] [--rounds 5] [--device cpu|cuda]

Variants take turns, and the ratios are of each variant's best round: on a shared machine a slow round says more about
the neighbours than about the loop. On a CPU, processor time is told beside wall time, for a machine that is never quiet.
Ours reads real shards and augments; the others reuse one synthetic batch.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from train_peers import SETTINGS, Pace, Setting, bare, now, pace, synchronize, timm_manner

from dbscale.data import load_manifest
from dbscale.data.dataset import RESIDENT_MAX_SIDE
from dbscale.shards.pack import ensure_packed
from dbscale.study.cell import Cell
from dbscale.study.recipe import Augment, Budget, Data, Optim, Recipe, Training
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Store, Timing
from dbscale.training import run
from dbscale.training.checkpoint import Checkpointer
from dbscale.training.device import device_name
from dbscale.training.progress import Reporter


@dataclass(frozen=True)
class Ran:
    """What one cell of ours took."""

    step: Pace
    around: Pace
    """The cell, less its training and evaluation."""
    timing: Timing
    """As the cell's row tells it."""


def ours(resources: Resources) -> Callable[[Setting], Pace]:
    """`run_cell` on real shards; what its row says besides the pace is told at once."""

    def measure(setting: Setting) -> Pace:
        ran = run_ours(setting, resources)
        mfu, energy_j = ran.timing.mfu, ran.timing.energy_j
        told = [f"data wait {ran.timing.data_wait_share:.1%}"] + ([] if mfu is None else [f"MFU {mfu:.1%}"])
        told += [] if energy_j is None else [f"{energy_j / setting.steps / setting.batch * 1e3:.1f} mJ an image"]
        print(f"    {', '.join(told)}", file=sys.stderr, flush=True)
        return ran.step

    return measure


def run_ours(setting: Setting, resources: Resources) -> Ran:
    data_dir = Path(tempfile.gettempdir()) / "dbscale-bench-data"
    with tempfile.TemporaryDirectory() as folder:
        store, cell = Store(Path(folder)), make_cell(setting, data_dir)
        store.write_spec(cell.spec())
        with marked_steps(setting) as marks, clocked(run, "train") as train, clocked(run, "evaluate_cell") as evaluate:
            started = now()
            outcome = run.run_cell(store, cell.key, data_dir=data_dir, resources=resources, stop=StopRequest())
            total = pace(started, now(), 1)
    if outcome.row is None:
        raise SystemExit(f"the benchmark's cell failed: {outcome.reason}")
    around = Pace(*(whole - sum(parts) for whole, *parts in zip(total, *train, *evaluate, strict=True)))
    step = pace(*marks, setting.steps - setting.warmup)
    return Ran(step, around, outcome.row.timing)


@contextlib.contextmanager
def clocked(owner: Any, name: str, after: Callable[..., object] = lambda *_: None) -> Iterator[list[Pace]]:
    """Inside, each call of owner.name adds what it took; `after` is called off the clock."""
    original, spans = getattr(owner, name), []

    def timed(*arguments: Any, **keywords: Any) -> Any:
        started = now()
        result = original(*arguments, **keywords)
        spans.append(pace(started, now(), 1))
        after(*arguments)
        return result

    setattr(owner, name, timed)
    try:
        yield spans
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def marked_steps(setting: Setting) -> Iterator[list[Pace]]:
    """The clocks after warm-up and after the last step."""
    original, marks = Reporter.add, []

    def noting(self: Reporter, step: int, losses: Any) -> None:
        original(self, step, losses)
        if step + 1 in (setting.warmup, setting.steps):
            synchronize(setting.device)
            marks.append(now())

    Reporter.add = noting  # type: ignore[method-assign]
    try:
        yield marks
    finally:
        Reporter.add = original  # type: ignore[method-assign]


def make_cell(setting: Setting, data_dir: Path) -> Cell:
    """A pretraining on packed fractals: resident where they are small, else the setting's tier; JPEGs cropped at random."""
    size = setting.image_size
    tier = "resident" if size <= RESIDENT_MAX_SIDE else setting.tier
    name = f"fractals{size}" if tier != "jpeg256" else f"fractals{size}-{tier}"
    spec = {
        "source": "fractals",
        "families": setting.num_classes,
        "num_train": 2048,
        "num_test": 64,
        "image_size": 256 if tier == "jpeg256" else size,
    }
    spec |= {"raw": {"encoding": "raw", "raw_size": size}, "jpeg256": {"encoding": "jpeg256"}}.get(tier, {})
    crop = {"random_resized_crop": (0.08, 1.0)} if tier == "jpeg256" else {"crop_padding": 4}
    dataset = ensure_packed(name, spec, data_dir)
    recipe = Recipe(
        stage="pretrain",
        model=setting.model,
        data=Data(dataset=name, num_samples=2048, image_size=size, tier=tier),
        training=Training(
            budget=Budget(steps=setting.steps),
            optim=Optim(lr=1e-4, clip_norm=1.0),
            global_batch=setting.batch,
            precision=setting.precision,
            augment=Augment(hflip=0.5, **crop),
            label_smoothing=0.1,
        ),
        seed=0,
    )
    return Cell(recipe, load_manifest(dataset).fingerprint)


def variants(setting: Setting) -> dict[str, Callable[[Setting], Pace]]:
    threads = torch.get_num_threads() if setting.device.type == "cpu" else None
    common: dict[str, Any] = {"device": setting.device.type, "threads": threads, "checkpoint_interval_s": 1e9}
    return {
        "bare": bare,
        "timm": timm_manner,
        "ours, plain": ours(Resources(zero_stage=None, **common)),
        "ours, eager": ours(Resources(zero_stage=None, cuda_graph=False, **common)),
        "ours, zero1": ours(Resources(zero_stage=1, **common)),
        "ours, plain, not deterministic": ours(Resources(zero_stage=None, deterministic=False, **common)),
        "ours, plain, compiled": ours(Resources(zero_stage=None, compile=True, **common)),
    }


def main() -> None:
    arguments = _parse()
    warnings.simplefilter("ignore")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, size, batch = SETTINGS[arguments.model]
    setting = Setting(
        model, size, arguments.batch or batch, arguments.precision, torch.device(arguments.device), arguments.steps,
        arguments.warmup, tier=arguments.tier,
    )  # fmt: skip
    known = variants(setting)
    left_out = ("compiled",) if arguments.device == "cuda" else ("compiled", "eager")  # a CPU records nothing
    usual = [name for name in known if not any(part in name for part in left_out)]
    chosen = {name: known[name] for name in (usual if arguments.variants is None else arguments.variants)}
    times: dict[str, list[Pace]] = {name: [] for name in chosen}
    for number in range(arguments.rounds):
        for name, measure in chosen.items():
            times[name].append(measure(setting))
            print(
                f"round {number + 1}: {name} {times[name][-1].wall_s * 1e3:.2f} ms a step", file=sys.stderr, flush=True
            )
    if times:
        print_table(setting, times)
    if not arguments.steps_only:
        print_cell(setting, Resources(zero_stage=None, threads=arguments.threads or None, device=arguments.device))


def print_cell(setting: Setting, how: Resources) -> None:
    """What a cell costs besides its steps: start and end, waits, memory, checkpoints."""
    short = replace(setting, steps=setting.warmup + 3)
    ran = [run_ours(short, how.model_copy(update={"checkpoint_interval_s": 1e9})) for _ in range(4)][1:]
    wall_s, cpu_s = (statistics.median(each) for each in zip(*(each.around for each in ran), strict=True))
    often = how.model_copy(update={"checkpoint_interval_s": 1e-9, "checkpoint_stall_share": 1e9})
    with clocked(Checkpointer, "save", after=lambda saver, *_: saver.finish()) as saves:
        run_ours(short, often)
    stall_s = statistics.median(each.wall_s for each in saves)
    print(
        f"\nAround a further cell of the process (everything but training and evaluation), median of three: {wall_s:.3f} s, "
        f"{cpu_s:.3f} s of processor time; data wait {ran[-1].timing.data_wait_share:.1%}; peak memory "
        f"{ran[-1].timing.peak_memory_bytes / 2**20:,.0f} MiB\n"
        f"A checkpoint stops training for {stall_s * 1e3:.1f} ms (median): {stall_s / 60:.3%} of the time at one a "
        f"minute, {stall_s / 300:.3%} at one every five minutes"
    )


def print_table(setting: Setting, times: dict[str, list[Pace]]) -> None:
    kind = f"{setting.model.heads}×{setting.model.head_width} depth {setting.model.depth}, {setting.image_size} px"
    print(
        f"DeiT {kind}, batch {setting.batch}, {setting.precision}, {device_name(setting.device)}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, tier of ours {setting.tier}\n"
    )
    on_cpu = setting.device.type == "cpu"
    columns = ["loop", "ms a step, best", "median", "images/s", "speed ÷ bare", "speed ÷ timm"]
    columns += ["processor ms, best", "bare ÷", "timm ÷"] if on_cpu else []
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    best = {name: Pace(*map(min, zip(*values, strict=True))) for name, values in times.items()}
    for name, values in times.items():
        own = best[name]
        row = [f"{own.wall_s * 1e3:.2f}", f"{statistics.median(each.wall_s for each in values) * 1e3:.2f}"]
        row += [f"{setting.batch / own.wall_s:,.0f}", *_ratios(best, name, 0)]
        row += [f"{own.cpu_s * 1e3:.2f}", *_ratios(best, name, 1)] if on_cpu else []
        print(f"| {name} | {' | '.join(row)} |")


def _ratios(best: dict[str, Pace], name: str, clock: int) -> list[str]:
    return [f"{best[peer][clock] / best[name][clock]:.3f}" if peer in best else "" for peer in ("bare", "timm")]


def _parse() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SETTINGS, default="deit_h2" if on_gpu else "tiny")
    parser.add_argument("--batch", type=int, help="global batch; default: the model's")
    parser.add_argument("--tier", choices=["raw", "jpeg256"], default="raw", help="how ours reads images above 64 px")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16" if on_gpu else "fp32")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--threads", type=int, default=None if on_gpu else 1)
    parser.add_argument("--warmup", type=int, default=10, help="steps before the clock starts")
    parser.add_argument("--steps-only", action="store_true", help="leave out what a cell costs besides its steps")
    parser.add_argument("--variants", nargs="*", metavar="NAME",
                        help="loops to measure, as the table names them (default: all but the compiled one); "
                        "without a name, only what a cell costs besides its steps")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    main()
