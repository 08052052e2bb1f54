"""Make batches by number, here or in worker processes. What a batch holds is `loader`'s; whatever worker makes it, it is
the same."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

from dbscale.data.dataset import Subset
from dbscale.errors import DataError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Batches(Protocol[T_co]):
    """Batches of a subset, by number."""

    @property
    def subset(self) -> Subset: ...

    def __getitem__(self, number: int, /) -> T_co: ...


@dataclass(frozen=True)
class _Carried:
    """Hands errors over as they are: a DataLoader would bury what they say under the worker's traceback."""

    batches: Batches[object]

    def __getitem__(self, number: int) -> object:
        try:
            return self.batches[number]
        except DataError as error:
            return error


def serve(batches: Batches[T], numbers: Iterable[int], num_workers: int) -> Iterator[T]:
    """The batches of these numbers, in order, prepared by `num_workers` processes; 0 prepares each when asked for."""
    if num_workers == 0:
        return (batches[number] for number in numbers)
    _ = batches.subset.dataset.reader  # opened (and, for the resident tier, decoded) once, before the workers fork
    with warnings.catch_warnings():
        # More workers than cores is the caller's choice.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            _Carried(batches),  # type: ignore[arg-type]
            batch_size=None,
            sampler=numbers,
            num_workers=num_workers,
            collate_fn=_identity,  # type: ignore[arg-type]
            # A generator of its own: the loader must not draw from, and so change, the caller's random state.
            generator=torch.Generator(),
        )
        return _unpacked(iter(loader))


def _unpacked(items: Iterator[T | DataError]) -> Iterator[T]:
    for item in items:
        if isinstance(item, DataError):
            raise item
        yield item


def _identity(batch: T) -> T:
    return batch
