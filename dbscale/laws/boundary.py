"""The distillation boundary: the D_p* where ΔE = E_plain − E_distilled turns from positive to negative.

Two roads to it: from two fitted laws, and free of any law from paired measurements (`delta_curve`). Both give curves of
ΔE drawn from their uncertainty; this module reads roots off the curves and says what they mean. "No crossing" and
"extrapolated" are answers. The surface over model size and D_f is in `surface`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np

from dbscale.errors import LawError
from dbscale.laws.boundary_words import explain
from dbscale.laws.delta_curve import DeltaCurves, PairedDelta, gaussian_process_curves, isotonic_curves
from dbscale.laws.law_fit import LawFit
from dbscale.laws.resample import Bootstrap

SCHEMA = "dbscale.laws/boundary/1"
CERTAIN_ENOUGH = 0.95
"""A crossing is reported when at least this share of the drawn curves has one."""
SURE_OF_SIGN = 0.975
"""… and when at one D_p below it this share of them is positive, at one above it negative: arms that only become
equal wander through zero too.
"""
GRID = 161


@dataclass(frozen=True)
class Boundary:
    """Where distilling stops paying, with its uncertainty."""

    status: str
    """`crossing` (inside the measured range), `extrapolated` (outside it) or `no_crossing`."""
    root: float | None
    """D_p*, in samples; None without a crossing."""
    interval: tuple[float, float] | None
    """At `level`, over the drawn curves that cross; None without a crossing."""
    level: float
    crossing_probability: float
    """Share of drawn curves that turn from positive to negative somewhere on the grid."""
    inside_probability: float
    """Share of drawn curves that do so inside the measured range."""
    direction: str
    """`positive_to_negative`, `negative_to_positive`, `always_positive`, `always_negative` or `within_noise`."""
    method: str
    """`laws`, `gaussian_process` or `isotonic`."""
    measured_range: tuple[float, float]
    at: dict[str, float]
    """The other variables' values, for boundaries from laws."""
    curve: dict[str, list[float]]
    """upstream_samples, delta (best curve), lower and upper at `level`: for plots."""
    diagnostics: tuple[str, ...]

    def to_dict(self) -> dict:
        return {"schema": SCHEMA, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping) -> Boundary:
        if data.get("schema") != SCHEMA:
            raise LawError(f"not a boundary: schema {data.get('schema')!r}, expected {SCHEMA!r}")
        values = {f.name: data[f.name] for f in fields(cls)}
        for name in ("interval", "measured_range", "diagnostics"):
            values[name] = tuple(values[name]) if values[name] is not None else None
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Boundary:
        return cls.from_dict(json.loads(text))


def find_boundary(
    plain: LawFit | Bootstrap | PairedDelta,
    distilled: LawFit | Bootstrap | None = None,
    *,
    at: Mapping[str, float] | None = None,
    measured_range: tuple[float, float] | None = None,
    level: float = 0.9,
    reach: float = 8.0,
    num_draws: int = 1000,
    method: str = "gaussian_process",
    seed: int = 0,
) -> Boundary:
    """The boundary from two fits, `find_boundary(plain, distilled, at={...})`, or from pairs,
    `find_boundary(PairedDelta(...))`.

    `at` fixes the laws' other variables (num_params, downstream_samples); the variable sought is upstream_samples, or
    x in laws of one variable. Two Bootstraps made with the same seed and clusters stay paired. `reach` says how many
    times beyond the measured range to look; without a law it is at most 4. `method` (pairs only): gaussian_process or
    isotonic. Raises LawError for a missing arm, a missing `at`, or fewer than 3 distinct D_p.
    """
    if isinstance(plain, PairedDelta):
        make = {"gaussian_process": gaussian_process_curves, "isotonic": isotonic_curves}
        if method not in make:
            raise LawError(f"method {method!r}: use {' or '.join(make)}")
        curves = make[method](plain, num_draws=num_draws, grid=_grid(plain.measured_range, min(reach, 4.0)), seed=seed)
        return read_boundary(curves, level=level, method=method, at={}, measured=plain.measured_range)
    if distilled is None:
        raise LawError("find_boundary needs both arms' fits, or one PairedDelta")
    measured = measured_range or shared_range(law_of(plain), law_of(distilled))
    curves = law_curves(plain, distilled, dict(at or {}), _grid(measured, reach), num_draws, seed)
    return read_boundary(curves, level=level, method="laws", at=dict(at or {}), measured=measured)


def law_of(arm: LawFit | Bootstrap) -> LawFit:
    return arm.fit if isinstance(arm, Bootstrap) else arm


def _grid(measured: tuple[float, float], reach: float) -> np.ndarray:
    return np.geomspace(measured[0] / reach, measured[1] * reach, GRID)


def sought_variable(fit: LawFit) -> str:
    """upstream_samples, or the only variable."""
    names = fit.form.variable_names
    if "upstream_samples" in names:
        return "upstream_samples"
    if len(names) == 1:
        return names[0]
    raise LawError(f"{fit.name} has no variable upstream_samples; it has {', '.join(names)}")


def shared_range(plain: LawFit, distilled: LawFit) -> tuple[float, float]:
    """The D_p range that both arms measured."""
    a, b = plain.x[sought_variable(plain)], distilled.x[sought_variable(distilled)]
    return float(max(a.min(), b.min())), float(min(a.max(), b.max()))


def law_curves(
    plain: LawFit | Bootstrap, distilled: LawFit | Bootstrap, at: dict, grid: np.ndarray, num_draws: int, seed: int
) -> DeltaCurves:
    """ΔE curves from two laws and their uncertainty. Bootstraps are used draw by draw; plain fits by normal draws."""
    arms = []
    for number, arm in enumerate((plain, distilled)):
        fit = law_of(arm)
        theta = arm.theta[:num_draws] if isinstance(arm, Bootstrap) else fit.draws(num_draws, seed + 7919 * number)
        arms.append((fit, law_columns(fit, grid, at), theta))
    count = min(len(theta) for _, _, theta in arms)
    best = [fit.predict(x) for fit, x, _ in arms]
    drawn = [fit.predict_draws(x, theta[:count]) for fit, x, theta in arms]
    delta = drawn[0] - drawn[1]
    return DeltaCurves(grid, best[0] - best[1], delta[np.isfinite(delta).all(axis=1)])


def law_columns(fit: LawFit, grid: np.ndarray, at: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Columns of a law along D_p with the other variables held; names the one that is missing."""
    sought = sought_variable(fit)
    missing = [n for n in fit.form.variable_names if n != sought and n not in at]
    if missing:
        raise LawError(f"find_boundary: at={{...}} lacks {', '.join(missing)} for the law {fit.name}")
    return {n: grid if n == sought else np.full(len(grid), float(at[n])) for n in fit.form.variable_names}


def downward_roots(grid: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Where each curve [S, n] last turns from positive to negative, interpolated in log D_p; nan where it never
    does.
    """
    turns = (curves[:, :-1] > 0) & (curves[:, 1:] <= 0)
    last = curves.shape[1] - 2 - np.argmax(turns[:, ::-1], axis=1)
    rows, logs = np.arange(len(curves)), np.log(grid)
    before, after = curves[rows, last], curves[rows, last + 1]
    with np.errstate(all="ignore"):
        roots = np.exp(logs[last] + (logs[last + 1] - logs[last]) * before / (before - after))
    return np.where(turns.any(axis=1), roots, np.nan)


def read_boundary(
    curves: DeltaCurves, *, level: float, method: str, at: dict, measured: tuple[float, float]
) -> Boundary:
    """Roots, probabilities and words from curves of ΔE."""
    low, high = measured
    roots = downward_roots(curves.grid, curves.drawn)
    crossed = np.isfinite(roots)
    inside = crossed & (roots >= low) & (roots <= high)
    probability = float(crossed.mean())
    status, root, interval = "no_crossing", None, None
    likely = float(np.exp(np.median(np.log(roots[crossed])))) if probability >= CERTAIN_ENOUGH else None
    if likely is not None and has_both_signs(curves, likely):
        root = likely
        status = "crossing" if low <= root <= high else "extrapolated"
        ends = np.quantile(roots[crossed], [0.5 - level / 2, 0.5 + level / 2])
        interval = (float(ends[0]), float(ends[1]))
    lower, upper = np.quantile(curves.drawn, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    within = (curves.grid >= low * 0.999) & (curves.grid <= high * 1.001)
    direction = read_direction(curves.best[within], lower[within], upper[within], status)
    return Boundary(
        status=status,
        root=root,
        interval=interval,
        level=level,
        crossing_probability=probability,
        inside_probability=float(inside.mean()),
        direction=direction,
        method=method,
        measured_range=(float(low), float(high)),
        at={k: float(v) for k, v in at.items()},
        curve={
            "upstream_samples": curves.grid.tolist(),
            "delta": curves.best.tolist(),
            "lower": lower.tolist(),
            "upper": upper.tolist(),
        },
        diagnostics=tuple(explain(status, direction, probability, root, measured, curves.best[within])),
    )


def has_both_signs(curves: DeltaCurves, root: float) -> bool:
    """Whether ΔE is surely positive somewhere below the root and surely negative somewhere above it."""
    positive = np.mean(curves.drawn > 0, axis=0)
    below, above = positive[curves.grid <= root], 1 - positive[curves.grid >= root]
    return bool(min(below.max(initial=0.0), above.max(initial=0.0)) >= SURE_OF_SIGN)


def read_direction(best: np.ndarray, lower: np.ndarray, upper: np.ndarray, status: str) -> str:
    """How ΔE behaves over the measured range: a sign counts where its interval excludes 0."""
    positive, negative = np.flatnonzero(lower > 0), np.flatnonzero(upper < 0)
    if status == "crossing" or (positive.size and negative.size and positive[0] < negative[-1]):
        return "positive_to_negative"
    if positive.size and negative.size:
        return "negative_to_positive"
    if positive.size:
        return "always_positive"
    return "always_negative" if negative.size else "within_noise"
