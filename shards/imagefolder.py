"""Sources `imagefolder` and `tinyimagenet`: one file per image, its class told by a folder or by an annotation file.

`imagefolder` is <path>/<split>/<class>/**/<image>, the layout of torchvision's ImageFolder and of ImageNet; with
`test: 0.2` also <path>/<class>/**/<image>, which is then split. `tinyimagenet` is TinyImageNet as unzipped.
"""

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator

from dbscale.errors import DataError, nearest
from dbscale.shards.source import FileSource, Listing, Local, TestFolder, Unused, class_names, printable, split_off

_SUFFIXES = """
jpg jpeg jpe jfif png ppm pgm pbm pnm pfm webp bmp dib gif tif tiff avif jp2 j2k jpf jpx ico cur icns tga qoi pcx sgi psd dds
"""
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())
"""By which names are taken for images; what a file holds is told from its bytes."""
_LITTER = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})


def _class_list(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else class_names(value)


class ImageFolder(FileSource):
    """Every file below a class folder is a sample, except hidden ones and those that are excluded."""

    train: Local = "train"
    """Folder of the training split."""
    test: TestFolder = "test"
    class_list: Annotated[tuple[str, ...] | str | None, BeforeValidator(_class_list)] = None
    """Class folders to take, in label order, or a text file with one name at the start of each line; None: all, sorted."""
    exclude_classes: Annotated[tuple[str, ...] | str | None, BeforeValidator(_class_list)] = None
    """Class folders to leave out, in the same form: those of a downstream set, say, whose images must be new."""
    exclude: tuple[str, ...] = ()
    """Files and folders to leave out, relative to `path`; `*` stands for any text."""
    remedy: ClassVar[str] = "mend or remove such files (or list them under the source's `exclude`)"

    @cached_property
    def _splits(self) -> dict[str, str]:
        """Folder of each split, below `path`."""
        if isinstance(self.test, str):
            return {"train": self.train, "test": self.test}
        unsplit = self.test is not None and not (self.root / self.train).is_dir()
        return {"train": "." if unsplit else self.train}

    @cached_property
    def _folders(self) -> tuple[str, ...]:
        """The class folders, in label order."""
        found = self._folders_in(self._splits["train"])
        wanted = found if self.class_list is None else self._listed(self.class_list, found)
        return tuple(name for name in wanted if name not in self._left_out)

    @cached_property
    def _left_out(self) -> frozenset[str]:
        """The class folders that `exclude_classes` names."""
        listed = () if self.exclude_classes is None else self.exclude_classes
        return frozenset(self._listed(listed, self._folders_in(self._splits["train"])))

    def _listed(self, names: tuple[str, ...] | str, found: Sequence[str]) -> tuple[str, ...]:
        """A list of classes, or what stands in its file; each must have a folder."""
        names = names if isinstance(names, tuple) else _names_in(self._data_dir / names)
        missing = sorted(set(names) - set(found))
        if missing:
            raise DataError(
                f"{self.root / self._splits['train']}: {len(missing)} classes of the class list have no folder, among "
                f"them {', '.join(missing[:5])}; {nearest(missing[0], found[:20])}"
            )
        return names

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(printable(name) for name in self._folders)

    def _folders_in(self, split: str) -> list[str]:
        folder = self.root / split
        if not folder.is_dir():
            there = sorted(entry.name for entry in self.root.iterdir()) if self.root.is_dir() else []
            hint = (
                f"{self.root} holds: {printable(', '.join(there[:10]))}; set `path`, `train` and `test` of the source, or "
                "`test: 0.2` to split off a share" if there else f"{self.root} does not exist or is empty; set `path`"
            )  # fmt: skip
            raise DataError(f"{folder}: no such folder ({hint})")
        names = sorted(
            entry.name for entry in list(os.scandir(folder)) if entry.is_dir() and hidden(entry.name) is None
        )
        names = [name for name in names if not self._is_excluded(os.path.normpath(f"{split}/{name}"))]
        if not names:
            raise DataError(f"{folder}: holds no class folders; expected <class>/<image> below it")
        return names

    def watched(self) -> Iterable[Path]:
        """The split folders and the class folders."""
        folders = [self.root / split for split in self._splits.values()]
        return (*folders, *(folder / name for folder in folders for name in self._folders))

    def file_of(self, name: str) -> Path:
        return self.root / name

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[bytes]:
        # Unlike a generator, `map` goes on after a file that cannot be read.
        return map(lambda name: (self.root / name).read_bytes(), names)

    def listings(self) -> dict[str, Listing]:
        listings = {name: self._listing(folder) for name, folder in self._splits.items()}
        unmatched = [pattern for pattern, matched in self._matched.items() if not matched]
        if unmatched:
            raise DataError(
                f"{self.root}: `exclude` names {unmatched[0]!r}, which matches no file below it; mend or remove it"
            )
        beside = {folder.split("/")[0] for folder in self._splits.values()}
        if "." not in beside:
            for name in sorted(entry.name for entry in self.root.iterdir() if entry.name not in beside):
                listings["train"].unused.add("file or folder beside the splits", name, lost=False)
        if isinstance(self.test, float):
            return split_off(listings["train"], self.test, str(self.root))
        return listings

    def _listing(self, split: str) -> Listing:
        found: dict[str, list[str]] = {name: [] for name in self._folders}
        surplus = set(self._folders_in(split)) - found.keys() - self._left_out
        if surplus and self.class_list is None:
            raise DataError(f"{self.root / split}: classes without training images: {', '.join(sorted(surplus)[:5])}")
        unused = Unused()
        for name, folder, why in self._walk(split, (), None):
            if why is None and folder in found:
                found[folder].append(name)
            elif why in ("excluded file", "litter"):
                unused.add(why, name, lost=False)
            elif why is not None or folder is None:
                is_image = name.rpartition(".")[2].lower() in IMAGE_SUFFIXES
                what = why or "outside the class folders"
                unused.add(f"{'image' if is_image else 'file'} {what}", name, lost=is_image)
            else:
                which = "left out" if folder in self._left_out else "not in the class list"
                unused.add(f"file in a class that is {which}", name, lost=False)
        for name, files in found.items():
            if not files:
                raise DataError(
                    f"{self.root / split / name}: class folder is empty or missing; add images, or leave the class "
                    "out with a class list"
                )
        names = [file for files in found.values() for file in sorted(files)]
        counts = [len(files) for files in found.values()]
        return Listing(np.repeat(np.arange(len(counts)), counts), names, unused)

    def _walk(
        self, folder: str, above: tuple[tuple[int, int], ...], why: str | None, name: str | None = None
    ) -> Iterator[tuple[str, str | None, str | None]]:
        """(file, class folder, why it is left out) of every file below a split's folder."""
        root = self.root / folder
        status = root.stat()
        if (status.st_dev, status.st_ino) in above:
            raise DataError(f"{root}: a symbolic link that leads in a circle; remove it")
        for entry in list(os.scandir(root)):
            relative = entry.name if folder == "." else f"{folder}/{entry.name}"
            reason = why or ("excluded file" if self._is_excluded(relative) else hidden(entry.name))
            if entry.is_dir():
                yield from self._walk(relative, (*above, (status.st_dev, status.st_ino)), reason, name or entry.name)
            elif reason is None and not entry.is_file() and not entry.is_symlink():
                yield relative, name, "that is no regular file"
            else:
                yield relative, name, reason

    @cached_property
    def _matched(self) -> dict[str, bool]:
        """Which patterns of `exclude` have matched anything."""
        return dict.fromkeys(self.exclude, False)

    def _is_excluded(self, relative: str) -> bool:
        matching = [
            pattern for pattern in self.exclude if relative == pattern or fnmatch.fnmatchcase(relative, pattern)
        ]
        self._matched.update(dict.fromkeys(matching, True))
        return bool(matching)


def hidden(name: str) -> str | None:
    """Why a file or folder is passed over by its name: what systems leave behind, or a dot in front."""
    if name in _LITTER or name.startswith("._") or name == ".DS_Store":
        return "litter"
    return "that is hidden" if name.startswith(".") else None


def lines_of(path: Path, remedy: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}){remedy}") from error


def _names_in(path: Path, remedy: str = "") -> tuple[str, ...]:
    """The names (say, WordNet ids) at the start of each line of a text file."""
    lines = (line for line in lines_of(path, remedy) if line.strip() and not line.lstrip().startswith("#"))
    try:
        return class_names([line.split()[0] for line in lines])
    except ValueError as error:
        raise DataError(f"{path}: class list {error}") from error


class TinyImageNet(ImageFolder):
    """200 classes at 64 px; the official validation split, whose labels stand in a file, serves as the test split."""

    test: TestFolder = "val"
    remedy: ClassVar[str] = "unzip the archive again, or remove such files"

    @cached_property
    def _folders(self) -> tuple[str, ...]:
        return _names_in(self.root / "wnids.txt", "; point `path` at the unzipped tiny-imagenet-200")

    def watched(self) -> Iterable[Path]:
        """Where images lie, and the file of annotations."""
        folders = (self.root / "train" / name / "images" for name in self._folders)
        return (*folders, self.root / "val/images", self.root / "val/val_annotations.txt")

    def _is_excluded(self, relative: str) -> bool:
        return relative.endswith("_boxes.txt") or super()._is_excluded(relative)

    def _listing(self, split: str) -> Listing:
        if split != "val":
            return super()._listing(split)
        path = self.root / "val/val_annotations.txt"
        label_of = {wordnet_id: label for label, wordnet_id in enumerate(self._folders)}
        rows = [line.split("\t") for line in lines_of(path, "; unzip the archive again") if line]
        for row in rows:
            if len(row) < 2 or row[1] not in label_of or not re.fullmatch(r"[\w-]+\.JPEG", row[0]):
                raise DataError(f"{path}: unknown class or file in line {row!r}")
        unused = Unused()
        for name in sorted({entry.name for entry in (self.root / "val/images").glob("*")} - {row[0] for row in rows}):
            unused.add("validation image without annotation", name, lost=True)
        labels = np.array([label_of[row[1]] for row in rows], np.int64)
        return Listing(labels, [f"val/images/{row[0]}" for row in rows], unused)
