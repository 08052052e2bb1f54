"""Measure the data plane beside its peers: `python tests/bench/bench_data.py [--out FILE.md] [--quick]`.

Prints a markdown table: samples per CPU second of one thread and ratios from this very run. CPU seconds, not wall
seconds, so that a shared machine disturbs less; each row is the best of several rounds, and peers take turns.
Images are made here: photographs of 500 × 375 px as JPEG, and 32 px fractals. MosaicML Streaming is measured where it
can be imported (it is not a dependency; run this file with a Python that has it).
"""

import argparse
import io
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from dbscale.data import make_loader, make_transform, open_dataset
from dbscale.data.boxes import RESIZED_CROP_DRAWS, resized_crop_boxes
from dbscale.data.crop import resize_each
from dbscale.data.decode import decode_image
from dbscale.data.index import checksum, index_dtype
from dbscale.data.order import order
from dbscale.data.read import ShardFiles
from shards.pack import pack
from shards.sources import make_source

SIDE = 224
Row = tuple[str, str, str, str]


def rates(contenders: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
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


def make_photographs(root: Path, count: int) -> None:
    """An ImageFolder of smooth, textured 500 × 375 JPEGs in two classes."""
    for number in range(count):
        generator = np.random.default_rng(number)
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = (smooth + generator.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        for split in ("train", "test"):
            path = root / split / f"kind-{number % 2}" / f"{number}.JPEG"
            if split == "train" or number < 2:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=90))


def loader_run(folder: Path, tier: str, count: int, batch: int, augment: dict[str, object] | None) -> Callable[[], int]:
    dataset = open_dataset(folder, tier=tier)  # type: ignore[arg-type]
    side = SIDE if tier != "resident" else 32
    transform = None
    if augment is not None:
        transform = make_transform(image_size=side, train=True, augment=augment, seed=0, tier=tier)
    loader = make_loader(dataset.subset(), global_batch=batch, seed=0, transform=transform)
    return lambda: sum(len(next(loader).labels) for _ in range(count // batch))


# No decoding: bytes in shuffled order


def no_decode(folder: Path, work: Path, rounds: int) -> list[Row]:
    dataset = open_dataset(folder)
    files = ShardFiles(folder, dataset.split, dataset.index)
    count = 4096

    def ours() -> int:
        for position in order(0, 0, len(dataset.index))[:count].tolist():
            files.read(position)
        return count

    contenders = {"dbscale": ours, "webdataset": webdataset_run(folder, count, decode=False)}
    mosaic = mosaic_run(folder, work, count)
    if mosaic is not None:
        contenders["mosaicml-streaming"] = mosaic
    found = rates(contenders, rounds)
    what = "bytes of 32 px samples, shuffled"
    rows = [row(what, name, rate, found["dbscale"]) for name, rate in found.items()]
    return rows if mosaic else [*rows, (what, "mosaicml-streaming", "not measured (not installed)", "")]


def webdataset_run(folder: Path, count: int, *, decode: bool) -> Callable[[], int]:
    from webdataset.compat import WebDataset

    tars = sorted(map(str, folder.glob("train-*.tar")))

    def samples() -> Iterator[object]:
        while True:
            pipeline = WebDataset(tars, shardshuffle=len(tars), empty_check=False, seed=0).shuffle(1000)
            yield from pipeline.decode("rgb8") if decode else pipeline

    def run() -> int:
        return sum(1 for _ in islice(samples(), count))

    return run


def mosaic_run(folder: Path, work: Path, count: int) -> Callable[[], int] | None:
    try:
        from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]
    except ImportError:
        return None
    dataset = open_dataset(folder)
    files = ShardFiles(folder, dataset.split, dataset.index)
    with MDSWriter(out=str(work / "mds"), columns={"image": "bytes", "label": "int"}) as writer:
        for position in range(len(dataset.index)):
            writer.write({"image": files.read(position), "label": int(dataset.labels[position])})
    stream = cycle(StreamingDataset(local=str(work / "mds"), shuffle=True, batch_size=64))
    return lambda: sum(1 for _ in islice(stream, count))


# Photographs


def photographs(root: Path, work: Path, count: int, rounds: int) -> list[Row]:
    source = make_source("imagefolder", path=str(root))
    for encoding in ("original", "jpeg256", "raw"):
        pack(source, work / encoding, encoding=encoding, progress=False)  # type: ignore[arg-type]
    encoded = [path.read_bytes() for path in sorted((root / "train").rglob("*.JPEG"))]
    crop = {"random_resized_crop": (0.08, 1.0), "hflip": 0.5}

    def boxes(images: list[np.ndarray]) -> np.ndarray:
        sizes = np.array([image.shape[:2] for image in images])
        uniform = np.random.default_rng(0).random((len(images), RESIZED_CROP_DRAWS))
        return resized_crop_boxes(sizes[:, 0], sizes[:, 1], uniform, (0.08, 1.0))

    def in_memory() -> int:
        for start in range(0, len(encoded), 32):
            images = [decode_image(data) for data in encoded[start : start + 32]]
            batch = resize_each(images, boxes(images), np.zeros(len(images), bool), SIDE)
            batch.float().mul_(1 / 255).sub_(0.5)
        return len(encoded)

    def pillow() -> int:
        for data in encoded:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            ((top, left, height, width),) = boxes([np.empty((image.height, image.width))]).tolist()
            cut = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
            torch.from_numpy(np.array(cut)).permute(2, 0, 1).float().mul_(1 / 255).sub_(0.5)
        return len(encoded)

    contenders = {
        "Pillow, in memory": pillow,
        "same decoder, in memory": in_memory,
        "dbscale jpeg": loader_run(work / "original", "jpeg", count, 32, crop),
        "dbscale jpeg256": loader_run(work / "jpeg256", "jpeg256", count, 32, crop),
        "dbscale raw + CPU crop": loader_run(work / "raw", "raw", count, 32, crop),
    }
    found = rates(contenders, rounds)
    what = "photographs, decode + random resized crop 224"
    rows = [row(what, name, rate, found["Pillow, in memory"], "Pillow") for name, rate in found.items()]
    share = found["dbscale jpeg"] / found["same decoder, in memory"]
    rows.append((what, "dbscale jpeg ÷ in-memory loop", "", f"{share:.2f}"))
    return [*rows, *gathers(work / "raw", count, rounds), checksum_cost(encoded, rounds)]


def gathers(folder: Path, count: int, rounds: int) -> list[Row]:
    dataset = open_dataset(folder, tier="raw")
    positions = order(0, 0, len(dataset.index))
    array = np.random.default_rng(0).integers(0, 256, (len(positions), 256 * 256 * 3), dtype=np.uint8)

    def ours() -> int:
        dataset.reader.fetch(positions)
        return len(positions)

    def plain() -> int:
        np.take(array, positions, axis=0)
        return len(positions)

    found = rates({"numpy take": plain, "dbscale raw": ours}, rounds)
    return [
        row("gather of raw 256 px samples", name, rate, found["numpy take"], "numpy") for name, rate in found.items()
    ]


def checksum_cost(encoded: list[bytes], rounds: int) -> Row:
    found = rates(
        {
            "decode": lambda: len([decode_image(data) for data in encoded]),
            "checksum": lambda: len([checksum(data) for data in encoded]),
        },
        rounds,
    )
    return "photographs", "checksum ÷ decode, time", "", f"{found['decode'] / found['checksum']:.4f}"


# Small images


def resident(folder: Path, rounds: int) -> list[Row]:
    augment = {"crop_padding": 4, "hflip": 0.5}
    found = rates(
        {
            "webdataset, decoded": webdataset_run(folder, 4096, decode=True),
            "dbscale resident, uint8": loader_run(folder, "resident", 16384, 512, None),
            "dbscale resident, crop + flip + normalise": loader_run(folder, "resident", 8192, 512, augment),
        },
        rounds,
    )
    base = found["webdataset, decoded"]
    return [row("32 px images", name, rate, base, "webdataset") for name, rate in found.items()]


def tiny_vit(folder: Path, rounds: int) -> list[Row]:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=64
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    transform = make_transform(image_size=32, train=True, augment={"crop_padding": 4, "hflip": 0.5}, seed=0)
    loader = make_loader(open_dataset(folder).subset(), global_batch=128, seed=0, transform=transform)
    fixed = next(loader)

    def train(batches: Iterator) -> int:
        for batch in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
            optimizer.step()
        return 10 * 128

    found = rates(
        {"synthetic": lambda: train(iter([fixed] * 10)), "dbscale": lambda: train(islice(loader, 10))}, rounds * 2
    )
    return [
        row("training a ViT of width 32", name, rate, found["synthetic"], "synthetic") for name, rate in found.items()
    ]


# Size


def sizes(work: Path, num_samples: int) -> list[Row]:
    start = time.perf_counter()
    order(1, 0, 1_281_167)
    rows = [("order of 1,281,167 samples", "dbscale", f"{time.perf_counter() - start:.3f} s", "")]
    path = work / "large.npy"
    index = np.lib.format.open_memmap(path, mode="w+", dtype=index_dtype(24), shape=(num_samples,))
    index["label"] = np.arange(num_samples) % 1000
    del index
    before = resident_mib()
    start = time.perf_counter()
    opened = np.load(path, mmap_mode="r", allow_pickle=False)
    opened[order(1, 0, 4096)]
    seconds = time.perf_counter() - start
    what = f"index of {num_samples:,} samples: open and look up 4,096"
    grown = resident_mib() - before
    path.unlink()
    return [*rows, (what, "dbscale", f"{seconds:.3f} s, {grown:.0f} MiB", "")]


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def row(what: str, name: str, rate: float, base: float, base_name: str | None = None) -> Row:
    ratio = f"{rate / base:.2f}" if base_name else f"{base / rate:.2f} (dbscale ÷ this)"
    return what, name, f"{rate:,.0f}/s", f"{ratio} × {base_name}" if base_name else ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds, a smaller index")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds, count = (2, 64) if arguments.quick else (5, 256)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        pack(
            make_source("fractals", num_train=8192, num_test=64),
            work / "small",
            jobs=1,
            shard_samples=1024,
            progress=False,
        )
        make_photographs(work / "photographs", count)
        rows = no_decode(work / "small", work, rounds)
        rows += photographs(work / "photographs", work, count, rounds)
        rows += resident(work / "small", rounds)
        rows += tiny_vit(work / "small", rounds)
        rows += sizes(work, 1_000_000 if arguments.quick else 14_000_000)
    text = report(rows)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


def report(rows: list[Row]) -> str:
    packages = ("torch", "numpy", "pillow", "simplejpeg", "webdataset")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end"
    lines = [
        "# Data plane benchmark",
        "",
        f"{machine}; Python {sys.version.split()[0]}, {versions}.",
        "Rates are samples per CPU second of one thread, best of several rounds.",
        "",
        "| what | who | rate | ratio |",
        "|---|---|---|---|",
        *(f"| {' | '.join(cells)} |" for cells in rows),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
