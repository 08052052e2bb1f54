"""Parquet: labels as numbers, named numbers, texts or categories; the same name is the same class in every file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dbscale.data import DataError, open_dataset
from dbscale.shards.pack import pack
from tests.shards.conftest import make_source

Image = Callable[..., bytes]


def write_parquet(path: Path, images: list[bytes], labels: Any, names: list[str] | None = None) -> None:
    column = pa.array([{"bytes": data, "path": None} for data in images])
    table = pa.table({"image": column, "label": labels})
    if names is not None:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=3)


@pytest.mark.parametrize("names", [None, ["cat", "dog"]])
def test_parquet(tmp_path: Path, make_image: Image, names: list[str] | None) -> None:
    images = [make_image(number) for number in range(13)]
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", images[:7], [0, 1, 0, 1, 0, 1, 0], names)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", images[7:10], [1, 1, 0], names)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", images[10:], [0, 1, 1], names)
    source = make_source("parquet", data_dir=tmp_path, path="data", shard_samples=4)
    assert source.classes == (tuple(names) if names else ("0", "1"))
    manifest = pack(source, tmp_path / "out", progress=False)
    assert manifest.split("train").class_counts == (5, 5)
    dataset = open_dataset(tmp_path / "out", tier="jpeg")
    stored = {dataset.reader.files.read(position) for position in range(10)}  # type: ignore[attr-defined]
    assert stored == set(images[:10])
    assert not (tmp_path / "out/.pack").exists()


def test_parquet_bad_input(tmp_path: Path, make_image: Image) -> None:
    def source(**options: str):
        return make_source("parquet", path=str(tmp_path), test=None, **options)

    with pytest.raises(DataError, match=r"no parquet file matches 'train-\*.parquet'"):
        source().listings()
    write_parquet(tmp_path / "train-0.parquet", [make_image(1)] * 2, [0, -1], ["cat"])
    with pytest.raises(DataError, match=r"train-0.parquet, row 1: label -1 is negative, which means unlabelled"):
        source().listings()
    with pytest.raises(DataError, match="no column 'img'; it has: image, label"):
        source(image_column="img").listings()
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match="not a readable parquet file"):
        source().listings()


def counts_of(tmp_path: Path) -> dict[str, dict[str, int]]:
    """Samples of each class by name, as packed."""
    manifest = pack(make_source("parquet", path=str(tmp_path)), tmp_path / "out", progress=False)
    return {
        name: dict(zip(manifest.classes, split.class_counts, strict=True)) for name, split in manifest.splits.items()
    }


def test_classes_are_matched_by_name_between_files(tmp_path: Path, make_image: Image) -> None:
    images = [make_image(number) for number in range(9)]
    write_parquet(tmp_path / "train-0.parquet", images[:3], [0, 0, 1], ["cat", "dog"])
    write_parquet(tmp_path / "train-1.parquet", images[3:5], [0, 1], ["emu", "cat"])
    write_parquet(tmp_path / "test-0.parquet", images[5:], [0, 1, 1, 1], ["dog", "cat"])
    assert counts_of(tmp_path) == {"train": {"cat": 3, "dog": 1, "emu": 1}, "test": {"cat": 3, "dog": 1, "emu": 0}}


@pytest.mark.parametrize("kind", ["text", "category", "floats"])
def test_texts_categories_and_whole_floats(tmp_path: Path, make_image: Image, kind: str) -> None:
    """Texts become classes in alphabetical order, whatever comes first; 1.0 is 1."""
    train, test = ["emu", "cat", "emu", "dog"], ["dog", "emu"]
    for split, texts in (("train", train), ("test", test)):
        labels = pa.array(texts)
        if kind == "category":
            labels = labels.dictionary_encode()
        elif kind == "floats":
            labels = pa.array([{"cat": 0.0, "dog": 1.0, "emu": 2.0}[text] for text in texts])
        write_parquet(tmp_path / f"{split}-0.parquet", [make_image(k) for k in range(len(texts))], labels)
    names = ("0", "1", "2") if kind == "floats" else ("cat", "dog", "emu")
    assert counts_of(tmp_path) == {
        "train": dict(zip(names, (1, 1, 2), strict=True)), "test": dict(zip(names, (0, 1, 1), strict=True))
    }  # fmt: skip


def test_numbers_with_gaps_are_the_classes_that_occur(tmp_path: Path, make_image: Image) -> None:
    for split, labels in (("train", [7, 3, 10**9]), ("test", [3])):
        write_parquet(tmp_path / f"{split}-0.parquet", [make_image(k) for k in range(len(labels))], labels)
    assert counts_of(tmp_path) == {
        "train": {"3": 1, "7": 1, "1000000000": 1},
        "test": {"3": 1, "7": 0, "1000000000": 0},
    }


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([0.2, 1.7]), r"train-0.parquet, row 0: the label is 0.2; a label is a whole number or the name"),
        (pa.array([[0], [1]]), r"column 'label' holds list<.*int64>; a label is a whole number"),
        (pa.array([0, None]), "row 1: has no label; take such rows out"),
        (pa.array(["a", ""]), "row 1: has no label"),
        (pa.array([0.0, float("nan")]), "row 1: has no label"),
        (pa.array([True, False]), "holds bool"),
        (pa.array(["a", "b"]), r"test-0.parquet, row 0: class 'c' has no training sample; known: a, b"),
        (pa.array([0, 1]), "test-0.parquet, row 0: class 'c' has no training sample"),
    ],
)
def test_labels_that_are_refused(tmp_path: Path, make_image: Image, labels: Any, message: str) -> None:
    write_parquet(tmp_path / "train-0.parquet", [make_image(1)] * 2, labels)
    write_parquet(tmp_path / "test-0.parquet", [make_image(1)], pa.array(["c"]))
    with pytest.raises(DataError, match=message):
        make_source("parquet", path=str(tmp_path)).listings()


def test_numbers_without_names_beside_named_ones(tmp_path: Path, make_image: Image) -> None:
    write_parquet(tmp_path / "train-0.parquet", [make_image(1)] * 2, [0, 1], ["cat", "dog"])
    write_parquet(tmp_path / "test-0.parquet", [make_image(2)], [1])
    with pytest.raises(DataError, match=r"test-0.parquet, row 0: label 1 has no name in its file, while other files"):
        make_source("parquet", path=str(tmp_path)).listings()
    named = make_source("parquet", path=str(tmp_path), class_names=["dog", "cat"])
    assert [part.labels.tolist() for part in named.listings().values()] == [[1, 0], [1]]
    with pytest.raises(DataError, match="class 'dog' is not among the classes"):
        make_source("parquet", path=str(tmp_path), class_names=["cat", "emu"]).listings()


def test_captions_are_not_taken_for_classes(tmp_path: Path, make_image: Image) -> None:
    write_parquet(tmp_path / "train-0.parquet", [make_image(1)] * 24, [f"a photo of {k}" for k in range(24)])
    with pytest.raises(DataError, match=r"24 different labels among 24 training samples, .* look like captions"):
        make_source("parquet", path=str(tmp_path), test=None).listings()


def test_empty_tables(tmp_path: Path, make_image: Image) -> None:
    write_parquet(tmp_path / "train-0.parquet", [], [])
    with pytest.raises(DataError, match=r"no sample in split 'train' \(its files are empty\); wanted: rows with image"):
        make_source("parquet", path=str(tmp_path), test=None).listings()
    write_parquet(tmp_path / "train-1.parquet", [make_image(1)] * 4, [0, 1, 0, 1])
    assert len(make_source("parquet", path=str(tmp_path), test=None).listings()["train"].names) == 4
    shares = make_source("parquet", path=str(tmp_path), test=0.5).listings()
    assert {split: sorted(part.labels.tolist()) for split, part in shares.items()} == {"train": [0, 1], "test": [0, 1]}


def test_lists_of_patterns(tmp_path: Path, make_image: Image) -> None:
    for name in ("a-0", "b-0", "c-0"):
        write_parquet(tmp_path / f"{name}.parquet", [make_image(1)], [0])
    source = make_source("parquet", path=str(tmp_path), train=["a-*", "b-*"], test=None)
    assert source.listings()["train"].names == ["a-0.parquet:0", "b-0.parquet:0"]
    assert source.listings()["train"].unused.counts == {"file that no pattern matches": 1}
    for pattern in ("/etc/*", "**x", ""):
        with pytest.raises(DataError, match=r"is no pattern of files below it|no parquet file matches"):
            make_source("parquet", path=str(tmp_path), train=pattern).listings()
