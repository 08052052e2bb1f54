"""Choose between laws and average them: THE engine of `dbscale fit --law auto`, `report`, `advise` and the benchmarks.

Every candidate law is fitted, tried on rolling origins (fitted to the smaller part of the table, judged on what lies
just beyond), and averaged. The average gives predictions, curves drawn from everything that is uncertain, and intervals
for new measurements. Fits are `fit`'s, resamples `uncertainty`'s; nothing is known here of studies or arms.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dbscale.errors import LawError
from dbscale.laws.fit import Bounds, Interval, LawFit, Search, finite_or_none, spread_starts
from dbscale.laws.form import Form, as_numbers
from dbscale.laws.forms import FORMS, ONE_VARIABLE, find_form
from dbscale.laws.solver import Loss, minimise
from dbscale.laws.uncertainty import Bootstrap, Resampling, bootstrap, central_quantile, refit

POINTS_PER_PARAM = 1.5
"""The average holds the laws for which the table has that many distinct points per parameter; a closer fit is luck."""
TRUST, FAR, TRIM = 2.0, 1.0, 0.35
"""Near the data weights are 1 / (rms residual)²; from FAR of the measured range (in log x) beyond it on, where residuals
say nothing, all laws weigh alike; between the two both are mixed. Each is a mean without 35 % of the weight at either
end, as laws that shoot off spoil any other. Of all rules tried, it has the least mean log error beside the better of two
plain means on families of learning curves, also on those that were left out (docs/benchmarks/laws.md).
"""
LEVEL_SHARE = 0.05
"""A law of one variable is moved to the level of the data's end: of the largest 5 % of the rows, two rows at least."""
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Rolling origins train on these shares of a variable's levels."""
EXTRA_STARTS = 3
HORIZON = 1.5
"""Held-out rows further out than this (in log x) say little about the next doubling and are not used, unless the table's
levels lie further apart."""
UNKNOWN_DRIFT = 0.05
"""Error per unit of log distance that is assumed along a variable without a single rolling origin."""
MIN_REPEATS = 3
"""Degrees of freedom between repeats that lack of fit is judged by, at least."""
FLOOR = 1e-9
LARGEST_DRIFT = 20.0
"""The most that a drawn curve drifts, in log y: Student's t with few degrees of freedom knows no limit."""


@dataclass(frozen=True)
class Origins:
    """Rolling origins of a table: each holds out the larger levels of one variable."""

    axis: np.ndarray
    """[O] place of that variable."""
    masks: np.ndarray
    """[O, n] rows that are trained on."""
    distance: np.ndarray
    """[O, n] log(x / largest x trained on); 0 where trained on."""
    reach: np.ndarray
    """[O, n] `distance` over the log range that was trained on."""

    @classmethod
    def of(cls, x: Mapping[str, np.ndarray]) -> Origins:
        """Each variable's shares of its levels in turn, two levels at least."""
        found = []
        for axis, column in enumerate(x.values()):
            levels, ranks = np.unique(column, return_inverse=True)
            cuts = {max(int(np.ceil(share * len(levels))), 2) for share in SHARES} - {len(levels)}
            for cut in sorted(cuts) if len(levels) > 2 else ():
                distance = np.maximum(np.log(column / levels[cut - 1]), 0.0)
                found.append((axis, ranks < cut, distance, distance / np.log(levels[cut - 1] / levels[0])))
        rows = len(next(iter(x.values())))
        axis, *others = zip(*found, strict=True) if found else ((), np.empty((0, rows)), *np.empty((2, 0, rows)))
        return cls(np.array(axis, int), np.array(others[0], bool), np.array(others[1]), np.array(others[2]))

    def near(self, errors: np.ndarray) -> np.ndarray:
        """Rows [O, n] of held-out `errors` (nan: none) that count: within HORIZON, else those of the nearest level."""
        held_out = np.where(np.isfinite(errors), self.distance, np.inf)
        nearest = held_out.min(axis=1, keepdims=True, initial=np.inf)
        return np.isfinite(held_out) & (held_out <= np.maximum(HORIZON, nearest * (1 + 1e-9)))

    def rms(self, errors: np.ndarray) -> float:
        """Root mean over origins of each one's mean square; nan without any."""
        squares = np.where(self.near(errors), errors**2, np.nan)
        rows = squares[np.isfinite(squares).any(axis=1)]
        return float(np.sqrt(np.mean(np.nanmean(rows, axis=1)))) if len(rows) else float("nan")

    def errors(self, fit: LawFit) -> np.ndarray:
        """log ŷ − log y (ŷ − y for linear losses) [O, n] of the law fitted to each origin's rows and moved to their end.

        nan where a row was trained on, and for origins with no more distinct points than free parameters.
        """
        points, found = np.stack(list(fit.x.values()), axis=1), np.full(self.masks.shape, np.nan)
        able = [len(np.unique(points[mask], axis=0)) > fit.num_free for mask in self.masks]
        if any(able):
            masks = self.masks[able]
            residual = refit_origins(fit, masks)
            shift = [
                level_shift(fit, r[None], mask * fit.weights[None]) for r, mask in zip(residual, masks, strict=True)
            ]
            found[able] = np.where(masks, np.nan, residual - shift)
        return np.where(np.isfinite(found), found, np.nan)


def refit_origins(fit: LawFit, masks: np.ndarray) -> np.ndarray:
    """Residuals [O, n] of the law fitted to each origin's rows, from the whole table's optimum and a few spread starts."""
    problem = fit.problem
    wide = spread_starts(problem, 16 * len(fit.theta), fit.seed)
    spread = wide[np.argsort(problem.objective(wide, fit.weights[None]), kind="stable")[:EXTRA_STARTS]]
    starts = np.concatenate([fit.theta[None], spread])
    weights = np.repeat(masks * fit.weights, len(starts), axis=0)
    theta, objective = minimise(problem, np.tile(starts, (len(masks), 1)), weights, max_steps=120, tolerance=1e-7)
    best = objective.reshape(len(masks), len(starts)).argmin(axis=1)
    found = theta.reshape(len(masks), len(starts), -1)[np.arange(len(masks)), best]
    return problem.residual(found) * (1.0 if fit.loss.is_log else fit.units["y"])


def level_shift(fit: LawFit, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How far the law lies above the data at their end [S], for residuals and weights [S, n] (0: row not seen).

    A learning curve is extrapolated from its end, so what a law of one variable misses there it will miss beyond. Laws
    of several variables have no single end: 0.
    """
    if len(fit.x) > 1 or not len(residuals):
        return np.zeros(len(residuals))
    (x,) = fit.x.values()
    order = np.sort(x[(weights > 0).any(axis=0)])
    last = order[-min(max(2, int(np.ceil(LEVEL_SHARE * len(order)))), len(order))]
    w = np.where(x >= last, weights, 0.0)
    with np.errstate(all="ignore"):
        return np.nan_to_num(np.sum(w * np.nan_to_num(residuals), axis=1) / np.sum(w, axis=1))


def average_weights(fits: Sequence[LawFit]) -> np.ndarray:
    """Shares of the laws [L] near the data: 1 / (rms residual)^TRUST among those that the table can carry."""
    points = np.stack(list(fits[0].x.values()), axis=1)
    ratio = np.array([len(np.unique(points, axis=0)) / max(fit.num_free, 1) for fit in fits])
    pool = ratio >= min(POINTS_PER_PARAM, ratio.max())
    noise = np.maximum([in_sample_noise(fit) for fit in fits], FLOOR)
    share = np.where(pool, (noise[pool].min() / noise) ** TRUST, 0.0)
    return share / share.sum()


def trimmed_mean(each: np.ndarray, weights: np.ndarray, trim: float = TRIM) -> np.ndarray:
    """Mean [n] over laws of `each` [L, n] by `weights` [L], without `trim` of the weight at the low and at the high end."""
    order = np.argsort(each, axis=0)
    share = weights[order]
    top = np.cumsum(share, axis=0)
    kept = np.clip(np.minimum(top, 1 - trim) - np.maximum(top - share, trim), 0.0, None)
    return (kept * np.take_along_axis(each, order, axis=0)).sum(axis=0) / kept.sum(axis=0)


def blend(each: np.ndarray, weights: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The average [n] of the laws' predictions (or errors) [L, n] and their sd [n], by `weights` [L] near the data and alike
    far from them; `reach` [n] is how far the points lie beyond, as a part of the measured range."""
    far, alike = np.clip(reach / FAR, 0.0, 1.0), np.full(len(weights), 1 / len(weights))
    shares = (1 - far) * weights[:, None] + far * alike[:, None]
    spread = np.sqrt((shares * (each - (shares * each).sum(axis=0)) ** 2).sum(axis=0))
    return (1 - far) * trimmed_mean(each, weights) + far * trimmed_mean(each, alike), spread


def average_errors(origins: Origins, each: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Held-out errors [O, n] of the average of laws with errors `each` [L, O, n]; where a law is missing, the others
    share its weight."""
    found = np.full(origins.masks.shape, np.nan)
    for errors, row, reach in zip(each.swapaxes(0, 1), found, origins.reach, strict=True):
        held = np.isfinite(errors).any(axis=0)
        have = np.isfinite(errors[:, held]).all(axis=1) & (weights > 0)
        if held.any() and have.any():
            row[held] = blend(errors[have][:, held], weights[have] / weights[have].sum(), reach[held])[0]
    return found


@dataclass(frozen=True)
class Calibration:
    """How far a new measurement may lie from the average.

    A law's own error bars assume that it is true and cover far too little outside the measured range. So the width comes
    from how wrong the average was, at each distance, when it was fitted to the smaller part of the same table.
    """

    noise: float
    """Rms residual inside the data, per degree of freedom."""
    drift: np.ndarray
    """Growth of the error per unit of log distance beyond the data, by variable."""
    degrees: np.ndarray
    """Degrees of freedom of each drift: half the number of its origins, which share most of their rows, at least 1; inf
    where the drift is assumed."""
    coverage: float
    """Share of held-out rows inside the 90 % interval whose drift came from the other origins; nan without any."""
    misfit: float = 0.0
    """What the average misses inside the data and no noise explains; 0 where no point was measured twice."""

    @classmethod
    def make(
        cls, noise: float, origins: Origins, errors: np.ndarray, num_axes: int, misfit: float = 0.0
    ) -> Calibration:
        """From the average's held-out errors [O, n]. All rows of one origin err together, so each origin counts once."""
        near = origins.near(errors)
        usable = np.asarray(near.any(axis=1))
        excess = np.where(near, np.maximum(errors**2 - noise**2, 0.0), 0.0).sum(axis=1)
        squares = excess / np.maximum(np.where(near, origins.distance**2, 0.0).sum(axis=1), 1e-300)

        def drift_of(axis: int, without: int = -1) -> tuple[float, float]:
            rows = usable & (origins.axis == axis) & (np.arange(len(usable)) != without)
            size = float(np.sqrt(squares[rows].mean())) if rows.any() else UNKNOWN_DRIFT
            return size, max(rows.sum() / 2, 1.0) if rows.any() else np.inf

        drift, degrees = np.array([drift_of(axis) for axis in range(num_axes)]).T
        inside = []
        for origin in np.flatnonzero(usable).tolist():
            others = [np.array([each]) for each in drift_of(int(origins.axis[origin]), origin)]
            if np.isfinite(others[1]).all():
                distance, error = (a[origin, near[origin]] for a in (origins.distance, errors))
                inside.append(np.abs(error) <= cls(noise, others[0], others[1], np.nan).half_width(distance[None], 0.9))
        return cls(noise, drift, degrees, float(np.mean(np.concatenate(inside))) if inside else np.nan, misfit)

    def half_width(self, distance: np.ndarray, level: float, spread: np.ndarray | float = 0.0) -> np.ndarray:
        """Half the interval [n] at distances [variables, n] beyond the data, where the laws lie `spread` apart (sd)."""
        if not 0 < level < 1:
            raise LawError(f"level must lie between 0 and 1, got {level}")
        growth = np.array([central_quantile(level, each) for each in self.degrees]) * self.drift
        return np.sqrt(central_quantile(level) ** 2 * (self.noise**2 + spread**2) + growth**2 @ distance**2)


def in_sample_noise(fit: LawFit) -> float:
    """Rms residual per degree of freedom, of rows of mean weight."""
    w = fit.weights / fit.weights[fit.weights > 0].mean()
    return float(np.sqrt(np.sum(w * fit.residuals**2) / fit.degrees))


def lack_of_fit(x: Mapping[str, np.ndarray], residuals: np.ndarray, num_free: float) -> float:
    """Spread of the residuals' means per distinct point beyond what the spread within points explains; 0 where too few
    points were repeated to tell. The classical decomposition into lack of fit and pure error."""
    _, place, count = np.unique(np.stack(list(x.values())), axis=1, return_inverse=True, return_counts=True)
    means = np.bincount(place.ravel(), residuals) / count
    within, between = len(residuals) - len(count), len(count) - num_free
    if within < MIN_REPEATS or between < 1:
        return 0.0
    pure = float(np.sum((residuals - means[place.ravel()]) ** 2)) / within
    lack = float(np.sum(count * means**2)) / between
    return float(np.sqrt(max(lack - pure, 0.0) / count.mean()))


def smooth_curves(table: Mapping[str, np.ndarray], ranges: Mapping[str, np.ndarray], num: int, rng) -> np.ndarray:
    """Random smooth functions [S, n] of size 1 over the columns of `table`, in the logarithm of each, bending about as
    often as residuals of a fitted law do: a quarter of the measured range apart."""
    total = np.zeros((num, len(next(iter(table.values())))))
    for name, column in table.items():
        reach = max(np.log(ranges[name].max() / ranges[name].min()) / 4, FLOOR)
        turns, phase = rng.standard_normal((num, 1)) / reach, rng.uniform(0, 2 * np.pi, (num, 1))
        total += np.sqrt(2 / len(table)) * np.cos(turns * np.log(column) + phase)
    return total


@dataclass(frozen=True)
class Candidate:
    """One law of a selection."""

    name: str
    fit: LawFit | None
    """None where the law could not be fitted; `reason` says why."""
    weight: float = 0.0
    """Share in the average near the data, 0 for laws outside it; shares sum to 1."""
    in_sample: float = float("nan")
    """Root mean square residual per degree of freedom (of log y under log losses, else in units of y)."""
    held_out: float = float("nan")
    """The same over rolling origins: rows just beyond what the law had seen. nan where the table is too short."""
    shift: float = 0.0
    """How far the law lies above the data at their end; the average takes it back."""
    reason: str = ""

    @property
    def score(self) -> float:
        """What orders candidates, smaller is better: a law must both describe and predict, so the geometric mean of
        `in_sample` and `held_out` (`in_sample` alone where that is nan); inf without a fit."""
        if self.fit is None:
            return float("inf")
        held_out = self.held_out if np.isfinite(self.held_out) else self.in_sample
        return float(np.sqrt(max(self.in_sample, FLOOR) * max(held_out, FLOOR)))


@dataclass(frozen=True, eq=False)
class Selection:
    """Candidates, best first, and their average. Made by `select_law`.

    `x` of every method is a mapping of columns [n] (extra columns are ignored), or one array [n] for tables of one
    variable.
    """

    candidates: tuple[Candidate, ...]
    columns: tuple[str, ...]
    """The table's names of the variables that vary, in the order of the laws; ("x",) where one array was given."""
    calibration: Calibration
    ceiling: float | None
    """The largest value that y can take, if there is one; nothing that is foretold lies above it."""
    resampling: Resampling
    without_last: Callable[[], Selection]
    """Makes the same selection from the rows below the largest level of the first column."""

    @property
    def best(self) -> LawFit:
        """The fit that is named where one law must be: the smallest score."""
        fit = self.candidates[0].fit
        assert fit is not None
        return fit

    @cached_property
    def members(self) -> tuple[tuple[Candidate, LawFit], ...]:
        """The laws of the average, in alphabetical order, so that equal averages draw alike."""
        used = sorted((c for c in self.candidates if c.weight > 0), key=lambda c: c.name)
        return tuple((c, c.fit) for c in used if c.fit is not None)

    @property
    def weights(self) -> np.ndarray:
        """Shares of `members` near the data [L]."""
        return np.array([c.weight for c, _ in self.members])

    @cached_property
    def bootstrap(self) -> Bootstrap:
        """Refits of `best`: `.interval(level)` maps its parameters to (low, high), or to None where the table does not
        determine them."""
        return bootstrap(self.best, self.resampling)

    def table(self, x: Mapping[str, object] | object) -> dict[str, np.ndarray]:
        """The columns that the laws need, as flat arrays of one length."""
        x = x if isinstance(x, Mapping) else {self.columns[0]: x}
        missing = [name for name in self.columns if name not in x]
        if missing:
            raise LawError(f"columns {', '.join(missing)} are missing; the laws were fitted over {self.columns}")
        columns = np.broadcast_arrays(*(np.atleast_1d(as_numbers(name, x[name])) for name in self.columns))
        return dict(zip(self.columns, columns, strict=True))

    @cached_property
    def fitted(self) -> dict[str, np.ndarray]:
        """The columns that were fitted, by the table's names."""
        return dict(zip(self.columns, self.best.x.values(), strict=True))

    def measured(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of every variable that was fitted."""
        return {name: (float(c.min()), float(c.max())) for name, c in self.fitted.items()}

    def extrapolated(self, x: Mapping[str, object] | object) -> tuple[str, ...]:
        """Variables of which any value in `x` lies outside the measured range."""
        table = self.table(x)
        return tuple(n for n, (low, high) in self.measured().items() if table[n].min() < low or table[n].max() > high)

    def _beyond(self, table: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """log(x / largest x measured) of every variable [variables, n], 0 inside, and their sum as a part of the measured
        log ranges [n]."""
        distance = np.array([np.maximum(np.log(table[name] / c.max()), 0.0) for name, c in self.fitted.items()])
        return distance, (1 / np.array([np.log(c.max() / c.min()) for c in self.fitted.values()])) @ distance

    @property
    def _highest(self) -> float:
        """The ceiling, of log y under log losses; infinite where there is none."""
        return np.inf if self.ceiling is None else np.log(self.ceiling) if self.best.loss.is_log else self.ceiling

    def _each(self, table: Mapping[str, np.ndarray]) -> np.ndarray:
        """Every member's (log) prediction, moved to the data's end and below the ceiling [L, n]."""
        raw = np.array([fit.predict(table) for _, fit in self.members])
        with np.errstate(all="ignore"):
            own = (np.log(raw) if self.best.loss.is_log else raw) - np.array([[c.shift] for c, _ in self.members])
        return np.minimum(own, self._highest)

    def predict(self, x: Mapping[str, object] | object) -> np.ndarray:
        """The average's y [n]: of log y, or of y under linear losses (`blend`)."""
        table = self.table(x)
        mean, _ = blend(self._each(table), self.weights, self._beyond(table)[1])
        return np.exp(mean) if self.best.loss.is_log else mean

    def draws(self, x: Mapping[str, object] | object) -> np.ndarray:
        """Curves [S, n] of y without measurement noise: a law drawn in proportion to its weight, its parameters from a
        resample, and its own misfit: smooth inside the data, growing beyond as rolling origins say.

        Row s of two selections with equal cluster labels and seed used the same resample: differences between arms are
        paired row by row. `draws(a) - draws(b)` on a grid is what `judge(law_curves=…)` takes.
        """
        table, is_log, known = self.table(x), self.best.loss.is_log, self.calibration
        distance, reach = self._beyond(table)
        each = self._each(table)
        y = np.empty((self.resampling.num_resamples, each.shape[1]))
        with np.errstate(all="ignore"):
            for (_, fit), (rows, theta, shift) in zip(self.members, self._drawn, strict=True):
                drawn = fit.predict_draws(table, theta)
                y[rows] = (np.log(drawn) if is_log else drawn) - shift[:, None]
        y += blend(each, self.weights, reach)[0] - self.weights @ each
        rng = np.random.default_rng([self.resampling.seed, zlib.crc32(self.best.y.tobytes())])
        for size, degrees, beyond in zip(known.drift, known.degrees, distance, strict=True):
            t = rng.standard_t(degrees, len(y)) if np.isfinite(degrees) else rng.standard_normal(len(y))
            limit = LARGEST_DRIFT if is_log else LARGEST_DRIFT * float(np.abs(self.best.y).max())
            y += np.clip(t[:, None] * size * beyond, -limit, limit)
        y += known.misfit * smooth_curves(table, self.fitted, len(y), rng)
        y = np.minimum(y, self._highest)
        return np.exp(y) if is_log else y

    @cached_property
    def _drawn(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each member the draws that are its own, their coordinates, and how far each is moved."""
        count, weights = self.resampling.num_resamples, self.resampling.weights(len(self.best.y))
        place = (np.arange(count) + 0.5) * 0.6180339887498949 % 1.0  # spread evenly whatever the shares
        ends = np.cumsum(self.weights)
        owner = np.minimum(np.searchsorted(ends, place), len(ends) - 1)
        found = []
        for k, (_, fit) in enumerate(self.members):
            rows, targets = np.flatnonzero(owner == k), self.resampling.targets(fit)
            own = fit.problem.target if targets is None else targets[rows]
            theta = refit(fit, weights[rows], None if targets is None else own)
            residual = (fit.problem.residual(theta) + fit.problem.target - own) * (
                1.0 if fit.loss.is_log else fit.units["y"]
            )
            found.append((rows, theta, level_shift(fit, residual, weights[rows] * fit.weights)))
        return found

    def curve_interval(self, x: Mapping[str, object] | object, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Pointwise quantiles [n], [n] of `draws`: where the true curve lies."""
        low, high = np.nanquantile(self.draws(x), [0.5 - level / 2, 0.5 + level / 2], axis=0)
        return low, high

    def interval(self, x: Mapping[str, object] | object, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound [n], [n] for a new measurement at `x`: calibrated on the average's own held-out errors,
        widened by how far its laws disagree."""
        table = self.table(x)
        distance, reach = self._beyond(table)
        y, spread = blend(self._each(table), self.weights, reach)
        half = self.calibration.half_width(distance, level, spread)
        low, high = y - half, np.minimum(y + half, self._highest)
        return (np.exp(low), np.exp(high)) if self.best.loss.is_log else (low, high)

    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Predicted and measured y of the rows at the largest level of the first column, by the average of laws that
        did NOT see them, in the table's order. nan predictions where no law could be fitted without them."""
        first = self.fitted[self.columns[0]]
        last = first == first.max()
        try:
            return self.without_last().predict({n: c[last] for n, c in self.fitted.items()}), self.best.y[last]
        except LawError:
            return np.full(int(last.sum()), np.nan), self.best.y[last]

    def report(self, intervals: Mapping[str, Interval] | None = None) -> str:
        """Scores of every law as text, and the best law's parameters."""
        lines = [f"{'law':14s} weight   in-sample  held-out"]
        for c in self.candidates:
            lines.append(f"{c.name:14s} " + (c.reason or f"{c.weight:6.3f}   {c.in_sample:.4f}     {c.held_out:.4f}"))
        return "\n".join([*lines, "", self.best.report(intervals)])

    def to_dict(self) -> dict:
        """JSON-ready: scores, weights, reasons, and each fitted law's `LawFit.to_dict`."""
        numbers, known = ("weight", "in_sample", "held_out", "score", "shift"), self.calibration
        return {
            "schema": "dbscale.laws/selection/3",
            "columns": list(self.columns),
            "candidates": [
                {"name": c.name, **{k: finite_or_none(getattr(c, k)) for k in numbers}, "reason": c.reason,
                 "fit": c.fit.to_dict() if c.fit else None} for c in self.candidates
            ],
            "noise": known.noise, "drift": known.drift.tolist(), "coverage": finite_or_none(known.coverage),
        }  # fmt: skip


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
    variances (`error_weights`); `clusters`, `within` and `stderr` say how to resample (`Resampling`). `bounds` maps a
    law's name to parameter bounds in the table's units; `ceiling` is the largest value that y can take (1 for error
    rates, 100 for percent), if there is one. Raises NotEnoughData when the table is too small for every candidate,
    LawError for bad input.

    >>> import dbscale
    >>> sizes = [1e3, 2e3, 4e3, 8e3, 16e3, 32e3]
    >>> found = dbscale.select_law(sizes, [0.1 + 16 / size**0.5 for size in sizes], laws=["power_plus", "m4"])
    >>> found.best.name, round(float(found.predict([64e3])[0]), 3)
    ('power_plus', 0.163)
    """
    columns = varying_columns(x)
    forms = [find_form(law) for law in laws] if laws else default_laws(columns)
    fits: list[LawFit] = []
    errors: list[tuple[str, LawError]] = []
    shared: dict[str, dict] = {}
    for form in forms:
        limits = (bounds or {}).get(form.name, {})
        # a law that cannot do with fewer columns has to see them all, to say what it lacks
        own = columns if form.restrict or len(form.variables) == 1 else x
        try:
            search = Search.make(form, own, y, weights, loss, limits, {}, ceiling, seed)
            if not limits:  # what a law contains need not be searched for twice
                search.found = shared.setdefault(str(sorted(search.units().items())), {})
            fits.append(search.fit())
        except LawError as error:
            errors.append((form.name, error))
    if not fits:
        raise errors[0][1]
    names = column_names(fits[0].form, columns)
    odd = [fit for fit in fits if column_names(fit.form, columns) != names]
    failures = [Candidate(name, None, reason=str(error)) for name, error in errors]
    failures += [Candidate(f.name, None, reason=f"not over {', '.join(names)} as {fits[0].name} is") for f in odd]
    how = Resampling(num_resamples, clusters, within, stderr, seed).checked(len(fits[0].y))

    def without_last() -> Selection:
        seen = columns[names[0]] < columns[names[0]].max()
        own, w = (None if c is None else np.asarray(c)[seen] for c in (y, weights))
        return select_law({n: columns[n][seen] for n in names}, own, laws=forms, weights=w, loss=loss,
                          bounds=bounds, ceiling=ceiling, seed=seed)  # fmt: skip

    made, known = assess([fit for fit in fits if fit not in odd], ceiling)
    each = (*sorted(made, key=lambda c: c.score), *failures)
    return Selection(each, names, known, ceiling, how, without_last)


def column_names(form: Form, columns: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """The table's names of a law's variables, in the law's order."""
    return tuple(columns) if len(form.variables) == 1 else tuple(str(v.found_in(columns)) for v in form.variables)


def varying_columns(x: Mapping[str, object] | object) -> dict[str, np.ndarray]:
    """The table's columns that vary, by their own names; all of them where none does."""
    columns = {n: as_numbers(n, c) for n, c in (x if isinstance(x, Mapping) else {"x": x}).items()}
    return {n: c for n, c in columns.items() if c.size and np.any(c != c.flat[0])} or columns


def default_laws(columns: Mapping[str, np.ndarray]) -> list[Form]:
    """The laws whose variables are the table's columns; one column means the laws of one variable."""
    if len(columns) == 1:
        return [FORMS[name] for name in ONE_VARIABLE]
    fitting = []
    for form in FORMS.values():
        names = tuple(v.name for v in form.variables if v.found_in(columns))
        if len(names) == len(columns) and form.name != "effective_data":
            try:
                own = find_form(form, names)
            except LawError:  # a law that needs a variable that does not vary here
                continue
            fitting += [own] if own.variable_names == names else []
    if not fitting:
        raise LawError(f"no law has the columns {', '.join(columns)}; laws of one variable take one column")
    return fitting


def assess(fits: Sequence[LawFit], ceiling: float | None) -> tuple[list[Candidate], Calibration]:
    """Scores and weights of the fits; the average's own held-out errors calibrate its intervals."""
    origins, weights, y = Origins.of(fits[0].x), average_weights(fits), fits[0].y
    highest = np.inf if ceiling is None else ceiling
    room = np.log(highest / y) if fits[0].loss.is_log else highest - y  # a prediction cannot miss by more above
    errors = np.minimum(np.array([origins.errors(fit) for fit in fits]), room)
    made = [
        Candidate(fit.name, fit, float(weight), in_sample_noise(fit), origins.rms(each),
                  float(level_shift(fit, fit.residuals[None], fit.weights[None])[0]))
        for fit, weight, each in zip(fits, weights, errors, strict=True)
    ]  # fmt: skip
    residuals = weights @ np.array([fit.residuals - each.shift for fit, each in zip(fits, made, strict=True)])
    misfit = lack_of_fit(fits[0].x, residuals, float(weights @ [fit.num_free for fit in fits]))
    noise = float(weights @ [each.in_sample for each in made])
    return made, Calibration.make(noise, origins, average_errors(origins, errors, weights), len(fits[0].x), misfit)
