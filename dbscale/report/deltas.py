"""Measured ΔE = E_plain − E_distilled from paired runs, with its uncertainty; no law is assumed.

A pair shares student, D_p, D_f and seed, hence initialisation, sample order and test samples: most noise cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dbscale.report.schema import DeltaPoint, Estimate
from dbscale.report.table import Run, RunTable, Setting


@dataclass(frozen=True)
class Pair:
    """Two runs that differ in the arm alone."""

    plain: Run
    distilled: Run

    @property
    def delta(self) -> float:
        return self.plain.error_rate - self.distilled.error_rate


def pairs_of(table: RunTable, setting: Setting) -> list[Pair]:
    """Complete pairs of a setting, by D_p."""
    runs = table.pretrained.where(setting=setting)
    distilled = {run.place: run for run in runs.where(arm="distilled")}
    found = [Pair(run, distilled[run.place]) for run in runs.where(arm="plain") if run.place in distilled]
    return sorted(found, key=lambda pair: pair.plain.place)


def sampling_variance(pair: Pair, wrong: dict[str, np.ndarray]) -> float:
    """Variance of ΔE from the finite test set: paired by sample where single results exist, else an upper bound."""
    plain, distilled = wrong.get(pair.plain.key), wrong.get(pair.distilled.key)
    if plain is not None and distilled is not None and len(plain) == len(distilled):
        return float(np.var(plain.astype(float) - distilled.astype(float)) / len(plain))
    runs = (pair.plain, pair.distilled)
    return sum(run.error_rate * (1 - run.error_rate) / (run.num_test_samples or math.inf) for run in runs)


def complete_groups(pairs: Sequence[Pair]) -> dict[tuple[int, int], list[Pair]]:
    """Pairs by (D_p, seed), those only that hold every student and D_f: means over them are comparable."""
    groups: dict[tuple[int, int], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.plain.upstream_samples, pair.plain.seed), []).append(pair)
    wanted = len({(pair.plain.student, pair.plain.downstream_samples) for pair in pairs})
    return {place: group for place, group in sorted(groups.items()) if len(group) == wanted}


def delta_points(pairs: list[Pair], wrong: dict[str, np.ndarray], *, level: float) -> list[DeltaPoint]:
    """Mean ΔE over seeds at every point, and pooled over students and D_f at every D_p.

    Intervals come from the spread between seeds, pooled over points of equal D_f, and from the finite test set.
    """
    cells: dict[tuple[str, int, int], list[Pair]] = {}
    for pair in pairs:
        run = pair.plain
        cells.setdefault((run.student, run.downstream_samples, run.upstream_samples), []).append(pair)
    points = []
    for labels in sorted({place[1] for place in cells}):
        groups = [group for place, group in cells.items() if place[1] == labels]
        spread = Spread.of([[pair.delta for pair in group] for group in groups], level)
        points += [_point(group, spread, wrong) for group in groups]
    return points + _pooled_points(pairs, wrong, level)


@dataclass(frozen=True)
class Spread:
    """Variance between seeds, and Student's factor for its degrees of freedom."""

    variance: float
    factor: float

    @classmethod
    def of(cls, groups: list[list[float]], level: float) -> Spread:
        from scipy.special import stdtrit

        variance, degrees = pooled_variance(groups)
        return cls(variance, float(stdtrit(degrees, 0.5 + level / 2)) if degrees else math.inf)

    def estimate(self, by_seed: list[float], sampling: float) -> Estimate:
        """Mean with its interval; open where nothing is known of the spread."""
        mean = float(np.mean(by_seed))
        # Seed spread holds the test-sample noise of single pairs already; it is the floor, not an addend.
        half = self.factor * math.sqrt(max(self.variance / len(by_seed), sampling))
        return Estimate(value=mean, low=mean - half, high=mean + half) if math.isfinite(half) else Estimate(value=mean)


def _point(group: list[Pair], spread: Spread, wrong: dict[str, np.ndarray]) -> DeltaPoint:
    run, deltas = group[0].plain, [pair.delta for pair in group]
    sampling = float(np.mean([sampling_variance(pair, wrong) for pair in group])) / len(group)
    return DeltaPoint(
        **run.setting._asdict(), student=run.student, num_params=run.num_params, upstream_samples=run.upstream_samples,
        downstream_samples=run.downstream_samples, num_seeds=len(group), by_seed=tuple(deltas),
        delta=spread.estimate(deltas, sampling),
    )  # fmt: skip


def _pooled_points(pairs: list[Pair], wrong: dict[str, np.ndarray], level: float) -> list[DeltaPoint]:
    """At every D_p the mean over students and D_f, for the seeds that have all of them."""
    groups: dict[int, dict[int, list[Pair]]] = {}
    for (size, seed), group in complete_groups(pairs).items():
        groups.setdefault(size, {})[seed] = group
    means = {
        size: [float(np.mean([pair.delta for pair in group])) for group in seeds.values()]
        for size, seeds in groups.items()
    }
    spread = Spread.of(list(means.values()), level)
    return [
        DeltaPoint(
            **pairs[0].plain.setting._asdict(), student=None, num_params=None, upstream_samples=size,
            downstream_samples=None,
            num_seeds=len(by_seed), by_seed=tuple(by_seed),
            delta=spread.estimate(by_seed, _shared_sampling(groups[size], wrong, len(by_seed))),
        )
        for size, by_seed in means.items()
    ]  # fmt: skip


def _shared_sampling(seeds: dict[int, list[Pair]], wrong: dict[str, np.ndarray], num_seeds: int) -> float:
    """All pairs share one test set: its noise is averaged over seeds, not over students and D_f."""
    return float(np.mean([sampling_variance(pair, wrong) for group in seeds.values() for pair in group])) / num_seeds


def pooled_variance(groups: list[list[float]]) -> tuple[float, int]:
    """Variance within groups over all of them, and its degrees of freedom; (0, 0) where no group has two values."""
    degrees = sum(len(group) - 1 for group in groups if group)
    if degrees == 0:
        return 0.0, 0
    squares = sum(float(np.var(group)) * len(group) for group in groups if group)
    return squares / degrees, degrees


def seed_noise_log(runs: list[Run]) -> float | None:
    """Standard deviation of log error between seeds of one point: the residual that no law removes."""
    cells: dict[tuple[str, int, int], list[float]] = {}
    for run in runs:
        place = (run.student, run.upstream_samples, run.downstream_samples)
        cells.setdefault(place, []).append(math.log(max(run.error_rate, 1e-4)))
    variance, degrees = pooled_variance(list(cells.values()))
    return math.sqrt(variance) if degrees else None
