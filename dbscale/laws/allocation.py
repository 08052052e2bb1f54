"""Where the money should go: the split of a budget that the fitted laws say gives the lowest error, and how sure that
is.

For every D_p and model size on a grid, the rest of the budget buys downstream labels; the best point wins. The same
is done for every draw from the fits' uncertainty, which gives the advice its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from dbscale.errors import LawError
from dbscale.laws.cost import Prices
from dbscale.laws.law_fit import LawFit
from dbscale.laws.resample import Bootstrap

LEVERS = ("upstream_samples", "num_params", "downstream_samples")
STEPS = 48


@dataclass(frozen=True)
class Allocation:
    """The advised split for one budget."""

    arm: str
    """plain or distilled."""
    arm_probability: float
    """Share of draws in which this arm is the better one."""
    upstream_samples: float
    num_params: float
    downstream_samples: float
    expected_error: float
    error_interval: tuple[float, float]
    spend: dict[str, float]
    """Money by purpose: upstream_images, upstream_training, teacher, downstream_labels, downstream_training,
    unspent.
    """
    ranges: dict[str, tuple[float, float]]
    """Interval of each lever over the draws: how sure the split is."""
    exchange_rates: dict[str, tuple[float, float, float]]
    """What one more labelled downstream sample is worth in upstream samples, and so on: estimate, lower, upper."""
    other_arm: dict[str, float] | None
    """The other arm's best point under the same budget."""
    extrapolated: tuple[str, ...]
    """Levers whose advised value lies outside the measured range."""
    level: float
    sentence: str

    def to_json(self) -> str:
        return json.dumps({"schema": "dbscale.laws/allocation/1", **asdict(self)}, allow_nan=False)


def allocate(
    fits: Mapping[str, LawFit | Bootstrap],
    prices: Prices,
    budget: float,
    *,
    at: Mapping[str, float] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    level: float = 0.9,
    num_draws: int = 200,
    seed: int = 0,
) -> Allocation:
    """Split `budget` between upstream images, parameters, labels and distillation.

    `fits` maps plain and/or distilled to laws over any of upstream_samples, num_params, downstream_samples; `at`
    gives the levers that no law varies; `limits` the allowed range of each lever (default: measured range, stretched
    4 times). Raises LawError when nothing within the limits is affordable.
    """
    if not fits or not set(fits) <= {"plain", "distilled"}:
        raise LawError(f"allocate: fits must map 'plain' and/or 'distilled' to fits, got {sorted(fits)}")
    if not budget > 0:
        raise LawError(f"allocate: budget must be above 0, got {budget!r}")
    ranges = {name: lever_range(name, fits, at or {}, limits or {}) for name in LEVERS}
    plans = {arm: Plan.make(arm, fit, prices, budget, ranges, num_draws, seed) for arm, fit in fits.items()}
    arm = min(plans, key=lambda a: plans[a].error)
    return _advice(arm, plans, fits, prices, budget, level)


def _law(fit: LawFit | Bootstrap) -> LawFit:
    return fit.fit if isinstance(fit, Bootstrap) else fit


def lever_range(name: str, fits: Mapping, at: Mapping, limits: Mapping) -> tuple[float, float]:
    """Where a lever may lie."""
    if name in limits:
        return float(limits[name][0]), float(limits[name][1])
    if name in at:
        return float(at[name]), float(at[name])
    measured = [_law(f).x[name] for f in fits.values() if name in _law(f).x]
    if not measured:
        raise LawError(f"allocate: no law varies {name}; give it in at={{...}} or limits={{...}}")
    return float(min(m.min() for m in measured)) / 4, float(max(m.max() for m in measured)) * 4


@dataclass(frozen=True)
class Plan:
    """One arm's best point for the best fit, and for every draw."""

    arm: str
    fit: LawFit
    theta: np.ndarray
    point: dict[str, float]
    error: float
    drawn_errors: np.ndarray
    """Each draw's error at its own best point [S]."""
    errors_here: np.ndarray
    """Each draw's error at `point` [S]."""
    drawn_points: dict[str, np.ndarray]

    @classmethod
    def make(
        cls,
        arm: str,
        fit: LawFit | Bootstrap,
        prices: Prices,
        budget: float,
        ranges: Mapping,
        num_draws: int,
        seed: int,
    ) -> Plan:
        """Search the whole grid, then twice more around the best point; the draws search the whole grid."""
        law = _law(fit)
        theta = fit.theta[:num_draws] if isinstance(fit, Bootstrap) else law.draws(num_draws, seed)
        wide = affordable(arm, prices, budget, ranges)
        point = best_point(law, wide)
        for _ in range(2):
            ranges = zoom(ranges, point)
            point = best_point(law, affordable(arm, prices, budget, ranges))
        drawn = np.where(np.isfinite(errors := predict_at(law, wide, theta)), errors, np.inf)
        picks, rows = drawn.argmin(axis=1), np.arange(len(theta))
        here = predict_at(law, {n: np.array([v]) for n, v in point.items()}, np.concatenate([law.theta[None], theta]))[
            :, 0
        ]
        return cls(
            arm=arm,
            fit=law,
            theta=theta,
            point=point,
            error=float(here[0]),
            drawn_errors=drawn[rows, picks],
            errors_here=here[1:],
            drawn_points={n: c[picks] for n, c in wide.items()},
        )


def best_point(law: LawFit, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The point of lowest expected error."""
    errors = predict_at(law, columns, law.theta[None])[0]
    best = int(np.where(np.isfinite(errors), errors, np.inf).argmin())
    return {n: float(c[best]) for n, c in columns.items()}


def affordable(
    arm: str, prices: Prices, budget: float, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, np.ndarray]:
    """A grid over D_p and M with the D_f that the rest of the budget buys; only points inside the limits."""
    d_p, size = (a.ravel() for a in np.meshgrid(*(np.geomspace(*ranges[n], STEPS) for n in LEVERS[:2])))
    left = budget - prices.upstream_step(arm, size) * d_p
    per_sample = np.maximum(prices.downstream_step(size), 1e-300)
    low, high = ranges["downstream_samples"]
    d_f = np.minimum(left / per_sample, high)
    keep = d_f >= low * (1 - 1e-9)
    if not keep.any():
        need = prices.total(arm, ranges["upstream_samples"][0], ranges["num_params"][0], low)
        raise LawError(f"allocate: the smallest point within the limits costs {need:.4g}, the budget is {budget:.4g}")
    return {"upstream_samples": d_p[keep], "num_params": size[keep], "downstream_samples": d_f[keep]}


def zoom(ranges: Mapping[str, tuple[float, float]], point: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """D_p and M ranges shrunk to the grid cells around a point; D_f keeps its limits."""
    out = dict(ranges)
    for name in LEVERS[:2]:
        low, high = ranges[name]
        width = (high / low) ** (2.0 / (STEPS - 1))
        out[name] = (max(low, point[name] / width), min(high, point[name] * width))
    return out


def predict_at(law: LawFit, columns: Mapping[str, np.ndarray], theta: np.ndarray) -> np.ndarray:
    """Errors [S, n]; levers that the law does not have are ignored."""
    return law.predict_draws({n: columns[n] for n in law.form.variable_names}, theta)


def exchange_rates(plan: Plan, level: float) -> dict[str, tuple[float, float, float]]:
    """How many upstream samples one labelled downstream sample, or 1 % more parameters, is worth at the advised
    point.
    """
    names = [n for n in LEVERS if n in plan.fit.form.variable_names]
    worth = {"downstream_samples": 1.0, "num_params": 0.01 * plan.point["num_params"]}
    if "upstream_samples" not in names:
        return {}
    theta = np.concatenate([plan.fit.theta[None], plan.theta])
    slope = {n: _slope(plan, n, theta) / plan.point[n] for n in names}
    out = {}
    for name in names:
        if name in worth:
            with np.errstate(all="ignore"):
                rate = worth[name] * slope[name] / slope["upstream_samples"]
            rate = np.where(np.isfinite(rate), rate, np.nan)
            low, high = np.nanquantile(rate[1:], [0.5 - level / 2, 0.5 + level / 2])
            label = "per_downstream_sample" if name == "downstream_samples" else "per_percent_of_params"
            out[f"upstream_samples_{label}"] = (
                float(np.nan_to_num(rate[0])),
                float(np.nan_to_num(low)),
                float(np.nan_to_num(high)),
            )
    return out


def _slope(plan: Plan, name: str, theta: np.ndarray) -> np.ndarray:
    """∂E/∂log(lever) at the advised point for each draw [S]."""
    ends = [{n: np.array([v * (f if n == name else 1.0)]) for n, v in plan.point.items()} for f in (0.99, 1.01)]
    low, high = (predict_at(plan.fit, e, theta)[:, 0] for e in ends)
    return (high - low) / np.log(1.01 / 0.99)


def _spend(arm: str, point: Mapping[str, float], prices: Prices, budget: float) -> dict[str, float]:
    d_p, size, d_f = (point[n] for n in LEVERS)
    plain = prices.upstream_step("plain", size) * d_p
    out = {
        "upstream_images": prices.upstream_image * d_p,
        "upstream_training": plain - prices.upstream_image * d_p,
        "teacher": prices.upstream_step(arm, size) * d_p - plain,
        "downstream_labels": prices.downstream_label * d_f,
        "downstream_training": prices.downstream_step(size) * d_f - prices.downstream_label * d_f,
    }
    return {k: float(v) for k, v in {**out, "unspent": max(budget - sum(out.values()), 0.0)}.items()}


def _ends(values: np.ndarray, tails: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, tails)
    return float(low), float(high)


def _advice(
    arm: str, plans: Mapping[str, Plan], fits: Mapping, prices: Prices, budget: float, level: float
) -> Allocation:
    plan = plans[arm]
    other = next((p for a, p in plans.items() if a != arm), None)
    tails = [0.5 - level / 2, 0.5 + level / 2]
    count = min(len(p.drawn_errors) for p in plans.values())
    sure = 1.0 if other is None else float(np.mean(plan.drawn_errors[:count] <= other.drawn_errors[:count]))
    low, high = (float(q) for q in np.quantile(plan.errors_here, tails))
    measured = {n: plan.fit.x[n] for n in LEVERS if n in plan.fit.x}
    outside = tuple(n for n, m in measured.items() if not m.min() * 0.999 <= plan.point[n] <= m.max() * 1.001)
    verb = {"plain": "Train without distillation", "distilled": "Distill"}[arm]
    sentence = (
        f"{verb} on {plan.point['upstream_samples']:,.0f} upstream images with {plan.point['num_params']:,.0f} "
        f"parameters and {plan.point['downstream_samples']:,.0f} labelled downstream images: "
        f"expected error {plan.error:.3f} ({low:.3f} to {high:.3f})"
        + (f"; this arm is the better one in {sure:.0%} of the draws." if other else ".")
    )
    return Allocation(
        arm=arm,
        arm_probability=sure,
        **{n: plan.point[n] for n in LEVERS},
        expected_error=plan.error,
        error_interval=(low, high),
        spend=_spend(arm, plan.point, prices, budget),
        ranges={n: _ends(c, tails) for n, c in plan.drawn_points.items()},
        exchange_rates=exchange_rates(plan, level),
        other_arm={**other.point, "expected_error": other.error} if other else None,
        extrapolated=outside,
        level=level,
        sentence=sentence,
    )
