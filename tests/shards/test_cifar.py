"""CIFAR in its four published forms; pickles that run code and damaged files are refused."""

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dbscale.data import DataError
from tests.shards.conftest import make_source


def cifar_records(count: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(count)
    return generator.integers(0, 256, (count, 3072), dtype=np.uint8), np.arange(count) % num_classes


def write_cifar(root: Path, layout: str) -> None:
    root.mkdir()
    hundred = "100" in layout
    names = [f"name{k}" for k in range(100 if hundred else 10)]
    parts = {"train": "train", "test": "test"} if hundred else {f"data_batch_{k}": "train" for k in range(1, 6)}
    if not hundred:
        parts["test_batch"] = "test"
    for offset, name in enumerate(parts):
        pixels, labels = cifar_records(100 + offset, len(names))
        if "bin" in layout:
            columns = [labels[:, None] * 0, labels[:, None]] if hundred else [labels[:, None]]
            (root / f"{name}.bin").write_bytes(np.concatenate([*columns, pixels], axis=1).astype(np.uint8).tobytes())
        else:
            key = b"fine_labels" if hundred else b"labels"
            (root / name).write_bytes(pickle.dumps({b"data": pixels, key: labels.tolist()}, protocol=2))
    if "bin" in layout:
        (root / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_text("\n".join(names) + "\n")
    else:
        key = b"fine_label_names" if hundred else b"label_names"
        meta = {key: [name.encode() for name in names]}
        (root / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=2))


LAYOUTS = ["cifar-10-batches-bin", "cifar-10-batches-py", "cifar-100-binary", "cifar-100-python"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["folder", "parent", "archive"])
def test_cifar_layouts(tmp_path: Path, layout: str, form: str) -> None:
    write_cifar(tmp_path / layout, layout)
    path = {"folder": tmp_path / layout, "parent": tmp_path, "archive": tmp_path / "archive.tar.gz"}[form]
    if form == "archive":
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / layout, layout)
    source = make_source("cifar", path=str(path))
    hundred = "100" in layout
    assert source.classes == tuple(f"name{k}" for k in range(100 if hundred else 10))
    listings = source.listings()
    assert [len(part.labels) for part in listings.values()] == ([100, 101] if hundred else [510, 105])
    pixels, labels = cifar_records(101 if hundred else 105, len(source.classes))
    assert listings["test"].labels.tolist() == labels.tolist()
    (image,) = source.read("test", np.array([7]), [""])
    assert np.array_equal(image, pixels[7].reshape(3, 32, 32).transpose(1, 2, 0))


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code ran",)


def test_cifar_pickles_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(tmp_path / LAYOUTS[1], LAYOUTS[1])
    (tmp_path / LAYOUTS[1] / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(DataError, match=r"data_batch_3: refused to unpickle: it asks for builtins.print"):
        make_source("cifar", path=str(tmp_path)).listings()
    assert "code ran" not in capsys.readouterr().out


def test_cifar_damage(tmp_path: Path) -> None:
    write_cifar(tmp_path / LAYOUTS[0], LAYOUTS[0])
    file = tmp_path / LAYOUTS[0] / "test_batch.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="bytes is no multiple of the 3073-byte record"):
        make_source("cifar", path=str(tmp_path)).listings()
    file.unlink()
    with pytest.raises(DataError, match="no complete CIFAR folder or archive; expected one of cifar-10-batches-bin"):
        make_source("cifar", path=str(tmp_path)).listings()
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b\x08 not really")
    with pytest.raises(DataError, match="damaged archive"):
        make_source("cifar", path=str(tmp_path / "cut.tar.gz")).listings()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"labels": [0]}, "'data' is missing or no ndarray"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, r"1 labels and pixels \(2, 3072\) of uint8"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0.5]}, "fetch it again"),
        ([1], "expected a dictionary, found list"),
    ],
)
def test_python_batches_of_another_content_are_refused(tmp_path: Path, batch: object, message: str) -> None:
    write_cifar(tmp_path / LAYOUTS[1], LAYOUTS[1])
    (tmp_path / LAYOUTS[1] / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(DataError, match=message):
        make_source("cifar", path=str(tmp_path)).listings()
