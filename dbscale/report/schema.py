"""`boundary.json` and `laws.json`: what a study found, as files that others read.  Documented in docs/schemas.md.

`findings` fills them, `words` says them, `figures` draws them; whatever a page shows is here or in rows.csv. Verdicts,
noise and power are the laws' own types.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeVar

from dbscale.errors import TableError
from dbscale.files import atomic_open, read_json, sealed
from dbscale.laws import NoiseModel, Power, Verdict
from dbscale.report.table import Setting
from dbscale.strict import Strict, validate

SCHEMA_VERSION = 4
AxisName = Literal["upstream_samples", "downstream_samples", "num_params"]


class Estimate(Strict):
    """A value with its interval; a bound is null where the interval is open or unknown."""

    value: float
    low: float | None = None
    high: float | None = None


class Band(Strict):
    """A curve with its band: equally long lists."""

    x: tuple[float, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


class HalfRecord(Strict):
    """The same contrast judged on one half of the seeds; the verdict has no curve."""

    seeds: tuple[str, ...]
    verdict: Verdict


class OfSetting(Strict):
    """What every record names: a variant of the grid, where the models were pretrained, and where they were tested."""

    variant: str = ""
    upstream_dataset: str = ""
    dataset: str

    @property
    def setting(self) -> Setting:
        return Setting(self.variant, self.upstream_dataset, self.dataset)


class ContrastRecord(OfSetting):
    """Two procedures compared along an axis, and how that ended."""

    column: str = "arm"
    """Whose values `a` and `b` are."""
    a: str
    b: str
    along: str
    """The axis: a column."""
    metric: str
    """The column compared; lower is better."""
    student: str | None = None
    downstream_samples: int | None = None
    """Both null: pooled over students and D_f."""
    main: bool = False
    """The study's one question; all other contrasts of a page share one family."""
    num_incomplete: int = 0
    """(x, seed) left out of the pooled means because a student or D_f lacks its pair there."""
    reason: str = ""
    """Why there is no verdict."""
    verdict: Verdict | None = None
    noise: NoiseModel | None = None
    power: Power | None = None
    """What more runs of the same design would buy."""
    halves: tuple[HalfRecord, ...] = ()
    """The same on disjoint halves of the seeds; empty with fewer than four."""
    held: float | None = None
    """Share of one half's intervals, widened for the other's own noise, that hold the other's means."""

    @property
    def pooled(self) -> bool:
        return self.student is None and self.downstream_samples is None


class Note(Strict):
    """Something that a reader must know before relying on the results."""

    code: str
    text: str


class BoundaryFile(Strict):
    """`boundary.json`."""

    schema_version: int = SCHEMA_VERSION
    grid: str
    source: str
    """Digest of the rows, gaps and options that this was made from; a mark for re-use, nothing to read."""
    level: float
    min_effect: float
    answers: tuple[str, ...]
    """The verdicts on the pooled contrasts in words, the main one first."""
    contrasts: tuple[ContrastRecord, ...]
    notes: tuple[Note, ...]


class ParamRecord(Strict):
    """A parameter of a law."""

    value: float | None
    low: float | None = None
    high: float | None = None
    status: Literal["determined", "at_bound", "not_determined"]
    """at_bound: it ended where it may go no further; not_determined: the table leaves it open."""


class CandidateRecord(Strict):
    """A law that was tried; residuals are root mean squares of log(predicted / measured): 0.05 is about 5 %."""

    law: str
    weight: float
    """Its share of the average that predicts."""
    in_sample: float | None = None
    held_out: float | None = None
    """Over rows just beyond those that the law had seen."""
    reason: str = ""
    """Why there is no fit."""


class OfArm(OfSetting):
    """The arm and the metric that laws were fitted to."""

    metric: str
    arm: str


class LawRecord(OfArm):
    """What the laws say of one arm: the average that predicts, and the law that is named where one must be."""

    num_runs: int
    reason: str = ""
    """Why no law could be fitted."""
    law: str = ""
    equation: str = ""
    params: dict[str, ParamRecord] = {}
    candidates: tuple[CandidateRecord, ...] = ()
    """Best first."""
    residual: float | None = None
    """Residual of the average, over the fitted runs."""
    held_out: float | None = None
    """Residual at the largest D_p, of the average of laws that did not see it."""
    coverage: float | None = None
    """Share of held-out rows inside the average's 90 % interval."""
    noise: float | None = None
    """The spread of repeated seeds on the same scale: what no law can explain."""
    no_extrapolation: tuple[AxisName, ...] = ()
    """Axes along which the laws must not be read beyond the measured values."""


class LawCurve(OfArm):
    """The average of the laws along one axis, the other axes fixed."""

    axis: AxisName
    student: str | None
    upstream_samples: int | None
    downstream_samples: int | None
    band: Band


class Prediction(OfArm):
    """Measured against predicted error or loss of one run."""

    key: str
    student: str
    upstream_samples: int
    downstream_samples: int
    seed: int
    measured: float
    predicted: float | None
    held_out: bool
    """By laws that never saw this D_p."""


class TransferRecord(OfArm):
    """What `transfer_gap` says of one student and arm: E = (A·D_p^-α + G)·D_f^-β + E∞."""

    student: str
    gap: Estimate
    """G, with its profile-likelihood interval."""
    gap_error: float
    """The gap as error or loss at the largest D_f: G·D_f^-β."""
    share: float
    """G over A·D_p^-α + G at the largest D_p: near 1, more upstream data of this kind no longer helps."""


class PremiseRecord(OfSetting):
    """Whether the premise of Theorem 1 (arXiv 2504.13219) holds of one law fitted to both arms; differences are
    distilled − plain."""

    metric: str
    law: str
    verdict: Literal["holds", "fails", "not determined"]
    floor: Estimate
    """E∞; the theorem needs it above 0, and one of the others too."""
    exponent: Estimate
    """Difference of the exponents of D_p."""
    log_factor: Estimate
    """Logarithm of the ratio of the arms' factors."""


class LeverRecord(OfArm):
    """What twice as much of each lever would do at the largest point measured, by the laws of one arm."""

    student: str
    upstream_samples: int
    downstream_samples: int
    error: Estimate
    """At that point."""
    doubled: dict[AxisName, Estimate]
    """The same with twice as much of one lever; left out are levers that must not be read beyond what was measured."""
    images_per_label: Estimate | None
    """Upstream images that lower the error as much as one more label does."""


class PredictorRecord(Strict):
    """Spearman's ρ between something measured on upstream checkpoints and the finetuned error."""

    dataset: str
    downstream_samples: int
    predictor: str
    num_checkpoints: int
    rho: Estimate


class LawsFile(Strict):
    """`laws.json`."""

    schema_version: int = SCHEMA_VERSION
    grid: str
    source: str
    level: float
    """Level of every interval."""
    num_draws: int
    seed: int
    laws: tuple[LawRecord, ...]
    curves: tuple[LawCurve, ...]
    predictions: tuple[Prediction, ...]
    transfer: tuple[TransferRecord, ...]
    premises: tuple[PremiseRecord, ...] = ()
    levers: tuple[LeverRecord, ...]
    predictors: tuple[PredictorRecord, ...]
    notes: tuple[Note, ...]


File = TypeVar("File", LawsFile, BoundaryFile)


def write(path: Path, value: LawsFile | BoundaryFile) -> None:
    """One item of a list a line, so that a file can be read, searched and compared by eye."""
    lines = []
    for name, field in value.model_dump(mode="json").items():
        items = [json.dumps(item, allow_nan=False) for item in (field if isinstance(field, list) else [field])]
        whole = (
            "[\n  " + ",\n  ".join(items) + "\n ]" if isinstance(field, list) and field else items[0] if items else "[]"
        )
        lines.append(f' "{name}": {whole}')
    with atomic_open(path, "w") as file:
        file.write(sealed("{\n" + ",\n".join(lines) + "\n}"))


def read(kind: type[File], path: Path) -> File:
    """Raises TableError where the file is missing, ConfigError where it is not what this version writes."""
    if not path.exists():
        raise TableError(f"no {path.name} in {path.parent}; `dbscale reduce` writes it")
    return validate(kind, read_json(path), where=str(path))
