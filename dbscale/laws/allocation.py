"""What the laws say about money: prices, the best split of a budget, exchange rates, and how much is left to gain.

For every D_p and model size on a grid, the rest of the budget buys downstream labels; the best point wins. The same is
done for every draw from the laws' uncertainty, which gives the split its own. Facts only: sentences are the report's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from dbscale.errors import LawError, nearest
from dbscale.laws.fit import LawFit
from dbscale.laws.select import Selection
from dbscale.laws.uncertainty import Triple, profile_interval

LEVERS = ("upstream_samples", "num_params", "downstream_samples")
TEACHER_CASES = ("free", "inference", "training", "training_and_inference")
FORWARD_FLOPS, TRAIN_FLOPS = 2.0, 6.0  # per parameter and token: forward; forward and backward
STEPS = 48


@dataclass(frozen=True)
class Prices:
    """Money per unit, and how long training is. Any currency, as long as the budget has the same."""

    upstream_image: float = 0.0
    """Per upstream sample (collecting it, storing it)."""
    downstream_label: float = 0.0
    """Per labelled downstream sample."""
    train_flop: float = 0.0
    """Per floating-point operation, training or inference alike."""
    tokens_per_image: float = 197.0
    """Positions each parameter is applied at: 197 for DeiT at 224 px and patch 16."""
    upstream_epochs: float = 1.0
    downstream_epochs: float = 1.0
    teacher_params: float = 0.0
    teacher_case: str = "training_and_inference"
    """What of the teacher this study pays, the four cases of 2502.08606: free, inference, training, both."""

    def __post_init__(self) -> None:
        if self.teacher_case not in TEACHER_CASES:
            raise LawError(f"teacher_case {self.teacher_case!r}; {nearest(self.teacher_case, TEACHER_CASES)}")
        for name, value in asdict(self).items():
            if name != "teacher_case" and not value >= 0:
                raise LawError(f"Prices.{name} must not be negative, got {value!r}")

    def upstream_step(self, arm: str, num_params: np.ndarray | float) -> np.ndarray | float:
        """Money per upstream sample: the image, the student's training on it, and the teacher's share."""
        compute = TRAIN_FLOPS * num_params
        if arm == "distilled" and self.teacher_case in ("inference", "training_and_inference"):
            compute = compute + FORWARD_FLOPS * self.teacher_params
        if arm == "distilled" and self.teacher_case in ("training", "training_and_inference"):
            compute = compute + TRAIN_FLOPS * self.teacher_params
        return self.upstream_image + self.train_flop * self.tokens_per_image * self.upstream_epochs * compute

    def downstream_step(self, num_params: np.ndarray | float) -> np.ndarray | float:
        """Money per downstream sample: its label and the finetuning on it."""
        flops = self.tokens_per_image * self.downstream_epochs * TRAIN_FLOPS * num_params
        return self.downstream_label + self.train_flop * flops

    def spend(self, arm: str, point: Mapping[str, float]) -> dict[str, float]:
        """Money by purpose for one point of the three levers."""
        d_p, size, d_f = (point[name] for name in LEVERS)
        plain = float(self.upstream_step("plain", size)) * d_p
        return {
            "upstream_images": self.upstream_image * d_p,
            "upstream_training": plain - self.upstream_image * d_p,
            "teacher": float(self.upstream_step(arm, size)) * d_p - plain,
            "downstream_labels": self.downstream_label * d_f,
            "downstream_training": (float(self.downstream_step(size)) - self.downstream_label) * d_f,
        }


@dataclass(frozen=True)
class Allocation:
    """The advised split for one budget."""

    arm: str
    """plain or distilled."""
    arm_probability: float
    """Share of draws in which this arm is the better one."""
    point: dict[str, float]
    """The three levers."""
    expected_error: float
    error_interval: tuple[float, float]
    """Interval of the true curve at `point`."""
    spend: dict[str, float]
    """Money by purpose, and what is unspent."""
    ranges: dict[str, tuple[float, float]]
    """Interval of each lever's best value over the draws: how sure the split is."""
    exchange_rates: dict[str, Triple]
    """Value, lower and upper of what one more labelled downstream sample, or 1 % more parameters, is worth in upstream
    samples; only levers that the laws have."""
    extrapolated: tuple[str, ...]
    """Levers whose advised value lies outside the measured range."""
    other_error: float | None
    """The other arm's error at its own best point under the same budget."""
    level: float


class ArmPlan(NamedTuple):
    """One arm's best point for the average, and for every draw."""

    laws: Selection
    point: dict[str, float]
    error: float
    drawn_errors: np.ndarray
    """Each draw's error at its own best point [S]."""
    drawn_points: dict[str, np.ndarray]


def allocate(
    arms: Mapping[str, Selection],
    prices: Prices,
    budget: float,
    *,
    at: Mapping[str, float] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    level: float = 0.9,
) -> Allocation:
    """Split `budget` between upstream images, parameters, labels and distillation.

    `arms` maps plain and/or distilled to laws over any of the levers; `at` gives the levers that no law varies;
    `limits` the allowed range of each lever (default: what was measured). Raises LawError when nothing
    within the limits is affordable.
    """
    if not arms or not set(arms) <= {"plain", "distilled"}:
        raise LawError(f"allocate: arms must be 'plain' and/or 'distilled', got {sorted(arms)}")
    if not budget > 0:
        raise LawError(f"allocate: budget must be above 0, got {budget!r}")
    ranges = {name: lever_range(name, arms, at or {}, limits or {}) for name in LEVERS}
    plans = {arm: plan_arm(arm, laws, prices, budget, ranges) for arm, laws in arms.items()}
    arm = min(plans, key=lambda a: plans[a].error)
    plan, others = plans[arm], [p for a, p in plans.items() if a != arm]
    count = min(len(p.drawn_errors) for p in plans.values())
    better = [plan.drawn_errors[:count] <= other.drawn_errors[:count] for other in others]
    low, high = plan.laws.curve_interval(plan.point, level)
    spend = prices.spend(arm, plan.point)
    return Allocation(
        arm=arm, arm_probability=float(np.mean(better)) if better else 1.0, point=plan.point,
        expected_error=plan.error, error_interval=(float(low[0]), float(high[0])),
        spend={**spend, "unspent": max(budget - sum(spend.values()), 0.0)},
        ranges={n: _ends(c, level) for n, c in plan.drawn_points.items()},
        exchange_rates=exchange_rates(plan.laws, plan.point, level),
        extrapolated=plan.laws.extrapolated(plan.point),
        other_error=others[0].error if others else None, level=level,
    )  # fmt: skip


def lever_range(
    name: str, arms: Mapping[str, Selection], at: Mapping[str, float], limits: Mapping[str, tuple[float, float]]
) -> tuple[float, float]:
    """Where a lever may lie."""
    if name in limits:
        return float(limits[name][0]), float(limits[name][1])
    if name in at:
        return float(at[name]), float(at[name])
    measured = [laws.measured()[name] for laws in arms.values() if name in laws.columns]
    if not measured:
        raise LawError(f"allocate: no law varies {name}; give it in at={{...}} or limits={{...}}")
    return min(low for low, _ in measured), max(high for _, high in measured)


def plan_arm(arm: str, laws: Selection, prices: Prices, budget: float, ranges: Mapping) -> ArmPlan:
    """Search the whole grid, then twice more around the best point; the draws search the whole grid."""
    wide = affordable(arm, prices, budget, ranges)
    point, near = best_point(laws, wide), ranges
    for _ in range(2):
        near = zoom(near, point)
        point = best_point(laws, affordable(arm, prices, budget, near))
    drawn = laws.draws(wide)
    picks = np.where(np.isfinite(drawn), drawn, np.inf).argmin(axis=1)
    errors = drawn[np.arange(len(drawn)), picks]
    return ArmPlan(laws, point, float(laws.predict(point)[0]), errors, {n: c[picks] for n, c in wide.items()})


def best_point(laws: Selection, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The point of lowest expected error."""
    errors = laws.predict(columns)
    best = int(np.where(np.isfinite(errors), errors, np.inf).argmin())
    return {n: float(c[best]) for n, c in columns.items()}


def affordable(
    arm: str, prices: Prices, budget: float, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, np.ndarray]:
    """A grid over D_p and M with the D_f that the rest of the budget buys; only points inside the limits."""
    d_p, size = (a.ravel() for a in np.meshgrid(*(np.geomspace(*ranges[n], STEPS) for n in LEVERS[:2])))
    left = budget - prices.upstream_step(arm, size) * d_p
    low, high = ranges["downstream_samples"]
    d_f = np.minimum(left / np.maximum(prices.downstream_step(size), 1e-300), high)
    keep = d_f >= low * (1 - 1e-9)
    if not keep.any():
        need = sum(prices.spend(arm, {n: ranges[n][0] for n in LEVERS}).values())
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


def exchange_rates(laws: Selection, point: Mapping[str, float], level: float = 0.9) -> dict[str, Triple]:
    """How many upstream samples one labelled downstream sample, or 1 % more parameters, is worth at a point: the ratio
    of slopes (∂E/∂D_f)/(∂E/∂D_p), and ·0.01·M of (∂E/∂M)/(∂E/∂D_p), with its interval over the draws."""
    if "upstream_samples" not in laws.columns:
        return {}
    worth = {"downstream_samples": 1.0, "num_params": 0.01 * point.get("num_params", np.nan)}
    labels = {"downstream_samples": "per_downstream_sample", "num_params": "per_percent_of_params"}
    slopes = {name: _slopes(laws, point, name) for name in laws.columns}
    rates = {}
    for name in (n for n in worth if n in laws.columns):
        with np.errstate(all="ignore"):
            rate = worth[name] * slopes[name] / slopes["upstream_samples"]
        if np.isfinite(rate[0]) and np.isfinite(rate[1:]).any():
            rates[f"upstream_samples_{labels[name]}"] = (float(rate[0]), *_ends(rate[1:], level))
    return rates


def _slopes(laws: Selection, point: Mapping[str, float], name: str) -> np.ndarray:
    """∂E/∂lever at the point, but for one factor that all levers share, for the average and then for each draw [1 + S]."""
    factors = np.array([0.99, 1.01])
    ends = {n: v * (factors if n == name else np.ones(2)) for n, v in point.items()}
    errors = np.concatenate([laws.predict(ends)[None], laws.draws(ends)])
    return (errors[:, 1] - errors[:, 0]) / point[name]


def _ends(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.nanquantile(values, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class TransferGap:
    """G of E = (A·D_p^-α + G)·D_f^-β + E∞: the part of the error that no upstream data removes."""

    gap: float
    interval: tuple[float, float]
    """By profile likelihood, which holds where G lies at its bound of 0."""
    level: float
    gap_error: float
    """The gap as an error rate at the largest D_f measured: G·D_f^-β."""
    share: float
    """G over A·D_p^-α + G at the largest D_p measured: near 1, more upstream data of this kind no longer helps."""


def transfer_gap(fit: LawFit, level: float = 0.9) -> TransferGap:
    """The gap that a fitted transfer_gap law of one model size shows. Raises LawError for other laws."""
    if fit.name != "transfer_gap" or "delta" in fit.params:
        raise LawError(f"transfer_gap needs a fit of the law transfer_gap at one model size, got {fit.form.equation}")
    p = fit.params
    far, most = float(fit.x["upstream_samples"].max()), float(fit.x["downstream_samples"].max())
    left = p["A"] * far ** -p["alpha"] + p["G"]
    interval = (p["G"], p["G"]) if "G" in fit.fixed else profile_interval(fit, "G", level)
    return TransferGap(p["G"], interval, level, p["G"] * most ** -p["beta"], p["G"] / left)
