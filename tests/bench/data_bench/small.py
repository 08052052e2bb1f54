"""Small images: stored bytes without decoding, the resident tier, and a tiny ViT that trains from it."""

from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import torch

from data_bench.measure import Contender, Row, beside, rates
from dbscale.data import make_loader, make_transform, open_dataset
from dbscale.data.order import Stream
from dbscale.data.read import ShardFiles

AUGMENT = {"crop_padding": 4, "hflip": 0.5}
NUM_BYTES_SAMPLES = 8192


def no_decode(folder: Path, work: Path, rounds: int) -> list[Row]:
    """Stored bytes and labels in shuffled order."""
    contenders = {
        "webdataset": webdataset_run(folder, NUM_BYTES_SAMPLES, decode=False),
        "dbscale, bytes": bytes_run(folder, NUM_BYTES_SAMPLES),
        "dbscale, raw batches of 64": loader_run(folder, "raw", NUM_BYTES_SAMPLES, 64),
    }
    mosaic = mosaic_run(folder, work, NUM_BYTES_SAMPLES)
    if mosaic is not None:
        contenders["mosaicml-streaming"] = mosaic
    found = rates(contenders, rounds)
    what = "32 px samples, not decoded, shuffled"
    rows = beside(what, found, "webdataset", {"dbscale, bytes": "≥ 40,000/s, ≥ 2.5 × webdataset"})
    if mosaic is None:
        return [*rows, Row(what, "mosaicml-streaming", "not measured: not installed")]
    share = found["dbscale, bytes"] / found["mosaicml-streaming"]
    return [*rows, Row(what, "dbscale, bytes ÷ mosaicml-streaming", "", f"{share:.2f}", "≥ 1.0")]


def bytes_run(folder: Path, count: int) -> Contender:
    """Batches of 64 (bytes, label), each sample one checked `pread`."""
    dataset = open_dataset(folder)
    files = ShardFiles(folder, dataset.split, dataset.index)
    stream = Stream(dataset.num_samples, seed=0, global_batch=64)

    def run() -> int:
        seen = 0
        for number in range(count // 64):
            positions, _ = stream.batch(number)
            batch = [files.read(position) for position in positions.tolist()], dataset.labels[positions]
            seen += len(batch[0])
        return seen

    return run


def loader_run(folder: Path, tier: str, count: int, batch: int, augment: dict[str, object] | None = None) -> Contender:
    """`make_loader` over the whole dataset; without `augment` it hands out stored pixels."""
    dataset = open_dataset(folder, tier=tier)  # type: ignore[arg-type]
    side = 32 if dataset.manifest.image.max_side == 32 else 224
    transform = None
    if augment is not None:
        transform = make_transform(image_size=side, train=True, augment=augment, seed=0, tier=tier)
    loader = make_loader(dataset.subset(), global_batch=batch, seed=0, transform=transform)
    return lambda: sum(len(next(loader).labels) for _ in range(count // batch))


def webdataset_run(folder: Path, count: int, *, decode: bool) -> Contender:
    """The library's usual pipeline: shards shuffled, then a buffer of 1,000 samples."""
    from webdataset.compat import WebDataset

    tars = sorted(map(str, folder.glob("train-*.tar")))

    def samples() -> Iterator[object]:
        while True:
            pipeline = WebDataset(tars, shardshuffle=len(tars), empty_check=False, seed=0).shuffle(1000)
            yield from pipeline.decode("rgb8") if decode else pipeline

    return lambda: sum(1 for _ in islice(samples(), count))


def mosaic_run(folder: Path, work: Path, count: int) -> Contender | None:
    """The same bytes and labels as an MDS dataset; None where the package is not installed."""
    try:
        from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]
    except ImportError:
        return None
    dataset = open_dataset(folder)
    files = ShardFiles(folder, dataset.split, dataset.index)
    with MDSWriter(out=str(work / "mds"), columns={"image": "bytes", "label": "int"}) as writer:
        for position in range(len(dataset.index)):
            writer.write({"image": files.read(position), "label": int(dataset.index["label"][position])})
    stream = StreamingDataset(local=str(work / "mds"), shuffle=True, batch_size=64)
    endless = (sample for epoch in cycle([stream]) for sample in epoch)
    return lambda: sum(1 for _ in islice(endless, count))


def resident(folder: Path, rounds: int) -> list[Row]:
    """The resident tier beside webdataset's decoded samples."""
    found = rates(
        {
            "webdataset, decoded": webdataset_run(folder, 4096, decode=True),
            "dbscale resident, uint8": loader_run(folder, "resident", 65536, 512),
            "dbscale resident, crop + flip + normalise": loader_run(folder, "resident", 8192, 512, AUGMENT),
        },
        rounds,
    )
    return beside("32 px images", found, "webdataset, decoded", {"dbscale resident, uint8": "≥ 100"})


def tiny_vit(folder: Path, rounds: int) -> list[Row]:
    """A training step of a ViT of width 32 on loaded batches and on one batch again and again."""
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=64
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    transform = make_transform(image_size=32, train=True, augment=AUGMENT, seed=0)
    loader = make_loader(open_dataset(folder).subset(), global_batch=128, seed=0, transform=transform)
    fixed = next(loader)

    def train(batches: Iterator) -> int:
        for batch in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
            optimizer.step()
        return 10 * 128

    found = rates(
        {
            "synthetic tensors": lambda: train(iter([fixed] * 10)),
            "dbscale resident": lambda: train(islice(loader, 10)),
        },
        4 * rounds,
    )
    return beside("training a ViT of width 32", found, "synthetic tensors", {"dbscale resident": "≥ 0.95"})
