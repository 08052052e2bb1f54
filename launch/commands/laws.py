"""`dbscale fit|advise`: a law for anyone's table, and whether to distill."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dbscale.errors import ConfigError, nearest
from dbscale.files import atomic_open
from launch.commands.results import grid_name
from launch.study import AddCommand, add_data, add_grid, add_store, store_of


def add_commands(add: AddCommand) -> None:
    parser = add("fit", fit, "fit a law to any CSV or parquet table")
    parser.add_argument("table", type=Path, help="rows.csv, or any table with a header")
    parser.add_argument("--law", required=True, help="name of the law; an unknown one is answered with all of them")
    parser.add_argument("--x", action="append", default=[], metavar="COLUMN | VARIABLE=COLUMN",
                        help="where the law's variable stands; repeat for laws of several")  # fmt: skip
    parser.add_argument("--y", required=True, metavar="COLUMN", help="what the law predicts")
    parser.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="use only these rows; repeatable"
    )
    parser.add_argument("--loss", default="huber_log", help="huber_log, least_squares_log, huber or least_squares")
    parser.add_argument("--bound", action="append", default=[], metavar="PARAM=LOW:HIGH",
                        help="limits of a parameter, either end may be left out or inf; repeatable")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the fit as JSON")
    parser = add("advise", advise, "distill or not, for one planned study, from a grid's rows or a table")
    for name, what in (("dp", "upstream samples"), ("df", "downstream samples"), ("params", "student's parameters")):
        parser.add_argument(f"--{name}", required=True, metavar="COUNT", help=f"{what}: 2000, 200k, 22M")
    parser.add_argument("--dataset", help="one downstream set; default: all")
    parser.add_argument("--table", type=Path, help="a rows.csv instead of the grid's own rows")
    add_grid(parser)
    add_store(parser)
    add_data(parser)


def fit(arguments: argparse.Namespace) -> int:
    from dbscale.laws import find_form, fit_law

    rows = select(read_rows(arguments.table), arguments.where)
    law = find_form(arguments.law)
    names = variable_columns(law.variable_names, arguments.x)
    x = {variable: numbers(rows, column, arguments.table) for variable, column in names.items()}
    y = numbers(rows, arguments.y, arguments.table)
    limits = bounds(arguments.bound)
    found = fit_law(arguments.law, x, y, loss=arguments.loss, bounds=limits or None, seed=arguments.seed)
    print(found.report())
    for column, values in mixed(rows, {*names.values(), arguments.y}).items():
        print(f"  warning: fitted as one although {column} differs ({', '.join(values[:6])}"
              f"{', …' if len(values) > 6 else ''}); --where {column}={values[0]} keeps one")  # fmt: skip
    if arguments.out:
        with atomic_open(arguments.out, "w") as file:
            json.dump(found.to_dict(), file, indent=1)
    return 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The table's rows by column name. Raises TableError for what is no table, ConfigError when it has no rows."""
    from dbscale.report.reduce import read_records

    rows, _ = read_records(path)
    if not rows:
        raise ConfigError(f"{path} has no rows")
    return rows


def select(rows: Sequence[Mapping[str, Any]], conditions: Sequence[str]) -> list[Mapping[str, Any]]:
    """Rows that meet every COLUMN=VALUE, compared as text."""
    found = list(rows)
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals or column not in rows[0]:
            raise ConfigError(f"--where {condition!r}: write COLUMN=VALUE; {nearest(column, list(rows[0]))}")
        found = [row for row in found if str(row[column]) == value]
    if not found:
        raise ConfigError(f"no row meets {' and '.join(conditions)}")
    return found


def variable_columns(variables: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """The column of each variable: as given, otherwise the column of the variable's own name."""
    columns = {variable: variable for variable in variables}
    for each in given:
        variable, equals, column = each.partition("=")
        if not equals and len(variables) == 1:
            variable, column = variables[0], each
        elif not equals:
            raise ConfigError(f"--x {each!r}: this law has {len(variables)} variables; write VARIABLE=COLUMN")
        if variable not in columns:
            raise ConfigError(f"--x {each!r}: no variable {variable!r}; {nearest(variable, list(variables))}")
        columns[variable] = column
    return columns


def bounds(given: Sequence[str]) -> dict[str, tuple[float | None, float | None]]:
    """Limits by parameter, as `fit_law` takes them; None leaves the form's own end."""
    limits: dict[str, tuple[float | None, float | None]] = {}
    for each in given:
        name, _, ends = each.partition("=")
        low, colon, high = ends.partition(":")
        try:
            limits[name] = (float(low) if low else None, float(high) if high else None)
        except ValueError:
            colon = ""
        if not (name and colon):
            raise ConfigError(f"--bound {each!r}: write PARAM=LOW:HIGH, for instance E0=:inf")
    return limits


def mixed(rows: Sequence[Mapping[str, Any]], used: set[str]) -> dict[str, list[str]]:
    """Columns of words, unused by the law, that sort the rows into groups: perhaps studies that do not belong together."""
    groups = {}
    for column in rows[0].keys() - used:
        values = sorted({str(row[column]) for row in rows})
        if 1 < len(values) <= len(rows) // 3 and not any(is_number(value) for value in values):
            groups[column] = values
    return dict(sorted(groups.items()))


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def numbers(rows: Sequence[Mapping[str, Any]], column: str, path: Path) -> list[float]:
    """A column as numbers. Raises ConfigError naming the nearest column, or the row that is no number."""
    if column not in rows[0]:
        raise ConfigError(f"{path}: no column {column!r}; {nearest(column, list(rows[0]))}")
    values = []
    for number, row in enumerate(rows, start=1):
        if row[column] in (None, ""):
            raise ConfigError(f"{path}, row {number}: {column} is empty; fill it in or remove the row")
        try:
            value = float(row[column])
        except (TypeError, ValueError):
            raise ConfigError(f"{path}, row {number}: {column} is {row[column]!r}, not a number") from None
        if not math.isfinite(value):
            raise ConfigError(f"{path}, row {number}: {column} is {row[column]}; remove the row or repair it")
        values.append(value)
    return values


def advise(arguments: argparse.Namespace) -> int:
    from dbscale.report.advise import advise as ask
    from dbscale.report.advise import parse_count
    from dbscale.report.mistakes import load_mistakes
    from dbscale.report.reduce import collect, load_plan, read_table

    point = [parse_count(text) for text in (arguments.dp, arguments.df, arguments.params)]
    store = store_of(arguments)
    if arguments.table is not None:
        table, wrong = read_table(arguments.table), None
    else:
        table = collect(store, load_plan(store, grid_name(arguments)))
        wrong = load_mistakes(store, table)
    print("\n\n".join(advice.text() for advice in ask(table, *point, dataset=arguments.dataset, wrong=wrong)))
    return 0
