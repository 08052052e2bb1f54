"""Packing: the same bytes always, restartable, mendable, readable by webdataset itself."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset.compat import WebDataset

from dbscale.data import DataError, load_manifest, open_dataset
from dbscale.errors import FileError
from dbscale.shards import pack as packing
from dbscale.shards.pack import ensure_packed, pack
from dbscale.shards.verify import verify
from tests.shards.conftest import make_source

SPEC = {"source": "imagefolder", "path": "photos", "shard_samples": 4}


pytestmark = [
    # webdataset leaves the tars it has read to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def packed(tree: Path, name: str = "photos", **options) -> Path:
    return ensure_packed(name, {**SPEC, **options}, tree.parent, progress=False)


def read_back(tars: list[str]) -> list[dict[str, Any]]:
    return list(WebDataset(tars, shardshuffle=False, empty_check=False).decode("pil"))  # type: ignore[arg-type]


def test_parallel_packing_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    source = make_source("imagefolder", path=str(tree), shard_samples=4)
    for name, count in (("one", 1), ("three", 3)):
        pack(source, tmp_path / name, name="x", jobs=count, progress=False)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    assert len(digests(tmp_path / "one")) == 6 + 2 + 2 + 1


def test_a_killed_pack_goes_on_and_ends_alike(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source("imagefolder", path=str(tree), shard_samples=4)
    pack(source, tmp_path / "whole", name="x", progress=False)
    written: list[str] = []
    run = packing.run_job

    def dying(source, job) -> list[str]:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(job.tar_path.name)
        return run(source, job)

    monkeypatch.setattr(packing, "run_job", dying)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "killed", name="x", progress=False)
    with pytest.raises(DataError, match="the folder holds no finished dataset"):
        load_manifest(tmp_path / "killed")

    def counting(source, job) -> list[str]:
        written.append(job.tar_path.name)
        return run(source, job)

    monkeypatch.setattr(packing, "run_job", counting)
    pack(source, tmp_path / "killed", name="x", progress=False)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert len(written) == len(set(written)) == 8  # no shard was written twice


def test_webdataset_reads_every_sample(tree: Path) -> None:
    folder = packed(tree)
    dataset = open_dataset(folder, image_size=12)
    tars = [str(folder / shard.name) for shard in dataset.split.shards]
    samples = read_back(tars)
    assert len(samples) == 23
    for position, sample in enumerate(samples):
        record = dataset.index[position]
        assert sample["__key__"].encode() == bytes(record["key"])
        assert sample["cls"] == record["label"]
        original = next(tree.glob(f"train/*/{sample['__key__'][9:].replace('_', '.')}.png"))
        assert np.array_equal(np.asarray(sample["png"]), np.asarray(Image.open(original)))
        assert original.parent.name == dataset.manifest.classes[sample["cls"]]


def test_raw_pixels_are_readable_by_webdataset_too(tmp_path: Path) -> None:
    source = make_source("fractals", families=3, num_train=12, num_test=3)
    pack(source, tmp_path / "f", progress=False)
    (tar,) = (tmp_path / "f").glob("train-*.tar")
    samples = read_back([str(tar)])
    assert len(samples) == 12
    pixels = open_dataset(tmp_path / "f", tier="raw").reader.fetch(np.arange(12))[0]
    for position, sample in enumerate(samples):
        assert np.array_equal(np.asarray(sample["ppm"]).transpose(2, 0, 1), pixels[position])


def test_packing_again_does_nothing(tree: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in packed(tree).iterdir()}
    assert {path: path.stat().st_mtime_ns for path in packed(tree).iterdir()} == before


def test_another_spec_under_the_same_name_is_refused(tree: Path) -> None:
    packed(tree)
    with pytest.raises(DataError, match=r"already packed with source = .* take another dataset name, or remove"):
        packed(tree, shard_samples=5)


def test_a_half_finished_pack_of_another_plan_is_refused(tree: Path, tmp_path: Path, monkeypatch) -> None:
    source = make_source("imagefolder", path=str(tree), shard_samples=4)
    monkeypatch.setattr("dbscale.shards.pack.run_jobs", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "x", progress=False)
    with pytest.raises(DataError, match="holds a half-finished pack of another plan"):
        pack(source.model_copy(update={"pack_seed": 1}), tmp_path / "x", progress=False)


@pytest.mark.parametrize("damage", ["cut", "grown", "missing", "index", "index missing"])
def test_damaged_files_are_mended_from_the_source(tree: Path, damage: str) -> None:
    folder = packed(tree)
    before = digests(folder)
    tar, index = folder / "train-000002.tar", folder / "train.index.npy"
    if damage == "cut":
        os.truncate(tar, 700)
    elif damage == "grown":
        tar.write_bytes(tar.read_bytes() + bytes(512))
    elif damage == "missing":
        tar.unlink()
    elif damage == "index":
        content = bytearray(index.read_bytes())
        content[300] ^= 4
        index.write_bytes(content)
    else:
        index.unlink()
    assert verify(folder)
    packed(tree)
    assert digests(folder) == before
    assert verify(folder) == []


def test_a_changed_source_cannot_mend(tree: Path, make_image) -> None:
    folder = packed(tree)
    (folder / "train-000000.tar").unlink()
    for path in tree.glob("train/*/*.png"):
        path.write_bytes(make_image(999))
    with pytest.raises(DataError, match="the source no longer gives the images that were packed"):
        packed(tree)


def test_names_and_shard_sizes_do_not_reach_the_fingerprint(tree: Path) -> None:
    first, second = load_manifest(packed(tree)), load_manifest(packed(tree, "other", shard_samples=9))
    assert first.fingerprint == second.fingerprint
    assert load_manifest(packed(tree, "seeded", pack_seed=1)).fingerprint != first.fingerprint
    assert load_manifest(packed(tree, "raw", encoding="raw", raw_size=8)).fingerprint != first.fingerprint


@pytest.mark.parametrize(("encoding", "suffix", "sides"), [("raw", "ppm", (9, 9)), ("jpeg256", "jpg", (256, 300))])
def test_encodings(tmp_path: Path, make_image, encoding: str, suffix: str, sides: tuple[int, int]) -> None:
    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / "t" / split / label).mkdir(parents=True)
            (tmp_path / "t" / split / label / "1.png").write_bytes(make_image(1, "PNG", (600, 512)))
    raw_size = 9 if encoding == "raw" else None
    source = make_source("imagefolder", path=str(tmp_path / "t"), encoding=encoding, raw_size=raw_size)
    manifest = pack(source, tmp_path / "out", progress=False)
    assert (manifest.image.min_side, manifest.image.max_side) == sides
    (sample, _) = read_back([str(tmp_path / "out" / "train-000000.tar")])
    assert sample[suffix].size == (sides[1], sides[0])
    assert verify(tmp_path / "out") == []


def test_a_small_jpeg_keeps_its_bytes_as_jpeg256(tmp_path: Path, make_image) -> None:
    data = make_image(1, "JPEG", (200, 300))
    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / "t" / split / label).mkdir(parents=True)
            (tmp_path / "t" / split / label / "1.jpg").write_bytes(data)
    source = make_source("imagefolder", path=str(tmp_path / "t"), encoding="jpeg256")
    pack(source, tmp_path / "out", progress=False)
    assert data in (tmp_path / "out" / "train-000000.tar").read_bytes()


@pytest.mark.parametrize("count", [1, 2])
def test_all_files_that_cannot_be_packed_are_named_at_once(tree: Path, count: int) -> None:
    (tree / "train/kind-0/notes.txt").write_text("not an image")
    (tree / "train/kind-1/gone.png").symlink_to(tree / "nowhere.png")
    (tree / "test/kind-2/empty.png").touch()
    with pytest.raises(DataError) as caught:
        pack(make_source("imagefolder", path=str(tree), shard_samples=4), tree / "out", jobs=count, progress=False)
    message = str(caught.value)
    assert f"{tree}/train/kind-0/notes.txt: not an image: 12 bytes that begin with b'not an i'" in message
    assert f"{tree}/train/kind-1/gone.png: cannot be read (No such file or directory)" in message
    assert f"{tree}/test/kind-2/empty.png: not an image: 0 bytes" in message
    assert f"(and 2 more: {tree}" in message
    assert "list them under the source's `exclude`" in message
    # What it tells to do next works.
    assert f"remove the half-finished {tree / 'out'}, then run the same command again" in message
    shutil.rmtree(tree / "out")
    (tree / "train/kind-0/notes.txt").unlink()
    exclude = ["train/kind-1/gone.png", "test/kind-2/empty.png"]
    source = make_source("imagefolder", path=str(tree), exclude=exclude, shard_samples=4)
    assert pack(source, tree / "out", jobs=count, progress=False).split("train").num_samples == 23


def test_a_full_disk_is_said_and_finished_shards_are_kept(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"the disk is full .* free some space and run the same command again"):
        packed(tree)
    folder = tree.parent / "shards" / "photos"
    assert len(list(folder.glob("*.tar"))) >= 1 and not list(folder.glob("*.tmp"))
    monkeypatch.setattr(os, "fsync", real)
    assert verify(packed(tree)) == []


@pytest.mark.parametrize("encoding", ["original", "raw"])
def test_variants_that_cannot_be_decoded_are_known_when_packing(tree: Path, encoding: str) -> None:
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tree / "train/kind-0/float.tif")
    source = make_source("imagefolder", path=str(tree), encoding=encoding)
    with pytest.raises(DataError, match=r"train/kind-0/float.tif: grey values of 32 bits from 0.5 to 0.5"):
        pack(source, tree / "out", progress=False)


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "TGA", "WEBP", "TIFF"])
def test_other_formats_are_packed_as_they_are(tree: Path, make_image, kind: str) -> None:
    """And decode in training as Pillow shows them."""
    for path in list(tree.glob("*/*/*.png")):
        path.write_bytes(make_image(int(path.stem.rsplit(".", 1)[1]), kind))
    pack(make_source("imagefolder", path=str(tree)), tree / "out", progress=False)
    images, bad = open_dataset(tree / "out", image_size=12).reader.fetch(np.arange(23))
    assert not bad and verify(tree / "out") == []
    expected = {np.asarray(Image.open(path).convert("RGB")).tobytes() for path in tree.glob("train/*/*.png")}
    assert {image.transpose(1, 2, 0).tobytes() for image in np.asarray(images)} == expected
