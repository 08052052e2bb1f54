"""What a page tells beside the errors: which cells there are, what they cost, how they were trained.

From a grid's store, or from a table alone, which knows less. Reads; the page draws.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbscale.report.costs import Cost, LostCell, cost_of, cost_of_table, duration, lost_cells
from dbscale.report.panels import count_text
from dbscale.report.table import RunTable
from dbscale.report.words import percent
from dbscale.study.cell import CellSpec
from dbscale.study.plan import PlanRecord
from dbscale.study.store import Store


@dataclass(frozen=True)
class Background:
    """Where the runs came from."""

    origin: str
    """A sentence for the footer."""
    cost: Cost
    missing: tuple[LostCell, ...] = ()
    cells: tuple[dict[str, Any], ...] = ()
    """One mapping a cell, unfinished ones first."""
    specs: tuple[CellSpec, ...] = ()


def of_grid(store: Store, plan: PlanRecord, table: RunTable) -> Background:
    """All that the store holds of a planned grid."""
    rows = {key: store.read_row(key) for key in plan.cells}
    specs = [store.read_spec(key) for key in plan.cells if (store.cell_dir(key) / "recipe.json").exists()]
    entries = [_cell(store, key, row) for key, row in rows.items()]
    return Background(
        origin=f"Planned {day(plan.created)}",
        cost=cost_of(plan, [row for row in rows.values() if row is not None]),
        missing=tuple(lost_cells(table, store, plan)),
        cells=tuple(sorted(entries, key=lambda entry: entry["state"] == "done")),
        specs=tuple(specs),
    )


def of_table(path: Path, table: RunTable) -> Background:
    """What a table of runs tells of itself."""
    return Background(origin=f"Made from the table {path.name} alone", cost=cost_of_table(table))


def day(seconds: float | None = None) -> str:
    """A moment, or now, as a page dates it."""
    moment = (
        datetime.datetime.now(tz=datetime.UTC)
        if seconds is None
        else datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    )
    return f"{moment:%d %B %Y %H:%M} UTC"


EMPTY: Iterable[str] = ("arm", "dataset", "samples", "seed", "params", "error", "time")


def _cell(store: Store, key: str, row: Any) -> dict[str, Any]:
    if row is None:
        return {"key": key, "state": store.state(key)} | dict.fromkeys(EMPTY, "")
    return {
        "key": key, "state": "done", "arm": row.arm, "dataset": row.dataset, "samples": f"{row.num_samples:,}",
        "seed": row.seed, "params": count_text(row.num_params), "error": percent(row.error_rate),
        "time": duration(row.timing.device_time_s),
    }  # fmt: skip
