"""Damaged shards stop with the mending command; a bad sample is replaced and counted."""

import errno
import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dbscale.data import DataError, Dataset, make_eval_loader, make_loader, make_transform, open_dataset, read
from dbscale.data.dataset import Tier
from dbscale.data.manifest import Encoding, load_manifest, save_manifest
from dbscale.data.read import file_checksum, save_index


def damage(folder: Path, position: int, split: str = "train") -> None:
    """Flip one byte in the middle of a sample."""
    dataset = open_dataset(folder, split, image_size=8)
    record = dataset.index[position]
    path = folder / dataset.split.shards[int(record["shard"])].name
    with open(path, "r+b") as file:
        file.seek(int(record["offset"]) + int(record["size"]) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


@pytest.fixture(params=["resident", "raw"])
def open_small(request: pytest.FixtureRequest) -> Callable[..., Dataset]:
    return lambda folder, split="train": open_dataset(folder, split, tier=request.param)


def test_a_cut_shard_is_named_with_both_sizes(own_folder: Path, open_small: Callable[..., Dataset]) -> None:
    path = own_folder / "train-000002.tar"
    expected = path.stat().st_size
    os.truncate(path, expected - 512)
    loader = make_loader(open_small(own_folder).subset(), global_batch=53, seed=0)
    with pytest.raises(
        DataError, match=rf"train-000002.tar: shard has {expected - 512:,} bytes, expected {expected:,}"
    ):
        next(loader)


def test_a_missing_shard_names_the_command(own_folder: Path, open_small: Callable[..., Dataset]) -> None:
    (own_folder / "train-000001.tar").unlink()
    loader = make_loader(open_small(own_folder).subset(), global_batch=53, seed=0)
    with pytest.raises(DataError, match=r"train-000001\.tar: shard is missing; pack it again with the same options"):
        next(loader)


def test_a_disk_that_fails_stops_the_run(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    loader = make_loader(open_dataset(own_folder, tier="jpeg").subset(), global_batch=53, seed=0)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=r"train-00000\d\.tar, sample '.*': cannot be read \(Input/output error\)"):
        next(loader)


def test_an_error_reaches_the_caller_from_a_worker(own_folder: Path) -> None:
    (own_folder / "train-000001.tar").unlink()
    loader = make_loader(open_dataset(own_folder, tier="raw").subset(), global_batch=53, seed=0, num_workers=2)
    with pytest.raises(DataError) as caught:
        next(loader)
    assert str(caught.value).startswith(f"{own_folder / 'train-000001.tar'}: shard is missing")  # no traceback first
    loader.close()


def rewrite_index(folder: Path, change: Callable[[np.ndarray], object], *, also_manifest: bool = False) -> None:
    """Change the records of the train index; `also_manifest` gives it the manifest's blessing, as a broken writer would."""
    manifest = load_manifest(folder)
    split = manifest.split("train")
    index = np.load(folder / split.index)
    change(index)
    checksum = save_index(folder / split.index, index)
    if also_manifest:
        split = split.model_copy(update={"index_checksum": checksum})
        save_manifest(folder, manifest.model_copy(update={"splits": {**manifest.splits, "train": split}}))


def reverse_labels(index: np.ndarray) -> None:
    index["label"] = index["label"][::-1].copy()


def flip_a_bit(index: np.ndarray) -> None:
    index["offset"][3] ^= 1


@pytest.mark.parametrize("tier", ["raw", "resident", "jpeg"])
@pytest.mark.parametrize("change", [reverse_labels, flip_a_bit])
def test_an_index_that_changed_is_refused(own_folder: Path, tier: Tier, change: Callable[[np.ndarray], object]) -> None:
    open_dataset(own_folder, tier=tier).subset().labels.sum()  # sound: what changes later is looked at again
    expected = load_manifest(own_folder).split("train").index_checksum
    rewrite_index(own_folder, change)
    with pytest.raises(DataError) as caught:
        next(make_loader(open_dataset(own_folder, tier=tier).subset(), global_batch=8, seed=0))
    message = str(caught.value)
    assert message.startswith(f"{own_folder / 'train.index.npy'}: index damaged or of another dataset (checksum ")
    assert f"the manifest expects {expected}); pack it again with the same options" in message


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "swapped", "foreign"])
def test_an_index_of_other_bytes_is_refused(own_folder: Path, make_folder_of: Callable[..., Path], damage: str) -> None:
    path = own_folder / "train.index.npy"
    if damage == "foreign":
        path.write_bytes((make_folder_of((3, 3)) / "train.index.npy").read_bytes())
    elif damage == "swapped":
        path.write_bytes((own_folder / "test.index.npy").read_bytes())
    else:
        path.write_bytes({"cut": path.read_bytes()[:-7], "empty": b"", "text": b"no array"}[damage])
    with pytest.raises(DataError, match="index damaged or of another dataset"):
        open_dataset(own_folder, tier="raw").subset().labels.sum()


def test_an_absent_index_is_named(own_folder: Path) -> None:
    (own_folder / "train.index.npy").unlink()
    with pytest.raises(DataError, match=r"index missing or unreadable \(No such file or directory\); pack it again"):
        open_dataset(own_folder, tier="raw").subset().labels.sum()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label", 4, "has label 4, expected 0…3"),
        ("label", -1, "has label -1, expected 0…3"),
        ("shard", 8, "has shard 8, expected 0…7"),
    ],
)
def test_values_out_of_range_are_found_at_open(own_folder: Path, field: str, value: int, message: str) -> None:
    """Even where the manifest calls the index its own: it was written wrongly."""

    def change(index: np.ndarray) -> None:
        index[field][5] = value

    key = bytes(open_dataset(own_folder).index["key"][5]).decode()
    rewrite_index(own_folder, change, also_manifest=True)
    with pytest.raises(DataError) as caught:
        open_dataset(own_folder).subset().labels.sum()
    assert f"train.index.npy: sample {key!r} {message}; it was written wrongly: remove {own_folder}" in str(
        caught.value
    )


def test_the_index_is_checked_once_in_a_process(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(read, "file_checksum", lambda path: calls.append(path) or file_checksum(path))
    for _ in range(3):
        open_dataset(own_folder, tier="raw").subset().labels.sum()
    assert calls == [own_folder / "train.index.npy"]
    os.utime(own_folder / "train.index.npy")
    open_dataset(own_folder, tier="raw").subset().labels.sum()
    assert len(calls) == 2


def test_shards_that_changed_places_stop_the_run(own_folder: Path) -> None:
    """Of one size, so that only the samples' own checksums tell."""
    one, two = own_folder / "train-000000.tar", own_folder / "train-000001.tar"
    assert one.stat().st_size == two.stat().st_size
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    loader = make_loader(open_dataset(own_folder, tier="raw").subset(), global_batch=53, seed=0)
    with pytest.raises(
        DataError, match=r"samples are unreadable, more than the allowed share|no readable sample of class"
    ):
        next(loader)


@pytest.mark.parametrize("num_samples", [8, 53])
def test_one_bad_image_does_not_stop_a_small_set(own_folder: Path, num_samples: int) -> None:
    """1 % of 8 and of 53 samples is none; one is always allowed, two are not."""
    damage(own_folder, 2)
    loader = make_loader(open_dataset(own_folder, tier="raw").subset(num_samples), global_batch=num_samples, seed=0)
    assert [next(loader).bad_ids.tolist() for _ in range(3)] == [[2]] * 3
    damage(own_folder, 3)
    loader = make_loader(open_dataset(own_folder, tier="raw").subset(num_samples), global_batch=num_samples, seed=0)
    with pytest.raises(DataError, match=f"2 of {num_samples} samples are unreadable|no readable sample"):
        next(loader)


@pytest.mark.parametrize(
    ("num_bad", "share", "stops"),
    [(2, 0.03, True), (2, 0.04, False), (3, 0.04, True), (1, 0.01, False), (2, 0.01, True)],
)
def test_the_allowed_share_is_of_the_subset(own_folder: Path, num_bad: int, share: float, stops: bool) -> None:
    """One bad image never stops a set, however small: of 50, an allowed 1 % would be none."""
    for position in range(num_bad):
        damage(own_folder, position)
    subset = open_dataset(own_folder, tier="raw").subset(50)
    loader = make_loader(subset, global_batch=50, seed=0, max_bad_share=share)
    if stops:
        with pytest.raises(DataError, match=f"{num_bad} of 50 samples are unreadable"):
            next(loader)
    else:
        assert sorted(next(loader).bad_ids.tolist()) == list(range(num_bad))


def test_a_bad_sample_is_replaced_by_the_next_of_its_class(
    own_folder: Path, open_small: Callable[..., Dataset]
) -> None:
    good = next(make_loader(open_dataset(own_folder, tier="raw").subset(), global_batch=53, seed=0))
    damage(own_folder, 6)
    subset = open_small(own_folder).subset()
    loader = make_loader(subset, global_batch=53, seed=0, max_bad_share=0.1)
    batch = next(loader)
    assert batch.bad_ids.tolist() == [6]
    successor = next(position for position in range(7, 53) if subset.labels[position] == subset.labels[6])
    pixels = dict(zip(good.sample_ids.tolist(), good.images, strict=True))
    for number, image in zip(batch.sample_ids.tolist(), batch.images, strict=True):
        assert torch.equal(torch.as_tensor(image), torch.as_tensor(pixels[successor if number == 6 else number]))
    assert torch.equal(batch.labels, good.labels)
    assert batch.weights.min() == 1


def test_more_bad_samples_than_allowed_stop_the_run(own_folder: Path, open_small: Callable[..., Dataset]) -> None:
    damage(own_folder, 6)
    damage(own_folder, 20)
    loader = make_loader(open_small(own_folder).subset(), global_batch=53, seed=0, max_bad_share=0.01)
    with pytest.raises(DataError, match="2 of 53 samples are unreadable, more than the allowed share"):
        next(loader)


def test_a_class_without_a_readable_sample_stops_the_run(own_folder: Path) -> None:
    for position in range(8):
        damage(own_folder, position)
    loader = make_loader(open_dataset(own_folder, tier="raw").subset(8), global_batch=8, seed=0, max_bad_share=1)
    with pytest.raises(DataError, match="no readable sample of class 'class-"):
        next(loader)


def test_a_bad_evaluation_sample_weighs_nothing(own_folder: Path, open_small: Callable[..., Dataset]) -> None:
    damage(own_folder, 6, "test")
    (batch,) = make_eval_loader(open_small(own_folder, "test").subset(), batch_size=53)
    assert batch.bad_ids.tolist() == [6]
    assert batch.weights.sum() == 52
    assert batch.weights[6] == 0


@pytest.mark.parametrize("encoding", ["original", "jpeg256", "raw"])
def test_photographs_come_as_they_are(jpeg_folder: Callable[[Encoding], Path], encoding: Encoding) -> None:
    """All encodings of a photograph show the same picture."""
    transform = make_transform(image_size=224, train=False, tier="jpeg", mean=(0, 0, 0), std=(1, 1, 1))
    subset = open_dataset(jpeg_folder(encoding), "train").subset()
    (batch,) = make_eval_loader(subset, batch_size=18, transform=transform)
    (plain,) = make_eval_loader(
        open_dataset(jpeg_folder("original"), "train").subset(), batch_size=18, transform=transform
    )
    assert isinstance(batch.images, torch.Tensor) and isinstance(plain.images, torch.Tensor)
    assert batch.images.shape == (18, 3, 224, 224)
    # 256-short copies are resized and compressed once more; raw ones are cut to their central square first.
    assert (batch.images - plain.images).abs().mean() < {"original": 1e-9, "jpeg256": 0.03, "raw": 0.03}[encoding]


@pytest.mark.parametrize("encoding", ["original", "jpeg256"])
def test_photographs_load_the_same_with_workers(jpeg_folder: Callable[[Encoding], Path], encoding: Encoding) -> None:
    augment = {"random_resized_crop": (0.08, 1.0), "hflip": 0.5}
    transform = make_transform(image_size=64, train=True, augment=augment, seed=1, tier="jpeg")
    subset = open_dataset(jpeg_folder(encoding)).subset(17)
    plain, workers = (make_loader(subset, global_batch=6, seed=0, transform=transform, num_workers=n) for n in (0, 2))
    for _ in range(4):
        ours, theirs = next(plain), next(workers)
        assert all(torch.equal(a, b) for a, b in zip(ours[:-1], theirs[:-1], strict=True))  # type: ignore[arg-type]
    workers.close()


def test_files_are_closed_with_their_last_reader(folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folder, tmp_path / "copy")  # which nobody else reads

    def opened() -> list[str]:
        links = (os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
        return [link for link in links if link.startswith(str(folder.resolve())) and link.endswith(".tar")]

    dataset = open_dataset(folder, tier="jpeg")
    dataset.reader.fetch(np.arange(3))
    assert opened()
    del dataset
    gc.collect()
    assert not opened()


def test_the_default_tier_follows_the_encoding(folder: Path, jpeg_folder: Callable[[Encoding], Path]) -> None:
    assert open_dataset(folder).tier == "resident"
    assert [open_dataset(jpeg_folder(e)).tier for e in ("original", "jpeg256", "raw")] == ["jpeg", "jpeg256", "raw"]
    assert load_manifest(jpeg_folder("raw")).image.square
    with pytest.raises(DataError, match="the resident tier needs one size: pass image_size"):
        open_dataset(jpeg_folder("original"), tier="resident")
    small = open_dataset(jpeg_folder("original"), tier="resident", image_size=32).subset(3)
    assert np.asarray(next(make_loader(small, global_batch=3, seed=0)).images).shape == (3, 3, 32, 32)
