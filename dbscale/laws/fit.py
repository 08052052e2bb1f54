"""Fit one law to one table: scale, start from everywhere, minimise, and say how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from dbscale.errors import LawError, NotEnoughData, nearest
from dbscale.laws.form import Form
from dbscale.laws.forms import find_form
from dbscale.laws.law_fit import LawFit
from dbscale.laws.losses import Loss, make_loss
from dbscale.laws.solver import Minima, Problem, minimise
from dbscale.laws.starts import best_starts
from dbscale.laws.table import Table, make_table

Bounds = Mapping[str, tuple[float | None, float | None]]
REFINED_STARTS, RACE_STEPS, RACE_WINNERS = 24, 10, 6
SAME_OBJECTIVE = 1e-6


def fit_law(
    form: str | Form,
    x: Mapping[str, object] | object,
    y: object,
    *,
    weights: object = None,
    loss: str | Loss = "huber_log",
    bounds: Bounds | None = None,
    fixed: Mapping[str, float] | None = None,
    seed: int = 0,
) -> LawFit:
    """Fit `form` to y [n] over columns x (each [n]); minimises Σ weight·loss(residual).

    `bounds` maps parameters to (low, high), None meaning open; `fixed` maps them to values; both in the table's units.
    Weights are relative: `weights.py` makes them from test-set sizes and seeds. Deterministic for a given seed.
    Raises LawError for tables, names or options that cannot be fitted, NotEnoughData for too few distinct points.
    """
    return fit_in(
        Search.make(find_form(form), x, y, weights, make_loss(loss), dict(bounds or {}), dict(fixed or {}), seed)
    )


def fit_in(search: Search) -> LawFit:
    """Run a search to its end; contained laws that it has already found are not searched for again."""
    num_free = len(search.table.form.params) - len(search.fixed)
    if search.table.num_distinct < num_free:
        raise NotEnoughData(
            f"{search.table.form.name} has {num_free} free parameters, "
            f"the table {search.table.num_distinct} distinct points: fix parameters, or use a smaller law"
        )
    return finish(search, search.run(search.table.form))


def _restricted(form: Form, x: object) -> Form:
    """Laws over several variables may be fitted without one of them when its column is absent."""
    if form.restrict is None or not isinstance(x, Mapping):
        return form
    present = tuple(v.name for v in form.variables if any(n in x for n in (v.name, v.symbol, *v.aliases)))
    return form.restrict(present) if present and len(present) < len(form.variables) else form


def check_names(form: Form, bounds: Bounds, fixed: Mapping[str, float]) -> None:
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


@dataclass
class Search:
    """One fit in progress: the table and options, and the optima of contained laws found so far."""

    table: Table
    loss: Loss
    bounds: Bounds
    fixed: Mapping[str, float]
    seed: int
    found: dict[str, tuple[Problem, Minima]] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        form: Form,
        x,
        y,
        weights,
        loss: Loss,
        bounds: Bounds,
        fixed: Mapping[str, float],
        seed: int,
        found: dict | None = None,
    ) -> Search:
        """Check the table and the options."""
        table = make_table(_restricted(form, x), x, y, weights, log_loss=loss.is_log)
        check_names(table.form, bounds, fixed)
        return cls(table, loss, bounds, fixed, seed, {} if found is None else found)

    def units(self, form: Form) -> dict[str, float]:
        """Geometric means; 1 where a bounded or fixed amplitude would no longer be a box in scaled coordinates."""
        pinned = {
            rule.variable for rule in form.scaling if rule.amplitude in self.bounds or rule.amplitude in self.fixed
        }
        shared = {v.name: v.unit_of or v.name for v in form.variables}
        pinned = {shared[name] for name in pinned}
        means = {name: float(np.exp(np.mean(np.log(c)))) for name, c in self.table.x.items()}
        plain = {v.name for v in form.variables if not v.scaled or shared[v.name] in pinned}
        return {name: 1.0 if name in plain else means[shared[name]] for name in form.variable_names}

    def problem(self, form: Form) -> Problem:
        units = self.units(self.table.form)
        target = np.log(self.table.y) if self.loss.is_log else self.table.y
        lower, upper = make_box(form, self.bounds, self.fixed, self.table.y)
        return Problem(form, {n: c / units[n] for n, c in self.table.x.items()}, target, self.loss, lower, upper)

    def run(self, form: Form) -> tuple[Problem, Minima]:
        """The best optimum first: from contained laws (so that none fits better) and from a wide spread."""
        if form.name in self.found:
            return self.found[form.name]
        problem = self.problem(form)
        spread = best_starts(problem, self.table.y, self.table.weights, keep=REFINED_STARTS, seed=self.seed)
        starts = [self.race(problem, spread)]
        for inner in form.contains:
            small = find_form(inner.name, form.variable_names)
            if set(small.variable_names) <= set(form.variable_names):
                starts.insert(0, self.embedded(form, small, inner.embed)[None])
        minima = minimise(problem, np.concatenate(starts), self.table.weights[None, :])
        order = np.argsort(minima.objective, kind="stable")
        best = Minima(minima.theta[order], minima.objective[order], minima.converged[order])
        if not np.isfinite(best.objective[0]):
            raise LawError(f"{form.name}: no start lies in its domain ({form.domain}); check bounds and units")
        self.found[form.name] = problem, best
        return problem, best

    def race(self, problem: Problem, starts: np.ndarray) -> np.ndarray:
        """The best few of many starts after some steps each."""
        early = minimise(problem, starts, self.table.weights[None, :], max_steps=RACE_STEPS)
        return early.theta[np.argsort(early.objective, kind="stable")[:RACE_WINNERS]]

    def embedded(self, form: Form, small: Form, embed) -> np.ndarray:
        """Coordinates [p] at which `form` equals the best fit of the law it contains."""
        theta = self.run(small)[1].theta[0]
        values = {name: float(v[0]) for name, v in small.natural(theta).items()}
        return form.coordinates(embed(values))


def make_box(form: Form, bounds: Bounds, fixed: Mapping[str, float], y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper coordinates [p]; a fixed parameter has both equal."""
    ceilings = [1.0 if p.rate_ceiling and y.max() <= 1 else p.upper for p in form.params]
    defaults = [(p.lower, c) for p, c in zip(form.params, ceilings, strict=True)]
    box = np.array([_range(p.name, d, bounds, fixed) for p, d in zip(form.params, defaults, strict=True)])
    logs = form.is_log[:, None]
    return tuple(np.where(logs, np.log(np.where(logs, np.maximum(box, 1e-300), 1.0)), box).T)  # type: ignore[return-value]


def _range(name: str, default: tuple[float, float], bounds: Bounds, fixed: Mapping[str, float]) -> tuple[float, float]:
    if name in fixed:
        return fixed[name], fixed[name]
    low, high = bounds.get(name, (None, None))
    return default[0] if low is None else low, default[1] if high is None else high


def finish(search: Search, solved: tuple[Problem, Minima]) -> LawFit:
    """The value handed to the user: optimum, covariance, what lies at a bound, and what to be wary of."""
    from dbscale.laws.covariance import theta_covariance, weak_params

    problem, minima = solved
    form, theta = search.table.form, minima.theta[0]
    near = 1e-6 * (1 + np.abs(theta))
    stuck = (theta - problem.lower < near) | (problem.upper - theta < near)
    at_bound = tuple(n for n, s in zip(form.param_names, stuck, strict=True) if s and n not in search.fixed)
    covariance = theta_covariance(problem, theta, search.table.weights, free=~stuck)
    reached = minima.objective <= minima.objective[0] * (1 + SAME_OBJECTIVE) + 1e-300
    notes = (*search.table.warnings, *weak_params(form, covariance, ~stuck), *_doubts(search, form, minima))
    return LawFit(
        form=form,
        theta=theta,
        theta_covariance=covariance,
        units=search.units(form),
        objective=float(minima.objective[0]),
        loss=search.loss,
        x=search.table.x,
        y=search.table.y,
        weights=search.table.weights,
        lower=problem.lower,
        upper=problem.upper,
        num_starts=len(reached),
        num_starts_reached=int(reached.sum()),
        fixed=tuple(n for n in form.param_names if n in search.fixed),
        at_bound=at_bound,
        warnings=notes,
        seed=search.seed,
    )


def _doubts(search: Search, form: Form, minima: Minima) -> list[str]:
    notes, table = [], search.table
    if table.num_distinct <= len(form.params) + 1:
        notes.append(
            f"{table.num_distinct} distinct points for {len(form.params)} parameters: the fit all but interpolates"
        )
    if not minima.converged[0]:
        notes.append("the optimiser stopped before it converged")
    for p in form.params:
        if p.rate_ceiling and table.y.max() <= 1 and p.name not in (*search.bounds, *search.fixed):
            notes.append(f"{p.name} was held at or below 1, as for error rates; for losses give it bounds (None, inf)")
    return notes
