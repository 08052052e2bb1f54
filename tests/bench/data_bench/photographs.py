"""Photographs of 500 × 375 px: every decode tier beside Pillow and an in-memory loop of the same decoder."""

import io
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from data_bench.measure import Row, beside, rates
from data_bench.small import loader_run
from dbscale.data import open_dataset
from dbscale.data.decode import decode_image
from dbscale.data.geometry import RESIZED_CROP_DRAWS, resize_each, resized_crop_boxes
from dbscale.data.order import order
from dbscale.data.read import checksum
from dbscale.shards.pack import pack
from dbscale.shards.sources import source_of

SIDE = 224
AREA = (0.08, 1.0)


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


def boxes_of(images: list[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """The same random boxes for every contender."""
    sizes = np.array([image.shape[:2] for image in images])
    uniform = np.random.default_rng(0).random((len(images), RESIZED_CROP_DRAWS))
    return resized_crop_boxes(sizes[:, 0], sizes[:, 1], uniform, AREA)


def crop_with_pillow(data: bytes, box: list[int] | None = None) -> Image.Image:
    """torchvision's usual path: decode, crop, resize, all in Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    top, left, height, width = box or boxes_of([np.empty((image.height, image.width))])[0].tolist()
    return image.crop((left, top, left + width, top + height)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def photographs(root: Path, work: Path, rounds: int) -> list[Row]:
    """All tiers; `root` is an ImageFolder with the splits train and test."""
    for encoding in ("original", "jpeg256", "raw"):
        source = source_of("photos", {"source": "imagefolder", "path": str(root), "encoding": encoding})
        pack(source, work / encoding, jobs=1, progress=False)
    encoded = [path.read_bytes() for path in sorted((root / "train").rglob("*.*"))]
    count = len(encoded) // 32 * 32

    def in_memory() -> int:
        for start in range(0, count, 32):
            images = [decode_image(data) for data in encoded[start : start + 32]]
            resize_each(images, boxes_of(images), np.zeros(32, bool), SIDE).float().mul_(1 / 255).sub_(0.5)
        return count

    def pillow() -> int:
        for data in encoded[:count]:
            cut = crop_with_pillow(data)
            torch.from_numpy(np.array(cut)).permute(2, 0, 1).float().mul_(1 / 255).sub_(0.5)
        return count

    crop = {"random_resized_crop": AREA, "hflip": 0.5}
    contenders = {
        "Pillow, in memory": pillow,
        "same decoder, in memory": in_memory,
        "dbscale jpeg": loader_run(work / "original", "jpeg", count, 32, crop),
        "dbscale jpeg256": loader_run(work / "jpeg256", "jpeg256", count, 32, crop),
        "dbscale raw + CPU crop": loader_run(work / "raw", "raw", count, 32, crop),
    }
    found = rates(contenders, rounds)
    goals = {"dbscale jpeg": "≥ 1.5", "dbscale jpeg256": "≥ 3", "dbscale raw + CPU crop": "≥ 8"}
    what = f"{count:,} photographs, decode + random resized crop 224"
    share = found["dbscale jpeg"] / found["same decoder, in memory"]
    return [
        *beside(what, found, "Pillow, in memory", goals),
        Row(what, "dbscale jpeg ÷ same decoder, in memory", "", f"{share:.2f}", "≥ 0.85"),
        pixels(encoded[:128]),
        *gathers(work / "raw", rounds),
        checksum_cost(encoded, rounds),
    ]


def pixels(encoded: list[bytes]) -> Row:
    """Largest difference to Pillow over decoded, cropped and resized images."""
    images = [decode_image(data) for data in encoded]
    boxes = boxes_of(images)
    ours = resize_each(images, boxes, np.zeros(len(images), bool), SIDE).permute(0, 2, 3, 1).numpy().astype(int)
    theirs = [np.asarray(crop_with_pillow(data, box)) for data, box in zip(encoded, boxes.tolist(), strict=True)]
    difference = np.abs(ours - np.stack(theirs))
    figure = f"{difference.max()} of 255; {1e6 * (difference > 1).mean():.2f} values in a million above 1"
    return Row(f"pixels of {len(encoded)} photographs", "largest difference to Pillow", figure, "", "≤ 1")


def gathers(folder: Path, rounds: int) -> list[Row]:
    """A batch of raw samples out of the mapped tars beside one out of a plain array."""
    dataset = open_dataset(folder, tier="raw")
    positions = order(0, 0, len(dataset.index))[:256]
    array = np.random.default_rng(0).integers(0, 256, (len(positions), 256 * 256 * 3), dtype=np.uint8)
    local = np.random.default_rng(1).permutation(len(positions))

    def ours() -> int:
        dataset.reader.fetch(positions)
        return len(positions)

    def plain() -> int:
        np.take(array, local, axis=0)
        return len(positions)

    found = rates({"numpy take": plain, "dbscale raw": ours}, 4 * rounds)
    return beside("gather of 256 raw 256 px samples", found, "numpy take", {"dbscale raw": "≥ 0.75"})


def checksum_cost(encoded: list[bytes], rounds: int) -> Row:
    """Share of the decoding time that checksums add."""
    found = rates(
        {
            "decode": lambda: len([decode_image(data) for data in encoded]),
            "checksum": lambda: len([checksum(data) for data in encoded]),
        },
        rounds,
    )
    return Row("photographs", "checksum ÷ decode, time", "", f"{found['decode'] / found['checksum']:.4f}", "≤ 0.01")
