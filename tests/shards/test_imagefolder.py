"""Image folders: what is a sample, what is left out and said so, which layouts are refused."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dbscale.data import DataError, load_manifest
from dbscale.shards.pack import pack
from tests.shards.conftest import make_source

Image = Callable[..., bytes]


def labels_of(source) -> dict[str, list[int]]:
    return {split: listing.labels.tolist() for split, listing in source.listings().items()}


def test_a_class_list_gives_the_order(tree: Path) -> None:
    (tree.parent / "classes.txt").write_text("# two of three\nkind-2 extra words\nkind-0\n")
    source = make_source("imagefolder", data_dir=tree.parent, path="photos", class_list="classes.txt")
    assert source.classes == ("kind-2", "kind-0")
    assert labels_of(source)["train"] == [0] * 7 + [1] * 10
    assert source.listings()["train"].unused.counts == {"file in a class that is not in the class list": 6}
    with pytest.raises(DataError, match="1 classes of the class list have no folder, among them kind-9; did you mean"):
        make_source("imagefolder", path=str(tree), class_list=["kind-9"]).listings()
    (tree.parent / "classes.txt").write_text("kind-2\nkind-2\n")
    with pytest.raises(DataError, match=r"classes.txt: class list names a class twice: kind-2"):
        source.model_copy().listings()
        make_source("imagefolder", data_dir=tree.parent, path="photos", class_list="classes.txt").listings()


def test_classes_are_left_out_by_name(tree: Path) -> None:
    (tree.parent / "seen.txt").write_text("kind-1\n")
    source = make_source("imagefolder", data_dir=tree.parent, path="photos", exclude_classes="seen.txt")
    assert source.classes == ("kind-0", "kind-2")
    assert labels_of(source)["train"] == [0] * 10 + [1] * 7
    assert source.listings()["train"].unused.counts == {"file in a class that is left out": 6}
    both = make_source("imagefolder", path=str(tree), class_list=["kind-2", "kind-1"], exclude_classes=["kind-1"])
    assert both.classes == ("kind-2",)
    assert both.listings()["train"].unused.counts == {
        "file in a class that is left out": 6, "file in a class that is not in the class list": 10
    }  # fmt: skip
    with pytest.raises(DataError, match="1 classes of the class list have no folder, among them kind-9; did you mean"):
        make_source("imagefolder", path=str(tree), exclude_classes=["kind-9"]).listings()


def test_bad_layouts(tree: Path) -> None:
    with pytest.raises(DataError, match=r"val: no such folder \(.* holds: test, train; set .* or `test: 0.2` to split"):
        make_source("imagefolder", path=str(tree), test="val").listings()
    with pytest.raises(DataError, match="does not exist or is empty"):
        make_source("imagefolder", path=str(tree / "nowhere")).listings()
    (tree / "train/kind-3").mkdir()
    with pytest.raises(DataError, match="train/kind-3: class folder is empty or missing"):
        make_source("imagefolder", path=str(tree)).listings()


def test_what_is_not_packed_is_counted(tree: Path, make_image: Image) -> None:
    """Litter and hidden notes are told; hidden or misplaced images count as lost."""
    for name in ("train/kind-0/Thumbs.db", "train/kind-0/._train.0.0.png", "train/.DS_Store", "train/kind-1/.note"):
        (tree / name).write_bytes(b"x")
    (tree / "val").mkdir()
    source = make_source("imagefolder", path=str(tree))
    listings = source.listings()
    assert [len(each.names) for each in listings.values()] == [23, 7]
    expected = {"litter": 3, "file that is hidden": 1, "file or folder beside the splits": 1}
    assert listings["train"].unused.counts == expected and listings["train"].unused.lost == 0
    manifest = pack(source, tree.parent / "out", progress=False)
    assert manifest.extra["unused"] == {"train": expected}
    (tree / "train/kind-0/.hidden.png").write_bytes(make_image(1))
    (tree / "train/stray.PNG").write_bytes(make_image(2))
    with pytest.raises(DataError) as caught:
        pack(make_source("imagefolder", path=str(tree)), tree.parent / "other", progress=False)
    assert "split 'train': 2 of 25 images or labels would stay unused, more than the allowed share 0.01" in str(
        caught.value
    )
    assert "image outside the class folders, for example 'train/stray.PNG'" in str(caught.value)
    assert str(caught.value).endswith("mend or remove them, or set `allow_unused: 0.08` of the source")
    allowed = make_source("imagefolder", path=str(tree), allow_unused=0.08)
    assert pack(allowed, tree.parent / "other", progress=False).split("train").num_samples == 23


def test_excludes_are_patterns_that_must_match(tree: Path) -> None:
    (tree / "train/kind-0/deep").mkdir()
    (tree / "train/kind-0/deep/notes.txt").write_text("x")
    (tree / "train/kind-1/notes.txt").write_text("x")
    for exclude in (["*/notes.txt"], ["train/kind-0/deep", "train/kind-1/notes.txt"]):
        listing = make_source("imagefolder", path=str(tree), exclude=exclude).listings()["train"]
        assert len(listing.names) == 23 and listing.unused.counts == {"excluded file": 2}
    for pattern in ("train/kind-0/nothing.png", "*.tif"):
        with pytest.raises(DataError, match=r"`exclude` names .*, which matches no file"):
            make_source("imagefolder", path=str(tree), exclude=[pattern]).listings()
    without = make_source("imagefolder", path=str(tree), exclude=["*/kind-2", "*/notes.txt"])
    assert without.classes == ("kind-0", "kind-1")
    assert labels_of(without)["test"] == [0, 0, 0, 1, 1]


def test_circles_and_what_is_no_file(tree: Path) -> None:
    os.mkfifo(tree / "train/kind-0/pipe.png")
    listing = make_source("imagefolder", path=str(tree)).listings()["train"]
    assert listing.unused.counts == {"image that is no regular file": 1} and listing.unused.lost == 1
    (tree / "train/kind-0/again").symlink_to(tree / "train", target_is_directory=True)
    with pytest.raises(DataError, match="a symbolic link that leads in a circle"):
        make_source("imagefolder", path=str(tree)).listings()


def test_names_that_are_not_utf8(tree: Path) -> None:
    """The bytes of a Latin-1 name are kept apart and can be printed."""
    for split in ("train", "test"):
        os.rename(tree / split / "kind-1", os.fsencode(tree / split) + b"/caf\xe9")
    source = make_source("imagefolder", path=str(tree))
    assert source.classes == ("caf\\xe9", "kind-0", "kind-2")
    pack(source, tree.parent / "out", progress=False)
    manifest = load_manifest(tree.parent / "out")
    assert manifest.classes == source.classes and manifest.split("train").class_counts == (6, 10, 7)


def test_a_share_of_an_unsplit_folder_becomes_the_test(tree: Path) -> None:
    """10, 6 and 7 images: a fifth of each class, rounded, is 2, 1 and 1; always the same ones."""
    for path in (str(tree), str(tree / "train")):
        source = make_source("imagefolder", path=path, test=0.2)
        listings = source.listings()
        assert {split: np.bincount(part.labels).tolist() for split, part in listings.items()} == {
            "train": [8, 5, 6],
            "test": [2, 1, 1],
        }
        assert not set(listings["train"].names) & set(listings["test"].names)
        again = make_source("imagefolder", path=path, test=0.2, pack_seed=7).listings()
        assert again["test"].names == listings["test"].names
        manifest = pack(source, tree.parent / Path(path).name / "packed", progress=False)
        assert manifest.split("test").class_counts == (2, 1, 1)
    for number in range(1, 10):
        (tree / f"train/kind-0/train.0.{number}.png").unlink()
    with pytest.raises(DataError, match="label 0 has a single sample, which no split can share"):
        make_source("imagefolder", path=str(tree), test=0.2).listings()


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
    with pytest.raises(DataError, match="unknown class or file in line"):
        make_source("tinyimagenet", path=str(root)).listings()
    with pytest.raises(DataError, match="point `path` at the unzipped tiny-imagenet-200"):
        make_source("tinyimagenet", path=str(tmp_path)).listings()
