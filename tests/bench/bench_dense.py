"""What a dense task costs beside a classification of the same backbone and image size, and a loader with masks beside one
without.

    python tests/bench/bench_dense.py [--rounds 3]

Processor time, which busy neighbours change less than wall time; variants take turns and each one's best round counts.
Bounds: a linear segmentation finetune takes at most 1.3 times a classification finetune's step, a loader with masks has at
least .8 of the rate of one without.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image

from dbscale.data import DenseTransform, load_manifest, make_loader, make_transform, open_dataset
from dbscale.shards.pack import ensure_packed
from dbscale.study.cell import Cell
from dbscale.study.recipe import Augment, Budget, Data, DeiT, Optim, Recipe, Training
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Store
from dbscale.study.task import Segmentation
from dbscale.training import run

STEP_BOUND, LOADER_BOUND = 1.3, 0.8
SETTINGS = {
    # name: model, image size, batch, steps
    "deit_h3, 224 px": (DeiT(heads=3), 224, 8, 3),
    "deit_h2, 64 px, patch 8": (DeiT(heads=2, patch_size=8), 64, 16, 6),
    "the study's, 32 px, patch 4": (DeiT(heads=6, head_width=8, depth=2, patch_size=4), 32, 32, 20),
}
TASKS = {"classification": None, "linear": Segmentation(), "pyramid": Segmentation(head="pyramid")}


def best(work: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Least processor seconds of each variant over the rounds."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, each in work.items():
            found[name].append(each())
    return {name: min(values) for name, values in found.items()}


def step_seconds(task: Any, setting: tuple[DeiT, int, int, int], data_dir: Path) -> float:
    """Processor seconds of one step of a finetune, the first one left out."""
    model, size, batch, steps = setting
    kind = "fractals" if task is None else "fractal_masks"
    entry = {"source": kind, "families": 20, "num_train": 64, "num_test": 20, "image_size": size}
    name = f"{kind}-{size}"
    ensure_packed(name, entry, data_dir, progress=False)
    training = Training(budget=Budget(steps=steps + 1), optim=Optim(lr=1e-4), global_batch=batch, precision="fp32",
                        augment=Augment(random_resized_crop=(0.3, 1.0)))  # fmt: skip
    tier = "resident" if size <= 64 else "raw"
    data = Data(dataset=name, num_samples=64, image_size=size, tier=tier)
    recipe = Recipe(stage="finetune", model=model, data=data, training=training, seed=0, task=task)
    cell = Cell(recipe, load_manifest(data_dir / "shards" / name).fingerprint)
    marks: list[float] = []
    original = run.train

    def timed(made: Any) -> bool:
        add = made.reporter.add
        made.reporter.add = lambda step, losses: (add(step, losses), marks.append(time.process_time()))
        return original(made)

    run.train = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder))
            store.write_spec(cell.spec())
            outcome = run.run_cell(
                store, cell.key, data_dir=data_dir, resources=Resources(threads=1), stop=StopRequest()
            )
    finally:
        run.train = original
    if outcome.row is None:
        raise SystemExit(f"the benchmark's cell failed: {outcome.reason}")
    return (marks[-1] - marks[0]) / (len(marks) - 1)


def write_photographs(root: Path, num: int) -> None:
    """Images of 500 × 375 px with the detail of photographs, and masks of a dozen discs."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:375, :500]
    for kind in ("images", "annotations"):
        (root / kind / "training").mkdir(parents=True, exist_ok=True)
    for number in range(num):
        noise = sum(
            np.kron(generator.normal(0, 25, (375 // k + 1, 500 // k + 1, 3)), np.ones((k, k, 1)))[:375, :500]
            for k in (1, 4, 25)
        )
        Image.fromarray((128 + noise).clip(0, 255).astype(np.uint8)).save(
            root / f"images/training/{number:04}.jpg", quality=90
        )
        mask = np.zeros((375, 500), np.uint8)
        for _ in range(12):
            top, left, radius = generator.integers(0, 375), generator.integers(0, 500), generator.integers(20, 150)
            mask[(y - top) ** 2 + (x - left) ** 2 < radius**2] = generator.integers(0, 20)
        buffer = io.BytesIO()
        Image.fromarray(mask).save(buffer, "PNG")
        (root / f"annotations/training/{number:04}.png").write_bytes(buffer.getvalue())


def loader_seconds(folder: Path, masks: bool, tier: Any, size: int, batches: int) -> float:
    """Processor seconds of one batch of 32."""
    dataset = open_dataset(folder, tier=tier, image_size=size)
    transform: Any = make_transform(
        image_size=size, train=True, augment={"random_resized_crop": (0.3, 1.0), "hflip": 0.5}, whole=True
    )
    if not masks:
        # The same images without what lies beside them.
        dataset.__dict__["targets"] = None
    loader = make_loader(dataset.subset(), global_batch=32, seed=0,
                         transform=DenseTransform(transform, True) if masks else transform)  # fmt: skip
    next(loader)
    started = time.process_time()
    for _ in range(batches):
        next(loader)
    return (time.process_time() - started) / batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    misses = []
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder)
        for name, setting in SETTINGS.items():
            found = best({task: lambda task=task, setting=setting: step_seconds(TASKS[task], setting, data_dir)
                          for task in TASKS}, rounds)  # fmt: skip
            base = found["classification"]
            ratios = {task: found[task] / base for task in ("linear", "pyramid")}
            print(f"step, {name}: classification {base * 1e3:.0f} ms, linear ×{ratios['linear']:.2f}, "
                  f"pyramid ×{ratios['pyramid']:.2f}", flush=True)  # fmt: skip
            if ratios["linear"] > STEP_BOUND:
                misses.append(f"step, {name}")
        write_photographs(data_dir / "photographs", 96)
        entry = {"source": "maskfolder", "path": str(data_dir / "photographs"), "class_names": 20, "test": None}
        photographs = ensure_packed("photographs", entry, data_dir, progress=False)
        small = ensure_packed("small", {"source": "fractal_masks", "num_train": 2048, "num_test": 8, "image_size": 32},
                              data_dir, progress=False)  # fmt: skip
        for name, where, tier, size, batches in (("photographs to 224 px", photographs, "jpeg", 224, 3),
                                                 ("resident, 32 px", small, "resident", 32, 40)):  # fmt: skip
            found = best({"with": lambda a=(where, True, tier, size, batches): loader_seconds(*a),
                          "without": lambda a=(where, False, tier, size, batches): loader_seconds(*a)}, rounds)  # fmt: skip
            rate = found["without"] / found["with"]
            print(f"loader, {name}: {32 / found['without']:,.0f} images/s without masks, ×{rate:.2f} with", flush=True)
            if rate < LOADER_BOUND:
                misses.append(f"loader, {name}")
    sys.exit(f"outside of the bounds: {', '.join(misses)}" if misses else 0)


if __name__ == "__main__":
    main()
