"""From a grid's plan and its cells' rows to one table: `rows.csv` and `rows.parquet`.

Reads plan.json, row.json and attempts; says which points are missing and why. Columns and checks are `table`'s.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np

from dbscale.errors import TableError, nearest
from dbscale.files import atomic_open, read_bytes, write_atomic
from dbscale.report.table import COLUMNS, MissingPoint, Run, RunTable, checked, kind_of, to_csv
from dbscale.study.plan import PlanRecord, PointRecord, read_plan
from dbscale.study.store import Row, Store

if TYPE_CHECKING:
    import pyarrow

NOT_A_BITMAP = (OSError, LookupError, ValueError, TypeError, EOFError, BadZipFile, ZlibError, RuntimeError, MemoryError)
"""What numpy and zipfile raise for a damaged archive."""


def reduce_grid(store: Store, grid_name: str) -> RunTable:
    """Collect what finished and write it beside the plan. Raises TableError when the grid was never planned."""
    table = collect(store, load_plan(store, grid_name))
    folder = store.grid_dir(grid_name)
    write_atomic(folder / "rows.csv", to_csv(table).encode())
    write_parquet(folder / "rows.parquet", table)
    return table


def load_plan(store: Store, grid_name: str) -> PlanRecord:
    plan = read_plan(store, grid_name)
    if plan is None:
        grids = store.root / "grids"
        known = [path.name for path in grids.iterdir()] if grids.is_dir() else []
        hint = nearest(grid_name, known) if known else "it holds no grid yet"
        raise TableError(
            f"no plan of grid {grid_name!r} in {store.root}: {hint}; `dbscale submit` (make grid) writes it"
        )
    return plan


def collect(store: Store, plan: PlanRecord) -> RunTable:
    """The table of a plan, nothing written."""
    rows = {key: store.read_row(key) for key in plan.cells}
    runs, missing = [], []
    for point in plan.points:
        row = rows.get(point.cell)
        if row is None:
            missing.append(_missing(store, point, rows))
        else:
            runs.append(_run(point, row, rows))
    table = RunTable(tuple(runs), tuple(missing), (), plan.grid, plan.question, plan.min_effect, plan.level,
                     plan.targets)  # fmt: skip
    return checked(table, [f"grid {plan.grid}, cell {run.key}" for run in runs])


def _run(point: PointRecord, row: Row, rows: dict[str, Row | None]) -> Run:
    """What was measured, then what was asked for, then what the lineage tells."""
    upstream, teacher = rows.get(point.upstream_cell or ""), rows.get(point.teacher_cell or "")
    own = [record.model_dump(include=set(COLUMNS)) for record in (row, row.timing, point)]
    found: dict[str, Any] = {
        "upstream_dataset": point.upstream_dataset or "", "upstream_samples": point.upstream_num_samples,
        "downstream_samples": row.num_samples, "upstream_key": point.upstream_cell or "",
        "teacher_key": point.teacher_cell or "",
    }  # fmt: skip
    if row.upstream is not None:  # the finetune's own copy; the parent's row has what the copy leaves out
        found |= row.upstream.model_dump(include={"linear_probe_error", "transrate"})
        found |= {f"upstream_{name}": getattr(row.upstream, name) for name in ("stage", "error_rate")}
    if upstream is not None:
        found |= {f"upstream_{name}": getattr(upstream, name) for name in ("test_loss", "samples_seen", "train_flops")}
        found["upstream_device_time_s"] = upstream.timing.device_time_s
    if teacher is not None:
        found |= {"teacher_params": teacher.num_params, "teacher_error_rate": teacher.error_rate}
    return Run(**{name: value for part in (*own, found) for name, value in part.items()})


def _missing(store: Store, point: PointRecord, rows: dict[str, Row | None]) -> MissingPoint:
    path = [key for key in (point.teacher_cell, point.upstream_cell, point.cell) if key is not None]
    culprit = next(key for key in path if rows.get(key) is None)
    found = store.standing(culprit)
    told = found.note or (found.attempt and found.attempt.reason)
    return MissingPoint(
        variant=point.variant, arm=point.arm, student=point.student, upstream_samples=point.upstream_num_samples,
        dataset=point.dataset, downstream_samples=point.num_samples, seed=point.seed, key=point.cell, culprit=culprit,
        state=found.state, reason=told or f"the cell is {'not started' if found.state == 'new' else found.state}",
        log=(found.attempt and found.attempt.log) or "",
    )  # fmt: skip


def write_parquet(path: Path, table: RunTable) -> None:
    """The same columns as rows.csv, typed."""
    import pyarrow.parquet

    with atomic_open(path, "wb") as file:
        pyarrow.parquet.write_table(arrow_table(table), file)


def arrow_table(table: RunTable) -> pyarrow.Table:
    """The runs as Arrow columns; empty strings stay empty strings, missing numbers are null."""
    import pyarrow

    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    columns = {name: pyarrow.array(table.column(name), type=types[kind_of(name)]) for name in COLUMNS}
    return pyarrow.table(columns)


def read_mistakes(path: Path, row: Row) -> np.ndarray:
    """What each test sample of a cell adds to its error, over those that could be decoded, from its correct.npz: booleans,
    whether it was wrong, of a classification; floats of another task, whose mean is the error.

    Raises TableError where the file is missing, damaged, or not the one that the cell's `row` describes.
    """
    try:
        data = read_bytes(path)
        if row.correct_sha256 not in (None, hashlib.sha256(data).hexdigest()):
            raise ValueError("it is not what the cell's row describes")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            count, dense = int(file["num_samples"]), row.task != "classification"
            counted = _bits(file["counted"], count)
            wrong = file["errors"] if dense else ~_bits(file["correct"], count)
        if wrong.shape != (count,):
            raise ValueError(f"it does not hold a number for each of {count} samples")
    except NOT_A_BITMAP as error:
        raise TableError(
            f"{path} cannot be used ({error}): the test set's own noise is estimated without it; remove {path.parent} to "
            "run the cell again"
        ) from error
    if counted.sum() != row.num_test_samples:
        raise TableError(f"{path} counts {counted.sum()} samples, the cell's row {row.num_test_samples}; remove "
                         f"{path.parent} to run the cell again")  # fmt: skip
    return wrong[counted]


def _bits(packed: np.ndarray, count: int) -> np.ndarray:
    # Or unpackbits would fill up with as many zeros as it is told.
    if len(packed) != -(-count // 8):
        raise ValueError(f"it does not hold a bit for each of {count} samples")
    return np.unpackbits(packed, count=count).astype(bool)


Mistakes = tuple[dict[str, np.ndarray], tuple[str, ...]]
"""What `load_mistakes` returns."""


def load_mistakes(store: Store, keys: Iterable[str]) -> Mistakes:
    """Per cell the mistakes [samples] as booleans, in the test split's order, and a sentence on each cell that is left out
    because its file is damaged."""
    found, damaged = {}, []
    for key in sorted(keys):
        row, path = store.read_row(key), store.cell_dir(key) / "correct.npz"
        if row is not None and (path.exists() or row.correct_sha256 is not None):
            try:
                found[key] = read_mistakes(path, row)
            except TableError as error:
                damaged.append(str(error))
    return found, tuple(damaged)
