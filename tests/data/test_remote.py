"""Shards behind a URL: the samples, order and resume of the local dataset, few requests, and what is said of damage."""

from __future__ import annotations

import itertools
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from dbscale.data import load_manifest, make_eval_loader, make_loader, open_dataset, remote
from dbscale.data.manifest import Encoding
from dbscale.data.remote import MAX_GAP, RemoteShards, mirror, origin
from dbscale.data.stage import stage_subset
from dbscale.data.target import Boxes
from dbscale.errors import DataError
from dbscale.shards.pack import pack
from dbscale.shards.publish import upload
from dbscale.shards.sources import source_of
from dbscale.shards.verify import verify
from dbscale.study.store import Failure, failure_of


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """fsspec's store in memory, and a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PATIENCE_S", 0.2)
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


@pytest.fixture
def url(memory: Any, jpeg_folder: Callable[[Encoding], Path]) -> str:
    """The photographs, packed behind a URL."""
    upload(jpeg_folder("jpeg256"), "memory://bucket/photos", progress=False)
    return "memory://bucket/photos"


def batches(dataset: Any, count: int, **options: Any) -> list[Any]:
    loader = make_loader(dataset.subset(), **{"global_batch": 4, "seed": 3, **options})
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


def assert_equal(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.sample_ids.equal(other.sample_ids)
        assert one.labels.equal(other.labels)
        assert len(one.images) == len(other.images)
        assert all(np.array_equal(a, b) for a, b in zip(one.images, other.images, strict=True))
        assert parts_of(one.targets) == parts_of(other.targets)


def parts_of(targets: Any) -> list[Any] | None:
    """Masks and boxes as lists, which compare."""
    if targets is None:
        return None
    boxes = [each for each in targets if isinstance(each, Boxes)]
    return [[np.asarray(part).tolist() for part in each] for each in boxes] or [np.asarray(m).tolist() for m in targets]


@pytest.mark.parametrize(
    "options", [{}, {"block_size": 5}, {"num_workers": 2}, {"consumed": 8}, {"rank": 1, "world_size": 2}]
)
def test_batches_are_those_of_the_disk(
    url: str, jpeg_folder: Callable[[Encoding], Path], options: dict[str, Any]
) -> None:
    local, far = open_dataset(jpeg_folder("jpeg256")), open_dataset(url)
    assert far.fingerprint == local.fingerprint
    assert far.subset(5).fingerprint == local.subset(5).fingerprint
    assert_equal(batches(far, 12, **options), batches(local, 12, **options))


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Encoding], Path]:
    """17 + 6 scenes of 16 px with masks or boxes, in shards of five. Read only."""
    packed: dict[tuple[str, Encoding], Path] = {}

    def get(kind: str, encoding: Encoding) -> Path:
        if (kind, encoding) not in packed:
            packed[kind, encoding] = tmp_path_factory.mktemp("scenes") / "packed"
            entry = {"source": f"fractal_{kind}", "families": 3, "num_train": 17, "num_test": 6, "image_size": 16,
                     "encoding": encoding, "shard_samples": 5}  # fmt: skip
            pack(source_of("scenes", entry), packed[kind, encoding], progress=False)
        return packed[kind, encoding]

    return get


@pytest.mark.parametrize(
    "options", [{}, {"block_size": 5, "num_workers": 2}, {"consumed": 8}, {"rank": 1, "world_size": 2}]
)
@pytest.mark.parametrize(("kind", "encoding"), [("masks", "raw"), ("masks", "jpeg256"), ("boxes", "raw")])
def test_masks_and_boxes_come_with_their_images_as_from_the_disk(
    memory: Any, dense_folder: Callable[..., Path], kind: str, encoding: Encoding, options: dict[str, Any]
) -> None:
    folder = dense_folder(kind, encoding)
    upload(folder, "memory://b/scenes", progress=False)
    tier: Any = "jpeg" if encoding == "jpeg256" else "raw"
    local, far = (open_dataset(place, tier=tier) for place in (folder, "memory://b/scenes"))
    assert far.fingerprint == local.fingerprint
    expected = batches(local, 9, **options)
    assert_equal(batches(far, 9, **options), expected)
    seen = parts_of([each for batch in expected for each in batch.targets])
    assert seen and any(each != seen[0] for each in seen), "the targets differ, so that their order shows"
    (stored,) = make_eval_loader(open_dataset(folder, "test", tier=tier).subset(), batch_size=6)
    assert_equal(list(make_eval_loader(open_dataset("memory://b/scenes", "test", tier=tier).subset(), batch_size=6)),
                 [stored])  # fmt: skip


def test_a_mask_travels_in_the_request_of_its_image_and_is_replaced_with_it(
    memory: Any, dense_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(dense_folder("masks", "jpeg256"), "memory://b/scenes", progress=False)
    dataset = open_dataset("memory://b/scenes", tier="jpeg")
    assert dataset.targets is not None
    asked: list[int] = []
    plain = remote._cat

    def noting(client: Any, paths: list[str], starts: list[int], ends: list[int]) -> list[Any]:
        asked.append(len(paths))
        return plain(client, paths, starts, ends)

    monkeypatch.setattr(remote, "_cat", noting)
    dataset.reader.fetch(np.array([1, 3]))
    dataset.targets.fetch(np.array([1, 3]))
    assert asked == [1]
    path = "/b/scenes/train-000000.tar"
    content = bytearray(memory.cat_file(path))
    content[int(dataset.index["target_offset"][3]) + 45] ^= 1
    memory.pipe_file(path, bytes(content))
    found = batches(open_dataset("memory://b/scenes", tier="jpeg"), 5, max_bad_share=0.2)
    assert {int(each) for batch in found for each in batch.bad_ids} == {3}
    (problem,) = verify(dataset.folder)
    assert problem.key == bytes(dataset.index["key"][3]).decode()
    assert "the bytes of its mask or boxes changed since packing" in str(problem)


@pytest.mark.parametrize("encoding", ["original", "raw"])
def test_every_tier_reads_the_same_pixels(
    memory: Any, jpeg_folder: Callable[[Encoding], Path], encoding: Encoding
) -> None:
    upload(jpeg_folder(encoding), "memory://b/p", progress=False)
    for split in ("train", "test"):
        local, far = (open_dataset(place, split) for place in (jpeg_folder(encoding), "memory://b/p"))
        ours, theirs = (list(make_eval_loader(each.subset(), batch_size=5)) for each in (far, local))
        assert_equal(ours, theirs)


def test_the_resident_tier_decodes_a_remote_split_once(memory: Any, folder: Path, tmp_path: Path) -> None:
    upload(folder, "memory://b/arrays", progress=False)
    far, local = open_dataset("memory://b/arrays"), open_dataset(folder, cache_dir=tmp_path / "own")
    positions = np.arange(20)
    assert np.array_equal(far.reader.fetch(positions)[0], local.reader.fetch(positions)[0])
    memory.store.clear()
    again = open_dataset(far.folder)
    assert np.array_equal(again.reader.fetch(positions)[0], local.reader.fetch(positions)[0])


def test_neighbours_are_read_in_one_request_and_no_tar_whole(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []
    plain = remote._cat

    def noting(client: Any, paths: list[str], starts: list[int], ends: list[int]) -> list[Any]:
        asked.extend(zip(paths, starts, ends, strict=True))
        return plain(client, paths, starts, ends)

    monkeypatch.setattr(remote, "_cat", noting)
    dataset = open_dataset(url)
    files = dataset.files
    assert isinstance(files, RemoteShards)
    files.prepare(np.array([1, 0, 2]))  # of the first shard's five samples
    sizes = dataset.index["size"][:3].astype(int)
    assert [path.rpartition("/")[2] for path, *_ in asked] == ["train-000000.tar"]
    ((_, start, end),) = asked
    assert (start, end) == (int(dataset.index["offset"][0]), int(dataset.index["offset"][2] + sizes[2]))
    assert sizes.sum() <= end - start < sizes.sum() + 2 * MAX_GAP
    files.prepare(np.array([2, 9]))
    assert [path.rpartition("/")[2] for path, *_ in asked[1:]] == ["train-000001.tar"], (
        "what is at hand is not asked for"
    )
    files.read(0)
    assert len(asked) == 3, "what no batch needs is let go"


def test_what_was_read_is_kept_and_then_nothing_is_asked(url: str, memory: Any, tmp_path: Path) -> None:
    dataset = open_dataset(url, cache_dir=tmp_path / "kept", keep=True)
    first = batches(dataset, 5)
    for name in [each for each in memory.store if each.endswith(".tar")]:
        memory.rm(name)
    again = open_dataset(tmp_path / "kept")
    assert_equal(batches(again, 5), first)
    with (tmp_path / "kept" / "kept" / "train-000000.tar").open("r+b") as file:
        file.seek(int(dataset.index["offset"][0]))
        file.write(b"damaged")
    with pytest.raises(DataError, match=r"memory://bucket/photos/train-000000.tar: shard is missing"):
        open_dataset(tmp_path / "kept").files.read(0)


def test_a_changed_sample_is_replaced_and_counted_as_on_disk(url: str, memory: Any) -> None:
    dataset = open_dataset(url)
    path = "/bucket/photos/train-000000.tar"
    content = bytearray(memory.cat_file(path))
    content[int(dataset.index["offset"][3]) + 10] ^= 1
    memory.pipe_file(path, bytes(content))
    found = batches(dataset, 5, max_bad_share=0.2)
    assert {int(each) for batch in found for each in batch.bad_ids} == {3}
    (problem,) = verify(dataset.folder)
    assert problem.key == bytes(dataset.index["key"][3]).decode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda memory, path: memory.rm(path), "shard is missing"),
        (lambda memory, path: memory.pipe_file(path, memory.cat_file(path)[:3000]), "cut short"),
    ],
)
def test_lost_and_cut_objects_stop_the_run(url: str, memory: Any, damage: Callable[..., Any], message: str) -> None:
    dataset = open_dataset(url)
    damage(memory, "/bucket/photos/train-000001.tar")
    with pytest.raises(DataError, match=f"memory://bucket/photos/train-000001.tar: {message}"):
        batches(dataset, 5)
    assert any(message in str(problem) for problem in verify(dataset.folder))


def test_a_silent_store_is_asked_again_and_counts_as_a_lost_connection(
    url: str, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, tries, plain = open_dataset(url), [0], type(memory).cat_file

    def failing(self: Any, path: str, **options: Any) -> bytes:
        tries[0] += 1
        if tries[0] < limit:
            raise OSError("connection reset")
        return plain(self, path, **options)

    monkeypatch.setattr(type(memory), "cat_file", failing)
    limit = 2
    assert len(dataset.files.read(0)) == dataset.index["size"][0]
    assert tries[0] == 2
    limit = 10**6
    with pytest.raises(DataError, match=r"connection reset.*start it again to resume") as caught:
        dataset.files.read(9)
    assert failure_of(caught.value) is Failure.CONNECTION


def test_where_nothing_is_packed_the_url_is_named(memory: Any) -> None:
    with pytest.raises(DataError, match=r"memory://bucket/none/manifest.json: no such object"):
        open_dataset("memory://bucket/none")
    with pytest.raises(DataError, match="nowhere://bucket"):
        open_dataset("nowhere://bucket/none")


def test_a_store_that_is_away_while_it_is_opened_is_a_lost_connection(
    url: str, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Any, path: str, **options: Any) -> bytes:
        raise OSError("no route")

    monkeypatch.setattr(type(memory), "cat_file", failing)
    with pytest.raises(DataError, match=r"manifest.json: cannot be read .OSError: no route.*resume") as caught:
        open_dataset(url)
    assert failure_of(caught.value) is Failure.CONNECTION


def test_a_mirror_is_made_again_only_where_it_differs(url: str, memory: Any, folder: Path, tmp_path: Path) -> None:
    local = mirror(url, tmp_path / "m")
    assert origin(local) == url
    index = local / load_manifest(local).split("train").index
    before = index.stat().st_mtime_ns
    assert mirror(f"{url}/", tmp_path / "m") == local
    assert index.stat().st_mtime_ns == before
    index.write_bytes(b"damaged")
    open_dataset(mirror(url, tmp_path / "m"))
    memory.store.clear()
    upload(folder, url, progress=False)
    assert load_manifest(mirror(url, tmp_path / "m")) == load_manifest(folder)


def test_remote_shards_are_staged_on_a_nodes_disk(url: str, memory: Any, tmp_path: Path) -> None:
    dataset = open_dataset(url)
    staged = stage_subset(dataset.subset(6), tmp_path / "staged")
    assert origin(staged.dataset.folder) is None
    memory.store.clear()
    assert sorted(path.name for path in staged.dataset.folder.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]
    assert len(next(make_loader(staged, global_batch=6, seed=0)).images) == 6


# A real S3 server


def test_what_is_fetched_lies_in_the_users_cache(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = mirror(url)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    unnamed = mirror(url)
    assert named == tmp_path / "cache/dbscale" / unnamed.name and unnamed.parent == tmp_path / "home/.cache/dbscale"


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def s3(port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadedMotoServer]:
    """A server with an empty bucket; credentials and address come from the environment, as on a cluster."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {
        "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_MAX_ATTEMPTS": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer("127.0.0.1", port)
    server.start()
    fsspec.filesystem("s3").mkdir("bucket")
    yield server
    server.stop()


@pytest.mark.filterwarnings("default")  # botocore's own
def test_an_s3_server_serves_the_batches_of_the_disk_and_may_die_in_mid_epoch(
    s3: ThreadedMotoServer, port: int, jpeg_folder: Callable[[Encoding], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = jpeg_folder("jpeg256"), "s3://bucket/photos"
    upload(folder, url, progress=False)
    expected = batches(open_dataset(folder), 10, block_size=6)
    loader = make_loader(open_dataset(url).subset(), global_batch=4, seed=3, block_size=6)
    seen = list(itertools.islice(loader, 4))
    s3.stop()
    monkeypatch.setattr(remote, "PATIENCE_S", 0.5)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with pytest.raises(DataError, match=r"s3://bucket/photos/train-.*start it again to resume") as caught:
        for batch in loader:
            seen.append(batch)
    assert failure_of(caught.value).passes
    again = ThreadedMotoServer("127.0.0.1", port)
    again.start()  # with what was there before
    try:
        resumed = make_loader(
            open_dataset(url).subset(), global_batch=4, seed=3, block_size=6, consumed=loader.consumed, num_workers=1
        )
        seen += itertools.islice(resumed, 10 - len(seen))
        resumed.close()
    finally:
        again.stop()
    assert_equal(seen, expected)


def test_an_upload_goes_on_where_it_was_cut_off_and_refuses_another_dataset(
    memory: Any, jpeg_folder: Callable[[Encoding], Path], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: list[str] = []
    plain = type(memory).put_file

    def noting(self: Any, path: str, target: str, **options: Any) -> None:
        sent.append(Path(path).name)
        plain(self, path, target, **options)

    monkeypatch.setattr(type(memory), "put_file", noting)
    source = tmp_path / "photos"
    shutil.copytree(jpeg_folder("jpeg256"), source)
    upload(source, "memory://b/p", progress=False)
    assert sent[-1] == "manifest.json"
    names = set(sent)
    sent.clear()
    upload(source, "memory://b/p", progress=False)
    assert sent == []
    for name in ("manifest.json", "train-000000.tar"):
        memory.rm(f"/b/p/{name}")
    upload(source, "memory://b/p", progress=False)
    assert sent == ["train-000000.tar", "manifest.json"]
    assert names == {path.name for path in source.iterdir() if path.is_file()}
    with pytest.raises(DataError, match="another dataset is packed there"):
        upload(folder, "memory://b/p", progress=False)


@pytest.mark.parametrize(("url", "client"), [("gs://bucket/birds", "gcsfs"), ("s3://bucket/birds", "s3fs")])
def test_a_store_whose_client_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, url: str, client: str
) -> None:
    for name in [each for each in sys.modules if each.partition(".")[0] == client]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, client, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)
    with pytest.raises(
        DataError, match=rf"{url}.*{client}.*`pip install dbscale\[remote\]` brings the clients of s3, gs"
    ):
        remote.filesystem_of(url)
