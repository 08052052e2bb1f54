"""What the packer asks of an image collection, and what the kinds of collections share: options, splits, class names.

A source is one dataset entry of a grid, checked as strictly as the rest of it, plus the code that lists and reads what
it names. One module per kind; `sources.source_of` picks one. Nothing here writes.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from dbscale.data.manifest import Encoding, TargetKind
from dbscale.data.target import Target
from dbscale.errors import DataError, nearest
from dbscale.keyed import frozen_generator
from dbscale.strict import Strict

Content = bytes | NDArray[np.uint8]
"""An encoded image file, or uint8 RGB pixels [H, W, 3] where the source has no files."""


class WithTarget(NamedTuple):
    """One sample of a dense dataset, as its source has it."""

    image: Content
    target: Any
    """What `Source.target_of` makes a mask or boxes of."""


Size = Annotated[int, Field(ge=1)]
_CAPTIONS_FROM = 20
"""From this many samples on, text labels that are nearly all different are taken for captions."""


def _local(place: Any) -> str:
    """Refuse `pipe:` commands, which a shell would run, and URLs (a Path turns `://` into `:/`)."""
    if not isinstance(place, str):
        raise ValueError(f"expected a text, found {place!r}")
    if "pipe:" in place or ":/" in place:
        raise ValueError(f"{place!r} is a pipe or a URL: refused; download the files and give their folder")
    return place


def _patterns(value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"expected a pattern such as '*.tar', or a list of them, found {value!r}")
    return tuple(_local(each) for each in values)


def test_of(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Checks the option `test`: a share, nothing, or what `read` takes."""

    def check(value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < 1:
            raise ValueError(f"as a share it lies between 0 and 1, found {value!r}")
        return value if value is None or isinstance(value, float) else read(value)

    return check


def class_names(value: Any) -> tuple[str, ...]:
    """Checks a list of class names."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f"expected a list of names, each a text (numbers in quotes), found {value!r}")
    twice = sorted({name for name in value if value.count(name) > 1})
    if twice:
        raise ValueError(f"names a class twice: {', '.join(twice[:5])}")
    return tuple(value)


Local = Annotated[str, BeforeValidator(_local)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns)]
"""One pattern or several, such as `train-*.tar`."""
TestPatterns = Annotated[tuple[str, ...] | float | None, BeforeValidator(test_of(_patterns))]
"""Patterns of the test files; a share of the training samples, each class in proportion; None: no test split."""
TestFolder = Annotated[str | float | None, BeforeValidator(test_of(_local))]
"""The same for a folder."""
ClassNames = Annotated[tuple[str, ...] | None, BeforeValidator(lambda value: value and class_names(value))]


class Unused:
    """What a listing leaves out, by reason: counts, and one example each."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str, bool]] = {}

    def add(self, reason: str, example: str, *, lost: bool, count: int = 1) -> None:
        """`lost`: these may be samples, and count against `allow_unused`."""
        before, first, _ = self._found.get(reason, (0, example, lost))
        self._found[reason] = before + count, first, lost

    def update(self, other: Unused) -> None:
        """Add what another one counted."""
        for reason, (count, example, lost) in other._found.items():
            self.add(reason, example, lost=lost, count=count)

    @property
    def lost(self) -> int:
        return sum(count for count, _, lost in self._found.values() if lost)

    @property
    def counts(self) -> dict[str, int]:
        return {reason: count for reason, (count, _, _) in self._found.items()}

    def __str__(self) -> str:
        return "; ".join(
            f"{count:,} × {reason}, for example {printable(example)!r}"
            for reason, (count, example, _) in self._found.items()
        )


@dataclass(frozen=True)
class Listing:
    """The samples of one split, before any is read."""

    labels: NDArray[np.int64]
    """int64 [n], in 0…num_classes-1."""
    names: list[str]
    """A name per sample by which its origin can be found again."""
    unused: Unused = field(default_factory=Unused)
    """What was found beside them."""


class Source(Strict, ABC):
    """A dataset entry: the packer's options, which every kind takes, and what the packer asks of a kind.

    Small and picklable: a copy in another process carries the options alone, and loads what is large when asked for it.
    """

    encoding: Encoding | None = None
    """`original` bytes, `jpeg256` (short side of at most 256), or `raw` uint8; None takes the kind's own."""
    raw_size: Size | None = None
    """Side in px of raw images (short side, then the central square)."""
    shard_samples: Size | None = None
    """Samples per tar; None chooses by encoding."""
    pack_seed: int = 0
    """Seed of the stratified order."""
    allow_unused: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of a split's images that may stay unused before packing is refused."""
    default_encoding: ClassVar[Encoding] = "original"
    remedy: ClassVar[str] = "take these samples out of their file"
    """What to do about samples that cannot be packed, for messages."""
    target: ClassVar[TargetKind | None] = None
    """What lies beside each image of a dense dataset. Its images have no class: all labels are 0."""
    _data_dir: Path = Path()

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names by label."""

    @abstractmethod
    def listings(self) -> dict[str, Listing]:
        """Splits by name, `train` first. Raises DataError on what cannot be listed."""

    @abstractmethod
    def read(
        self, split: str, numbers: NDArray[np.int64], names: Sequence[str]
    ) -> Iterator[Content] | Iterator[WithTarget]:
        """The samples of these numbers (and names) of the split's listing, in this order; pairs in a dense dataset."""

    def target_of(self, found: Any) -> Target:
        """The mask or boxes that `read` found, labels in 0…classes-1. Raises DecodeError on what cannot be one."""
        return found

    def origin(self, name: str) -> str:
        """Where a sample of the listing comes from, for messages."""
        return name

    def file_of(self, name: str) -> Path | None:
        """The file that holds a sample of the listing; None where it is not one file, or none at all."""
        return None

    def watched(self) -> Iterable[Path]:
        """The few files and folders whose times tell whether the source changed; none where it cannot."""
        return ()

    def prepare(self, work: Path) -> Self:
        """The source to read from, after work that is done once for all shards, in `work`; restartable."""
        return self

    def below(self, data_dir: Path) -> Self:
        """This source with relative paths below `data_dir`."""
        copy = self.model_copy()
        copy._data_dir = data_dir
        return copy

    def __getstate__(self) -> dict[Any, Any]:
        fields = {name: value for name, value in self.__dict__.items() if name in type(self).model_fields}
        return {**super().__getstate__(), "__dict__": fields}


class FileSource(Source):
    """A source of files below one path."""

    path: Local

    @property
    def root(self) -> Path:
        return self._data_dir / self.path

    def origin(self, name: str) -> str:
        """The name, below the source's path."""
        return printable(f"{self.root / name}")


@dataclass(frozen=True)
class Part:
    """The samples of one file of an `ArchiveSource`."""

    names: list[str]
    labels: Sequence[int | str]
    """Numbers, or the classes' names."""
    class_names: tuple[str, ...] | None = None
    """What the file itself says the numbers mean."""
    unused: Unused = field(default_factory=Unused)


class ArchiveSource(FileSource):
    """Files that hold many samples each: parquet tables, tars. Classes are matched by name between files and splits."""

    train: Patterns
    """Pattern, or patterns, of the training files below `path`."""
    test: TestPatterns
    class_names: ClassNames = None
    """Names by label; None takes those that the files give, else the labels that occur in training."""
    _spool: Path | None = None
    """Where plain bytes are kept that have to be unpacked before they can be read in any order; set by `prepare`."""
    what: ClassVar[str]
    """What the files are, for messages."""
    wanted: ClassVar[str]
    """What a sample is, for messages."""

    @abstractmethod
    def _part(self, path: Path) -> Part:
        """List one file."""

    @abstractmethod
    def _spool_file(self, path: Path) -> None:
        """Unpack one file into the spool, where that is necessary and not done yet."""

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        patterns: dict[str, Patterns] = {"train": self.train}
        if isinstance(self.test, tuple):
            patterns["test"] = self.test
        return {split: self._matching(wanted) for split, wanted in patterns.items()}

    def _matching(self, patterns: Sequence[str]) -> list[Path]:
        try:
            found = sorted({path for pattern in patterns for path in self.root.glob(pattern) if path.is_file()})
        except (ValueError, NotImplementedError, IndexError) as error:
            raise DataError(
                f"{self.root}: {' or '.join(patterns)!r} is no pattern of files below it ({error})"
            ) from error
        if not found:
            there = sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []
            hint = f"it holds: {printable(', '.join(there[:5]))}" if there else "it does not exist or is empty"
            raise DataError(
                f"{self.root}: no {self.what} matches {' or '.join(map(repr, patterns))} ({hint}); set `path`, `train` "
                "and `test` of the source"
            )
        return found

    def watched(self) -> Iterable[Path]:
        """The folder and every file."""
        return (self.root, *(path for files in self._files.values() for path in files))

    def prepare(self, work: Path) -> Self:
        """Spool every file that is not spooled yet."""
        prepared = self.model_copy()
        prepared._spool = work / "spool"
        for path in (path for files in self._files.values() for path in files):
            prepared._spool_file(path)
        return prepared

    def _spooled(self, relative: str, suffix: str) -> Path:
        assert self._spool is not None
        return self._spool / f"{relative.replace('/', '--')}{suffix}"

    @property
    def classes(self) -> tuple[str, ...]:
        return self._resolved[0]

    def listings(self) -> dict[str, Listing]:
        return self._resolved[1]

    @cached_property
    def _resolved(self) -> tuple[tuple[str, ...], dict[str, Listing]]:
        """Classes, and the listings numbered by them."""
        parts = {split: [self._part(path) for path in files] for split, files in self._files.items()}
        named = [part.class_names for part in parts["train"] if part.class_names is not None]
        known = self.class_names or tuple(dict.fromkeys(name for names in named for name in names))
        unnumbered = {split: self._joined(split, found) for split, found in parts.items()}
        classes, numbers = self._numbered(unnumbered["train"][0], known)
        listings = {}
        for split, (labels, names, unused) in unnumbered.items():
            try:
                listings[split] = Listing(np.array([numbers[label] for label in labels], np.int64), names, unused)
            except KeyError as error:
                raise self._unknown(error.args[0], labels, names, classes, known) from None
        self._count_other_files(listings["train"].unused)
        if isinstance(self.test, float):
            listings = split_off(listings["train"], self.test, str(self.root))
        return classes, listings

    def _joined(self, split: str, parts: Sequence[Part]) -> tuple[list[int | str], list[str], Unused]:
        """Labels, by name where their file names its classes, sample names, and what is unused, of a split's files."""
        labels: list[int | str] = []
        unused = Unused()
        for part in parts:
            own = part.class_names or ()
            for label in part.labels:
                if own and isinstance(label, int) and label >= 0:
                    labels.append(own[label] if label < len(own) else f"number {label}")
                else:
                    labels.append(label)
            unused.update(part.unused)
        if not labels:
            raise DataError(
                f"{self.root}: no sample in split {split!r} ({str(unused) or 'its files are empty'}); wanted: {self.wanted}"
            )
        return labels, [name for part in parts for name in part.names], unused

    def _numbered(
        self, labels: Sequence[int | str], known: tuple[str, ...]
    ) -> tuple[tuple[str, ...], dict[int | str, int]]:
        """The classes, and the number of every label that names one."""
        if known:
            numbers: dict[int | str, int] = {name: number for number, name in enumerate(known)}
            return known, numbers | ({k: k for k in range(len(known))} if self.class_names else {})
        found = set(labels)
        texts = sorted(label for label in found if isinstance(label, str))
        if 0 < len(texts) < len(found):
            raise DataError(f"{self.root}: some labels are numbers, others texts such as {texts[0]!r}; write all alike")
        if len(labels) >= _CAPTIONS_FROM and len(texts) > len(labels) / 2:
            raise DataError(
                f"{self.root}: {len(texts):,} different labels among {len(labels):,} training samples, such as "
                f"{texts[0]!r}: these look like captions; name the labels of the source, or give `class_names`"
            )
        # Numbers in their order, names in alphabetical order; negative numbers mean "no label" everywhere.
        order = texts or sorted(label for label in found if isinstance(label, int) and label >= 0)
        return tuple(map(str, order)), {label: number for number, label in enumerate(order)}

    def _unknown(
        self, label: int | str, labels: list[int | str], names: list[str], classes: Sequence[str], known: Sequence[str]
    ) -> DataError:
        """What to say of a label that names no class."""
        where = self.origin(names[labels.index(label)])
        if isinstance(label, str):
            lack = "is not among the classes" if known else "has no training sample"
            return DataError(f"{where}: class {label!r} {lack}; {nearest(label, classes[:20])}")
        if label < 0:
            what = "is negative, which means unlabelled; leave such samples out, or set `test` to labelled files"
        elif not known:
            what = "has no training sample; add some, or leave these samples out"
        elif label >= len(classes):
            what = f"is out of range 0…{len(classes) - 1}; mend it, or extend the class names"
        else:
            what = "has no name in its file, while other files of the source name theirs; give `class_names`"
        return DataError(f"{where}: label {label} {what}")

    def _count_other_files(self, unused: Unused) -> None:
        used = {path for files in self._files.values() for path in files}
        for path in sorted(self.root.iterdir()):
            if path.is_file() and path not in used:
                unused.add("file that no pattern matches", path.name, lost=False)


def parse_label(text: str, where: str) -> int | str | None:
    """A label that was written as text: a number, or the name of a class; None where it is blank.

    Raises DataError on fractions: to cut them to whole numbers would invent classes.
    """
    text = text.strip()
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    try:
        float(text)
    except ValueError:
        return printable(text) or None
    raise DataError(f"{where}: the label is {text!r}; a label is a whole number or the name of a class")


def printable(text: str) -> str:
    """The text with whatever was not UTF-8 in a file's name written as `\\xe9`: it can be printed and kept in JSON."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\\udc", "\\x")


def one_line(error: Exception) -> str:
    """What a library said of a damaged file, for the middle of a sentence."""
    return " ".join(printable(str(error)).split()) or type(error).__name__


def listing_digest(classes: Sequence[str], listings: Mapping[str, Listing]) -> str:
    """Hash of a source's classes, names and labels: what changes when files come, go or move."""
    digest = hashlib.sha256("\0".join(classes).encode())
    for split, listing in listings.items():
        digest.update(f"{split}\0{len(listing.names)}\0".encode() + listing.labels.tobytes())
        digest.update("\0".join(listing.names).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def stratified_order(labels: NDArray[np.int64], seed: int, split: str) -> NDArray[np.int64]:
    """int64 [n], the sample stored at each position: class after class in turn, so that every prefix is balanced.

    Shuffled within each class, then sorted by in-class rank; ties fall in shuffled order. A pure function of labels
    and seed, and part of every dataset's fingerprint.
    """
    shuffled = frozen_generator("stratify", seed, split).permutation(len(labels))
    return shuffled[np.argsort(_ranks(labels[shuffled]), kind="stable")]


def _ranks(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of its class come before each."""
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    ranks = np.empty(len(labels), np.int64)
    ranks[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def split_off(listing: Listing, share: float, where: str) -> dict[str, Listing]:
    """Training and test split of a listing that has none: `share` of each class, at least one sample, is the test.

    Always the same split, whatever order it is packed in. Raises DataError where a class has a single sample.
    """
    counts = np.bincount(listing.labels)
    if (counts == 1).any():
        raise DataError(f"{where}: label {int(np.argmin(counts != 1))} has a single sample, which no split can share")
    shuffled = frozen_generator("split off").permutation(len(listing.labels))
    wanted = np.clip(np.rint(share * counts).astype(np.int64), 1, counts - 1)
    is_test = np.empty(len(shuffled), bool)
    is_test[shuffled] = _ranks(listing.labels[shuffled]) < wanted[listing.labels[shuffled]]
    parts = {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)}
    return {
        name: Listing(listing.labels[part], [listing.names[number] for number in part.tolist()],
                      listing.unused if name == "train" else Unused())
        for name, part in parts.items()
    }  # fmt: skip
