"""Where the next unit of budget goes: what twice as much of each lever would do, by the chosen law of each arm.

Asked at the largest point measured, so every answer is an extrapolation by one doubling; prices are `laws.allocate`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from dbscale.report.arm_fits import ArmFit
from dbscale.report.schema import AxisName, Estimate, LeverRecord
from dbscale.report.table import RunTable

LEVERS: tuple[AxisName, ...] = ("upstream_samples", "downstream_samples", "num_params")
SMALL_STEP = 1.01
"""Ratio over which slopes are taken."""


def lever_records(runs: RunTable, arms: Mapping[str, ArmFit], *, level: float) -> Iterator[LeverRecord]:
    """One record an arm; `runs` are those of one setting."""
    for arm, fit in arms.items():
        own = runs.where(arm=arm)
        student = own.students[-1]
        point = {name: float(own.values(name)[-1]) for name in LEVERS[:2]} | {"num_params": float(own.params(student))}
        law = fit.of(student).fit.form
        levers: list[AxisName] = [name for name in LEVERS if name in law.variable_names]
        yield LeverRecord(
            **fit.setting._asdict(), arm=arm, law=fit.law, student=student,
            upstream_samples=int(point["upstream_samples"]), downstream_samples=int(point["downstream_samples"]),
            error=_estimate(_errors(fit, student, point), level),
            doubled={name: _estimate(_errors(fit, student, point, name, 2.0), level) for name in levers},
            images_per_label=_images_per_label(fit, student, point, level) if set(LEVERS[:2]) <= set(levers) else None,
        )  # fmt: skip


def _errors(
    fit: ArmFit, student: str, point: Mapping[str, float], lever: str = "", times: float = 1.0
) -> tuple[float, np.ndarray]:
    """Error and its draws [B] at the point, one lever multiplied."""
    columns = {name: np.array([value * (times if name == lever else 1.0)]) for name, value in point.items()}
    best, draws = fit.predict(student, columns)
    return float(best[0]), draws[:, 0]


def _images_per_label(fit: ArmFit, student: str, point: Mapping[str, float], level: float) -> Estimate | None:
    """Slope in labels over slope in upstream images; None where upstream images lower no error."""
    here = _errors(fit, student, point)
    steps = [_errors(fit, student, point, name, SMALL_STEP) for name in LEVERS[:2]]
    fall = [(here[0] - best, here[1] - draws) for best, draws in steps]
    if fall[0][0] <= 0:
        return None
    scale = point["upstream_samples"] / point["downstream_samples"]
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = scale * fall[1][1] / fall[0][1]
    return _estimate((scale * fall[1][0] / fall[0][0], draws), level)


def _estimate(found: tuple[float, np.ndarray], level: float) -> Estimate:
    """A value with the percentiles of its draws; bounds that are not finite are open."""
    value, draws = found
    sound = draws[~np.isnan(draws)]
    ends = np.quantile(sound, [0.5 - level / 2, 0.5 + level / 2], method="nearest") if len(sound) else [np.nan] * 2
    low, high = (float(end) if np.isfinite(end) else None for end in ends)
    return Estimate(value=value, low=low, high=high)
