"""Scaling laws: fit them, choose between them, find the distillation boundary, and say where the budget should go.

numpy and scipy only. Knows tables and curves; nothing of cells, grids or training. Names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbscale.errors import LawError, NotEnoughData
    from dbscale.laws.advice import Advice, advise
    from dbscale.laws.allocation import Allocation, allocate
    from dbscale.laws.boundary import Power, Verdict, judge, power
    from dbscale.laws.contrast import DeltaCurves, DeltaPoint, Pairs, delta_curves, delta_points, make_pairs
    from dbscale.laws.cost import Prices
    from dbscale.laws.fit import fit_law
    from dbscale.laws.form import Form
    from dbscale.laws.forms import FORMS, find_form
    from dbscale.laws.law_fit import LawFit
    from dbscale.laws.losses import LOSSES, Loss
    from dbscale.laws.noise import NOISE_TABLES, Component, NoiseModel, fit_noise, noise_of
    from dbscale.laws.profile import profile_interval
    from dbscale.laws.resample import Bootstrap, bootstrap
    from dbscale.laws.select import Candidate, Selection, select_law
    from dbscale.laws.transfer import TransferGap, effective_data_transferred, transfer_gap, transfer_gaps
    from dbscale.laws.weights import error_weights, seed_spread

_MEMBERS = {
    "advice": ("Advice", "advise"),
    "allocation": ("Allocation", "allocate"),
    "boundary": ("Power", "Verdict", "judge", "power"),
    "contrast": ("DeltaCurves", "DeltaPoint", "Pairs", "delta_curves", "delta_points", "make_pairs"),
    "noise": ("NOISE_TABLES", "Component", "NoiseModel", "fit_noise", "noise_of"),
    "cost": ("Prices",),
    "fit": ("fit_law",),
    "form": ("Form",),
    "forms": ("FORMS", "find_form"),
    "law_fit": ("LawFit",),
    "losses": ("LOSSES", "Loss"),
    "profile": ("profile_interval",),
    "resample": ("Bootstrap", "bootstrap"),
    "select": ("Candidate", "Selection", "select_law"),
    "transfer": ("TransferGap", "effective_data_transferred", "transfer_gap", "transfer_gaps"),
    "weights": ("error_weights", "seed_spread"),
}
_HOME = {name: f"dbscale.laws.{module}" for module, names in _MEMBERS.items() for name in names}
_HOME |= {"LawError": "dbscale.errors", "NotEnoughData": "dbscale.errors"}
__all__ = [
    "FORMS",
    "LOSSES",
    "NOISE_TABLES",
    "Advice",
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
    "advise",
    "allocate",
    "bootstrap",
    "delta_curves",
    "delta_points",
    "effective_data_transferred",
    "error_weights",
    "find_form",
    "fit_law",
    "fit_noise",
    "judge",
    "make_pairs",
    "noise_of",
    "power",
    "profile_interval",
    "seed_spread",
    "select_law",
    "transfer_gap",
    "transfer_gaps",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
