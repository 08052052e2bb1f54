"""What the numbers say, in sentences: the answer first, then everything a reader must be warned of.

Pure functions of the table and the findings; every judgement names the number it rests on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

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


SYMBOLS = (
    ("E_inf", "E∞"), ("^-alpha", "^(−α)"), ("^-beta", "^(−β)"), ("^-gamma", "^(−γ)"), ("alpha", "α"), ("beta", "β"),
    ("gamma", "γ"), ("*", "·"), ("transfer_gap", "transfer gap"),
)  # fmt: skip


def symbols(text: str) -> str:
    """A law's name, equation or parameter in mathematics' own letters."""
    for plain, letter in SYMBOLS:
        text = text.replace(plain, letter)
    return text


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def points_text(delta: float) -> str:
    """A difference of error rates in percentage points."""
    return f"{100 * delta:+.1f} points"


def interval_text(estimate: Estimate) -> str:
    low = about(estimate.low) if estimate.low is not None else "below the searched range"
    high = about(estimate.high) if estimate.high is not None else "beyond the searched range"
    return f"{low} to {high}"


def answers(table: RunTable, boundaries: Sequence[BoundaryRecord], fits: Sequence[FitRecord] = ()) -> Iterator[str]:
    """The study's result in a sentence or two a setting."""
    if not len(table.pretrained):
        yield "No finished run with upstream data yet: there is nothing to conclude."
    for setting in table.settings:
        chosen = [fit for fit in fits if fit.chosen and _setting(fit) == setting]
        yield _answer_of(table, setting, boundaries, trusted=not any(map(is_poor, chosen)), level=level)


def _answer_of(
    table: RunTable, setting: Setting, boundaries: Sequence[BoundaryRecord], *, trusted: bool, level: float
) -> str:
    """The laws' verdict first where they describe the runs well, else that of the paired runs."""
    name = setting.label(table)
    pooled = {record.method: record for record in boundaries if record.student is None and _setting(record) == setting}
    if not pooled:
        return f"On {name}, {_fall(table, setting)}"
    law, free = pooled.get("law"), pooled["law_free"]
    if law is None or not trusted or _contradicts(law, mean_delta(table, setting)):
        poor = " The fitted laws describe these runs too poorly to locate a boundary." if law is not None else ""
        return f"On {name}, {_verdict(free, table, setting, level)}{poor}"
    return f"On {name}, {_verdict(law, table, setting, level)}{_second_opinion(law, free)}"


def _contradicts(record: BoundaryRecord, measured: float) -> bool:
    """Whether a law says one sign throughout while the measured mean has the other."""
    sign = {"always_positive": 1, "always_negative": -1}.get(record.direction or "", 0)
    return sign * measured < 0


def _setting(record: BoundaryRecord | DeltaPoint | FitRecord) -> Setting:
    return Setting(record.variant, record.upstream_dataset, record.dataset)


def _fall(table: RunTable, setting: Setting) -> str:
    """A study without pairs still shows how error falls."""
    runs = table.pretrained.where(setting=setting)
    sizes = runs.values("upstream_samples")
    first, last = ends_of(runs)
    change = "falls" if last < first else "does not fall"
    return (
        f"error {change} from {percent(first)} with {sizes[0]:,} upstream images to {percent(last)} "
        f"with {sizes[-1]:,}; there are no pairs of a plain and a distilled run, so distillation cannot be judged."
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
    "always_positive": "distilling lowers the error throughout, {span} ({mean}); no boundary was found.",
    "always_negative": "distilling never lowers the error {span} ({mean}); there is no boundary.",
    "negative_to_positive": (
        "distilling hurts with little upstream data and helps with much, {span} ({mean}): the reverse of a boundary."
    ),
    "positive_to_negative": (
        "distilling helps at first and hurts later {span} ({mean}), but where it turns is not established."
    ),
    "within_noise": "the arms do not differ beyond noise {span} ({mean}): no boundary can be claimed.",
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


def about_fits(table: RunTable, setting: Setting, fits: Sequence[FitRecord]) -> Iterator[str]:
    """Curves that do not fall, laws that fit poorly or not at all."""
    name = setting.label(table)
    for arm in table.arms:
        yield from _not_falling(table, setting, arm, name)
    if any(fit.chosen for fit in fits):
        yield from _two_values(table, setting, name)
    yield from _unfitted(fits, name)
    for fit in fits:
        if fit.chosen and is_poor(fit):
            yield _poor(fit, f"{fit.arm} error on {name}" + (f" with {fit.student}" if fit.student else ""))
    if not any(fit.chosen for fit in fits):
        yield f"No law could be fitted on {name}: only measurements are shown."


def _unfitted(fits: Sequence[FitRecord], name: str) -> Iterator[str]:
    """Laws without a fit, one sentence for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for fit in fits:
        if fit.status != "fitted":
            reasons.setdefault((fit.arm, fit.reason), []).append(fit.law)
    for (arm, reason), laws in reasons.items():
        yield f"No fit of {listed(dict.fromkeys(laws))} to {arm} error on {name}: {reason}."


def _poor(fit: FitRecord, whom: str) -> str:
    size = fit.rmsd_log or 0.0
    noise = f", {size / fit.noise_log:.1f} times the spread between seeds" if fit.noise_log else ""
    miss = f"misses {whom} by {percent(size, 0)} (root mean square){noise}"
    return f"The {fit.law} law {miss}: take its curves as a guide only."


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


def listed(items: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def about_delta(boundaries: Sequence[BoundaryRecord], points: Sequence[DeltaPoint], table: RunTable) -> Iterator[str]:
    """The signs of failure, in words."""
    boundaries = [record for record in boundaries if record.status != "not_enough_data"]
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
        yield f"{len(few)} points of ΔE on {name} rest on one seed: their intervals borrow the spread of the others."
