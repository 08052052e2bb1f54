"""In which order samples are seen: a pure function of (seed, epoch, n), and the batches cut from it.

The stream is the concatenation of the epochs' permutations; batch k covers stream positions [k·B, (k+1)·B) and rank r
takes the contiguous slice r of it. So the loader's whole state is one integer, and the global batch never depends on
world size or worker count. Knows nothing of files: positions are positions in a subset.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dbscale.errors import DataError
from dbscale.keyed import frozen_generator


@lru_cache(maxsize=3)
def order(seed: int, epoch: int, num_samples: int, block_size: int | None = None) -> NDArray[np.int64]:
    """The permutation [num_samples] of one epoch, read-only.

    With `block_size`, runs of that many neighbouring samples (neighbours on disk too) stay together: the runs are
    shuffled and then each run within itself, so that reads from a network filesystem stay nearly sequential. Where
    runs begin moves from epoch to epoch, and stratified storage makes every run class-balanced in itself.
    """
    generator = frozen_generator("order", seed, epoch, num_samples, block_size or 0)
    if block_size is None or block_size >= num_samples:
        positions = generator.permutation(num_samples)
    else:
        positions = _block_shuffle(generator, num_samples, block_size)
    positions.flags.writeable = False
    return positions


def _block_shuffle(generator: np.random.RandomState, num_samples: int, block_size: int) -> NDArray[np.int64]:
    if block_size < 1:
        raise DataError(f"block_size {block_size} must be at least 1, or left out for a full shuffle")
    shift = int(generator.randint(block_size))
    starts = np.arange(-shift, num_samples, block_size)
    generator.shuffle(starts)
    blocks = [np.arange(max(start, 0), min(start + block_size, num_samples)) for start in starts.tolist()]
    for block in blocks:
        generator.shuffle(block)
    return np.concatenate(blocks)


def valid_world_sizes(global_batch: int) -> list[int]:
    """All world sizes that divide a global batch."""
    return [size for size in range(1, global_batch + 1) if global_batch % size == 0]


@dataclass(frozen=True)
class Stream:
    """The endless training stream of one subset."""

    num_samples: int
    seed: int
    global_batch: int
    repeats: int = 1
    """Repeated augmentation (Hoffer et al. 2020): copies of a sample in its global batch, each augmented on its own."""
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.global_batch < 1 or self.repeats < 1:
            raise DataError(
                f"num_samples {self.num_samples}, global_batch {self.global_batch} and repeats {self.repeats} "
                "must all be at least 1"
            )
        if self.repeats > self.global_batch:
            raise DataError(f"repeats {self.repeats} must be at most global_batch {self.global_batch}")

    def batch(self, number: int, rank: int = 0, world_size: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions [b] and augmentation epochs [b] of this rank's slice of global batch `number`.

        The augmentation epoch is epoch·repeats + copy: unique for every time a sample is seen. Where `repeats` does not
        divide the global batch (DeiT's 3 and 1,024), a batch's last samples lack one or more copies.
        """
        local = self.global_batch // world_size
        slots = np.arange(rank * local, (rank + 1) * local)
        distinct = -(-self.global_batch // self.repeats)
        # Copies lie `distinct` apart, so that neighbours in a batch are different samples (mixing pairs neighbours).
        places = number * distinct + slots % distinct
        epochs, within = np.divmod(places, self.num_samples)
        positions = np.empty(local, np.int64)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
            here = epochs == epoch
            positions[here] = order(self.seed, epoch, self.num_samples, self.block_size)[within[here]]
        return positions, epochs * self.repeats + slots // distinct
