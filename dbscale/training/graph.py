"""The optimizer step as one CUDA graph: a model so small that its kernels are shorter than their launches is launched once.

The loop's own step is what is recorded, so the eager step is its twin: the same kernels on the same numbers, bitwise the
same weights (tests/gpu). The first steps run eagerly, which lets libraries allocate what they keep; the next is recorded
and from then on replayed, on batches copied to where the recorded one was. Seeds, learning rates and the share of a
mixture are read from the device at each replay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from dbscale.data import MixTarget
from dbscale.study.recipe import Recipe
from dbscale.study.resources import Resources
from dbscale.training.losses import Losses, Target

EAGER_STEPS = 3
MOST_QUEUED = 3
"""Steps that the host may be ahead of the device: each holds its batch in memory, and one launch a step queues hundreds."""
Step = Callable[[Tensor, Target], Losses]
"""(images [b, 3, S, S], target) -> this rank's losses, with the optimizer's step taken."""


def can_capture(recipe: Recipe, resources: Resources, accelerator: Accelerator) -> bool:
    """Whether a step is the same kernels each time, and none of them waits for the host.

    Left out: engines with collectives or host logic of their own (DDP, ZeRO), loss scaling, what torch compiles, matching of
    boxes, teachers' logits from files, and losses of plugins, of which nothing is known.
    """
    return (
        resources.cuda_graph
        and accelerator.device.type == "cuda"
        and accelerator.num_processes == 1
        and resources.zero_stage is None
        and recipe.training.precision != "fp16"
        and not resources.compile
        and not resources.teacher_cache
        and recipe.task is None
        and not recipe.training.loss_terms
    )


class CapturedStep:
    """Takes steps as `step` does. Batches must keep their shape and their kind of target."""

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        self._step, self._optimizer, self._eager_left = step, optimizer, EAGER_STEPS
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._queued = deque[torch.cuda.Event]()

    def __call__(self, images: Tensor, target: Target) -> Losses:
        if self._eager_left:
            self._eager_left -= 1
            return self._take_eagerly(images, target)
        if self._graph is None:
            self._record(images, target)
        assert self._graph is not None
        for kept, given in zip(self._batch, _parts(images, target), strict=True):
            kept.copy_(given, non_blocking=True) if isinstance(given, Tensor) else kept.fill_(given)
        self._graph.replay()
        self._queued.append(torch.cuda.current_stream().record_event())
        if len(self._queued) > MOST_QUEUED:
            self._queued.popleft().synchronize()
        return self._losses

    def _take_eagerly(self, images: Tensor, target: Target) -> Losses:
        """On the stream that will record: what autograd keeps of a stream is then no part of the recording."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            losses = self._step(images, target)
        current.wait_stream(self._stream)
        return losses

    def _record(self, images: Tensor, target: Target) -> None:
        parts = _parts(images, target)
        self._batch = [
            part.clone()
            if isinstance(part, Tensor)
            else torch.full((), part, dtype=torch.float64, device=images.device)
            for part in parts
        ]
        kept_images, *kept = self._batch
        kept_target: Target = MixTarget(*kept) if isinstance(target, MixTarget) else kept[0]  # type: ignore[arg-type]
        self._graph = torch.cuda.CUDAGraph()
        # torch records an optimizer's step only under this name; it changes no number of a fused one.
        self._name_capturable(True)
        # The feed's thread goes on allocating and copying meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._losses = self._step(kept_images, kept_target)
        self._name_capturable(False)

    def _name_capturable(self, value: bool) -> None:
        for group in self._optimizer.param_groups:
            group["capturable"] = value


def _parts(images: Tensor, target: Target) -> list[Tensor | float]:
    if isinstance(target, MixTarget):
        return [images, target.y_a, target.y_b, target.lam]
    assert isinstance(target, Tensor), "boxes are matched by the host"
    return [images, target]
