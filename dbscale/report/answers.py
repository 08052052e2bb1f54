"""The study's result in a sentence or two: where distillation stops paying, with its interval, or why none is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dbscale.report.notes import ends_of, is_poor, setting_of
from dbscale.report.schema import BoundaryRecord, FitRecord
from dbscale.report.table import RunTable, Setting
from dbscale.report.words import about, interval_text, percent, points_text


def answers(
    table: RunTable, boundaries: Sequence[BoundaryRecord], fits: Sequence[FitRecord] = (), *, level: float = 0.9
) -> Iterator[str]:
    """The study's result in a sentence or two a setting; `level` is that of the intervals."""
    if not len(table.pretrained):
        yield "No finished run with upstream data yet: there is nothing to conclude."
    for setting in table.settings:
        yield _answer_of(table, setting, boundaries, fits, level)


def _answer_of(
    table: RunTable, setting: Setting, boundaries: Sequence[BoundaryRecord], fits: Sequence[FitRecord], level: float
) -> str:
    name, fall = setting.label(table), _fall(table, setting)
    pooled = pooled_of(boundaries, setting)
    if not pooled:
        unpaired = "There are no pairs of a plain and a distilled run, so distillation cannot be judged."
        return f"On {name}, {fall} {unpaired}"
    law, free = pooled.get("law"), pooled["law_free"]
    main = leading(table, setting, boundaries, fits)
    verdict = _verdict(main, table, setting, level)
    other = _second_opinion(main, law, free, misfit=_misfit(fits, setting), mean=mean_delta(table, setting))
    return f"On {name}, {verdict}{other} Over all runs {fall}"


def pooled_of(boundaries: Sequence[BoundaryRecord], setting: Setting) -> dict[str, BoundaryRecord]:
    """The pooled boundaries of a setting by method."""
    return {record.method: record for record in boundaries if record.pooled and setting_of(record) == setting}


def leading(
    table: RunTable, setting: Setting, boundaries: Sequence[BoundaryRecord], fits: Sequence[FitRecord]
) -> BoundaryRecord:
    """The pooled boundary that the answer reports: the laws' where they describe the runs, else the paired runs'.

    Without a root the laws only lead where the paired runs show the same, or nothing for want of data.
    """
    pooled = pooled_of(boundaries, setting)
    law, free = pooled.get("law"), pooled["law_free"]
    if law is None or _misfit(fits, setting) or _contradicts(law, mean_delta(table, setting)):
        return free
    agreed = free.upstream_samples is None and free.direction in (None, law.direction)
    return law if law.upstream_samples is not None or agreed else free


def _misfit(fits: Sequence[FitRecord], setting: Setting) -> bool:
    return any(fit.chosen and setting_of(fit) == setting and is_poor(fit) for fit in fits)


def _contradicts(law: BoundaryRecord, measured: float) -> bool:
    """Whether a law says one sign throughout while the measured mean has the other."""
    sign = {"always_positive": 1, "always_negative": -1}.get(law.direction or "", 0)
    return sign * measured < 0


def _second_opinion(
    main: BoundaryRecord, law: BoundaryRecord | None, free: BoundaryRecord, *, misfit: bool, mean: float
) -> str:
    """What the other road to a boundary says, where that adds or contradicts; why the laws do not lead."""
    if law is None:
        return ""
    if main is free:
        return " " + _why_not(law, misfit=misfit, mean=mean)
    root = free.upstream_samples
    if root is not None:
        return f" Without assuming a law, the paired runs put it at {about(root.value)} ({interval_text(root)})."
    sure = percent(free.probability or 0, 0)
    alone = f" Without assuming a law, the paired runs alone do not establish it ({sure} of the drawn curves cross)."
    return alone if law.upstream_samples is not None else ""


def _why_not(law: BoundaryRecord, *, misfit: bool, mean: float) -> str:
    """Why the fitted laws do not give the answer."""
    if misfit:
        return "The fitted laws describe these runs too poorly to locate a boundary."
    if _contradicts(law, mean):
        return "The fitted laws give the arms' difference the other sign and are not used."
    told = BY_THE_LAWS[law.direction or "within_noise"]
    return f"That rests on the paired runs alone: by the fitted laws {told}."


def _fall(table: RunTable, setting: Setting) -> str:
    """How error changes with upstream data, which a study without pairs shows as well."""
    runs = table.pretrained.where(setting=setting)
    sizes = runs.values("upstream_samples")
    first, last = ends_of(runs)
    change = "falls" if last < first else "rises" if last > first else "stays the same"
    return (
        f"error {change} from {percent(first)} with {sizes[0]:,} upstream images to {percent(last)} with {sizes[-1]:,}."
    )


def _verdict(record: BoundaryRecord, table: RunTable, setting: Setting, level: float) -> str:
    low, high = (f"{size:,.0f}" for size in record.measured_range)
    root = record.upstream_samples
    if root is not None:
        where = f"about {about(root.value)} upstream images ({percent(level, 0)} interval {interval_text(root)})"
        if record.status == "extrapolated":
            return (
                f"the boundary would lie at {where}, outside the measured {low} to {high}: "
                "an extrapolation, to be measured before it is believed."
            )
        return (
            f"distilling from a smaller teacher pays up to {where}; with more, plain pretraining has the lower error."
        )
    if record.direction is None:
        return f"there is too little data for a boundary: {' '.join(record.words)}"
    mean = points_text(mean_delta(table, setting))
    span = f"between {low} and {high} upstream images"
    return WITHOUT_ROOT[record.direction].format(span=span, mean=f"mean difference {mean}")


WITHOUT_ROOT = {
    "always_positive": "distilling lowers error and nowhere clearly raises it {span} ({mean}); no boundary was found.",
    "always_negative": "distilling raises error and nowhere clearly lowers it {span} ({mean}); there is no boundary.",
    "negative_to_positive": (
        "distilling hurts with little upstream data and helps with much, {span} ({mean}): the reverse of a boundary."
    ),
    "positive_to_negative": (
        "distilling helps at first and hurts later {span} ({mean}), but where it turns is not established."
    ),
    "within_noise": "the arms do not differ consistently beyond noise {span} ({mean}): no boundary can be claimed.",
}
"""Verdicts without a root, by what ΔE does over the measured range."""

BY_THE_LAWS = {
    "always_positive": "distilling helps throughout",
    "always_negative": "distilling hurts throughout",
    "negative_to_positive": "distilling hurts first and helps later",
    "positive_to_negative": "distilling helps first and hurts later, but where it turns is open",
    "within_noise": "the arms do not differ beyond noise",
}
"""The same as a clause, where the laws are the second opinion."""


def mean_delta(table: RunTable, setting: Setting) -> float:
    runs = table.pretrained.where(setting=setting)
    plain = {run.place: run.error_rate for run in runs.where(arm="plain")}
    deltas = [plain[run.place] - run.error_rate for run in runs.where(arm="distilled") if run.place in plain]
    return float(np.mean(deltas)) if deltas else 0.0
