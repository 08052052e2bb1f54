"""Scaling laws: fit them, choose between them, find the distillation boundary, and say where the budget should go.

numpy and scipy only. Knows tables and curves; nothing of cells, grids or training. Names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbscale.errors import LawError, NotEnoughData
    from dbscale.laws.allocation import (
        Allocation,
        Prices,
        TransferGap,
        allocate,
        exchange_rates,
        transfer_gap,
    )
    from dbscale.laws.boundary import Power, Verdict, judge, power
    from dbscale.laws.contrast import DeltaCurves, DeltaPoint, Pairs, delta_curves, delta_points, make_pairs
    from dbscale.laws.fit import LawFit, fit_law
    from dbscale.laws.form import Form
    from dbscale.laws.forms import FORMS, find_form
    from dbscale.laws.noise import NOISE_TABLES, Component, NoiseModel, fit_noise, noise_of
    from dbscale.laws.select import Candidate, Selection, prediction_interval, select_law
    from dbscale.laws.solver import LOSSES, Loss
    from dbscale.laws.table import error_weights, seed_spread
    from dbscale.laws.uncertainty import Bootstrap, bootstrap, parameter_intervals, profile_interval

_MEMBERS = {
    "allocation": (
        *("Allocation", "Prices", "TransferGap"),
        *("allocate", "exchange_rates", "transfer_gap"),
    ),
    "boundary": ("Power", "Verdict", "judge", "power"),
    "contrast": ("DeltaCurves", "DeltaPoint", "Pairs", "delta_curves", "delta_points", "make_pairs"),
    "noise": ("NOISE_TABLES", "Component", "NoiseModel", "fit_noise", "noise_of"),
    "fit": ("LawFit", "fit_law"),
    "form": ("Form",),
    "forms": ("FORMS", "find_form"),
    "select": ("Candidate", "Selection", "prediction_interval", "select_law"),
    "solver": ("LOSSES", "Loss"),
    "table": ("error_weights", "seed_spread"),
    "uncertainty": ("Bootstrap", "bootstrap", "parameter_intervals", "profile_interval"),
}
_HOME = {name: f"dbscale.laws.{module}" for module, names in _MEMBERS.items() for name in names}
_HOME |= {"LawError": "dbscale.errors", "NotEnoughData": "dbscale.errors"}
__all__ = [
    "FORMS",
    "LOSSES",
    "NOISE_TABLES",
    "Allocation",
    "Bootstrap",
    "Candidate",
    "Component",
    "DeltaCurves",
    "DeltaPoint",
    "Form",
    "LawError",
    "LawFit",
    "Loss",
    "NoiseModel",
    "NotEnoughData",
    "Pairs",
    "Power",
    "Prices",
    "Selection",
    "TransferGap",
    "Verdict",
    "allocate",
    "bootstrap",
    "delta_curves",
    "delta_points",
    "error_weights",
    "exchange_rates",
    "find_form",
    "fit_law",
    "fit_noise",
    "judge",
    "make_pairs",
    "noise_of",
    "parameter_intervals",
    "power",
    "prediction_interval",
    "profile_interval",
    "seed_spread",
    "select_law",
    "transfer_gap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
