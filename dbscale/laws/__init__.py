"""Scaling laws: fit them, choose between them, find the distillation boundary, and say where the budget should go.

numpy and scipy only. Knows tables and curves; nothing of cells, grids or training. Names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbscale.errors import LawError, NotEnoughData
    from dbscale.laws.allocation import Allocation, Prices, TransferGap, allocate, exchange_rates, transfer_gap
    from dbscale.laws.boundary import Power, Verdict, judge, power
    from dbscale.laws.contrast import DeltaCurves, DeltaPoint, Pairs, delta_curves, delta_points, make_pairs
    from dbscale.laws.fit import LawFit, fit_law
    from dbscale.laws.form import Form
    from dbscale.laws.forms import FORMS, find_form
    from dbscale.laws.noise import NOISE_TABLES, Component, NoiseModel, fit_noise, noise_of
    from dbscale.laws.select import Candidate, Selection, select_law
    from dbscale.laws.solver import LOSSES, Loss
    from dbscale.laws.table import error_weights, seed_spread
    from dbscale.laws.uncertainty import Bootstrap, bootstrap, parameter_intervals, profile_interval

__all__ = [
    "FORMS", "LOSSES", "NOISE_TABLES",
    "Allocation", "Bootstrap", "Candidate", "Component", "DeltaCurves", "DeltaPoint", "Form", "LawError", "LawFit", "Loss",
    "NoiseModel", "NotEnoughData", "Pairs", "Power", "Prices", "Selection", "TransferGap", "Verdict",
    "allocate", "bootstrap", "delta_curves", "delta_points", "error_weights", "exchange_rates", "find_form", "fit_law",
    "fit_noise", "judge", "make_pairs", "noise_of", "parameter_intervals", "power", "profile_interval", "seed_spread",
    "select_law", "transfer_gap",
]  # fmt: skip
_ROOMS = {
    "dbscale.errors": "LawError NotEnoughData",
    "dbscale.laws.allocation": "Allocation Prices TransferGap allocate exchange_rates transfer_gap",
    "dbscale.laws.boundary": "Power Verdict judge power",
    "dbscale.laws.contrast": "DeltaCurves DeltaPoint Pairs delta_curves delta_points make_pairs",
    "dbscale.laws.fit": "LawFit fit_law",
    "dbscale.laws.form": "Form",
    "dbscale.laws.forms": "FORMS find_form",
    "dbscale.laws.noise": "NOISE_TABLES Component NoiseModel fit_noise noise_of",
    "dbscale.laws.select": "Candidate Selection select_law",
    "dbscale.laws.solver": "LOSSES Loss",
    "dbscale.laws.table": "error_weights seed_spread",
    "dbscale.laws.uncertainty": "Bootstrap bootstrap parameter_intervals profile_interval",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
