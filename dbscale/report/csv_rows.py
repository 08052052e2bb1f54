"""Text to runs and back: `rows.csv` as people and spreadsheets leave it, checked before anything is fitted.

Every error names the line, the column, the value and what would be right.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dbscale.errors import TableError, nearest
from dbscale.report.table import COLUMNS, KINDS, REQUIRED, Place, Run, RunTable, Setting

POSITIVE = ("num_params", "downstream_samples")
SHARES = ("error_rate", "top5_error_rate", "upstream_error_rate", "linear_probe_error", "teacher_error_rate")
ARMS = ("plain", "distilled", "scratch")


def to_csv(runs: Iterable[Run]) -> str:
    """Header and one line a run; missing values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        writer.writerow([_shown(getattr(run, name)) for name in COLUMNS])
    return text.getvalue()


def _shown(value: Any) -> Any:
    return "" if value is None else repr(value) if isinstance(value, float) else value


def from_records(records: Iterable[Mapping[str, Any]], header: Iterable[str], *, where: str) -> RunTable:
    """Runs from mappings of text or numbers. Raises TableError; unknown columns are left out with a warning."""
    header = list(header)
    missing = [name for name in REQUIRED if name not in header and name not in ("variant", "student")]
    if missing:
        raise TableError(f"{where}: no column {missing[0]!r}; {nearest(missing[0], header)}")
    runs = tuple(
        _run(record, f"{where}, row {number}") for number, record in enumerate(records, start=1) if any(record.values())
    )
    if not runs:
        raise TableError(f"{where}: no rows below the header; nothing can be fitted")
    unknown = [name for name in header if name not in COLUMNS]
    notes = [f"{where}: columns that dbscale does not know were left out: {', '.join(unknown)}"] if unknown else []
    return checked(RunTable(runs, warnings=tuple(notes)), where=where)


def _run(record: Mapping[str, Any], where: str) -> Run:
    values = {name: _parsed(name, record.get(name), where) for name in COLUMNS if record.get(name) not in (None, "")}
    values.setdefault("variant", "base")
    values.setdefault("student", f"{values['num_params']:,} parameters" if "num_params" in values else "")
    empty = [name for name in REQUIRED if name not in values]
    if empty:
        raise TableError(f"{where}: {empty[0]!r} is empty; fill it in or remove the row")
    return Run(**values)


def _parsed(name: str, value: Any, where: str) -> Any:
    kind = KINDS[name]
    if kind is str:
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TableError(f"{where}: {name} is {value!r}, not a number") from None
    if not math.isfinite(number):
        raise TableError(f"{where}: {name} is {value!r}; remove the row or give the measured value")
    if kind in (float, float | None):
        return number
    if number != int(number):
        raise TableError(f"{where}: {name} is {value!r}, not a whole number")
    return int(number)


def checked(table: RunTable, *, where: str) -> RunTable:
    """Refuse values that cannot be, merge repeated rows, and note what looks odd."""
    for number, run in enumerate(table.runs, start=1):
        _check_values(run, f"{where}, row {number}")
    unique, notes = _without_repeats(table, where)
    return RunTable(unique, table.missing, (*table.warnings, *notes, *_oddities(table)), table.grid, table.question)


def _check_values(run: Run, where: str) -> None:
    if run.arm not in ARMS:
        raise TableError(f"{where}: arm is {run.arm!r}; {nearest(run.arm, list(ARMS))}")
    if run.upstream_samples < 0:
        raise TableError(f"{where}: upstream_samples is {run.upstream_samples}; counts start at 0 (from scratch)")
    for name in POSITIVE:
        if getattr(run, name) <= 0:
            raise TableError(f"{where}: {name} is {getattr(run, name)}; it must be above 0")
    for name in SHARES:
        share = getattr(run, name)
        if share is not None and not 0 <= share <= 1:
            raise TableError(f"{where}: {name} is {share}; error rates are shares between 0 and 1")
    if (run.arm == "scratch") != (run.upstream_samples == 0):
        raise TableError(f"{where}: arm {run.arm!r} with upstream_samples {run.upstream_samples}; 0 goes with scratch")


def _without_repeats(table: RunTable, where: str) -> tuple[tuple[Run, ...], list[str]]:
    seen: dict[tuple[Setting, str, Place], Run] = {}
    repeats = 0
    for number, run in enumerate(table.runs, start=1):
        first = seen.setdefault((run.setting, run.arm, run.place), run)
        if first is not run:
            repeats += 1
        if first.error_rate != run.error_rate:
            raise TableError(
                f"{where}, row {number}: the same point ({run.arm}, {run.student}, D_p {run.upstream_samples}, "
                f"{run.dataset}, D_f {run.downstream_samples}, seed {run.seed}) already has "
                f"error_rate {first.error_rate}, here {run.error_rate}; remove one, or name their variants apart"
            )
    notes = [f"{where}: {repeats} repeated rows were counted once"] if repeats else []
    return tuple(seen.values()), notes


def _oddities(table: RunTable) -> list[str]:
    notes = []
    for dataset in table.values("dataset"):
        part = table.where(dataset=dataset)
        for name, what in (("num_classes", "class counts"), ("num_test_samples", "test set sizes")):
            found = sorted({value for value in part.column(name) if value is not None})
            if len(found) > 1:
                notes.append(
                    f"{dataset} appears with several {what} ({', '.join(map(str, found))}): are two studies mixed?"
                )
        extreme = sum(run.error_rate in (0.0, 1.0) for run in part)
        if extreme:
            notes.append(
                f"{extreme} runs on {dataset} have an error of exactly 0 or 1: too small a test set to resolve them"
            )
    return notes
