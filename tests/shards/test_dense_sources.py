"""Masks and boxes on their way into shards: layouts of folders, tables and JSON, and what is refused with a sentence."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import ExifTags, Image
from webdataset.compat import WebDataset

from dbscale.data import DataError, load_manifest, open_dataset
from dbscale.data.target import IGNORE, Boxes, decode_boxes, decode_mask
from dbscale.errors import ConfigError
from dbscale.shards.pack import ensure_packed
from dbscale.shards.sources import source_of
from dbscale.shards.verify import describe, exact_source_change, verify
from tests.shards.conftest import make_source

pytestmark = [
    # webdataset leaves the tars it has read to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def png(values: np.ndarray, mode: str = "L") -> bytes:
    image = Image.fromarray(values.astype(np.uint8), "L") if mode in "LP" else Image.fromarray(values)
    if mode == "P":
        image = image.convert("L")
        image.putpalette([7, 7, 7, 200, 0, 0, 0, 200, 0, 9, 9, 9] + [0] * 752 + [255, 255, 255])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(values: np.ndarray, orientation: int | None = None) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(values.astype(np.uint8)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def mask_of(number: int, shape: tuple[int, int] = (12, 16)) -> np.ndarray:
    """Labels 0, 1, 2, and a border that is ignored."""
    mask = np.random.default_rng(number).integers(0, 3, shape)
    mask[0] = IGNORE
    return mask


@pytest.fixture
def scenes(tmp_path: Path, make_image: Callable[..., bytes]) -> Path:
    """Four training and three validation images of 16 × 12 px in ADE20K's folders, with masks."""
    root = tmp_path / "scenes"
    for split, count in (("training", 4), ("validation", 3)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            image = make_image(number, "JPEG", (16, 12))
            (root / f"images/{split}/{number:03}.jpg").write_bytes(image)
            (root / f"annotations/{split}/{number:03}.png").write_bytes(
                png(mask_of(number), "P" if number % 2 else "L")
            )
    return root


def entry_of(root: Path, **options: Any) -> dict[str, Any]:
    return {"source": "maskfolder", "path": str(root), "class_names": ["ground", "tree", "sky"], **options}


def packed(entry: dict[str, Any], tmp_path: Path, name: str = "packed") -> Path:
    return ensure_packed(name, entry, tmp_path, progress=False)


def by_key(folder: Path, split: str, kind: str) -> dict[str, Any]:
    """What `webdataset` reads of each sample, by the name that its source had."""
    tar = next(folder.glob(f"{split}-*.tar"))
    rows = WebDataset(str(tar), shardshuffle=False, empty_check=False)
    return {row["__key__"].partition("-")[2]: row[kind] for row in rows}


def test_masks_of_palettes_and_greys_stand_beside_their_images(scenes: Path, tmp_path: Path) -> None:
    folder = packed(entry_of(scenes), tmp_path)
    manifest = load_manifest(folder)
    assert (manifest.target, manifest.classes, manifest.num_classes) == ("mask", ("ground", "tree", "sky"), 3)
    assert manifest.split("train").class_counts == (4,) and manifest.split("train").balanced_up_to == 4
    masks = by_key(folder, "train", "mask.png")
    images = by_key(folder, "train", "jpg")
    for number in range(4):
        assert images[f"{number:03}"] == (scenes / f"images/training/{number:03}.jpg").read_bytes()
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(masks[f"{number:03}"]))), mask_of(number))
        assert np.array_equal(decode_mask(masks[f"{number:03}"]), mask_of(number))
    assert verify(folder) == []
    assert "with masks" in describe(folder, classes=True)


def test_labels_that_begin_at_one_are_moved_and_those_below_ignored(scenes: Path, tmp_path: Path) -> None:
    folder = packed(entry_of(scenes, first_label=1, class_names=2, ignore_labels=[255]), tmp_path)
    assert load_manifest(folder).classes == ("class 0", "class 1")
    expected = np.array([IGNORE, 0, 1] + [IGNORE] * 253)[mask_of(2)]
    assert np.array_equal(decode_mask(by_key(folder, "train", "mask.png")["002"]), expected)


@pytest.mark.parametrize("encoding", ["jpeg256", "raw"])
def test_masks_are_resized_with_their_images(encoding: str, tmp_path: Path, make_image: Callable[..., bytes]) -> None:
    root = tmp_path / "large"
    for kind in ("images", "annotations"):
        (root / kind / "all").mkdir(parents=True)
    mask = np.repeat(np.repeat(np.arange(6).reshape(2, 3), 256, 0), 256, 1)  # six squares of 256 px
    (root / "images/all/a.jpg").write_bytes(make_image(1, "JPEG", (768, 512)))
    (root / "annotations/all/a.png").write_bytes(png(mask))
    folder = packed(entry_of(root, train="all", test=None, class_names=6, encoding=encoding, raw_size=128), tmp_path)
    stored = decode_mask(by_key(folder, "train", "mask.png")["a"])
    # jpeg256: 384 × 256, squares of 128 px. raw: 192 × 128, of which the central square is kept, squares of 64 px.
    whole = np.repeat(np.repeat(np.arange(6).reshape(2, 3), 128 if encoding == "jpeg256" else 64, 0),
                      128 if encoding == "jpeg256" else 64, 1)  # fmt: skip
    assert np.array_equal(stored, whole if encoding == "jpeg256" else whole[:, 32:160])


def test_voc_and_ade20k_as_they_are_unpacked(tmp_path: Path, make_image: Callable[..., bytes]) -> None:
    voc = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    for name in ("2007_000032", "2007_000033", "2007_000039"):
        (voc / f"JPEGImages/{name}.jpg").write_bytes(make_image(1, "JPEG", (16, 12)))
    for name in ("2007_000032", "2007_000039"):  # most of VOC's images have no mask, and are in no list
        (voc / f"SegmentationClass/{name}.png").write_bytes(png(mask_of(1), "P"))
    (voc / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n")
    (voc / "ImageSets/Segmentation/val.txt").write_text("2007_000039\n")
    source = make_source("voc", path=str(voc))
    assert len(source.classes) == 21 and source.classes[15] == "person"
    assert {split: each.names for split, each in source.listings().items()} == {
        "train": ["JPEGImages/2007_000032.jpg"], "test": ["JPEGImages/2007_000039.jpg"]
    }  # fmt: skip
    assert ensure_packed("voc", {"source": "voc", "path": str(voc)}, tmp_path, progress=False)

    ade = tmp_path / "ADEChallengeData2016"
    for kind in ("images", "annotations"):
        for split in ("training", "validation"):
            (ade / kind / split).mkdir(parents=True)
    rows = [f"{number}\t0.1\t10\t20\tname {number}" for number in range(1, 151)]
    (ade / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    for split in ("training", "validation"):
        (ade / f"images/{split}/ADE_1.jpg").write_bytes(make_image(2, "JPEG", (16, 12)))
        (ade / f"annotations/{split}/ADE_1.png").write_bytes(png(np.full((12, 16), 150)))
    source = make_source("ade20k", path=str(ade))
    assert (len(source.classes), source.classes[0], source.classes[149]) == (150, "name 1", "name 150")
    folder = ensure_packed("ade", {"source": "ade20k", "path": str(ade)}, tmp_path, progress=False)
    assert (decode_mask(by_key(folder, "train", "mask.png")["ADE_1"]) == 149).all(), "150 in the file, counted from 1"


def test_masks_in_a_table_as_hugging_face_writes_it(tmp_path: Path, make_image: Callable[..., bytes]) -> None:
    def cell(data: bytes) -> dict[str, Any]:
        return {"bytes": data, "path": None}

    for split in ("train", "test"):
        rows = {"image": [cell(make_image(n, "JPEG", (16, 12))) for n in range(3)],
                "annotation": [cell(png(mask_of(n))) for n in range(3)]}  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / f"{split}-0.parquet")
    entry = {"source": "parquet_masks", "path": str(tmp_path), "mask_column": "annotation", "class_names": 3}
    folder = packed(entry, tmp_path)
    dataset = open_dataset(folder, tier="jpeg")
    found = {bytes(key).decode()[9:]: mask for key, mask in zip(dataset.index["key"], dataset.targets.fetch(np.arange(3))[0],
                                                                strict=True)}  # fmt: skip
    assert sorted(found) == ["0", "1", "2"]
    for number in range(3):
        assert np.array_equal(found[str(number)], mask_of(number))
    with pytest.raises(DataError, match="no column 'label'; it has: image, annotation; set image_column, mask_column"):
        packed({**entry, "mask_column": "label"}, tmp_path, "other")


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (png(mask_of(0, (12, 15))), "its mask has 15×12 px, the image 16×12 px; both must be of one size"),
        (png(np.full((12, 16), 3)), "its mask holds the label 3, out of range 0…2; mend it, extend the class names or "
         "list the label under `ignore_labels`"),
        (png(np.full((12, 16), 255)), "its mask is empty: every pixel has a label that is ignored"),
        (png(np.zeros((12, 16, 3), np.uint8), "RGB"), "its mask is a colour image (RGB), and colours are no labels; save "
         "masks as 8-bit grey or with a palette, one number a class"),
        (png(np.full((12, 16), 40_000, np.uint16), "I"), "its mask holds the label 40000, out of range 0…2; mend it, "
         "extend the class names or list the label under `ignore_labels`"),
        (jpeg(np.zeros((12, 16))), "its mask is no PNG (jpg), and other formats blur or recolour labels; save masks as PNG"),
        (b"", "its mask is no PNG that can be read: not an image: 0 bytes that begin with b''"),
        (png(mask_of(0))[:60], "its mask is no PNG that can be read"),
        (b"\x89PNG nothing else", "its mask is no PNG that can be read"),
    ],
    ids=["size", "label", "empty", "colours", "16 bits", "JPEG", "no bytes", "cut", "no PNG"],
)  # fmt: skip
def test_masks_that_do_not_fit_are_named_with_one_sentence(
    mask: bytes, sentence: str, scenes: Path, tmp_path: Path
) -> None:
    (scenes / "annotations/training/002.png").write_bytes(mask)
    with pytest.raises(DataError) as caught:
        packed(entry_of(scenes), tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{scenes}/images/training/002.jpg: {sentence}")
    assert "mend or remove such files" in text and "more:" not in text


def test_images_and_masks_without_each_other_are_counted(scenes: Path, tmp_path: Path) -> None:
    (scenes / "annotations/training/001.png").unlink()
    (scenes / "annotations/training/lone.png").write_bytes(png(mask_of(9)))
    with pytest.raises(DataError, match=r"2 of 5 images or labels would stay unused.*image without a mask.*001.jpg"):
        packed(entry_of(scenes), tmp_path)
    folder = packed(entry_of(scenes, allow_unused=0.5), tmp_path)
    assert load_manifest(folder).split("train").num_samples == 3
    assert "not used: 1 × mask without an image" in describe(folder)
    with pytest.raises(ConfigError, match="a mask has at most 255"):
        source_of("many", entry_of(scenes, class_names=256))


def test_masks_in_capitals_are_found_and_those_that_are_no_png_are_named(scenes: Path, tmp_path: Path) -> None:
    for number in (0, 2):
        for path in (scenes / f"annotations/training/{number:03}.png", scenes / f"images/training/{number:03}.jpg"):
            path.rename(path.with_suffix(path.suffix.upper()))
    folder = packed(entry_of(scenes), tmp_path)
    assert sorted(by_key(folder, "train", "mask.png")) == ["000", "001", "002", "003"]
    assert np.array_equal(decode_mask(by_key(folder, "train", "mask.png")["002"]), mask_of(2))
    (scenes / "annotations/training/002.PNG").rename(scenes / "annotations/training/002.jpg")
    with pytest.raises(
        DataError, match=r"1 × mask that is no PNG \(others blur or recolour labels\), for example .*002.jpg"
    ):
        packed(entry_of(scenes), tmp_path, "other")


def test_an_image_that_its_exif_tag_turns_is_refused_where_the_mask_was_turned(scenes: Path, tmp_path: Path) -> None:
    photograph = np.random.default_rng(0).integers(0, 255, (12, 16, 3))
    path = scenes / "images/training/002.jpg"
    path.write_bytes(jpeg(photograph, 6))
    stored = packed(entry_of(scenes), tmp_path, "stored")
    assert np.array_equal(decode_mask(by_key(stored, "train", "mask.png")["002"]), mask_of(2)), "drawn on stored pixels"
    (scenes / "annotations/training/002.png").write_bytes(png(mask_of(2, (16, 12))))
    with pytest.raises(DataError, match=r"002.jpg: its EXIF tag shows it turned, as 12×16 px, and so it was "
                       r"annotated, but its pixels are taken as they are stored, 16×12; save the image"):  # fmt: skip
        packed(entry_of(scenes), tmp_path, "turned")
    path.write_bytes(jpeg(photograph, 3))  # upside down: not why the sizes differ
    with pytest.raises(DataError, match=r"002.jpg: its mask has 12×16 px, the image 16×12 px"):
        packed(entry_of(scenes), tmp_path, "upside down")


def test_labels_of_two_splits_are_matched_by_the_names_of_their_lists(scenes: Path, tmp_path: Path) -> None:
    lists = {"training": ["ground", "tree", "sky"], "validation": ["sky", "ground", "tree"]}
    for split, names in lists.items():
        (scenes / f"{split}.txt").write_text("\n".join(names) + "\n")
    entry = entry_of(scenes, class_names="{split}.txt")
    folder = packed(entry, tmp_path)
    assert load_manifest(folder).classes == ("ground", "tree", "sky")
    assert np.array_equal(decode_mask(by_key(folder, "train", "mask.png")["001"]), mask_of(1))
    moved = np.array([2, 0, 1] + [IGNORE] * 253)[mask_of(1)]
    assert np.array_equal(decode_mask(by_key(folder, "test", "mask.png")["001"]), moved)
    share = packed({**entry, "test": 0.25}, tmp_path, "share")
    for split in ("train", "test"):
        for name, mask in by_key(share, split, "mask.png").items():
            assert np.array_equal(decode_mask(mask), mask_of(int(name))), "split off training, in its numbering"
    (scenes / "validation.txt").write_text("sky\nground\ntrees\n")
    with pytest.raises(DataError, match=r"validation.txt: names the class 'trees', which the list of 'training' does not; "
                       r"did you mean 'tree'\?"):  # fmt: skip
        packed(entry, tmp_path, "other")


def test_classes_that_one_split_alone_holds(scenes: Path, tmp_path: Path) -> None:
    for number in range(3):
        path = scenes / f"annotations/validation/{number:03}.png"
        path.write_bytes(png(np.where(mask_of(number) == 2, 0, mask_of(number))))
    folder = packed(entry_of(scenes), tmp_path)
    assert "classes of training that no mask of another split holds: sky" in describe(folder)
    (scenes / "annotations/validation/001.png").write_bytes(png(np.full((12, 16), 3)))
    entry = entry_of(scenes, class_names=4)
    with pytest.raises(DataError, match=r"split 'test' has masks of 'class 3', training has none, so that no model can "
                       r"learn it; add such images to training, or list its label under `ignore_labels`, re"):  # fmt: skip
        packed(entry, tmp_path, "other")
    (scenes / "annotations/validation/001.png").write_bytes(png(np.arange(192).reshape(12, 16) % 4))
    assert packed({**entry, "ignore_labels": [255, 3]}, tmp_path, "ignored")


def test_a_mask_that_changed_is_found(scenes: Path, tmp_path: Path) -> None:
    folder = packed(entry_of(scenes), tmp_path)
    assert exact_source_change(folder, tmp_path) is None
    (scenes / "annotations/training/002.png").write_bytes(png(mask_of(7)))
    assert "002.jpg" in str(exact_source_change(folder, tmp_path))
    dataset = open_dataset(folder, tier="jpeg")
    tar = next(folder.glob("train-*.tar"))
    content = bytearray(tar.read_bytes())
    content[int(dataset.index["target_offset"][1]) + 45] ^= 1
    tar.write_bytes(bytes(content))
    assert ["its mask changed since packing" in str(each) for each in verify(folder)] == [True]


# --- boxes ---


@pytest.fixture
def coco(tmp_path: Path, make_image: Callable[..., bytes]) -> Callable[..., dict[str, Any]]:
    """Writes COCO's layout of images of 20 × 10 px; the entry that names it."""

    def write(annotations: dict[str, Any] | None = None, categories: Any = None, **options: Any) -> dict[str, Any]:
        root = tmp_path / "coco"
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        for split in ("train2017", "val2017"):
            (root / split).mkdir(exist_ok=True)
            for number in (1, 2, 3):
                (root / split / f"{number:012}.jpg").write_bytes(make_image(number, "JPEG", (20, 10)))
            content = {
                "images": [{"id": n, "file_name": f"{n:012}.jpg", "height": 10, "width": 20} for n in (3, 1, 2)],
                "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
                "annotations": [
                    {"id": 1, "image_id": 1, "category_id": 7, "bbox": [2, 1, 5, 6], "iscrowd": 0},
                    {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 20, 10], "iscrowd": 1},
                    {"id": 3, "image_id": 2, "category_id": 3, "bbox": [15.5, 5, 5, 5.5]},
                    {"id": 4, "image_id": 2, "category_id": 3, "bbox": [1, 5, 0.2, 5]},
                    {"id": 5, "image_id": 3, "category_id": 7, "bbox": [3, 3, 3, 3]},
                ],
            }  # fmt: skip
            if split == "val2017" and categories is not None:
                content["categories"] = categories
            if split == "train2017":
                content["annotations"] += [{"id": 9, **annotations}] if annotations else []
            (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
        return {"source": "coco", "path": str(root), **options}

    return write


def test_boxes_of_coco_stand_beside_their_images(coco: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    folder = packed(coco(), tmp_path)
    manifest = load_manifest(folder)
    assert (manifest.target, manifest.classes) == ("boxes", ("cat", "dog")), "in order of their numbers"
    found = {key: decode_boxes(data) for key, data in by_key(folder, "train", "boxes.json").items()}
    first, second = found["000000000001"], found["000000000002"]
    assert first.size == (10, 20)
    assert first.boxes_N4.tolist() == [[2, 1, 7, 7], [0, 0, 20, 10]]
    assert (first.labels_N.tolist(), first.crowd_N.tolist()) == ([1, 0], [False, True])
    assert second.boxes_N4.tolist() == [[15.5, 5, 20, 10]], "half a pixel over the border is cut off"
    assert "not used: 1 × box of less than a pixel" in describe(folder)
    assert verify(folder) == []


@pytest.mark.parametrize(
    ("annotation", "sentence"),
    [
        ({"image_id": 3, "category_id": 7, "bbox": [18, 3, 6, 3]},
         r"a box from \(18, 3\) to \(24, 6\) reaches over the border of its 20×10 px image"),
        ({"image_id": 3, "category_id": 8, "bbox": [1, 1, 3, 3]}, "annotation 9 has category 8, which has no name"),
        ({"image_id": 3, "category_id": 7}, r"not in COCO's form \(KeyError: 'bbox'\)"),
        ({"image_id": 3, "category_id": 7, "bbox": [1, float("nan"), 3, 3]},
         r"annotation 9 has the box \[1, nan, 3, 3\], which is no place; mend or remove it"),
    ],
)  # fmt: skip
def test_boxes_that_cannot_be_are_named_with_one_sentence(
    annotation: dict[str, Any], sentence: str, coco: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=sentence):
        packed(coco(annotation), tmp_path)


def test_prepared_copies_in_other_processes_need_no_json(coco: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    entry = coco()
    source = source_of("coco", entry)
    names = source.listings()["train"].names
    prepared = source.prepare(tmp_path / "work")
    for path in Path(entry["path"]).glob("annotations/*.json"):
        path.unlink()
    copy = pickle.loads(pickle.dumps(prepared))
    assert copy.classes == ("cat", "dog")
    (pair,) = copy.read("train", np.array([1]), [names[1]])
    assert pair.target.boxes_N4.tolist() == [[15.5, 5, 20.5, 10.5]]


def test_categories_of_two_splits_are_matched_by_name(coco: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    entry = coco(categories=[{"id": 7, "name": "dog"}, {"id": 3, "name": "cow"}])
    with pytest.raises(
        DataError, match=r"its category 3 \('cow'\) is none of those of .*train2017.json; numbers may differ"
    ):
        packed(entry, tmp_path)
    labels = {}
    for name, numbers in (("alike", (7, 3)), ("swapped", (3, 7))):
        entry = coco(categories=[{"id": number, "name": n} for number, n in zip(numbers, ("dog", "cat"), strict=True)])
        folder = packed(entry, tmp_path / name, name)
        labels[name] = decode_boxes(by_key(folder, "test", "boxes.json")["000000000001"]).labels_N.tolist()
        assert load_manifest(folder).classes == ("cat", "dog")
    assert labels == {"alike": [1, 0], "swapped": [0, 1]}, "3 is the dog there, and 7 the cat"


def test_images_without_a_box_are_left_out_or_kept(coco: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    entry = coco()
    for path in Path(entry["path"]).glob("annotations/*.json"):
        content = json.loads(path.read_text())
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 3]
        path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"1 of 3 images or labels would stay unused.*image without a box"):
        packed(entry, tmp_path)
    left_out = packed({**entry, "allow_unused": 0.4}, tmp_path, "left_out")
    assert load_manifest(left_out).split("train").num_samples == 2
    kept = open_dataset(packed({**entry, "unannotated": "keep"}, tmp_path, "kept"), tier="jpeg")
    boxes = kept.targets.fetch(np.arange(3))[0]
    assert sorted(len(each.labels_N) for each in boxes) == [0, 1, 2]


# --- generated scenes ---


def test_generated_scenes_are_the_same_in_any_batch_and_agree_with_each_other() -> None:
    options = {"families": 4, "num_train": 70, "num_test": 5, "image_size": 32}
    masks, boxes = (make_source(kind, **options) for kind in ("fractal_masks", "fractal_boxes"))
    names = masks.listings()["train"].names
    all_masks, all_boxes = (list(each.read("train", np.arange(70), names)) for each in (masks, boxes))
    alone = next(iter(masks.read("train", np.array([69]), names[69:])))
    assert np.array_equal(alone.image, all_masks[69].image) and np.array_equal(alone.target, all_masks[69].target)
    other = next(iter(masks.read("test", np.array([0]), ["scene-000000"])))
    assert not np.array_equal(other.image, all_masks[0].image), "the test split has scenes of its own"
    counts = set()
    for one, two in zip(all_masks, all_boxes, strict=True):
        assert np.array_equal(one.image, two.image)
        target = two.target
        assert isinstance(target, Boxes)
        counts.add(len(target.labels_N))
        for (left, top, right, bottom), label in zip(
            target.boxes_N4.astype(int).tolist(), target.labels_N, strict=True
        ):
            assert 0 <= left < right <= 32 and 0 <= top < bottom <= 32 and right - left <= 16 and bottom - top <= 16
            assert (one.target[top:bottom, left:right] == label + 1).any()
        # Every pixel of a family lies in a box of it, apart from those of fractals that are nearly covered.
        inside = np.zeros((32, 32), bool)
        for left, top, right, bottom in target.boxes_N4.astype(int).tolist():
            inside[top:bottom, left:right] = True
        assert ((one.target > 0) & ~inside).sum() < 64
    assert counts == {1, 2, 3, 4}
    assert {int(value) for one in all_masks for value in np.unique(one.target)} == {0, 1, 2, 3, 4}


def test_boxes_without_area_are_left_out_and_counted(coco: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    folder = packed(coco({"image_id": 3, "category_id": 7, "bbox": [5, 5, -2, 4]}), tmp_path)
    found = decode_boxes(by_key(folder, "train", "boxes.json")["000000000003"])
    assert found.boxes_N4.tolist() == [[3, 3, 6, 6]]
    assert "train: not used: 2 × box of less than a pixel" in describe(folder)


def test_images_without_annotation_are_counted_or_kept(coco: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    entry = coco()
    path = Path(entry["path"]) / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 2]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"1 of 3 images or labels would stay unused.*1 × image without a box.*2.jpg"):
        packed(entry, tmp_path, "refused")
    folder = packed({**entry, "unannotated": "keep"}, tmp_path)
    assert decode_boxes(by_key(folder, "train", "boxes.json")["000000000002"]).boxes_N4.shape == (0, 4)


def test_two_entries_of_one_file_are_named(coco: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    entry = coco()
    path = Path(entry["path"]) / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["images"].append({**content["images"][0], "id": 9})
    path.write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"image 9 has the file train2017/000000000003.jpg, as another one has; list it once"
    ):
        packed(entry, tmp_path)


def test_splits_of_one_folder_keep_their_own_boxes(coco: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """One image may stand in both JSON files, with other boxes."""
    entry = {**coco({"image_id": 3, "category_id": 3, "bbox": [1, 1, 2, 2]}), "images": "train2017"}
    folder = packed(entry, tmp_path)
    train, test = (
        decode_boxes(by_key(folder, s, "boxes.json")["000000000003"]).boxes_N4.tolist() for s in ("train", "test")
    )
    assert (train, test) == ([[3, 3, 6, 6], [1, 1, 3, 3]], [[3, 3, 6, 6]])


def test_boxes_of_a_class_that_training_lacks_are_refused(coco: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    entry = coco()
    path = Path(entry["path"]) / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for each in content["annotations"]:
        each["category_id"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"split 'test' has boxes of 'dog', training has none, so that no model can "
                       r"learn it; add such images to training, remove"):  # fmt: skip
        packed(entry, tmp_path)
