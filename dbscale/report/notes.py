"""Everything a reader must be warned of, in words: curves that do not fall, poor fits, missing cells, signs of failure.

Pure functions of the table and the findings; every judgement names the number it rests on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from dbscale.report.schema import BoundaryRecord, DeltaPoint, FitRecord
from dbscale.report.table import RunTable, Setting
from dbscale.report.words import listed, percent


class HasSetting(Protocol):
    """Any record of laws.json or boundary.json."""

    @property
    def variant(self) -> str: ...
    @property
    def upstream_dataset(self) -> str: ...
    @property
    def dataset(self) -> str: ...


POOR_FIT = 2.0
"""A fit is poor when its residuals exceed the noise between seeds this many times."""
FAR_OUT = 3.0
"""Held-out residuals may exceed the noise between seeds this many times before extrapolation is warned of."""
LEAST_NOISE = 0.02
"""Residuals of this size (2 %) are fine, however small the noise."""


def about_fits(table: RunTable, setting: Setting, fits: Sequence[FitRecord]) -> Iterator[str]:
    """Curves that do not fall, laws that fit poorly or not at all."""
    name = setting.label(table)
    for arm in table.arms:
        yield from _not_falling(table, setting, arm, name)
    if any(fit.chosen for fit in fits):
        yield from _two_values(table, setting, name)
    yield from _unfitted(fits, name)
    chosen = [fit for fit in fits if fit.chosen]
    poor = [_missed(fit, fit.rmsd_log, noise=True) for fit in chosen if is_poor(fit)]
    if poor:
        yield f"On {name} the {chosen[0].law} law misses {listed(poor)}: take its curves as a guide only."
    far = [_missed(fit, fit.held_out_rmsd_log) for fit in chosen if _is_far_out(fit)]
    if far:
        largest = max(table.pretrained.where(setting=setting).values("upstream_samples"))
        told = f"Fitted without the runs at {largest:,} upstream images, the {chosen[0].law} law misses their"
        yield f"{told} {listed(far)} on {name}: do not extrapolate."
    if not any(fit.chosen for fit in fits):
        yield f"No law could be fitted on {name}: only measurements are shown."


def _unfitted(fits: Sequence[FitRecord], name: str) -> Iterator[str]:
    """Laws without a fit, one sentence for each reason."""
    reasons: dict[str, list[FitRecord]] = {}
    for fit in fits:
        if fit.status != "fitted":
            reasons.setdefault(fit.reason, []).append(fit)
    for reason, without in reasons.items():
        laws, arms = (listed(dict.fromkeys(getattr(fit, part) for fit in without)) for part in ("law", "arm"))
        yield f"No fit of {laws} to {arms} error on {name}: {reason}."


def _missed(fit: FitRecord, size: float | None, *, noise: bool = False) -> str:
    """Whose error, by how much, and against what noise."""
    whom = f"{fit.arm} error" + (f" of {fit.student}" if fit.student else "")
    beside = f" ({(size or 0.0) / fit.noise_log:.1f} times the spread between seeds)" if noise and fit.noise_log else ""
    return f"{whom} by {percent(size or 0.0, 0)}{beside}"


def _is_far_out(fit: FitRecord) -> bool:
    """Held-out residuals well beyond the noise."""
    return (fit.held_out_rmsd_log or 0.0) > FAR_OUT * max(fit.noise_log or 0.05, LEAST_NOISE)


def _two_values(table: RunTable, setting: Setting, name: str) -> Iterator[str]:
    """Two values of an axis fix a difference, not an exponent."""
    runs = table.pretrained.where(setting=setting)
    for column, what in (("num_params", "model size"), ("downstream_samples", "D_f")):
        if len(runs.values(column)) == 2:
            yield (
                f"{name} was measured at two values of {what} only: its exponent is not determined; "
                "do not read the law between or beyond them."
            )


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
        fails = f"does not fall with upstream data in {len(flat)} of {total} curves"
        yield f"{arm.capitalize()} error on {name} {fails}: {shown}."


def about_missing(table: RunTable) -> Iterator[str]:
    """What the absence of failed cells does to the fits."""
    if not table.missing:
        return
    total = len(table) + len(table.missing)
    states = ", ".join(f"{count} {state}" for state, count in Counter(point.state for point in table.missing).items())
    gone = f"{len(table.missing)} of {total} points have no result ({states})"
    yield f"{gone}; laws and boundary rest on the other {len(table)}."
    yield from _gaps(table)
    pairs = {
        (p.variant, p.student, p.upstream_samples, p.dataset, p.downstream_samples, p.seed)
        for p in table.missing
        if p.upstream_samples
    }
    if pairs and "distilled" in {run.arm for run in table}:
        yield f"{len(pairs)} pairs of a plain and a distilled run are incomplete and left out of the measured ΔE."


def _gaps(table: RunTable) -> Iterator[str]:
    """Sizes at which a whole arm is missing."""
    gone: dict[tuple[str, str], set[int]] = {}
    for point in table.missing:
        if not len(table.where(dataset=point.dataset, arm=point.arm, upstream_samples=point.upstream_samples)):
            gone.setdefault((point.dataset, point.arm), set()).add(point.upstream_samples)
    for (dataset, arm), sizes in gone.items():
        where = "" if sizes == {0} else f" at {listed(f'{size:,}' for size in sorted(sizes))} upstream images"
        yield f"No {arm} run on {dataset}{where} has finished: its curve is interpolated there, or ends before."


def about_delta(boundaries: Sequence[BoundaryRecord], points: Sequence[DeltaPoint], table: RunTable) -> Iterator[str]:
    """The signs of failure, in words."""
    boundaries = [record for record in boundaries if record.status != "not_enough_data"]
    if not boundaries:
        return
    name = setting_of(boundaries[0]).label(table)
    yield from _signs([record for record in boundaries if record.pooled], name)
    for method, how in (("law", "The laws establish"), ("law_free", "The paired runs alone establish")):
        single = [record for record in boundaries if record.student is not None and record.method == method]
        found = sum(record.upstream_samples is not None for record in single)
        if found < len(single):
            yield f"{how} a boundary on {name} for {found} of {len(single)} combinations of student and labels."
    few = [point for point in points if point.num_seeds < 2 and point.student is not None]
    if few:
        yield f"{len(few)} points of ΔE on {name} rest on one seed: their intervals borrow the spread of the others."


def _signs(pooled: Sequence[BoundaryRecord], name: str) -> Iterator[str]:
    """What the pooled ΔE means; a sentence that both methods share is said once."""
    sources: dict[str, list[str]] = {}
    for record in pooled:
        for sentence in record.words:
            sources.setdefault(sentence, []).append("the laws" if record.method == "law" else "the paired runs")
    yield from (f"{name}, from {listed(methods)}: {sentence}" for sentence, methods in sources.items())


def ends_of(runs: RunTable) -> tuple[float, float]:
    """Mean error at the smallest and at the largest D_p."""
    sizes = runs.values("upstream_samples")
    first, last = (np.mean(runs.where(upstream_samples=size).column("error_rate")) for size in (sizes[0], sizes[-1]))
    return float(first), float(last)


def setting_of(record: HasSetting) -> Setting:
    return Setting(record.variant, record.upstream_dataset, record.dataset)
