"""Contrasts of two procedures: paired differences, their noise by address, intervals and smooth curves.

Δ = y_A − y_B along one axis, positive where B has the lower y. Read in this order: pairs → one Δ per seed and x
(`SeedTable`) → means with intervals (`delta_points`) → the smooth curve (`delta_curves`). Where the noise comes from is
`noise`'s, verdicts are `boundary`'s; what A and B are, and who ran them, is the caller's.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from dbscale.errors import LawError, NotEnoughData, nearest

PRIOR_DEGREES = 4.0
"""Degrees of freedom with which the variance at one x is drawn to that of all x (limma's d0, Smyth 2004). Fixed: estimated
from the five to seven x of a study, 90 % intervals of 2–4 seeds cover .86–.89; with 4 they cover .89–.92, equal
variances or three-fold sd's alike (docs/calibration.md).
"""
LENGTHS, BENDS, CORRELATIONS = (0.1, 0.2, 0.4, 0.8), (0.1, 0.3, 1.0), (0.0, 0.3, 0.6)
"""Hyperparameters of the smooth curve: the bend's length in units of the measured log range, its size, and how much of
a seed's noise its x have in common.
"""
SHORTEST = 0.6
"""Least length of a bend, in units of the median step between neighbouring x: what bends within a step cannot be seen.
At four x, intervals of humps' roots hold .98 with half a step, .89 with this and .76 with .7 (docs/calibration.md).
"""
NODES, SCALES = 16, 16
"""Nodes of the bend's basis; quantiles at which the noise's unknown scale is drawn."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Paired differences, one row per (student, labels, x, seed, draw); `make_pairs` makes them. A stratum is one
    (student, labels).
    """

    x: np.ndarray
    """[n] > 0: position along the axis (D_p, compute, M, D_f)."""
    delta: np.ndarray
    """[n] y_A − y_B."""
    seed: np.ndarray
    """[n] label of the repetition."""
    student: np.ndarray
    """[n] label of the first stratum axis."""
    labels: np.ndarray
    """[n] label of the second stratum axis (D_f)."""
    draw: np.ndarray
    """[n] label of the finetune draw."""
    teacher: np.ndarray
    """[n] label of the teacher run among those of one x and seed; students with equal labels share it."""
    test_variance: np.ndarray
    """[n] variance of each Δ over test sets; 0 where unknown."""
    by_sample: np.ndarray | None = None
    """[n, m] wrong_A − wrong_B of every test sample, in {-1, 0, 1}, or means of those; None unless all rows have them."""
    left_out: int = 0
    """Number of (x, seed) that `pooled` left out because a stratum is missing there."""

    def of(self, student: Hashable | None = None, labels: Hashable | None = None) -> Pairs:
        """The rows of one student, of one `labels`, or of both. Raises LawError naming the values that exist."""
        kept = np.ones(len(self.x), bool)
        for name, wanted in (("student", student), ("labels", labels)):
            column = getattr(self, name).tolist()
            if wanted is not None and wanted not in column:
                raise LawError(f"no pair has {name} {wanted!r}: {nearest(wanted, set(column))}")
            kept &= np.array([wanted in (None, value) for value in column])
        if not kept.any():
            raise LawError(f"no pair has student {student!r} and labels {labels!r} together")
        return self.rows(np.flatnonzero(kept))

    def rows(self, rows: np.ndarray) -> Pairs:
        """The rows of these indices."""
        columns = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **columns)

    def pooled(self) -> Pairs:
        """Mean over draws, then over strata, of each (x, seed) that has all strata: one row each, one stratum.

        What is incomplete is left out and counted. Raises NotEnoughData where no (x, seed) has all strata.
        """
        stratum, cell = group_codes(self.student, self.labels), group_codes(self.x, self.seed)
        num_strata, num_cells = stratum.max() + 1, cell.max() + 1
        draws = np.bincount(cell * num_strata + stratum, minlength=num_cells * num_strata).reshape(num_cells, -1)
        if num_strata == 1 and draws.max() == 1:
            return self
        complete = (draws > 0).all(axis=1)
        if not complete.any():
            row = stratum.tolist().index(int((draws > 0).sum(axis=0).argmin()))
            student, labels = self.student.tolist()[row], self.labels.tolist()[row]
            raise NotEnoughData(
                f"no x and seed has all {num_strata} strata, so nothing can be pooled: student {student!r} with labels "
                f"{labels!r} has the fewest; run the missing cells, or judge one stratum at a time"
            )
        weight = np.zeros((num_cells, len(cell)))
        weight[cell, np.arange(len(cell))] = 1.0 / (draws[cell, stratum] * num_strata)
        weight, rows = weight[complete], np.unique(cell, return_index=True)[1][complete]
        return replace(
            self.rows(rows),
            delta=weight @ self.delta,
            test_variance=weight**2 @ self.test_variance,
            student=np.full(len(rows), "all"),
            labels=np.full(len(rows), "all"),
            draw=np.zeros(len(rows), int),
            by_sample=None if self.by_sample is None else weight @ self.by_sample,
            left_out=self.left_out + int(np.sum(~complete)),
        )


def make_pairs(
    x: Sequence[float] | np.ndarray,
    delta: Sequence[float] | np.ndarray,
    *,
    seed: Sequence[Hashable] | np.ndarray,
    student: Sequence[Hashable] | np.ndarray | None = None,
    labels: Sequence[Hashable] | np.ndarray | None = None,
    draw: Sequence[Hashable] | np.ndarray | None = None,
    teacher: Sequence[Hashable] | np.ndarray | None = None,
    test_variance: Sequence[float] | np.ndarray | None = None,
    by_sample: Mapping[int, Sequence[int] | np.ndarray] | None = None,
) -> Pairs:
    """Checked pairs; columns as in `Pairs`, one value throughout where left out.

    `by_sample` maps a row to its differences; it is used if every row has them, all of one test set. Where
    `test_variance` is left out it is computed from them. Raises LawError for no rows, unequal lengths, values that
    are not finite, x not above 0, a negative variance, samples of unequal number, and rows that repeat a (student,
    labels, x, seed, draw).
    """
    size = len(x)
    if size == 0:
        raise LawError("no pairs: A and B were never measured at equal points; look which column keeps them apart")
    given = {"seed": seed, "student": student, "labels": labels, "draw": draw, "teacher": teacher}
    labelled = {name: np.asarray([0] * size if value is None else list(value)) for name, value in given.items()}
    samples = {row: np.asarray(each) for row, each in (by_sample or {}).items()}
    if test_variance is None:
        test_variance = [samples[k].var() / len(samples[k]) if k in samples else 0.0 for k in range(size)]
    numbers = {"x": x, "delta": delta, "test_variance": test_variance}
    columns: dict[str, Any] = labelled | {name: np.asarray(value, float) for name, value in numbers.items()}
    _check_columns(columns, size)
    if len({each.shape for each in samples.values()}) > 1:
        raise LawError("by_sample: the rows have different numbers of test samples; give the samples of one test set")
    every = np.array([samples[row] for row in range(size)]) if set(samples) == set(range(size)) else None
    return Pairs(by_sample=every, **columns)


def _check_columns(columns: Mapping[str, np.ndarray], size: int) -> None:
    for name, column in columns.items():
        if column.shape != (size,):
            raise LawError(f"pairs: {name} has shape {column.shape}, x has {size} rows")
    for name, least in (("x", 0.0), ("delta", -np.inf), ("test_variance", -1e-300)):
        column = columns[name]
        wrong = np.flatnonzero(~np.isfinite(column) | (column <= least))
        if wrong.size:
            needed = {"x": "finite and above 0", "delta": "finite", "test_variance": "finite and not negative"}[name]
            raise LawError(f"pairs: {name} is {column.tolist()[wrong[0]]!r} in row {wrong[0]}; it must be {needed}")
    keys = list(zip(*(columns[name].tolist() for name in ("student", "labels", "x", "seed", "draw")), strict=True))
    if len(set(keys)) < size:
        twice = next(key for key in keys if keys.count(key) > 1)
        raise LawError(f"pairs: two rows have (student, labels, x, seed, draw) = {twice}; tell them apart by `draw`")


def group_codes(*columns: np.ndarray) -> np.ndarray:
    """Number of each row's group, groups in order of first appearance [n]."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(key, len(number)) for key in zip(*(c.tolist() for c in columns), strict=True)])


@dataclass(frozen=True, eq=False)
class SeedTable:
    """One Δ per seed and x, and the variances that follow: what intervals and curves are made from."""

    x: np.ndarray
    """[K] rising."""
    values: np.ndarray
    """[n, K] pooled Δ, NaN where a seed lacks an x."""
    variance: np.ndarray
    """[K] of one seed's Δ, moderated."""
    degrees: np.ndarray
    """[K] of `variance`."""
    shared: np.ndarray
    """[K] variance of the mean that more seeds do not lessen: that of the test images."""
    floor: np.ndarray
    """[K] least variance of the mean: that of test sets, as if they differed between seeds."""

    @property
    def num_seeds(self) -> np.ndarray:
        return np.isfinite(self.values).sum(axis=0)

    @property
    def mean(self) -> np.ndarray:
        return np.nanmean(self.values, axis=0)

    @property
    def mean_variance(self) -> np.ndarray:
        return np.maximum(self.variance / self.num_seeds + self.shared, self.floor)


def seed_table(pairs: Pairs) -> SeedTable:
    """Pool the pairs and estimate the variance at each x. Raises NotEnoughData where no x has two seeds."""
    pooled = pairs.pooled()
    x, column = np.unique(pooled.x, return_inverse=True)
    row = group_codes(pooled.seed)
    values = np.full((row.max() + 1, len(x)), np.nan)
    values[row, column] = pooled.delta
    count = np.isfinite(values).sum(axis=0)
    if count.max() < 2:
        why = f"every pair has seed {pooled.seed.tolist()[0]!r}" if len(values) == 1 else "no x has two seeds"
        raise NotEnoughData(f"{why}: noise shows only between seeds at one x; run at least two seeds in both arms")
    spread = np.nansum((values - np.nanmean(values, axis=0)) ** 2, axis=0)
    variance, degrees = moderated_variances(spread, count - 1)
    floor = np.bincount(column, pooled.test_variance) / count**2
    shared = np.zeros(len(x))
    if pooled.by_sample is not None:
        shared = np.array([image_variance(pooled.by_sample[column == k]) for k in range(len(x))])
    return SeedTable(x, values, variance, degrees, shared, floor)


def moderated_variances(squares: np.ndarray, degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variance at each x and its degrees of freedom, from sums of squares [K] with `degrees` [K] each.

    s̃² = (d0·s0² + SS) / (d0 + d) with d0 + d degrees, never more than the table has (Smyth 2004, eq. 5, with d0 =
    PRIOR_DEGREES and s0² the pooled variance): by x as far as the data say so, one variance where they say nothing.
    """
    total = degrees.sum()
    moderated = (PRIOR_DEGREES * squares.sum() / total + squares) / (PRIOR_DEGREES + degrees)
    return moderated, np.minimum(PRIOR_DEGREES + degrees, total).astype(float)


def image_variance(samples: np.ndarray) -> float:
    """Variance of the seeds' mean Δ over draws of the test images, from differences by seed and image [n, m].

    Crossed random effects: the images' own variance is that of their means over seeds less what seeds × images add.
    With one seed the two cannot be told apart, and both are counted.
    """
    num_seeds, num_images = samples.shape
    mean = samples.mean(axis=0)
    own = mean.var(ddof=1)
    if num_seeds > 1:
        rest = samples - mean - samples.mean(axis=1, keepdims=True) + samples.mean()
        own -= (rest**2).sum() / ((num_seeds - 1) * (num_images - 1)) / num_seeds
    return max(float(own), 0.0) / num_images


@dataclass(frozen=True)
class DeltaPoint:
    """Δ at one x: the mean over seeds with its intervals."""

    x: float
    delta: float
    stderr: float
    degrees: float
    num_seeds: int
    by_seed: tuple[float, ...]
    low: float
    high: float
    """Pointwise interval at `level`."""
    low_all: float
    high_all: float
    """Simultaneous over all x and the family."""


def delta_points(pairs: Pairs, *, level: float = 0.9, family: int = 1) -> tuple[DeltaPoint, ...]:
    """Means over seeds by x with t intervals; several strata or draws are pooled first.

    The simultaneous intervals are Šidák's over (number of x) × `family`, which holds whatever the correlation (Šidák
    1967), so nothing is assumed about seeds along x. Raises NotEnoughData where no x has two seeds.
    """
    table = seed_table(pairs)
    mean, stderr = table.mean, np.sqrt(table.mean_variance)
    one, every = (critical(table.degrees, k, level, n) * stderr for k, n in ((1, 1), (len(table.x), family)))
    columns = {
        "x": table.x, "delta": mean, "stderr": stderr, "degrees": table.degrees,
        "low": mean - one, "high": mean + one, "low_all": mean - every, "high_all": mean + every,
    }  # fmt: skip
    seeds = [tuple(values[np.isfinite(values)].tolist()) for values in table.values.T]
    return tuple(
        DeltaPoint(num_seeds=len(by_seed), by_seed=by_seed, **dict(zip(columns, map(float, row), strict=True)))
        for by_seed, row in zip(seeds, zip(*columns.values(), strict=True), strict=True)
    )


def critical(degrees: np.ndarray | float, num_x: int, level: float, family: int) -> np.ndarray:
    """Half-width of an interval in standard errors, simultaneous over `num_x` × `family` (Šidák)."""
    asked = np.asarray(degrees, float)
    found = [_t_quantile(each, 0.5 + level ** (1 / (num_x * family)) / 2) for each in asked.ravel().tolist()]
    return np.reshape(found, asked.shape)


@lru_cache(maxsize=65536)
def _t_quantile(degrees: float, probability: float) -> float:
    """Kept, because a hunt asks thousands of times for the same few: 10 µs each where scipy inverts the distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


@dataclass(frozen=True, eq=False)
class DeltaCurves:
    """Δ along a grid of x [g], rising: the best curve [g] and draws [S, g] from its uncertainty."""

    grid: np.ndarray
    best: np.ndarray
    drawn: np.ndarray
    name: str = ""
    """The law that drew them; empty for the law-free curve."""


def delta_curves(pairs: Pairs, *, grid: np.ndarray | None = None, num_draws: int = 1000, seed: int = 0) -> DeltaCurves:
    """Posterior draws of the smooth curve of Δ along log x; several strata or draws are pooled first.

    A Gaussian process with constant, slope and bend. Its hyperparameters, the scale of the noise and the noise that the
    x of one seed have in common are drawn, not plugged in. The grid, where none is given, runs over the measured range
    with sixteen steps an octave, 32 in all at least, and holds every measured x. Raises NotEnoughData for one x, and
    where no x has two seeds.
    """
    table = seed_table(pairs)
    if len(table.x) < 2:
        raise NotEnoughData(f"every pair lies at x = {table.x[0]:g}: what changes along x needs two x or more")
    grid = _grid(table.x) if grid is None else grid
    basis, basis_grid = _bases(table, grid)  # [h, K, q], [h, g, q]
    noise, score = _noises(table)  # [c, K, K], [c]
    total = (basis @ basis.transpose(0, 2, 1))[:, None] + noise  # [h, c, K, K]
    inverse, logdet = np.linalg.inv(total), np.linalg.slogdet(total)[1]
    weights = score - 0.5 * (logdet + np.einsum("k,hckl,l->hc", table.mean, inverse, table.mean))
    share = np.exp(weights - weights.max())
    share /= share.sum()
    best = np.einsum("hc,hgq,hkq,hckl,l->g", share, basis_grid, basis, inverse, table.mean, optimize=True)
    rng = np.random.default_rng(seed)
    h, c = np.divmod(np.sort(rng.choice(share.size, num_draws, p=share.ravel())), len(noise))  # of each draw
    # Matheron's rule: a curve and errors from the prior, corrected by what they miss of the means
    weight = rng.standard_normal((num_draws, basis.shape[2]))
    error = np.einsum("skl,sl->sk", np.linalg.cholesky(noise)[c], rng.standard_normal((num_draws, len(table.x))))
    missed = table.mean - error - np.einsum("skq,sq->sk", basis[h], weight)
    weight += np.einsum("skq,skl,sl->sq", basis[h], inverse[h, c], missed, optimize=True)
    return DeltaCurves(grid, best, np.concatenate([weight[h == k] @ basis_grid[k].T for k in range(len(basis))]))


def _grid(x: np.ndarray) -> np.ndarray:
    octaves = np.diff(np.log2(x))
    steps = np.ceil(octaves * max(16.0, 32.0 / octaves.sum()) - 1e-9).astype(int)
    return np.append(
        np.concatenate([np.geomspace(a, b, n + 1)[:-1] for a, b, n in zip(x, x[1:], steps, strict=False)]), x[-1]
    )


def _bases(table: SeedTable, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns whose standard-normal weights give constant, slope and bend, at x [h, K, q] and on the grid [h, g, q]."""
    low, high = np.log(table.x[[0, -1]])
    t, t_grid = (np.log(table.x) - low) / (high - low), (np.log(grid) - low) / (high - low)
    nodes = np.linspace(min(0.0, t_grid[0]), max(1.0, t_grid[-1]), NODES)
    size = np.sqrt(max(np.mean(table.mean**2), np.median(table.mean_variance))) or 1.0
    lengths = np.maximum(LENGTHS, SHORTEST * np.median(np.diff(t)))

    def columns(at: np.ndarray) -> np.ndarray:
        found = []
        for length, root in zip(lengths, roots, strict=True):
            smooth = np.exp(-0.5 * ((at[:, None] - nodes) / length) ** 2) @ root
            line = [np.full(len(at), 2.0), 2.0 * (at - 0.5)]
            found += [size * np.column_stack([*line, bend * smooth]) for bend in BENDS]
        return np.array(found)

    kernels = [np.exp(-0.5 * ((nodes[:, None] - nodes) / length) ** 2) + 1e-6 * np.eye(NODES) for length in lengths]
    roots = [np.linalg.inv(np.linalg.cholesky(kernel)).T for kernel in kernels]
    return columns(t), columns(t_grid)


def _noises(table: SeedTable) -> tuple[np.ndarray, np.ndarray]:
    """Candidate covariances of the means [c, K, K], and log weights from how seeds scatter about the means [c].

    The scale runs through quantiles of its χ² posterior, the same one at all x; the correlation along x of one seed's
    noise (window, initialisation) is weighed by the seeds' deviations.
    """
    from scipy.special import chdtri

    seen, count = np.isfinite(table.values), table.num_seeds
    both = (seen[:, :, None] & seen[:, None, :]).sum(axis=0) / np.outer(count, count)
    sd = np.sqrt(table.variance + (1e-4 * np.nanmax(np.abs(table.values)) or 1.0) ** 2)  # repeats may agree exactly
    off = np.nan_to_num((table.values - table.mean) / sd)
    correlations = np.array([shared + (1 - shared) * np.eye(len(sd)) for shared in CORRELATIONS])
    fit = np.einsum("nk,rkl,nl->r", off, np.linalg.inv(correlations), off)
    scores = -0.5 * (fit + (len(off) - 1) * np.linalg.slogdet(correlations)[1])
    quantiles = (np.arange(SCALES)[:, None] + 0.5) / SCALES
    drawn = np.sqrt(table.degrees / chdtri(table.degrees, quantiles)) * sd  # [scales, K]
    noises = drawn[:, None, :, None] * drawn[:, None, None, :] * both * correlations
    noises += np.diag(table.mean_variance - table.variance / count)  # test sets
    return noises.reshape(-1, len(sd), len(sd)), np.tile(scores, SCALES)
