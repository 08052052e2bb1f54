"""Read a bundle's shards from the node's own disk: `dbscale.data.stage` copies them, once per node.

Without a staging folder nothing happens. Only the shards that hold the bundle's samples are copied. Whatever keeps
them from being copied is said and the shards are read where they are: staging makes a job faster, never fail.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

from dbscale.study.stop import StopRequest
from dbscale.study.store import Store


@contextlib.contextmanager
def staged(keys: Sequence[str], store: Store, data_dir: Path, staging: str | None, stop: StopRequest) -> Iterator[Path]:
    """The data folder to read from. `$NAME` in `staging` is filled in from the job's environment, e.g. `$TMPDIR`.

    The last process of a node to leave removes the copies; a job that was asked to stop leaves them, for it comes back.
    """
    if staging is None:
        yield data_dir
        return
    from dbscale.data.stage import release, remove_unused

    folder = Path(os.path.expandvars(staging)) / "dbscale"
    held: list[Path] = []
    try:
        yield _stage(keys, store, data_dir, folder, held)
    finally:
        for each in held:
            release(each)
    if not stop.requested:
        remove_unused(folder)


def _stage(keys: Sequence[str], store: Store, data_dir: Path, folder: Path, held: list[Path]) -> Path:
    """Copy what the cells read; the folder in which it is found by name, or `data_dir` where that is not possible."""
    copies: dict[str, Path] = {}
    try:
        if "$" in str(folder):
            raise ValueError(f"{folder}: a variable that is not set in the job's environment")
        for key in keys:
            for name, copy in stage_cell(store, key, data_dir, folder).items():
                copies[name] = copy
                held.append(copy)
        held.append(view(folder, copies))
    except (ValueError, OSError) as error:
        print(f"=== not staged: {error}; reading {data_dir / 'shards'}", file=sys.stderr, flush=True)
        return data_dir
    return held[-1]


def stage_cell(store: Store, key: str, data_dir: Path, folder: Path) -> dict[str, Path]:
    """Copy what one cell trains on and is tested on; its dataset's name and the copy."""
    from dbscale.data import open_dataset
    from dbscale.data.stage import stage_subset

    data = store.read_spec(key).recipe.data
    source = data_dir / "shards" / data.dataset
    copy = source
    for split, count, seed in (("train", data.num_samples, data.subset_seed), ("test", None, 0)):
        dataset = open_dataset(source, split, tier=data.tier, image_size=data.image_size)
        copy = stage_subset(dataset.subset(count, seed), folder).dataset.folder
    return {data.dataset: copy}


def view(folder: Path, copies: Mapping[str, Path]) -> Path:
    """A data folder of this process's own, in which the copies have their datasets' names."""
    from dbscale.data.stage import hold

    own = folder / f"view-{uuid4().hex[:12]}"
    hold(own)
    (own / "shards").mkdir()
    for name, copy in copies.items():
        (own / "shards" / name).symlink_to(copy, target_is_directory=True)
    return own
