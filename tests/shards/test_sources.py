"""Each kind of source reads its layout, and refuses what does not fit it."""

import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dbscale.data import DataError, open_dataset
from shards.pack import ensure_packed, pack
from shards.sources import KINDS, make_source

Image = Callable[..., bytes]


def labels_of(source) -> dict[str, list[int]]:
    return {split: listing.labels.tolist() for split, listing in source.listings().items()}


def test_unknown_kinds_and_options_name_the_known() -> None:
    with pytest.raises(DataError, match="source kind 'zip' is unknown; known: imagefolder, cifar"):
        make_source("zip")
    with pytest.raises(DataError, match="source 'fractals' has no option 'famillies'; it has: families"):
        make_source("fractals", famillies=3)
    with pytest.raises(DataError, match="source 'imagefolder' needs the option 'path'"):
        make_source("imagefolder")
    with pytest.raises(DataError, match="its entry names no `source`"):
        ensure_packed("x", {"path": "y"}, ".")


# ImageFolder


def test_imagefolder_class_list(tree: Path) -> None:
    (tree.parent / "classes.txt").write_text("# two of three\nkind-2 extra words\nkind-0\n")
    source = make_source("imagefolder", data_dir=tree.parent, path="photos", class_list="classes.txt")
    assert source.classes == ("kind-2", "kind-0")
    assert labels_of(source)["train"] == [0] * 7 + [1] * 10
    with pytest.raises(DataError, match="1 classes of the class list have no folder, among them kind-9"):
        make_source("imagefolder", path=str(tree), class_list=["kind-9"]).listings()


def test_imagefolder_bad_layouts(tree: Path) -> None:
    with pytest.raises(DataError, match=r"val: no such folder \(.* holds: test, train\)"):
        make_source("imagefolder", path=str(tree), test="val").listings()
    with pytest.raises(DataError, match="does not exist or is empty"):
        make_source("imagefolder", path=str(tree / "nowhere")).listings()
    (tree / "train/kind-3").mkdir()
    with pytest.raises(DataError, match="train/kind-3: class folder is empty or missing"):
        make_source("imagefolder", path=str(tree)).listings()


# CIFAR


def cifar_records(count: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(count)
    return generator.integers(0, 256, (count, 3072), dtype=np.uint8), np.arange(count) % num_classes


def write_cifar(root: Path, layout: str) -> None:
    root.mkdir()
    hundred = "100" in layout
    names = [f"name{k}" for k in range(100 if hundred else 10)]
    parts = {"train": "train", "test": "test"} if hundred else {f"data_batch_{k}": "train" for k in range(1, 6)}
    if not hundred:
        parts["test_batch"] = "test"
    for offset, name in enumerate(parts):
        pixels, labels = cifar_records(100 + offset, len(names))
        if "bin" in layout:
            columns = [labels[:, None] * 0, labels[:, None]] if hundred else [labels[:, None]]
            (root / f"{name}.bin").write_bytes(np.concatenate([*columns, pixels], axis=1).astype(np.uint8).tobytes())
        else:
            key = b"fine_labels" if hundred else b"labels"
            (root / name).write_bytes(pickle.dumps({b"data": pixels, key: labels.tolist()}, protocol=2))
    if "bin" in layout:
        (root / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_text("\n".join(names) + "\n")
    else:
        key = b"fine_label_names" if hundred else b"label_names"
        meta = {key: [name.encode() for name in names]}
        (root / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=2))


LAYOUTS = ["cifar-10-batches-bin", "cifar-10-batches-py", "cifar-100-binary", "cifar-100-python"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["folder", "parent", "archive"])
def test_cifar_layouts(tmp_path: Path, layout: str, form: str) -> None:
    write_cifar(tmp_path / layout, layout)
    path = {"folder": tmp_path / layout, "parent": tmp_path, "archive": tmp_path / "archive.tar.gz"}[form]
    if form == "archive":
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / layout, layout)
    source = make_source("cifar", path=str(path))
    hundred = "100" in layout
    assert source.classes == tuple(f"name{k}" for k in range(100 if hundred else 10))
    listings = source.listings()
    assert [len(part.labels) for part in listings.values()] == ([100, 101] if hundred else [510, 105])
    pixels, labels = cifar_records(101 if hundred else 105, len(source.classes))
    assert listings["test"].labels.tolist() == labels.tolist()
    (image,) = source.read("test", np.array([7]), [""])
    assert np.array_equal(image, pixels[7].reshape(3, 32, 32).transpose(1, 2, 0))


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code ran",)


def test_cifar_pickles_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(tmp_path / LAYOUTS[1], LAYOUTS[1])
    (tmp_path / LAYOUTS[1] / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(DataError, match=r"data_batch_3: refused to unpickle: it asks for builtins.print"):
        make_source("cifar", path=str(tmp_path)).listings()
    assert "code ran" not in capsys.readouterr().out


def test_cifar_damage(tmp_path: Path) -> None:
    write_cifar(tmp_path / LAYOUTS[0], LAYOUTS[0])
    file = tmp_path / LAYOUTS[0] / "test_batch.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="bytes is no multiple of the 3073-byte record"):
        make_source("cifar", path=str(tmp_path)).listings()
    file.unlink()
    with pytest.raises(DataError, match="no complete CIFAR folder or archive; expected one of cifar-10-batches-bin"):
        make_source("cifar", path=str(tmp_path)).listings()
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b\x08 not really")
    with pytest.raises(DataError, match="damaged archive"):
        make_source("cifar", path=str(tmp_path / "cut.tar.gz")).listings()


# TinyImageNet


def test_tinyimagenet(tmp_path: Path, make_image: Image) -> None:
    root = tmp_path / "tiny-imagenet-200"
    (root / "val/images").mkdir(parents=True)
    (root / "wnids.txt").write_text("n02\nn01\n")
    for label, name in enumerate(("n02", "n01")):
        (root / "train" / name / "images").mkdir(parents=True)
        for number in range(3):
            data = make_image(10 * label + number, "JPEG", (64, 64))
            (root / "train" / name / "images" / f"{name}_{number}.JPEG").write_bytes(data)
        (root / f"val/images/val_{label}.JPEG").write_bytes(make_image(50 + label, "JPEG", (64, 64)))
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t9\t9\nval_1.JPEG\tn02\t0\t0\t9\t9\n")
    source = make_source("tinyimagenet", path=str(root))
    assert labels_of(source) == {"train": [0, 0, 0, 1, 1, 1], "test": [1, 0]}
    manifest = pack(source, tmp_path / "out", progress=False)
    assert (manifest.image.max_side, manifest.num_classes) == (64, 2)
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn77\n")
    with pytest.raises(DataError, match="unknown class in line"):
        make_source("tinyimagenet", path=str(root)).listings()
    with pytest.raises(DataError, match="point `path` at the unzipped tiny-imagenet-200"):
        make_source("tinyimagenet", path=str(tmp_path)).listings()


# Parquet


def write_parquet(path: Path, images: list[bytes], labels: list[int], names: list[str] | None = None) -> None:
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
    source = make_source("parquet", data_dir=tmp_path, path="data")
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
    with pytest.raises(DataError, match=r"train-0.parquet, row 1: label -1 is out of range 0…0; mend it \(unlabelled"):
        source().listings()
    with pytest.raises(DataError, match="no column 'img'; it has: image, label"):
        source(image_column="img").listings()
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match="not a readable parquet file"):
        source().listings()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_documented(kind: str) -> None:
    assert KINDS[kind].__doc__
