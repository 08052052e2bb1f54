"""Existing WebDataset tars are taken in whole; what is incomplete, ambiguous or dangerous is told or refused by name."""

import gzip
import io
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from dbscale.data import DataError, open_dataset
from dbscale.errors import ConfigError
from dbscale.shards.pack import pack
from dbscale.shards.webdataset import walk_tar
from tests.shards.conftest import make_source

Image = Callable[..., bytes]
Members = Sequence[tuple[str, bytes]]


def write_tar(path: Path, members: Members, kind: str = "w", layout: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, kind, format=layout) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def training(tmp_path: Path, members: Members, **options: object):
    """The training listing of one tar of these members, as {key: label}, its class names and what is unused."""
    write_tar(tmp_path / "train-0.tar", members)
    source = make_source("webdataset", path=str(tmp_path), test=None, **options)
    listing = source.listings()["train"]
    keys = [name.split(":", 3)[3] for name in listing.names]
    return dict(zip(keys, listing.labels.tolist(), strict=True)), source.classes, listing.unused


def stored(folder: Path, split: str = "train") -> dict[bytes, int]:
    """Label of each image of a packed dataset, by its bytes."""
    dataset = open_dataset(folder, split, tier="jpeg")
    files = dataset.reader.files  # type: ignore[attr-defined]
    labels = dataset.subset().labels.tolist()
    return {files.read(position): label for position, label in enumerate(labels)}


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_are_taken_in(tmp_path: Path, make_image: Image, layout: int) -> None:
    images = [make_image(number) for number in range(9)]
    long = "x" * 120
    members = [
        (f"some/dir.v1/{long}{k}.{part}", data)
        for k in range(6)
        for part, data in (("png", images[k]), ("cls", b"%d\n" % (k % 2)), ("json", b"{}"))
    ]
    write_tar(tmp_path / "train-0.tar", members[:9], layout=layout)
    write_tar(tmp_path / "train-1.tar", members[9:], layout=layout)
    members = [(f"{k}.{part}", data) for k in range(6, 9) for part, data in (("cls", b"1"), ("png", images[k]))]
    write_tar(tmp_path / "test-0.tar", members)
    source = make_source("webdataset", path=str(tmp_path), shard_samples=4)
    assert source.classes == ("0", "1")
    manifest = pack(source, tmp_path / "out", progress=False)
    assert stored(tmp_path / "out") == {images[k]: k % 2 for k in range(6)}
    assert manifest.extra["unused"] == {"train": {"member that is neither image nor label (.json)": 6}}


def pairs(keys: Sequence[str], image: str = "png", label: str = "cls") -> list[tuple[str, bytes]]:
    """An image and a label (0, 1, 0, 1 …) for each key."""
    return [
        member
        for k, key in enumerate(keys)
        for member in ((f"{key}.{image}", b"x"), (f"{key}.{label}", b"%d" % (k % 2)))
    ]


@pytest.mark.parametrize(
    ("members", "keys"),
    [
        (pairs(["track 2.00", "track 2.01", "plain"]), ["track 2.00", "track 2.01", "plain"]),
        (pairs(["img.v1.0", "img.v1.1"]), ["img.v1.0", "img.v1.1"]),
        (pairs(["a", "b"], "input.jpg", "target.cls"), ["a", "b"]),
        (pairs(["a", "b"], "JPG", "CLS"), ["a", "b"]),
        (pairs(["d.1/a", "d.2/a"]), ["d.1/a", "d.2/a"]),
        (pairs(["./a", "./b"], "avif"), ["./a", "./b"]),
    ],
)
def test_dots_in_names(tmp_path: Path, members: Members, keys: list[str]) -> None:
    found, _, unused = training(tmp_path, members)
    assert found == {key: k % 2 for k, key in enumerate(keys)}
    assert unused.counts == {}


def test_keys_may_restart_in_each_tar(tmp_path: Path, make_image: Image) -> None:
    images = [make_image(number) for number in range(4)]
    for tar in range(2):
        members = [m for k in range(2) for m in ((f"{k}.png", images[2 * tar + k]), (f"{k}.cls", b"%d" % tar))]
        write_tar(tmp_path / f"train-{tar}.tar", members)
    pack(make_source("webdataset", path=str(tmp_path), test=None), tmp_path / "out", progress=False)
    assert stored(tmp_path / "out") == {image: number // 2 for number, image in enumerate(images)}


@pytest.mark.parametrize("kind", ["hard", "symbolic"])
def test_links_are_samples(tmp_path: Path, make_image: Image, kind: str) -> None:
    image, other = make_image(1), make_image(2)
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for name, data in (("d/a.png", image), ("d/a.cls", b"1"), ("d/b.png", other), ("d/b.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for part in ("png", "cls"):
            info = tarfile.TarInfo(f"d/c.{part}")
            info.type = tarfile.LNKTYPE if kind == "hard" else tarfile.SYMTYPE
            info.linkname = f"d/a.{part}" if kind == "hard" else f"a.{part}"
            archive.addfile(info)
        gone = tarfile.TarInfo("d/gone.png")
        gone.type, gone.linkname = tarfile.SYMTYPE, "../../etc/passwd"
        archive.addfile(gone)
    source = make_source("webdataset", path=str(tmp_path), test=None, allow_unused=0.25)
    assert source.listings()["train"].unused.counts == {"link to nothing in the tar": 1}
    manifest = pack(source, tmp_path / "out", progress=False)
    assert manifest.split("train").class_counts == (1, 2)
    assert stored(tmp_path / "out") == {image: 1, other: 0}


@pytest.mark.parametrize(
    ("data", "options", "classes"),
    [
        ([("txt", b"cat"), ("txt", b"dog\n")], {}, ("cat", "dog")),
        ([("txt", b"0"), ("txt", b"3")], {}, ("0", "3")),
        ([("cls", b"emu"), ("cls", b"ant")], {}, ("ant", "emu")),
        ([("json", b'{"label": 1}'), ("json", b'{"x": 0, "label": 0}')], {}, ("0", "1")),
        ([("json", b'{"label": "b"}'), ("json", b'{"label": "a"}')], {}, ("a", "b")),
        ([("json", b'{"label": 9, "kind": "b"}'), ("json", b'{"kind": "a"}')], {"label": "json:kind"}, ("a", "b")),
        ([("json", b"1"), ("json", b"0.0")], {}, ("0", "1")),
        ([("text", b"b"), ("text", b"a")], {"label": "text"}, ("a", "b")),
        ([("cls", b"x"), ("cls", b"y")], {"class_names": ["y", "z", "x"]}, ("y", "z", "x")),
    ],
)
def test_where_labels_may_stand(tmp_path: Path, data: Members, options: dict[str, object], classes: tuple) -> None:
    members = [m for k, (suffix, label) in enumerate(data) for m in ((f"{k}.png", b"x"), (f"{k}.{suffix}", label))]
    labels, found, unused = training(tmp_path, members, **options)
    assert found == classes and unused.counts == {}
    values = [label.strip().decode().removeprefix('{"label": ').strip('"}') for _, label in data]
    if not options and all(value in classes for value in values):
        assert [classes[labels[str(k)]] for k in range(2)] == values


@pytest.mark.parametrize("end", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_compressed_tars(tmp_path: Path, make_image: Image, end: str) -> None:
    """Told from the bytes, so that a gzipped tar may also be called .tar."""
    images = [make_image(number) for number in range(4)]
    members = [m for k in range(4) for m in ((f"{k}.png", images[k]), (f"{k}.cls", b"%d" % (k % 2)))]
    kind = {".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}.get(end, "w:gz")
    write_tar(tmp_path / f"train-0{end}", members, kind)
    pack(make_source("webdataset", path=str(tmp_path), test=None), tmp_path / "out", progress=False)
    assert stored(tmp_path / "out") == {images[k]: k % 2 for k in range(4)}
    assert not (tmp_path / "out/.pack").exists()


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    labels, classes, unused = training(tmp_path, [(f"{name}.png", b"x"), (f"{name}.cls", b"caf\xe9")])
    assert labels == {name: 0} and classes == ("caf\\xe9",) and unused.counts == {}


BAD_TARS: dict[str, tuple[Members, str]] = {
    "no label": (
        [("a.png", b"x")],
        r"no sample in split 'train' \(1 × image without a label of its own \(.cls\), for ",
    ),
    "no image": ([("a.cls", b"0")], "1 × label without an image of its own, for example 'a.cls'"),
    "nothing": ([], r"no sample in split 'train' \(its files are empty\); wanted: an image \(.jpg"),
    "other members": (
        [("readme.md", b"hi")],
        r"member that is neither image nor label \(.md\), for example 'readme.md'",
    ),
    "duplicate name": (
        [("a.png", b"x"), ("a.cls", b"0"), ("a.png", b"y")],
        "key 'a' has two members of a kind, 'a.png'",
    ),
    "two images": ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"0")], "two members of a kind, 'a.png' and 'a.jpg'"),
    "fraction": (
        [("a.png", b"x"), ("a.cls", b"0.5")],
        "train-0.tar, sample 'a': the label is '0.5'; a label is a whole",
    ),
    "blank": ([("a.png", b"x"), ("a.cls", b" \n")], "1 × image whose label is blank"),
    "negative": (
        [("a.png", b"x"), ("a.cls", b"-3")],
        "train-0.tar, sample 'a': label -3 is negative, which means unlab",
    ),
    "mixed": (
        [("a.png", b"x"), ("a.cls", b"3"), ("b.png", b"x"), ("b.cls", b"cat")],
        "some labels are numbers, others texts such as 'cat'",
    ),
    "no json": ([("a.png", b"x"), ("a.json", b"{")], "member 'a.json': its JSON cannot be read"),
    "no field": ([("a.png", b"x"), ("a.json", b'{"y": 0}')], "no label field in 'a.json', which has: y; set `label`"),
    "one-hot": (
        [("a.png", b"x"), ("a.json", b'{"label": [0, 1]}')],
        r"the label 'label' is \[0, 1\]; a label is a whole",
    ),
    "pickle": ([("a.png", b"x"), ("a.cls", b"0"), ("a.pyd", b"x")], "member 'a.pyd' is a pickle, which can run code"),
    "escape": ([("../a.png", b"x"), ("../a.cls", b"0")], "member '../a.png' points outside the archive"),
    "absolute": ([("/etc/a.png", b"x")], "member '/etc/a.png' points outside the archive"),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_bad_tars_are_refused(tmp_path: Path, name: str) -> None:
    members, message = BAD_TARS[name]
    with pytest.raises(DataError, match=message):
        training(tmp_path, members)


def test_what_is_lost_is_refused_above_the_allowed_share(tmp_path: Path, make_image: Image) -> None:
    members = [m for k in range(3) for m in ((f"{k}.png", make_image(k)), (f"{k}.cls", b"0"))]
    write_tar(tmp_path / "train-0.tar", [*members, ("3.png", b"x"), ("4.seg.png", b"x")])
    with pytest.raises(DataError) as caught:
        pack(make_source("webdataset", path=str(tmp_path), test=None), tmp_path / "out", progress=False)
    assert str(caught.value) == (
        "split 'train': 2 of 5 images or labels would stay unused, more than the allowed share 0.01: 2 × image without a "
        "label of its own (.cls), for example '3.png'; mend or remove them, or set `allow_unused: 0.4` of the source"
    )
    source = make_source("webdataset", path=str(tmp_path), test=None, allow_unused=0.4)
    assert pack(source, tmp_path / "out", progress=False).split("train").num_samples == 3


def test_labels_have_names_or_a_training_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-0.tar, sample 'a': label 5 is out of range 0…1; mend it, or extend"):
        training(tmp_path, [("a.png", b"x"), ("a.cls", b"5")], class_names=["x", "y"])
    write_tar(tmp_path / "test-0.tar", [("a.png", b"x"), ("a.cls", b"6")])
    with pytest.raises(DataError, match=r"test-0.tar, sample 'a': label 6 has no training sample"):
        make_source("webdataset", path=str(tmp_path)).listings()


def test_a_share_of_the_samples_becomes_the_test(tmp_path: Path) -> None:
    write_tar(tmp_path / "all.tar", pairs([str(k) for k in range(20)]))
    listings = make_source("webdataset", path=str(tmp_path), train="*.tar", test=0.3).listings()
    assert {split: np.bincount(part.labels).tolist() for split, part in listings.items()} == {
        "train": [7, 7],
        "test": [3, 3],
    }


@pytest.mark.parametrize("train", ["pipe:cat x.tar", "http://host/train-{0..3}.tar", "s3://bucket/x.tar"])
def test_pipes_and_urls_are_refused(tmp_path: Path, train: str) -> None:
    for options in ({"path": str(tmp_path), "train": train}, {"path": train}, {"path": "x", "test": ["a", train]}):
        with pytest.raises(ConfigError, match="is a pipe or a URL: refused"):
            make_source("webdataset", **options)


@pytest.mark.parametrize("keep", [0, 100, 700, 1024, 2048 + 512])
def test_truncated_tars_are_never_silently_short(tmp_path: Path, keep: int) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{k}.cls", b"0") for k in range(5)])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"x\.tar: truncated.*; fetch it again"):
        list(walk_tar(path))


def test_damaged_compressed_tars_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{k}.cls", b"0") for k in range(5)])
    packed = gzip.compress(path.read_bytes(), mtime=0)
    for data in (packed[:-30], packed[:40], packed[:30] + b"garbage" + packed[37:]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"x\.tar: (corrupt|truncated)"):
            list(walk_tar(path))
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(40))
    with pytest.raises(DataError, match="is compressed with zstd; unpack it with `unzstd`"):
        list(walk_tar(path))


def test_corrupt_headers_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{k}.cls", b"0") for k in range(5)])
    content = bytearray(path.read_bytes())
    content[1024 + 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"corrupt tar header at byte 1,024"):
        list(walk_tar(path))


def test_a_negative_size_does_not_lead_in_a_circle(tmp_path: Path) -> None:
    """CVE-2025-8194: such a header sent `tarfile` back to where it came from, for ever."""
    info = tarfile.TarInfo("a.cls")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512 in base 256
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(DataError, match=r"x\.tar: (corrupt|truncated)"):
        list(walk_tar(tmp_path / "x.tar"))
