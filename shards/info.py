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
        lines += _class_lines(manifest)
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


def _class_lines(manifest: Manifest) -> list[str]:
    """One line a class, one column a split."""
    counts = zip(*(split.class_counts for split in manifest.splits.values()), strict=True)
    rows = [("label", "class", *manifest.splits)]
    rows += [
        (str(label), name, *(f"{count:,}" for count in held))
        for label, (name, held) in enumerate(zip(manifest.classes, counts, strict=True))
    ]
    label_width, name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([f"  {label:>{label_width}}", f"{name:<{name_width}}", *map(str.rjust, held, widths)])
        for label, name, *held in rows
    ]
