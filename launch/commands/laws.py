"""`dbscale fit|compare|advise`: a law for anyone's table, which of two procedures is better, and whether to distill."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dbscale.errors import ConfigError, nearest
from dbscale.files import atomic_open
from launch.commands.results import grid_name
from launch.study import AddCommand, add_data, add_grid, add_store, store_of

if TYPE_CHECKING:
    from dbscale.laws.form import Variable
    from dbscale.report.sheet import Sheet


def add_commands(add: AddCommand) -> None:
    parser = add("fit", fit, "fit a law to any table: CSV, JSON lines, Parquet or Arrow")
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
    add_compare(add)
    parser = add("advise", advise, "distill or not, for one planned study, from a grid's rows or a table")
    for name, what in (("dp", "upstream samples"), ("df", "downstream samples"), ("params", "student's parameters")):
        parser.add_argument(f"--{name}", required=True, metavar="COUNT", help=f"{what}: 2000, 200k, 22M")
    parser.add_argument("--dataset", help="one downstream set; default: all")
    parser.add_argument("--table", type=Path, help="a rows.csv instead of the grid's own rows")
    add_grid(parser)
    add_store(parser)
    add_data(parser)


def add_compare(add: AddCommand) -> None:
    parser = add("compare", compare, "which of two procedures is better, along any column of any table")
    parser.add_argument("table", type=Path, help="any table with a header")
    for side in "ab":
        parser.add_argument(f"--{side}", action="append", required=True, metavar="COLUMN=VALUE",
                            help="the rows of this side; repeatable")  # fmt: skip
    parser.add_argument("--along", required=True, metavar="COLUMN", help="the axis, such as flops or upstream_samples")
    parser.add_argument("--metric", required=True, metavar="COLUMN", help="what is compared; lower is better")
    parser.add_argument("--pair", default="seed", metavar="COLUMN[,COLUMN…]",
                        help="columns in which pairs agree: the repetition, then strata (default: seed)")  # fmt: skip
    parser.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="use only these rows; repeatable"
    )
    parser.add_argument("--level", type=float, default=0.9, help="of all intervals (default: 0.9)")
    parser.add_argument(
        "--min-effect", type=float, default=0.005, help="smallest difference that matters (default: 0.005)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawn curves")
    parser.add_argument("--json", action="store_true", help="print the verdict as boundary.json would hold it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write a page with the figures: DIR/compare.html")


def fit(arguments: argparse.Namespace) -> int:
    from dbscale.laws import find_form, fit_law
    from dbscale.report.reader import read_sheet

    sheet = read_sheet(arguments.table).where(arguments.where)
    names = variable_columns(find_form(arguments.law).variables, arguments.x, sheet)
    x = {variable: sheet.measured(column) for variable, column in names.items()}
    y = sheet.measured(arguments.y)
    limits = bounds(arguments.bound)
    found = fit_law(arguments.law, x, y, loss=arguments.loss, bounds=limits or None, seed=arguments.seed)
    print(found.report())
    for note in sheet.notes:
        print(f"  warning: {note}")
    for column, values in mixed(sheet, {*names.values(), arguments.y}).items():
        print(f"  warning: fitted as one although {column} differs ({', '.join(values[:6])}"
              f"{', …' if len(values) > 6 else ''}); --where {column}={values[0]} keeps one")  # fmt: skip
    if arguments.out:
        with atomic_open(arguments.out, "w") as file:
            json.dump(found.to_dict(), file, indent=1)
    return 0


def variable_columns(variables: Sequence[Variable], given: Sequence[str], sheet: Sheet) -> dict[str, str]:
    """The column of each variable: as given, else the one with a name that the law knows it by or prints."""
    from dbscale.report.sheet import closest

    known = {name: each.name for each in variables for name in (*each.aliases, each.symbol, each.name)}
    columns = dict(assigned(each, known, sheet) for each in given)
    for each in variables:
        found = next((name for name in (each.name, each.symbol, *each.aliases) if name in sheet.columns), None)
        if columns.setdefault(each.name, found or "") == "":
            raise ConfigError(f"{sheet.name}: no column for the law's {each.name} ({each.symbol}); write "
                              f"--x {each.name}=COLUMN; {closest(each.name, sheet.columns)}")  # fmt: skip
    return columns


def assigned(text: str, known: Mapping[str, str], sheet: Sheet) -> tuple[str, str]:
    """Variable and column of one `--x`. Only a variable is split from its column: names of columns may hold `=`."""
    left, equals, right = (part.strip() for part in text.partition("="))
    variables = list(dict.fromkeys(known.values()))
    if equals and left in known and (right in sheet.columns or text not in sheet.columns):
        return known[left], right
    if len(variables) == 1:
        return variables[0], text
    raise ConfigError(f"--x {text!r}: write VARIABLE=COLUMN for one of the law's {len(variables)} variables; "
                      f"{nearest(left, variables)}")  # fmt: skip


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


def mixed(sheet: Sheet, used: set[str]) -> dict[str, list[str]]:
    """Columns of words, unused by the law, that sort the rows into groups: perhaps studies that do not belong together."""
    from dbscale.report.numerals import parse_numeral

    groups = {}
    for column in sheet.columns.keys() - used:
        values = sorted({str(cell) for cell in sheet.columns[column]})
        if 1 < len(values) <= len(sheet) // 3 and not any(map(parse_numeral, values)):
            groups[column] = values
    return dict(sorted(groups.items()))


def compare(arguments: argparse.Namespace) -> int:
    from dbscale.report.findings import Options, contrast
    from dbscale.report.pairing import pair_rows
    from dbscale.report.reader import read_sheet
    from dbscale.report.words import answer, evidence

    sheet = read_sheet(arguments.table).where(arguments.where)
    sides = [dict(sheet.assignment(text, f"--{side}") for text in getattr(arguments, side)) for side in "ab"]
    pair = [column.strip() for column in arguments.pair.split(",") if column.strip()]
    pairs, notes = pair_rows(sheet, a=sides[0], b=sides[1], along=arguments.along, metric=arguments.metric, pair=pair)
    names = {
        "column": ", ".join(sides[0]), "a": ", ".join(sides[0].values()), "b": ", ".join(sides[1].values()),
        "along": arguments.along, "dataset": arguments.table.stem,
    }  # fmt: skip
    options = Options(level=arguments.level, min_effect=arguments.min_effect, seed=arguments.seed)
    record = contrast(pairs, names, arguments.metric, options)
    if arguments.json:
        print(record.model_dump_json(indent=1))
    else:
        text = answer(record)
        print("\n".join([text[:1].upper() + text[1:], *evidence(record), *(f"  note: {note}" for note in notes)]))
    if arguments.out is not None:
        from dbscale.report.page import compare_page

        print(compare_page(record, arguments.out, notes=notes))
    return 0


def advise(arguments: argparse.Namespace) -> int:
    from dbscale.report.advise import advise as ask
    from dbscale.report.findings import load_mistakes
    from dbscale.report.numerals import parse_count
    from dbscale.report.reduce import collect, load_plan
    from dbscale.report.table import read_table

    point = [parse_count(text) for text in (arguments.dp, arguments.df, arguments.params)]
    store = store_of(arguments)
    if arguments.table is not None:
        table, wrong = read_table(arguments.table), None
    else:
        table = collect(store, load_plan(store, grid_name(arguments)))
        wrong = load_mistakes(store, {run.key for run in table})
    print("\n\n".join(advice.text() for advice in ask(table, *point, dataset=arguments.dataset, wrong=wrong)))
    return 0
