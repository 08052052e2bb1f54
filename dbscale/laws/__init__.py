"""Scaling laws: fit them, choose between them, find the distillation boundary, and say where the budget should go.

numpy and scipy only. Knows tables and curves; nothing of cells, grids or training. Names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbscale.laws.advice import Advice, advise
    from dbscale.laws.allocation import Allocation, allocate
    from dbscale.laws.boundary import Boundary, find_boundary
    from dbscale.laws.resample import Bootstrap, bootstrap
    from dbscale.laws.cost import Prices
    from dbscale.laws.delta_curve import PairedDelta
    from dbscale.laws.errors import LawError, NotEnoughData
    from dbscale.laws.fit import fit_law
    from dbscale.laws.form import Form
    from dbscale.laws.forms import FORMS, find_form
    from dbscale.laws.law_fit import LawFit
    from dbscale.laws.losses import LOSSES, Loss

_HOME = {
    "FORMS": "forms", "find_form": "forms", "Form": "form", "fit_law": "fit", "LawFit": "law_fit", "LOSSES": "losses",
    "Loss": "losses", "LawError": "errors", "NotEnoughData": "errors", "bootstrap": "resample", "Bootstrap": "resample",
    "find_boundary": "boundary", "Boundary": "boundary", "PairedDelta": "delta_curve", "Prices": "cost",
    "allocate": "allocation", "Allocation": "allocation", "advise": "advice", "Advice": "advice", "NotEnoughData": "errors",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
