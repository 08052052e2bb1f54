"""Source `webdataset`: existing WebDataset tars, plain or compressed, brought into the stratified order.

A sample is an image and a label whose names agree up to the last dot, or else up to the first. The tars are walked by
their headers with `tarfile`, and then read by offset; what its lenient reading would skip is an error here. The library
`webdataset` itself neither tells offsets nor notices a tar that ends at a header's boundary (and walks 23,000 samples/s
against 30,000), so it reads what is packed (tests hold that), not what is taken in.
"""

import bz2
import gzip
import json
import lzma
import os
import posixpath
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dbscale.data.read import Descriptor
from dbscale.errors import DataError
from dbscale.files import atomic_open, make_folder
from dbscale.shards.imagefolder import IMAGE_SUFFIXES
from dbscale.shards.source import ArchiveSource, Part, Patterns, TestPatterns, Unused, one_line, parse_label, printable

_PICKLES = {"pkl", "pickle", "pyd", "pth", "pt"}
_LABEL_SUFFIXES = ("cls", "class", "label", "json", "txt")
_LABEL_FIELDS = ("label", "cls", "class", "class_id", "class_name", "category", "target")
_ENDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


class Member(NamedTuple):
    """One regular file inside a tar, or a link to one."""

    name: str
    offset: int
    """Where its data begins, in the unpacked tar."""
    size: int
    """Negative for a link to nothing in the tar."""

    @property
    def suffix(self) -> str:
        """What follows the last dot, in lower case."""
        return self.name.rpartition("/")[2].rpartition(".")[2].lower()

    def key(self, dot: str) -> str:
        """The name up to the `last` dot of its last part, or up to the `first`, as WebDataset splits names."""
        head, slash, tail = self.name.rpartition("/")
        return head + slash + (tail.rpartition(".")[0] if dot == "last" else tail.partition(".")[0])


class WebDatasetTars(ArchiveSource):
    """Local tars; what could run code is refused."""

    train: Patterns = tuple(f"train-*{end}" for end in _ENDS)
    test: TestPatterns = tuple(f"test-*{end}" for end in _ENDS)
    label: str | None = None
    """Suffix of the members that hold the label, for JSON with the field: `cls`, `txt`, `json:species`; None looks
    for the usual ones."""
    what: ClassVar[str] = "tar"
    wanted: ClassVar[str] = "an image (.jpg, .png, …) and a label (.cls, .json, .txt) of one name"

    def origin(self, name: str) -> str:
        """Tar and key."""
        tar, _, _, key = _place(name)
        return printable(f"{self.root / tar}, sample {key!r}")

    def file_of(self, name: str) -> Path:
        return self.root / _place(name)[0]

    def _part(self, path: Path) -> Part:
        relative = path.relative_to(self.root)
        unused = Unused()
        names: list[str] = []
        labels: list[int | str] = []
        with open_tar(path) as file:
            for key, image, label in self._pairs(path, file, unused):
                names.append(f"{relative}:{image.offset}:{image.size}:{key}")
                labels.append(label)
        return Part(names, labels, None, unused)

    def _pairs(self, path: Path, file: IO[bytes], unused: Unused) -> Iterator[tuple[str, Member, int | str]]:
        """(key, image, label) of each sample of a tar, in the order of its images; all else is counted as unused."""
        every = list(walk_tar(path))
        members = [member for member in every if member.size >= 0]
        for member in every:
            if member.size < 0:
                unused.add("link to nothing in the tar", member.name, lost=member.suffix in IMAGE_SUFFIXES)
        suffix, field = self._label_member(members, path, file)
        images = [member for member in members if member.suffix in IMAGE_SUFFIXES]
        labels = [member for member in members if member.suffix == suffix]
        paired = _paired(images, labels, path)
        for member in members:
            if member.suffix not in IMAGE_SUFFIXES and member.suffix != suffix:
                unused.add(f"member that is neither image nor label (.{member.suffix})", member.name, lost=False)
        for image in images:
            if image not in paired:
                unused.add(f"image without a label of its own (.{suffix})", image.name, lost=True)
        used = {label for _, label in paired.values()}
        for label in labels:
            if label not in used:
                unused.add("label without an image of its own", label.name, lost=True)
        for image, (key, label) in paired.items():
            file.seek(label.offset)
            found = _read_label(file.read(label.size), field, f"{path}, sample {key!r}")
            if found is None:
                unused.add("image whose label is blank", image.name, lost=True)
            else:
                yield key, image, found

    def _label_member(self, members: Sequence[Member], path: Path, file: IO[bytes]) -> tuple[str, str | None]:
        """Suffix of the label members and, for JSON, the field."""
        if self.label is not None:
            suffix, _, field = self.label.partition(":")
            return suffix, field or None
        found = Counter(member.suffix for member in members)
        suffix = next((suffix for suffix in _LABEL_SUFFIXES if found[suffix]), "cls")
        if suffix != "json":
            return suffix, None
        first = next(member for member in members if member.suffix == "json")
        file.seek(first.offset)
        fields = _json(file.read(first.size), f"{path}, member {first.name!r}")
        field = next((name for name in _LABEL_FIELDS if name in fields), None)
        if field is None:
            raise DataError(
                f"{path}: no .cls member, and no label field in {first.name!r}, which has: {', '.join(fields)}; set "
                "`label` of the source, for example `label: json:species`"
            )
        return suffix, field

    def _spool_file(self, path: Path) -> None:
        target = self._spooled(str(path.relative_to(self.root)), ".tar")
        if _opener(path) is open or target.exists():
            return
        make_folder(target.parent)
        with open_tar(path) as packed, atomic_open(target) as out:
            for chunk in _chunks(packed, path):
                out.write(chunk)

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[bytes]:
        for name in names:
            tar, offset, size, _ = _place(name)
            yield os.pread(self._descriptor(tar).number, size, offset)

    @cached_property
    def _descriptor(self) -> Any:
        def open_plain(tar: str) -> Descriptor:
            packed = _opener(self.root / tar) is not open
            return Descriptor(self._spooled(tar, ".tar") if packed else self.root / tar)

        return lru_cache(maxsize=64)(open_plain)


def _place(name: str) -> tuple[str, int, int, str]:
    """(tar, offset, size, key) of a sample's name."""
    tar, offset, size, key = name.split(":", 3)
    return tar, int(offset), int(size), key


def _paired(images: Sequence[Member], labels: Sequence[Member], path: Path) -> dict[Member, tuple[str, Member]]:
    """Key and label of each image that has one of its own: names agree up to the last dot, else up to the first."""
    paired: dict[Member, tuple[str, Member]] = {}
    for dot in ("last", "first"):
        free: dict[str, tuple[list[Member], list[Member]]] = defaultdict(lambda: ([], []))
        used = {label for _, label in paired.values()}
        for image in images:
            if image not in paired:
                free[image.key(dot)][0].append(image)
        for label in labels:
            if label not in used:
                free[label.key(dot)][1].append(label)
        for key, (some_images, some_labels) in free.items():
            if dot == "last" and max(len(some_images), len(some_labels)) > 1:
                one, other, *_ = some_images if len(some_images) > 1 else some_labels
                raise DataError(
                    f"{path}: key {key!r} has two members of a kind, {one.name!r} and {other.name!r}; keys must be unique"
                )
            if len(some_images) == len(some_labels) == 1:
                paired[some_images[0]] = key, some_labels[0]
    return {image: paired[image] for image in images if image in paired}


def _read_label(data: bytes, field: str | None, where: str) -> int | str | None:
    if field is None:
        return parse_label(data.decode("utf-8", "backslashreplace"), where)
    value = _json(data, where).get(field)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or isinstance(value, str):
        return parse_label(value or "", where)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(
            f"{where}: the label {field!r} is {str(value)[:40]}; a label is a whole number or the name of a class"
        )
    return value


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its JSON cannot be read ({one_line(error)})") from error
    return value if isinstance(value, dict) else {"label": value}


# --- tars ---


def _opener(path: Path) -> Any:
    """How to open a tar, told from its first bytes."""
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except FileNotFoundError as error:
        raise DataError(f"{path}: shard is missing") from error
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        raise DataError(f"{path}: is compressed with zstd; unpack it with `unzstd`, and name the plain tars")
    return next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), open)


def open_tar(path: Path) -> IO[bytes]:
    """The bytes of a tar, unpacked where it is compressed."""
    return _opener(path)(path, "rb")


def _chunks(packed: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        while chunk := packed.read(1 << 22):
            yield chunk
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be unpacked ({one_line(error)}); fetch it again") from error


class _Header(tarfile.TarInfo):
    def _block(self, count: int) -> int:
        # A negative size makes the library walk in a circle (CVE-2025-8194); its later releases refuse it like this.
        if count < 0:
            raise tarfile.HeaderError("negative size")
        return super()._block(count)  # type: ignore[misc]


def walk_tar(path: Path, remedy: str = "fetch it again") -> Iterator[Member]:
    """Regular files in stored order, then links with the place of what they point at; from the headers alone.

    `remedy` ends the messages about a damaged tar. Raises DataError for one that is cut short or without its end mark, a
    corrupt header, a pickle, or a name that leaves the archive.
    """
    places: dict[str, Member] = {}
    links: list[tuple[str, str]] = []
    try:
        with open_tar(path) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
            for info in archive:
                _check_name(info.name, path)
                if info.islnk():
                    links.append((info.name, info.linkname))
                elif info.issym():
                    links.append(
                        (info.name, posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname)))
                    )
                elif info.isreg() and not info.issparse():
                    yield places.setdefault(info.name, Member(info.name, info.offset_data, info.size))
                elif not info.isdir():
                    yield Member(info.name, 0, -1)
                archive.members.clear()  # type: ignore[attr-defined]  # else a list of all headers is kept
            _check_end(file, archive.offset, path, remedy)
    except DataError:
        raise
    except tarfile.ReadError as error:
        cut = any(word in str(error) for word in ("unexpected end", "empty", "truncated"))
        what = "truncated" if cut else "corrupt tar header"
        raise DataError(f"{path}: {what} ({one_line(error)}); {remedy}") from error
    except Exception as error:  # on damaged input, tarfile and the kinds of compression raise many others
        raise DataError(f"{path}: corrupt tar ({one_line(error)}); {remedy}") from error
    for name, target in links:
        yield places[target]._replace(name=name) if target in places else Member(name, 0, -1)


def _check_end(file: IO[bytes], offset: int, path: Path, remedy: str) -> None:
    """`tarfile` takes whatever is no header for the end; only a block of zeros is."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(
            f"{path}: truncated: ends at byte {offset + len(block):,} without the end mark of a tar; {remedy}"
        )
    if any(block):
        raise DataError(f"{path}: corrupt tar header at byte {offset:,}; {remedy}")


def _check_name(name: str, path: Path) -> None:
    """Refuse pickles, absolute names and names with `..`."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(f"{path}: member {name!r} points outside the archive: refused; make the tar without such names")
    if name.rpartition(".")[2].lower() in _PICKLES:
        raise DataError(f"{path}: member {name!r} is a pickle, which can run code: refused; store plain files instead")
