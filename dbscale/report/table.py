"""The run table: one row per finished finetune, all a law needs to be fitted again.

Holds the columns of `rows.csv` and selection; files are `reduce`'s and `csv_rows`'s, fitting is `fits`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, get_type_hints

SCRATCH = 0
"""`upstream_samples` of a run that saw no upstream data; such runs are shown, never fitted."""


class Setting(NamedTuple):
    """What one law describes: everything that is not an axis of the law. Errors of two settings do not compare."""

    variant: str
    upstream_dataset: str
    dataset: str

    def label(self, table: RunTable) -> str:
        """Names only what differs within `table`."""
        words = [self.dataset]
        if len({run.upstream_dataset for run in table.pretrained}) > 1:
            words.append(f"from {self.upstream_dataset}")
        if len(table.values("variant")) > 1:
            words.append(f"({self.variant})")
        return " ".join(words)


class Place(NamedTuple):
    """A point on the axes of a setting: what the runs of a pair share."""

    student: str
    upstream_samples: int
    downstream_samples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finetune. Error rates are top-1 shares in [0, 1]; the fields are the columns of `rows.csv`, in order."""

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

    @property
    def place(self) -> Place:
        return Place(self.student, self.upstream_samples, self.downstream_samples, self.seed)


KINDS: dict[str, Any] = get_type_hints(Run)
COLUMNS = tuple(field.name for field in fields(Run))
REQUIRED = tuple(field.name for field in fields(Run) if field.default is MISSING)


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
    """Of the culprit."""
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
        """In grid order."""
        return tuple(dict.fromkeys(run.setting for run in self.pretrained))

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """Plain before distilled."""
        present = {run.arm for run in self.pretrained}
        return tuple(arm for arm in ("plain", "distilled") if arm in present)

    @cached_property
    def students(self) -> tuple[str, ...]:
        """Smallest model first."""
        size = {run.student: run.num_params for run in self.runs}
        return tuple(sorted(size, key=lambda name: (size[name], name)))

    def params(self, student: str) -> int:
        """Parameters of a student; in a table with several head sizes, the first one's."""
        return next(run.num_params for run in self.runs if run.student == student)

    def scratch_of(self, setting: Setting) -> RunTable:
        """Runs without upstream data that a setting may be compared with."""
        return self.scratch.where(variant=setting.variant, dataset=setting.dataset)
