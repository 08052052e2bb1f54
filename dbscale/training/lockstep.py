"""Batches that all ranks get or none: where one rank cannot get its next, all raise that error.

A rank that left alone would let the others wait in their next collective for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

from dbscale.data import Batch
from dbscale.errors import TrainingError


def lockstep(batches: Iterator[Batch], accelerator: Accelerator) -> Iterator[Batch]:
    """`batches`, of which every rank has equally many. Raises this rank's own error, or TrainingError with the
    message of the rank that has one."""
    if accelerator.num_processes == 1:
        yield from batches
        return
    while True:
        batch, fault = None, None
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            fault = error
        if highest_of_ranks(int(fault is not None)):
            raise _fault_of_ranks(fault, accelerator)
        assert batch is not None
        yield batch


def _fault_of_ranks(own: Exception | None, accelerator: Accelerator) -> Exception:
    said = gather_object([None if own is None else f"rank {accelerator.process_index}: {own}"])
    return own or TrainingError(next(text for text in said if text is not None))


def highest_of_ranks(number: int) -> int:
    """The highest number of all ranks, over the host: a device collective would wait for the step just launched."""
    box = torch.tensor([number])
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_host_group())
    return int(box)


@cache
def _host_group() -> dist.ProcessGroup | None:
    if dist.get_backend() == "gloo":
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group
