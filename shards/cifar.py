"""Source `cifar`: CIFAR-10 and CIFAR-100 as published, binary or python layout, unpacked or as the .tar.gz archive.

The python layout is a pickle; it is read by an unpickler that knows NumPy arrays and nothing else.
"""

import io
import pickle
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dbscale.data.manifest import Encoding
from dbscale.errors import DataError
from dbscale.shards.source import FileSource, Listing, one_line

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """Which files one published form consists of."""

    folder: str
    train: tuple[str, ...]
    test: str
    classes: str
    label_bytes: int = 1
    """Binary layout: label bytes before the pixels; the last one counts. 0: python layout."""
    label_key: str = "labels"
    names_key: str = "label_names"

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.classes)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS = (
    Layout("cifar-10-batches-bin", tuple(f"{name}.bin" for name in _BATCHES), "test_batch.bin", "batches.meta.txt"),
    Layout("cifar-10-batches-py", _BATCHES, "test_batch", "batches.meta", 0),
    Layout("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 2),
    Layout("cifar-100-python", ("train",), "test", "meta", 0, "fine_labels", "fine_label_names"),
)


class Cifar(FileSource):
    """One of the four published forms, found below `path` by its files."""

    default_encoding: ClassVar[Encoding] = "raw"

    @cached_property
    def _located(self) -> tuple[Layout, dict[str, bytes]]:
        """The layout and its files, by name."""
        if self.root.is_file():
            return _from_archive(self.root)
        layout, folder = self._folder
        return layout, {name: (folder / name).read_bytes() for name in layout.files}

    @cached_property
    def _folder(self) -> tuple[Layout, Path]:
        for layout in LAYOUTS:
            for folder in (self.root, self.root / layout.folder):
                if all((folder / name).is_file() for name in layout.files):
                    return layout, folder
        expected = ", ".join(layout.folder for layout in LAYOUTS)
        raise DataError(f"{self.root}: no complete CIFAR folder or archive; expected one of {expected} in or at it")

    def watched(self) -> Iterable[Path]:
        """The archive, or the files of the layout."""
        if self.root.is_file():
            return (self.root,)
        layout, folder = self._folder
        return tuple(folder / name for name in layout.files)

    @property
    def classes(self) -> tuple[str, ...]:
        layout, files = self._located
        data, path = files[layout.classes], self.root / layout.classes
        if layout.label_bytes:
            return tuple(data.decode(errors="backslashreplace").split())
        return tuple(str(name) for name in _entry(_unpickle(data, path), layout.names_key, list, path))

    @cached_property
    def _splits(self) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        layout, files = self._located
        parts = [_parse(files[name], layout, self.root / name) for name in layout.train]
        train = np.concatenate([pixels for pixels, _ in parts]), np.concatenate([labels for _, labels in parts])
        return {"train": train, "test": _parse(files[layout.test], layout, self.root / layout.test)}

    def listings(self) -> dict[str, Listing]:
        return {
            split: Listing(labels, [f"{split}-{number:05d}" for number in range(len(labels))])
            for split, (_, labels) in self._splits.items()
        }

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[NDArray[np.uint8]]:
        pixels = self._splits[split][0]
        return (pixels[number].reshape(3, 32, 32).transpose(1, 2, 0) for number in numbers.tolist())


def _from_archive(path: Path) -> tuple[Layout, dict[str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            members = {Path(info.name).name: info for info in archive.getmembers() if info.isfile()}
            for layout in LAYOUTS:
                if all(name in members for name in layout.files):
                    return layout, {name: archive.extractfile(members[name]).read() for name in layout.files}  # type: ignore[union-attr]
    except Exception as error:  # tarfile and each kind of compression raise their own
        raise DataError(f"{path}: damaged archive ({one_line(error)}); fetch it again") from error
    raise DataError(f"{path}: not one of CIFAR's archives: a layout's files are missing")


def _parse(data: bytes, layout: Layout, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels [n, 3072] and labels [n]."""
    if layout.label_bytes:
        record = layout.label_bytes + _PIXELS
        if len(data) % record or not data:
            raise DataError(f"{path}: {len(data):,} bytes is no multiple of the {record}-byte record; fetch it again")
        records = np.frombuffer(data, np.uint8).reshape(-1, record)
        return records[:, layout.label_bytes :], records[:, layout.label_bytes - 1].astype(np.int64)
    batch = _unpickle(data, path)
    pixels, labels = _entry(batch, "data", np.ndarray, path), _entry(batch, layout.label_key, list, path)
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS) or not all(type(x) is int for x in labels):
        raise DataError(f"{path}: {len(labels)} labels and pixels {pixels.shape} of {pixels.dtype}; fetch it again")
    return pixels, np.array(labels, np.int64)


def _entry(content: dict[str, Any], name: str, kind: type, path: Path) -> Any:
    value = content.get(name)
    if not isinstance(value, kind):
        raise DataError(f"{path}: {name!r} is missing or no {kind.__name__}, as CIFAR's files have it; fetch it again")
    return value


class _ArraysOnly(pickle.Unpickler):
    """Knows what a pickled NumPy array needs; anything else could run code."""

    _ALLOWED = frozenset({"numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct", "_codecs.encode"})

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        module = module_name.replace("numpy.core", "numpy._core")
        if f"{module}.{global_name}" not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which no CIFAR file does")
        return super().find_class(module, global_name)


def _unpickle(data: bytes, path: Path) -> dict[str, Any]:
    try:
        loaded = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:
        raise DataError(f"{path}: refused to unpickle: {one_line(error)}") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{path}: expected a dictionary, found {type(loaded).__name__}")
    return {
        _text(key): [_text(item) for item in value] if isinstance(value, list) else value
        for key, value in loaded.items()
    }


def _text(value: Any) -> Any:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value
