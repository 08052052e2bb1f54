"""What a law's form is: its equation as a pure function, its parameters, their scaling, and the laws it contains.

The optimiser works in *coordinates*: logarithms of amplitudes and the plain values of exponents and offsets, over
variables and y divided by their geometric means. A form states how its parameters move when a unit changes (`scaling`).
The laws themselves are in `forms`, fitting is left to `fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dbscale.errors import LawError, nearest

Columns = Mapping[str, np.ndarray]
Values = Mapping[str, np.ndarray]
Embed = Callable[[Mapping[str, float]], Mapping[str, float]]
"""Maps a small law's parameters into the law that contains it."""
LOG_FLOOR, LOG_CEILING = 1e-60, 1e60
"""Amplitudes below the floor count as 0."""
STEP = 1e-6  # of central differences, in coordinates: errors of 1e-9 of y


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
class Form:
    """A functional form, given by `value` or, where it is fitted thousands of times, by `gradient`.

    `value(x, p)` is the equation: columns [n] (or broadcastable) and parameters [..., 1] give y [..., n].
    `gradient(x, p)` gives y and one ∂y/∂parameter per name.
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
    contains: Mapping[str, Embed] = field(default_factory=dict)
    """Laws that this one becomes for special values."""
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
            return self.gradient(x, p)[0] if self.gradient else np.asarray(self.value(x, p))  # type: ignore[misc]

    def jacobian(self, x: Columns, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """y [S, n] and ∂y/∂coordinates [S, p, n]: by hand where the form has it, else by central differences."""
        with np.errstate(all="ignore"):
            if self.gradient is None:
                steps, y = STEP * np.eye(len(self.params)), self.evaluate(x, theta)
                rows = [(self.evaluate(x, theta + s) - self.evaluate(x, theta - s)) / (2 * STEP) for s in steps]
            else:
                p = self.natural(theta)
                y, slopes = self.gradient(x, p)
                rows = [slopes[q.name] * p[q.name] if q.kind == "log" else slopes[q.name] for q in self.params]
            return y, np.stack([np.broadcast_to(row, y.shape) for row in rows], axis=-2)

    def unscaling(self, units: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """Matrix [p, p] and shift [p] that take scaled coordinates to those of the table's units."""
        place = {p.name: k for k, p in enumerate(self.params)}
        # offsets move with the unit of y as they are, amplitudes by the form's rules
        matrix = np.diag([units.get("y", 1.0) if p.kind == "linear" and p.unit else 1.0 for p in self.params])
        shift = np.zeros(len(self.params))
        for rule in self.scaling:
            size = rule.sign * np.log(units.get(rule.variable, 1.0))
            if rule.exponent is None:
                shift[place[rule.amplitude]] += size
            else:
                matrix[place[rule.amplitude], place[rule.exponent]] += size
        return matrix, shift

    def columns(self, x: Mapping[str, object] | object) -> dict[str, np.ndarray]:
        """The table's columns under this form's names; names, symbols and aliases are understood, others refused.

        A law of one variable takes a single column under any name, or an array.
        """
        if not isinstance(x, Mapping):
            x = {self.variables[0].name: x}
        if len(self.variables) == 1 and len(x) == 1:
            return {self.variables[0].name: as_numbers(*next(iter(x.items())))}
        found = {v.name: v.found_in(x) for v in self.variables}
        missing = next((name for name, column in found.items() if column is None), None)
        if missing:
            raise LawError(f"{self.name}: column {missing!r} is missing; {nearest(missing, x)}")
        return {name: as_numbers(str(column), x[str(column)]) for name, column in found.items()}


def as_numbers(name: str, column: object) -> np.ndarray:
    """A float array, or a LawError that names the column and what in it is no number."""
    try:
        return np.asarray(column, dtype=float)
    except (TypeError, ValueError) as error:
        raise LawError(f"column {name!r} must hold numbers: {error}") from None
