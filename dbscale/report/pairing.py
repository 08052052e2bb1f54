"""Pairs for a contrast: which rows of A and B belong together, and which column keeps the others apart.

`pair_rows` pairs any two values of any column of any table; `pair_arms` and `pair_upstream` are its use in a study.
Differences are judged by `dbscale.laws.judge`; nothing here knows of verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbscale.errors import TableError
from dbscale.laws import Pairs, make_pairs
from dbscale.report.sheet import Sheet, near_spellings, shown
from dbscale.report.table import MAIN_ARMS, PLACE, Run, RunTable, Setting, student_of_size

Key = tuple[Hashable, ...]
Curves = dict[Key, dict[float, float]]
"""Values of the pair columns (the repetition, then the strata) -> x -> y."""
Mistakes = Mapping[str, np.ndarray]
"""Key of a run -> [samples]: which of the test samples it got wrong, or what each adds to the error of a dense task."""


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
    for row in sorted(sides[0] & sides[1]):
        raise TableError(f"{sheet.place(row)} is a row of both sides; let a and b differ in the value of one column")
    names = [", ".join(f"{column}={value}" for column, value in side.items()) for side in (a, b)]
    notes = list(sheet.notes)
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
    x, delta, keys = zip(*found, strict=True)
    further = [key[2:] for key in keys]  # together one axis of the strata, the first stratum column is the other
    labels = [key[0] if len(key) == 1 else " / ".join(map(str, key)) for key in further] if len(pair) > 2 else None
    student = [key[1] for key in keys] if len(pair) > 1 else None
    return make_pairs(x, delta, seed=[key[0] for key in keys], student=student, labels=labels), tuple(notes)


def _rows_of(sheet: Sheet, conditions: Mapping[str, str]) -> set[int]:
    rows = set.intersection(set(range(len(sheet))), *(set(sheet.matches(*each)) for each in conditions.items()))
    if not rows or not conditions:
        wanted = " and ".join(f"{column}={value}" for column, value in conditions.items())
        raise TableError(f"{sheet.name}: no row has {wanted or 'no condition'}; each side needs COLUMN=VALUE")
    return rows


def _curves(
    sheet: Sheet, rows: Sequence[int], along: str, metric: str, pair: Sequence[str], notes: list[str]
) -> Curves:
    """The curve of every combination of pair values. Raises TableError for two rows at one point."""
    part = sheet.take(rows)
    columns = [part.labels(column) for column in pair]
    for column, labels in zip(pair, columns, strict=True):
        if None in labels:
            raise TableError(f"{part.place(labels.index(None))}: {column} is empty; fill it in, leave it out of the pair "
                             "columns, or remove the row")  # fmt: skip
    seen: dict[tuple[Key, float], int] = {}
    curves: Curves = {}
    unused = 0
    for row, (x, y, *key) in enumerate(zip(part.numbers(along), part.numbers(metric), *columns, strict=True)):
        if x is None or y is None or x <= 0:
            unused += 1
            continue
        first = seen.setdefault((tuple(key), x), row)
        if first != row:
            raise TableError(_doubled(part, first, row, (along, *pair), metric))
        curves.setdefault(tuple(key), {})[float(x)] = float(y)
    if unused:
        notes.append(f"{unused} rows without {metric}, or with {along} not above 0, were left out")
    return curves


def _doubled(sheet: Sheet, first: int, second: int, columns: Iterable[str], metric: str) -> str:
    """Two rows of one point: the columns that could tell them apart are named."""
    apart = [name for name, cells in sheet.columns.items() if cells[first] != cells[second] and name != metric]
    remedy = f"pair by what tells them apart too ({', '.join(apart[:6])})" if apart else "remove one of them"
    alike = ", ".join(f"{name} {shown(sheet.columns[name][second])}" for name in columns)
    return f"{sheet.place(second)} has the {alike} of {sheet.unit} {sheet.lines[first]}; {remedy}"


def _differences(a: Curves, b: Curves, along: str) -> tuple[list[tuple[float, float, Key]], str]:
    """(x, Δ, key) where both were measured; where that is rarely so, between straight lines in log x. Says which."""
    common = sorted(a.keys() & b.keys(), key=str)
    exact = [(x, a[key][x] - b[key][x], key) for key in common for x in sorted(a[key].keys() & b[key].keys())]
    if 2 * len(exact) >= min(sum(len(side[key]) for key in common) for side in (a, b)):
        return exact, ""
    # One grid for all repetitions, or each x would have one seed: the x that all of A share, else its longest curve's.
    grid, longest = set.intersection(*(set(a[key]) for key in common)), max((a[key] for key in common), key=len)
    grid = grid if 2 * len(grid) >= len(longest) else set(longest)
    found = [
        (x, _at(a[key], x) - _at(b[key], x), key) for key in common for x in sorted(grid)
        if all(min(side[key]) <= x <= max(side[key]) for side in (a, b))
    ]  # fmt: skip
    if len(found) <= len(exact):
        return exact, ""
    outside = len(grid) * len(common) - len(found)
    return found, (
        f"the two sides were not measured at the same {along}: their values at {len(grid)} {along} of a were interpolated "
        f"linearly in log {along}, each inside its own range; {outside} points lie outside of one and were left out"
    )


def _at(curve: Mapping[float, float], x: float) -> float:
    """The straight line in log x through the curve's points, exact at each of them."""
    known = sorted(curve)
    return float(np.interp(math.log(x), np.log(known), [curve[each] for each in known]))


# Why rows have no partner.


def _left_over(sides: Sequence[set[Key]], columns: Sequence[str], names: Sequence[str], what: str) -> list[str]:
    """A note on what has no partner."""
    lone = [sides[0] - sides[1], sides[1] - sides[0]]
    counts = [
        f"{len(left)} of {len(side)} {what} of {name}"
        for left, side, name in zip(lone, sides, names, strict=True) if left
    ]  # fmt: skip
    why = _why([left or side for left, side in zip(lone, sides, strict=True)], columns, names, lone) if counts else ""
    return [f"{' and '.join(counts)} have no partner; {why}"] if counts else []


def _why(sides: Sequence[set[Key]], columns: Sequence[str], names: Sequence[str], lone: Sequence[set[Key]] = ()) -> str:
    """The columns in which the sides share no value; without such a column an example of what only one side has: one of
    `lone`, by default any of the sides, which have nothing in common then."""
    values = [[{key[place] for key in side} for side in sides] for place in range(len(columns))]
    hints = ["".join(f" ({hint})" for hint in near_spellings(one ^ other)) for one, other in values]
    apart = [
        f"what keeps them apart is {column}: {names[0]} has {_few(one)}, {names[1]} has {_few(other)}{hint}"
        for column, (one, other), hint in zip(columns, values, hints, strict=True) if not one & other
    ]  # fmt: skip
    if apart:
        return "; ".join(apart)
    first, second = lone or sides
    has, lacks = names if first else names[::-1]
    example = min(first or second, key=_rank)
    row = ", ".join(f"{column} {_few([value])}" for column, value in zip(columns, example, strict=True))
    return f"{has} has a row with {row}, {lacks} has none" + "".join(hints)


def _few(values: Iterable[Any]) -> str:
    """The first four values, numbers by size before words."""
    plain = [int(v) if isinstance(v, float) and v.is_integer() else v for v in sorted(values, key=_rank)]
    return ", ".join(map(shown, plain[:4])) + (", …" if len(plain) > 4 else "")


def _rank(value: Any) -> tuple[Any, ...]:
    return tuple(map(_rank, value)) if isinstance(value, tuple) else (isinstance(value, str), value)


# The arms of a study.

Sides = tuple[dict[Key, Run], dict[Key, Run]]
"""Runs of both arms by what pairs them."""


def pair_arms(
    table: RunTable, setting: Setting, *, metric: str = "error_rate", wrong: Mistakes | None = None,
    arms: tuple[str, str] = MAIN_ARMS,
) -> tuple[Pairs | None, tuple[str, ...]]:  # fmt: skip
    """ΔE of a setting along D_p, first arm minus second: strata are students and D_f, repetitions seeds, draws finetunes.

    `metric` is a column of runs; `wrong` gives the test set's own noise. Without a pair None, and why.
    """
    return _Pairing(table, setting._asdict(), PLACE, metric, arms).pairs("key", wrong)


def pair_upstream(
    table: RunTable, setting: Setting, *, metric: str = "error_rate", wrong: Mistakes | None = None,
    arms: tuple[str, str] = MAIN_ARMS,
) -> tuple[Pairs | None, tuple[str, ...]]:  # fmt: skip
    """The upstream runs' own ΔE along D_p, each run once, whatever was finetuned from it.

    `metric` is error_rate or test_loss, on the upstream test split. Without a pair None, and why.
    """
    fixed = {"variant": setting.variant, "upstream_dataset": setting.upstream_dataset}
    columns = ("student", "upstream_samples", "seed")
    return _Pairing(table, fixed, columns, f"upstream_{metric}", arms).pairs("upstream_key", wrong)


@dataclass(frozen=True)
class _Pairing:
    """Which runs are paired: those in which the columns `fixed` have these values, by `columns`."""

    table: RunTable
    fixed: Mapping[str, Any]
    columns: Sequence[str]
    metric: str
    arms: tuple[str, str]

    def pairs(self, file: str, wrong: Mistakes | None) -> tuple[Pairs | None, tuple[str, ...]]:
        """The pairs, and what has no partner; `file` names the run whose test results `wrong` holds."""
        runs, notes = self._first_runs(self.table.pretrained.where(**self.fixed), self.columns)
        sides = [set(side) for side in runs]
        shared = sorted(sides[0] & sides[1])
        if not shared:
            return None, (*notes, self._no_pair(runs))
        # A teacher, which has the plain arm only, misses no partner.
        students = {key[0] for key in sides[0]} & {key[0] for key in sides[1]}
        own = [{key for key in side if key[0] in students} for side in sides]
        both = [(runs[0][key], runs[1][key]) for key in shared]
        left = _left_over(own, self.columns, self.arms, "runs")
        return _arm_pairs(both, self.columns, self.metric, file, wrong), (*notes, *left)

    def _first_runs(self, runs: RunTable, columns: Sequence[str]) -> tuple[Sides, list[str]]:
        """The first run of each arm and key."""
        found: Sides = ({}, {})
        several = 0
        for run in runs:
            if run.arm in self.arms and getattr(run, self.metric) is not None:
                side = found[self.arms.index(run.arm)]
                first = side.setdefault(tuple(getattr(run, column) for column in columns), run)
                several += getattr(first, self.metric) != getattr(run, self.metric)
        told = f"{several} rows give another {self.metric} than the first row of their run, which was used"
        return found, [told] if several else []

    def _no_pair(self, runs: Sides) -> str:
        """What keeps the arms apart; an arm that is not here may stand elsewhere, under another name of the dataset, say."""
        columns, fixed, (a, b) = self.columns, self.fixed, self.arms
        if all(runs):
            why = f"no {a} run pairs with a {b} one; {_why([set(side) for side in runs], columns, self.arms)}"
            unnamed = all(run.student == student_of_size(run.num_params) for side in runs for run in side.values())
            if unnamed and not {key[0] for key in runs[0]} & {key[0] for key in runs[1]}:
                why += (
                    "; the arms' models differ in size: add a column `student` that names each model alike in both arms"
                )
            return why
        everywhere, _ = self._first_runs(self.table.pretrained, (*fixed, *columns))
        here = [
            {(*fixed.values(), *key) for key in side} or set(other)
            for side, other in zip(runs, everywhere, strict=True)
        ]  # fmt: skip
        if all(here):
            why = _why(here, (*fixed, *columns), self.arms)
            return f"no {self.arms[bool(runs[0])]} run of {', '.join(fixed.values())} has {self.metric}; {why}"
        return f"no {self.arms[bool(here[0])]} run has {self.metric}: there is nothing to compare"


def _arm_pairs(
    both: Sequence[tuple[Run, Run]], columns: Sequence[str], metric: str, file: str, wrong: Mistakes | None
) -> Pairs:
    samples = {}
    for row, (one, other) in enumerate(both if metric.endswith("error_rate") else ()):
        a, b = ((wrong or {}).get(getattr(run, file)) for run in (one, other))
        if a is not None and b is not None and len(a) == len(b) and a.dtype == b.dtype:
            # Booleans of a classification; of another task what each sample adds to the error.
            samples[row] = a.astype(np.int8) - b.astype(np.int8) if a.dtype == bool else a.astype(np.float64) - b
    strata = {"labels": "downstream_samples", "draw": "finetune"}
    teachers = [other.teacher_key for _, other in both]
    return make_pairs(
        [one.upstream_samples for one, _ in both], [getattr(one, metric) - getattr(other, metric) for one, other in both],
        seed=[one.seed for one, _ in both], student=[one.student for one, _ in both],
        teacher=teachers if all(teachers) else None, by_sample=samples or None,
        test_variance=[_test_variance(pair, metric, samples.get(row)) for row, pair in enumerate(both)],
        **{name: [getattr(one, column) for one, _ in both] for name, column in strata.items() if column in columns},
    )  # fmt: skip


def _test_variance(pair: tuple[Run, Run], metric: str, samples: np.ndarray | None) -> float:
    """Variance of ΔE over test sets: paired by sample where single results exist, else the binomial upper bound."""
    if samples is not None:
        return float(np.var(samples) / len(samples))
    if metric != "error_rate":
        return 0.0
    return sum(run.error_rate * (1 - run.error_rate) / (run.num_test_samples or math.inf) for run in pair)
