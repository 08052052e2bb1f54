"""The run table: one row per finished finetune, all a law needs to be fitted again; read from anyone's file, checked.

`Run` is the one definition of the columns: of `rows.csv` and `rows.parquet`, of their order and types, and of
docs/schemas.md. Files are opened by `reader`, a grid's own rows collected by `reduce`, pairs made by `pairing`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from dbscale.errors import TableError, nearest
from dbscale.report.reader import read_sheet
from dbscale.report.sheet import Sheet, closest, near_spellings

SCRATCH = 0
"""`upstream_samples` of a run that saw no upstream data; such runs are shown, never fitted."""


class Setting(NamedTuple):
    """What one law describes: everything that is not an axis of the law. Errors of two settings do not compare."""

    variant: str
    upstream_dataset: str
    dataset: str

    def label(self, table: RunTable) -> str:
        """The setting's name, made of what differs within `table`."""
        return self.among(table.settings)

    def among(self, others: Iterable[Setting]) -> str:
        """The test set, and of variant and upstream set what differs among these."""
        variants, upstreams, _ = (set(column) for column in zip(self, *others, strict=True))
        upstream = [f"from {self.upstream_dataset}"] * (len(upstreams) > 1 and self.upstream_dataset != self.dataset)
        return " ".join([self.dataset, *upstream, *[f"({self.variant})"] * (len(variants) > 1)])


PLACE = ("student", "upstream_samples", "downstream_samples", "seed", "finetune")
"""A point on the axes of a setting: what the runs of a pair share."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finetune. Error rates are shares in [0, 1], of what `task` says; the fields are the columns of `rows.csv`, in
    order."""

    variant: str
    """Name of the grid's variant; `base` where it has none."""
    arm: str
    """plain, distilled or scratch."""
    student: str
    model: str = ""
    num_params: int
    upstream_dataset: str = ""
    upstream_samples: int
    """D_p; 0 for scratch."""
    dataset: str
    """Downstream dataset."""
    downstream_samples: int
    """D_f."""
    seed: int
    finetune: int = 0
    """Draw of labels, head and order: several cheap finetunes of one upstream run."""
    task: str = "classification"
    """What an error is: top-1 of a classification, 1 − mIoU of a segmentation, 1 − mAP of a detection."""
    error_rate: float
    test_loss: float | None = None
    top5_error_rate: float | None = None
    calibration_error: float | None = None
    num_test_samples: int | None = None
    num_classes: int | None = None
    train_loss: float | None = None
    num_steps: int | None = None
    samples_seen: int | None = None
    train_flops: float | None = None
    upstream_stage: str = ""
    upstream_error_rate: float | None = None
    upstream_test_loss: float | None = None
    upstream_samples_seen: int | None = None
    """D_p times epochs: laws in unique samples hold only at a stated schedule."""
    upstream_train_flops: float | None = None
    linear_probe_error: float | None = None
    transrate: float | None = None
    teacher_params: int | None = None
    teacher_error_rate: float | None = None
    """On the upstream test split."""
    replaced_samples: int | None = None
    train_time_s: float | None = None
    device_time_s: float | None = None
    upstream_device_time_s: float | None = None
    num_attempts: int | None = None
    device: str = ""
    host: str = ""
    weights_sha256: str = ""
    teacher_key: str = ""
    upstream_key: str = ""
    key: str = ""

    @property
    def setting(self) -> Setting:
        return Setting(self.variant, self.upstream_dataset, self.dataset)


COLUMNS = tuple(field.name for field in fields(Run))
REQUIRED = tuple(
    field.name for field in fields(Run) if field.default is MISSING and field.name not in ("variant", "student")
)
"""What a table of one's own must have; `variant` is `base` and `student` is named after its size when absent."""
POSITIVE = ("num_params", "downstream_samples")
SHARES = ("error_rate", "top5_error_rate", "upstream_error_rate", "linear_probe_error", "teacher_error_rate")
ARMS = ("plain", "distilled", "plain_matched", "self_distilled", "scratch")
MAIN_ARMS = ("plain", "distilled")
"""Whose difference a study is about; the other arms are its controls."""
_HINTS = get_type_hints(Run)


def kind_of(column: str) -> type:
    """str, int or float: what a column holds where it holds anything."""
    return next(kind for kind in (str, int, float) if kind in (_HINTS[column], *get_args(_HINTS[column])))


@dataclass(frozen=True)
class MissingPoint:
    """A grid point without a row, and the cell that stands in its way."""

    variant: str
    arm: str
    student: str
    upstream_samples: int
    dataset: str
    downstream_samples: int
    seed: int
    key: str
    culprit: str
    """Key of the first cell on the way without a row: the teacher, the upstream run or the finetune itself."""
    state: str
    """How the culprit stands: failed, running, new, …"""
    reason: str
    log: str


@dataclass(frozen=True)
class RunTable:
    """Finished runs in grid order, what is missing, and what was odd about them."""

    runs: tuple[Run, ...]
    missing: tuple[MissingPoint, ...] = ()
    warnings: tuple[str, ...] = ()
    grid: str = ""
    question: str = ""
    min_effect: float = 0.005
    """δ: the difference of error rates that matters to who asked."""
    level: float = 0.9
    """Level of every interval that is made of it."""
    targets: tuple[str, ...] = ()
    """Verdicts of a hunt, for whose number `level` allows: dataset, and student and D_f where they are not pooled."""

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def where(self, test: Callable[[Run], bool] | None = None, **equal: Any) -> RunTable:
        """Runs whose attributes equal the given values and that pass `test`."""
        kept = tuple(
            run
            for run in self.runs
            if all(getattr(run, name) == value for name, value in equal.items()) and (test is None or test(run))
        )
        return replace(self, runs=kept)

    def values(self, column: str) -> list[Any]:
        """Distinct values of a column, smallest first."""
        return sorted({getattr(run, column) for run in self.runs})

    def column(self, name: str) -> list[Any]:
        return [getattr(run, name) for run in self.runs]

    @cached_property
    def pretrained(self) -> RunTable:
        """Runs that saw upstream data: the ones laws are about."""
        return self.where(lambda run: run.upstream_samples > SCRATCH)

    @cached_property
    def scratch(self) -> RunTable:
        return self.where(lambda run: run.upstream_samples == SCRATCH)

    @cached_property
    def both_arms(self) -> RunTable:
        """Runs of students that have a plain and a distilled arm; a teacher among them has the plain one only."""
        students = {arm: {run.student for run in self.runs if run.arm == arm} for arm in ("plain", "distilled")}
        return self.where(lambda run: run.student in students["plain"] & students["distilled"])

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """What the runs' laws describe, in grid order."""
        return tuple(dict.fromkeys(run.setting for run in self.pretrained))

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """Plain before distilled, both before their controls."""
        present = {run.arm for run in self.pretrained}
        return tuple(arm for arm in ARMS if arm in present)

    @cached_property
    def students(self) -> tuple[str, ...]:
        """Names of the students, the smallest model first."""
        size = {run.student: run.num_params for run in self.runs}
        return tuple(sorted(size, key=lambda name: (size[name], name)))

    def params(self, student: str) -> int:
        """Parameters of a student; in a table with several head sizes, the first one's."""
        return next(run.num_params for run in self.runs if run.student == student)


def read_table(path: Path, columns: Mapping[str, str] | None = None) -> RunTable:
    """Runs from any table with these columns; `columns` says where a name of ours stands (`error_rate` -> `top1_err`).

    Raises TableError, with line, column, value and remedy, for what is no table of runs.
    """
    return runs_of(read_sheet(path), columns)


def runs_of(sheet: Sheet, columns: Mapping[str, str] | None = None) -> RunTable:
    """The same from a sheet. Columns that no run has are left out with a note."""
    columns = dict(columns or {})
    for name in columns.keys() - set(COLUMNS):
        raise TableError(f"{name}={columns[name]}: runs have no {name!r}; {nearest(name, COLUMNS)}")
    given = {name: columns.get(name, name) for name in COLUMNS}
    for name in (*columns, *REQUIRED):
        if given[name] not in sheet.columns:
            raise TableError(f"{sheet.name}: no column {given[name]!r}; {closest(given[name], sheet.columns)}")
    measured = given["error_rate"].lower()
    if "acc" in measured and "err" not in measured:
        raise TableError(f"{sheet.name}: column {given['error_rate']!r} holds accuracies by its name, where errors are "
                         "asked for; write 1 - accuracy into a column of its own and name that")  # fmt: skip
    cells = {name: _cells(sheet, column, kind_of(name)) for name, column in given.items() if column in sheet.columns}
    places = [sheet.place(row) for row in range(len(sheet))]
    runs = tuple(_run({name: cells[name][row] for name in cells}, place) for row, place in enumerate(places))
    unknown = [column for column in sheet.columns if column not in given.values()]
    notes = [f"{sheet.name}: columns that dbscale does not know were left out: {', '.join(unknown)}"] if unknown else []
    return checked(RunTable(runs, warnings=(*sheet.notes, *notes)), places)


def _cells(sheet: Sheet, column: str, kind: type) -> Sequence[Any]:
    if kind is str:
        return sheet.texts(column)
    values = sheet.numbers(column)
    for row, value in enumerate(values):
        if kind is int and value is not None and value != int(value):
            raise sheet.wrong(column, row, "not a whole number; write 86.57M for a count in millions")
    return [None if value is None else kind(value) for value in values]


def _run(values: Mapping[str, Any], place: str) -> Run:
    present = {name: value for name, value in values.items() if value not in (None, "")}
    for name in REQUIRED:
        if name not in present:
            raise TableError(f"{place}: {name!r} is empty; fill it in or remove the row")
    return Run(**{"variant": "base", "student": student_of_size(present["num_params"]), **present})


def student_of_size(num_params: int) -> str:
    """What a student is called where no column names it."""
    return f"{num_params:,} parameters"


def to_csv(runs: Iterable[Run]) -> str:
    """Header and one line a run; missing values are empty, floats exact."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        values = [getattr(run, name) for name in COLUMNS]
        writer.writerow([repr(value) if isinstance(value, float) else value for value in values])
    return text.getvalue()


def checked(table: RunTable, places: Sequence[str]) -> RunTable:
    """Refuse values that cannot be, merge repeated rows, and note what looks odd; `places` says where each run stands."""
    for run, place in zip(table.runs, places, strict=True):
        _check_values(run, place)
    unique, notes = _without_repeats(table, places)
    table = replace(table, runs=unique)
    return replace(table, warnings=(*table.warnings, *notes, *_oddities(table)))


def _check_values(run: Run, place: str) -> None:
    def refuse(name: str, what: str) -> TableError:
        value = getattr(run, name)
        return TableError(f"{place}: {name} is {f'{value:g}' if isinstance(value, float) else repr(value)}; {what}")

    if run.arm not in ARMS:
        raise refuse("arm", nearest(run.arm, ARMS))
    if run.upstream_samples < 0:
        raise refuse("upstream_samples", "counts start at 0 (from scratch)")
    for name in POSITIVE:
        if getattr(run, name) <= 0:
            raise refuse(name, "it must be above 0")
    for name in SHARES:
        if not 0 <= (getattr(run, name) or 0) <= 1:
            raise refuse(name, "error rates are shares between 0 and 1, or written with %")
    if (run.arm == "scratch") != (run.upstream_samples == 0):
        raise TableError(f"{place}: arm {run.arm!r} with upstream_samples {run.upstream_samples}; 0 goes with scratch")


def _without_repeats(table: RunTable, places: Sequence[str]) -> tuple[tuple[Run, ...], list[str]]:
    seen: dict[tuple[Any, ...], tuple[Run, str]] = {}
    repeats = 0
    for run, place in zip(table.runs, places, strict=True):
        first, where = seen.setdefault((run.setting, run.arm, *(getattr(run, name) for name in PLACE)), (run, place))
        repeats += first is not run
        if first.error_rate != run.error_rate:
            raise TableError(
                f"{place}: the same point ({run.arm}, {run.student}, D_p {run.upstream_samples}, {run.dataset}, "
                f"D_f {run.downstream_samples}, seed {run.seed}) has error_rate {run.error_rate:g}, but "
                f"{first.error_rate:g} at {where}; remove one, or tell them apart by `variant` or `finetune`"
            )
    notes = [f"{repeats} repeated rows were counted once"] if repeats else []
    return tuple(run for run, _ in seen.values()), notes


def _oddities(table: RunTable) -> list[str]:
    notes = []
    for name in ("variant", "student", "upstream_dataset", "dataset"):
        notes += [f"{name}: {each}" for each in near_spellings(table.values(name))]
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
