"""What a hunt is judged by, and how its path is told: the pairs of its targets, a figure, a section of the page.

Which runs are bought is decided in `dbscale.laws.design`; the log of the waves is `dbscale.study.hunt`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbscale.errors import FileError
from dbscale.laws import Pairs, make_pairs
from dbscale.laws.boundary import equal_grid
from dbscale.report.pairing import pair_arms
from dbscale.report.schema import ContrastRecord
from dbscale.report.table import Run, RunTable
from dbscale.report.words import count, listed
from dbscale.study.cost import duration
from dbscale.study.grid import Hunt
from dbscale.study.hunt import STOPS, WHY, HuntLog, Target, read_log
from dbscale.study.store import Store

ARMS = ({"arm": "plain"}, {"arm": "distilled"})


def on_page(hunt: Hunt, metric: str = "error_rate") -> bool:
    """Whether a report judges what this hunt judges, plain against distilled along D_p, by the `metric`."""
    return (hunt.a, hunt.b, hunt.along, hunt.metric) == (*ARMS, "upstream_samples", metric)


def target_pairs(
    table: RunTable, hunt: Hunt, target: Target, wrong: Mapping[str, np.ndarray] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Pairs | None:  # fmt: skip
    """Δ of one target along the hunt's axis, from the runs that are finished; None without a pair.

    Of plain against distilled along D_p these are the report's own pairs, so that both come to one verdict; `wrong` is
    then the noise of the test set, as `pair_arms` takes it. Along num_params `sizes` gives each student's place.
    """
    runs = table.pretrained.where(dataset=target.dataset)
    if not len(runs):
        return None
    if on_page(hunt, hunt.metric):
        pairs, _ = pair_arms(runs, runs.settings[0], metric=hunt.metric, wrong=wrong)
    else:
        pairs = _pair_sides(runs, hunt, sizes or {})
    if pairs is None or target.size is None:
        return pairs
    kept = [k for k, labels in enumerate(pairs.labels.tolist()) if labels == target.size]
    kept = [k for k in kept if target.student is None or pairs.student.tolist()[k] == target.student]
    return pairs.rows(np.array(kept)) if kept else None


def _pair_sides(runs: RunTable, hunt: Hunt, sizes: Mapping[str, int]) -> Pairs | None:
    """Runs of the two sides that agree in everything else; strata are students and the size that is not the axis."""
    size = "upstream_samples" if hunt.along == "downstream_samples" else "downstream_samples"
    by_student = hunt.along != "num_params" and "student" not in hunt.a

    def key(run: Run) -> tuple:
        x = sizes[run.student] if hunt.along == "num_params" else getattr(run, hunt.along)
        return x, run.seed, run.student if by_student else "", getattr(run, size), run.finetune

    one, other = (
        {key(run): value for run in runs.where(**side) if (value := getattr(run, hunt.metric)) is not None}
        for side in (hunt.a, hunt.b)
    )
    shared = sorted(one.keys() & other.keys())
    if not shared:
        return None
    x, seed, student, labels, draw = zip(*shared, strict=True)
    delta = [one[each] - other[each] for each in shared]
    return make_pairs(x, delta, seed=seed, student=student, labels=labels, draw=draw)


# The path of a hunt on the page.

WIDTH, WRONG = "width of the boundary's interval", "wrong advice left"
"""The two curves of the figure."""


@dataclass(frozen=True)
class HuntStory:
    """What a page tells of a hunt."""

    sentences: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    """Points of the figure: panel, series, hours, octaves."""
    waves: tuple[dict[str, str], ...]
    """Lines of the table: wave, time, findings, bought."""


def hunt_story(store: Store, grid: str, contrasts: Sequence[ContrastRecord]) -> HuntStory | None:
    """How the hunt of a grid went, from its log; None where the grid was not hunted or its log cannot be read."""
    try:
        log = read_log(store, grid)
    except FileError:
        return None
    if log is None or not log.waves:
        return None
    return HuntStory(tuple(_sentences(log, contrasts)), tuple(_path(log)), tuple(_waves(log)))


def _path(log: HuntLog) -> Iterator[dict[str, Any]]:
    for wave in log.waves:
        for found in wave.findings:
            place = {"part": "path", "panel": found.target, "x": wave.spent_s / 3600}
            if found.doubt is not None:
                yield place | {"series": WRONG, "y": found.doubt}
            if found.low is not None and found.high is not None:
                yield place | {"series": WIDTH, "y": math.log2(found.high / found.low)}


def _waves(log: HuntLog) -> Iterator[dict[str, str]]:
    for wave in log.waves:
        findings = listed(
            f"{found.target}: {(found.kind or 'nothing yet').replace('_', ' ')}"
            + ("" if found.root is None else f" at {count(round(found.root))}")
            for found in wave.findings
        )
        bought = "; ".join(f"{each.num_pairs} at {count(each.x)}: {WHY[each.reason]}" for each in wave.bought)
        told = bought or (f"over: {_stop(wave.stopped)}" if wave.stopped else "")
        yield {"wave": str(wave.number), "time": duration(wave.spent_s), "findings": findings, "bought": told}


def _stop(stopped: str) -> str:
    return "; ".join(STOPS[reason] for reason in stopped.split(", "))


def _sentences(log: HuntLog, contrasts: Sequence[ContrastRecord]) -> Iterator[str]:
    last = log.waves[-1]
    waves = [wave for wave in log.waves if wave.bought]
    pairs = sum(each.num_pairs for wave in waves for each in wave.bought)
    over = f"It is over: {_stop(last.stopped)}." if last.stopped else "It is not over."
    yield (
        "These runs were chosen wave by wave, each where it was expected to remove most wrong advice per device-hour: "
        f"{_many(pairs, 'pair')} in {_many(len(waves), 'wave')}. {over}"
    )
    number = len(last.findings)
    told, together = (f", and this one has {number} targets", "all of them hold") if number > 1 else ("", "it holds")
    yield (
        f"A hunt looks after every wave{told}: each verdict stands on intervals of level {last.verdict_level:.1%}, so that "
        f"{together} at {log.level:.0%}."
    )
    if last.failed_pairs:
        lack = "lacks" if last.failed_pairs == 1 else "lack"
        yield f"{_many(last.failed_pairs, 'pair')} {lack} a run that failed: neither replaced nor tried again."
    equal = equal_cost(log, contrasts)
    if equal is not None:
        seeds, sizes, seconds = equal
        yield (
            f"By the noise measured here, a fixed grid of {sizes} sizes, one an octave, would need {_many(seeds, 'seed')} "
            f"and about {duration(seconds)} for verdicts as sharp; the hunt used {duration(last.spent_s)}."
        )


def _many(number: int, noun: str) -> str:
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def equal_cost(log: HuntLog, contrasts: Sequence[ContrastRecord]) -> tuple[int, int, float] | None:
    """Seeds, sizes and device-seconds of a fixed grid, one x an octave, that would end in the same verdicts.

    The curves found are taken for the truth, prices are those the hunt met, in proportion to what its runs took. None
    for a hunt without a verdict.
    """
    bought = [each for wave in log.waves for each in wave.bought]
    targets = {found.target for found in log.waves[-1].findings}
    judged = [
        r for r in contrasts if r.pooled and r.metric == "error_rate" and r.dataset in targets and r.along == log.along
    ]
    if not bought or not judged or len(judged) < len(targets):
        return None
    low, high = log.span
    sizes = np.geomspace(low, high, round(math.log2(high / low)) + 1)
    seeds = []
    for record in judged:
        if record.verdict is None or record.noise is None or not record.noise.by_x:
            return None
        sd = float(np.mean([sd**2 for _, sd in record.noise.by_x])) ** 0.5
        seeds.append(equal_grid(record.verdict, sd, sizes.tolist()))
    if None in seeds:
        return None
    price: dict[int, list[float]] = {}
    for each in bought:
        price.setdefault(each.x, []).append(each.cost_s / each.num_pairs)
    known = sorted(price)
    each_s = np.interp(np.log(sizes), np.log(known), [np.mean(price[x]) for x in known])
    met = log.waves[-1].spent_s / sum(each.cost_s for each in bought)
    most = max(each for each in seeds if each is not None)
    return most, len(sizes), float(most * each_s.sum() * met)
