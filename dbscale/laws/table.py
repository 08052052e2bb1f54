"""Check a table before it is fitted: what cannot be fitted raises LawError, what can but should not be trusted warns.

Knows rows, columns and weights, nothing of optimisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from dbscale.errors import LawError
from dbscale.laws.form import Form, as_numbers

COLLINEAR = 0.97
HUGE = 1e100
"""Beyond this, or below its inverse, a column is refused: its unit is wrong, or it is no measurement."""


def check_table(
    form: Form, x: Mapping[str, object] | object, y: object, weights: object, notes: list[str], *, is_log: bool
) -> tuple[Form, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The form over the variables that vary, its columns [n], y [n] and weights [n]; appends what was noticed.

    Raises LawError for missing, unequal, non-numeric, NaN or non-positive input.
    """
    if form.restrict is not None and isinstance(x, Mapping):
        present = tuple(v.name for v in form.variables if v.found_in(x))
        form = form.restrict(present) if present and len(present) < len(form.variables) else form
    columns = {name: np.atleast_1d(column) for name, column in form.columns(x).items()}
    y = np.atleast_1d(as_numbers("y", y))
    w = np.ones(len(y)) if weights is None else np.atleast_1d(as_numbers("weights", weights))
    for name, column in {**columns, "weights": w, "y": y}.items():
        if column.ndim != 1:
            raise LawError(f"{name} has {column.ndim} dimensions; columns and y must be one-dimensional")
        if len(column) != len(y):
            raise LawError(f"{name} has {len(column)} rows, y has {len(y)}")
    if len(y) == 0:
        raise LawError("the table has no rows")
    for name, column in columns.items():
        _refuse(name, column, column <= 0, "not above 0", "keep those rows (such as 'from scratch') apart")
    _refuse("y", y, (y < 0) & is_log, "negative", "use loss='least_squares'")
    if not np.all(np.isfinite(w)) or np.any(w < 0) or not np.any(w > 0):
        raise LawError("weights must be finite, not negative, and not all 0")
    y = _lift_zeros(y, notes) if is_log else y
    form, columns = _drop_constant(form, columns, notes)
    if len(y) > 1 and np.all(y == y[0]):
        raise LawError(f"y is {y[0]:g} in every row: no law can be told from a constant")
    _look(columns, y, notes)
    return form, columns, y, w


def _refuse(name: str, column: np.ndarray, wrong: np.ndarray, what: str, fix: str) -> None:
    """Refuse values that no law can take, naming the rows."""
    size = np.abs(column)
    absurd = (size > HUGE) | (size < 1 / HUGE) & (size > 0)
    for bad, why, mend in (
        (~np.isfinite(column), "not a finite number", "drop those rows or repair them"),
        (wrong, what, fix),
        (absurd, f"beyond {HUGE:g} or below its inverse", "change the column's unit"),
    ):
        rows = np.flatnonzero(bad)
        if rows.size:
            shown = ", ".join(map(str, rows[:5])) + (" …" if rows.size > 5 else "")
            value = float(column[rows[0]])
            raise LawError(f"{name}: {rows.size} value(s) {why} (row index {shown}: {value!r}); {mend}")


def _lift_zeros(y: np.ndarray, notes: list[str]) -> np.ndarray:
    """A measured error of 0 has no logarithm: it stands for 'below the smallest error seen'."""
    if not np.any(y > 0):
        raise LawError("y is 0 in every row: nothing to fit")
    floor, zeros = 0.5 * y[y > 0].min(), int(np.sum(y == 0))
    if zeros:
        notes.append(f"{zeros} row(s) with y = 0 were taken as {floor:.3g}, half the smallest y above 0 (log loss)")
    return np.where(y == 0, floor, y)


def _drop_constant(form: Form, columns: dict[str, np.ndarray], notes: list[str]) -> tuple[Form, dict[str, np.ndarray]]:
    """A variable that never changes cannot be told from the constants: drop its term where the law allows that."""
    constant = [name for name, c in columns.items() if np.all(c == c[0])]
    if not constant:
        return form, columns
    shown = ", ".join(f"{name} ({columns[name][0]:g})" for name in constant)
    if len(constant) == len(columns) or form.restrict is None:
        raise LawError(f"{form.name} needs its variables to vary; one distinct value of {shown}")
    notes.append(f"one distinct value of {shown}: its term was dropped, its effect is in the other constants")
    kept = tuple(n for n in form.variable_names if n not in constant)
    return form.restrict(kept), {n: columns[n] for n in kept}


def _look(columns: dict[str, np.ndarray], y: np.ndarray, notes: list[str]) -> None:
    """Warnings about tables that can be fitted but mislead."""
    rows = np.column_stack([*columns.values(), y])
    num_copies = len(rows) - len(np.unique(rows, axis=0))
    if num_copies:
        notes.append(f"{num_copies} row(s) repeat another exactly; they count in the fit")
    with np.errstate(all="ignore"):  # columns that hardly vary correlate with nothing
        r = np.nan_to_num(np.atleast_2d(np.corrcoef([*(np.log(c) for c in columns.values()), y])))
    for (i, a), (j, b) in combinations(enumerate(columns), 2):
        if abs(r[i, j]) > COLLINEAR:
            notes.append(
                f"{a} and {b} vary together (correlation of logs {r[i, j]:.3f}): their terms cannot be told apart"
            )
    if len(columns) == 1 and r[0, -1] > 0.5:
        notes.append(f"y rises with {next(iter(columns))}: these laws are made for errors and losses that fall")


def error_weights(error_rate: object, num_test: object, *, seed_stderr: object = 0.0, space: str = "log") -> np.ndarray:
    """Weights [n] = 1/variance with mean 1, for error rates measured on `num_test` samples each.

    The variance of an error rate p is p(1 − p)/num_test (binomial, p drawn in by half a sample from 0 and 1) plus
    `seed_stderr`² (from `seed_spread`, in units of the error rate); under a log loss it is divided by p².
    """
    errors, count = as_numbers("error_rate", error_rate), as_numbers("num_test", num_test)
    if np.any((errors < 0) | (errors > 1)):
        raise LawError("error_rate must lie between 0 and 1; these weights are for error rates")
    if np.any(count < 1):
        raise LawError("num_test must be at least 1")
    drawn_in = (errors * count + 0.5) / (count + 1)
    variance = drawn_in * (1 - drawn_in) / count + as_numbers("seed_stderr", seed_stderr) ** 2
    weights = 1 / (variance / drawn_in**2 if space == "log" else variance)
    return weights / weights.mean()


def seed_spread(error_rate: object, points: Sequence[object] | np.ndarray) -> np.ndarray:
    """Relative standard deviation between seeds, pooled over all points, times each error rate: [n].

    `points` labels the rows that differ in nothing but their seed. Pooling the relative spread is steadier than a
    spread per point from two or three seeds. 0 when no point was repeated.
    """
    errors = as_numbers("error_rate", error_rate)
    labels = np.unique(np.asarray(points), return_inverse=True, axis=0)[1].ravel()
    logs = np.log(np.maximum(errors, 1e-12))
    counts = np.bincount(labels)
    centred = logs - (np.bincount(labels, logs) / counts)[labels]
    spare = int(np.sum(counts - 1))
    return errors * (np.sqrt(float(np.sum(centred**2)) / spare) if spare else 0.0)
