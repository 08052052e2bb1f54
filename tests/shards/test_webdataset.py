"""Existing WebDataset tars are taken in; what is incomplete, ambiguous or dangerous is refused by name."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dbscale.data import DataError, open_dataset
from shards.pack import pack
from shards.sources import make_source
from shards.webdataset import walk_tar

Image = Callable[..., bytes]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_webdataset_tars_are_taken_in(tmp_path: Path, make_image: Image) -> None:
    images = [make_image(number) for number in range(9)]
    long = "x" * 120
    members = [
        (f"some/dir.v1/{long}{k}.{part}", data)
        for k in range(6)
        for part, data in (("png", images[k]), ("cls", b"%d" % (k % 2)), ("json", b"{}"))
    ]
    write_tar(tmp_path / "train-0.tar", members[:9])
    write_tar(tmp_path / "train-1.tar", members[9:])
    write_tar(
        tmp_path / "test-0.tar",
        [(f"{k}.{part}", data) for k in range(6, 9) for part, data in (("cls", b"1"), ("png", images[k]))],
    )
    source = make_source("webdataset", path=str(tmp_path))
    assert source.classes == ("0", "1")
    pack(source, tmp_path / "out", progress=False)
    dataset = open_dataset(tmp_path / "out", tier="jpeg")
    stored = [dataset.reader.files.read(position) for position in range(6)]  # type: ignore[attr-defined]
    assert sorted(stored) == sorted(images[:6])
    assert [images.index(data) % 2 for data in stored] == dataset.labels.tolist()


BAD_TARS = {
    "has no label": (
        [("a.png", b"x")],
        r"sample 'a' has no label \(.cls\); 1 samples are incomplete: complete or remove them",
    ),
    "has no image": ([("a.cls", b"0")], "sample 'a' has no image"),
    "duplicate key": ([("a.png", b"x"), ("a.cls", b"0"), ("a.png", b"y")], "key 'a' has two 'png' members"),
    "no integer": ([("a.png", b"x"), ("a.cls", b"cat")], "the label of 'a' is b'cat', not an integer"),
    "negative": ([("a.png", b"x"), ("a.cls", b"-3")], "train-0.tar, sample 'a': label -3 is out of range"),
    "pickle": ([("a.png", b"x"), ("a.cls", b"0"), ("a.pyd", b"x")], "member 'a.pyd' is a pickle, which can run code"),
    "escape": ([("../a.png", b"x"), ("../a.cls", b"0")], "member '../a.png' points outside the archive"),
    "absolute": ([("/etc/a.png", b"x")], "member '/etc/a.png' points outside the archive"),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_bad_tars_are_refused(tmp_path: Path, name: str) -> None:
    members, message = BAD_TARS[name]
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(DataError, match=message):
        make_source("webdataset", path=str(tmp_path), test=None).listings()


def test_keys_are_unique_over_tars_and_labels_in_range(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"train-{number}.tar", [("a.png", b"x"), ("a.cls", b"5")])
    with pytest.raises(DataError, match="key 'a' occurs twice in the split"):
        make_source("webdataset", path=str(tmp_path), test=None).listings()
    (tmp_path / "train-1.tar").unlink()
    with pytest.raises(DataError, match=r"train-0.tar, sample 'a': label 5 is out of range 0…1"):
        make_source("webdataset", path=str(tmp_path), test=None, class_names=("x", "y")).listings()


@pytest.mark.parametrize("train", ["pipe:cat x.tar", "http://host/train-{0..3}.tar", "s3://bucket/x.tar"])
def test_pipes_and_urls_are_refused(tmp_path: Path, train: str) -> None:
    with pytest.raises(DataError, match="is a pipe or a URL: refused"):
        make_source("webdataset", path=str(tmp_path), train=train)
    with pytest.raises(DataError, match="is a pipe or a URL: refused"):
        make_source("webdataset", data_dir=tmp_path, path=train)


@pytest.mark.parametrize("keep", [700, 1024, 2048 + 512])
def test_truncated_tars_are_never_silently_short(tmp_path: Path, keep: int) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{k}.cls", b"0") for k in range(5)])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"x\.tar: truncated"):
        list(walk_tar(path))


def test_corrupt_headers_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{k}.cls", b"0") for k in range(5)])
    content = bytearray(path.read_bytes())
    content[1024 + 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"corrupt tar header at byte 1,024"):
        list(walk_tar(path))
