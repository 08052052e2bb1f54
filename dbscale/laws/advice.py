"""Distill or not, for one planned study: the answer in a sentence and a small table, from the two arms' laws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from dbscale.errors import LawError
from dbscale.laws.boundary import find_boundary, law_of
from dbscale.laws.law_fit import LawFit
from dbscale.laws.resample import Bootstrap

SURE = 0.8
"""Below this probability the advice is `undecided`."""


@dataclass(frozen=True)
class Advice:
    """The answer to `dbscale advise --dp … --df … --params …`."""

    decision: str
    """`distill`, `plain` or `undecided`."""
    distill_probability: float
    """Share of draws in which the distilled arm has the lower error at this point."""
    rows: tuple[dict[str, object], ...]
    """Per arm: arm, expected_error, lower, upper (the law's curve at `level`)."""
    boundary_root: float | None
    boundary_interval: tuple[float, float] | None
    boundary_status: str
    extrapolated: tuple[str, ...]
    """Variables of the question that lie outside the measured range."""
    level: float
    sentence: str

    def table(self) -> str:
        """Aligned text: one line per arm."""
        lines = ["arm         expected error   interval"]
        lines += [f"{r['arm']:<12}{r['expected_error']:<17.4f}{r['lower']:.4f} to {r['upper']:.4f}" for r in self.rows]
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps({"schema": "dbscale.laws/advice/1", **asdict(self)}, allow_nan=False)


def advise(
    fits: Mapping[str, LawFit | Bootstrap],
    *,
    upstream_samples: float,
    downstream_samples: float,
    num_params: float,
    level: float = 0.9,
    num_draws: int = 1000,
    seed: int = 0,
) -> Advice:
    """Compare the arms `plain` and `distilled` at one point. Raises LawError when an arm is missing or a value not
    above 0.
    """
    if set(fits) != {"plain", "distilled"}:
        raise LawError(f"advise needs fits for 'plain' and 'distilled', got {sorted(fits)}")
    point = {"upstream_samples": upstream_samples, "num_params": num_params, "downstream_samples": downstream_samples}
    for name, value in point.items():
        if not (np.isfinite(value) and value > 0):
            raise LawError(f"advise: {name} must be above 0, got {value!r}")
    boundary = find_boundary(fits["plain"], fits["distilled"], at=point, level=level, num_draws=num_draws, seed=seed)
    errors = {
        arm: _errors(fits[arm], point, num_draws, seed + 7919 * k) for k, arm in enumerate(("plain", "distilled"))
    }
    count = min(len(e) for e in errors.values()) - 1
    better = float(np.mean(errors["distilled"][1 : count + 1] < errors["plain"][1 : count + 1]))
    decision = "distill" if better >= SURE else "plain" if better <= 1 - SURE else "undecided"
    rows = tuple(_row(arm, e, level) for arm, e in errors.items())
    outside = _outside(fits, point)
    sentence = _sentence(decision, better, rows, boundary, _beyond(fits, outside), point)
    return Advice(decision, better, rows, boundary.root, boundary.interval, boundary.status, outside, level, sentence)


def _errors(arm: LawFit | Bootstrap, point: Mapping[str, float], num_draws: int, seed: int) -> np.ndarray:
    """Error at the point: best fit first, then each draw [1 + S]."""
    fit = law_of(arm)
    theta = arm.theta[:num_draws] if isinstance(arm, Bootstrap) else fit.draws(num_draws, seed)
    x = {n: np.array([point[n]]) for n in fit.form.variable_names}
    return fit.predict_draws(x, np.concatenate([fit.theta[None], theta]))[:, 0]


def _row(arm: str, errors: np.ndarray, level: float) -> dict[str, object]:
    low, high = np.nanquantile(errors[1:], [0.5 - level / 2, 0.5 + level / 2])
    return {"arm": arm, "expected_error": float(errors[0]), "lower": float(low), "upper": float(high)}


def _outside(fits: Mapping, point: Mapping[str, float]) -> tuple[str, ...]:
    measured = law_of(fits["plain"]).x
    return tuple(
        n for n, v in point.items() if n in measured and not measured[n].min() * 0.999 <= v <= measured[n].max() * 1.001
    )


def _beyond(fits: Mapping, outside: tuple[str, ...]) -> str:
    """Which values of the question were never measured, and what was."""
    measured = law_of(fits["plain"]).x
    ranges = [f"{name} ({measured[name].min():,.0f} to {measured[name].max():,.0f})" for name in outside]
    return f" This lies outside what was measured of {', '.join(ranges)}: a guess by the laws." if ranges else ""


def _sentence(decision: str, better: float, rows: tuple, boundary, beyond: str, point: Mapping[str, float]) -> str:
    plain, distilled = (float(r["expected_error"]) for r in rows)
    verdict = {"distill": "Distill", "plain": "Do not distill", "undecided": "Undecided: either arm may win"}[decision]
    text = (
        f"{verdict}: expected error {distilled:.3f} distilled, {plain:.3f} plain "
        f"(distilled better with probability {better:.0%})"
    )
    if boundary.root is not None and boundary.interval is not None:
        side = "below" if point["upstream_samples"] < boundary.root else "above"
        low, high = boundary.interval
        text += (
            f", because {point['upstream_samples']:,.0f} upstream images lie {side} the boundary "
            f"at {boundary.root:,.0f} ({low:,.0f} to {high:,.0f})"
        )
        text += ", itself an extrapolation" if boundary.status == "extrapolated" else ""
    else:
        text += "; no boundary is established"
    return f"{text}.{beyond}"
