"""The transfer gap per downstream set, and how many downstream samples the upstream data was worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dbscale.errors import LawError
from dbscale.laws.fit import fit_law
from dbscale.laws.form import as_numbers
from dbscale.laws.law_fit import LawFit
from dbscale.laws.profile import profile_interval


@dataclass(frozen=True, eq=False)
class TransferGap:
    """G of E = (A·D_p^-α + G)·D_f^-β + E∞ for one downstream set: the part of the error that no upstream data
    removes.
    """

    downstream: str
    gap: float
    interval: tuple[float, float]
    level: float
    gap_error: float
    """The gap as an error rate at the largest D_f measured: G·D_f^-β."""
    share: float
    """G over A·D_p^-α + G at the largest D_p measured: near 1, more upstream data of this kind no longer helps."""
    fit: LawFit

    def sentence(self) -> str:
        """What the gap means, for the report."""
        low, high = self.interval
        verdict = (
            "more upstream data still pays" if self.share < 0.5 else "more upstream data of this kind hardly helps"
        )
        return (
            f"{self.downstream}: transfer gap G = {self.gap:.3g} ({low:.3g} to {high:.3g}), "
            f"{self.share:.0%} of what remains at the largest upstream set, {self.gap_error:.3f} in error; {verdict}."
        )


def transfer_gaps(
    tables: Mapping[str, tuple[Mapping[str, object], object]],
    *,
    level: float = 0.9,
    loss: str = "least_squares_log",
    seed: int = 0,
) -> tuple[TransferGap, ...]:
    """G with its profile-likelihood interval for each downstream set.

    `tables` maps a set's name to (columns upstream_samples and downstream_samples, error rates). Raises LawError as
    `fit_law`.
    """
    return tuple(
        transfer_gap(name, fit_law("transfer_gap", x, y, loss=loss, seed=seed), level)
        for name, (x, y) in tables.items()
    )


def transfer_gap(downstream: str, fit: LawFit, level: float = 0.9) -> TransferGap:
    """The gap that a fitted transfer_gap law shows."""
    if fit.name != "transfer_gap":
        raise LawError(f"transfer_gap needs a fit of the law transfer_gap, got {fit.name}")
    p = fit.params
    far, most = float(fit.x["upstream_samples"].max()), float(fit.x["downstream_samples"].max())
    left = p["A"] * far ** -p["alpha"] + p["G"]
    interval = (p["G"], p["G"]) if "G" in fit.fixed else profile_interval(fit, "G", level)
    return TransferGap(downstream, p["G"], interval, level, p["G"] * most ** -p["beta"], p["G"] / left, fit)


def effective_data_transferred(scratch: LawFit, downstream_samples: object, error: object) -> np.ndarray:
    """D_T [n]: extra downstream samples that training from scratch would need to reach each error (Hernandez
    2102.01293).

    `scratch` is a falling law of one variable (power or power_plus) in downstream samples; nan where it never gets
    that low, 0 where the upstream data did not help.
    """
    if scratch.name not in ("power", "power_plus"):
        raise LawError(f"effective_data_transferred inverts power or power_plus, got {scratch.name}")
    own, y = as_numbers("downstream_samples", downstream_samples), as_numbers("error", error)
    p = scratch.params
    if p["c"] >= 0:
        raise LawError("the law from scratch does not fall with downstream samples; nothing can be inverted")
    above = y - p.get("E", 0.0)
    with np.errstate(all="ignore"):
        needed = np.where(above > 0, (above / p["b"]) ** (1 / p["c"]), np.nan)
    return np.maximum(needed - own, 0.0)
