"""A grid's findings in the store: fitted anew only when its rows, its missing cells or the way of fitting changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from dbscale import __version__
from dbscale.errors import ConfigError
from dbscale.report import schema
from dbscale.report.csv_rows import to_csv
from dbscale.report.fits import METHOD_VERSION, Findings, Options, fit_grid
from dbscale.report.mistakes import load_mistakes
from dbscale.report.reduce import read_table, reduce_grid
from dbscale.report.schema import BoundaryFile, LawsFile
from dbscale.report.table import RunTable
from dbscale.study.cell import canonical_json
from dbscale.study.store import Store

QUESTION = "Does distilling from a smaller teacher pay, and up to how many upstream images?"
"""Of a table that comes without a grid."""


def refresh(store: Store, grid_name: str, options: Options | None = None) -> tuple[RunTable, Findings]:
    """Reduce and, where needed, fit; rows.csv, rows.parquet, laws.json and boundary.json are current afterwards."""
    table = reduce_grid(store, grid_name)
    return table, _current(table, store.grid_dir(grid_name), options or Options(), lambda: load_mistakes(store, table))


def refresh_table(path: Path, folder: Path, options: Options | None = None) -> tuple[RunTable, Findings]:
    """The same from a table alone, anyone's: laws.json and boundary.json in `folder` are current afterwards."""
    path = path.resolve()
    name = path.parent.name if path.stem == "rows" else path.stem
    table = replace(read_table(path), grid=name, question=QUESTION)
    return table, _current(table, folder, options or Options(), dict)


def _current(
    table: RunTable, folder: Path, options: Options, load_wrong: Callable[[], dict[str, np.ndarray]]
) -> Findings:
    """The findings stored in `folder` where they are of this table, else new ones."""
    wanted = digest(table, options)
    try:
        found = Findings(
            schema.read(LawsFile, folder / "laws.json"), schema.read(BoundaryFile, folder / "boundary.json")
        )
    except (ConfigError, ValueError):
        found = None
    if found is None or (found.laws.source, found.boundary.source) != (wanted, wanted):
        found = fit_grid(table, wrong=load_wrong(), options=options, source=wanted)
        found.write(folder)
    return found


def digest(table: RunTable, options: Options) -> str:
    """Equal for equal rows, gaps and options under the same version."""
    text = to_csv(table) + canonical_json(
        {
            "missing": [asdict(point) for point in table.missing],
            "options": asdict(options),
            "version": [__version__, METHOD_VERSION],
        }
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
