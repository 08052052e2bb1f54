"""What the numbers say, in sentences: the answer first, then everything a reader must be warned of.

Pure functions of the table and the findings; every judgement names the number it rests on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from dbscale.report.schema import BoundaryRecord, DeltaPoint, Estimate, FitRecord
from dbscale.report.table import RunTable, Setting

POOR_FIT = 2.0
"""A fit is poor when its residuals exceed the noise between seeds this many times."""
LEAST_NOISE = 0.02
"""Residuals of this size (2 %) are fine, however small the noise."""


def about(value: float) -> str:
    """A count as one would say it: two significant digits, thousands apart."""
    return f"{float(f'{value:.2g}'):,.0f}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def points_text(delta: float) -> str:
    """A difference of error rates in percentage points."""
    return f"{100 * delta:+.1f} points"


def interval_text(estimate: Estimate) -> str:
    low = about(estimate.low) if estimate.low is not None else "below the searched range"
    high = about(estimate.high) if estimate.high is not None else "beyond the searched range"
    return f"{low} to {high}"


def answers(table: RunTable, boundaries: Sequence[BoundaryRecord]) -> Iterator[str]:
    """The study's result in a sentence or two a setting."""
    if not len(table.pretrained):
        yield "No finished run with upstream data yet: there is nothing to conclude."
    yield from (_answer_of(table, setting, boundaries) for setting in table.settings)


def _answer_of(table: RunTable, setting: Setting, boundaries: Sequence[BoundaryRecord]) -> str:
    name = setting.label(table)
    pooled = [record for record in boundaries if record.student is None and _setting(record) == setting]
    if not pooled:
        return f"On {name}, {_fall(table, setting)}"
    main = next((record for record in pooled if record.method == "law"), pooled[0])
    other = next((record for record in pooled if record is not main), None)
    return f"On {name}, {_verdict(main, table, setting)}{_second_opinion(main, other)}"


def _setting(record: BoundaryRecord | DeltaPoint | FitRecord) -> Setting:
    return Setting(record.variant, record.upstream_dataset, record.dataset)


def _fall(table: RunTable, setting: Setting) -> str:
    """A study without pairs still shows how error falls."""
    runs = table.pretrained.where(setting=setting)
    sizes = runs.values("upstream_samples")
    first, last = (float(np.mean(runs.where(upstream_samples=size).column("error_rate"))) for size in (sizes[0], sizes[-1]))
    change = "falls" if last < first else "does not fall"
    return (
        f"error {change} from {percent(first)} with {sizes[0]:,} upstream images to {percent(last)} with {sizes[-1]:,}; "
        "there are no pairs of a plain and a distilled run, so distillation cannot be judged."
    )


def _verdict(record: BoundaryRecord, table: RunTable, setting: Setting) -> str:
    low, high = (f"{size:,.0f}" for size in record.measured_range)
    if record.upstream_samples is not None:
        root = f"about {about(record.upstream_samples.value)} upstream images (90 % interval {interval_text(record.upstream_samples)})"
        if record.status == "extrapolated":
            return f"the boundary would lie at {root}, outside the measured {low} to {high}: an extrapolation, to be measured before it is believed."
        return f"distilling from a smaller teacher pays up to {root}; with more, plain pretraining has the lower error."
    mean = f"mean difference {points_text(mean_delta(table, setting))}"
    return {
        "always_positive": f"distilling lowers the error throughout {low} to {high} upstream images ({mean}); no boundary was found.",
        "always_negative": f"distilling never lowers the error between {low} and {high} upstream images ({mean}); there is no boundary.",
        "negative_to_positive": f"distilling hurts with little upstream data and helps with much ({mean}): the reverse of a boundary.",
        "positive_to_negative": f"distilling helps at first and hurts later between {low} and {high} upstream images, but where it turns is not established ({mean}).",
        "within_noise": f"the arms do not differ beyond noise between {low} and {high} upstream images ({mean}): no boundary can be claimed.",
        None: f"there is too little data for a boundary: {' '.join(record.words)}",
    }[record.direction]  # fmt: skip


def _second_opinion(main: BoundaryRecord, other: BoundaryRecord | None) -> str:
    """What the measurements say without a law, where that adds or contradicts."""
    if other is None or main.method != "law":
        return ""
    if other.upstream_samples is not None:
        return f" Without assuming a law, the paired runs put it at {about(other.upstream_samples.value)} ({interval_text(other.upstream_samples)})."
    if main.upstream_samples is not None:
        return f" Without assuming a law, the paired runs alone do not establish it (probability {percent(other.probability or 0, 0)})."
    return ""


def mean_delta(table: RunTable, setting: Setting) -> float:
    runs = table.pretrained.where(setting=setting)
    plain = {run.place: run.error_rate for run in runs.where(arm="plain")}
    deltas = [plain[run.place] - run.error_rate for run in runs.where(arm="distilled") if run.place in plain]
    return float(np.mean(deltas)) if deltas else 0.0


def about_fits(table: RunTable, setting: Setting, fits: Sequence[FitRecord]) -> Iterator[str]:
    """Curves that do not fall, laws that fit poorly or not at all."""
    name = setting.label(table)
    for arm in table.arms:
        yield from _not_falling(table, setting, arm, name)
    yield from _two_values(table, setting, name)
    for fit in fits:
        whom = f"{fit.arm} error on {name}" + (f" with {fit.student}" if fit.student else "")
        if fit.status != "fitted":
            yield f"The {fit.law} law has no fit to {whom}: {fit.reason}."
        elif fit.chosen and is_poor(fit):
            noise = f", {fit.rmsd_log / fit.noise_log:.1f} times the spread between seeds" if fit.noise_log else ""
            yield f"The {fit.law} law misses {whom} by {percent(fit.rmsd_log or 0, 0)} (root mean square){noise}: take its curves as a guide only."
    if not any(fit.chosen for fit in fits):
        yield f"No law could be fitted to both arms on {name}: only measurements are shown."


def _two_values(table: RunTable, setting: Setting, name: str) -> Iterator[str]:
    """Two values of an axis fix a difference, not an exponent."""
    runs = table.pretrained.where(setting=setting)
    for column, what in (("num_params", "model size"), ("downstream_samples", "D_f")):
        if len(runs.values(column)) == 2:
            yield f"{name} was measured at two values of {what} only: its exponent is not determined; do not read the law between or beyond them."


def is_poor(fit: FitRecord) -> bool:
    """Residuals well beyond what repeated seeds explain."""
    return fit.rmsd_log is not None and fit.rmsd_log > POOR_FIT * max(fit.noise_log or 0.05, LEAST_NOISE)


def _not_falling(table: RunTable, setting: Setting, arm: str, name: str) -> Iterator[str]:
    runs = table.pretrained.where(setting=setting, arm=arm)
    flat, total = [], 0
    for student in runs.students:
        for labels in runs.where(student=student).values("downstream_samples"):
            part = runs.where(student=student, downstream_samples=labels)
            if len(part.values("upstream_samples")) < 2:
                continue
            total += 1
            first, last = ends_of(part)
            if last >= first:
                flat.append(f"{student} at {labels:,} labels ({percent(first)} to {percent(last)})")
    if flat:
        shown = ", ".join(flat[:4]) + (f" and {len(flat) - 4} more" if len(flat) > 4 else "")
        yield f"{arm.capitalize()} error on {name} does not fall with upstream data in {len(flat)} of {total} curves: {shown}."


def ends_of(runs: RunTable) -> tuple[float, float]:
    """Mean error at the smallest and at the largest D_p."""
    sizes = runs.values("upstream_samples")
    first, last = (np.mean(runs.where(upstream_samples=size).column("error_rate")) for size in (sizes[0], sizes[-1]))
    return float(first), float(last)


def about_missing(table: RunTable) -> Iterator[str]:
    """What the absence of failed cells does to the fits."""
    if not table.missing:
        return
    total = len(table) + len(table.missing)
    states = ", ".join(f"{count} {state}" for state, count in Counter(point.state for point in table.missing).items())
    yield f"{len(table.missing)} of {total} points have no result ({states}); laws and boundary rest on the other {len(table)}."
    lost = Counter((point.dataset, point.arm, point.upstream_samples) for point in table.missing)
    for (dataset, arm, size), count in lost.items():
        kept = len(table.where(dataset=dataset, arm=arm, upstream_samples=size))
        if kept == 0:
            where = "without upstream data" if size == 0 else f"at {size:,} upstream images"
            yield f"No {arm} run on {dataset} {where} finished: its curve is interpolated there, or ends before."
    pairs = {(p.variant, p.student, p.upstream_samples, p.dataset, p.downstream_samples, p.seed) for p in table.missing if p.upstream_samples}
    if pairs and "distilled" in {run.arm for run in table}:
        yield f"{len(pairs)} pairs of a plain and a distilled run are incomplete and left out of the measured ΔE."


def about_delta(boundaries: Sequence[BoundaryRecord], points: Sequence[DeltaPoint], table: RunTable) -> Iterator[str]:
    """The signs of failure, in words."""
    if not boundaries:
        return
    name = _setting(boundaries[0]).label(table)
    for record in boundaries:
        if record.student is None:
            how = "from the laws" if record.method == "law" else "from the paired runs"
            yield from (f"{name}, {how}: {sentence}" for sentence in record.words)
    for method, how in (("law", "The laws establish"), ("law_free", "The paired runs alone establish")):
        single = [record for record in boundaries if record.student is not None and record.method == method]
        found = sum(record.upstream_samples is not None for record in single)
        if found < len(single):
            yield f"{how} a boundary on {name} for {found} of {len(single)} combinations of student and labels."
    few = [point for point in points if point.num_seeds < 2 and point.student is not None]
    if few:
        yield f"{len(few)} points of ΔE on {name} rest on one seed: their intervals borrow the spread of the other points."
