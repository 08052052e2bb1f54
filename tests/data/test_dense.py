"""Masks and boxes: bytes that come back, damage that is found, and targets that follow their image pixel by pixel."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from dbscale.data import DataError, DenseTransform, make_eval_loader, make_loader, make_transform, open_dataset
from dbscale.data.decode import DecodeError
from dbscale.data.dense import place_boxes, place_masks
from dbscale.data.geometry import Placement
from dbscale.data.manifest import TargetKind
from dbscale.data.target import (
    IGNORE,
    Boxes,
    decode_boxes,
    decode_mask,
    encode_boxes,
    encode_mask,
    resize_target,
    square_target,
)
from dbscale.shards.pack import pack
from dbscale.shards.source import Listing, Source, WithTarget


def boxes_of(size: tuple[int, int], *boxes: tuple[float, ...], labels: Any = None) -> Boxes:
    number = len(boxes)
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return Boxes(size, array, np.arange(number) if labels is None else np.array(labels), np.zeros(number, bool))


def test_masks_come_back_and_pillow_reads_them_too() -> None:
    mask = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    data = encode_mask(mask)
    assert np.array_equal(decode_mask(data), mask)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), mask)
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")  # filtered rows: by another program
    assert np.array_equal(decode_mask(buffer.getvalue()), mask)


def test_damaged_targets_are_told_apart_from_sound_ones() -> None:
    data = encode_mask(np.zeros((30, 30), np.uint8))
    for damaged in (data[:40], data[:-30], data[:45] + b"\xff\xff\xff" + data[48:], b"", b"no image"):
        with pytest.raises(DecodeError):
            decode_mask(damaged)
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "PNG")
    with pytest.raises(DecodeError, match="a mask of mode RGB; the shards hold 8-bit grey"):
        decode_mask(buffer.getvalue())
    target = boxes_of((10, 20), (1, 2, 3.5, 4.25), (0, 0, 20, 10))._replace(crowd_N=np.array([True, False]))
    found = decode_boxes(encode_boxes(target))
    assert found.size == (10, 20) and found.crowd_N.tolist() == [True, False]
    assert np.array_equal(found.boxes_N4, target.boxes_N4) and np.array_equal(found.labels_N, target.labels_N)
    for damaged in (b"{", b"{}", b'{"size":[1,2],"boxes":[[1,2,3,4]],"labels":[],"crowd":[]}'):
        with pytest.raises(DecodeError, match="damaged boxes"):
            decode_boxes(damaged)


def test_squares_and_other_sizes_take_the_nearest_pixel() -> None:
    mask = np.array([[0, 1, 2, 3], [4, 5, 6, 7]], np.uint8)
    assert square_target(mask, 2).tolist() == [[1, 2], [5, 6]], "the central square"
    assert square_target(mask, 4).tolist() == [[1, 1, 2, 2]] * 2 + [[5, 5, 6, 6]] * 2
    assert resize_target(mask, (1, 2)).tolist() == [[5, 7]]
    boxes = boxes_of((2, 4), (0, 0, 4, 2), (1, 0, 2, 2), (0, 0, 1, 1))
    squared = square_target(boxes, 4)
    assert squared.size == (4, 4)
    assert squared.boxes_N4.tolist() == [[0, 0, 4, 4], [0, 0, 2, 4]], "the third lies outside of the central square"
    assert squared.labels_N.tolist() == [0, 1]
    assert resize_target(boxes, (4, 2)).boxes_N4.tolist() == [[0, 0, 2, 4], [0.5, 0, 1, 4], [0, 0, 0.5, 2]]


def test_placing_by_hand() -> None:
    mask = np.arange(16, dtype=np.uint8).reshape(4, 4)
    mask[3, 3] = IGNORE
    one = np.zeros(1, np.int64)
    cut = Placement(np.array([[0, 2, 2, 2]]), np.array([True]), one, one, 0, 2)
    assert place_masks([mask], cut)[0].tolist() == [[3, 2], [7, 6]], "rows 0-1 of columns 2-3, mirrored"
    shifted = Placement(None, np.array([False]), one, one + 2, 1, 4)  # down by one, to the left by one
    assert place_masks([mask], shifted)[0].tolist() == [
        [IGNORE] * 4, [1, 2, 3, IGNORE], [5, 6, 7, IGNORE], [9, 10, 11, IGNORE]
    ]  # fmt: skip
    target = boxes_of((4, 4), (2, 0, 3, 2), (0, 3, 1, 4))
    (placed,) = place_boxes([target], cut)
    assert placed.size == (2, 2) and placed.labels_N.tolist() == [0]
    assert placed.boxes_N4.tolist() == [[1, 0, 2, 2]], "column 2 is the right one after the mirror"
    (placed,) = place_boxes([target], shifted)
    assert placed.boxes_N4.tolist() == [[1, 1, 2, 3]], "the second box was shifted out"


@pytest.mark.parametrize(
    "augment",
    [
        {"hflip": 0.5},
        {"hflip": 0.5, "crop_padding": 3},
        {"hflip": 0.5, "random_resized_crop": (0.2, 1.0)},
    ],
    ids=["mirror", "shift", "crop"],
)
@pytest.mark.parametrize("stored", ["tensor", "list"])
def test_a_mask_follows_its_image(augment: dict[str, Any], stored: str) -> None:
    """The image is painted by its mask, in levels that bicubic rounding does not confuse inside of the blocks."""
    generator = np.random.default_rng(3)
    blocks = generator.integers(0, 2, (24, 4, 4), dtype=np.uint8)
    masks = np.repeat(np.repeat(blocks, 8, 1), 8, 2)
    images = np.repeat(masks[:, None] * 200 + 30, 3, 1).astype(np.uint8)
    image_size = 32 if stored == "tensor" else 40
    transform = make_transform(image_size=image_size, train=True, augment=augment, mean=(0, 0, 0), std=(1, 1, 1), seed=5,
                               whole=True)  # fmt: skip
    dense = DenseTransform(transform, train=True)
    pixels = torch.from_numpy(images) if stored == "tensor" else list(images.transpose(0, 2, 3, 1))
    ids, epoch = torch.arange(24), torch.full((24,), 2)
    found, placed = dense(pixels, list(masks), epoch=epoch, sample_ids=ids)
    alone = transform(pixels, epoch=epoch, sample_ids=ids)
    assert torch.equal(found, alone), "an image is the same with a mask as without"
    assert isinstance(placed, torch.Tensor) and placed.shape == (24, image_size, image_size)
    painted = (found[:, 0] * 255).round()
    expected = torch.where(placed == IGNORE, 0, placed.long() * 200 + 30)
    agree = (painted - expected).abs() < 100
    assert agree.float().mean() > 0.98, "but for the edges between blocks, which bicubic weights smooth"
    again = dense(pixels, list(masks), epoch=epoch + 1, sample_ids=ids)[1]
    assert not torch.equal(again, placed), "another epoch, other draws"


def test_boxes_follow_their_image() -> None:
    generator = np.random.default_rng(1)
    targets, images = [], np.zeros((40, 3, 32, 32), np.uint8)
    for number in range(40):
        top, left = generator.integers(0, 20, 2)
        images[number, :, top : top + 12, left : left + 9] = 255
        targets.append(boxes_of((32, 32), (left, top, left + 9, top + 12)))
    augment = {"hflip": 0.5, "random_resized_crop": (0.5, 1.0)}
    transform = make_transform(
        image_size=64, train=True, augment=augment, mean=(0, 0, 0), std=(1, 1, 1), seed=0, whole=True
    )
    found, placed = DenseTransform(transform, train=True)(
        torch.from_numpy(images), targets, epoch=torch.zeros(40, dtype=torch.int64), sample_ids=torch.arange(40)
    )
    assert sum(len(each.labels_N) for each in placed) >= 30  # type: ignore[union-attr]
    for image, target in zip(found[:, 0].numpy(), placed, strict=True):
        assert isinstance(target, Boxes) and target.size == (64, 64)
        for box in target.boxes_N4:
            rows, columns = np.nonzero(image > 0.5)
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(box - seen).max() <= 1.6


class DenseArrays(Source):
    """Random pixels with masks or boxes that are a function of the sample's number."""

    size: int = 8
    count: int = 9

    @property
    def classes(self) -> tuple[str, ...]:
        return ("zero", "one", "two")

    def listings(self) -> dict[str, Listing]:
        listing = Listing(np.zeros(self.count, np.int64), [f"sample-{number}" for number in range(self.count)])
        return {"train": listing, "test": listing}

    def read(self, split: str, numbers: Any, names: Any) -> Any:
        for number in numbers.tolist():
            pixels = np.random.default_rng(number).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
            yield WithTarget(pixels, self.target_for(number))

    def target_for(self, number: int) -> Any:
        return np.full((self.size, self.size), number % 3, np.uint8)


class Masks(DenseArrays):
    target: ClassVar[TargetKind] = "mask"


class SomeBoxes(DenseArrays):
    target: ClassVar[TargetKind] = "boxes"

    def target_for(self, number: int) -> Any:
        return boxes_of((self.size, self.size), *[(0, 0, 2 + k, 3) for k in range(number % 3)])


@pytest.fixture
def masks_folder(tmp_path: Path) -> Path:
    pack(Masks(encoding="raw", shard_samples=4), tmp_path / "masks", progress=False)
    return tmp_path / "masks"


def number_of(folder: Path, split: str = "train") -> list[int]:
    """Of the source, for each position."""
    keys = open_dataset(folder, split, tier="raw").index["key"]
    return [int(bytes(key).decode().rpartition("-")[2]) for key in keys]


@pytest.mark.parametrize("tier", ["raw", "resident", "jpeg"])
def test_every_tier_serves_the_same_masks(tier: Any, masks_folder: Path) -> None:
    dataset = open_dataset(masks_folder, tier=tier)
    found, bad = dataset.targets.fetch(np.array([4, 0, 8]))
    numbers = number_of(masks_folder)
    assert bad == []
    assert [mask.tolist() for mask in found] == [[[numbers[place] % 3] * 8] * 8 for place in (4, 0, 8)]
    assert dataset.targets is dataset.targets, "opened once"


def test_training_batches_are_the_same_for_any_workers_and_ranks(masks_folder: Path) -> None:
    subset = open_dataset(masks_folder, tier="resident").subset()
    transform = DenseTransform(
        make_transform(image_size=8, train=True, augment={"crop_padding": 2, "hflip": 0.5}, seed=1, whole=True), True
    )
    options: dict[str, Any] = {"global_batch": 6, "seed": 4, "transform": transform}
    one = [next(make_loader(subset, **options, consumed=6 * k)) for k in range(3)]
    workers = make_loader(subset, **options, num_workers=2)
    ranks = [make_loader(subset, **options, rank=rank, world_size=2) for rank in (0, 1)]
    for whole in one:
        assert torch.equal(whole.targets, next(workers).targets)  # type: ignore[arg-type]
        parts = torch.cat([next(rank).targets for rank in ranks])  # type: ignore[arg-type]
        assert torch.equal(whole.targets, parts)  # type: ignore[arg-type]
    numbers = np.array(number_of(masks_folder)) % 3
    first = one[0]
    for mask, place in zip(first.targets, first.sample_ids.tolist(), strict=True):  # type: ignore[arg-type]
        assert set(mask.unique().tolist()) <= {int(numbers[place]), IGNORE}
    workers.close()


def damage(folder: Path, position: int) -> None:
    """Flip a bit in the mask of one training sample."""
    dataset = open_dataset(folder, tier="raw")
    record = dataset.index[position]
    tar = folder / dataset.split.shards[int(record["shard"])].name
    content = bytearray(tar.read_bytes())
    content[int(record["target_offset"]) + 50] ^= 4
    tar.write_bytes(bytes(content))


@pytest.mark.parametrize("tier", ["raw", "resident"])
def test_a_sample_whose_mask_is_damaged_is_replaced_whole(tier: Any, masks_folder: Path) -> None:
    damage(masks_folder, 3)
    dataset = open_dataset(masks_folder, tier=tier)
    transform = DenseTransform(make_transform(image_size=8, train=False, whole=True), True)
    loader = make_loader(dataset.subset(), global_batch=9, seed=0, transform=transform, max_bad_share=0.5)
    batch = next(loader)
    assert batch.bad_ids.tolist() == [3]
    slot = batch.sample_ids.tolist().index(3)
    next_good = batch.sample_ids.tolist().index(4)
    assert torch.equal(batch.images[slot], batch.images[next_good])  # type: ignore[index]
    assert torch.equal(batch.targets[slot], batch.targets[next_good])  # type: ignore[index]


def test_without_any_sound_mask_training_stops(tmp_path: Path) -> None:
    pack(Masks(encoding="raw", count=1), tmp_path / "one", progress=False)
    damage(tmp_path / "one", 0)
    dataset = open_dataset(tmp_path / "one", tier="raw")
    with pytest.raises(DataError, match="no readable sample is left in a subset of 1"):
        next(make_loader(dataset.subset(), global_batch=1, seed=0))


def test_evaluation_leaves_targets_as_they_are_stored(tmp_path: Path) -> None:
    pack(SomeBoxes(encoding="raw"), tmp_path / "boxes", progress=False)
    subset = open_dataset(tmp_path / "boxes", "test", tier="raw").subset()
    transform = DenseTransform(make_transform(image_size=16, train=False, whole=True), False)
    numbers = number_of(tmp_path / "boxes", "test")
    (batch,) = make_eval_loader(subset, batch_size=9, transform=transform)
    assert batch.images.shape == (9, 3, 16, 16)  # type: ignore[union-attr]
    for target, number in zip(batch.targets, numbers, strict=True):  # type: ignore[arg-type]
        assert target.size == (8, 8) and len(target.labels_N) == number % 3


def test_windows_of_other_seeds_hold_other_images(masks_folder: Path) -> None:
    dataset = open_dataset(masks_folder, tier="raw")
    starts = {dataset.subset(3, seed).start for seed in range(12)}
    assert len(starts) > 3, "images have no class, so a window may begin anywhere"


def test_staged_copies_are_checked_with_their_masks(
    masks_folder: Path, tmp_path: Path, make: Callable[..., Any]
) -> None:
    subset = make(open_dataset(masks_folder, tier="raw").subset(), tmp_path / "staging")
    assert np.array_equal(
        subset.dataset.targets.fetch(np.arange(9))[0][2], np.full((8, 8), number_of(masks_folder)[2] % 3)
    )
    position = 2
    tar = subset.dataset.folder / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    content[int(subset.dataset.index[position]["target_offset"]) + 50] ^= 4
    tar.write_bytes(bytes(content))
    again = make(open_dataset(masks_folder, tier="raw").subset(), tmp_path / "staging")
    assert again.dataset.targets.fetch(np.array([2]))[1] == [], "a copy with a damaged mask is copied again"


@pytest.fixture
def make() -> Any:
    from dbscale.data.stage import release, stage_subset

    held = []

    def stage(subset: Any, folder: Path) -> Any:
        staged = stage_subset(subset, folder)
        held.append(staged.dataset.folder)
        return staged

    yield stage
    for folder in held:
        release(folder)
