"""`laws.json` and `boundary.json`: what the fits found, as files that others read.  Documented in docs/schemas.md.

Everything a page or a figure draws is here or in rows.csv; drawing never fits anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from dbscale.errors import TableError
from dbscale.files import atomic_open, read_json
from dbscale.strict import Strict, validate

SCHEMA_VERSION = 2
AxisName = Literal["upstream_samples", "downstream_samples", "num_params"]
BoundaryStatus = Literal["crossing", "extrapolated", "no_crossing", "not_enough_data"]
Direction = Literal[
    "positive_to_negative", "negative_to_positive", "always_positive", "always_negative", "within_noise"
]


class Estimate(Strict):
    """A value with the interval that `level` of bootstrap fits fall in; None where it is unbounded or unknown."""

    value: float
    low: float | None = None
    high: float | None = None


class FitRecord(Strict):
    """One law fitted to one arm of one setting."""

    law: str
    variant: str
    upstream_dataset: str
    dataset: str
    arm: str
    student: str | None
    """None: all students together; transfer_gap has no size term and is fitted to each student."""
    status: Literal["fitted", "not_enough_data", "failed"]
    reason: str = ""
    """Why there is no fit."""
    chosen: bool = False
    """The law that curves and boundaries of this setting use."""
    equation: str = ""
    variables: tuple[str, ...] = ()
    """Those that vary; a variable with one value has no term."""
    num_runs: int = 0
    params: dict[str, Estimate] = {}
    at_bound: tuple[str, ...] = ()
    """Parameters that ended where they may go no further: an E_inf of 0, a vanished amplitude."""
    rmsd_log: float | None = None
    """Root mean square of log(predicted / measured) over the fitted runs: 0.05 is about 5 %."""
    held_out_rmsd_log: float | None = None
    """The same over the largest D_p, predicted from the smaller ones."""
    coverage: float | None = None
    """Share of rolling-origin points that fell into their 90 % prediction interval; of the chosen law."""
    noise_log: float | None = None
    """The spread of repeated seeds on the same scale: what no law can explain."""
    warnings: tuple[str, ...] = ()
    """What the fit itself is wary of: weak parameters, repeated rows."""
    law_fit: dict[str, Any] | None = None
    """The fit itself, as `dbscale.laws` writes and reads it; of the chosen law only."""


class Curve(Strict):
    """A fitted curve with its band over one axis, the other axes fixed."""

    variant: str
    upstream_dataset: str
    dataset: str
    arm: str
    """plain or distilled; `delta` for E_plain − E_distilled."""
    law: str | None
    """None: through the paired runs, no law assumed."""
    axis: AxisName
    student: str | None
    upstream_samples: int | None
    downstream_samples: int | None
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


class Prediction(Strict):
    """Measured against predicted error of one run."""

    key: str
    arm: str
    variant: str
    upstream_dataset: str
    dataset: str
    student: str
    upstream_samples: int
    downstream_samples: int
    seed: int
    measured: float
    predicted: float | None
    held_out: bool
    """The law did not see this D_p."""


class TransferRecord(Strict):
    """What `transfer_gap` says of one student and arm: E = (A·D_p^-α + G)·D_f^-β + E∞."""

    variant: str
    upstream_dataset: str
    dataset: str
    arm: str
    student: str
    gap: Estimate
    """G, with its bootstrap interval."""
    gap_error: float
    """The gap as an error rate at the largest D_f: G·D_f^-β."""
    share: float
    """G over A·D_p^-α + G at the largest D_p: near 1, more upstream data of this kind no longer helps."""
    worth: float | None
    """Labels that training from scratch would need beyond the middle D_f to match the largest D_p; None: unknown."""


class LeverRecord(Strict):
    """What twice as much of each lever would do at the largest point measured, by the chosen law of one arm."""

    variant: str
    upstream_dataset: str
    dataset: str
    arm: str
    law: str
    student: str
    upstream_samples: int
    downstream_samples: int
    error: Estimate
    """At that point."""
    doubled: dict[AxisName, Estimate]
    """Error with twice as much of one lever, the others as they are; levers that the law does not have are left out."""
    images_per_label: Estimate | None
    """Upstream images that lower the error as much as one more label does."""


class LawsFile(Strict):
    """`laws.json`."""

    schema_version: int = SCHEMA_VERSION
    grid: str
    source: str
    """Digest of the rows, gaps and options that this was made from; a mark for re-use, nothing to read."""
    level: float
    """Of every interval."""
    num_bootstraps: int
    seed: int
    fits: tuple[FitRecord, ...]
    curves: tuple[Curve, ...]
    predictions: tuple[Prediction, ...]
    transfer: tuple[TransferRecord, ...]
    levers: tuple[LeverRecord, ...]
    notes: tuple[str, ...]
    """What a reader must know: curves that do not fall, poor fits, missing cells."""


class DeltaPoint(Strict):
    """Measured ΔE = E_plain − E_distilled at one D_p, mean over paired seeds."""

    variant: str
    upstream_dataset: str
    dataset: str
    student: str | None
    """None: mean over all students and D_f."""
    num_params: int | None
    upstream_samples: int
    downstream_samples: int | None
    delta: Estimate
    num_seeds: int
    by_seed: tuple[float, ...]


class BoundaryRecord(Strict):
    """Where distillation stops paying, for one student and D_f, or pooled."""

    variant: str
    upstream_dataset: str
    dataset: str
    student: str | None
    """None: pooled over students."""
    num_params: int | None
    downstream_samples: int | None
    """None: pooled over D_f."""
    seed: int | None = None
    """None: all seeds together."""
    method: Literal["law", "law_free"]
    law: str | None = None
    status: BoundaryStatus
    """crossing lies inside the measured range, extrapolated outside it."""
    direction: Direction | None = None
    """What ΔE does over the measured range, where its sign is clear."""
    upstream_samples: Estimate | None = None
    """D_p*, with its interval; a bound is None where the interval is open."""
    probability: float | None = None
    """Share of drawn ΔE curves that turn from positive to negative within reach."""
    probability_inside: float | None = None
    """The same inside the measured range."""
    measured_range: tuple[float, float]
    words: tuple[str, ...] = ()
    """What the numbers mean and what to do about them."""

    @property
    def pooled(self) -> bool:
        """Over students, D_f and seeds."""
        return self.student is None and self.seed is None


class BoundaryFile(Strict):
    """`boundary.json`."""

    schema_version: int = SCHEMA_VERSION
    grid: str
    source: str
    level: float
    answers: tuple[str, ...]
    """The study's result, a sentence or two for each setting."""
    boundaries: tuple[BoundaryRecord, ...]
    points: tuple[DeltaPoint, ...]
    curves: tuple[Curve, ...]
    notes: tuple[str, ...]
    """The signs of failure, in words."""


File = TypeVar("File", LawsFile, BoundaryFile)


def write(path: Path, value: LawsFile | BoundaryFile) -> None:
    """One record a line, so that a file can be read, searched and compared by eye."""
    fields = value.model_dump(mode="json").items()
    lines = [f' "{name}": {_block(field)}' for name, field in fields]
    with atomic_open(path, "w") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


def _block(field: Any) -> str:
    """A field's value: lists with one item a line, all else in one."""
    if not (isinstance(field, list) and field):
        return json.dumps(field, allow_nan=False)
    return "[\n  " + ",\n  ".join(json.dumps(item, allow_nan=False) for item in field) + "\n ]"


def read(kind: type[File], path: Path) -> File:
    """Raises TableError where the file is missing."""
    if not path.exists():
        raise TableError(f"no {path.name} in {path.parent}; `dbscale reduce` writes it")
    return validate(kind, read_json(path), where=str(path))
