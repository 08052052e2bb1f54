"""What all sources share: strict options, the stored order, splits, and noticing that a source changed."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dbscale.data import load_manifest
from dbscale.data.manifest import save_manifest
from dbscale.errors import ConfigError, DataError
from dbscale.shards.pack import ensure_packed, pack
from dbscale.shards.source import Listing, printable, split_off, stratified_order
from dbscale.shards.sources import KINDS, source_change, source_of
from dbscale.shards.verify import exact_source_change
from tests.shards.conftest import make_source


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"source": "zip"}, r"dataset 'd' has the unknown source 'zip'; known: ade20k, cifar, coco, digits, "),
        ({"source": "imagefoldr"}, "did you mean 'imagefolder'"),
        ({"path": "x"}, "dataset 'd' names no `source`"),
        ({"source": ["x"]}, "has the unknown source"),
        ({"source": "fractals", "famillies": 3}, r"dataset 'd' \(source fractals\): unknown key 'famillies'; did you"),
        ({"source": "imagefolder"}, "missing key 'path'"),
        ({"source": "fractals", "num_train": 100.0}, "num_train: input should be a valid integer, found 100.0"),
        ({"source": "fractals", "num_train": "100"}, "num_train: input should be a valid integer, found '100'"),
        ({"source": "fractals", "families": 9, "num_test": 8}, "num_test is 8, it must be at least 9, one a family"),
        ({"source": "fractals", "tinted": 1}, "tinted: input should be a valid boolean"),
        ({"source": "digits", "num_test": 1790}, "num_test: input should be less than or equal to 1787, found 1790"),
        ({"source": "digits", "image_size": 0}, "image_size: input should be greater than or equal to 1"),
        ({"source": "imagefolder", "path": ["ok"]}, r"path: expected a text, found \['ok'\]"),
        ({"source": "imagefolder", "path": "ok", "class_list": [0, 1]}, r"class_list: expected a list .* found \[0, 1\]"),
        ({"source": "imagefolder", "path": "ok", "class_list": ["a", "a"]}, "class_list: names a class twice: a"),
        ({"source": "imagefolder", "path": "ok", "exclude": "a.png"}, "exclude: input should be a valid array"),
        ({"source": "imagefolder", "path": "ok", "test": 1.5}, "test: as a share it lies between 0 and 1, found 1.5"),
        ({"source": "imagefolder", "path": "ok", "test": 1}, "test: as a share it lies between 0 and 1, found 1"),
        ({"source": "imagefolder", "path": "ok", "train": None}, "train: expected a text, found None"),
        ({"source": "webdataset", "path": "w", "class_names": "a, b, c"}, r"class_names: expected a list .* found 'a, b"),
        ({"source": "parquet", "path": "w", "train": [1]}, "train: expected a text, found 1"),
        ({"source": "parquet", "path": "w", "train": []}, "train: expected a pattern such as"),
        ({"source": "cifar", "path": "w", "encoding": "jpeg"}, "encoding: input should be 'original', 'jpeg256' or 'raw'"),
        ({"source": "cifar", "path": "w", "raw_size": 0}, "raw_size: input should be greater than or equal to 1"),
        ({"source": "cifar", "path": "w", "allow_unused": 2}, "allow_unused: input should be less than or equal to 1"),
        ({"source": "cifar", "path": "w", "spool": "/tmp"}, "unknown key 'spool'"),
    ],
)  # fmt: skip
def test_options_are_checked_as_every_other_key_of_a_grid(entry: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        source_of("d", entry)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_documented_and_travels_without_what_it_cached(kind: str, tree: Path) -> None:
    assert KINDS[kind].__doc__
    fields = KINDS[kind].model_fields
    needs_path = "path" in fields
    options = {"path": "photos"} if needs_path else {}
    if "class_names" in fields and fields["class_names"].is_required():
        options["class_names"] = ["background", "bird"]
    source = make_source(kind, data_dir=tree.parent, **options, pack_seed=3)
    source.__dict__["_cached"] = np.zeros(100_000)
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 2000
    assert copy == make_source(kind, data_dir=tree.parent, **options, pack_seed=3)
    assert not needs_path or copy.root == tree


def test_the_stored_order_never_drifts() -> None:
    """Fingerprints and subsets of old runs hang on it: class after class in turn, ties in shuffled order."""
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    assert stratified_order(labels, 0, "train").tolist() == [0, 7, 5, 1, 9, 4, 8, 2, 6, 3]
    assert stratified_order(labels, 1, "train").tolist() == [6, 5, 2, 1, 8, 4, 9, 0, 3, 7]
    assert stratified_order(labels, 0, "test").tolist() == [4, 3, 8, 5, 1, 9, 2, 6, 0, 7]


def test_a_share_is_taken_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [10, 2, 5])
    parts = split_off(Listing(labels, [f"n{k}" for k in range(17)]), 0.5, "here")
    assert {name: np.bincount(part.labels).tolist() for name, part in parts.items()} == {
        "train": [5, 1, 3],
        "test": [5, 1, 2],
    }
    assert sorted(parts["train"].names + parts["test"].names) == sorted(f"n{k}" for k in range(17))
    for part in parts.values():
        assert [labels[int(name[1:])] for name in part.names] == part.labels.tolist()
    least = split_off(Listing(labels, [""] * 17), 0.01, "here")["test"]
    assert np.bincount(least.labels).tolist() == [1, 1, 1]
    most = split_off(Listing(labels, [""] * 17), 0.99, "here")["train"]
    assert np.bincount(most.labels).tolist() == [1, 1, 1]


def test_texts_that_are_not_utf8_can_be_printed() -> None:
    assert printable("café") == "café"
    assert printable(os.fsdecode(b"caf\xe9/\xff")) == "caf\\xe9/\\xff"
    printable("\ud800").encode()


def test_labels_beyond_the_classes_are_refused_whatever_the_source(tmp_path: Path) -> None:
    source = make_source("fractals", families=3, num_train=6, num_test=3)
    listings = source.listings()
    listings["train"].labels[4] = 3
    object.__setattr__(source, "listings", lambda: listings)
    with pytest.raises(DataError, match=r"f00001-000001: label 3 is out of range 0…2"):
        pack(source, tmp_path / "out", progress=False)


def test_a_source_that_changed_is_noticed(tree: Path, make_image) -> None:
    """Quickly by the times of folders; exactly by its listing, and by the bytes of files newer than the pack."""
    folder = ensure_packed("photos", {"source": "imagefolder", "path": "photos"}, tree.parent, progress=False)
    assert source_change(folder, tree.parent) is None
    assert exact_source_change(folder, tree.parent) is None
    time.sleep(0.02)
    os.utime(tree / "train/kind-0")
    assert source_change(folder, tree.parent) is None  # a newer folder with the same files
    before = load_manifest(folder)
    path = tree / "train/kind-1/train.1.2.png"
    whole = path.read_bytes()
    path.write_bytes(make_image(77))
    assert source_change(folder, tree.parent) is None  # no name changed
    change = exact_source_change(folder, tree.parent)
    assert change is not None and f"other images in place of 1 packed ones, the first {path}" in change
    path.write_bytes(whole)
    assert exact_source_change(folder, tree.parent) is None
    (tree / "train/kind-0/new.png").write_bytes(make_image(900))
    for change in (source_change(folder, tree.parent), exact_source_change(folder, tree.parent)):
        assert change is not None
        assert "now holds other files (24 train samples, 23 are packed, 7 test samples, 7 are packed)" in change
        assert f"remove {folder} to pack it anew" in change
    (tree / "train/kind-0/new.png").unlink()
    (tree / "test/kind-2/test.2.0.png").rename(tree / "test/kind-2/renamed.png")
    assert "now holds other files" in str(source_change(folder, tree.parent))
    assert load_manifest(folder) == before
    os.rename(tree, tree.parent / "gone")
    assert source_change(folder, tree.parent) is None and exact_source_change(folder, tree.parent) is None


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "cifar"])
def test_archives_that_changed_are_noticed(tmp_path: Path, make_image, kind: str) -> None:
    """An image is exchanged for another of its size, then a file is added."""
    folder = tmp_path / "in"
    folder.mkdir()
    images = [make_image(number, "BMP") for number in range(8)]

    def write(name: str, chosen: list[bytes]) -> None:
        if kind == "webdataset":
            with tarfile.open(folder / f"{name}.tar", "w") as archive:
                for number, image in enumerate(chosen):
                    for suffix, data in (("bmp", image), ("cls", b"%d" % (number % 2))):
                        info = tarfile.TarInfo(f"{number}.{suffix}")
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))
        elif kind == "parquet":
            table = pa.table(
                {"image": pa.array([{"bytes": data} for data in chosen]), "label": [0, 1, 0, 1][: len(chosen)]}
            )
            pq.write_table(table, folder / f"{name}.parquet")
        else:
            for part in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
                records = [bytes([number % 2]) + (image * 10)[:3072] for number, image in enumerate(chosen)]
                (folder / f"{part}.bin").write_bytes(b"".join(records if part == "data_batch_1" else records[:2]))
            (folder / "batches.meta.txt").write_text("a\nb\n")

    write("train-0", images[:4])
    entry = {"source": kind, "path": "in", **({} if kind == "cifar" else {"test": None})}
    packed = ensure_packed("x", entry, tmp_path, progress=False)
    assert source_change(packed, tmp_path) is None and exact_source_change(packed, tmp_path) is None
    write("train-0", [*images[:2], images[7], images[3]])
    assert source_change(packed, tmp_path) is None
    assert "other images in place of 1 packed ones" in str(exact_source_change(packed, tmp_path))
    write("train-0", images[:4])
    assert exact_source_change(packed, tmp_path) is None
    write("train-0" if kind == "cifar" else "train-1", images[:5] if kind == "cifar" else images[4:6])
    for change in (source_change(packed, tmp_path), exact_source_change(packed, tmp_path)):
        assert "its source now holds other files (" in str(change)


@pytest.mark.parametrize("entry", [{"source": "gone"}, {"source": "imagefolder", "path": "photos", "typo": 1}])
def test_an_entry_that_is_no_longer_valid_is_a_sentence(tree: Path, entry: dict) -> None:
    folder = ensure_packed("photos", {"source": "imagefolder", "path": "photos"}, tree.parent, progress=False)
    save_manifest(folder, load_manifest(folder).model_copy(update={"source": entry}))
    assert str(source_change(folder, tree.parent)).startswith("its source cannot be listed again: dataset 'photos'")


def test_the_checks_of_a_plan_need_no_heavy_package() -> None:
    heavy = {"torch", "pyarrow", "scipy", "sklearn", "pandas"}
    code = f"import sys, dbscale.shards.sources; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_sources_without_files_never_change(tmp_path: Path) -> None:
    entry = {"source": "fractals", "families": 2, "num_train": 4, "num_test": 2}
    folder = ensure_packed("f", entry, tmp_path, progress=False)
    assert source_change(folder, tmp_path) is None and exact_source_change(folder, tmp_path) is None
