"""`dbscale reduce|report|export`: from rows to laws, boundary, page and figures.  `dbscale.report` does the work.

From the rows of a grid's cells, or with `--table` from a table of runs and nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dbscale.errors import ConfigError
from dbscale.launch.commands.plan import counted
from dbscale.launch.study import AddCommand, add_data, add_grid, add_store, find_cell, store_of
from dbscale.study.grid import load_grid
from dbscale.study.store import Store

if TYPE_CHECKING:
    from dbscale.report.law_findings import Options
    from dbscale.report.table import RunTable

MOST_NAMED = 3
"""Damaged cells named one by one."""


def add_commands(add: AddCommand) -> None:
    for name, run, summary in (
        ("reduce", reduce, "collect the rows of finished cells, fit the laws, print what was found"),
        ("report", report, "reduce, and write report.html"),
        ("export", export, "draw the report's figures as SVG and PDF; with a cell, write its model for timm"),
    ):
        parser = add(name, run, summary)
        add_grid(parser, bare=name != "export")
        add_store(parser)
        add_data(parser)
        add_table(parser)
        if name == "export":
            parser.add_argument("cell", nargs="?", metavar="CELL",
                                help="key or id of a finished cell: write its model instead of the figures")  # fmt: skip
            parser.add_argument("--push", metavar="hf-hub:OWNER/NAME", help="also upload the cell's model to the hub")
            parser.add_argument(
                "--private", action="store_true", help="with --push, a repository that others cannot see"
            )
            parser.add_argument("--out", type=Path,
                                help="default: <store>/grids/<name>/figures, or <store>/exports/<key>")  # fmt: skip
        else:
            parser.add_argument("--out", type=Path, help="with --table, where to write (default: beside the table)")
        parser.add_argument("--min-effect", type=float, metavar="DELTA",
                            help="with --table, smallest difference of errors that matters (default: 0.005)")  # fmt: skip
        parser.add_argument("--level", type=float, help="with --table, of all intervals (default: 0.9)")


def add_table(parser: argparse.ArgumentParser) -> None:
    """`--table`, and where in it the columns of runs stand."""
    parser.add_argument(
        "--table", type=Path, help="a table of runs instead of a grid's cells: CSV, JSON lines, Parquet or Arrow"
    )
    parser.add_argument("--column", action="append", default=[], metavar="NAME=COLUMN", dest="columns",
                        help="with --table, where a column stands that has another name there, such as "
                        "error_rate=top1_err; repeatable")  # fmt: skip


def columns_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Name of ours -> column of the table. Raises ConfigError where `=` is missing."""
    pairs = [(text, *(part.strip() for part in text.partition("="))) for text in arguments.columns]
    for text, name, equals, column in pairs:
        if not (name and equals and column):
            raise ConfigError(f"--column {text!r}: write NAME=COLUMN, such as error_rate=top1_err")
    return {name: column for _, name, _, column in pairs}


def options_of(arguments: argparse.Namespace) -> Options:
    """δ and level of a table's verdicts, which no table holds. Raises ConfigError for what is no share."""
    from dbscale.report.law_findings import Options

    known = {"min_effect": arguments.min_effect, "level": arguments.level}
    given = {name: value for name, value in known.items() if value is not None}
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if arguments.table is None:
            raise ConfigError(f"{option} belongs to --table; for a study the grid's key min_effect and 90 % hold")
        if not 0 < value < 1:
            raise ConfigError(f"{option} {value:g}: write a share between 0 and 1, such as 0.02 or 0.9")
    return Options(**given)


def reduce(arguments: argparse.Namespace) -> int:
    from dbscale.report.findings import refresh, refresh_table
    from dbscale.report.words import summary

    options = options_of(arguments)
    if arguments.table is not None:
        folder = arguments.out or arguments.table.parent
        table, findings = refresh_table(arguments.table, folder, options, columns_of(arguments))
        print(summary(findings.laws, findings.boundary))
        print(f"\n{len(table)} rows; wrote {folder / 'laws.json'} and {folder / 'boundary.json'}")
        return 0
    store, name = store_of(arguments), grid_name(arguments)
    table, findings = refresh(store, name)
    say_damaged(table)
    print(summary(findings.laws, findings.boundary))
    print(f"\n{len(table)} rows: {store.grid_dir(name) / 'rows.csv'}")
    return 0


def report(arguments: argparse.Namespace) -> int:
    options = options_of(arguments)
    if arguments.table is not None:
        from dbscale.report.page import write_table_report

        folder = arguments.out or arguments.table.parent
        path = write_table_report(arguments.table, folder, columns_of(arguments), options)
    else:
        path, _ = write_results(store_of(arguments), grid_name(arguments))
    print(path)
    return 0


def export(arguments: argparse.Namespace) -> int:
    options = options_of(arguments)
    if arguments.cell is not None:
        return export_model(arguments)
    if arguments.push is not None:
        raise ConfigError("--push uploads the model of one cell; name the cell: `dbscale export CELL --push …`")
    from dbscale.report.findings import refresh, refresh_table
    from dbscale.report.page import export_figures

    if arguments.table is not None:
        folder = arguments.out or arguments.table.parent / "figures"
        study = refresh_table(arguments.table, folder, options, columns_of(arguments))
    else:
        store, name = store_of(arguments), grid_name(arguments)
        folder = arguments.out or store.grid_dir(name) / "figures"
        study = refresh(store, name)
    paths = export_figures(*study, folder)
    print("\n".join(map(str, paths)))
    return 0


def export_model(arguments: argparse.Namespace) -> int:
    """A finished cell's weights with timm's config, recipe, row and model card; `--push` uploads them."""
    store = store_of(arguments)
    key = find_cell(store, arguments.cell)
    from dbscale.training.export import export_cell, push_export

    folder = export_cell(store, key, arguments.out or store.root / "exports" / key, arguments.data)
    print(push_export(folder, arguments.push, private=arguments.private) if arguments.push else folder)
    return 0


def grid_name(arguments: argparse.Namespace) -> str:
    return load_grid(arguments.grid, arguments.overrides).name


def write_results(store: Store, name: str) -> tuple[Path, Sequence[str]]:
    """Reduce, fit where rows changed, and write the page; returns where it is and the study's answers."""
    from dbscale.report.findings import refresh
    from dbscale.report.page import write_report

    table, findings = refresh(store, name)
    say_damaged(table)
    return write_report(store, name), findings.boundary.answers


def say_damaged(table: RunTable) -> None:
    """On stderr, which cells are left out because a file of theirs is damaged."""
    damaged = {each.culprit: each.reason for each in table.missing if each.state == "damaged"}
    for key, reason in list(damaged.items())[:MOST_NAMED]:
        print(f"damaged, left out: {key}: {reason}", file=sys.stderr)
    if damaged:
        print(
            f"left out for damage: {counted(len(damaged), 'cell')}; `dbscale submit` runs what is missing",
            file=sys.stderr,
        )


def report_is_current(store: Store, name: str, keys: Sequence[str]) -> bool:
    """Whether the page is newer than the plan, every row and every attempt it was made from."""
    folder = store.grid_dir(name)
    page = folder / "report.html"
    if not page.exists():
        return False
    sources = [folder / "plan.json", *(store.cell_dir(key) / part for key in keys for part in ("row.json", "attempts"))]
    return page.stat().st_mtime >= max(path.stat().st_mtime for path in sources if path.exists())
