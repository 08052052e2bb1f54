"""The boundary as a surface D_p*(M, D_f), and one boundary per group of paired measurements."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from dbscale.errors import LawError
from dbscale.laws.boundary import Boundary, find_boundary
from dbscale.laws.delta_curve import PairedDelta
from dbscale.laws.law_fit import LawFit
from dbscale.laws.resample import Bootstrap


def boundary_surface(
    plain: LawFit | Bootstrap,
    distilled: LawFit | Bootstrap,
    *,
    num_params: Sequence[float],
    downstream_samples: Sequence[float],
    **options,
) -> tuple[Boundary, ...]:
    """A boundary from the laws for every pair (M, D_f), in the order of a nested loop; `at` of each holds its pair.

    `options` go to `find_boundary` (level, reach, num_draws, measured_range, seed).
    """
    return tuple(
        find_boundary(plain, distilled, at={"num_params": float(m), "downstream_samples": float(f)}, **options)
        for m in num_params
        for f in downstream_samples
    )


def boundaries_by_group(
    upstream_samples: np.ndarray,
    delta: np.ndarray,
    groups: Sequence[Hashable],
    *,
    stderr: np.ndarray | None = None,
    seeds: np.ndarray | None = None,
    **options,
) -> tuple[dict[Hashable, Boundary], dict[Hashable, str]]:
    """A law-free boundary for each group of rows (a size, a downstream set, a D_f, a seed), and why others have
    none.
    """
    found: dict[Hashable, Boundary] = {}
    refused: dict[Hashable, str] = {}
    rows: Mapping[Hashable, list[int]] = {g: [i for i, h in enumerate(groups) if h == g] for g in dict.fromkeys(groups)}
    for group, picked in rows.items():
        part = [None if c is None else np.asarray(c)[picked] for c in (upstream_samples, delta, stderr, seeds)]
        try:
            found[group] = find_boundary(PairedDelta(part[0], part[1], part[2], part[3]), **options)  # type: ignore[arg-type]
        except LawError as error:
            refused[group] = str(error)
    return found, refused
