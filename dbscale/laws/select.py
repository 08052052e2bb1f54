"""Choose between laws, or average them: by how well they fit, how well they end, and how well they foretold.

`scores` holds the weights' formula and why; laws that cannot be fitted stay in the table, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dbscale.errors import LawError, NotEnoughData
from dbscale.laws.fit import Bounds, Search, fit_in
from dbscale.laws.form import Form
from dbscale.laws.forms import FORMS, find_form
from dbscale.laws.law_fit import LawFit
from dbscale.laws.losses import Loss, make_loss
from dbscale.laws.prediction import Calibration, band, distance_beyond, in_sample_noise, make_calibration
from dbscale.laws.rolling import RollingErrors, rolling_origin
from dbscale.laws.scores import end_error, level_shift, shifted, weights_of

ONE_VARIABLE = ("power", "power_plus", "saturating", "rectified", "m4", "bnsl")
NEGLIGIBLE = 0.02
"""Laws with less than this share of the weight are left out of the average."""


@dataclass(frozen=True)
class Candidate:
    """One law's scores; without a fit, `reason` says why."""

    name: str
    fit: LawFit | None
    weight: float = 0.0
    bic: float = float("nan")
    aicc: float = float("nan")
    in_sample: float = float("nan")
    """Rms residual per degree of freedom."""
    end: float = float("nan")
    """Rms residual over the largest 30 % of the rows."""
    rolling: float = float("nan")
    """Rms held-out error over rolling origins."""
    shift: float = 0.0
    """How far the law was moved to meet the data's end (log y under log losses)."""
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Selection:
    """Candidates, best first, and the weighted average that predicts."""

    candidates: tuple[Candidate, ...]
    calibration: Calibration

    @property
    def best(self) -> LawFit:
        """The fit with the largest weight."""
        fit = self.candidates[0].fit
        assert fit is not None
        return fit

    @property
    def members(self) -> tuple[tuple[LawFit, float], ...]:
        """The laws of the average with their weights."""
        return tuple((c.fit, c.weight) for c in self.candidates if c.fit is not None and c.weight > 0)

    def predict(self, x: Mapping[str, object] | object) -> np.ndarray:
        """Weighted geometric mean of the members' predictions at the data's level (arithmetic under linear losses)."""
        mean = np.tensordot([w for _, w in self.members], self.each(x), axes=1)
        return np.exp(mean) if self.best.loss.is_log else mean

    def each(self, x: Mapping[str, object] | object) -> np.ndarray:
        """Every member's (log) prediction, moved by its shift [members, …]."""
        shifts = [c.shift for c in self.candidates if c.fit is not None and c.weight > 0]
        raw = np.array([fit.predict(x) for fit, _ in self.members])
        return (np.log(raw) if self.best.loss.is_log else raw) - np.reshape(shifts, (-1, *[1] * (raw.ndim - 1)))

    def interval(self, x: Mapping[str, object] | object, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Prediction interval at flat columns x: calibrated on the average's own held-out errors, or the members'
        spread.
        """
        if not 0 < level < 1:
            raise LawError(f"level must lie between 0 and 1, got {level}")
        is_log, y = self.best.loss.is_log, self.predict(x)
        half = self.calibration.half_width(distance_beyond(self.best.x, self.best.form.columns(x)), level)
        return band(y, np.hypot(half, self.spread(x)), is_log=is_log)

    def spread(self, x: Mapping[str, object] | object) -> np.ndarray:
        """Weighted standard deviation of the members' (log) predictions [n]."""
        each = self.each(x)
        shares = np.array([w for _, w in self.members])
        return np.sqrt(np.maximum(shares @ (each - shares @ each) ** 2, 0.0))

    def report(self) -> str:
        """The scores of every law, winners and losers."""
        lines = [f"{'law':18s} weight   in-sample  end        rolling    BIC"]
        for c in self.candidates:
            scores = f"{c.weight:6.3f}   {c.in_sample:.4f}     {c.end:.4f}     {c.rolling:.4f}     {c.bic:.1f}"
            lines.append(f"{c.name:18s} {scores if c.fit else c.reason}")
        shares = ", ".join(f"{float(k):.0%}: {v:.0%}" for k, v in self.calibration.coverage.items())
        return "\n".join(
            [*lines, f"held-out coverage of prediction intervals (nominal: measured): {shares or 'not measurable'}"]
        )

    def to_dict(self) -> dict:
        """JSON-ready scores, and the full fits of the members."""
        return {
            "schema": "dbscale.laws/selection/1",
            "candidates": [
                {
                    "name": c.name,
                    "weight": c.weight,
                    **{k: _finite(getattr(c, k)) for k in ("bic", "aicc", "in_sample", "end", "rolling", "shift")},
                    "reason": c.reason,
                    "fit": c.fit.to_dict() if c.fit else None,
                }
                for c in self.candidates
            ],
            "noise": self.calibration.noise,
            "drift": self.calibration.drift,
            "coverage": dict(self.calibration.coverage),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def select_law(
    x: Mapping[str, object] | object,
    y: object,
    *,
    candidates: Sequence[str | Form] | None = None,
    weights: object = None,
    loss: str | Loss = "least_squares_log",
    bounds: Mapping[str, Bounds] | None = None,
    seed: int = 0,
) -> Selection:
    """Fit every candidate law, score it, and average those that deserve it.

    `candidates` default to the laws that fit the table's columns; `bounds` maps a law's name to its bounds. Raises
    NotEnoughData when the table is too small for every candidate, LawError for bad input.
    """
    forms = [find_form(c) for c in candidates] if candidates else default_candidates(x)
    law_loss, shared, scored, reasons = make_loss(loss), {}, [], []
    for form in forms:
        limits = dict((bounds or {}).get(form.name, {}))
        try:
            fit = fit_in(
                Search.make(form, x, y, weights, law_loss, limits, {}, seed, found=dict(shared) if limits else shared)
            )
        except NotEnoughData as error:
            reasons.append(Candidate(form.name, None, reason=f"not enough data: {error}"))
            continue
        scored.append((fit, rolling_origin(fit)))
    if not scored:
        raise NotEnoughData("; ".join(c.reason for c in reasons))
    return make_selection(scored, reasons)


def default_candidates(x: Mapping[str, object] | object) -> list[Form]:
    """The laws whose variables are among the table's columns; one column means the laws of one variable."""
    if not isinstance(x, Mapping) or len(x) == 1:
        return [FORMS[name] for name in ONE_VARIABLE]
    fitting = []
    for form in FORMS.values():
        names = [v for v in form.variables if any(n in x for n in (v.name, v.symbol, *v.aliases))]
        usable = len(names) == len(form.variables) or (form.restrict is not None and len(names) > 1)
        if usable and len(form.variables) > 1 and len(names) == len(x) and form.name != "effective_data":
            fitting.append(form)
    if not fitting:
        raise LawError(f"no law has the columns {', '.join(map(str, x))}; laws of one variable take one column")
    return fitting


def make_selection(scored: list[tuple[LawFit, RollingErrors]], reasons: list[Candidate]) -> Selection:
    """Weights from the scores; the average's own rolling errors calibrate its intervals."""
    weight = weights_of([*scored])
    weight = np.where(weight < NEGLIGIBLE, 0.0, weight)
    weight /= weight.sum()
    made = [scored_candidate(fit, rolling, float(w)) for (fit, rolling), w in zip(scored, weight, strict=True)]
    noise = float(weight @ np.array([c.in_sample for c in made]))
    calibration = make_calibration(noise, average_errors(scored, weight))
    return Selection((*sorted(made, key=lambda c: -c.weight), *reasons), calibration)


def scored_candidate(fit: LawFit, rolling: RollingErrors, weight: float) -> Candidate:
    """A fitted law with all its scores."""
    bic, aicc = information(fit)
    return Candidate(
        fit.name,
        fit,
        weight=weight,
        bic=bic,
        aicc=aicc,
        in_sample=in_sample_noise(fit),
        end=end_error(fit),
        rolling=rolling.rms(),
        shift=level_shift(fit, fit.residuals),
    )


def average_errors(scored: list[tuple[LawFit, RollingErrors]], weight: np.ndarray) -> RollingErrors:
    """Held-out errors of the weighted, shifted average; where a law is missing, the others share its weight."""
    errors = np.array([shifted(fit, rolling) for fit, rolling in scored])
    shares = np.where(np.isfinite(errors), weight[:, None, None], 0.0)
    total = shares.sum(axis=0)
    with np.errstate(all="ignore"):
        mean = np.where(total > 0, np.sum(shares * np.nan_to_num(errors), axis=0) / total, np.nan)
    return RollingErrors(scored[0][1].distance, mean, np.full_like(mean, np.nan))


def information(fit: LawFit) -> tuple[float, float]:
    """BIC and AICc of normal (log) residuals; exact copies of a row count once."""
    n = len(np.unique(np.column_stack([*fit.x.values(), fit.y]), axis=0))
    k = fit.num_free + 1
    mean_square = max(float(np.average(fit.residuals**2, weights=fit.weights)), 1e-300)
    aic = n * np.log(mean_square) + 2 * k
    return float(n * np.log(mean_square) + k * np.log(n)), float(aic + 2 * k * (k + 1) / max(n - k - 1, 1e-9))
