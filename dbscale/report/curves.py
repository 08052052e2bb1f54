"""Fitted curves over each axis, with bootstrap bands: all that a plot of a law needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dbscale.report.arm_fits import ArmFit
from dbscale.report.schema import AxisName, Curve
from dbscale.report.table import RunTable, Setting

NUM_POINTS = 33
MARGIN = 1.5
"""Curves reach this factor beyond the measured range on either side."""
MOST_LINES = 3
"""Values of the axes held fixed: smallest, middle, largest."""


def log_grid(values: Sequence[float], *, margin: float = MARGIN, count: int = NUM_POINTS) -> np.ndarray:
    return np.geomspace(min(values) / margin, max(values) * margin, count)


def few(values: Sequence[int]) -> list[int]:
    """Smallest, middle and largest."""
    ordered = sorted(set(values))
    if len(ordered) <= MOST_LINES:
        return ordered
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def curves_of(table: RunTable, fit: ArmFit, *, level: float) -> Iterator[Curve]:
    """E over upstream data, labels and parameters, wherever the axis has at least two values."""
    runs = table.pretrained.where(setting=fit.setting, arm=fit.arm)
    upstream, labels = runs.values("upstream_samples"), runs.values("downstream_samples")
    for student in runs.students:
        for size in labels:
            yield _curve(fit, runs, "upstream_samples", upstream, student, None, size, level)
        if len(labels) > 1:
            for size in few(upstream):
                yield _curve(fit, runs, "downstream_samples", labels, student, size, None, level)
    if len(runs.students) > 1 and None in fit.fits:
        sizes = [runs.params(student) for student in runs.students]
        for size in few(upstream):
            for count in labels:
                yield _curve(fit, runs, "num_params", sizes, None, size, count, level)


def _curve(
    fit: ArmFit, runs: RunTable, axis: AxisName, measured: Sequence[float],
    student: str | None, upstream: int | None, labels: int | None, level: float,
) -> Curve:  # fmt: skip
    x = log_grid(measured)
    fixed = {
        "upstream_samples": upstream,
        "downstream_samples": labels,
        "num_params": runs.params(student) if student else None,
    }
    columns = {name: x if name == axis else np.full(len(x), float(value or 1)) for name, value in fixed.items()}
    y, draws = fit.predict(student or runs.students[0], columns)
    return make_curve(fit.setting, fit.arm, fit.law, axis, student, upstream, labels, x, y, draws, level)


def make_curve(
    setting: Setting, arm: str, law: str, axis: AxisName, student: str | None, upstream: int | None,
    labels: int | None, x: np.ndarray, y: np.ndarray, draws: np.ndarray, level: float,
) -> Curve:  # fmt: skip
    """A curve with the percentile band of its draws; values that are not finite become None."""
    sound = draws[np.isfinite(draws).all(axis=1)]
    low, high = np.quantile(sound if len(sound) else y[None], [0.5 - level / 2, 0.5 + level / 2], axis=0)
    return Curve(
        **setting._asdict(), arm=arm, law=law, axis=axis, student=student, upstream_samples=upstream,
        downstream_samples=labels, x=rounded(x), y=rounded(y), low=rounded(low), high=rounded(high),
    )  # fmt: skip


def rounded(values: np.ndarray) -> Any:
    """Five significant digits: plenty for a plot, and half the file."""
    return tuple(float(f"{value:.5g}") if np.isfinite(value) else None for value in values)
