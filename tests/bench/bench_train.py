"""Our loop beside a bare hand-written one and one in timm's manner: same model, batch, precision and device.

    python tests/bench/bench_train.py [--model tiny|deit_h2|deit_h8] [--steps 200] [--rounds 5] [--device cpu|cuda]

Variants take turns, and the ratios are of each variant's best round: on a shared machine a slow round says more about
the neighbours than about the loop. Ours reads real shards and augments; the others reuse one synthetic batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.metrics import AverageMeter
from torch import nn
from torch.nn.functional import cross_entropy

from dbscale.data import load_manifest
from dbscale.study.cell import Cell
from dbscale.study.recipe import Augment, Budget, Data, DeiT, Optim, Precision, Recipe, Training
from dbscale.study.resources import Resources
from dbscale.study.stop import StopRequest
from dbscale.study.store import Store
from dbscale.training.checkpoint import Checkpointer, LoopState
from dbscale.training.device import device_name
from dbscale.training.models import make_model
from dbscale.training.progress import Reporter
from dbscale.training.run import run_cell
from shards.pack import ensure_packed


@dataclass(frozen=True)
class Setting:
    """What all variants share."""

    model: DeiT
    image_size: int
    batch: int
    precision: Precision
    device: torch.device
    steps: int
    warmup: int = 10
    """Steps before the clock starts."""
    num_classes: int = 16


SETTINGS = {
    "tiny": (DeiT(heads=4, head_width=16, depth=4, patch_size=8), 32, 128),
    "deit_h2": (DeiT(heads=2), 224, 256),
    "deit_h8": (DeiT(heads=8), 224, 256),
}


def timed(step: Callable[[int], object], setting: Setting) -> float:
    """Seconds a step, after warm-up."""
    for number in range(setting.warmup):
        step(number)
    synchronize(setting.device)
    started = time.perf_counter()
    for number in range(setting.warmup, setting.steps):
        step(number)
    synchronize(setting.device)
    return (time.perf_counter() - started) / (setting.steps - setting.warmup)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fresh(setting: Setting) -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.autocast]:
    model = make_model(setting.model, num_classes=setting.num_classes, image_size=setting.image_size)
    images = torch.randn(setting.batch, 3, setting.image_size, setting.image_size, device=setting.device)
    labels = torch.randint(0, setting.num_classes, (setting.batch,), device=setting.device)
    autocast = torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.precision == "bf16")
    return model.to(setting.device).train(), images, labels, autocast


def bare(setting: Setting) -> float:
    """The shortest loop that trains: synthetic batch, forward, backward, clip, step."""
    model, images, labels, autocast = fresh(setting)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(_: int) -> None:
        with autocast:
            logits = model(images)
        cross_entropy(logits.float(), labels, label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, setting)


def timm_manner(setting: Setting) -> float:
    """The inner loop of timm's train.py from timm's own parts, synthetic batch, logging every 50 steps."""
    model, images, labels, autocast = fresh(setting)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=setting.steps, t_in_epochs=False)
    meter, loss_fn = AverageMeter(), nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(number: int) -> None:
        with autocast:
            loss = loss_fn(model(images), labels)
        loss.backward()
        dispatch_clip_grad(model.parameters(), value=1.0, mode="norm")
        optimizer.step()
        optimizer.zero_grad()
        if number % 50 == 0:
            meter.update(loss.item(), setting.batch)
        scheduler.step_update(num_updates=number)

    return timed(step, setting)


def ours(resources: Resources) -> Callable[[Setting], float]:
    """`run_cell` on real shards."""

    def measure(setting: Setting) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return _run(setting, resources, Path(folder))["step_s"]

    return measure


def _run(setting: Setting, resources: Resources, folder: Path) -> dict[str, float]:
    data_dir = Path(tempfile.gettempdir()) / "dbscale-bench-data"
    name = f"fractals{setting.image_size}"
    spec = {
        "source": "fractals",
        "families": setting.num_classes,
        "num_train": 2048,
        "num_test": 64,
        "image_size": setting.image_size,
    }
    tier = "resident"
    if setting.image_size > 64:
        spec |= {"encoding": "raw", "raw_size": setting.image_size}
        tier = "raw"
    dataset = ensure_packed(name, spec, data_dir)
    recipe = Recipe(
        stage="pretrain",
        model=setting.model,
        data=Data(dataset=name, num_samples=2048, image_size=setting.image_size, tier=tier),
        training=Training(
            budget=Budget(steps=setting.steps),
            optim=Optim(lr=1e-4, clip_norm=1.0),
            global_batch=setting.batch,
            precision=setting.precision,
            augment=Augment(crop_padding=4, hflip=0.5),
            label_smoothing=0.1,
        ),
        seed=0,
    )
    cell = Cell(recipe, load_manifest(dataset).fingerprint)
    store = Store(folder)
    store.write_spec(cell.spec())
    marks: dict[int, float] = {}
    original = Reporter.add

    def noting(self: Reporter, step: int, losses: object) -> None:
        original(self, step, losses)  # type: ignore[arg-type]
        if step + 1 in (setting.warmup, setting.steps):
            synchronize(setting.device)
            marks[step + 1] = time.perf_counter()

    Reporter.add = noting  # type: ignore[method-assign]
    started = time.perf_counter()
    try:
        outcome = run_cell(store, cell.key, data_dir=data_dir, resources=resources, stop=StopRequest())
    finally:
        Reporter.add = original  # type: ignore[method-assign]
    total = time.perf_counter() - started
    if outcome.row is None:
        raise SystemExit(f"the benchmark's cell failed: {outcome.reason}")
    timing = outcome.row.timing
    return {
        "step_s": (marks[setting.steps] - marks[setting.warmup]) / (setting.steps - setting.warmup),
        "around_s": total - timing.train_time_s - timing.eval_time_s,
        "data_wait_share": timing.data_wait_share,
        "peak_memory_bytes": timing.peak_memory_bytes,
    }


def variants(setting: Setting) -> dict[str, Callable[[Setting], float]]:
    threads = torch.get_num_threads() if setting.device.type == "cpu" else None
    common: dict[str, Any] = {"device": setting.device.type, "threads": threads, "checkpoint_interval_s": 1e9}
    return {
        "bare": bare,
        "timm": timm_manner,
        "ours, plain": ours(Resources(zero_stage=None, **common)),
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
        arguments.warmup,
    )  # fmt: skip
    known = variants(setting)
    chosen = {name: known[name] for name in arguments.variants or known if arguments.variants or "compiled" not in name}
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(arguments.rounds):
        for name, measure in chosen.items():
            times[name].append(measure(setting))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    print_table(setting, times)
    with tempfile.TemporaryDirectory() as folder:
        how = Resources(zero_stage=None, threads=arguments.threads or None)
        last = _run(setting, how, Path(folder))
    stall_s = checkpoint_stall(setting, how)
    print(
        f"\nAround a further cell of the process (everything but training and evaluation): {last['around_s']:.3f} s; "
        f"data wait {last['data_wait_share']:.1%}; peak memory {last['peak_memory_bytes'] / 2**20:,.0f} MiB\n"
        f"A checkpoint stops training for {stall_s * 1e3:.1f} ms (median): {stall_s / 60:.3%} of the time at one a "
        f"minute, {stall_s / 300:.3%} at one every five minutes"
    )


def checkpoint_stall(setting: Setting, how: Resources) -> float:
    """Seconds that a save stops training, median over a run that saves after every step; what goes on beside training
    is waited for off the clock."""
    seconds: list[float] = []
    original = Checkpointer.save

    def noting(self: Checkpointer, state: LoopState) -> Path:
        started = time.perf_counter()
        path = original(self, state)
        seconds.append(time.perf_counter() - started)
        self.finish()
        return path

    Checkpointer.save = noting  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            often = {"checkpoint_interval_s": 1e-9, "checkpoint_stall_share": 1e9}
            _run(replace(setting, steps=setting.warmup + 3), how.model_copy(update=often), Path(folder))
    finally:
        Checkpointer.save = original  # type: ignore[method-assign]
    return statistics.median(seconds)


def print_table(setting: Setting, times: dict[str, list[float]]) -> None:
    kind = f"{setting.model.heads}×{setting.model.head_width} depth {setting.model.depth}, {setting.image_size} px"
    print(
        f"DeiT {kind}, batch {setting.batch}, {setting.precision}, {device_name(setting.device)}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    print("| loop | ms a step, best | median | images/s | speed ÷ bare | speed ÷ timm |\n|---|---|---|---|---|---|")
    best = {name: min(values) for name, values in times.items()}
    for name, values in times.items():
        row = [
            f"{best[name] * 1e3:.2f}",
            f"{statistics.median(values) * 1e3:.2f}",
            f"{setting.batch / best[name]:,.0f}",
        ]
        row += [f"{best[other] / best[name]:.3f}" if other in best else "" for other in ("bare", "timm")]
        print(f"| {name} | {' | '.join(row)} |")


def _parse() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SETTINGS, default="deit_h2" if on_gpu else "tiny")
    parser.add_argument("--batch", type=int, help="global batch; default: the model's")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16" if on_gpu else "fp32")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--threads", type=int, default=None if on_gpu else 1)
    parser.add_argument("--warmup", type=int, default=10, help="steps before the clock starts")
    parser.add_argument("--variants", nargs="+", metavar="NAME",
                        help="loops to measure, as the table names them (default: all but the compiled one)")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    main()
