"""List the members of a tar by reading its headers alone, strictly: what a lenient reader would skip is an error here.

`webdataset` ends silently short on a tar cut at a header's boundary; this does not. Contents are left to the caller.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dbscale.errors import DataError

_BLOCK = tarfile.BLOCKSIZE
_PICKLES = {"pkl", "pickle", "pyd", "pth", "pt"}
_EXTENDED = {tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}


class Member(NamedTuple):
    """One regular file inside a tar."""

    name: str
    offset: int
    """Of its data."""
    size: int

    @property
    def key(self) -> str:
        """Name up to the first dot of its last part, as WebDataset splits names."""
        head, _, tail = self.name.rpartition("/")
        return f"{head}/{tail.split('.', 1)[0]}" if head else tail.split(".", 1)[0]

    @property
    def suffix(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2].lower()


def walk_tar(path: Path, remedy: str = "fetch it again") -> Iterator[Member]:
    """Regular files in stored order; `remedy` ends the messages about a damaged tar.

    Raises:
        DataError: truncated, a corrupt header, a missing end mark, a pickle, or a name that leaves the archive.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb", buffering=1 << 16) as file:
            yield from _walk(file, path, size, remedy)
    except FileNotFoundError as error:
        raise DataError(f"{path}: shard is missing") from error


def _walk(file, path: Path, size: int, remedy: str) -> Iterator[Member]:
    position, long_name = 0, None
    while True:
        header = os.pread(file.fileno(), _BLOCK, position)
        if len(header) < _BLOCK:
            raise DataError(f"{path}: truncated: ends at byte {size:,} without the end mark of a tar; {remedy}")
        if header == bytes(_BLOCK):
            return
        info = _parse(header, path, position, remedy)
        data = position + _BLOCK
        end = data + -(-info.size // _BLOCK) * _BLOCK
        if end > size:
            raise DataError(f"{path}: truncated: {info.name!r} needs {end:,} bytes, the file has {size:,}; {remedy}")
        if info.type in _EXTENDED:
            long_name = _long_name(os.pread(file.fileno(), info.size, data), info.type)
        else:
            name, long_name = long_name or info.name, None
            if info.isreg():
                check_member_name(name, path)
                yield Member(name, data, info.size)
        position = end


def _parse(header: bytes, path: Path, position: int, remedy: str) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(f"{path}: corrupt tar header at byte {position:,} ({error}); {remedy}") from error


def _long_name(data: bytes, kind: bytes) -> str | None:
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    records = (line.split(b" ", 1)[1] for line in data.split(b"\n") if b" " in line)
    fields = dict(record.split(b"=", 1) for record in records if b"=" in record)
    return fields[b"path"].decode() if b"path" in fields else None


def check_member_name(name: str, path: Path) -> None:
    """Refuse pickles, absolute names and names with `..`."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(f"{path}: member {name!r} points outside the archive: refused; make the tar without such names")
    if name.rpartition(".")[2].lower() in _PICKLES:
        raise DataError(f"{path}: member {name!r} is a pickle, which can run code: refused; store plain files instead")
