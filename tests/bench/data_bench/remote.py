"""Shards on an S3 server of this machine (moto's): one pass by byte ranges beside webdataset, which streams whole tars."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import webdataset

from data_bench.measure import Row, beside
from dbscale.data import make_loader, open_dataset
from dbscale.data.decode import decode_image
from dbscale.shards.publish import upload

BATCH, BLOCK = 64, 32


@contextmanager
def s3_server() -> Iterator[None]:
    """A server in a process of its own, found by clients through the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(AWS_ACCESS_KEY_ID="someone", AWS_SECRET_ACCESS_KEY="secret",
                      AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")  # fmt: skip
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait()


def remote(folder: Path, rounds: int) -> list[Row]:
    """Photographs per second of wall time, decoded, one process; the contenders take turns."""
    with s3_server():
        store = fsspec.filesystem("s3")
        store.mkdir("bucket")
        upload(folder, "s3://bucket/photos", progress=False)
        dataset = open_dataset("s3://bucket/photos", tier="jpeg", cache_dir=folder.parent / "mirror")
        names = [shard.name for shard in dataset.split.shards]
        count = dataset.num_samples // BATCH * BATCH

        def by_ranges(block_size: int | None) -> Callable[[], int]:
            def run() -> int:
                loader = make_loader(dataset.subset(), global_batch=BATCH, seed=0, block_size=block_size)
                return sum(len(batch.labels) for batch in itertools.islice(loader, count // BATCH))

            return run

        def by_tars() -> int:
            urls = [f"pipe:curl -s --noproxy '*' '{store.sign(f'bucket/photos/{name}')}'" for name in names]
            stream = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
            return sum(decode_image(sample["jpg"]) is not None for sample in stream)

        found = wall_rates({"webdataset": by_tars, f"dbscale, blocks of {BLOCK}": by_ranges(BLOCK),
                            "dbscale, free shuffle": by_ranges(None)}, rounds)  # fmt: skip
    what = f"{count:,} photographs from an S3 server, decoded"
    return beside(what, found, "webdataset")


def wall_rates(contenders: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Best samples per second of each; the server works in another process, so CPU time would not count it."""
    best = dict.fromkeys(contenders, 0.0)
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            count = run()
            best[name] = max(best[name], count / (time.perf_counter() - start))
    return best
