"""Source `parquet`: image tables such as Hugging Face's (a column with image bytes, one with labels).

Labels are whole numbers, numbers whose names the file knows (`ClassLabel`), texts or categories. Samples are wanted in
stratified order, which a compressed columnar file serves badly; so each file is first spooled to plain bytes in the
pack's work folder, once, and read by offset from there.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dbscale.data.read import Descriptor
from dbscale.errors import DataError
from dbscale.files import atomic_open, make_folder
from dbscale.shards.source import ArchiveSource, Part, Patterns, TestPatterns, one_line, printable


class Parquet(ArchiveSource):
    """Parquet files below `path`."""

    train: Patterns = ("train-*.parquet",)
    test: TestPatterns = ("test-*.parquet",)
    image_column: str = "image"
    label_column: str = "label"
    what: ClassVar[str] = "parquet file"
    wanted: ClassVar[str] = "rows with image bytes and a label"

    def origin(self, name: str) -> str:
        """File and row."""
        file, row = name.rsplit(":", 1)
        return f"{self.root / file}, row {row}"

    def file_of(self, name: str) -> Path:
        return self.root / name.rsplit(":", 1)[0]

    def _part(self, path: Path) -> Part:
        file = self._open(path)
        try:
            column = file.read([self.label_column])[self.label_column]
            labels = self._labels(column, path)
        except DataError:
            raise
        except Exception as error:  # pyarrow raises its own kinds on damaged files
            raise DataError(
                f"{path}: column {self.label_column!r} cannot be read ({one_line(error)}); fetch it again"
            ) from error
        names = [f"{path.relative_to(self.root)}:{row}" for row in range(len(labels))]
        return Part(names, labels, self._class_names(file, path))

    def _open(self, path: Path) -> Any:
        from pyarrow import parquet  # takes a while to import, and only this source needs it

        try:
            file = parquet.ParquetFile(path)
            columns = file.schema_arrow.names
        except Exception as error:
            raise DataError(f"{path}: not a readable parquet file ({one_line(error)}); fetch it again") from error
        missing = [name for name in (self.image_column, self.label_column) if name not in columns]
        if missing:
            raise DataError(
                f"{path}: no column {missing[0]!r}; it has: {', '.join(columns)}; set image_column, label_column"
            )
        return file

    def _labels(self, column: Any, path: Path) -> list[int | str]:
        """Labels of one file's column; raises DataError on what is neither a whole number nor a text."""
        from pyarrow import types

        if not len(column):  # whose type may be null
            return []
        kind = column.type.value_type if types.is_dictionary(column.type) else column.type
        if not (
            types.is_integer(kind) or types.is_floating(kind) or types.is_string(kind) or types.is_large_string(kind)
        ):
            raise DataError(
                f"{path}: column {self.label_column!r} holds {column.type}; a label is a whole number or the name of a "
                "class: set label_column, or write such a column"
            )
        values = column.to_pylist()
        for row, value in enumerate(values):
            if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
                raise DataError(f"{path}, row {row}: has no label; take such rows out")
            if isinstance(value, float) and not value.is_integer():
                raise DataError(
                    f"{path}, row {row}: the label is {value}; a label is a whole number or the name of a class: set "
                    "label_column, or write such a column"
                )
        if all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", str(value)) for value in values) or types.is_floating(kind):
            return [int(value) for value in values]
        return [printable(value) if isinstance(value, str) else value for value in values]

    def _class_names(self, file: Any, path: Path) -> tuple[str, ...] | None:
        """What Hugging Face's metadata call the numbers."""
        metadata = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        try:
            features = json.loads(metadata).get("info", {}).get("features", {})
            names = features.get(self.label_column, {}).get("names")
        except (ValueError, AttributeError):
            return None
        if not names:
            return None
        if (
            not isinstance(names, list)
            or not all(isinstance(name, str) for name in names)
            or len(set(names)) < len(names)
        ):
            raise DataError(f"{path}: its names of the labels are {str(names)[:80]}: expected different texts")
        return tuple(map(printable, names))

    def _spool_file(self, path: Path) -> None:
        relative = str(path.relative_to(self.root))
        data_path, ends_path = self._spooled(relative, ".bin"), self._spooled(relative, ".ends.npy")
        if ends_path.exists():
            return
        make_folder(data_path.parent)
        ends: list[int] = []
        position = 0
        with atomic_open(data_path) as out:
            for value in self._images(path):
                data = value.get("bytes") if isinstance(value, dict) else value
                if not isinstance(data, bytes):
                    raise DataError(f"{path}: row {len(ends)} of column {self.image_column!r} holds no image bytes")
                out.write(data)
                position += len(data)
                ends.append(position)
        with atomic_open(ends_path) as out:
            np.save(out, np.array(ends, np.int64), allow_pickle=False)

    def _images(self, path: Path) -> Iterator[Any]:
        file = self._open(path)
        try:
            for batch in file.iter_batches(batch_size=256, columns=[self.image_column]):
                yield from batch.column(0).to_pylist()
        except Exception as error:
            raise DataError(
                f"{path}: column {self.image_column!r} cannot be read ({one_line(error)}); fetch it again"
            ) from error

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[bytes]:
        for name in names:
            relative, row_text = name.rsplit(":", 1)
            row = int(row_text)
            file, ends = self._reader(relative)
            start = int(ends[row - 1]) if row else 0
            yield os.pread(file.number, int(ends[row]) - start, start)

    @cached_property
    def _reader(self) -> Any:
        def open_spooled(relative: str) -> tuple[Descriptor, NDArray[np.int64]]:
            ends = np.load(self._spooled(relative, ".ends.npy"), allow_pickle=False)
            return Descriptor(self._spooled(relative, ".bin")), ends

        return lru_cache(maxsize=64)(open_spooled)
