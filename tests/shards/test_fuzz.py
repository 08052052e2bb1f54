"""Files mutated at random, from valid ones: what comes out is right, or one sentence; no other error, no stray file.

Each kind of file is cut, filled, swapped, repeated and flipped bit by bit, always the same way. `FUZZ=20` in the
environment runs twenty times as many.
"""

import io
import os
import pickle
import shutil
import signal
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dbscale.data import DataError, load_manifest, make_loader, open_dataset
from dbscale.data.decode import DecodeError, decode_image, image_shape, image_suffix
from dbscale.errors import ConfigError
from dbscale.shards.pack import ensure_packed, pack
from dbscale.shards.verify import verify
from tests.shards.conftest import make_source

TIMES = int(os.environ.get("FUZZ", "1"))
LIMIT_S = 20


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """One to three changes of a file."""
    changed = bytearray(data)
    for _ in range(generator.integers(1, 4)):
        size = max(len(changed), 1)
        start = int(generator.integers(size))
        length = int(generator.integers(1, max(size // 4, 2)))
        kind = generator.integers(7)
        if kind == 0:
            for place in generator.integers(size, size=generator.integers(1, 9)) if changed else ():
                changed[place] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            del changed[start:]
        elif kind == 2:
            changed[start : start + length] = generator.bytes(min(length, 64))
        elif kind == 3:
            changed[start : start + length] = bytes(length)
        elif kind == 4:
            changed[start:start] = changed[start : start + length]
        elif kind == 5:
            del changed[start : start + length]
        else:
            other = int(generator.integers(size))
            block = 512 if size > 2048 else 8
            one, two = changed[start : start + block], changed[other : other + block]
            changed[start : start + len(two)], changed[other : other + len(one)] = two, one
    return bytes(changed)


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"still busy after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def right_or_one_sentence(outcomes: list[str]) -> Iterator[None]:
    with no_hang():
        try:
            yield
            outcomes.append("right")
        except (DataError, ConfigError) as error:
            outcomes.append("refused")
            assert str(error) and "\n" not in str(error) and len(str(error)) < 3000


def assert_both(outcomes: list[str], count: int) -> None:
    """A fuzz that always or never ends well tests nothing."""
    assert len(outcomes) == count and 0 < outcomes.count("refused") < count


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


FORMATS = ("JPEG", "PNG", "PPM", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "ICO", "TGA", "QOI", "PCX")


@pytest.mark.parametrize("kind", FORMATS)
def test_images(kind: str) -> None:
    generator = np.random.default_rng(FORMATS.index(kind))
    buffer = io.BytesIO()
    pixels = generator.integers(0, 256, (20, 33, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **({"sizes": [(20, 20)]} if kind == "ICO" else {}))
    outcomes: list[str] = []
    for number in range(40 * TIMES):
        data = mutate(buffer.getvalue(), generator) if number else buffer.getvalue()
        with right_or_one_sentence(outcomes):
            assert image_suffix(data)
            height, width = image_shape(data)
            image = decode_image(data)
            assert image.dtype == np.uint8 and image.shape[2] == 3 and image.size
            # An icon's directory may disagree with its image.
            assert kind == "ICO" or image.shape[:2] == (height, width)
    assert_both(outcomes, 40 * TIMES)


def make_image(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_bytes(kind: str) -> bytes:
    buffer = io.BytesIO()
    layout = tarfile.GNU_FORMAT if kind == "gnu" else tarfile.PAX_FORMAT
    with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "gzip" else "w", format=layout) as archive:
        for number in range(5):
            long = "n" * 120 if number == 1 else ""
            label = b'{"label": "b"}' if kind == "json" else b"%d" % (number % 2)
            for suffix, data in (("png", make_image(number)), ("json" if kind == "json" else "cls", label)):
                info = tarfile.TarInfo(f"d/{long}\udce9{number}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("d/link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "d/\udce90.png"
        archive.addfile(link)
    return buffer.getvalue()


def parquet_bytes(kind: str) -> bytes:
    buffer = io.BytesIO()
    labels = pa.array(["a", "b", "a", "b", "a"]) if kind == "text" else pa.array([0, 1, 0, 1, 0])
    images = pa.array([{"bytes": make_image(number), "path": None} for number in range(5)])
    table = pa.table({"image": images, "label": labels})
    names = '{"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}}'
    pq.write_table(table.replace_schema_metadata({"huggingface": names}) if kind == "named" else table, buffer)
    return buffer.getvalue()


def cifar_bytes(kind: str) -> bytes:
    labels = [number % 2 for number in range(5)]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    if kind == "python":
        return pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2)
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1).tobytes()


def write_cifar(folder: Path, kind: str, data: bytes) -> None:
    end = ".bin" if kind == "binary" else ""
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (folder / f"{name}{end}").write_bytes(cifar_bytes(kind))
    (folder / f"data_batch_3{end}").write_bytes(data)
    meta = b"a\nb\n" if end else pickle.dumps({b"label_names": [b"a", b"b"]}, protocol=2)
    (folder / f"batches.meta{'.txt' if end else ''}").write_bytes(meta)


SOURCES = {
    "tar pax": ("webdataset", tar_bytes("pax")),
    "tar gnu": ("webdataset", tar_bytes("gnu")),
    "tar gzip": ("webdataset", tar_bytes("gzip")),
    "tar json": ("webdataset", tar_bytes("json")),
    "parquet numbers": ("parquet", parquet_bytes("numbers")),
    "parquet text": ("parquet", parquet_bytes("text")),
    "parquet named": ("parquet", parquet_bytes("named")),
    "cifar binary": ("cifar", cifar_bytes("binary")),
    "cifar python": ("cifar", cifar_bytes("python")),
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is packed from a mutated file is whole: only pictures may be others, or too damaged to be decoded."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of packs need not survive a power cut
    kind, whole = SOURCES[name]
    generator = np.random.default_rng(list(SOURCES).index(name))
    outcomes: list[str] = []
    for number in range(25 * TIMES):
        folder = tmp_path / f"{number}"
        (folder / "in").mkdir(parents=True)
        data = mutate(whole, generator) if number else whole
        options: dict[str, object] = {"allow_unused": 0.3}
        if kind == "cifar":
            write_cifar(folder / "in", name.split()[1], data)
        else:
            (folder / "in" / ("train-0.tar" if kind == "webdataset" else "train-0.parquet")).write_bytes(data)
            options["test"] = None
        before = files_below(folder)
        with right_or_one_sentence(outcomes):
            manifest = pack(make_source(kind, path=str(folder / "in"), **options), folder / "out", progress=False)
            assert sum(manifest.split("train").class_counts) == manifest.split("train").num_samples > 0
            assert all("it came so from its source" in str(problem) for problem in verify(folder / "out"))
        assert {path for path in files_below(folder) - before if path.split("/")[0] != "out"} == set()
        shutil.rmtree(folder)
    assert files_below(tmp_path) == set()
    assert_both(outcomes, 25 * TIMES)


@pytest.mark.parametrize("name", ["manifest.json", "train.index.npy", "train-000001.tar"])
def test_packed_files(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training sees what was packed, or says what is damaged; `verify` sees all that training would."""
    entry = {"source": "fractals", "families": 2, "num_train": 12, "num_test": 4, "image_size": 8, "shard_samples": 5}
    folder = ensure_packed("f", entry, tmp_path, progress=False)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def batch():
        return next(make_loader(open_dataset(folder, tier="raw").subset(), global_batch=12, seed=0))

    expected, manifest = batch(), load_manifest(folder)
    whole = (folder / name).read_bytes()
    generator = np.random.default_rng(len(name))
    outcomes: list[str] = []
    before = files_below(tmp_path)
    for number in range(60 * TIMES):
        data = mutate(whole, generator)
        (folder / name).write_bytes(data)
        os.utime(folder / name, (number, number))
        with right_or_one_sentence(outcomes):
            found = batch()
            assert found.labels.equal(expected.labels)
            # One bad sample in a small set is replaced by the next of its class.
            changed = (np.asarray(found.images) != np.asarray(expected.images)).any(axis=(1, 2, 3))
            assert set(found.sample_ids[changed].tolist()) <= set(found.bad_ids.tolist())
            assert load_manifest(folder) == manifest
        with right_or_one_sentence([]):
            if not verify(folder):  # what is changed between the members of a tar is never read
                assert len(batch().bad_ids) == 0
        assert files_below(tmp_path) == before
    assert outcomes.count("refused") > 40 * TIMES


def test_mutations_are_many(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    made = {mutate(b"0123456789" * 20, generator) for _ in range(200)}
    assert len(made) > 190
    assert DecodeError.__mro__[1] is DataError
