"""`dbscale reduce|report|fit|advise|export`: from rows to laws, report and advice, by `dbscale.report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dbscale.study.grid import load_grid
from dbscale.study.store import Store
from launch.options import AddCommand, add_data, add_grid, add_store, store_of


def add_commands(add: AddCommand) -> None:
    for name, run, summary in (
        ("reduce", reduce, "collect the rows of finished cells and fit the laws"),
        ("report", report, "write report.html from what was reduced"),
    ):
        parser = add(name, run, summary)
        add_grid(parser)
        add_store(parser)
        add_data(parser)


def reduce(arguments: argparse.Namespace) -> int:
    from dbscale.report.reduce import reduce_grid

    name = load_grid(arguments.grid, arguments.overrides).name
    reduce_grid(store_of(arguments), name)
    print(store_of(arguments).grid_dir(name) / "rows.csv")
    return 0


def report(arguments: argparse.Namespace) -> int:
    print(write_results(store_of(arguments), load_grid(arguments.grid, arguments.overrides).name))
    return 0


def write_results(store: Store, grid_name: str) -> Path:
    """Reduce, fit and write the page."""
    from dbscale.report.page import write_report
    from dbscale.report.reduce import reduce_grid

    reduce_grid(store, grid_name)
    return write_report(store, grid_name)


def report_is_current(store: Store, grid_name: str, keys: Sequence[str]) -> bool:
    """Whether the page is newer than the plan, every row and every attempt it was made from."""
    folder = store.grid_dir(grid_name)
    page = folder / "report.html"
    if not page.exists():
        return False
    sources = [folder / "plan.json", *(store.cell_dir(key) / name for key in keys for name in ("row.json", "attempts"))]
    return page.stat().st_mtime >= max(path.stat().st_mtime for path in sources if path.exists())
