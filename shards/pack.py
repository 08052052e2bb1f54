"""Pack a source into tar shards with index and manifest: parallel, restartable, the same bytes every time.

`ensure_packed` is the entry for a grid's dataset; it also mends a dataset whose files were damaged. The manifest comes
last: a folder without one is not a dataset yet.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dbscale.data.manifest import (
    MANIFEST_NAME,
    Encoding,
    ImageInfo,
    Manifest,
    ShardInfo,
    SplitInfo,
    load_manifest,
    make_fingerprint,
    save_manifest,
)
from dbscale.data.read import index_dtype, save_index, split_fingerprint
from dbscale.errors import DataError
from dbscale.files import make_folder
from shards.jobs import WORK_FOLDER, ShardJob, run_jobs
from shards.plan import SHARD_SAMPLES, PackOptions, Plan, claim, make_plan, plan_jobs, refusal
from shards.repair import is_damaged, repair
from shards.source import Source
from shards.sources import make_source
from shards.stratify import balanced_up_to


def pack(
    source: Source,
    out_dir: str | Path,
    *,
    name: str | None = None,
    seed: int = 0,
    encoding: Encoding | None = None,
    raw_size: int | None = None,
    shard_samples: int | None = None,
    jobs: int | None = None,
    progress: bool = True,
    spec: Mapping[str, Any] | None = None,
) -> Manifest:
    """Pack a source. A killed pack goes on with the missing shards; a finished one is only checked and mended.

    Args:
        source: of `make_source`.
        out_dir: folder of the dataset; created.
        name: of the dataset; None takes the folder's.
        seed, encoding, raw_size, shard_samples: see `plan.PackOptions`.
        jobs: processes; None takes one per core where that pays.
        progress: show a bar with the rate.
        spec: the dataset entry to record in the manifest.

    Raises:
        DataError: another plan was packed there, a sample that is no image, or a folder that cannot be written.
    """
    folder = Path(out_dir)
    listings = source.listings()
    if encoding is not None and encoding not in SHARD_SAMPLES:
        raise DataError(f"encoding {encoding!r} is unknown; known: {', '.join(SHARD_SAMPLES)}")
    options = PackOptions(seed=seed, encoding=encoding, raw_size=raw_size, shard_samples=shard_samples)
    plan = make_plan(source, listings, name or folder.name, options, spec or {})
    shard_jobs = plan_jobs(folder, listings, plan)
    if (folder / MANIFEST_NAME).exists():
        manifest = load_manifest(folder)
        plan.refuse_unlike(manifest, folder)
        repair(source, manifest, shard_jobs, jobs, progress)
        return manifest
    return _write(source, folder, plan, shard_jobs, jobs, progress)


def _write(
    source: Source, folder: Path, plan: Plan, shard_jobs: Sequence[ShardJob], jobs: int | None, progress: bool
) -> Manifest:
    make_folder(folder / WORK_FOLDER)
    claim(folder, plan)
    try:
        prepared = source.prepare(folder / WORK_FOLDER)
        run_jobs(prepared, [job for job in shard_jobs if not job.is_done()], jobs, progress)
        manifest = make_manifest(folder, plan, shard_jobs, source.classes)
        save_manifest(folder, manifest)
    except OSError:
        if not (folder / MANIFEST_NAME).exists():
            raise
        # Another process with the same plan came first, and took the work folder away.
        manifest = load_manifest(folder)
    _tidy(folder)  # by the last of them, too
    return manifest


def _tidy(folder: Path) -> None:
    """Remove what only an unfinished pack needs, and what killed ones left."""
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def make_manifest(folder: Path, plan: Plan, jobs: Sequence[ShardJob], classes: tuple[str, ...]) -> Manifest:
    """Join the shards' rows into one index file per split and describe the whole."""
    splits: dict[str, SplitInfo] = {}
    sides: list[int] = []
    square = True
    for split in dict.fromkeys(job.split for job in jobs):
        own = [job for job in jobs if job.split == split]
        parts = [job.rows() for job in own]
        index = np.concatenate(parts, dtype=index_dtype(max(part.dtype["key"].itemsize for part in parts)))
        splits[split] = _split_info(folder, split, own, index, len(classes))
        sides += [int(edge) for side in ("height", "width") for edge in (index[side].min(), index[side].max())]
        square &= bool((index["height"] == index["width"]).all())
    return Manifest(
        name=plan.name,
        classes=classes,
        image=ImageInfo(encoding=plan.encoding, min_side=min(sides), max_side=max(sides), square=square),
        seed=plan.seed,
        source=plan.source,
        splits=splits,
        fingerprint=make_fingerprint(classes, plan.encoding, splits),
        extra=plan.model_dump(mode="json", exclude={"name", "source"}),
    )


def _split_info(
    folder: Path, split: str, jobs: Sequence[ShardJob], index: np.ndarray[Any, np.dtype[np.void]], num_classes: int
) -> SplitInfo:
    counts = np.bincount(index["label"], minlength=num_classes)
    index_name = f"{split}.index.npy"
    return SplitInfo(
        num_samples=len(index),
        class_counts=tuple(counts.tolist()),
        balanced_up_to=balanced_up_to(counts),
        fingerprint=split_fingerprint(index),
        index=index_name,
        index_checksum=save_index(folder / index_name, index),
        shards=tuple(
            ShardInfo(name=job.tar_path.name, num_samples=len(job.names), num_bytes=job.tar_path.stat().st_size)
            for job in jobs
        ),
    )


_PACK_OPTIONS = ("encoding", "raw_size", "shard_samples")


def ensure_packed(
    name: str, spec: Mapping[str, Any], data_dir: str | Path, *, jobs: int | None = None, progress: bool = True
) -> Path:
    """Pack `<data_dir>/shards/<name>` from a grid's dataset entry unless that is done; returns the folder.

    `spec` is `{source: <kind>, <options of the source>…}` with, besides, `encoding`, `raw_size`, `shard_samples` and
    `pack_seed` of the packer. A packed dataset with missing, cut or resized files is mended from its source.

    Raises:
        DataError: see `pack` and `make_source`; also when what was packed under this name came from another spec.
    """
    folder = Path(data_dir) / "shards" / name
    recorded = json.loads(json.dumps(dict(spec)))
    if (folder / MANIFEST_NAME).exists():
        manifest = load_manifest(folder)
        if manifest.source != recorded:
            raise refusal(folder, "source", manifest.source, recorded)
        if not is_damaged(folder, manifest):
            return folder
    source = source_of(name, spec, data_dir)
    own = {key: spec[key] for key in _PACK_OPTIONS if key in spec}
    pack(source, folder, name=name, seed=spec.get("pack_seed", 0), jobs=jobs, progress=progress, spec=recorded, **own)
    return folder


def source_of(name: str, spec: Mapping[str, Any], data_dir: str | Path) -> Source:
    """The source that a grid's dataset entry describes, unread. Raises DataError as `make_source`, naming the dataset."""
    options = {key: value for key, value in spec.items() if key not in {*_PACK_OPTIONS, "pack_seed"}}
    if "source" not in options:
        raise DataError(f"dataset {name!r}: its entry names no `source` (imagefolder, cifar, fractals, …)")
    try:
        return make_source(options.pop("source"), data_dir=data_dir, **options)
    except DataError as error:
        raise DataError(f"dataset {name!r}: {error}") from error
