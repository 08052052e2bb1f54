"""Source `parquet`: Hugging Face image datasets as parquet files (a struct column with `bytes`, an integer label).

Samples are wanted in stratified order, which a compressed columnar file serves badly; so each file is first spooled to
plain bytes in the pack's work folder, once, and read by offset from there.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbscale.data.manifest import Encoding
from dbscale.errors import DataError
from dbscale.files import atomic_open, make_folder
from shards.source import FieldSource, Listing


@dataclass(frozen=True)
class Parquet(FieldSource):
    """Parquet files below `path`."""

    path: Path
    train: str = "train-*.parquet"
    """Pattern of the training files below `path`."""
    test: str | None = "test-*.parquet"
    """Pattern of the test files; None packs no test split."""
    image_column: str = "image"
    label_column: str = "label"
    spool: Path | None = None
    """Where plain bytes are kept; set by the packer."""

    @property
    def default_encoding(self) -> Encoding:
        return "original"

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        patterns = {"train": self.train} if self.test is None else {"train": self.train, "test": self.test}
        files = {split: sorted(self.path.glob(pattern)) for split, pattern in patterns.items()}
        for split, found in files.items():
            if not found:
                raise DataError(
                    f"{self.path}: no parquet file matches {patterns[split]!r}; set `path`, `train`, `test`"
                )
        return files

    @cached_property
    def classes(self) -> tuple[str, ...]:
        metadata = self._open(self._files["train"][0]).schema_arrow.metadata or {}
        info = json.loads(metadata.get(b"huggingface", b"{}"))
        names = info.get("info", {}).get("features", {}).get(self.label_column, {}).get("names")
        if names:
            return tuple(names)
        return tuple(str(label) for label in range(1 + max(int(part.labels.max()) for part in self._listed.values())))

    def _open(self, path: Path) -> Any:
        from pyarrow import parquet  # takes a while to import, and only this source needs it

        try:
            file = parquet.ParquetFile(path)
        except Exception as error:  # pyarrow raises its own kinds on damaged files
            raise DataError(f"{path}: not a readable parquet file ({error}); fetch it again") from error
        columns = file.schema_arrow.names
        missing = [name for name in (self.image_column, self.label_column) if name not in columns]
        if missing:
            raise DataError(
                f"{path}: no column {missing[0]!r}; it has: {', '.join(columns)}; set image_column, label_column"
            )
        return file

    @cached_property
    def _listed(self) -> dict[str, Listing]:
        return {split: self._listing(files) for split, files in self._files.items()}

    def _listing(self, files: list[Path]) -> Listing:
        columns = [self._open(path).read([self.label_column])[self.label_column].to_numpy() for path in files]
        names = [
            f"{path.relative_to(self.path)}:{row}" for path, column in zip(files, columns, strict=True)
            for row in range(len(column))
        ]  # fmt: skip
        return Listing(np.concatenate(columns).astype(np.int64), names)

    def listings(self) -> dict[str, Listing]:
        for listing in self._listed.values():
            wrong = np.flatnonzero((listing.labels < 0) | (listing.labels >= len(self.classes)))
            if len(wrong):
                raise DataError(
                    f"{self.origin(listing.names[wrong[0]])}: label {listing.labels[wrong[0]]} is out of range "
                    f"0…{len(self.classes) - 1}; mend it (unlabelled files hold -1: set `test` to others)"
                )
        return self._listed

    def origin(self, name: str) -> str:
        """File and row."""
        file, row = name.rsplit(":", 1)
        return f"{self.path / file}, row {row}"

    def prepare(self, work: Path) -> "Parquet":
        """Spool every file that is not spooled yet."""
        prepared = replace(self, spool=work / "spool")
        for path in (path for files in self._files.values() for path in files):
            prepared._spool_file(path)
        return prepared

    def _spool_file(self, path: Path) -> None:
        data_path, ends_path = self._spooled(str(path.relative_to(self.path)))
        if ends_path.exists():
            return
        make_folder(data_path.parent)
        ends: list[int] = []
        position = 0
        with atomic_open(data_path) as out:
            for batch in self._open(path).iter_batches(batch_size=256, columns=[self.image_column]):
                for value in batch.column(0).to_pylist():
                    data = self._bytes(value, path, len(ends))
                    out.write(data)
                    position += len(data)
                    ends.append(position)
        with atomic_open(ends_path) as out:
            np.save(out, np.array(ends, np.int64), allow_pickle=False)

    def _bytes(self, value: Any, path: Path, row: int) -> bytes:
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DataError(f"{path}: row {row} of column {self.image_column!r} holds no image bytes")
        return data

    def _spooled(self, relative: str) -> tuple[Path, Path]:
        assert self.spool is not None
        stem = relative.replace("/", "--")
        return self.spool / f"{stem}.bin", self.spool / f"{stem}.ends.npy"

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[bytes]:
        for name in names:
            relative, row_text = name.rsplit(":", 1)
            row = int(row_text)
            descriptor, ends = self._spool_reader(relative)
            start = int(ends[row - 1]) if row else 0
            yield os.pread(descriptor, int(ends[row]) - start, start)

    def _spool_reader(self, relative: str) -> tuple[int, NDArray[np.int64]]:
        opened: dict[str, tuple[int, NDArray[np.int64]]] = self.__dict__.setdefault("_opened", {})
        if relative not in opened:
            data_path, ends_path = self._spooled(relative)
            opened[relative] = os.open(data_path, os.O_RDONLY), np.load(ends_path, allow_pickle=False)
        return opened[relative]
