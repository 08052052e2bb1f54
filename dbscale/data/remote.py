"""Shards on object stores: manifest and index in a small local folder, the tars behind a URL that fsspec opens.

`mirror` fetches manifest and index once; `RemoteShards` then reads byte ranges, those of one batch together and in
parallel, neighbours as one, and the next batch's while this one is decoded. What the bytes are is checked against the
index as on disk, so order, resume and identity are those of the local dataset. With `keep`, what was read once is
kept in sparse copies of the tars: a sample is there exactly if its checksum says so, so nothing else needs to be kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbscale.data.decode import DecodeError, ppm_header_size
from dbscale.data.manifest import MANIFEST_NAME, SplitInfo, load_manifest
from dbscale.data.read import TARGET, ShardFiles, checksum, file_checksum, has_targets
from dbscale.errors import DataError
from dbscale.files import make_folder, read_json, write_atomic, write_json

ORIGIN_NAME = "remote.json"
MAX_GAP = 64 << 10
"""Bytes between two samples that are rather read than asked for apart: a request costs about as much."""
MAX_RANGE = 16 << 20
PARALLEL = 16
"""Requests at once to a store whose client is not asynchronous."""
PATIENCE_S = 60.0
"""A store that does not answer is asked again for so long; then the run stops, and resumes when it is started again."""
log = logging.getLogger(__name__)


def is_url(place: str | Path) -> bool:
    """Whether a dataset's place is an fsspec URL, such as s3://bucket/birds, rather than a folder."""
    return "://" in str(place)


def origin(folder: Path) -> str | None:
    """The URL of a mirrored dataset's tars; None for one whose tars lie in its folder."""
    try:
        return str(read_json(folder / ORIGIN_NAME)["url"])
    except FileNotFoundError:
        return None


def mirror(url: str, folder: str | Path | None = None, *, keep: bool = False) -> Path:
    """Fetch manifest and index of the packed dataset at `url`; returns the folder to open.

    `folder` is by default one of its own below the user's cache (`$XDG_CACHE_HOME`). `keep` also keeps what is read of the
    tars there, up to their whole size. Raises DataError where nothing is packed at the URL, or it cannot be reached.
    """
    url = url.rstrip("/")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dbscale"
    local = Path(folder or caches / hashlib.sha256(url.encode()).hexdigest()[:16])
    make_folder(local)
    with tempfile.TemporaryDirectory(dir=local, prefix=".fetch-") as fetched:
        place = Path(fetched)
        write_atomic(place / MANIFEST_NAME, fetch_file(url, MANIFEST_NAME))
        manifest = load_manifest(place)
        for split in manifest.splits.values():
            path = local / split.index
            if not path.exists() or file_checksum(path) != split.index_checksum:
                write_atomic(path, fetch_file(url, split.index))
        write_json(local / ORIGIN_NAME, {"url": url, "keep": keep})
        os.replace(place / MANIFEST_NAME, local / MANIFEST_NAME)  # last: its existence says that the rest is there
    log.info("the manifest and index of %s are in %s", url, local)
    return local


def fetch_file(url: str, name: str) -> bytes:
    """A whole object. Raises DataError."""
    try:
        filesystem, root = filesystem_of(url)
        return filesystem.cat_file(f"{root}/{name}")
    except FileNotFoundError:
        raise DataError(f"{url}/{name}: no such object; pack the dataset there with `dbscale shards pack SOURCE {url}`"
                        ) from None  # fmt: skip
    except Exception as error:  # every store has exceptions of its own
        fault = unreachable(f"{url}/{name}", error)
        raise fault from fault.__cause__


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises DataError where its client is not installed."""
    import fsspec  # 50 ms with asyncio, and `dbscale plan` asks of each dataset merely whether it has a URL

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{url}: {error}; `pip install dbscale[remote]` brings the clients of s3, gs, hf and https"
        ) from None


def unreachable(what: str, error: BaseException) -> DataError:
    """What to say of an object that could not be read; counts as a lost connection, not as the cell's own failure."""
    fault = DataError(f"{what}: cannot be read ({type(error).__name__}: {error}); look at the network and at the "
                      "credentials; what was trained is kept, start it again to resume")  # fmt: skip
    fault.__cause__ = ConnectionError(str(error))
    fault.__cause__.__cause__ = error
    return fault


class RemoteShards(ShardFiles):
    """The tars of one split behind a URL."""

    def __init__(self, folder: Path, split: SplitInfo, index: NDArray[np.void]) -> None:
        content = read_json(folder / ORIGIN_NAME)
        self.url: str = content["url"]
        super().__init__(folder, split, index, self.url)
        self.keep = bool(content.get("keep"))
        self._known: dict[int, bytes] = {}
        self._coming: tuple[frozenset[int], Future[dict[int, bytes]]] | None = None
        self._process, self._client = -1, None

    def prepare(self, positions: NDArray[np.int64]) -> None:
        """Fetch these samples together; `read` then finds them. Raises DataError as `read` does."""
        wanted = set(positions.tolist())
        if wanted <= self._known.keys():
            return
        known = {position: self._known[position] for position in wanted & self._known.keys()}
        if self._coming is not None and self._process == os.getpid():
            expected, future = self._coming
            if wanted & expected:
                known |= {position: data for position, data in future.result().items() if position in wanted}
            self._coming = None
        self._known = known | self._fetch(sorted(wanted - known.keys()))

    def ahead(self, positions: NDArray[np.int64]) -> None:
        """Begin to fetch what the next `prepare` will ask for."""
        self._connected()
        wanted = frozenset(positions.tolist())
        self._coming = wanted, self._pool.submit(self._fetch, sorted(wanted))

    def stored(self, position: int, what: str = "") -> bytes:
        """The bytes of one sample as they lie there now: of its image, or with TARGET of its mask or boxes. Raises
        DataError when they cannot be had."""
        if position not in self._known:
            self.prepare(np.array([position]))
        record = self.index[position]
        start = int(record[f"{what}offset"]) - int(record["offset"])
        return self._known[position][start : start + int(record[f"{what}size"])]

    def _connected(self) -> Any:
        """The client, one for each process: none survives a fork."""
        if self._process != os.getpid():
            self._process, self._coming = os.getpid(), None
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="readahead")
            self._client, self._root = filesystem_of(self.url)
        return self._client

    def _fetch(self, positions: Sequence[int]) -> dict[int, bytes]:
        kept = {position: data for position in positions if (data := self._kept(position)) is not None}
        missing = [position for position in positions if position not in kept]
        if not missing:
            return kept
        from fsspec.utils import merge_offset_ranges

        records = self.index[missing]
        starts = records["offset"].astype(np.int64)
        ends = starts + _extent(records)
        names = [self.split.shards[shard].name for shard in records["shard"].tolist()]
        blocks: Any = merge_offset_ranges(names, starts.tolist(), ends.tolist(), max_gap=MAX_GAP, max_block=MAX_RANGE)
        content = dict(zip(zip(*blocks, strict=True), self._ranges(*blocks), strict=True))
        order = sorted(content)
        for position, name, start, end in zip(missing, names, starts.tolist(), ends.tolist(), strict=True):
            block = order[bisect_right(order, (name, start, np.inf)) - 1]
            kept[position] = content[block][start - block[1] : end - block[1]]
            self._keep(position, kept[position])
        return kept

    def _ranges(self, names: list[str], starts: list[int], ends: list[int]) -> list[bytes]:
        """These byte ranges, asked for at once, again and again while the store does not answer."""
        client = self._connected()
        paths = [f"{self._root}/{name}" for name in names]
        found: list[Any] = [None] * len(paths)
        deadline, wait_s, left = time.monotonic() + PATIENCE_S, 0.25, list(range(len(paths)))
        while left:
            got = _cat(client, [paths[i] for i in left], [starts[i] for i in left], [ends[i] for i in left])
            for i, each in zip(left, got, strict=True):
                found[i] = self._checked(each, names[i], ends[i] - starts[i])
            left = [i for i in left if isinstance(found[i], BaseException)]
            if left and time.monotonic() > deadline:
                raise unreachable(f"{self.url}/{names[left[0]]}", found[left[0]])
            if left:
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, 5.0)
        return found

    def _checked(self, data: Any, name: str, size: int) -> Any:
        """What a request brought; raises DataError where asking again cannot help."""
        if isinstance(data, FileNotFoundError):
            raise DataError(f"{self.url}/{name}: shard is missing; pack the dataset there again, which uploads what is not "
                            "there")  # fmt: skip
        if not isinstance(data, BaseException) and len(data) != size:
            raise DataError(f"{self.url}/{name}: cut short; remove it and pack the dataset there again")
        return data

    def _copy(self, position: int) -> Path:
        return self.folder / "kept" / self.split.shards[int(self.index["shard"][position])].name

    def _kept(self, position: int) -> bytes | None:
        """The sample from the sparse copy; a hole has another checksum."""
        if not self.keep:
            return None
        with suppress(OSError), self._copy(position).open("rb") as file:
            record = self.index[position]
            data = os.pread(file.fileno(), int(_extent(record)), int(record["offset"]))
            return data if _is_whole(data, record) else None
        return None

    def _keep(self, position: int, data: bytes) -> None:
        if not self.keep:
            return
        with suppress(OSError):  # a full disk: the cache is a convenience
            path = self._copy(position)
            path.parent.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                # Several processes may write one place at once: they write the same bytes there.
                os.pwrite(descriptor, data, int(self.index["offset"][position]))
            finally:
                os.close(descriptor)


def _extent(records: NDArray[np.void]) -> NDArray[np.int64]:
    """Bytes from the start of an image to the end of what belongs to it: a mask or boxes lie right behind it."""
    if not has_targets(records):
        return records["size"].astype(np.int64)
    return (records[f"{TARGET}offset"] + records[f"{TARGET}size"] - records["offset"]).astype(np.int64)


def _is_whole(data: bytes, record: NDArray[np.void]) -> bool:
    """Whether a sample's bytes, of all that belongs to it, are those that were packed."""
    for what in ("", TARGET) if has_targets(record) else ("",):
        start = int(record[f"{what}offset"]) - int(record["offset"])
        if checksum(data[start : start + int(record[f"{what}size"])]) != int(record[f"{what}checksum"]):
            return False
    return True


def _cat(client: Any, paths: list[str], starts: list[int], ends: list[int]) -> list[Any]:
    """Bytes or the exception of each range."""
    if client.async_impl:
        return client.cat_ranges(paths, starts, ends, on_error="return")

    def one(path: str, start: int, end: int) -> Any:
        try:
            return client.cat_file(path, start=start, end=end)
        except Exception as error:
            return error

    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(one, paths, starts, ends))


class RemoteRawReader:
    """Tier `raw` by byte ranges."""

    def __init__(self, files: RemoteShards) -> None:
        self.files = files
        self.height, self.width = int(files.index["height"][0]), int(files.index["width"][0])

    def fetch(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[int]]:
        """uint8 [b, 3, H, W] (channels last in memory); bad slots are black."""
        self.files.prepare(positions)
        header = ppm_header_size(self.height, self.width)
        out, bad = np.zeros((len(positions), self.height * self.width * 3), np.uint8), []
        for slot, position in enumerate(positions.tolist()):
            try:
                out[slot] = np.frombuffer(self.files.read(position), np.uint8)[header:]
            except DecodeError:
                bad.append(slot)
        return out.reshape(-1, self.height, self.width, 3).transpose(0, 3, 1, 2), bad


def copy_shard(folder: Path, name: str, target: Any) -> None:
    """Write a mirrored dataset's whole shard into the open file `target`. Raises DataError."""
    import fsspec

    url = origin(folder)
    try:
        opened: Any = fsspec.open(f"{url}/{name}", "rb")
        with opened as source:
            shutil.copyfileobj(source, target, 1 << 22)
    except FileNotFoundError:
        raise DataError(f"{url}/{name}: shard is missing; pack the dataset there again") from None
    except Exception as error:
        fault = unreachable(f"{url}/{name}", error)
        raise fault from fault.__cause__
