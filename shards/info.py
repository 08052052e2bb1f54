"""Describe a packed dataset in a few lines of text."""

from pathlib import Path

import numpy as np

from dbscale.data.manifest import Manifest, SplitInfo, load_manifest


def describe(folder: str | Path, *, classes: bool = False) -> str:
    """Sizes, balance, encoding and fingerprint; with `classes` also the count of every class.

    Raises:
        DataError: there is no readable manifest.
    """
    manifest = load_manifest(folder)
    image = manifest.image
    side = f"{image.max_side}" if image.min_side == image.max_side else f"{image.min_side}…{image.max_side}"
    lines = [
        f"{manifest.name}: {manifest.num_classes} classes, {image.encoding} images of {side} px",
        f"  fingerprint {manifest.fingerprint}",
    ]
    for name, split in manifest.splits.items():
        lines += _describe_split(name, split)
        if classes:
            lines += _class_lines(manifest, split)
    return "\n".join(lines)


def _describe_split(name: str, split: SplitInfo) -> list[str]:
    counts = np.array(split.class_counts)
    num_bytes = sum(shard.num_bytes for shard in split.shards)
    return [
        f"  {name}: {split.num_samples:,} samples in {len(split.shards)} shards, {num_bytes / 1e6:,.1f} MB",
        f"    {counts.min():,} to {counts.max():,} samples a class; every prefix is class-balanced within one up to "
        f"{split.balanced_up_to:,} samples ({counts.min():,} a class)",
        f"    fingerprint {split.fingerprint}",
    ]


def _class_lines(manifest: Manifest, split: SplitInfo) -> list[str]:
    width = max(len(name) for name in manifest.classes)
    rows = zip(manifest.classes, split.class_counts, strict=True)
    return [f"    {label:6d}  {name:<{width}}  {count:,}" for label, (name, count) in enumerate(rows)]
