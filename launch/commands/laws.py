"""`dbscale fit|compare|advise|allocate`: laws for anyone's table, which procedure is better, and where the money goes."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbscale.errors import ConfigError, nearest
from dbscale.files import atomic_open
from dbscale.launch.commands.results import add_table, columns_of, grid_name
from dbscale.launch.study import AddCommand, add_data, add_grid, add_json, add_store, print_json, store_of

if TYPE_CHECKING:
    from dbscale.laws import Allocation, Selection
    from dbscale.laws.form import Variable
    from dbscale.report.sheet import Sheet
    from dbscale.report.table import RunTable


def add_commands(add: AddCommand) -> None:
    parser = add("fit", fit, "fit a law to any table: CSV, JSON lines, Parquet or Arrow")
    parser.add_argument("table", type=Path, help="rows.csv, or any table with a header")
    parser.add_argument("--law", required=True, help="name of the law, or auto: all that the columns allow, averaged; "
                        "an unknown name is answered with all of them")  # fmt: skip
    parser.add_argument("--x", action="append", default=[], metavar="COLUMN | VARIABLE=COLUMN",
                        help="where the law's variable stands; repeat for laws of several")  # fmt: skip
    parser.add_argument("--y", required=True, metavar="COLUMN", help="what the law predicts")
    add_where(parser)
    parser.add_argument("--weights", metavar="COLUMN", help="relative inverse variances of the rows")
    parser.add_argument("--cluster", metavar="COLUMN", help="rows that are drawn together, such as one run's: "
                        "intervals come from resampling them, not from the curvature")  # fmt: skip
    parser.add_argument("--at", action="append", default=[], metavar="[COLUMN=]VALUE[,COLUMN=VALUE…]",
                        help="predict a measurement there, with its 90 %% interval; repeatable")  # fmt: skip
    parser.add_argument("--ceiling", type=float, help="largest value that y can take: 1 for error rates")
    parser.add_argument(
        "--loss", help="huber_log (default), least_squares_log (default of auto), huber or least_squares"
    )
    parser.add_argument("--bound", action="append", default=[], metavar="PARAM=LOW:HIGH",
                        help="limits of a parameter, either end may be left out or inf; repeatable")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the fit as JSON")
    add_json(parser)
    add_compare(add)
    parser = add("advise", advise, "distill or not, for one planned study, from a grid's rows or a table")
    for name, what in (("dp", "upstream samples"), ("df", "downstream samples"), ("params", "student's parameters")):
        parser.add_argument(f"--{name}", required=True, metavar="COUNT", help=f"{what}: 2000, 200k, 22M")
    add_json(parser)
    add_source(parser)
    parser = add("allocate", allocate, "split a budget between upstream images, model size and labels, by the laws")
    parser.add_argument("--budget", type=float, required=True, metavar="MONEY", help="in the currency of the prices")
    parser.add_argument("--price", action="append", default=[], metavar="NAME=VALUE",
                        help="upstream_image, downstream_label, train_flop, teacher_params, …; repeatable")  # fmt: skip
    add_source(parser)


def add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="use only these rows; repeatable"
    )


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", help="one downstream set; default: all")
    add_table(parser)
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
    add_where(parser)
    parser.add_argument("--level", type=float, default=0.9, help="of all intervals (default: 0.9)")
    parser.add_argument(
        "--min-effect", type=float, default=0.005, help="smallest difference that matters (default: 0.005)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawn curves")
    add_json(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write a page with the figures: DIR/compare.html")


def fit(arguments: argparse.Namespace) -> int:
    from dbscale.laws import parameter_intervals
    from dbscale.laws.forms import GRID, find_form
    from dbscale.report.reader import read_sheet

    sheet = read_sheet(arguments.table).where(arguments.where)
    is_auto = arguments.law == "auto"
    variables = auto_variables(GRID, arguments.x, sheet) if is_auto else find_form(arguments.law).variables
    names = variable_columns(variables, arguments.x, sheet)
    found = fitted({name: sheet.measured(column) for name, column in names.items()}, sheet, arguments)
    shown = found if is_auto else found.best
    intervals = found.bootstrap.interval() if arguments.cluster else parameter_intervals(found.best)
    predicted = [prediction(found, text, names) for text in arguments.at]
    used = {*names.values(), arguments.y, arguments.weights, arguments.cluster} - {None}
    warnings = [*sheet.notes, *(
        f"fitted as one although {column} differs ({', '.join(values[:6])}{', …' if len(values) > 6 else ''}); "
        f"--where {column}={values[0]} keeps one" for column, values in mixed(sheet, used).items())]  # fmt: skip
    if arguments.json:
        print_json({**shown.to_dict(), "intervals": intervals, "predictions": predicted, "table_warnings": warnings})
    else:
        print(shown.report(intervals))
        if is_auto and predicted:
            print(f"  predicted by the average of all laws with a weight above 0, not by {found.best.form.name} alone:")
        for at in predicted:
            outside = "; outside what was measured" if at["extrapolated"] else ""
            print(f"  at {at['at']}: {at['value']:.6g} (90 %: {at['low']:.6g} to {at['high']:.6g}){outside}")
        print("".join(f"  warning: {each}\n" for each in warnings), end="")
    if arguments.out:
        with atomic_open(arguments.out, "w") as file:
            json.dump(shown.to_dict(), file, indent=1)
    return 0


def fitted(x: Mapping[str, Sequence[float]], sheet: Sheet, arguments: argparse.Namespace) -> Selection:
    """The laws that were asked for: the one that was named, or all that the columns allow."""
    from dbscale.laws import select_law

    limits, is_auto = bounds(arguments.bound), arguments.law == "auto"
    if is_auto and limits:
        raise ConfigError("--bound limits one law's parameters; name the law instead of --law auto")
    return select_law(
        x, sheet.measured(arguments.y), laws=None if is_auto else [arguments.law],
        weights=sheet.measured(arguments.weights) if arguments.weights else None,
        clusters=[str(cell) for cell in sheet.cells(arguments.cluster)] if arguments.cluster else None,
        loss=arguments.loss or ("least_squares_log" if is_auto else "huber_log"),
        bounds={arguments.law: limits} if limits else None, ceiling=arguments.ceiling, num_resamples=1000,
        seed=arguments.seed,
    )  # fmt: skip


def prediction(found: Selection, text: str, names: Mapping[str, str]) -> dict[str, Any]:
    """A new measurement at one `--at`, with its 90 % interval, and whether that lies outside what was measured."""
    point = {}
    for each in text.split(","):
        column, equals, value = each.rpartition("=")
        variable = next((v for v, c in names.items() if column in (v, c)), None) if equals else next(iter(names))
        try:
            point[variable] = float(value)
        except ValueError:
            point = {}
            break
    if set(point) != set(names):
        raise ConfigError(f"--at {text!r}: write a value for each of {', '.join(f'{n}=…' for n in names.values())}")
    if not all(0 < value < math.inf for value in point.values()):
        raise ConfigError(f"--at {text!r}: laws are defined above 0 alone; write finite numbers above 0")
    (low,), (high,) = found.interval(point)
    return {"at": text, "value": float(found.predict(point)[0]), "low": float(low), "high": float(high),
            "extrapolated": found.extrapolated(point)}  # fmt: skip


def auto_variables(grid: Sequence[tuple[Variable, str, str]], given: Sequence[str], sheet: Sheet) -> list[Variable]:
    """The variables of `--law auto`: those of a study's grid that the table has or `--x` names, else the one `--x`."""
    known = [each for each, _, _ in grid]
    named = [each for each in known if any(text.partition("=")[0].strip() in
             (each.name, each.symbol, *each.aliases) for text in given)]  # fmt: skip
    if named and len(named) == len(given):
        return named
    if len(given) == 1:
        from dbscale.laws.forms import ANY

        return [ANY]
    found = [each for each in known if each.found_in(sheet.columns)]
    if given or not found:
        raise ConfigError(
            f"--law auto takes one --x COLUMN, or a study's variables: {', '.join(v.name for v in known)}"
        )
    return found


def variable_columns(variables: Sequence[Variable], given: Sequence[str], sheet: Sheet) -> dict[str, str]:
    """The column of each variable: as given, else the one with a name that the law knows it by or prints."""
    from dbscale.report.sheet import closest

    known = {name: each.name for each in variables for name in (*each.aliases, each.symbol, each.name)}
    columns = dict(assigned(each, known, sheet) for each in given)
    for each in variables:
        if columns.setdefault(each.name, each.found_in(sheet.columns) or "") == "":
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
    from dbscale.report.sheet import parse_numeral

    groups = {}
    for column in sheet.columns.keys() - used:
        values = sorted({str(cell) for cell in sheet.columns[column]})
        if 1 < len(values) <= len(sheet) // 3 and not any(map(parse_numeral, values)):
            groups[column] = values
    return dict(sorted(groups.items()))


def compare(arguments: argparse.Namespace) -> int:
    from dbscale.launch.api import compared
    from dbscale.report.law_findings import Options
    from dbscale.report.reader import read_sheet
    from dbscale.report.words import answer, evidence

    sheet = read_sheet(arguments.table).where(arguments.where)
    a, b = (dict(sheet.assignment(text, f"--{side}") for text in getattr(arguments, side)) for side in "ab")
    options = Options(level=arguments.level, min_effect=arguments.min_effect, seed=arguments.seed)
    pair = [column.strip() for column in arguments.pair.split(",") if column.strip()]
    record, notes = compared(sheet, a, b, arguments.along, arguments.metric, pair, options, arguments.table.stem)
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
    from dbscale.report.reduce import load_mistakes
    from dbscale.report.sheet import parse_count

    point = [parse_count(text) for text in (arguments.dp, arguments.df, arguments.params)]
    table = runs_of(arguments)
    no_mistakes = arguments.table is not None
    wrong, damaged = ({}, ()) if no_mistakes else load_mistakes(store_of(arguments), {run.key for run in table})
    for each in damaged:
        print(each, file=sys.stderr)
    found = ask(table, *point, dataset=arguments.dataset, wrong=wrong)
    if arguments.json:
        print_json(found)
        return 0
    print("\n\n".join(advice.text() for advice in found))
    for note in table.warnings:
        print(f"  warning: {note}")
    return 0


def runs_of(arguments: argparse.Namespace) -> RunTable:
    """The runs of `--table`, or else of the grid in its store."""
    from dbscale.report.reduce import collect, load_plan
    from dbscale.report.table import read_table

    if arguments.table is not None:
        return read_table(arguments.table, columns_of(arguments))
    store = store_of(arguments)
    return collect(store, load_plan(store, grid_name(arguments)))


def allocate(arguments: argparse.Namespace) -> int:
    from dbscale.laws import Prices
    from dbscale.laws import allocate as split
    from dbscale.report.law_findings import AXIS_NAMES, Options, arm_laws
    from dbscale.report.table import MAIN_ARMS

    prices, table = Prices(**price_options(arguments.price)), runs_of(arguments)
    laws = arm_laws(table, Options(), metrics=("error_rate",))
    settings = [each for each in table.settings if arguments.dataset in (None, each.dataset)]
    if not settings:
        raise ConfigError(f"no runs on {arguments.dataset!r}; {nearest(arguments.dataset, table.values('dataset'))}")
    for setting in settings:
        arms = {arm: law for arm in MAIN_ARMS if (law := laws.of(setting, "error_rate", arm)) is not None}
        if not arms:
            raise ConfigError(f"{setting.label(table)}: no arm has a law; `dbscale report` says why")
        first = laws.runs(setting, "error_rate", next(iter(arms))).runs[0]
        free = {name for law in arms.values() for name in law.columns}
        held = {name: float(getattr(first, name)) for name in AXIS_NAMES if name not in free}
        print("\n".join(allocation_lines(setting.label(table), split(arms, prices, arguments.budget, at=held))))
    return 0


def price_options(given: Sequence[str]) -> dict[str, Any]:
    """`Prices` by name, as `--price NAME=VALUE` gives them."""
    from dbscale.laws import Prices

    known, found = [each.name for each in fields(Prices)], {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            raise ConfigError(f"--price {text!r}: write NAME=VALUE; {nearest(name, known)}")
        try:
            found[name] = value if name == "teacher_case" else float(value)
        except ValueError:
            raise ConfigError(f"--price {text!r}: {value!r} is not a number") from None
    return found


def allocation_lines(label: str, found: Allocation) -> Iterator[str]:
    """The split as a table: each lever with its range, what it costs, and what the laws expect."""
    low, high = found.error_interval
    yield f"{label}: {found.arm} (better in {found.arm_probability:.0%} of the draws)"
    yield f"  expected error {found.expected_error:.4f} ({low:.4f} to {high:.4f})" + (
        f"; the other arm {found.other_error:.4f}" if found.other_error is not None else "")  # fmt: skip
    for name, value in found.point.items():
        few, many = found.ranges[name]
        far = "; outside what was measured" if name in found.extrapolated else ""
        yield f"  {name:20s} {value:14,.0f}   ({few:,.0f} to {many:,.0f}){far}"
    yield from (f"  {name:20s} {money:14,.2f}" for name, money in found.spend.items() if money > 0)
    for name, (value, few, many) in found.exchange_rates.items():
        yield f"  {name.replace('_', ' ')}: {value:,.3g} ({few:,.3g} to {many:,.3g})"
