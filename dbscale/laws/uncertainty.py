"""How sure a fit is: resampled tables, curvature, and profile likelihood where neither can be trusted.

Resamples are a weighted bootstrap: every cluster gets a weight 4·Beta(1/2, 3/2), whose mean, variance and skewness are 1,
those of a multinomial bootstrap's counts (Barbe & Bertail 1995), but no resample loses a level of a small table. Weights
are drawn from the cluster's own label: two tables that share labels and seed are resampled alike where they share them,
which is what pairs the arms of a study.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from dbscale.errors import LawError, nearest
from dbscale.laws.fit import LOST, Interval, LawFit, make_problem, smooth_curvature, spread_starts
from dbscale.laws.form import as_numbers
from dbscale.laws.solver import minimise, polish

BATCH = 64
"""Resamples per batch: small enough for their Jacobians to stay in cache. A refit takes 0.1 to 1.1 ms in a batch and
1.3 to 6 by scipy.optimize.least_squares (docs/benchmarks/laws.md)."""
UNSEEN = 20.0
"""Logarithm of how far below a first guess an amplitude is surely too small to be seen."""
WITH_FLOOR = ("power_plus", "additive", "product", "transfer_gap")
"""Laws that are a floor and a factor times a power of the first variable."""
Triple = tuple[float, float, float]
"""Value, lower and upper end."""
REACH = 40
"""Doublings of the step after which a profile that has not risen is taken as open."""


@dataclass(frozen=True)
class Resampling:
    """How a table is resampled: in a hierarchy of clusters (a cell), labels within them (a seed), and the noise of the
    finite test set. Two tables given the same labels and seed stay paired."""

    num_resamples: int = 1000
    clusters: Any = None
    """[n] labels of rows that are drawn together; None: each row alone."""
    within: Any = None
    """[n] labels of what is drawn again inside each cluster."""
    stderr: Any = None
    """[n] standard error of each y from its test set, redrawn as normal noise, in units of y."""
    seed: int = 0

    def checked(self, num_rows: int) -> Resampling:
        """With columns as arrays of one length. Raises LawError for other lengths and values."""
        columns = {
            n: c if c is None else np.asarray(c) for n, c in (("clusters", self.clusters), ("within", self.within))
        }
        columns["stderr"] = None if self.stderr is None else as_numbers("stderr", self.stderr) * np.ones(num_rows)
        for name, column in columns.items():
            if column is not None and column.shape != (num_rows,):
                raise LawError(f"{name} has shape {column.shape}, the table {num_rows} rows")
        if columns["stderr"] is not None and not np.all(columns["stderr"] >= 0):
            raise LawError("stderr must not be negative")
        if self.num_resamples < 1:
            raise LawError(f"num_resamples must be at least 1, got {self.num_resamples}")
        return replace(self, **columns)

    def _labels(self, num_rows: int) -> list[str]:
        return [str(c) for c in (range(num_rows) if self.clusters is None else self.clusters)]

    def num_clusters(self, num_rows: int) -> int:
        """How many clusters are drawn."""
        return len(set(self._labels(num_rows)))

    def weights(self, num_rows: int) -> np.ndarray:
        """Weight of each row in each resample [B, n], 1 on average."""
        outer = self._labels(num_rows)
        inner = [] if self.within is None else [f"{a}/{b}" for a, b in zip(outer, self.within, strict=True)]
        weights = np.ones((self.num_resamples, num_rows))
        for labels in filter(None, (outer, inner)):
            drawn = {label: self._drawn(label) for label in dict.fromkeys(labels)}
            weights *= np.stack([drawn[label] for label in labels], axis=1)
        return weights

    def _drawn(self, label: str) -> np.ndarray:
        return np.random.default_rng([self.seed, zlib.crc32(label.encode())]).beta(0.5, 1.5, self.num_resamples) * 4

    def targets(self, fit: LawFit) -> np.ndarray | None:
        """y of each resample [B, n] in the loss's space, scaled as the fit is; None where nothing is redrawn."""
        if self.stderr is None:
            return None
        noise = np.random.default_rng([self.seed, 1]).standard_normal((self.num_resamples, len(fit.y))) * self.stderr
        return fit.problem.target + noise / (fit.y if fit.loss.is_log else fit.units["y"])


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Refits of one law to resampled tables."""

    fit: LawFit
    theta: np.ndarray
    """Scaled coordinates [B, p]."""
    num_clusters: int

    def interval(self, level: float = 0.9) -> dict[str, Interval]:
        """Percentile interval of each parameter, widened for small tables; None where it is not determined.

        Percentiles of n resampled rows are too narrow by √(n/(n − p)) and by Student's t over the normal quantile; both
        widen them around the estimate, in coordinates. Percentiles say nothing at a bound: where that many resamples
        lie on one, the profile likelihood stands in. Fixed parameters have no width.
        """
        fit, tails = self.fit, [0.5 - level / 2, 0.5 + level / 2]
        spare = max(self.num_clusters - fit.num_free, 1)
        wider = np.sqrt(self.num_clusters / spare) * central_quantile(level, spare) / central_quantile(level)
        middle = fit.to_plain(fit.theta)
        ends = middle + wider * (np.quantile(fit.to_plain(self.theta), tails, axis=0) - middle)
        near = 1e-6 * (1 + np.abs(self.theta))
        at_end = (self.theta - fit.lower < near) | (fit.upper - self.theta < near)
        return intervals_of(fit, ends, level, at_end.mean(axis=0) > tails[0])


def bootstrap(fit: LawFit, how: Resampling) -> Bootstrap:
    """Refit `fit` to resampled tables. Raises LawError for columns of another length."""
    how = how.checked(len(fit.y))
    theta = refit(fit, how.weights(len(fit.y)), how.targets(fit))
    return Bootstrap(fit, theta, how.num_clusters(len(fit.y)))


def refit(fit: LawFit, weights: np.ndarray, targets: np.ndarray | None = None) -> np.ndarray:
    """Coordinates [B, p] of the law refitted from the table's optimum, its weights times each row of `weights` [B, n].

    `targets` [B, n] replaces y in each resample, in the loss's space and scaled as `fit.problem` is.
    """
    problem, starts, parts = fit.problem, restarts(fit), [np.empty((0, len(fit.theta)))]
    for k in range(0, len(weights), BATCH):
        own = None if targets is None else targets[k : k + BATCH]
        w = weights[k : k + BATCH] * fit.weights
        found = [minimise(problem, np.tile(start, (len(w), 1)), w, targets=own) for start in starts]
        best = np.argmin([objective for _, objective in found], axis=0)
        parts.append(np.stack([theta for theta, _ in found])[best, np.arange(len(w))])
    return np.concatenate(parts)


def restarts(fit: LawFit) -> np.ndarray:
    """Where refits start [1 or 2, p]: the optimum, and that with vanished amplitudes regrown.

    At its floor the logarithm of an amplitude has no slope, so a term that vanished once would never come back.
    """
    small = smallest_starts(fit)
    gone = fit.form.is_log & (fit.theta <= fit.lower + 1.0) & (fit.lower < small)
    return np.stack([fit.theta, np.where(gone, small, fit.theta)]) if gone.any() else fit.theta[None]


def smallest_starts(fit: LawFit) -> np.ndarray:
    """The small end [p] of each parameter's range of first guesses."""
    return spread_starts(fit.problem, 64, fit.seed).min(axis=0)


def parameter_intervals(fit: LawFit, level: float = 0.9) -> dict[str, Interval]:
    """Student-t interval of each parameter from the curvature, symmetric in the coordinates (amplitudes stay positive).

    Parameters at a bound get their profile-likelihood interval, fixed ones no width, undetermined ones None.
    """
    half = central_quantile(level, fit.degrees) * np.sqrt(np.maximum(np.diag(fit.plain_covariance), 0.0))
    middle = fit.to_plain(fit.theta)
    return intervals_of(fit, np.stack([middle - half, middle + half]), level, np.zeros(len(half), bool))


def intervals_of(fit: LawFit, ends: np.ndarray, level: float, pressed: np.ndarray) -> dict[str, Interval]:
    """Intervals in the table's units from coordinates `ends` [2, p]; by profile likelihood where the estimate, or what
    was resampled (`pressed` [p]), lies at a bound."""
    found: dict[str, Interval] = {}
    is_log, own = fit.form.is_log, np.diag(fit.form.unscaling(fit.units)[0])
    # Of an amplitude that vanished, what a first guess would take at least.
    grown = fit.to_plain(np.maximum(fit.theta, np.where(is_log, smallest_starts(fit), -np.inf)))
    with np.errstate(over="ignore"):
        low_edge = np.where(is_log, np.exp(grown), own * fit.lower)
        high_edge = np.where(is_log, np.inf, own * fit.upper)
        ends = np.where(is_log, np.exp(ends), np.clip(ends, low_edge, high_edge))
    for k, name in enumerate(fit.form.param_names):
        if name in fit.fixed:
            found[name] = (fit.params[name], fit.params[name])
        elif name in fit.undetermined:
            found[name] = None
        else:
            low, high = (
                profile_interval(fit, name, level) if pressed[k] or name in fit.at_bound else ends[:, k].tolist()
            )
            empty = says_nothing((low, high), is_log=bool(is_log[k]), box=(low_edge[k], high_edge[k]))
            found[name] = None if empty else (low, high)
    return found


def says_nothing(ends: tuple[float, float], *, is_log: bool, box: tuple[float, float]) -> bool:
    """Whether an interval is as wide as the law allows, or spans a factor of a million and more; where an amplitude may
    vanish, a million times `box[0]`, its estimate or what a first guess would take at least."""
    if is_log:
        return ends[1] == np.inf or bool((ends[0] or box[0]) * np.exp(2 * LOST) < ends[1])
    return ends[0] <= box[0] and ends[1] >= box[1]


def profile_interval(fit: LawFit, name: str, level: float = 0.9) -> tuple[float, float]:
    """Interval of one parameter by profile likelihood: where twice the rise of the log-likelihood, all others optimised
    anew, passes the quantile squared.

    The rise is (n − p)·(objective ratio − 1) for least squares, against Student's t; for Huber it is the objective's
    rise over its noise scale, against the normal. An end that is a bound of the law stays there; one that is never
    reached is infinite (0 for amplitudes).
    """
    if name not in fit.form.param_names:
        raise LawError(f"{fit.name} has no parameter {name!r}; {nearest(name, fit.form.param_names)}")
    if name in fit.fixed:
        raise LawError(f"{name!r} was fixed; there is nothing to profile")
    profile = Profile(fit, fit.form.param_names.index(name))
    is_square = fit.loss.kind == "least_squares"
    limit = central_quantile(level, fit.degrees) if is_square else central_quantile(level)
    ends = [profile.end(side, limit**2) for side in (-1, 1)]
    with np.errstate(over="ignore"):
        return (float(np.exp(ends[0])), float(np.exp(ends[1]))) if profile.is_log else (ends[0], ends[1])


class Profile:
    """The likelihood as a function of one coordinate k, in the table's own units, all others optimised anew."""

    def __init__(self, fit: LawFit, k: int) -> None:
        self.fit, self.k, self.is_log = fit, k, bool(fit.form.is_log[k])
        matrix, shift = fit.form.unscaling(fit.units)
        own, self.theta = np.diag(matrix), fit.to_plain(fit.theta)
        # A box over scaled coordinates is none over plain ones where an exponent mixes in; those ends stay open.
        mixed, fixed = (matrix - np.diag(own)).any(axis=1), np.isin(fit.form.param_names, fit.fixed)
        box = [
            np.where(fixed, self.theta, np.where(mixed, side * np.inf, np.where(np.isfinite(e), own * e + shift, e)))
            for side, e in ((-1, fit.lower), (1, fit.upper))
        ]
        self.problem = make_problem(fit.form, fit.x, fit.y, dict.fromkeys(fit.units, 1.0), fit.loss, box)
        self.low, self.high = box[0][k], box[1][k]
        self.best = float(self.problem.objective(self.theta[None], fit.weights[None])[0])
        # An amplitude that vanished is sought from far below the smallest value that a first guess would take.
        self.vanished = self.is_log and bool(fit.theta[k] <= fit.lower[k] + 1.0)
        regrown = np.where(np.arange(len(self.theta)) == k, smallest_starts(fit) - UNSEEN, fit.theta)
        self.middle = float(fit.to_plain(regrown)[k]) if self.vanished else float(self.theta[k])

    def rise(self, value: float, start: np.ndarray) -> tuple[float, np.ndarray]:
        """Twice the rise of the log-likelihood at `value`, and the optimum there [p]."""
        at = np.where(np.arange(len(start)) == self.k, value, start)
        box = [np.where(np.arange(len(start)) == self.k, value, e) for e in (self.problem.lower, self.problem.upper)]
        problem = replace(self.problem, lower=box[0], upper=box[1])
        theta, _ = minimise(problem, at[None], self.fit.weights[None], max_steps=60)
        theta, objective, _ = polish(problem, theta[0], self.fit.weights)
        return self.deviance(objective), theta

    def deviance(self, objective: float) -> float:
        """Twice the rise of the log-likelihood, scaled by the noise that the residuals show."""
        fit, best = self.fit, max(self.best, 1e-300)
        if fit.loss.kind == "least_squares":
            return fit.degrees * (objective / best - 1)
        residual = self.problem.residual(self.theta[None])[0]
        curvature = float(np.mean(smooth_curvature(self.problem.loss, residual)))
        score = float(np.average(self.problem.loss.psi(residual) ** 2, weights=fit.weights)) * float(fit.weights.mean())
        return 2 * (objective - best) * curvature / max(score, 1e-300)

    def end(self, side: int, limit: float) -> float:
        """Where the rise passes `limit` on one side: steps that double, then a root."""
        from scipy.optimize import brentq

        bound = self.low if side < 0 else self.high
        if side < 0 and self.vanished:
            return -np.inf
        size = float(np.sqrt(max(self.fit.plain_covariance[self.k, self.k], 0.0)))
        step = size or (1.0 if self.is_log else 0.01 * (1 + abs(self.middle)))
        close, inside, known, start = 1e-3 * step, self.middle, -limit, self.theta
        for _ in range(REACH):
            value = float(np.clip(inside + side * step, self.low, self.high))
            rise, there = self.rise(value, start)
            if rise > limit:
                ends = {inside: known, value: rise - limit}
                excess = lambda v, s=start, e=ends: e[v] if v in e else self.rise(v, s)[0] - limit  # noqa: E731
                return float(brentq(excess, inside, value, xtol=close))  # type: ignore[arg-type]
            if value == bound:
                return float(bound)
            inside, known, start, step = value, rise - limit, there, 2 * step
        return side * np.inf


@dataclass(frozen=True)
class Premise:
    """Whether the premise of Theorem 1 (2504.13219) holds: the distilled floor E∞ lies above the plain one, and the
    distilled arm has the larger exponent or the larger factor. Each difference is distilled − plain, with its interval."""

    verdict: Literal["holds", "fails", "not determined"]
    floor: Triple
    """E∞, in units of y."""
    exponent: Triple
    """The exponent of the law's first variable, such as D_p."""
    log_factor: Triple
    """The log of the term's factor, at 1 in the variable's unit."""
    level: float


def premise(plain: Bootstrap, distilled: Bootstrap, level: float = 0.9) -> Premise:
    """Test the premise on one law fitted to both arms, and resampled.

    Every difference combines the arms' own intervals (percentiles, profile likelihood at bounds) by MOVER (Zou & Donner
    2008), as if the arms were independent, which pairing makes cautious. `holds` and `fails` follow from the ends of the
    intervals; a parameter that a table does not determine leaves its difference open. Raises LawError for two laws, and
    for laws that are no sum of a floor and powers.
    """
    form = plain.fit.form
    if form.equation != distilled.fit.form.equation:
        raise LawError(f"premise: fit one law to both arms, not {form.equation} and {distilled.fit.form.equation}")
    if form.name not in WITH_FLOOR:
        raise LawError(
            f"premise: {form.name} has no floor, exponent and factor to compare; use {', '.join(WITH_FLOOR)}"
        )
    rule = next(r for r in form.scaling if r.variable == form.variable_names[0] and r.exponent)
    names = (form.param_names[0], str(rule.exponent), rule.amplitude)
    arms = [(bootstrap.fit.params, bootstrap.interval(level)) for bootstrap in (distilled, plain)]

    def difference(name: str) -> Triple:
        ends = np.array([(p[name], *(found[name] or (-np.inf, np.inf))) for p, found in arms])
        if name == rule.amplitude:
            with np.errstate(divide="ignore"):
                ends = np.log(np.maximum(ends, 0.0))
        elif name == rule.exponent and rule.sign < 0:  # a rising power: the law falls with -exponent
            ends = -ends[:, [0, 2, 1]]
        (high_arm, low, high), (low_arm, other_low, other_high) = ends.tolist()
        middle = high_arm - low_arm
        below, above = np.hypot(high_arm - low, other_high - low_arm), np.hypot(high - high_arm, low_arm - other_low)
        return middle, middle - below, middle + above

    floor, exponent, factor = map(difference, names)
    holds = floor[1] > 0 and (exponent[1] > 0 or factor[1] > 0)
    fails = floor[2] <= 0 or (exponent[2] < 0 and factor[2] < 0)
    return Premise("holds" if holds else "fails" if fails else "not determined", floor, exponent, factor, level)


@lru_cache(maxsize=256)
def central_quantile(level: float, degrees: float = np.inf) -> float:
    """Half-width in standard errors of the central interval of Student's t (at least 1 degree), by default the normal."""
    from scipy.special import stdtrit

    return float(stdtrit(max(degrees, 1.0), 0.5 + level / 2))
