"""A grid's findings in the store: fitted anew only when its rows, its missing cells or the way of fitting changed."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

from dbscale import __version__
from dbscale.report import schema
from dbscale.report.csv_rows import to_csv
from dbscale.report.fits import METHOD_VERSION, Findings, Options, fit_grid
from dbscale.report.mistakes import load_mistakes
from dbscale.report.reduce import reduce_grid
from dbscale.report.schema import BoundaryFile, LawsFile
from dbscale.report.table import RunTable
from dbscale.study.cell import canonical_json
from dbscale.study.store import Store
from dbscale.study.strict import ConfigError


def refresh(store: Store, grid_name: str, options: Options | None = None) -> tuple[RunTable, Findings]:
    """Reduce and, where needed, fit; rows.csv, rows.parquet, laws.json and boundary.json are current afterwards."""
    options = options or Options()
    table = reduce_grid(store, grid_name)
    folder = store.grid_dir(grid_name)
    wanted = digest(table, options)
    try:
        found = Findings(
            schema.read(LawsFile, folder / "laws.json"), schema.read(BoundaryFile, folder / "boundary.json")
        )
    except (ConfigError, ValueError):
        found = None
    if found is None or (found.laws.source, found.boundary.source) != (wanted, wanted):
        found = fit_grid(table, wrong=load_mistakes(store, table), options=options, source=wanted)
        found.write(folder)
    return table, found


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
