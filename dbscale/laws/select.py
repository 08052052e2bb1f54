"""Choose between laws and average them: THE engine of `dbscale fit --law auto`, `report`, `advise` and the benchmarks.

Every candidate law is fitted, tried on rolling origins (fitted to the smaller part of the table, judged on what lies
just beyond), and averaged. The average gives predictions, curves drawn from everything that is uncertain, and intervals
for new measurements. Fits are `fit`'s, resamples `uncertainty`'s; nothing is known here of studies or arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dbscale.laws.fit import Bounds
from dbscale.laws.form import Form
from dbscale.laws.law_fit import LawFit
from dbscale.laws.losses import Loss
from dbscale.laws.resample import Bootstrap


@dataclass(frozen=True)
class Candidate:
    """One law of a selection."""

    name: str
    fit: LawFit | None
    """None where the law could not be fitted; `reason` says why."""
    weight: float = 0.0
    """Share in the average, 0 for laws outside it; shares sum to 1."""
    in_sample: float = float("nan")
    """Root mean square residual per degree of freedom (of log y under log losses, else in units of y)."""
    held_out: float = float("nan")
    """The same over rolling origins: rows just beyond what the law had seen. nan where the table is too short."""
    coverage: float = float("nan")
    """Share of held-out rows inside this law's 90 % prediction interval, each origin's width learnt from the others."""
    score: float = float("inf")
    """What orders candidates, smaller is better; inf without a fit."""
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Selection:
    """Candidates, best first, and their average. Made by `select_law`.

    `x` of every method is a mapping of columns [n] (extra columns are ignored), or one array [n] for tables of one
    variable.
    """

    candidates: tuple[Candidate, ...]
    columns: tuple[str, ...]
    """Names of the variables that vary in the table; ("x",) where one array was given."""

    @property
    def best(self) -> LawFit:
        """The fit that is named where one law must be: the smallest score."""
        raise NotImplementedError

    @property
    def average(self) -> tuple[tuple[LawFit, float], ...]:
        """The laws of the average with their weights."""
        raise NotImplementedError

    @property
    def bootstrap(self) -> Bootstrap:
        """Refits of `best`: `.interval(level)` maps its parameters to (low, high), or to None where the table does not
        determine them."""
        raise NotImplementedError

    def measured(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of every variable that was fitted."""
        raise NotImplementedError

    def extrapolated(self, x: Mapping[str, object] | object) -> tuple[str, ...]:
        """Variables of which any value in `x` lies outside the measured range."""
        raise NotImplementedError

    def predict(self, x: Mapping[str, object] | object) -> np.ndarray:
        """The average's y [n]: weighted geometric mean of the laws (arithmetic under linear losses)."""
        raise NotImplementedError

    def draws(self, x: Mapping[str, object] | object) -> np.ndarray:
        """Curves [S, n] of y without measurement noise: a law drawn in proportion to its weight, its parameters from a
        resample, and its misfit from rolling origins (grows with the distance from the measured range).

        Row s of two selections with equal cluster labels and seed used the same resample: differences between arms are
        paired row by row. `draws(a) - draws(b)` on a grid is what `judge(law_curves=…)` takes.
        """
        raise NotImplementedError

    def curve_interval(self, x: Mapping[str, object] | object, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Pointwise quantiles [n], [n] of `draws`: where the true curve lies."""
        raise NotImplementedError

    def interval(self, x: Mapping[str, object] | object, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound [n], [n] for a new measurement at `x`."""
        raise NotImplementedError

    @property
    def coverage(self) -> float:
        """Share of held-out rows inside the average's 90 % interval; nan where the table is too short to say."""
        raise NotImplementedError

    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Predicted and measured y of the rows at the largest level of the first column, by the average of laws that
        did NOT see them: for "held-out residual" and figures. nan where no law could be fitted without them."""
        raise NotImplementedError

    def report(self) -> str:
        """Scores of every law as text, and the best law's parameters."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """JSON-ready: scores, weights, reasons, and each fitted law's `LawFit.to_dict`."""
        raise NotImplementedError

    def to_json(self) -> str:
        raise NotImplementedError


def select_law(
    x: Mapping[str, object] | object,
    y: object,
    *,
    laws: Sequence[str | Form] | None = None,
    weights: object = None,
    clusters: object = None,
    within: object = None,
    stderr: object = None,
    loss: str | Loss = "least_squares_log",
    bounds: Mapping[str, Bounds] | None = None,
    ceiling: float | None = None,
    num_resamples: int = 200,
    seed: int = 0,
) -> Selection:
    """Fit every candidate law to y [n] over columns x (each [n]), try it on rolling origins, and average.

    `laws` default to those that the columns allow: laws of one variable where one column varies, else those of
    upstream_samples, num_params and downstream_samples whose variables all vary. `weights` [n] are relative inverse
    variances (`error_weights`). The resamples: `clusters` [n] labels rows that are drawn together (an upstream run of
    either arm), `within` [n] what is drawn again inside (a finetune), `stderr` [n] the standard error of each y from its
    finite test set, in units of y. `bounds` maps a law's name to parameter bounds in the table's units; `ceiling` is
    the largest value that y can take (1 for error rates, 100 for percent), if there is one. Raises NotEnoughData
    when the table is too small for every candidate, LawError for bad input.
    """
    raise NotImplementedError


def prediction_interval(
    fit: LawFit, x: Mapping[str, object] | object, level: float = 0.9
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound [n], [n] for a new measurement at `x` by one law, calibrated on its rolling origins."""
    raise NotImplementedError
