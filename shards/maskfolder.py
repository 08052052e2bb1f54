"""Sources `maskfolder`, `voc` and `ade20k`: folders of photographs and of PNG masks with a class for every pixel.

An image and its mask have one name up to the last dot. Labels are grey levels or places in a palette; what they are in the
files is said by `first_label` and `ignore_labels`, in the shards they are 0…classes-1, and 255 is ignored. Where each split
has a file of class names, labels are matched by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from glob import escape
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from dbscale.data.manifest import TargetKind
from dbscale.data.target import Mask
from dbscale.errors import DataError, nearest
from dbscale.shards.imagefolder import IMAGE_SUFFIXES, hidden, lines_of
from dbscale.shards.source import FileSource, Listing, Local, TestFolder, Unused, WithTarget, split_off
from dbscale.shards.target import mask_classes, read_mask, renumbered

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
ADE20K_CLASSES = 150


FolderClasses = Annotated[tuple[str, ...] | str, BeforeValidator(lambda value: value if isinstance(value, str) else
                                                                 mask_classes(value))]  # fmt: skip
"""The same, or a text file below `path` with a name on each line; with `{split}` in its name, one for each split."""


class MaskFolder(FileSource):
    """`<images of the split>/**/<name>.jpg` and `<masks of the split>/**/<name>.png` below `path`."""

    train: Local = "training"
    """Name of the training split in the three patterns below."""
    test: TestFolder = "validation"
    images: Local = "images/{split}"
    """Folder of a split's images, below `path`."""
    masks: Local = "annotations/{split}"
    lists: Local | None = None
    """Text file with the names of a split's samples, one a line; None takes all that lie in the folder of images."""
    class_names: FolderClasses
    first_label: Annotated[int, Field(ge=0)] = 0
    """The number of the first class in the files; what lies below is ignored."""
    ignore_labels: tuple[int, ...] = (255,)
    """Numbers in the files that are no class."""
    target: ClassVar[TargetKind | None] = "mask"
    remedy: ClassVar[str] = "mend or remove such files"

    @cached_property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.class_names if isinstance(self.class_names, tuple) else self._names_of(self.class_names, self.train)

    def _names_of(self, pattern: str, split: str) -> tuple[str, ...]:
        path = self.root / pattern.format(split=split)
        try:
            return mask_classes([line.strip() for line in lines_of(path, "; set `class_names`") if line.strip()])
        except ValueError as error:
            raise DataError(f"{path}: class list {error}") from error

    @cached_property
    def _own_names(self) -> dict[str, tuple[str, ...]]:
        """The classes of each split, in its files' numbering. Raises DataError for a class that training lacks."""
        if isinstance(self.class_names, tuple) or "{split}" not in self.class_names:
            return dict.fromkeys(self._splits.values(), self.classes)
        own = {split: self._names_of(self.class_names, split) for split in self._splits.values()}
        for split, names in own.items():
            unknown = [name for name in names if name not in self.classes]
            if unknown:
                path = self.root / self.class_names.format(split=split)
                raise DataError(f"{path}: names the class {unknown[0]!r}, which the list of {self.train!r} does not; "
                                f"{nearest(unknown[0], self.classes[:20])}; both lists must name the same ones")  # fmt: skip
        return own

    @cached_property
    def _splits(self) -> dict[str, str]:
        return {"train": self.train, **({"test": self.test} if isinstance(self.test, str) else {})}

    def watched(self) -> Iterable[Path]:
        """The folders of images and masks, and the lists."""
        patterns = [self.images, self.masks, *([self.lists] if self.lists else [])]
        return [self.root / pattern.format(split=split) for pattern in patterns for split in self._splits.values()]

    def file_of(self, name: str) -> Path:
        """The image or one of its masks, whichever changed last."""
        lies_in = (split for split in self._splits.values() if name.startswith(f"{self.images.format(split=split)}/"))
        masks = [mask for split in lies_in if (mask := self._mask_path(split, name)).exists()]
        return max([self.root / name, *masks], key=lambda path: path.stat().st_mtime_ns)

    def listings(self) -> dict[str, Listing]:
        listings = {name: self._listing(split) for name, split in self._splits.items()}
        if isinstance(self.test, float):
            return split_off(listings["train"], self.test, str(self.root))
        return listings

    def _listing(self, split: str) -> Listing:
        unused = Unused()
        images = self._files(self.images.format(split=split), IMAGE_SUFFIXES, unused)
        masks = self._files(self.masks.format(split=split), {"png"}, unused)
        # Before hours of packing: whether the splits' lists of classes agree.
        _ = self._own_names
        wanted = self._wanted(split, images)
        names = []
        for stem in wanted:
            if stem in images and stem in masks:
                names.append(images[stem])
            else:
                what = "image without a mask" if stem in images else "listed name without an image"
                unused.add(what, images.get(stem, stem), lost=True)
        if self.lists is None:
            for stem in sorted(masks.keys() - images.keys()):
                unused.add("mask without an image", masks[stem], lost=True)
        if not names:
            raise DataError(
                f"{self.root}: no image of split {split!r} has a mask of its name ({unused or 'the folders are empty'}); "
                "set `images`, `masks`, `train` and `test` of the source"
            )
        return Listing(np.zeros(len(names), np.int64), names, unused)

    def _wanted(self, split: str, images: dict[str, str]) -> list[str]:
        """Names of the samples, without suffix."""
        if self.lists is None:
            return sorted(images)
        lines = lines_of(self.root / self.lists.format(split=split), "; set `lists` of the source")
        return [line.split()[0] for line in lines if line.strip()]

    def _files(self, folder: str, suffixes: Iterable[str], unused: Unused) -> dict[str, str]:
        """Path below `path` of each file of these kinds, by its path in the folder without suffix."""
        root, found = self.root / folder, {}
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; set `path`, `images`, `masks`, `train` and `test` of the source")
        for path in sorted(root.rglob("*")):
            if not path.is_file():
                continue
            stem, name = str(path.relative_to(root).with_suffix("")), str(path.relative_to(self.root))
            suffix = path.suffix[1:].lower()
            if hidden(path.name) is None and suffix in IMAGE_SUFFIXES - set(suffixes):
                unused.add("mask that is no PNG (others blur or recolour labels)", name, lost=False)
            elif hidden(path.name) is not None or suffix not in suffixes:
                unused.add("file that is neither image nor mask", name, lost=False)
            elif found.setdefault(stem, name) != name:
                raise DataError(f"{path}: {found[stem]} has the same name up to its suffix; remove one")
        return found

    def _mask_path(self, split: str, name: str) -> Path:
        """Where the mask of a split's image `name` lies; `.PNG` is a suffix too."""
        inside = name.removeprefix(f"{self.images.format(split=split)}/")
        path = (self.root / self.masks.format(split=split) / inside).with_suffix(".png")
        if path.exists():
            return path
        others = path.parent.glob(f"{escape(path.stem)}.*")
        return next((other for other in sorted(others) if other.suffix.lower() == ".png"), path)

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[WithTarget]:
        # A split that was split off training lies in its folder. Unlike a generator, `map` goes on after a bad file.
        return map(partial(self._read_pair, self._splits.get(split, self.train)), names)

    def _read_pair(self, split: str, name: str) -> WithTarget:
        return WithTarget((self.root / name).read_bytes(), (split, self._mask_path(split, name).read_bytes()))

    def target_of(self, found: tuple[str, bytes]) -> Mask:
        split, data = found
        own = self._own_names[split]
        mask = read_mask(data, num_classes=len(own), first_label=self.first_label, ignore_labels=self.ignore_labels)
        return mask if own == self.classes else renumbered(mask, own, self.classes)


class VOC(MaskFolder):
    """PASCAL VOC as unpacked (VOCdevkit/VOC2012): 21 classes, borders of objects ignored."""

    train: Local = "train"
    test: TestFolder = "val"
    images: Local = "JPEGImages"
    masks: Local = "SegmentationClass"
    lists: Local | None = "ImageSets/Segmentation/{split}.txt"
    class_names: FolderClasses = VOC_CLASSES


class ADE20K(MaskFolder):
    """ADE20K's scene parsing benchmark as unzipped (ADEChallengeData2016): 150 classes, 0 is "other" and ignored."""

    class_names: FolderClasses = "objectInfo150.txt"
    first_label: Annotated[int, Field(ge=0)] = 1

    @cached_property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        if self.class_names != "objectInfo150.txt":
            return super().classes
        path = self.root / "objectInfo150.txt"
        rows = [line.split("\t") for line in lines_of(path, "; point `path` at ADEChallengeData2016")[1:] if line]
        names = tuple(row[-1].strip() for row in rows)
        if len(set(names)) < len(names) or len(names) != ADE20K_CLASSES:
            names = tuple(f"{number} {name}" for number, name in enumerate(names, start=1))
        if len(names) != ADE20K_CLASSES:
            raise DataError(f"{path}: {len(names)} rows of classes, expected {ADE20K_CLASSES}; unzip it again")
        return names
