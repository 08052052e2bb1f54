"""Distill or not, for one planned study: the verdicts of the study asked at one point, and what the laws expect there.

The advice follows from the same verdicts as the page; laws add expected errors, never a decision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from dbscale.errors import TableError, nearest
from dbscale.report.findings import Question, family_of, study_questions
from dbscale.report.law_findings import AXIS_NAMES, ArmLaws, Options, arm_laws
from dbscale.report.schema import AxisName, ContrastRecord, Estimate
from dbscale.report.table import RunTable, Setting
from dbscale.report.words import AXES, advice, answer, percent, say, span, stratum


@dataclass(frozen=True)
class Advice:
    """What the study says of one point on one downstream set."""

    sentence: str
    record: ContrastRecord
    """The contrast that the advice rests on."""
    expected: Mapping[str, Estimate]
    """Error at the point by the laws of each arm; empty without laws, and outside what was measured."""

    def text(self) -> str:
        """The advice, the verdict behind it and the laws' expectation, for a terminal."""
        lines = [self.sentence, f"  verdict ({stratum(self.record)}): {answer(self.record)}"]
        for arm, error in self.expected.items():
            lines.append(f"  {arm} by its laws: {percent(error.value)} ({percent(error.low)} to {percent(error.high)})")
        apart = {error.value < self.expected["plain"].value for error in self.expected.values()}
        return "\n".join([*lines, *([say("laws_alone")] if len(apart) > 1 else [])])


def advise(
    table: RunTable, upstream_samples: float, downstream_samples: float, num_params: float, *,
    dataset: str | None = None, wrong: Mapping[str, np.ndarray] | None = None, options: Options | None = None,
) -> tuple[Advice, ...]:  # fmt: skip
    """One advice for every downstream set (or for `dataset`). Raises TableError without both arms or for bad values."""
    settings = [setting for setting in table.settings if dataset in (None, setting.dataset)]
    if not settings:
        known = table.pretrained.values("dataset")
        told = f"no runs on {dataset!r}; {nearest(str(dataset), known)}"
        raise TableError(told if known else "the table has no runs with upstream data")
    if "distilled" not in table.arms or "plain" not in table.arms:
        raise TableError(f"advice compares a plain and a distilled arm; the table has {', '.join(table.arms)} only")
    point = dict(zip(AXIS_NAMES, (upstream_samples, num_params, downstream_samples), strict=True))
    for name, value in point.items():
        if not (np.isfinite(value) and value > 0):
            raise TableError(f"{name} is {value:g}; it must be above 0")
    options = options or Options(level=table.level, min_effect=table.min_effect)
    arms = arm_laws(table, options, metrics=("error_rate",))
    questions = study_questions(table, wrong or {}, options)
    return tuple(_advice(arms, setting, point, questions, options) for setting in settings)


def _advice(
    arms: ArmLaws, setting: Setting, point: Mapping[AxisName, float], questions: list[Question], options: Options
) -> Advice:
    pooled, *single = [each for each in questions if each.setting == setting and each.metric == "error_rate"]

    def distance(question: Question) -> float:
        size, labels = arms.table.params(str(question.student)), question.labels or point["downstream_samples"]
        return float(np.hypot(np.log(size / point["num_params"]), np.log(labels / point["downstream_samples"])))

    # The student and D_f nearest to the point, as ratios, where they have a verdict.
    record = pooled.record(arms, options, family_of(questions))
    for nearest_one in [min(single, key=distance)] if single else []:
        closer = nearest_one.record(arms, options, family_of(questions))
        record = closer if closer.verdict is not None and closer.verdict.kind != "undecided" else record
    label = setting.label(arms.table)
    if record.verdict is None:
        raise TableError(f"{label}: {record.reason}")
    outside = tuple(_outside(arms.table, setting, point))
    # No prediction stands beside a warning against it.
    expected = {} if outside else _expected(arms, setting, point, options.level)
    return Advice(f"{label}: {advice(record, point['upstream_samples'], outside)}", record, expected)


def _outside(table: RunTable, setting: Setting, point: Mapping[AxisName, float]) -> Iterator[str]:
    """Axes on which the point lies outside what both arms measured."""
    runs = table.both_arms.pretrained.where(setting=setting)
    for axis, value in point.items():
        low, high = runs.values(axis)[0], runs.values(axis)[-1]
        if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
            side = "below" if value < low else "above"
            yield say("outside_axis", value=value, axis=AXES[axis], side=side, span=span(low, high))


def _expected(arms: ArmLaws, setting: Setting, point: Mapping[AxisName, float], level: float) -> dict[str, Estimate]:
    """Error at the point by the laws of both arms; empty where an arm has none."""
    laws = {arm: law for arm in ("plain", "distilled") if (law := arms.of(setting, "error_rate", arm)) is not None}
    at = {name: np.array([value]) for name, value in point.items()}
    found = {}
    for arm, law in laws.items() if len(laws) == 2 else ():
        (low,), (high,) = law.curve_interval(at, level)
        found[arm] = Estimate(value=float(law.predict(at)[0]), low=float(low), high=float(high))
    return found
