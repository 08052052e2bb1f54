"""Source `coco`: photographs with boxes in COCO's layout, one folder of images and one JSON file a split.

The JSON files are read once, when the split is listed, and spooled as plain arrays in the pack's work folder, from which the
processes that write shards take the boxes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from dbscale.data.manifest import TargetKind
from dbscale.data.target import MIN_SIDE_PX, Boxes
from dbscale.errors import DataError
from dbscale.files import atomic_open, make_folder, write_atomic
from dbscale.shards.source import (
    FileSource,
    Listing,
    Local,
    TestFolder,
    Unused,
    WithTarget,
    one_line,
    printable,
    split_off,
)


class _Annotations(NamedTuple):
    """What one JSON file says, its images in order of their file names."""

    names: list[str]
    sizes_N2: NDArray[np.int64]
    """Height, width as the file says, px."""
    ends_N: NDArray[np.int64]
    """Where each image's boxes end in the three arrays below."""
    boxes_M4: NDArray[np.float32]
    labels_M: NDArray[np.int64]
    crowd_M: NDArray[np.bool_]
    unused: Unused

    def boxes_of(self, number: int) -> Boxes:
        part = slice(int(self.ends_N[number - 1]) if number else 0, int(self.ends_N[number]))
        height, width = self.sizes_N2[number].tolist()
        return Boxes((height, width), self.boxes_M4[part], self.labels_M[part], self.crowd_M[part])


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float
    label: int
    crowd: bool


class Coco(FileSource):
    """`<images>/<file_name>` below `path`, and a JSON file with `images`, `annotations` and `categories` for each split."""

    train: Local = "train2017"
    """Name of the training split in the two patterns below."""
    test: TestFolder = "val2017"
    images: Local = "{split}"
    """Folder of a split's images, below `path`."""
    annotations: Local = "annotations/instances_{split}.json"
    unannotated: Literal["leave_out", "keep"] = "leave_out"
    """What becomes of images without a box: left out (and counted against `allow_unused`), or kept as empty scenes."""
    target: ClassVar[TargetKind | None] = "boxes"
    remedy: ClassVar[str] = "mend or remove their annotations"
    _boxes_folder: Path | None = None
    """Where `prepare` left the arrays."""

    @cached_property
    def _splits(self) -> dict[str, str]:
        return {"train": self.train, **({"test": self.test} if isinstance(self.test, str) else {})}

    def _json_of(self, split: str) -> Path:
        return self.root / self.annotations.format(split=self._splits[split])

    @cached_property
    def _contents(self) -> dict[str, dict[str, Any]]:
        return {split: _load(self._json_of(split)) for split in self._splits}

    @cached_property
    def _categories(self) -> dict[str, dict[int, str]]:
        """The name of each category by its number, for each split. Raises DataError for one that training lacks."""
        found = {split: _categories(content, self._json_of(split)) for split, content in self._contents.items()}
        for split, categories in found.items():
            unknown = [(number, name) for number, name in categories.items() if name not in found["train"].values()]
            if unknown:
                raise DataError(
                    f"{self._json_of(split)}: its category {unknown[0][0]} ({unknown[0][1]!r}) is none of those of "
                    f"{self._json_of('train')}; numbers may differ between the two, names may not"
                )
        return found

    @cached_property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        if self._boxes_folder is not None:
            return tuple(json.loads((self._boxes_folder / "classes.json").read_text()))
        return tuple(name for _, name in sorted(self._categories["train"].items()))

    @cached_property
    def _read(self) -> dict[str, _Annotations]:
        return {
            split: self._annotations(split, {number: self.classes.index(name) for number, name in categories.items()})
            for split, categories in self._categories.items()
        }

    def _annotations(self, split: str, labels: dict[int, int]) -> _Annotations:
        path, content, unused = self._json_of(split), self._contents[split], Unused()
        folder = self.images.format(split=self._splits[split])
        try:
            images = {
                each["id"]: (f"{folder}/{each['file_name']}", int(each["height"]), int(each["width"]))
                for each in content["images"]
            }
            if (twice := _twice(name for name, _, _ in images.values())) is not None:
                *_, last = (number for number, (name, _, _) in images.items() if name == twice)
                # The boxes of one of them would be lost.
                raise DataError(
                    f"{path}: image {last} has the file {printable(twice)}, as another one has; list it once"
                )
            boxes: dict[int, list[_Box]] = {number: [] for number in images}
            for each in content["annotations"]:
                if each["image_id"] not in images:
                    unused.add("box of an image that is not listed", str(each["image_id"]), lost=False)
                    continue
                box = _box(each, labels, path)
                if min(box.right - box.left, box.bottom - box.top) < MIN_SIDE_PX:
                    unused.add("box of less than a pixel", images[each["image_id"]][0], lost=False)
                else:
                    boxes[each["image_id"]].append(box)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not in COCO's form ({type(error).__name__}: {one_line(error)})") from error
        return _in_order(images, boxes, unused, keep=self.unannotated == "keep", where=path)

    def listings(self) -> dict[str, Listing]:
        listings = {
            split: Listing(np.zeros(len(found.names), np.int64), found.names, found.unused)
            for split, found in self._read.items()
        }
        if isinstance(self.test, float):
            return split_off(listings["train"], self.test, str(self.root))
        return listings

    def watched(self) -> Iterable[Path]:
        """The JSON files and the folders of images."""
        folders = (self.root / self.images.format(split=split) for split in self._splits.values())
        return (*map(self._json_of, self._splits), *folders)

    def file_of(self, name: str) -> Path:
        return self.root / name

    def prepare(self, work: Path) -> Self:
        """Spool every split's boxes; the copies that read them need no JSON."""
        prepared = self.model_copy()
        prepared._boxes_folder = work / "boxes"
        make_folder(prepared._boxes_folder)
        write_atomic(prepared._boxes_folder / "classes.json", json.dumps(self.classes).encode())
        for split, found in self._read.items():
            arrays = {**found._asdict(), "names": np.array(found.names), "unused": np.zeros(0)}
            with atomic_open(prepared._boxes_folder / f"{split}.npz") as file:
                np.savez(file, allow_pickle=False, **arrays)
        return prepared

    @cached_property
    def _spooled(self) -> dict[tuple[str, str], tuple[_Annotations, int]]:
        """By split and file name, the arrays that hold an image's boxes and its number in them."""
        assert self._boxes_folder is not None, "boxes are read from what `prepare` left"
        places = {}
        for split in self._splits:
            with np.load(self._boxes_folder / f"{split}.npz", allow_pickle=False) as file:
                arrays = {name: file[name] for name in _Annotations._fields}
            found = _Annotations(**{**arrays, "names": arrays["names"].tolist(), "unused": Unused()})
            places |= {(split, name): (found, number) for number, name in enumerate(found.names)}
        return places

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[WithTarget]:
        # A split that was split off training is in its file. Unlike a generator, `map` goes on after a bad file.
        return map(partial(self._read_pair, split if split in self._splits else "train"), names)

    def _read_pair(self, split: str, name: str) -> WithTarget:
        found, number = self._spooled[split, name]
        return WithTarget((self.root / name).read_bytes(), found.boxes_of(number))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; set `path`, `annotations`, `train` and `test` of the source") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: its JSON cannot be read ({one_line(error)}); fetch it again") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise DataError(f"{path}: not in COCO's form, it has no list {name!r}")
    return content


def _categories(content: dict[str, Any], path: Path) -> dict[int, str]:
    try:
        found = {int(each["id"]): printable(str(each["name"])) for each in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f'{path}: a category lacks its id or name; write {{"id": 1, "name": "cat"}}') from error
    twice = _twice(found.values())
    if twice is not None or not found:
        what = "names no category" if twice is None else f"names the category {twice!r} twice"
        raise DataError(f"{path}: {what}; mend it")
    return found


def _twice(names: Iterable[str]) -> str | None:
    """The first name that occurs again, in alphabetical order."""
    return next((before for before, after in pairwise(sorted(names)) if before == after), None)


def _box(annotation: dict[str, Any], labels: dict[int, int], path: Path) -> _Box:
    category = annotation["category_id"]
    if category not in labels:
        raise DataError(
            f"{path}: annotation {annotation['id']} has category {category}, which has no name; add it to `categories`"
        )
    left, top, width, height = map(float, annotation["bbox"])
    if not all(map(math.isfinite, (left, top, width, height))):
        raise DataError(
            f"{path}: annotation {annotation['id']} has the box {annotation['bbox']}, which is no place; mend or remove it"
        )
    return _Box(left, top, left + width, top + height, labels[category], bool(annotation.get("iscrowd", 0)))


def _in_order(
    images: dict[int, tuple[str, int, int]], boxes: dict[int, list[_Box]], unused: Unused, *, keep: bool, where: Path,
) -> _Annotations:  # fmt: skip
    """The arrays of all images that have a box, or of all that are there."""
    for number, (name, _, _) in images.items():
        if not boxes[number] and not keep:
            unused.add("image without a box", name, lost=True)
    kept = sorted((number for number in images if keep or boxes[number]), key=lambda number: images[number][0])
    if not kept:
        raise DataError(f"{where}: no image has a box; set `unannotated: keep` to take them as empty scenes")
    every = [each for number in kept for each in boxes[number]]
    return _Annotations(
        names=[images[number][0] for number in kept],
        sizes_N2=np.array([images[number][1:] for number in kept], np.int64),
        ends_N=np.cumsum([len(boxes[number]) for number in kept]),
        boxes_M4=np.array([box[:4] for box in every], np.float32).reshape(-1, 4),
        labels_M=np.array([box.label for box in every], np.int64),
        crowd_M=np.array([box.crowd for box in every], bool),
        unused=unused,
    )
