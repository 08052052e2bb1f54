"""Sources `parquet` and `parquet_masks`: image tables such as Hugging Face's (a column with image bytes, one with labels
or with masks).

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
from pydantic import Field

from dbscale.data.manifest import TargetKind
from dbscale.data.read import Descriptor
from dbscale.data.target import Mask
from dbscale.errors import DataError
from dbscale.files import atomic_open, make_folder
from dbscale.shards.source import ArchiveSource, Part, Patterns, TestPatterns, WithTarget, one_line, printable
from dbscale.shards.target import MaskClasses, read_mask

_WANTED = "a label is a whole number or the name of a class: set label_column, or write such a column"


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
        wanted = self._columns
        missing = [column for column in wanted.values() if column not in columns]
        if missing:
            raise DataError(f"{path}: no column {missing[0]!r}; it has: {', '.join(columns)}; set {', '.join(wanted)}")
        return file

    @property
    def _columns(self) -> dict[str, str]:
        """What is read, by the option that names it."""
        return {"image_column": self.image_column, "label_column": self.label_column}

    def _labels(self, column: Any, path: Path) -> list[int | str]:
        """Labels of one file's column; raises DataError on what is neither a whole number nor a text."""
        from pyarrow import types

        if not len(column):  # whose type may be null
            return []
        kind = column.type.value_type if types.is_dictionary(column.type) else column.type
        allowed = (types.is_integer, types.is_floating, types.is_string, types.is_large_string)
        if not any(holds(kind) for holds in allowed):
            raise DataError(f"{path}: column {self.label_column!r} holds {column.type}; {_WANTED}")
        values = column.to_pylist()
        for row, value in enumerate(values):
            if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
                raise DataError(f"{path}, row {row}: has no label; take such rows out")
            if isinstance(value, float) and not value.is_integer():
                raise DataError(f"{path}, row {row}: the label is {value}; {_WANTED}")
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
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not texts or len(set(names)) < len(names):
            raise DataError(f"{path}: its names of the labels are {str(names)[:80]}: expected different texts")
        return tuple(map(printable, names))

    def _spool_file(self, path: Path) -> None:
        self._spool_column(path, self.image_column, "")

    def _spool_column(self, path: Path, column: str, mark: str) -> None:
        relative = str(path.relative_to(self.root))
        data_path, ends_path = self._spooled(relative, f"{mark}.bin"), self._spooled(relative, f"{mark}.ends.npy")
        if ends_path.exists():
            return
        make_folder(data_path.parent)
        ends: list[int] = []
        position = 0
        with atomic_open(data_path) as out:
            for value in self._values(path, column):
                data = value.get("bytes") if isinstance(value, dict) else value
                if not isinstance(data, bytes):
                    raise DataError(f"{path}: row {len(ends)} of column {column!r} holds no image bytes")
                out.write(data)
                position += len(data)
                ends.append(position)
        with atomic_open(ends_path) as out:
            np.save(out, np.array(ends, np.int64), allow_pickle=False)

    def _values(self, path: Path, column: str) -> Iterator[Any]:
        file = self._open(path)
        try:
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                yield from batch.column(0).to_pylist()
        except Exception as error:
            raise DataError(f"{path}: column {column!r} cannot be read ({one_line(error)}); fetch it again") from error

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[Any]:
        return (self._bytes(name, "") for name in names)

    def _bytes(self, name: str, mark: str) -> bytes:
        """What a sample's row holds in the column that was spooled with this mark."""
        relative, row_text = name.rsplit(":", 1)
        row = int(row_text)
        file, ends = self._reader(relative, mark)
        start = int(ends[row - 1]) if row else 0
        return os.pread(file.number, int(ends[row]) - start, start)

    @cached_property
    def _reader(self) -> Any:
        def open_spooled(relative: str, mark: str) -> tuple[Descriptor, NDArray[np.int64]]:
            ends = np.load(self._spooled(relative, f"{mark}.ends.npy"), allow_pickle=False)
            return Descriptor(self._spooled(relative, f"{mark}.bin")), ends

        return lru_cache(maxsize=64)(open_spooled)


class MaskParquet(Parquet):
    """The same with a column of masks (PNG bytes, as Hugging Face's `Image` feature writes them) in place of labels."""

    mask_column: str = "label"
    class_names: MaskClasses  # type: ignore[assignment]
    first_label: int = Field(default=0, ge=0)
    """The number of the first class in the masks; what lies below is ignored."""
    ignore_labels: tuple[int, ...] = (255,)
    """Numbers in the masks that are no class."""
    target: ClassVar[TargetKind | None] = "mask"
    wanted: ClassVar[str] = "rows with image bytes and mask bytes"

    @property
    def _columns(self) -> dict[str, str]:
        return {"image_column": self.image_column, "mask_column": self.mask_column}

    def _part(self, path: Path) -> Part:
        num_rows = self._open(path).metadata.num_rows
        names = [f"{path.relative_to(self.root)}:{row}" for row in range(num_rows)]
        return Part(names, [0] * num_rows)

    def _spool_file(self, path: Path) -> None:
        self._spool_column(path, self.image_column, "")
        self._spool_column(path, self.mask_column, ".mask")

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[Any]:
        return (WithTarget(self._bytes(name, ""), self._bytes(name, ".mask")) for name in names)

    def target_of(self, found: bytes) -> Mask:
        return read_mask(
            found, num_classes=len(self.classes), first_label=self.first_label, ignore_labels=self.ignore_labels
        )
