"""Serve a subset as batches: an endless stream for training, a finite pass for evaluation.

The state of the training stream is one integer, the samples consumed by all ranks together. Batch k is a pure function
of (subset, seed, global batch, k), so workers, ranks and resumes cannot change it. Models, devices and mixing are the
caller's; which sample comes when is `order`.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from dbscale.data.augment import Transform
from dbscale.data.dataset import Dataset, Subset
from dbscale.data.dense import DenseTransform, Targets
from dbscale.data.order import Stream, valid_world_sizes
from dbscale.data.read import Pixels
from dbscale.data.remote import RemoteShards
from dbscale.errors import DataError

AnyTransform = Transform | DenseTransform


class Batch(NamedTuple):
    """One rank's slice of a global batch."""

    images: Tensor | list[NDArray[np.uint8]]
    """What the transform gives, float32 [b, 3, S, S]; without one the stored pixels (see `read.Pixels`)."""
    labels: Tensor
    """int64 [b]."""
    sample_ids: Tensor
    """int64 [b]: position in the split (training) or in the subset (evaluation)."""
    epoch: Tensor
    """int64 [b]: augmentation epoch of each sample, the key to pass to a transform together with sample_ids."""
    weights: Tensor
    """float32 [b]: 1, or 0 for padding and for unreadable evaluation samples."""
    bad_ids: Tensor
    """int64 [any]: samples (position in the split) that were unreadable."""
    targets: Targets | None = None
    """Masks or boxes of a dense dataset, see `dense.DenseTransform`; then the labels mean nothing."""


@dataclass(frozen=True)
class _TrainBatches:
    """Maps a batch number to a Batch; what worker processes run."""

    subset: Subset
    stream: Stream
    rank: int
    world_size: int
    transform: AnyTransform | None

    def __getitem__(self, number: int) -> Batch:
        positions, epochs = self.stream.batch(number, self.rank, self.world_size)
        indices = self.subset.indices[positions]
        dataset = self.subset.dataset
        self._read_ahead(number, indices)
        pixels, targets, bad_slots = _fetch(dataset, indices)
        for slot in bad_slots:
            pixels[slot], target = _next_good(self.subset, int(positions[slot]))
            if targets is not None:
                targets[slot] = target
        labels, weights = dataset.labels_of(indices), np.ones(len(indices))
        return _make_batch(pixels, targets, labels, indices, epochs, weights, indices[bad_slots], self.transform)

    def _read_ahead(self, number: int, indices: NDArray[np.int64]) -> None:
        """Have this batch's bytes, and begin to fetch those of this process's next one."""
        files = self.subset.dataset.files
        if isinstance(files, RemoteShards) and self.subset.dataset.tier != "resident":
            worker = get_worker_info()
            step = worker.num_workers if worker is not None else 1
            files.prepare(indices)
            files.ahead(self.subset.indices[self.stream.batch(number + step, self.rank, self.world_size)[0]])


def _fetch(dataset: Dataset, indices: NDArray[np.int64]) -> tuple[Pixels, list[Any] | None, list[int]]:
    """Pixels, masks or boxes (None where images have labels), and the slots where either is bad."""
    pixels, bad_slots = dataset.reader.fetch(indices)
    if dataset.targets is None:
        return pixels, None, bad_slots
    targets, bad_targets = dataset.targets.fetch(indices)
    return pixels, list(targets), sorted({*bad_slots, *bad_targets})


def _next_good(subset: Subset, position: int) -> tuple[NDArray[np.uint8], Any]:
    """Pixels and target of the next readable sample of the same class, cyclically in the subset's order."""
    same_class = np.flatnonzero(subset.labels == subset.labels[position])
    later = np.roll(same_class, -int(np.searchsorted(same_class, position, side="right")))
    for candidate in later[:-1].tolist():
        pixels, targets, bad_slots = _fetch(subset.dataset, subset.indices[[candidate]])
        if not bad_slots:
            return pixels[0], targets and targets[0]
    manifest = subset.dataset.manifest
    of_class = "" if manifest.target else f" of class {manifest.classes[int(subset.labels[position])]!r}"
    raise DataError(
        f"{subset.dataset.folder}: no readable sample{of_class} is left in a subset of {len(subset)}; "
        f"`dbscale shards verify {subset.dataset.folder}` lists the bad ones"
    )


def _make_batch(
    pixels: Pixels,
    targets: list[Any] | None,
    labels: NDArray[np.int64],
    sample_ids: NDArray[np.int64],
    epochs: NDArray[np.int64],
    weights: NDArray[np.float64],
    bad_ids: NDArray[np.int64],
    transform: AnyTransform | None,
) -> Batch:
    ids, epoch = torch.from_numpy(sample_ids), torch.from_numpy(epochs)
    images = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
    placed: Targets | None = targets
    if isinstance(transform, DenseTransform):
        assert targets is not None, "a dense transform goes with a dense dataset"
        images, placed = transform(images, targets, epoch=epoch, sample_ids=ids)
    elif transform is not None:
        images = transform(images, epoch=epoch, sample_ids=ids)
    weight = torch.from_numpy(weights.astype(np.float32))
    return Batch(images, torch.from_numpy(labels), ids, epoch, weight, torch.from_numpy(bad_ids), placed)


class TrainLoader:
    """Endless iterator over this rank's batches; `consumed` is its whole state."""

    def __init__(self, batches: _TrainBatches, consumed: int, num_workers: int, max_bad_share: float) -> None:
        self._stream, self._subset = batches.stream, batches.subset
        self._max_bad_share = max_bad_share
        self._bad_ids: set[int] = set()
        self._next = consumed // self._stream.global_batch
        self._batches = _serve(batches, count(self._next), num_workers)

    @property
    def consumed(self) -> int:
        """Samples consumed by all ranks together, up to the last batch that was handed out."""
        return self._next * self._stream.global_batch

    @property
    def identity(self) -> dict[str, str | int | None]:
        """What the stream is a function of, besides `consumed`: keep it in a checkpoint, see `refuse_foreign`."""
        stream = self._stream
        return {
            "subset fingerprint": self._subset.fingerprint,
            "seed": stream.seed,
            "global batch": stream.global_batch,
            "repeats": stream.repeats,
            "block size": stream.block_size,
        }

    def refuse_foreign(self, saved: Mapping[str, Any]) -> None:
        """Raise DataError, with both values, when a saved identity is not this stream's."""
        for name, value in self.identity.items():
            if saved.get(name) != value:
                raise DataError(
                    f"{self._subset.dataset.folder}: the saved state has {name} {saved.get(name)!r}, this run has "
                    f"{value!r}: it would go on with other samples; resume with what it was saved with, or start anew"
                )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._next += 1
        if len(batch.bad_ids):
            self._count_bad(batch.bad_ids.tolist())
        return batch

    def _count_bad(self, bad_ids: list[int]) -> None:
        self._bad_ids.update(bad_ids)
        allowed = max(1, int(self._max_bad_share * len(self._subset)))
        if len(self._bad_ids) > allowed:
            folder = self._subset.dataset.folder
            raise DataError(
                f"{folder}: {len(self._bad_ids)} of {len(self._subset):,} samples are unreadable, more than the "
                f"allowed share {self._max_bad_share:g}; `dbscale shards verify {folder}` lists them"
            )

    def close(self) -> None:
        """Stop the worker processes, if any."""
        self._batches = iter(())


def make_loader(
    subset: Subset,
    *,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    seed: int,
    consumed: int = 0,
    transform: AnyTransform | None = None,
    block_size: int | None = None,
    repeats: int = 1,
    max_bad_share: float = 0.01,
) -> TrainLoader:
    """This rank's endless training stream.

    Args:
        subset: what to train on.
        global_batch: samples of one batch over all ranks; each rank gets its contiguous slice.
        rank, world_size: this process and the number of processes.
        num_workers: processes that prepare batches; 0 prepares them in the caller (best for the resident tier).
        seed: of the order.
        consumed: where to go on: the `consumed` of the loader that stopped. Any world size may go on.
        transform: of `make_transform`; None hands out stored pixels, to be transformed on the device.
        block_size: see `order.order`.
        repeats: copies of each sample in its global batch, each augmented on its own.
        max_bad_share: share of the subset that may be unreadable (and is replaced) before the run stops.

    Raises DataError for a world size that does not divide the global batch, `repeats` above it, a `consumed` between two.

    >>> import dbscale, tempfile
    >>> from dbscale.shards.pack import ensure_packed
    >>> folder = ensure_packed("digits", {"source": "digits"}, tempfile.mkdtemp(), progress=False)
    >>> subset = dbscale.open_dataset(folder).subset(100)
    >>> loader = dbscale.make_loader(subset, global_batch=20, seed=0)
    >>> batches = [next(loader) for _ in range(3)]
    >>> resumed = dbscale.make_loader(subset, global_batch=20, seed=0, consumed=40)
    >>> batches[2].sample_ids.equal(next(resumed).sample_ids), loader.consumed
    (True, 60)
    """
    check_world(global_batch, rank, world_size)
    stream = Stream(len(subset), seed, global_batch, repeats, block_size)
    if consumed < 0 or consumed % global_batch:
        raise DataError(
            f"consumed {consumed} is not a multiple of the global batch {global_batch}: the saved state belongs to "
            "another global batch; resume with the one it was saved with"
        )
    batches = _TrainBatches(subset, stream, rank, world_size, transform)
    return TrainLoader(batches, consumed, num_workers, max_bad_share)


def check_world(global_batch: int, rank: int, world_size: int) -> None:
    """Raise DataError unless `world_size` divides the global batch and `rank` is one of its ranks."""
    if world_size < 1 or global_batch % world_size:
        sizes = ", ".join(map(str, valid_world_sizes(global_batch)))
        raise DataError(f"world size {world_size} does not divide the global batch {global_batch}; valid: {sizes}")
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} is not in 0…{world_size - 1}")


@dataclass(frozen=True)
class EvalLoader:
    """Finite and repeatable: every sample of the subset exactly once over all ranks."""

    subset: Subset
    batch_size: int
    rank: int
    world_size: int
    transform: AnyTransform | None
    num_workers: int

    def __len__(self) -> int:
        """Number of batches, equal on all ranks."""
        return math.ceil(len(self.subset) / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        return _serve(self, range(len(self)), self.num_workers)

    def __getitem__(self, number: int) -> Batch:
        start = (number * self.world_size + self.rank) * self.batch_size
        positions = np.arange(start, start + self.batch_size)
        weights = (positions < len(self.subset)).astype(np.float64)
        # Padding repeats sample 0: a caller that forgets the weights overwrites a result with itself.
        positions = np.where(weights > 0, positions, 0)
        indices = self.subset.indices[positions]
        pixels, targets, bad_slots = _fetch(self.subset.dataset, indices)
        weights[bad_slots] = 0
        bad_ids = indices[bad_slots]
        labels, epochs = self.subset.dataset.labels_of(indices), np.zeros_like(positions)
        return _make_batch(pixels, targets, labels, positions, epochs, weights, bad_ids, self.transform)


def make_eval_loader(
    subset: Subset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    transform: AnyTransform | None = None,
) -> EvalLoader:
    """This rank's share of one pass over a subset, padded with weight 0 so that all ranks have equally many batches.

    `batch_size` is per rank. Unreadable samples get weight 0 and are named in `Batch.bad_ids`.
    """
    check_world(batch_size * max(world_size, 1), rank, world_size)
    return EvalLoader(subset, batch_size, rank, world_size, transform, num_workers)


@dataclass(frozen=True)
class _Carried:
    """Hands errors over as they are: a DataLoader would bury what they say under the worker's traceback."""

    batches: _TrainBatches | EvalLoader

    def __getitem__(self, number: int) -> Batch | DataError:
        try:
            return self.batches[number]
        except DataError as error:
            return error


def _serve(batches: _TrainBatches | EvalLoader, numbers: Iterable[int], num_workers: int) -> Iterator[Batch]:
    """The batches of these numbers, in order, prepared by `num_workers` processes; 0 prepares each when asked for."""
    if num_workers == 0:
        return (batches[number] for number in numbers)
    # Opened (and, for the resident tier, decoded) once, before the workers fork.
    _ = batches.subset.dataset.reader, batches.subset.dataset.targets
    with warnings.catch_warnings():
        # More workers than cores is the caller's choice.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            _Carried(batches),  # type: ignore[arg-type]
            batch_size=None,
            sampler=numbers,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            # A generator of its own: the loader must not draw from, and so change, the caller's random state.
            generator=torch.Generator(),
        )
        return map(_or_raise, iter(loader))


def _or_raise(item: Batch | DataError) -> Batch:
    if isinstance(item, DataError):
        raise item
    return item


def _as_it_is(batch: Any) -> Any:
    return batch
