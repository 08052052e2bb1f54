"""Size: the order of ImageNet, its first batch after a resume, and an index of 14 million samples."""

import os
import statistics
import time
from pathlib import Path

import numpy as np

from data_bench.measure import Row, seconds
from dbscale.data import load_manifest, make_loader, make_transform, open_dataset
from dbscale.data.manifest import save_manifest
from dbscale.data.order import order
from dbscale.data.read import file_checksum, index_dtype

IMAGENET = 1_281_167


def sizes(packed: Path, work: Path, num_large: int) -> list[Row]:
    """`packed` is a dataset whose samples are served again and again under an enlarged index."""
    taken = statistics.median(seconds(lambda epoch=epoch: order(1, epoch, IMAGENET)) for epoch in range(5))
    return [
        Row(f"order of {IMAGENET:,} samples", "dbscale", f"{taken:.3f} s", "", "≤ 0.1 s"),
        first_batch(enlarged(packed, work / "imagenet", IMAGENET)),
        large_index(enlarged(packed, work / "large", num_large), num_large),
    ]


def enlarged(packed: Path, folder: Path, num_samples: int) -> Path:
    """The dataset with `num_samples` index records that point at its tars in turn."""
    manifest = load_manifest(packed)
    split = manifest.split("train")
    folder.mkdir()
    for shard in split.shards:
        (folder / shard.name).symlink_to(packed / shard.name)
    small = np.load(packed / split.index)
    path = folder / split.index
    index = np.lib.format.open_memmap(path, mode="w+", dtype=index_dtype(24), shape=(num_samples,))
    for start in range(0, num_samples, len(small)):
        part = index[start : start + len(small)]
        part[:] = small[: len(part)]
    index.flush()
    del index
    larger = split.model_copy(update={"num_samples": num_samples, "index_checksum": file_checksum(path)})
    save_manifest(folder, manifest.model_copy(update={"splits": {"train": larger}}))
    return folder


def first_batch(folder: Path) -> Row:
    """From nothing to the first batch of 128 photographs in the middle of an epoch."""
    order.cache_clear()
    transform = make_transform(
        image_size=224, train=True, augment={"random_resized_crop": (0.08, 1.0), "hflip": 0.5}, tier="jpeg"
    )
    start = time.perf_counter()
    subset = open_dataset(folder, tier="jpeg").subset()
    next(make_loader(subset, global_batch=128, seed=3, consumed=128 * 7000, transform=transform))
    what = f"resume at {IMAGENET:,} samples: open, order, first batch of 128 JPEGs"
    return Row(what, "dbscale", f"{time.perf_counter() - start:.2f} s", "", "≤ 1 s")


def large_index(folder: Path, num_samples: int) -> Row:
    """Open, and look up the records and labels of 4,096 shuffled samples."""
    positions = np.random.default_rng(0).integers(0, num_samples, 4096)
    before, start = resident_mib(), time.perf_counter()
    dataset = open_dataset(folder, tier="jpeg")
    assert len(dataset.index[positions]) == len(positions)
    taken = time.perf_counter() - start
    what = f"index of {num_samples:,} samples: open and look up 4,096"
    return Row(what, "dbscale", f"{taken:.3f} s, {resident_mib() - before:.0f} MiB", "", "< 1 s, < 1,024 MiB")


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
