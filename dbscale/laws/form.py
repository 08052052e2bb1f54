"""What a law's form is: its equation as a pure function, its parameters, their scaling, and the laws it contains.

The optimiser works in *coordinates*: logarithms of amplitudes and the plain values of exponents and offsets, over
variables and y divided by their geometric means. A form states how its parameters move when a unit changes (`scaling`).
The laws themselves are in `forms`, fitting is left to `fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dbscale.errors import LawError, nearest

Columns = Mapping[str, np.ndarray]
Values = Mapping[str, np.ndarray]
LOG_FLOOR, LOG_CEILING = 1e-60, 1e60
"""Amplitudes below the floor count as 0."""
STEP = 1e-30  # complex step: exact to rounding, so any tiny number does


@dataclass(frozen=True)
class Variable:
    """One column of the table."""

    name: str
    symbol: str
    aliases: tuple[str, ...] = ()
    unit_of: str = ""
    """Name of the variable that shares this one's unit (and so its scale); itself when empty."""
    scaled: bool = True
    """False for columns that enter the law in absolute terms, as a teacher's loss does."""

    def found_in(self, x: Mapping[str, object]) -> str | None:
        """The name under which a table holds this variable."""
        return next((name for name in (self.name, self.symbol, *self.aliases) if name in x), None)


@dataclass(frozen=True)
class Param:
    """One parameter. `log` parameters are positive and fitted as logarithms, `linear` ones as they are."""

    name: str
    kind: str
    start: tuple[float, float]
    """Range of the first guesses, in `unit`s."""
    lower: float = -np.inf
    upper: float = np.inf
    unit: str = ""
    """'' (absolute) or the level of y that `start` multiplies: 'y_low', 'y_mid', 'y_high'."""
    is_ceiling: bool = False
    """True for a level that y approaches from below: bounded by the largest value that y can take, where it has one."""

    def __post_init__(self) -> None:
        if self.kind == "log" and not np.isfinite([self.lower, self.upper]).all():
            object.__setattr__(self, "lower", max(self.lower, LOG_FLOOR))
            object.__setattr__(self, "upper", min(self.upper, LOG_CEILING))

    @property
    def in_units_of_y(self) -> bool:
        """Offsets move with the unit of y as they are; amplitudes by the form's rules."""
        return self.kind == "linear" and self.unit != ""


@dataclass(frozen=True)
class Scaling:
    """`log amplitude = log scaled amplitude + sign * exponent * log(unit of variable)`; exponent 1 when unnamed.

    The variable is a column, or "y".
    """

    amplitude: str
    variable: str
    exponent: str | None
    sign: float


@dataclass(frozen=True)
class Contains:
    """A law that this one becomes for special values; `embed` maps the small law's parameters into this one."""

    name: str
    embed: Callable[[Mapping[str, float]], Mapping[str, float]]


@dataclass(frozen=True)
class Form:
    """A functional form, given by `value`, by `gradient`, or by both.

    `value(x, p)` is the equation: columns [n] (or broadcastable) and parameters [..., 1] give y [..., n]; it must accept
    complex parameters, from which Jacobians follow. `gradient(x, p)` gives y and one ∂y/∂parameter per name by hand,
    where speed matters; a test holds the two together.
    """

    name: str
    equation: str
    variables: tuple[Variable, ...]
    params: tuple[Param, ...]
    scaling: tuple[Scaling, ...]
    domain: str
    source: str
    value: Callable[[Columns, Values], np.ndarray] | None = None
    gradient: Callable[[Columns, Values], tuple[np.ndarray, Values]] | None = None
    contains: tuple[Contains, ...] = ()
    restrict: Callable[[tuple[str, ...]], Form] | None = None
    """Makes the form over fewer variables, where the law allows that (a grid of one model size has no M term)."""

    @property
    def param_names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.params)

    @property
    def variable_names(self) -> tuple[str, ...]:
        return tuple(v.name for v in self.variables)

    @property
    def is_log(self) -> np.ndarray:
        return np.array([p.kind == "log" for p in self.params])

    @property
    def scales_with_y(self) -> bool:
        """Whether the law keeps its form when the unit of y changes."""
        return any(rule.variable == "y" for rule in self.scaling)

    def natural(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """Coordinates [..., p] to parameters, each [..., 1] so that they broadcast against columns [n]."""
        columns = {p.name: theta[..., k, None] for k, p in enumerate(self.params)}
        return {p.name: np.exp(columns[p.name]) if p.kind == "log" else columns[p.name] for p in self.params}

    def coordinates(self, params: Mapping[str, float]) -> np.ndarray:
        """Parameters to coordinates [p]; amplitudes below the floor are lifted to it."""
        values = np.array([params[name] for name in self.param_names], dtype=float)
        return np.where(self.is_log, np.log(np.clip(values, LOG_FLOOR, LOG_CEILING)), values)

    def evaluate(self, x: Columns, theta: np.ndarray) -> np.ndarray:
        """y [..., n] at coordinates [..., p]; values outside the domain are nan or inf, without warnings."""
        with np.errstate(all="ignore"):
            p = self.natural(theta)
            if self.value is not None:
                return np.asarray(self.value(x, p))
            assert self.gradient is not None
            return self.gradient(x, p)[0]

    def jacobian(self, x: Columns, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """y [S, n] and ∂y/∂coordinates [S, p, n], by hand where the form has it, else by complex steps."""
        if self.gradient is None:
            return self.evaluate(x, theta), self.complex_step_jacobian(x, theta)
        with np.errstate(all="ignore"):
            p = self.natural(theta)
            y, by_param = self.gradient(x, p)
            rows = [by_param[q.name] * p[q.name] if q.kind == "log" else by_param[q.name] for q in self.params]
            return y, np.stack([np.broadcast_to(row, y.shape) for row in rows], axis=-2)

    def complex_step_jacobian(self, x: Columns, theta: np.ndarray) -> np.ndarray:
        """∂y/∂coordinates [S, p, n], exact to rounding for any `value` that is analytic in its parameters."""
        steps = []
        for k in range(len(self.params)):
            moved = theta.astype(complex)
            moved[..., k] += 1j * STEP
            steps.append(np.imag(self.evaluate(x, moved)) / STEP)
        return np.stack(np.broadcast_arrays(*steps), axis=-2)

    def unscaling(self, units: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """Matrix [p, p] and shift [p] that take scaled coordinates to those of the table's units."""
        place = {p.name: k for k, p in enumerate(self.params)}
        matrix = np.diag([units.get("y", 1.0) if p.in_units_of_y else 1.0 for p in self.params])
        shift = np.zeros(len(self.params))
        for rule in self.scaling:
            size = rule.sign * np.log(units.get(rule.variable, 1.0))
            if rule.exponent is None:
                shift[place[rule.amplitude]] += size
            else:
                matrix[place[rule.amplitude], place[rule.exponent]] += size
        return matrix, shift

    def columns(self, x: Mapping[str, object] | object) -> dict[str, np.ndarray]:
        """The table's columns under this form's names; names, symbols and aliases are understood, others refused."""
        if not isinstance(x, Mapping):
            if len(self.variables) != 1:
                raise LawError(f"{self.name} needs columns {', '.join(self.variable_names)}; got one array")
            x = {self.variables[0].name: x}
        if len(self.variables) == 1 and len(x) == 1:
            return {self.variables[0].name: as_numbers(*next(iter(x.items())))}
        return {v.name: self._column(v, x) for v in self.variables}

    def _column(self, variable: Variable, x: Mapping[str, object]) -> np.ndarray:
        name = variable.found_in(x)
        if name is None:
            raise LawError(f"{self.name}: column {variable.name!r} is missing; {nearest(variable.name, x)}")
        return as_numbers(name, x[name])


def as_numbers(name: str, column: object) -> np.ndarray:
    """A float array, or a LawError that names the column and its first value that is no number."""
    try:
        return np.asarray(column, dtype=float)
    except (TypeError, ValueError):
        bad = next((v for v in np.ravel(np.asarray(column, dtype=object)) if not _is_number(v)), column)
        raise LawError(f"column {name!r}: {bad!r} is not a number") from None


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True
