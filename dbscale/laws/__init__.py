"""Scaling laws: fit them, choose between them, find the distillation boundary, and say where the budget should go.

numpy and scipy only, scipy on first use. Knows tables and curves; nothing of cells, grids or training.
"""

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
from dbscale.laws.uncertainty import (
    WITH_FLOOR,
    Bootstrap,
    Premise,
    Resampling,
    bootstrap,
    parameter_intervals,
    premise,
    profile_interval,
)

__all__ = [
    "FORMS", "LOSSES", "NOISE_TABLES", "WITH_FLOOR", "Allocation", "Bootstrap", "Candidate", "Component", "DeltaCurves",
    "DeltaPoint", "Form", "LawError", "LawFit", "Loss", "NoiseModel", "NotEnoughData", "Pairs", "Power", "Premise",
    "Prices", "Resampling", "Selection", "TransferGap", "Verdict", "allocate", "bootstrap", "delta_curves",
    "delta_points", "error_weights", "exchange_rates", "find_form", "fit_law", "fit_noise", "judge", "make_pairs",
    "noise_of", "parameter_intervals", "power", "premise", "profile_interval", "seed_spread", "select_law",
    "transfer_gap",
]  # fmt: skip
