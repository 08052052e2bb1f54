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
from dbscale.laws.fit import Bounds, LawFit, Search, finite_or_none, spread_starts
from dbscale.laws.form import Form, as_numbers
from dbscale.laws.forms import FORMS, ONE_VARIABLE, find_form
from dbscale.laws.solver import Loss, minimise
from dbscale.laws.uncertainty import Bootstrap, Resampling, normal_quantile, refit

AVERAGED = ("saturating", "rectified", "m4", "bnsl")
"""Laws of one variable that enter the average; plain power laws do not, as they cannot bend."""
POINTS_PER_PARAM = 2
"""… for which the table has that many distinct points per parameter."""
TRUST, TRUST_OF_GRIDS = 0.5, 2.0
"""Weights go with this power of 1 / (rms residual), for laws of one variable and of several: 0 would trust all alike. One
curve says little about what lies beyond it; a grid tells sums from products. These choices are held against learning
curves of families that they were not made on (docs/benchmarks/laws.md)."""
LEVEL_SHARE = 0.05
"""A law of one variable is moved to the level of the data's end: of the largest 5 % of the rows, two rows at least."""
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Rolling origins train on these shares of a variable's levels."""
EXTRA_STARTS = 3
HORIZON = 1.5
"""Held-out rows further out than this (in log x) say little about the next doubling and are not used, unless the table's
levels lie further apart."""
UNKNOWN_DRIFT = 0.05
"""Error per unit of log distance that is assumed when the table is too short for a single rolling origin."""
MIN_REPEATS = 3
"""Degrees of freedom between repeats that lack of fit is judged by, at least."""
FLOOR = 1e-9


@dataclass(frozen=True)
class RollingErrors:
    """What a law foretold [O, n] per origin and row, as log ŷ − log y (ŷ − y for linear losses)."""

    distance: np.ndarray
    """How far each row lies beyond the origin's training range: Σ over variables of log(x / largest x trained on)."""
    error: np.ndarray
    """nan where the row was trained on or the law could not be fitted."""

    @property
    def near(self) -> np.ndarray:
        """Held-out rows that count: those within HORIZON, and where levels lie further apart the nearest one."""
        held_out = np.where(np.isfinite(self.error), self.distance, np.inf)
        nearest = held_out.min(axis=1, keepdims=True, initial=np.inf)
        return np.isfinite(held_out) & (held_out <= np.maximum(HORIZON, nearest * (1 + 1e-9)))

    @property
    def rms(self) -> float:
        """Root mean over origins of each one's mean square; nan without any."""
        squares = np.where(self.near, self.error**2, np.nan)
        rows = squares[np.isfinite(squares).any(axis=1)]
        return float(np.sqrt(np.mean(np.nanmean(rows, axis=1)))) if len(rows) else float("nan")


def rolling_origins(fit: LawFit) -> RollingErrors:
    """Held-out errors of a law. Origins with no more distinct points than free parameters are left out (nan)."""
    points, masks = np.stack(list(fit.x.values()), axis=1), training_masks(fit.x)
    residual = np.full(masks.shape, np.nan)
    able = np.array([len(np.unique(points[m], axis=0)) > fit.num_free for m in masks], dtype=bool)
    if able.any():
        residual[able] = refit_origins(fit, masks[able])
        residual -= np.array(
            [level_shift(fit, r[None], m * fit.weights[None]) for r, m in zip(residual, masks, strict=True)]
        )
    residual = np.where(np.isfinite(residual) & ~masks, residual, np.nan)
    distance = np.array([beyond(fit.x, m) for m in masks]).reshape(masks.shape)
    return RollingErrors(distance, residual)


def training_masks(x: Mapping[str, np.ndarray]) -> np.ndarray:
    """Rows that each origin trains on [O, n]: all but the largest levels of one variable at a time; two levels at least."""
    masks = []
    for column in x.values():
        levels, ranks = np.unique(column, return_inverse=True)
        cuts = sorted(
            {max(int(np.ceil(share * len(levels))), 2) for share in SHARES if len(levels) > 2} - {len(levels)}
        )
        masks += [ranks < cut for cut in cuts]
    return np.array(masks, dtype=bool).reshape(len(masks), len(next(iter(x.values()))))


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


def beyond(x: Mapping[str, np.ndarray], trained: np.ndarray) -> np.ndarray:
    """Distance [n] of every row beyond the largest values of the trained rows."""
    logs = [np.log(c) for c in x.values()]
    return sum((np.maximum(log - log[trained].max(), 0.0) for log in logs), np.zeros(len(trained)))


def level_shift(fit: LawFit, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How far the law lies above the data at their end [S], for residuals and weights [S, n] (0: row not seen).

    A learning curve is extrapolated from its end, so what a law of one variable misses there it will miss beyond. Laws
    of several variables have no single end: 0.
    """
    if len(fit.x) > 1:
        return np.zeros(len(residuals))
    (x,) = fit.x.values()
    order = np.sort(x[(weights > 0).any(axis=0)])
    last = order[-min(max(2, int(np.ceil(LEVEL_SHARE * len(order)))), len(order))]
    w = np.where(x >= last, weights, 0.0)
    with np.errstate(all="ignore"):
        return np.nan_to_num(np.sum(w * np.nan_to_num(residuals), axis=1) / np.sum(w, axis=1))


@dataclass(frozen=True)
class Calibration:
    """Error of a new measurement against the distance beyond the data: √(noise² + (drift·distance)²) times a quantile of
    `scores`.

    A law's own error bars assume that it is true and cover far too little outside the measured range. So the width comes
    from how wrong the law was, at each distance, when it was fitted to the smaller part of the same table.
    """

    noise: float
    """Rms residual inside the data, per degree of freedom."""
    drift: float
    """Growth of the error per unit of log distance."""
    misfit: float
    """What the law misses inside the data and no noise explains; 0 where no point was measured twice."""
    scores: np.ndarray
    """|held-out error| over its predicted size, sorted; empty when no origin could be fitted."""
    coverage: float
    """Share of held-out rows inside the 90 % interval whose quantile came from the other origins; nan without any."""

    @classmethod
    def make(cls, noise: float, rolling: RollingErrors, misfit: float = 0.0) -> Calibration:
        use = rolling.near
        if not use.any():
            return cls(noise, UNKNOWN_DRIFT, misfit, np.array([]), float("nan"))
        error, distance = np.abs(rolling.error[use]), rolling.distance[use]
        excess = np.sqrt(np.maximum(error**2 - noise**2, 0.0))
        drift = float(np.median(excess[distance > 0] / distance[distance > 0])) if np.any(distance > 0) else 0.0
        drift = max(drift, noise)  # a flat record over a few origins is luck, not knowledge
        scores, origin = error / np.maximum(np.hypot(noise, drift * distance), FLOOR), np.nonzero(use)[0]
        inside = [
            scores[origin == k] <= score_quantile(scores[origin != k], 0.9)
            for k in np.unique(origin)
            if np.any(origin != k)
        ]
        coverage = float(np.mean(np.concatenate(inside))) if inside else float("nan")
        return cls(noise, drift, misfit, np.sort(scores), coverage)

    def half_width(self, distance: np.ndarray, level: float) -> np.ndarray:
        """Half the interval [n] at these distances; never less than normal errors would need."""
        if not 0 < level < 1:
            raise LawError(f"level must lie between 0 and 1, got {level}")
        normal = normal_quantile(level)
        quantile = max(score_quantile(self.scores, level), normal) if len(self.scores) else normal
        return quantile * np.hypot(self.noise, self.drift * distance)


def score_quantile(scores: np.ndarray, level: float) -> float:
    """A quantile halfway between `level` and 1: errors of one origin move together, so they count for less than they
    are."""
    return float(np.quantile(scores, (1 + level) / 2))


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


def distance_beyond(table: Mapping[str, np.ndarray], x: Mapping[str, np.ndarray]) -> np.ndarray:
    """How far the points `x` [n] lie beyond the table's largest values; 0 inside."""
    logs = [np.maximum(np.log(np.asarray(x[name]) / table[name].max()), 0.0) for name in table]
    return sum(logs, np.zeros(()))


def band(y: np.ndarray, half: np.ndarray, *, is_log: bool) -> tuple[np.ndarray, np.ndarray]:
    """y and its half-width to bounds; a ratio under log losses."""
    return (y * np.exp(-half), y * np.exp(half)) if is_log else (y - half, y + half)


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
    """What orders candidates, smaller is better: a law must both describe and predict, so the geometric mean of
    `in_sample` and `held_out`; inf without a fit."""
    shift: float = 0.0
    """How far the law lies above the data at their end; the average takes it back."""
    reason: str = ""


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
    resampling: Resampling
    without_last: Callable[[], Selection]
    """Makes the same selection from the rows below the largest level of the first column."""

    @property
    def best(self) -> LawFit:
        """The fit that is named where one law must be: the smallest score."""
        fit = self.candidates[0].fit
        assert fit is not None
        return fit

    @property
    def members(self) -> tuple[Candidate, ...]:
        """The candidates of the average, in alphabetical order, so that equal averages draw alike."""
        return tuple(sorted((c for c in self.candidates if c.weight > 0), key=lambda c: c.name))

    @property
    def average(self) -> tuple[tuple[LawFit, float], ...]:
        """The laws of the average with their weights."""
        return tuple((c.fit, c.weight) for c in self.members if c.fit is not None)

    @cached_property
    def bootstrap(self) -> Bootstrap:
        """Refits of `best`: `.interval(level)` maps its parameters to (low, high), or to None where the table does not
        determine them."""
        return self._refits(self.best)

    def _refits(self, fit: LawFit) -> Bootstrap:
        weights, targets = self._resampled_weights, self.resampling.targets(fit)
        return Bootstrap(fit, refit(fit, weights, targets), self.resampling.num_clusters(len(fit.y)))

    @cached_property
    def _resampled_weights(self) -> np.ndarray:
        return self.resampling.weights(len(self.best.y))

    def table(self, x: Mapping[str, object] | object) -> dict[str, np.ndarray]:
        """The columns that the laws need, as flat arrays of one length."""
        if not isinstance(x, Mapping):
            x = {self.columns[0]: x}
        missing = [name for name in self.columns if name not in x]
        if missing:
            raise LawError(f"columns {', '.join(missing)} are missing; the laws were fitted over {self.columns}")
        return {n: np.atleast_1d(c) for n, c in zip(self.columns, np.broadcast_arrays(
            *(as_numbers(name, x[name]) for name in self.columns)), strict=True)}  # fmt: skip

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

    def predict(self, x: Mapping[str, object] | object) -> np.ndarray:
        """The average's y [n]: weighted geometric mean of the laws (arithmetic under linear losses)."""
        mean = np.array([c.weight for c in self.members]) @ self._each(x)
        return np.exp(mean) if self.best.loss.is_log else mean

    def _each(self, x: Mapping[str, object] | object) -> np.ndarray:
        """Every member's (log) prediction, moved to the data's end [members, n]."""
        table = self.table(x)
        raw = np.array([fit.predict(_of(fit, table)) for fit, _ in self.average])
        shifts = np.array([[c.shift] for c in self.members])
        with np.errstate(all="ignore"):
            return (np.log(raw) if self.best.loss.is_log else raw) - shifts

    def draws(self, x: Mapping[str, object] | object) -> np.ndarray:
        """Curves [S, n] of y without measurement noise: a law drawn in proportion to its weight, its parameters from a
        resample, and its own misfit: smooth inside the data, growing beyond as rolling origins say.

        Row s of two selections with equal cluster labels and seed used the same resample: differences between arms are
        paired row by row. `draws(a) - draws(b)` on a grid is what `judge(law_curves=…)` takes.
        """
        table, is_log = self.table(x), self.best.loss.is_log
        y = np.empty((self.resampling.num_resamples, len(next(iter(table.values())))))
        for (fit, _), (rows, theta, shift) in zip(self.average, self._drawn, strict=True):
            drawn = fit.predict_draws(_of(fit, table), theta)
            y[rows] = drawn * np.exp(-shift)[:, None] if is_log else drawn - shift[:, None]
        rng = np.random.default_rng([self.resampling.seed, zlib.crc32(self.best.y.tobytes())])
        known = self.calibration
        size = rng.choice(known.scores, len(y)) if len(known.scores) else np.abs(rng.standard_normal(len(y)))
        misfit = (size * rng.choice([-1.0, 1.0], len(y)))[:, None] * known.drift * distance_beyond(self.fitted, table)
        misfit = misfit + known.misfit * smooth_curves(table, self.fitted, len(y), rng)
        return y * np.exp(misfit) if is_log else y + misfit

    @cached_property
    def _drawn(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each member the draws that are its own, their coordinates, and how far each is moved."""
        count, weights = self.resampling.num_resamples, self._resampled_weights
        place = (np.arange(count) + 0.5) * 0.6180339887498949 % 1.0  # spread evenly whatever the shares
        ends = np.cumsum([w for _, w in self.average])
        owner = np.minimum(np.searchsorted(ends, place), len(ends) - 1)
        found = []
        for k, (fit, _) in enumerate(self.average):
            rows, targets = np.flatnonzero(owner == k), self.resampling.targets(fit)
            own = None if targets is None else targets[rows]
            theta = refit(fit, weights[rows], own)
            residual = fit.problem.residual(theta) - (0.0 if own is None else own - fit.problem.target)
            residual = residual * (1.0 if fit.loss.is_log else fit.units["y"])
            found.append((rows, theta, level_shift(fit, residual, weights[rows] * fit.weights)))
        return found

    def curve_interval(self, x: Mapping[str, object] | object, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Pointwise quantiles [n], [n] of `draws`: where the true curve lies."""
        low, high = np.nanquantile(self.draws(x), [0.5 - level / 2, 0.5 + level / 2], axis=0)
        return low, high

    def interval(self, x: Mapping[str, object] | object, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound [n], [n] for a new measurement at `x`: calibrated on the average's own held-out errors,
        widened by how far its laws disagree."""
        table, each = self.table(x), self._each(x)
        shares = np.array([c.weight for c in self.members])
        distance = distance_beyond(self.fitted, table)
        spread = np.sqrt(np.maximum(shares @ (each - shares @ each) ** 2, 0.0))
        half = np.hypot(self.calibration.half_width(distance, level), spread)
        return band(self.predict(x), half, is_log=self.best.loss.is_log)

    @property
    def coverage(self) -> float:
        """Share of held-out rows inside the average's 90 % interval; nan where the table is too short to say."""
        return self.calibration.coverage

    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Predicted and measured y of the rows at the largest level of the first column, by the average of laws that
        did NOT see them, in the table's order. nan predictions where no law could be fitted without them."""
        first = self.fitted[self.columns[0]]
        last = first == first.max()
        try:
            return self.without_last().predict({n: c[last] for n, c in self.fitted.items()}), self.best.y[last]
        except LawError:
            return np.full(int(last.sum()), np.nan), self.best.y[last]

    def report(self, intervals: Mapping[str, tuple[float, float] | None] | None = None) -> str:
        """Scores of every law as text, and the best law's parameters."""
        lines = [f"{'law':14s} weight   in-sample  held-out   covers"]
        for c in self.candidates:
            scores = f"{c.weight:6.3f}   {c.in_sample:.4f}     {c.held_out:.4f}     {c.coverage:.0%}"
            lines.append(f"{c.name:14s} {scores if c.fit else c.reason}")
        return "\n".join([*lines, "", self.best.report(intervals)])

    def to_dict(self) -> dict:
        """JSON-ready: scores, weights, reasons, and each fitted law's `LawFit.to_dict`."""
        numbers = ("weight", "in_sample", "held_out", "coverage", "score", "shift")
        return {
            "schema": "dbscale.laws/selection/2",
            "columns": list(self.columns),
            "candidates": [
                {
                    "name": c.name,
                    **{k: finite_or_none(getattr(c, k)) for k in numbers},
                    "reason": c.reason,
                    "fit": c.fit.to_dict() if c.fit else None,
                }
                for c in self.candidates
            ],
            "noise": self.calibration.noise,
            "drift": self.calibration.drift,
            "coverage": finite_or_none(self.coverage),
        }


def _of(fit: LawFit, table: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The table's columns under the names of the law's variables."""
    return dict(table) if len(table) > 1 else {fit.form.variable_names[0]: next(iter(table.values()))}


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

    >>> import dbscale
    >>> sizes = [1e3, 2e3, 4e3, 8e3, 16e3, 32e3]
    >>> found = dbscale.select_law(sizes, [0.1 + 16 / size**0.5 for size in sizes], laws=["power_plus", "m4"])
    >>> found.best.name, round(float(found.predict([64e3])[0]), 3)
    ('power_plus', 0.163)
    """
    columns = varying_columns(x)
    forms = [find_form(law) for law in laws] if laws else default_laws(columns)
    fits, failures, shared = [], [], {}
    for form in forms:
        limits = (bounds or {}).get(form.name, {})
        try:
            search = Search.make(form, columns_for(form, columns, x), y, weights, loss, limits, {}, ceiling, seed)
            if not limits:  # what a law contains need not be searched for twice
                search.found = shared.setdefault(str(sorted(search.units().items())), {})
            fits.append(search.fit())
        except LawError as error:
            failures.append((form.name, error))
    if not fits:
        raise failures[0][1]
    names = column_names(fits[0].form, columns)
    odd = [fit for fit in fits if column_names(fit.form, columns) != names]
    failures += [(fit.name, LawError(f"not over {', '.join(names)} as {fits[0].name} is")) for fit in odd]
    how = Resampling.make(len(fits[0].y), num_resamples, clusters, within, stderr, seed)

    def without_last() -> Selection:
        seen = columns[names[0]] < columns[names[0]].max()
        own, w = (None if c is None else np.asarray(c)[seen] for c in (y, weights))
        return select_law({n: columns[n][seen] for n in names}, own, laws=forms, weights=w, loss=loss,
                          bounds=bounds, ceiling=ceiling, seed=seed)  # fmt: skip

    return make_selection([fit for fit in fits if fit not in odd], failures, names, how, without_last)


def column_names(form: Form, columns: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """The table's names of a law's variables, in the law's order."""
    if len(form.variables) == 1:
        return (next(iter(columns)),)
    return tuple(str(v.found_in(columns)) for v in form.variables)


def varying_columns(x: Mapping[str, object] | object) -> dict[str, np.ndarray]:
    """The table's columns that vary, by their own names; all of them where none does."""
    columns = {n: as_numbers(n, c) for n, c in x.items()} if isinstance(x, Mapping) else {"x": as_numbers("x", x)}
    return {n: c for n, c in columns.items() if c.size and np.any(c != c.flat[0])} or columns


def columns_for(form: Form, columns: Mapping[str, np.ndarray], x: Mapping[str, object] | object) -> object:
    """What a law is fitted over: the columns that vary, or all, where it would have to say what it lacks."""
    if len(form.variables) == 1 and len(columns) == 1:
        return next(iter(columns.values()))
    return columns if form.restrict is not None else x


def default_laws(columns: Mapping[str, np.ndarray]) -> list[Form]:
    """The laws whose variables are the table's columns; one column means the laws of one variable."""
    if len(columns) == 1:
        return [FORMS[name] for name in ONE_VARIABLE]
    fitting = []
    for form in FORMS.values():
        names = [v.name for v in form.variables if v.found_in(columns)]
        whole = len(names) == len(form.variables) or form.restrict is not None
        if len(names) == len(columns) and whole and form.name != "effective_data":
            try:
                fitting.append(find_form(form, tuple(names)))
            except LawError:  # a law that needs a variable that does not vary here
                continue
    if not fitting:
        raise LawError(f"no law has the columns {', '.join(columns)}; laws of one variable take one column")
    return fitting


def make_selection(fits, failures, columns: tuple[str, ...], how: Resampling, without_last) -> Selection:
    """Weights from the fits; the average's own rolling errors calibrate its intervals."""
    rolled, weight = [rolling_origins(fit) for fit in fits], average_weights(fits)
    noise = np.array([in_sample_noise(fit) for fit in fits])
    made = [
        scored(fit, rolling, float(w), float(n)) for fit, rolling, w, n in zip(fits, rolled, weight, noise, strict=True)
    ]
    lost = [Candidate(name, None, reason=str(error)) for name, error in failures]
    residuals = weight @ np.array([fit.residuals - each.shift for fit, each in zip(fits, made, strict=True)])
    misfit = lack_of_fit(fits[0].x, residuals, float(weight @ [fit.num_free for fit in fits]))
    calibration = Calibration.make(float(weight @ noise), average_errors(rolled, weight), misfit)
    ordered = (*sorted(made, key=lambda c: c.score), *lost)
    return Selection(ordered, columns, calibration, how, without_last)


def scored(fit: LawFit, rolling: RollingErrors, weight: float, noise: float) -> Candidate:
    """A fitted law with all its scores."""
    held_out = rolling.rms
    return Candidate(
        fit.name,
        fit,
        weight=weight,
        in_sample=noise,
        held_out=held_out,
        coverage=Calibration.make(noise, rolling).coverage,
        score=float(np.sqrt(max(noise, FLOOR) * max(held_out if np.isfinite(held_out) else noise, FLOOR))),
        shift=float(level_shift(fit, fit.residuals[None], fit.weights[None])[0]),
    )


def average_weights(fits: Sequence[LawFit]) -> np.ndarray:
    """Shares of the average [laws]: a power of 1 / (rms residual), among the laws that the table can carry."""
    points = np.stack(list(fits[0].x.values()), axis=1)
    ratio = np.array([len(np.unique(points, axis=0)) / max(fit.num_free, 1) for fit in fits])
    named = np.array([len(fit.x) > 1 or fit.name in AVERAGED for fit in fits])
    pool = named & (ratio >= POINTS_PER_PARAM) if named.any() else ratio >= POINTS_PER_PARAM
    if not pool.any():
        pool = ratio == ratio.max()
    trust = TRUST if len(fits[0].x) == 1 else TRUST_OF_GRIDS
    size = np.maximum([in_sample_noise(fit) for fit in fits], FLOOR) ** -trust
    return np.where(pool, size, 0.0) / np.sum(size[pool])


def average_errors(rolled: Sequence[RollingErrors], weight: np.ndarray) -> RollingErrors:
    """Held-out errors of the average; where a law is missing, the others share its weight."""
    errors = np.array([rolling.error for rolling in rolled])
    shares = np.where(np.isfinite(errors), weight[:, None, None], 0.0)
    total = shares.sum(axis=0)
    with np.errstate(all="ignore"):
        mean = np.where(total > 0, np.sum(shares * np.nan_to_num(errors), axis=0) / total, np.nan)
    return RollingErrors(rolled[0].distance, mean)
