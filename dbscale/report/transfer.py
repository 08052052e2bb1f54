"""The transfer gap of every downstream set, and how many labels the upstream data was worth.

G comes from the fits of the transfer_gap law with their bootstrap; the worth of upstream data from the scratch runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dbscale.errors import LawError
from dbscale.laws import Bootstrap, effective_data_transferred, fit_law
from dbscale.laws.law_fit import LawFit
from dbscale.report.arm_fits import ArmFit
from dbscale.report.schema import Estimate, TransferRecord
from dbscale.report.table import RunTable, Setting

BEYOND = 4.0
"""Labels that training from scratch would need are not extrapolated further than this factor beyond those measured."""


def transfer_records(table: RunTable, fits: Sequence[ArmFit], *, level: float) -> Iterator[TransferRecord]:
    """For every student and arm the gap G, and the labels that the largest D_p is worth at the middle D_f."""
    for fit in fits:
        if fit.law == "transfer_gap":
            for student, found in fit.fits.items():
                yield _record(table, fit, str(student), found, level)


def _record(table: RunTable, fit: ArmFit, student: str, found: Bootstrap, level: float) -> TransferRecord:
    columns, params = found.fit.x, found.fit.params
    gap, (low, high) = params["G"], found.interval(level)["G"]
    left = params["A"] * float(columns["upstream_samples"].max()) ** -params["alpha"] + gap
    return TransferRecord(
        **fit.setting._asdict(), arm=fit.arm, student=student,
        gap=Estimate(value=gap, low=finite(low), high=finite(high)),
        gap_error=gap * float(columns["downstream_samples"].max()) ** -params["beta"], share=gap / left,
        worth=_worth(table, fit.setting, fit.arm, student),
    )  # fmt: skip


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _worth(table: RunTable, setting: Setting, arm: str, student: str) -> float | None:
    """Extra labels that training from scratch would need; None if unknown or too far beyond what was measured."""
    scratch = scratch_law(table, setting, student)
    runs = table.pretrained.where(setting=setting, arm=arm, student=student)
    labels = runs.values("downstream_samples")
    if scratch is None or not labels:
        return None
    middle, largest = labels[len(labels) // 2], runs.values("upstream_samples")[-1]
    errors = runs.where(downstream_samples=middle, upstream_samples=largest).column("error_rate")
    if not errors:
        return None
    worth = float(effective_data_transferred(scratch, [middle], [float(np.mean(errors))])[0])
    return worth if worth + middle <= BEYOND * labels[-1] else None


def scratch_law(table: RunTable, setting: Setting, student: str) -> LawFit | None:
    """Error from scratch as a power of D_f; None with fewer than three D_f or where it does not fall."""
    runs = table.scratch_of(setting).where(student=student)
    if len(runs.values("downstream_samples")) < 3:
        return None
    try:
        fit = fit_law("power", runs.column("downstream_samples"), runs.column("error_rate"), loss="least_squares_log")
    except LawError:
        return None
    return fit if fit.params["c"] < 0 else None
