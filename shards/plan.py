"""Everything that decides the packed bytes, and how it is cut into jobs. Pure, but for the note in the work folder."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from dbscale.data.manifest import Encoding, Manifest
from dbscale.errors import DataError
from dbscale.files import write_atomic
from dbscale.strict import Strict
from shards.jobs import WORK_FOLDER, ShardJob
from shards.source import Listing, Source
from shards.stratify import stratified_order

SHARD_SAMPLES: dict[Encoding, int] = {"original": 2048, "jpeg256": 8192, "raw": 8192}
"""Samples per tar, by encoding, so that a tar of photographs has a few hundred MB."""


class Plan(Strict):
    """Two packs with equal plans give equal bytes."""

    name: str
    seed: int
    encoding: Encoding
    raw_size: int | None
    shard_samples: int
    source: dict[str, JsonValue]
    """The dataset entry it was packed from, for the record and for repairs."""
    listing: str
    """Hash of the source's classes, names and labels."""

    def refuse_unlike(self, manifest: Manifest, folder: Path) -> None:
        """Raise DataError when a finished dataset was packed by another plan."""
        packed = {"name": manifest.name, "source": manifest.source, **manifest.extra}
        for field, value in self.model_dump(mode="json").items():
            if field in packed and packed[field] != value:
                raise refusal(folder, field, packed[field], value)


def refusal(folder: Path, field: str, packed: object, asked: object) -> DataError:
    """The error for a folder that already holds something else."""
    return DataError(
        f"{folder}: already packed with {field} = {packed!r}, now asked for {asked!r}; take another dataset name, or "
        "remove this folder first"
    )


class PackOptions(Strict):
    """What the caller of a pack may choose."""

    seed: int = 0
    """Of the stratified order."""
    encoding: Encoding | None = None
    """`original` bytes, `jpeg256`, or `raw` uint8; None takes the source's own."""
    raw_size: int | None = None
    """Side in px of raw images (short side, then the central square)."""
    shard_samples: int | None = None
    """Samples per tar; None chooses by encoding."""


def make_plan(
    source: Source, listings: Mapping[str, Listing], name: str, options: PackOptions, spec: Mapping[str, Any]
) -> Plan:
    """Fill in what was left open and hash the listing. Raises DataError on sizes that cannot be."""
    for field, value in (("shard_samples", options.shard_samples), ("raw_size", options.raw_size)):
        if value is not None and value < 1:
            raise DataError(f"{field} is {value}, it must be at least 1")
    encoding = options.encoding or source.default_encoding
    digest = hashlib.sha256("\0".join(source.classes).encode())
    for split, listing in listings.items():
        digest.update(f"{split}\0{len(listing.names)}\0".encode() + listing.labels.tobytes())
        digest.update("\0".join(listing.names).encode("utf-8", "surrogateescape"))
    return Plan(
        name=name,
        seed=options.seed,
        encoding=encoding,
        raw_size=options.raw_size,
        shard_samples=options.shard_samples or SHARD_SAMPLES[encoding],
        source=dict(spec),
        listing=digest.hexdigest()[:32],
    )


def claim(folder: Path, plan: Plan) -> None:
    """Note the plan in the work folder, or check that the half-finished pack found there has the same one."""
    path = folder / WORK_FOLDER / "plan.json"
    text = plan.model_dump_json(indent=1).encode()
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        write_atomic(path, text)
        return
    if found != text:
        raise DataError(
            f"{folder}: holds a half-finished pack of another plan ({path}), perhaps being written now; finish that "
            "one, or remove the folder"
        )


def plan_jobs(folder: Path, listings: Mapping[str, Listing], plan: Plan) -> list[ShardJob]:
    """Cut every split's stratified order into shards."""
    jobs = []
    for split, listing in listings.items():
        stored = stratified_order(listing.labels, plan.seed, split)
        for shard, first in enumerate(range(0, len(stored), plan.shard_samples)):
            numbers = stored[first : first + plan.shard_samples]
            names = [listing.names[number] for number in numbers.tolist()]
            labels = listing.labels[numbers]
            jobs.append(ShardJob(folder, split, shard, first, numbers, names, labels, plan.encoding, plan.raw_size))
    return jobs
