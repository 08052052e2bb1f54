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
        chosen = [fit for fit in fits if fit.chosen and setting_of(fit) == setting]
        yield _answer_of(table, setting, boundaries, trusted=not any(map(is_poor, chosen)), level=level)


def _answer_of(
    table: RunTable, setting: Setting, boundaries: Sequence[BoundaryRecord], *, trusted: bool, level: float
) -> str:
    """The laws' verdict first where they describe the runs well, else that of the paired runs."""
    name = setting.label(table)
    pooled = {
        record.method: record for record in boundaries if record.student is None and setting_of(record) == setting
    }
    if not pooled:
        unpaired = "There are no pairs of a plain and a distilled run, so distillation cannot be judged."
        return f"On {name}, {_fall(table, setting)} {unpaired}"
    fall = _fall(table, setting)
    verdict = _trusted_verdict(pooled, table, setting, trusted=trusted, level=level)
    return f"On {name}, {verdict} Over all runs {fall}"


def _trusted_verdict(
    pooled: dict[str, BoundaryRecord], table: RunTable, setting: Setting, *, trusted: bool, level: float
) -> str:
    law, free = pooled.get("law"), pooled["law_free"]
    without_law = _verdict(free, table, setting, level)
    if law is None:
        return without_law
    if not trusted:
        return f"{without_law} The fitted laws describe these runs too poorly to locate a boundary."
    if _contradicts(law, mean_delta(table, setting)):
        return f"{without_law} The fitted laws contradict that sign and are not used."
    return _verdict(law, table, setting, level) + _second_opinion(law, free)


def _contradicts(record: BoundaryRecord, measured: float) -> bool:
    """Whether a law says one sign throughout while the measured mean has the other."""
    sign = {"always_positive": 1, "always_negative": -1}.get(record.direction or "", 0)
    return sign * measured < 0


def _fall(table: RunTable, setting: Setting) -> str:
    """How error changes with upstream data, which a study without pairs shows as well."""
    runs = table.pretrained.where(setting=setting)
    sizes = runs.values("upstream_samples")
    first, last = ends_of(runs)
    change = "falls" if last < first else "does not fall"
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


def _second_opinion(main: BoundaryRecord, other: BoundaryRecord) -> str:
    """What the measurements say without a law, where that adds or contradicts."""
    root = other.upstream_samples
    if root is not None:
        return f" Without assuming a law, the paired runs put it at {about(root.value)} ({interval_text(root)})."
    if main.upstream_samples is not None:
        sure = percent(other.probability or 0, 0)
        return f" Without assuming a law, the paired runs alone do not establish it (probability {sure})."
    return ""


def mean_delta(table: RunTable, setting: Setting) -> float:
    runs = table.pretrained.where(setting=setting)
    plain = {run.place: run.error_rate for run in runs.where(arm="plain")}
    deltas = [plain[run.place] - run.error_rate for run in runs.where(arm="distilled") if run.place in plain]
    return float(np.mean(deltas)) if deltas else 0.0
