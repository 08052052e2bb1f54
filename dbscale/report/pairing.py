"""Pairs for a contrast: which rows of A and B belong together, and which column keeps the others apart.

`pair_rows` pairs any two values of any column of any table; `pair_arms` and `pair_upstream` are its use in a study.
Differences are judged by `dbscale.laws.judge`; nothing here knows of verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dbscale.errors import TableError
from dbscale.laws import Pairs, make_pairs
from dbscale.report.sheet import Sheet, near_spellings, shown
from dbscale.report.table import Place, Run, RunTable, Setting, student_of_size

Key = tuple[Hashable, ...]
Mistakes = Mapping[str, np.ndarray]
"""Key of a run -> which of the test samples it got wrong, booleans [samples]."""


class Difference(NamedTuple):
    """One paired difference before it becomes a row of `Pairs`."""

    key: Key
    """Values of the pair columns: the repetition, then the strata."""
    x: float
    delta: float


def pair_rows(
    sheet: Sheet, *, a: Mapping[str, str], b: Mapping[str, str], along: str, metric: str, pair: Sequence[str]
) -> tuple[Pairs, tuple[str, ...]]:
    """Δ = metric of A − metric of B, for rows that agree in `along` and in every column of `pair`.

    `a` and `b` are conditions, column -> value; the first column of `pair` names the repetition (seed), further ones are
    strata. Where the arms were measured at different `along`, both are interpolated. Returns the pairs and what a reader
    must know of them. Raises TableError for columns and values that are not there, rows that cannot be told apart, and
    where nothing pairs: with the column that keeps the arms apart.
    """
    sides = [_rows_of(sheet, conditions) for conditions in (a, b)]
    if not pair:
        raise TableError(f"{sheet.name}: no column to pair by; name the one of the repetition, such as seed")
    both = sorted(sides[0] & sides[1])
    if both:
        raise TableError(
            f"{sheet.place(both[0])} is a row of both sides; let a and b differ in the value of one column"
        )
    names = [", ".join(f"{column}={value}" for column, value in side.items()) for side in (a, b)]
    notes: list[str] = list(sheet.notes)
    one, other = (_curves(sheet, sorted(rows), along, metric, pair, notes) for rows in sides)
    found, how = _differences(one, other, along)
    points = [{(x, *key) for key, curve in side.items() for x in curve} for side in (one, other)]
    if not found:
        why = _why(points, (along, *pair), names)
        raise TableError(f"{sheet.name}: no row of {names[0]} pairs with one of {names[1]}; {why}")
    if how:
        notes += [how, *_left_over([set(one), set(other)], pair, names, "curves")]
    else:
        notes += _left_over(points, (along, *pair), names, "rows")
    return _pairs(found, len(pair) - 1), tuple(notes)


def _rows_of(sheet: Sheet, conditions: Mapping[str, str]) -> set[int]:
    rows = set(range(len(sheet)))
    for column, value in conditions.items():
        rows &= set(sheet.matches(column, value))
    if not rows or not conditions:
        wanted = " and ".join(f"{column}={value}" for column, value in conditions.items())
        raise TableError(f"{sheet.name}: no row has {wanted or 'no condition'}; each side needs COLUMN=VALUE")
    return rows


def _curves(
    sheet: Sheet, rows: Sequence[int], along: str, metric: str, pair: Sequence[str], notes: list[str]
) -> dict[Key, dict[float, float]]:
    """The curve (x -> y) of every combination of pair values. Raises TableError for two rows at one point."""
    part = sheet.take(rows)
    x, y = part.numbers(along), part.numbers(metric)
    keys = list(zip(*(_labels(part, column) for column in pair), strict=True))
    curves: dict[Key, dict[float, float]] = {}
    seen: dict[tuple[Key, float], int] = {}
    unused = 0
    for row, (key, position, value) in enumerate(zip(keys, x, y, strict=True)):
        if position is None or value is None or position <= 0:
            unused += 1
            continue
        first = seen.setdefault((key, position), row)
        if first != row:
            raise TableError(_doubled(part, first, row, (along, *pair), metric))
        curves.setdefault(key, {})[float(position)] = float(value)
    if unused:
        notes.append(f"{unused} rows without {metric}, or with {along} not above 0, were left out")
    return curves


def _labels(sheet: Sheet, column: str) -> list[Hashable]:
    labels = sheet.labels(column)
    if None in labels:
        place = sheet.place(labels.index(None))
        raise TableError(f"{place}: {column} is empty; fill it in, leave it out of the pair columns, or remove the row")
    return list(labels)


def _doubled(sheet: Sheet, first: int, second: int, columns: Iterable[str], metric: str) -> str:
    """Two rows of one point: the columns that could tell them apart are named."""
    apart = [name for name, cells in sheet.columns.items() if cells[first] != cells[second] and name != metric]
    remedy = f"pair by what tells them apart too ({', '.join(apart[:6])})" if apart else "remove one of them"
    alike = ", ".join(f"{name} {shown(sheet.columns[name][second])}" for name in columns)
    return f"{sheet.place(second)} has the {alike} of {sheet.unit} {sheet.lines[first]}; {remedy}"


def _differences(
    a: Mapping[Key, dict[float, float]], b: Mapping[Key, dict[float, float]], along: str
) -> tuple[list[Difference], str]:
    """Differences where both were measured; where that is rarely so, between straight lines in log x. Says which."""
    common = sorted(a.keys() & b.keys(), key=str)
    exact = [Difference(key, x, a[key][x] - b[key][x]) for key in common for x in sorted(a[key].keys() & b[key].keys())]
    sizes = [sum(len(side[key]) for key in common) for side in (a, b)]
    if 2 * len(exact) >= min(sizes):
        return exact, ""
    # One grid for all repetitions, or each x would have one seed: the x that all of A share, else its longest curve's.
    grid, longest = set.intersection(*(set(a[key]) for key in common)), max((a[key] for key in common), key=len)
    grid = grid if 2 * len(grid) >= len(longest) else set(longest)
    found = [
        Difference(key, x, _at(a[key], x) - _at(b[key], x))
        for key in common for x in sorted(grid) if _covers(a[key], x) and _covers(b[key], x)
    ]  # fmt: skip
    if len(found) <= len(exact):
        return exact, ""
    outside = len(grid) * len(common) - len(found)
    return found, (
        f"the two sides were not measured at the same {along}: their values at {len(grid)} {along} of a were interpolated "
        f"linearly in log {along}, each inside its own range; {outside} points lie outside of one and were left out"
    )


def _covers(curve: Mapping[float, float], x: float) -> bool:
    return min(curve) <= x <= max(curve)


def _at(curve: Mapping[float, float], x: float) -> float:
    """The straight line in log x through the curve's points, exact at each of them."""
    known = sorted(curve)
    return float(np.interp(math.log(x), np.log(known), [curve[each] for each in known]))


def _pairs(found: Sequence[Difference], num_strata: int) -> Pairs:
    """The first stratum column is one axis of the strata, all further ones together the other."""
    student = [each.key[1] for each in found] if num_strata else None
    further = [each.key[2:] for each in found]
    labels = [key[0] if len(key) == 1 else " / ".join(map(str, key)) for key in further] if num_strata > 1 else None
    return make_pairs(
        [each.x for each in found], [each.delta for each in found], seed=[each.key[0] for each in found],
        student=student, labels=labels,
    )  # fmt: skip


def _why(sides: Sequence[set[Key]], columns: Sequence[str], names: Sequence[str]) -> str:
    """The columns in which the sides share no value; without such a column an example of what only one side has."""
    values = [[{key[place] for key in side} for side in sides] for place in range(len(columns))]
    disjoint = [place for place, (one, other) in enumerate(values) if not one & other]
    if disjoint:
        return "; ".join(_values(columns[place], values[place], names) for place in disjoint)
    lone = _in_order(sides[0] - sides[1] or sides[1] - sides[0])[0]
    has, lacks = names if lone in sides[0] else names[::-1]
    row = ", ".join(f"{column} {_shown(value)}" for column, value in zip(columns, lone, strict=True))
    return f"{has} has a row with {row}, {lacks} has none" + "".join(map(_hint, values))


def _values(column: str, sides: Sequence[set[Hashable]], names: Sequence[str]) -> str:
    told = []
    for name, values in zip(names, map(_in_order, sides), strict=True):
        told.append(f"{name} has {', '.join(map(_shown, values[:4]))}{', …' if len(values) > 4 else ''}")
    return f"what keeps them apart is {column}: {', '.join(told)}{_hint(sides)}"


def _hint(sides: Sequence[set[Hashable]]) -> str:
    return "".join(f" ({hint})" for hint in near_spellings(sides[0] ^ sides[1]))


def _in_order(values: Iterable[Any]) -> list[Any]:
    """Numbers by size before words."""
    return sorted(values, key=lambda value: (isinstance(value, str), value) if not isinstance(value, tuple) else
                  tuple((isinstance(each, str), each) for each in value))  # fmt: skip


def _shown(value: Hashable) -> str:
    return shown(int(value) if isinstance(value, float) and value.is_integer() else value)


def _left_over(sides: Sequence[set[Key]], columns: Sequence[str], names: Sequence[str], what: str) -> list[str]:
    """A note on what has no partner."""
    lone = [sides[0] - sides[1], sides[1] - sides[0]]
    if not any(lone):
        return []
    counts = [
        f"{len(left)} of {len(side)} {what} of {name}"
        for left, side, name in zip(lone, sides, names, strict=True) if left
    ]  # fmt: skip
    why = _why([left or side for left, side in zip(lone, sides, strict=True)], columns, names)
    return [f"{' and '.join(counts)} have no partner; {why}"]


ARMS = ("plain", "distilled")


def pair_arms(
    table: RunTable, setting: Setting, *, metric: str = "error_rate", wrong: Mistakes | None = None
) -> tuple[Pairs | None, tuple[str, ...]]:
    """ΔE of a setting along D_p: strata are students and D_f, repetitions seeds, draws finetunes.

    `metric` is a column of runs; `wrong` gives the test set's own noise. Without a pair None, and why.
    """
    arms, notes = _by_arm(table, setting._asdict(), Place._fields, metric)
    shared = sorted(arms[0].keys() & arms[1].keys())
    if not shared:
        return None, notes
    labels, draws = ([getattr(arms[0][key], name) for key in shared] for name in ("downstream_samples", "finetune"))
    return _arm_pairs(arms, shared, metric, "key", wrong, labels=labels, draw=draws), notes


def pair_upstream(
    table: RunTable, setting: Setting, *, metric: str = "error_rate", wrong: Mistakes | None = None
) -> tuple[Pairs | None, tuple[str, ...]]:
    """The upstream runs' own ΔE along D_p, each run once, whatever was finetuned from it.

    `metric` is error_rate or test_loss, on the upstream test split. Without a pair None, and why.
    """
    fixed = {"variant": setting.variant, "upstream_dataset": setting.upstream_dataset}
    arms, notes = _by_arm(table, fixed, ("student", "upstream_samples", "seed"), f"upstream_{metric}")
    shared = sorted(arms[0].keys() & arms[1].keys())
    return (_arm_pairs(arms, shared, f"upstream_{metric}", "upstream_key", wrong) if shared else None), notes


Arms = tuple[dict[Key, Run], dict[Key, Run]]
"""Plain and distilled runs by what pairs them."""


def _by_arm(
    table: RunTable, fixed: Mapping[str, Any], columns: Sequence[str], metric: str
) -> tuple[Arms, tuple[str, ...]]:
    """Runs with the metric where the columns `fixed` have these values; and what has no partner, or several values."""
    arms, notes = _first_runs(table.pretrained.where(**fixed), columns, metric)
    if all(arms):
        return arms, (*notes, *_unpaired(arms, columns))
    # The other arm may stand elsewhere: under another name of the dataset, say.
    everywhere, _ = _first_runs(table.pretrained, (*fixed, *columns), metric)
    here = [
        {(*fixed.values(), *key) for key in side} or set(other) for side, other in zip(arms, everywhere, strict=True)
    ]
    if all(here):
        why = _why(here, (*fixed, *columns), ARMS)
        return arms, (*notes, f"no {ARMS[bool(arms[0])]} run of {', '.join(fixed.values())} has {metric}; {why}")
    return arms, (*notes, f"no {ARMS[bool(here[0])]} run has {metric}: there is nothing to compare")


def _first_runs(runs: RunTable, columns: Sequence[str], metric: str) -> tuple[Arms, list[str]]:
    """The first run of each arm and key."""
    arms: Arms = ({}, {})
    several = 0
    for run in runs:
        if run.arm in ARMS and getattr(run, metric) is not None:
            key = tuple(getattr(run, column) for column in columns)
            first = arms[ARMS.index(run.arm)].setdefault(key, run)
            several += getattr(first, metric) != getattr(run, metric)
    return arms, [f"{several} rows give another {metric} than the first row of their run, which was used"] * (
        several > 0
    )


def _unpaired(arms: Arms, columns: Sequence[str]) -> list[str]:
    """Why runs have no partner; a teacher, which has the plain arm only, misses none."""
    sides = [set(side) for side in arms]
    students = {key[0] for key in sides[0]} & {key[0] for key in sides[1]}
    if sides[0] & sides[1]:
        return _left_over([{key for key in side if key[0] in students} for side in sides], columns, ARMS, "runs")
    why = f"no plain run pairs with a distilled one; {_why(sides, columns, ARMS)}"
    unnamed = all(run.student == student_of_size(run.num_params) for side in arms for run in side.values())
    if unnamed and not students:
        why += "; the arms' models differ in size: add a column `student` that names each model alike in both arms"
    return [why]


def _arm_pairs(
    arms: Arms, shared: Sequence[Key], metric: str, file: str, wrong: Mistakes | None, **strata: Sequence[Hashable]
) -> Pairs:
    """`file` is the column that names the run whose single test results `wrong` holds."""
    both = [(arms[0][key], arms[1][key]) for key in shared]
    samples = {}
    if metric.endswith("error_rate"):
        pairs = (
            (row, _by_sample(getattr(one, file), getattr(other, file), wrong)) for row, (one, other) in enumerate(both)
        )
        samples = {row: found for row, found in pairs if found is not None}
    teachers = [other.teacher_key for _, other in both]
    return make_pairs(
        [one.upstream_samples for one, _ in both], [getattr(one, metric) - getattr(other, metric) for one, other in both],
        seed=[one.seed for one, _ in both], student=[one.student for one, _ in both],
        teacher=teachers if all(teachers) else None, by_sample=samples or None,
        test_variance=[_test_variance(one, other, metric, samples.get(row)) for row, (one, other) in enumerate(both)],
        **strata,
    )  # fmt: skip


def _by_sample(one: str, other: str, wrong: Mistakes | None) -> np.ndarray | None:
    """Error of the first − error of the second by test sample, in {-1, 0, 1} for classes; None without both."""
    a, b = (wrong or {}).get(one), (wrong or {}).get(other)
    if a is None or b is None or len(a) != len(b) or a.dtype != b.dtype:
        return None
    return a.astype(np.int8) - b.astype(np.int8) if a.dtype == bool else a.astype(np.float64) - b


def _test_variance(one: Run, other: Run, metric: str, samples: np.ndarray | None) -> float:
    """Variance of ΔE over test sets: paired by sample where single results exist, else the binomial upper bound."""
    if samples is not None:
        return float(np.var(samples) / len(samples))
    if metric != "error_rate":
        return 0.0
    return sum(run.error_rate * (1 - run.error_rate) / (run.num_test_samples or math.inf) for run in (one, other))
