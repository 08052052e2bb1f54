"""Copy the shards a bundle reads to the node's own disk, once per node; without a staging folder, nothing happens."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from dbscale.data.manifest import MANIFEST_NAME, load_manifest
from dbscale.study.store import Store


def staged(keys: Sequence[str], store: Store, data_dir: Path, staging: str | None) -> Path:
    """The data folder to read from. `$NAME` in `staging` is filled in from the job's environment, e.g. `$TMPDIR`."""
    if staging is None:
        return data_dir
    target = Path(os.path.expandvars(staging)) / "dbscale"
    for name in sorted({store.read_spec(key).recipe.data.dataset for key in keys}):
        copy_dataset(data_dir / "shards" / name, target / "shards" / name)
    return target


def copy_dataset(source: Path, target: Path) -> None:
    """Make `target` a whole copy of `source`; all ranks of a node ask, one copies, the manifest comes last."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_copy(source, target):
            return
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(MANIFEST_NAME, ".*"))
        shutil.copyfile(source / MANIFEST_NAME, target / MANIFEST_NAME)


def is_copy(source: Path, target: Path) -> bool:
    if not (target / MANIFEST_NAME).exists():
        return False
    return load_manifest(target).fingerprint == load_manifest(source).fingerprint
