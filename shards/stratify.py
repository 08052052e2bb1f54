"""The stored order: class after class in turn, so that every prefix is as balanced as the classes allow.

Shuffle within each class, then sort by in-class rank; ties fall in shuffled order. A pure function of labels and seed.
"""

import numpy as np
from numpy.typing import NDArray

from dbscale.keyed import frozen_generator


def stratified_order(labels: NDArray[np.int64], seed: int, split: str) -> NDArray[np.int64]:
    """int64 [n]: the sample stored at each position."""
    shuffled = frozen_generator("stratify", seed, split).permutation(len(labels))
    by_class = np.argsort(labels[shuffled], kind="stable")
    counts = np.bincount(labels)
    ranks = np.empty(len(labels), np.int64)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    ranks[by_class] = np.arange(len(labels)) - starts
    return shuffled[np.argsort(ranks, kind="stable")]


def balanced_up_to(class_counts: NDArray[np.int64]) -> int:
    """Size up to which every prefix holds each class equally often, within one."""
    return int(class_counts.min()) * len(class_counts)
