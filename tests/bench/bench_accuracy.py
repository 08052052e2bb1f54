"""CIFAR-10 by our loop and by timm's: same model and recipe, each with its own data pipeline, seed by seed.

    python tests/bench/bench_accuracy.py --cifar FOLDER_OF_BIN_FILES [--seeds 0 1 2] [--epochs 10]

timm's side is its train.py put together from timm's and torchvision's own parts: images read by Pillow, RandomCrop and
RandomHorizontalFlip, its AdamW, cosine schedule, label smoothing and clipping. Prints one table line per run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import timm
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.clip_grad import dispatch_clip_grad
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from dbscale.data import load_manifest
from dbscale.shards.pack import ensure_packed
from dbscale.study.cell import Cell
from dbscale.study.recipe import Augment, Budget, Data, DeiT, Optim, Recipe, Training
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Store
from dbscale.training.models import timm_arguments
from dbscale.training.run import run_cell

MODEL = DeiT(heads=4, head_width=16, depth=4, patch_size=8)
BATCH, LR, WEIGHT_DECAY, SMOOTHING, DROP_PATH, WARMUP_SHARE, CLIP_NORM = 128, 2e-3, 0.05, 0.1, 0.05, 0.05, 1.0
STEPS_PER_EPOCH = 50_000 // BATCH


def ours(cifar: Path, seed: int, epochs: int) -> tuple[float, float]:
    """Top-1 and mean cross-entropy on the 10,000 test images."""
    training = Training(
        budget=Budget(steps=epochs * STEPS_PER_EPOCH),
        optim=Optim(lr=LR, weight_decay=WEIGHT_DECAY, warmup_share=WARMUP_SHARE, clip_norm=CLIP_NORM),
        global_batch=BATCH,
        precision="fp32",
        augment=Augment(crop_padding=4, hflip=0.5),
        label_smoothing=SMOOTHING,
        drop_path=DROP_PATH,
    )
    data_dir = Path(tempfile.gettempdir()) / "dbscale-bench-data"
    packed = ensure_packed("cifar10", {"source": "cifar", "path": str(cifar)}, data_dir)
    data = Data(dataset="cifar10", num_samples=50_000, image_size=32)
    recipe = Recipe(stage="pretrain", model=MODEL, data=data, training=training, seed=seed)
    cell = Cell(recipe, load_manifest(packed).fingerprint)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.write_spec(cell.spec())
        resources = Resources(zero_stage=None, threads=torch.get_num_threads())
        outcome = run_cell(store, cell.key, data_dir=data_dir, resources=resources, stop=StopRequest())
    if outcome.row is None:
        raise SystemExit(f"our cell failed: {outcome.reason}")
    return 1 - outcome.row.error_rate, outcome.row.test_loss


class Pictures(Dataset[Any]):
    """CIFAR-10's binary files as Pillow images, which torchvision augments one by one."""

    def __init__(self, cifar: Path, names: list[str], transform: Any) -> None:
        raw_ND = np.concatenate([np.fromfile(cifar / f"{name}.bin", np.uint8).reshape(-1, 3073) for name in names])
        self.labels = raw_ND[:, 0].astype(np.int64)
        self.images = [Image.fromarray(each) for each in raw_ND[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def by_timm(cifar: Path, seed: int, epochs: int) -> tuple[float, float]:
    """The same by timm's loop."""
    torch.manual_seed(seed)
    finish = [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    augment = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *finish])
    train = Pictures(cifar, [f"data_batch_{number}" for number in range(1, 6)], augment)
    test = Pictures(cifar, ["test_batch"], transforms.Compose(finish))
    name, arguments = timm_arguments(MODEL, num_classes=10, image_size=32)
    model = timm.create_model(name, drop_path_rate=DROP_PATH, **arguments)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY)
    num_steps = epochs * STEPS_PER_EPOCH
    warmup = int(WARMUP_SHARE * num_steps)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=num_steps, warmup_t=warmup, warmup_lr_init=LR / warmup, t_in_epochs=False
    )
    loss_fn = LabelSmoothingCrossEntropy(SMOOTHING)
    loader = DataLoader(train, BATCH, shuffle=True, drop_last=True)
    model.train()
    done = 0
    for _ in range(epochs):
        for images, labels in loader:
            loss_fn(model(images), labels).backward()
            dispatch_clip_grad(model.parameters(), CLIP_NORM, mode="norm")
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            scheduler.step_update(done)
    model.eval()
    with torch.inference_mode():
        logits_NC = torch.cat([model(images) for images, _ in DataLoader(test, 500)])
    labels_N = torch.from_numpy(test.labels)
    loss = torch.nn.functional.cross_entropy(logits_NC, labels_N)
    return float((logits_NC.argmax(1) == labels_N).double().mean()), float(loss)


LOOPS = {"ours": ours, "timm": by_timm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="cifar-10-batches-bin, the official binary files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    print("| loop | seed | top-1 | test loss | minutes |\n|---|---|---|---|---|", flush=True)
    for seed in arguments.seeds:
        for name in arguments.loops:
            started = time.perf_counter()
            top1, loss = LOOPS[name](arguments.cifar, seed, arguments.epochs)
            minutes = (time.perf_counter() - started) / 60
            print(f"| {name} | {seed} | {top1:.2%} | {loss:.4f} | {minutes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
