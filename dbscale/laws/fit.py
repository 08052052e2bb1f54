"""Fit one law to one table: check it, scale it, start from everywhere, minimise, and say how sure the optimum is.

`fit_law` gives a `LawFit`, which holds its table so that it can be resampled (`uncertainty`) and judged (`select`).
Nothing in a fit depends on the unit of x or y: both are divided by their geometric means first.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from dbscale.errors import LawError, NotEnoughData, nearest
from dbscale.laws.form import LOG_FLOOR, Embed, Form
from dbscale.laws.forms import find_form
from dbscale.laws.solver import Loss, Problem, make_loss, minimise, polish
from dbscale.laws.table import check_table

Bounds = Mapping[str, tuple[float | None, float | None]]
Interval = tuple[float, float] | None
"""Ends in the table's units; None where the table does not determine the parameter."""
SCHEMA = "dbscale.laws/law_fit/2"
SCREENED_PER_PARAM, RACED, RACE_STEPS, WINNERS = 48, 24, 10, 6
"""Starts drawn for each parameter, those that take a few steps together, how many steps, and those that go on.

The winners go on together: 78 ms for a BNSL fit where scipy, one start after the other, takes 212. scipy finishes the
best one, where a batch has nothing to share (docs/benchmarks/laws.md).
"""
SAME_OBJECTIVE = 1e-6
NEGLIGIBLE = 1e-8
"""A coordinate that moves no residual by more than this when it moves by 1 has no say in the fit."""
SINGULAR = 1e-12
LOST = 7.0
"""Standard error of a coordinate beyond which the table does not determine it: a factor of a thousand for amplitudes,
further than any exponent lies."""


@dataclass(frozen=True, eq=False)
class LawFit:
    """One law fitted to one table. Made by `fit_law`."""

    form: Form
    theta: np.ndarray
    """Coordinates [p] of the optimum, over scaled variables and y."""
    theta_covariance: np.ndarray
    """[p, p]; zero for parameters that are fixed, at a bound or not determined."""
    units: dict[str, float]
    """What each variable, and y, was divided by."""
    objective: float
    """The minimised sum of weight times loss, in the table's units."""
    loss: Loss
    x: dict[str, np.ndarray]
    y: np.ndarray
    weights: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    """The box [p], in scaled coordinates."""
    num_starts: int
    num_starts_reached: int
    """How many starts ended within a millionth of the best objective."""
    fixed: tuple[str, ...] = ()
    at_bound: tuple[str, ...] = ()
    undetermined: tuple[str, ...] = ()
    """Parameters about which the table says nothing, such as the exponent of a term that vanished."""
    warnings: tuple[str, ...] = ()
    seed: int = 0

    @property
    def name(self) -> str:
        return self.form.name

    @property
    def num_free(self) -> int:
        return len(self.form.params) - len(self.fixed)

    @property
    def degrees(self) -> int:
        """Degrees of freedom that the residuals have left; at least 1."""
        return max(int(np.sum(self.weights > 0)) - self.num_free, 1)

    @property
    def params(self) -> dict[str, float]:
        """Parameters in the table's own units; amplitudes at the floor are 0."""
        return dict(zip(self.form.param_names, self.to_params(self.theta[None])[0].tolist(), strict=True))

    def to_plain(self, theta: np.ndarray) -> np.ndarray:
        """Scaled coordinates [..., p] to coordinates in the table's own units."""
        matrix, shift = self.form.unscaling(self.units)
        return theta @ matrix.T + shift

    def to_params(self, theta: np.ndarray) -> np.ndarray:
        """Scaled coordinates [S, p] to parameters [S, p] in the table's own units."""
        with np.errstate(over="ignore"):
            plain = self.to_plain(theta)
            values = np.where(self.form.is_log, np.exp(np.where(self.form.is_log, plain, 0.0)), plain)
        return np.where(self.form.is_log & (theta <= np.log(LOG_FLOOR) + 1.0), 0.0, values)

    @property
    def plain_covariance(self) -> np.ndarray:
        """[p, p] of the coordinates in the table's own units."""
        matrix, _ = self.form.unscaling(self.units)
        return matrix @ self.theta_covariance @ matrix.T

    @property
    def covariance(self) -> np.ndarray:
        """[p, p] of the parameters, by the delta method, in the order of `form.param_names`."""
        slope = np.where(self.form.is_log, list(self.params.values()), 1.0)
        return self.plain_covariance * np.outer(slope, slope)

    @property
    def stderr(self) -> dict[str, float]:
        """Standard errors; nan for parameters that are fixed, at a bound or not determined."""
        silent = {*self.fixed, *self.at_bound, *self.undetermined}
        sizes = np.sqrt(np.maximum(np.diag(self.covariance), 0.0))
        return {n: math.nan if n in silent else float(s) for n, s in zip(self.form.param_names, sizes, strict=True)}

    @property
    def problem(self) -> Problem:
        """What was minimised, for refits."""
        return make_problem(self.form, self.x, self.y, self.units, self.loss, (self.lower, self.upper))

    def predict(self, x: Mapping[str, object] | object) -> np.ndarray:
        """y at columns `x`, of any one shape, that broadcast against each other."""
        columns = self.form.columns(x)
        shape = np.broadcast_shapes(*(np.shape(c) for c in columns.values()))
        flat = {name: np.broadcast_to(column, shape).ravel() for name, column in columns.items()}
        return self.predict_draws(flat, self.theta[None])[0].reshape(shape)

    def predict_draws(self, x: Mapping[str, object] | object, theta: np.ndarray) -> np.ndarray:
        """y [S, n] at flat columns `x` for each row of coordinates `theta` [S, p]; nan outside the law's domain."""
        scaled = {name: column / self.units[name] for name, column in self.form.columns(x).items()}
        y = np.real(self.form.evaluate(scaled, theta)) * self.units["y"]
        return np.broadcast_to(y, (len(theta), *np.shape(next(iter(scaled.values())))))

    @property
    def residuals(self) -> np.ndarray:
        """log ŷ − log y, or ŷ − y for linear losses; [n]."""
        y = self.predict(self.x)
        return np.log(y) - np.log(self.y) if self.loss.is_log else y - self.y

    def report(self, intervals: Mapping[str, Interval] | None = None) -> str:
        """A page of text: the equation, parameters with errors (and 90 % intervals, where given), every warning."""
        rms = float(np.sqrt(np.average(self.residuals**2, weights=self.weights)))
        lines = [f"{self.name}: {self.form.equation}   ({self.form.source})"]
        for name, value in self.params.items():
            ends = (intervals or {}).get(name, (math.nan, math.nan))
            size = "at its bound" if name in self.at_bound else f"± {self.stderr[name]:.3g}"
            if ends is not None and not math.isnan(ends[0]):
                size += f"  (90 %: {ends[0]:.6g} to {ends[1]:.6g})"
            if name in self.fixed:
                size = "fixed"
            elif name in self.undetermined or ends is None:
                size = "not determined by the table"
            lines.append(f"  {name:10s} {value:12.6g}  {size}")
        lines.append(
            f"  {len(self.y)} points, objective {self.objective:.8g} ({self.loss.kind}, {self.loss.space}), "
            f"rms residual {rms:.4g}; {self.num_starts_reached} of {self.num_starts} starts reached it"
        )
        return "\n".join(lines + [f"  warning: {w}" for w in self.warnings])

    def to_dict(self) -> dict:
        """JSON-ready; what is not finite becomes null."""
        return {
            "schema": SCHEMA, "form": self.name, "equation": self.form.equation,
            "variables": list(self.form.variable_names),
            "params": {k: finite_or_none(v) for k, v in self.params.items()},
            "stderr": {k: finite_or_none(v) for k, v in self.stderr.items()},
            "covariance": [[finite_or_none(v) for v in row] for row in self.covariance],
            "objective": self.objective, "loss": asdict(self.loss), "num_points": len(self.y),
            "starts": {"tried": self.num_starts, "reached": self.num_starts_reached},
            **{name: list(getattr(self, name)) for name in ("fixed", "at_bound", "undetermined", "warnings")},
            "seed": self.seed, "range": {k: [float(v.min()), float(v.max())] for k, v in self.x.items()},
        }  # fmt: skip


def finite_or_none(value: float) -> float | None:
    """The number as JSON can hold it."""
    return float(value) if math.isfinite(value) else None


def fit_law(
    form: str | Form,
    x: Mapping[str, object] | object,
    y: object,
    *,
    weights: object = None,
    loss: str | Loss = "huber_log",
    bounds: Bounds | None = None,
    fixed: Mapping[str, float] | None = None,
    ceiling: float | None = None,
    seed: int = 0,
) -> LawFit:
    """Fit `form` to y [n] over columns x (each [n]); minimises Σ weight·loss(residual).

    `bounds` maps parameters to (low, high), None meaning open; `fixed` maps them to values; both in the table's units.
    `ceiling` is the largest value that y can take, if it has one (1 for error rates, 100 for percent): levels that y
    approaches from below stay under it. Weights are relative: `error_weights` makes them from test-set sizes and seeds.
    Deterministic for a given seed. Raises LawError for tables, names or options that cannot be fitted, NotEnoughData for
    too few distinct points.

    >>> import dbscale
    >>> fit = dbscale.fit_law("power_plus", [1e3, 4e3, 16e3, 64e3], [0.6, 0.35, 0.225, 0.1625])
    >>> {name: round(value, 3) for name, value in fit.params.items()}
    {'E': 0.1, 'b': 15.811, 'c': -0.5}
    """
    return Search.make(form, x, y, weights, loss, bounds, fixed, ceiling, seed).fit()


@dataclass
class Search:
    """One fit in progress: the checked table and options, and the optima of contained laws found so far."""

    form: Form
    x: dict[str, np.ndarray]
    y: np.ndarray
    weights: np.ndarray
    loss: Loss
    bounds: Bounds
    fixed: Mapping[str, float]
    ceiling: float | None
    seed: int
    warnings: list[str] = field(default_factory=list)
    found: dict[str, list[tuple[np.ndarray, float, bool]]] = field(default_factory=dict)

    @classmethod
    def make(cls, form, x, y, weights, loss, bounds, fixed, ceiling, seed: int) -> Search:
        """Check the table and the options."""
        loss, notes, bounds, fixed = make_loss(loss), [], dict(bounds or {}), dict(fixed or {})
        form, columns, y, weights = check_table(find_form(form), x, y, weights, notes, is_log=loss.is_log)
        check_options(form, bounds, fixed, ceiling, y)
        return cls(form, columns, y, weights, loss, bounds, fixed, ceiling, seed, notes)

    def fit(self) -> LawFit:
        """Run the search and say how sure its optimum is. Raises NotEnoughData for too few distinct points."""
        num_params, num_free = len(self.form.params), len(self.form.params) - len(self.fixed)
        num_distinct = len(np.unique(np.stack(list(self.x.values())), axis=1).T)
        if num_distinct < num_free:
            raise NotEnoughData(
                f"{self.form.name} has {num_free} free parameters, the table {num_distinct} distinct points: "
                "fix parameters, or use a smaller law"
            )
        if num_distinct <= num_params + 1:
            self.warnings.append(
                f"{num_distinct} distinct points for {num_params} parameters: the fit all but interpolates"
            )
        return self.finish(self.run(self.form))

    def units(self) -> dict[str, float]:
        """Geometric means; 1 where a bounded or fixed amplitude would no longer be a box in scaled coordinates."""
        held = {*self.bounds, *self.fixed}
        pinned = {rule.variable for rule in self.form.scaling if rule.exponent and rule.amplitude in held}
        units = {"y": geometric_mean(self.y) if self.form.scales_with_y and "y" not in pinned else 1.0}
        for v in self.form.variables:
            own = geometric_mean(self.x[v.name]) if v.scaled and v.name not in pinned else 1.0
            units[v.name] = units[v.unit_of] if v.unit_of else own
        return units

    def problem(self, form: Form) -> Problem:
        """The scaled problem of this law or of one it contains; a fixed parameter has both ends of its box equal."""
        units = self.units()
        (matrix, shift), ends = form.unscaling(units), []
        for k, p in enumerate(form.params):
            given = self.bounds.get(p.name, (None, None))
            if p.name in self.fixed:
                given = (self.fixed[p.name],) * 2
            elif p.is_ceiling and given[1] is None:
                given = (given[0], self.ceiling)
            for value, default in zip(given, (p.lower, p.upper), strict=True):
                if p.kind == "log":
                    ends.append(np.log(default) if value is None else np.log(max(value, 1e-300)) - shift[k])
                else:
                    ends.append(default if value is None else value / matrix[k, k])
        return make_problem(form, self.x, self.y, units, self.loss, np.array(ends, dtype=float).reshape(-1, 2).T)

    def run(self, form: Form) -> list[tuple[np.ndarray, float, bool]]:
        """Optima, the best first: from contained laws (so that none fits better) and from a wide spread."""
        if form.name in self.found:
            return self.found[form.name]
        problem = self.problem(form)
        embedded = [self.embedded(problem, *inner) for inner in form.contains.items()]
        starts = np.stack([*(start for start in embedded if start is not None), *self.race(problem)])
        theta, objective = minimise(problem, starts, self.weights[None])
        order = np.argsort(objective, kind="stable")
        ends = [polish(problem, theta[order[0]], self.weights)]
        ends += [(theta[k], float(objective[k]), True) for k in order[1:]]
        if not np.isfinite(ends[0][1]):
            raise LawError(f"{form.name}: no start lies in its domain ({form.domain}); check bounds and units")
        self.found[form.name] = ends
        return ends

    def race(self, problem: Problem) -> np.ndarray:
        """The best few [WINNERS, p] of many starts after some steps each."""
        wide = spread_starts(problem, SCREENED_PER_PARAM * len(problem.lower), self.seed)
        order = np.argsort(problem.objective(wide, self.weights[None]), kind="stable")
        theta, objective = minimise(problem, wide[order[:RACED]], self.weights[None], max_steps=RACE_STEPS)
        return theta[np.argsort(objective, kind="stable")[:WINNERS]]

    def embedded(self, problem: Problem, name: str, embed: Embed) -> np.ndarray | None:
        """Coordinates [p] at which the law equals the best fit of one it contains; parameters that do not matter there
        start in the middle of their range. None where the inner law has other variables."""
        form = problem.form
        small = find_form(name, form.variable_names)
        if not set(small.variable_names) <= set(form.variable_names):
            return None
        middle, best = spread_starts(problem, 1, self.seed)[0], self.run(small)[0][0]
        free, values = ({n: float(v[0]) for n, v in f.natural(t).items()} for f, t in ((form, middle), (small, best)))
        return form.coordinates({**free, **embed(values)})

    def finish(self, ends: list[tuple[np.ndarray, float, bool]]) -> LawFit:
        """The value handed to the user: optimum, covariance, what lies at a bound, and what to be wary of."""
        problem, (theta, objective, converged) = self.problem(self.form), ends[0]
        near = 1e-6 * (1 + np.abs(theta))
        stuck = (theta - problem.lower < near) | (problem.upper - theta < near)
        covariance, lost = theta_covariance(problem, theta, self.weights, free=~stuck)
        names, units = np.array(self.form.param_names), self.units()
        sizes = np.sqrt(np.diag(covariance))
        weak = names[self.form.is_log & (sizes > 1.0)]
        if weak.size:
            self.warnings.append(f"weakly identified (uncertain by more than a factor e): {', '.join(weak)}")
        if not converged:
            self.warnings.append("the optimiser stopped before it converged")
        return LawFit(
            form=self.form, theta=theta, theta_covariance=covariance, units=units,
            objective=objective * (1.0 if self.loss.is_log else units["y"] ** 2),
            loss=self.loss, x=self.x, y=self.y, weights=self.weights, lower=problem.lower, upper=problem.upper,
            num_starts=len(ends), num_starts_reached=sum(e <= objective * (1 + SAME_OBJECTIVE) for _, e, _ in ends),
            fixed=tuple(n for n in names.tolist() if n in self.fixed),
            at_bound=tuple(n for n in names[stuck].tolist() if n not in self.fixed),
            undetermined=tuple(names[lost].tolist()), warnings=tuple(self.warnings), seed=self.seed,
        )  # fmt: skip


def geometric_mean(values: np.ndarray) -> float:
    """Geometric mean of the sizes above 0; 1 where there are none."""
    sizes = np.abs(values[values != 0])
    return float(np.exp(np.mean(np.log(sizes)))) if sizes.size else 1.0


def make_problem(form: Form, x: Mapping, y: np.ndarray, units: Mapping, loss: Loss, box) -> Problem:
    """The scaled problem, rounded to twelve digits, so that no unit leaves a trace by which a start leads elsewhere.

    Huber's corner under linear losses follows the size of y, whatever y was divided by.
    """
    scaled = {n: np.exp(np.round(np.log(x[n] / units[n]), 12)) for n in form.variable_names}
    target = np.round(np.log(y / units["y"]) if loss.is_log else y / units["y"], 12)
    if not loss.is_log:
        loss = replace(loss, delta=loss.delta * geometric_mean(target))
    return Problem(form, scaled, target, loss, *box)


def spread_starts(problem: Problem, count: int, seed: int) -> np.ndarray:
    """`count` coordinates [count, p] inside the box, stratified in each parameter (a Latin hypercube drawn from the seed
    and the law's name); one is the middle of all ranges."""
    form = problem.form
    rng = np.random.default_rng([seed, zlib.crc32(form.name.encode())])
    y = np.exp(problem.target) if problem.loss.is_log else problem.target
    level = {"": 1.0, "y_low": y.min(), "y_mid": np.median(y), "y_high": y.max()}
    theta = np.empty((count, len(form.params)))
    for k, p in enumerate(form.params):
        ends = np.maximum(np.array(p.start) * max(level[p.unit], 0.0), 1e-300) if p.kind == "log" else np.array(p.start)
        low, high = np.log(ends) if p.kind == "log" else ends * level[p.unit]
        place = (rng.permutation(count) + rng.random(count)) / count if count > 1 else 0.5
        theta[:, k] = low + (high - low) * place
    return np.clip(theta, problem.lower, problem.upper)


def theta_covariance(
    problem: Problem, theta: np.ndarray, weights: np.ndarray, free: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[p, p] covariance of the estimate, zero outside `free`, and a mask [p] of free coordinates that are not determined.

    Least squares: s²(JᵀWJ)⁻¹. Huber: the sandwich B⁻¹(Σ w²ψ²JJᵀ)B⁻¹·n/(n − p), whose bread B = Σ wψ′JJᵀ counts
    residuals in a window of the residuals' own spread (Powell's estimate), as δ itself usually holds too few of them.
    """
    residual, jacobian = (a[0] for a in problem.residual_jacobian(theta[None]))
    used = weights > 0
    w, slopes = weights / weights[used].mean(), jacobian[free]
    count = int(used.sum())
    spare = max(count - int(free.sum()), 1)
    covariance, lost = np.zeros((len(theta), len(theta))), np.zeros(len(theta), dtype=bool)
    if problem.loss.kind == "least_squares":
        inner, unseen = inverse((slopes * w) @ slopes.T)
        inner = inner * float(w @ residual**2) / spare
    else:
        bread, unseen = inverse((slopes * (w * smooth_curvature(problem.loss, residual))) @ slopes.T)
        meat = (slopes * (w * problem.loss.psi(residual)) ** 2) @ slopes.T
        inner = bread @ meat @ bread * count / spare
    unseen = unseen | (np.sqrt(np.maximum(np.diag(inner), 0.0)) > LOST)
    lost[free] = unseen
    covariance[np.ix_(free, free)] = np.where(unseen[:, None] | unseen[None, :], 0.0, inner)
    return covariance, lost


def inverse(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of an information matrix [q, q] without its null space, and a mask [q] of coordinates that reach into it."""
    size = np.sqrt(np.diag(matrix))
    seen = size > NEGLIGIBLE
    scale = np.where(seen, size, 1.0)
    values, vectors = np.linalg.eigh(matrix / np.outer(scale, scale) * np.outer(seen, seen))
    null = values < SINGULAR * max(values.max(initial=0.0), 1e-300)
    unseen = ~seen | (np.abs(vectors[:, null]) > 1e-3).any(axis=1)
    kept = vectors[:, ~null] / np.sqrt(values[~null])
    return kept @ kept.T / np.outer(scale, scale), unseen


def smooth_curvature(loss: Loss, residual: np.ndarray) -> np.ndarray:
    """ψ′ [n] with Huber's corner widened to the residuals' spread."""
    window = max(loss.delta, 1.4826 * float(np.median(np.abs(residual))))
    return (np.abs(residual) <= window) * loss.delta / window


def check_options(form: Form, bounds: Bounds, fixed: Mapping[str, float], ceiling: float | None, y: np.ndarray) -> None:
    """Refuse parameters that the form does not have, empty ranges and values outside their range."""
    for name in (*bounds, *fixed):
        if name not in form.param_names:
            raise LawError(f"{form.name} has no parameter {name!r}; {nearest(name, form.param_names)}")
    for name, (low, high) in bounds.items():
        if low is not None and high is not None and not low <= high:
            raise LawError(f"bounds of {name!r}: {low} is above {high}")
    for p in form.params:
        value = fixed.get(p.name)
        if value is not None and (not np.isfinite(value) or (p.kind == "log" and value < 0)):
            raise LawError(f"fixed {p.name!r} = {value!r} is outside its domain")
    if ceiling is not None and not y.max() <= ceiling:
        raise LawError(f"ceiling {ceiling:g}: y reaches {y.max():g}; give the largest value that y can take, or none")
