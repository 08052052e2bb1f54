"""Check a table before it is fitted: what cannot be fitted raises LawError, what can but should not be trusted warns.

Knows rows and columns, nothing of optimisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dbscale.errors import LawError
from dbscale.laws.form import Form, as_numbers

COLLINEAR = 0.97
HUGE = 1e100
"""Beyond this, or below its inverse, a column is refused: its unit is wrong, or it is no measurement."""


@dataclass(frozen=True)
class Table:
    """Checked columns [n], positive y [n] (in log losses), weights [n] with mean 1, and what was noticed."""

    form: Form
    x: dict[str, np.ndarray]
    y: np.ndarray
    weights: np.ndarray
    warnings: tuple[str, ...]

    @property
    def num_distinct(self) -> int:
        """Number of distinct points of the variables."""
        return len(np.unique(np.stack(list(self.x.values())), axis=1).T)


def make_table(form: Form, x: Mapping[str, object] | object, y: object, weights: object, *, log_loss: bool) -> Table:
    """The table a fit sees. Raises LawError for missing, unequal, non-numeric, NaN or non-positive input."""
    columns = {name: np.atleast_1d(column) for name, column in form.columns(x).items()}
    y = np.atleast_1d(as_numbers("y", y))
    _check_lengths(columns, y)
    for name, column in columns.items():
        _check_values(name, column, positive=True)
    _check_values("y", y, positive=False)
    notes: list[str] = []
    y = _lift_zeros(y, notes) if log_loss else y
    weights = _make_weights(weights, len(y))
    form, columns = _drop_constant(form, columns, notes)
    _check_y(y, columns)
    notes += _look(columns, y)
    return Table(form, columns, y, weights, tuple(notes))


def _check_lengths(columns: Mapping[str, np.ndarray], y: np.ndarray) -> None:
    if y.ndim != 1 or any(c.ndim != 1 for c in columns.values()):
        raise LawError("columns and y must be one-dimensional")
    for name, column in columns.items():
        if len(column) != len(y):
            raise LawError(f"column {name!r} has {len(column)} rows, y has {len(y)}")
    if len(y) == 0:
        raise LawError("the table has no rows")


def _check_values(name: str, column: np.ndarray, *, positive: bool) -> None:
    """Refuse values that no law can take, naming the rows."""
    size = np.abs(column)
    apart = "a power law has no value there; keep those rows (such as 'from scratch') apart"
    _refuse(name, column, ~np.isfinite(column), "not a finite number", "drop those rows or repair them")
    if positive:
        _refuse(name, column, column <= 0, "not above 0", apart)
    absurd = (size > HUGE) | (size < 1 / HUGE) & (size > 0)
    _refuse(name, column, absurd, f"beyond {HUGE:g} or below its inverse", "change the column's unit")


def _refuse(name: str, column: np.ndarray, wrong: np.ndarray, what: str, fix: str) -> None:
    rows = np.flatnonzero(wrong)
    if rows.size:
        shown = ", ".join(str(r) for r in rows[:5]) + (" …" if rows.size > 5 else "")
        raise LawError(f"{name}: {rows.size} value(s) {what} (row index {shown}: {float(column[rows[0]])!r}); {fix}")


def _lift_zeros(y: np.ndarray, notes: list[str]) -> np.ndarray:
    """A measured error of 0 has no logarithm: it stands for 'below the smallest error seen'."""
    if np.any(y < 0):
        rows = np.flatnonzero(y < 0)
        raise LawError(
            f"y: {rows.size} negative value(s) (row index {rows[0]}: {float(y[rows[0]]):g}); use loss='least_squares'"
        )
    if not np.any(y == 0):
        return y
    if not np.any(y > 0):
        raise LawError("y is 0 in every row: nothing to fit")
    floor = 0.5 * y[y > 0].min()
    notes.append(
        f"{np.sum(y == 0)} row(s) with y = 0 were taken as {floor:.3g}, half the smallest y above 0 (log loss)"
    )
    return np.where(y == 0, floor, y)


def _make_weights(weights: object, n: int) -> np.ndarray:
    if weights is None:
        return np.ones(n)
    w = np.atleast_1d(as_numbers("weights", weights))
    if w.shape != (n,):
        raise LawError(f"weights have shape {w.shape}, y has {n} rows")
    if not np.all(np.isfinite(w)) or np.any(w < 0) or not np.any(w > 0):
        raise LawError("weights must be finite, not negative, and not all 0")
    return w


def _drop_constant(form: Form, columns: dict[str, np.ndarray], notes: list[str]) -> tuple[Form, dict[str, np.ndarray]]:
    """A variable that never changes cannot be told from the constants: drop its term where the law allows that."""
    constant = [name for name, c in columns.items() if np.all(c == c[0])]
    if not constant:
        return form, columns
    if len(constant) == len(columns):
        name = constant[0]
        raise LawError(f"{name} has one distinct value ({columns[name][0]:g}); a law needs at least three or four")
    if form.restrict is None:
        raise LawError(
            f"{form.name} needs {constant[0]} to vary; it has one distinct value ({columns[constant[0]][0]:g})"
        )
    notes.append(
        f"{', '.join(constant)} has one distinct value: its term was dropped, its effect is in the other constants"
    )
    kept = tuple(n for n in form.variable_names if n not in constant)
    return form.restrict(kept), {n: columns[n] for n in kept}


def _check_y(y: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
    if len(y) > 1 and np.all(y == y[0]):
        raise LawError(f"y is {y[0]:g} in every row: no law can be told from a constant")


def _look(columns: dict[str, np.ndarray], y: np.ndarray) -> list[str]:
    """Warnings about tables that can be fitted but mislead."""
    notes = []
    rows = np.column_stack([*columns.values(), y])
    num_copies = len(rows) - len(np.unique(rows, axis=0))
    if num_copies:
        notes.append(
            f"{num_copies} row(s) repeat another exactly; they count in the fit, not in the information criteria"
        )
    names = list(columns)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            r = _correlation(np.log(columns[a]), np.log(columns[b]))
            if abs(r) > COLLINEAR:
                notes.append(
                    f"{a} and {b} vary together (correlation of logs {r:.3f}): their terms cannot be told apart"
                )
    if len(names) == 1 and _correlation(np.log(columns[names[0]]), y) > 0.5:
        notes.append(f"y rises with {names[0]}: these laws are made for errors and losses that fall")
    if np.any(y == 1) and np.all(y <= 1):
        notes.append(f"{np.sum(y == 1)} row(s) with y = 1: at chance or ceiling, where power laws do not hold")
    return notes


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r; 0 where a column hardly varies."""
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else 0.0
