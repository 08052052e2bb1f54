"""`verify` finds every kind of damage and names the sample; `describe` says what there is."""

import io
import os
from pathlib import Path

import numpy as np
import pytest

from dbscale.data import open_dataset
from dbscale.data.manifest import load_manifest, save_manifest
from dbscale.data.read import file_checksum
from dbscale.launch.cli import main
from dbscale.shards.pack import ensure_packed
from dbscale.shards.verify import describe, verify

SPEC = {"source": "imagefolder", "path": "photos", "shard_samples": 4}


@pytest.fixture
def packed(tree: Path) -> Path:
    return ensure_packed("photos", SPEC, tree.parent, progress=False)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_sound_dataset_has_no_problems(packed: Path) -> None:
    assert verify(packed) == []
    assert verify(packed, jobs=2) == []


def test_changed_bytes_are_found(packed: Path) -> None:
    record = open_dataset(packed, tier="jpeg").index[5]
    overwrite(packed / "train-000001.tar", int(record["offset"]) + 60, b"\xff")
    (problem,) = verify(packed)
    assert (problem.file, problem.key) == ("train-000001.tar", bytes(record["key"]).decode())
    mend = f"remove train-000001.tar and run `dbscale shards pack photos --data {packed.parent.parent}`"
    assert problem.what.startswith(f"checksum mismatch: the bytes changed since packing; {mend}")
    (packed / "train-000001.tar").unlink()
    assert main(["shards", "pack", "photos", "--data", str(packed.parent.parent)]) == 0
    assert verify(packed) == []


def test_cut_missing_and_corrupt_shards_are_found(packed: Path) -> None:
    size = (packed / "train-000001.tar").stat().st_size
    os.truncate(packed / "train-000001.tar", size - 1024)
    (packed / "train-000003.tar").unlink()
    overwrite(packed / "test-000000.tar", 2, b"\xff\xff")
    cut, missing, corrupt = verify(packed)
    assert cut.what.startswith(f"has {size - 1024:,} bytes, expected {size:,}; run `dbscale shards pack photos")
    assert missing.what.startswith("missing; run `dbscale shards pack photos")
    assert corrupt.what.startswith("corrupt tar header (bad checksum); remove test-000000.tar and run `dbscale")


def test_a_tar_newer_than_its_index_is_found(packed: Path) -> None:
    """Two shards of equal size swapped: every byte is sound, and nothing is where the index says."""
    one, two = packed / "train-000000.tar", packed / "train-000001.tar"
    if one.stat().st_size != two.stat().st_size:
        pytest.skip("the shards of this tree happen to differ in size")
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    problems = verify(packed)
    assert len(problems) == 8
    assert all("the index is older than the tar" in problem.what for problem in problems)


def test_labels_that_differ_are_found(packed: Path) -> None:
    content = (packed / "test-000000.tar").read_bytes()
    position = content.index(b".cls")
    header = position - position % 512
    overwrite(packed / "test-000000.tar", header + 512, b"9")
    (problem,) = verify(packed)
    assert "label in the tar differs from the index" in problem.what


def forge(folder: Path, change) -> None:
    """Rewrite the index and its checksum, as a broken writer could."""
    manifest = load_manifest(folder)
    split = manifest.split("train")
    index = np.load(folder / split.index)
    change(index)
    buffer = io.BytesIO()
    np.save(buffer, index)
    (folder / split.index).write_bytes(buffer.getvalue())
    split = split.model_copy(update={"index_checksum": file_checksum(folder / split.index)})
    save_manifest(folder, manifest.model_copy(update={"splits": {**manifest.splits, "train": split}}))


def test_duplicate_keys_and_labels_out_of_range_are_found(packed: Path) -> None:
    def change(index: np.ndarray) -> None:
        index["key"][3] = index["key"][4]
        index["label"][7] = 3  # as many as there are classes: the smallest that is wrong
        index["label"][8] = -1

    forge(packed, change)
    texts = [str(problem) for problem in verify(packed)]
    assert any("key occurs 2 times" in text for text in texts)
    assert any("label 3 is out of range 0…2" in text for text in texts)
    assert any("label -1 is out of range 0…2" in text for text in texts)
    assert any("does not have the fingerprint of the manifest" in text for text in texts)


def test_undecodable_images_are_listed(tree: Path) -> None:
    path = sorted((tree / "train/kind-0").iterdir())[0]
    path.write_bytes(path.read_bytes()[:150])
    folder = ensure_packed("photos", SPEC, tree.parent, progress=False)
    (problem,) = verify(folder)
    assert "train_0_0" in str(problem) and "damaged png" in problem.what
    assert "remove" not in problem.what  # packing again would not help


def test_describe(packed: Path) -> None:
    text = describe(packed, classes=True)
    assert "photos: 3 classes, original images of 12 px" in text
    assert "train: 23 samples in 6 shards" in text
    assert "6 to 10 samples a class; every prefix is class-balanced within one up to 18 samples (6 a class)" in text
    assert load_manifest(packed).fingerprint in text
    assert "      0  kind-0     10     3" in text
