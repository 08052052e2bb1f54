"""The attention term of distillation, from a recipe's settings to the kernels' tap on student and teacher.

Chooses layers, heads and tokens; listening and the mathematics are the kernels'.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dbscale.errors import TrainingError
from dbscale.kernels.timm_attention import AttentionTap
from dbscale.study.recipe import Attention


def make_tap(student: nn.Module, teacher: nn.Module, settings: Attention, backend: str) -> AttentionTap:
    """Join the chosen student layers to the teacher layers at the same relative depth.

    Raises TrainingError for layers that do not exist, and ValueError for models without plain attention.
    """
    depth_s, depth_t = _depth(student), _depth(teacher)
    layers = [(layer, _twin(layer, depth_s, depth_t)) for layer in chosen_layers(settings, depth_s)]
    return AttentionTap(
        student,
        teacher,
        layers=layers,
        head_map=_head_map(settings, student, teacher),
        token_slice=_common_tokens(student, teacher),
        backend=backend,
    )


def chosen_layers(settings: Attention, depth: int) -> tuple[int, ...]:
    """Student layers 0 … depth-1 that are compared."""
    if settings.layers == "all":
        return tuple(range(depth))
    if settings.layers == "last":
        return (depth - 1,)
    wrong = [layer for layer in settings.layers if not -depth <= layer < depth]
    if wrong or not settings.layers:
        raise TrainingError(f"attention.layers {list(settings.layers)}: the student has layers 0 to {depth - 1}")
    return tuple(layer % depth for layer in settings.layers)


def spread_heads(num_heads_s: int, num_heads_t: int) -> Tensor:
    """Mixing matrix [H_s, H_t]: a head listens to the teacher heads that cover its share of the width."""
    edges_s, edges_t = torch.linspace(0, 1, num_heads_s + 1), torch.linspace(0, 1, num_heads_t + 1)
    low = torch.maximum(edges_s[:-1, None], edges_t[None, :-1])
    high = torch.minimum(edges_s[1:, None], edges_t[None, 1:])
    return (high - low).clamp_min(0) * num_heads_s


def _twin(layer: int, depth_s: int, depth_t: int) -> int:
    return max(round((layer + 1) * depth_t / depth_s) - 1, 0)


def _depth(model: nn.Module) -> int:
    return len(getattr(model, "blocks", [])) or 1  # the tap refuses models without blocks, by name


def _head_map(settings: Attention, student: nn.Module, teacher: nn.Module) -> str | Tensor:
    if settings.head_map != "matrix":
        return settings.head_map
    return spread_heads(student.blocks[0].attn.num_heads, teacher.blocks[0].attn.num_heads)  # type: ignore[index, union-attr]


def _common_tokens(student: nn.Module, teacher: nn.Module) -> tuple[slice, slice] | None:
    """The patches of both, where one has a distillation token and the other has none; None: all tokens."""
    prefix_s, prefix_t = (int(getattr(model, "num_prefix_tokens", 0)) for model in (student, teacher))
    return None if prefix_s == prefix_t else (slice(prefix_s, None), slice(prefix_t, None))
