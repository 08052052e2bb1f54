"""Read a bundle's shards from the node's own disk: `dbscale.data.stage` copies them, once per node.

Without a staging folder nothing happens. Only the shards that hold the bundle's samples are copied.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from dbscale.study.store import Store


def staged(keys: Sequence[str], store: Store, data_dir: Path, staging: str | None) -> Path:
    """The data folder to read from. `$NAME` in `staging` is filled in from the job's environment, e.g. `$TMPDIR`.

    Raises DataError when a dataset is missing or damaged, or when the node's disk is full.
    """
    if staging is None:
        return data_dir
    folder = Path(os.path.expandvars(staging)) / "dbscale"
    copies: dict[str, Path] = {}
    for key in keys:
        copies.update(stage_cell(store, key, data_dir, folder))
    return view(folder, copies)


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


def view(folder: Path, copies: dict[str, Path]) -> Path:
    """A data folder in which the copies have their datasets' names; jobs with other copies have a view of their own."""
    digest = hashlib.sha256("\n".join(sorted(path.name for path in copies.values())).encode()).hexdigest()[:12]
    shards = folder / f"view-{digest}" / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    for name, copy in copies.items():
        link = shards / f".{name}.{os.getpid()}"
        link.symlink_to(copy, target_is_directory=True)
        link.replace(shards / name)
    return shards.parent
