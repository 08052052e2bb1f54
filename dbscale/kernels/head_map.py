"""Which student maps are compared with which teacher maps.

Student and teacher may have different head counts. Every head map is brought into one normal form, so that each
backend implements one thing only: the student's heads are averaged in `num_maps` contiguous groups of `group_size`,
and map `m` is compared with a mixture of teacher heads, either one of them (`m // repeats`) or a row of `mixing`.
Knows nothing of tensors q and k, of losses or of backends.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HeadMap = str | Tensor | Sequence[Sequence[float]]
"""`"repeat"`, `"mean"`, or a mixing matrix [student heads, teacher heads] whose rows are distributions."""


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """The normal form of a head map."""

    num_maps: int
    """Maps compared per image: the `H` of the divisor B·H·N."""
    group_size: int
    """Student heads averaged into one map."""
    repeats: int
    """Map `m` is compared with teacher head `m // repeats` (when `mixing` is None)."""
    mixing: Tensor | None
    """[num_maps, teacher heads], rows are distributions; None where one teacher head is enough."""


def plan_heads(head_map: HeadMap, num_heads_s: int, num_heads_t: int, like: Tensor) -> HeadPlan:
    """Bring `head_map` into normal form, a mixing matrix to the device of `like` (float64 where `like` is, else float32).

    `repeat`: teacher head t guides the student heads t·r … t·r + r − 1, r = H_s / H_t, which must be whole.
    `mean`: heads of both are averaged in gcd(H_s, H_t) contiguous groups and the averaged maps are compared.
    A matrix [H_s, H_t]: student head h is compared with Σ_t matrix[h, t] · map_t; it gets no gradient.

    Raises ValueError for head counts that the map cannot join, an unknown name, or a matrix of another shape;
    a matrix that lies on the CPU is also checked for negative entries and row sums (elsewhere: no host sync).
    """
    if isinstance(head_map, str):
        return _plan_by_name(head_map, num_heads_s, num_heads_t, like)
    matrix = torch.as_tensor(head_map, dtype=_dtype(like)).detach()
    _check_matrix(matrix, num_heads_s, num_heads_t)
    return HeadPlan(num_heads_s, 1, 1, matrix.to(like.device, non_blocking=True).contiguous())


def _dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _plan_by_name(name: str, num_heads_s: int, num_heads_t: int, like: Tensor) -> HeadPlan:
    if name == "repeat":
        if num_heads_s % num_heads_t:
            raise ValueError(
                f"head_map='repeat': {num_heads_s} student heads are no multiple of {num_heads_t} teacher heads; "
                f"use 'mean' or a mixing matrix of shape [{num_heads_s}, {num_heads_t}]"
            )
        return HeadPlan(num_heads_s, 1, num_heads_s // num_heads_t, None)
    if name == "mean":
        num_maps = math.gcd(num_heads_s, num_heads_t)
        mixing = None if num_maps == num_heads_t else _block_average(num_maps, num_heads_t, like)
        return HeadPlan(num_maps, num_heads_s // num_maps, 1, mixing)
    raise ValueError(f"head_map={name!r}: unknown; use 'repeat', 'mean' or a matrix [student heads, teacher heads]")


def _block_average(num_maps: int, num_heads_t: int, like: Tensor) -> Tensor:
    per_map = num_heads_t // num_maps
    owner = torch.arange(num_heads_t, device=like.device) // per_map
    mine = owner == torch.arange(num_maps, device=like.device)[:, None]
    return mine.to(_dtype(like)) / per_map


def _check_matrix(matrix: Tensor, num_heads_s: int, num_heads_t: int) -> None:
    if matrix.shape != (num_heads_s, num_heads_t):
        raise ValueError(
            f"head_map: mixing matrix has shape {list(matrix.shape)}; expected [student heads, teacher heads] = "
            f"[{num_heads_s}, {num_heads_t}]"
        )
    if matrix.device.type != "cpu":
        return
    if bool((matrix < 0).any()) or bool(((matrix.sum(1) - 1).abs() > 1e-4).any()):
        raise ValueError("head_map: every row of the mixing matrix must be non-negative and sum to 1")
