"""Where the noise of a contrast comes from: seed, teacher, upstream run, finetune draw, test set.

Splits the variance of paired differences by address (`fit_noise`), says what more seeds or finetunes would leave of it
(`NoiseModel`), and keeps tables of noise measured elsewhere for plans without rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dbscale.errors import NotEnoughData
from dbscale.laws.contrast import Pairs, group_codes, image_variance, seed_table

SHARED_FIRST = ("seed", "teacher", "upstream", "interaction", "finetune")
"""Addresses of noise, the widest shared first; the groups of each lie within those of the one before."""


@dataclass(frozen=True)
class Component:
    """One address of the noise of a Δ."""

    name: str
    """`seed`, `teacher`, `upstream`, `interaction` (upstream run × labels), `finetune` or `test_set`."""
    sd: float
    low: float
    high: float
    """90 % interval of the sd."""
    share: float
    """Its share of the variance of one Δ; the shares sum to 1."""
    degrees: float
    """Effective degrees of freedom of the variance (Satterthwaite); infinite for the test set."""


@dataclass(frozen=True)
class NoiseModel:
    """Where the noise of Δ comes from, and how much each address gives."""

    components: tuple[Component, ...]
    """Those that the table can tell apart, the widest shared first, the test set last."""
    confounded: tuple[str, ...]
    """Codes such as `teacher_in_upstream`: no component of its own, its variance is part of the other's."""
    sd: float
    """Standard deviation of one Δ of one seed, stratum and draw."""
    degrees: float
    by_x: tuple[tuple[float, float], ...]
    """(x, sd of the pooled Δ of one seed there), moderated; empty where nothing can be pooled."""
    correlation_students: float | None
    """Correlation of the Δ of one seed between students; None with one student."""
    correlation_labels: float | None
    """Correlation of the Δ of one seed and student between labels; None with one value."""
    shared_test: float = 0.0
    """Variance that no number of seeds averages out: that of the test images. Part of `test_set`; 0 where unknown."""

    def variance(self, *names: str) -> float:
        """Sum of the named components' variances; 0 for those that are not there."""
        return sum(c.sd**2 for c in self.components if c.name in names)

    def variance_of_mean(
        self, num_seeds: int, finetunes: int = 1, *, num_students: int = 1, num_labels: int = 1
    ) -> float:
        """Variance of Δ averaged over seeds, and in each over students, labels and finetune draws."""
        cells = num_students * num_labels
        one_seed = self.variance("seed", "teacher") + self.variance("upstream") / num_students
        one_seed += self.variance("interaction") / cells + self.variance("finetune") / (cells * finetunes)
        one_seed += (self.variance("test_set") - self.shared_test) / (cells * finetunes)
        return one_seed / num_seeds + self.shared_test

    def best_finetunes(self, cost_upstream: float, cost_finetune: float) -> int:
        """Finetune draws per upstream run with the smallest variance per cost: n* = √(σ²_ft·c_up / (σ²_up·c_ft)).

        σ²_up is all that only another seed averages. At least 1 and at most 16; 1 where finetunes have no component.
        """
        finetune = self.variance("finetune")
        upstream = self.variance("seed", "teacher", "upstream", "interaction")
        ideal = np.sqrt(finetune * cost_upstream / max(upstream * cost_finetune, 1e-300)) if finetune else 1.0
        near = {int(np.clip(np.floor(ideal), 1, 16)), int(np.clip(np.ceil(ideal), 1, 16))}
        return min(sorted(near), key=lambda n: (upstream + finetune / n) * (cost_upstream + n * cost_finetune))


def fit_noise(pairs: Pairs) -> NoiseModel | None:
    """Components of the noise by analysis of variance; None where no stratum has two seeds at one x.

    Every (x, student, labels) has its own mean; what deviates from it is split into sums of squares within seed,
    teacher, upstream run, labels and draw, and their expectations are solved for the variances (exact on balanced
    tables, Henderson's method 1 on others; none below 0). Intervals: χ² draws of each sum of squares (generalised
    confidence intervals, Weerahandi 1993). Few seeds give wide intervals; heavy tails make them too narrow.
    """
    pairs = _repeated(pairs)
    if not len(pairs.x):
        return None
    addresses, confounded = _addresses(pairs)
    squares, expected = _sums_of_squares(pairs, list(addresses.values()))
    test, shared = _test_set(pairs)
    variances, degrees, draws = _solve(squares, expected)
    for finest in (variances, draws):  # the last address holds what test sets add to each Δ on its own
        finest[..., -1] = np.maximum(finest[..., -1] - (test - shared), 0.0)
    total = float(variances.sum()) + test
    ends = np.sqrt(np.quantile(draws, [0.05, 0.95], axis=0))
    rows = [*zip(addresses, np.sqrt(variances), *ends, degrees[:-1], strict=True)]
    if test > 0:
        rows.append(("test_set", test**0.5, test**0.5, test**0.5, np.inf))
    else:
        confounded.append(f"test_set_in_{rows[-1][0]}")
    components = tuple(
        Component(name, float(sd), float(low), float(high), float(sd**2 / max(total, 1e-300)), float(d))
        for name, sd, low, high, d in rows
    )
    share = {c.name: c.share for c in components}
    common = share.get("seed", 0.0) + share.get("teacher", 0.0)
    return NoiseModel(
        components,
        tuple(confounded),
        total**0.5,
        float(degrees[-1]),
        _by_x(pairs),
        common if len(set(pairs.student.tolist())) > 1 else None,
        common + share.get("upstream", 0.0) if len(set(pairs.labels.tolist())) > 1 else None,
        shared,
    )


def _repeated(pairs: Pairs) -> Pairs:
    """The rows whose (x, student, labels) was measured with two seeds or more."""
    cell, seed = group_codes(pairs.x, pairs.student, pairs.labels), group_codes(pairs.seed)
    seen = np.zeros((cell.max() + 1, seed.max() + 1), bool)
    seen[cell, seed] = True
    return pairs.rows(np.flatnonzero(seen.sum(axis=1)[cell] > 1))


def _addresses(pairs: Pairs) -> tuple[dict[str, np.ndarray], list[str]]:
    """Groups of rows [n] by address, the widest first, and codes of the addresses that share all groups with another.

    Of addresses with the same groups one keeps its name: the upstream run, else the finetune, else the seed.
    """
    run = (pairs.seed, pairs.x, pairs.teacher, pairs.student)
    columns = {"seed": run[:1], "teacher": run[:3], "upstream": run, "interaction": (*run, pairs.labels)}
    groups = {name: group_codes(*by) for name, by in columns.items()} | {"finetune": np.arange(len(pairs.x))}
    alike: dict[int, list[str]] = {}
    for name in SHARED_FIRST:  # nested, so equally many groups are the same groups
        alike.setdefault(int(groups[name].max()), []).append(name)
    kept: dict[str, np.ndarray] = {}
    confounded: list[str] = []
    for names in alike.values():
        first = next(name for name in ("upstream", "finetune", "seed", *names) if name in names)
        kept[first] = groups[first]
        confounded += [f"{name}_in_{first}" for name in names if name != first]
    return kept, confounded


def _sums_of_squares(pairs: Pairs, groups: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of squares of each address within the one before [a], and its expectation per unit of each variance [a, a].

    The last column of the expectations holds the degrees of freedom.
    """
    from scipy.sparse import csr_array, eye_array

    def indicator(code: np.ndarray, power: float) -> csr_array:
        rows = np.arange(len(code))
        return csr_array((np.bincount(code)[code] ** -power, (rows, code)), shape=(len(code), code.max() + 1))

    of_cell = indicator(group_codes(pairs.x, pairs.student, pairs.labels), 0.5)
    centre = csr_array(eye_array(len(pairs.x)) - of_cell @ of_cell.T)  # takes each cell's mean away
    means = [indicator(code, 0.5).T @ centre for code in groups]
    squares = np.array([float(((m @ pairs.delta) ** 2).sum()) for m in means])
    expected = np.array([[float(((m @ indicator(code, 0.0)) ** 2).sum()) for code in groups] for m in means])
    return np.diff(squares, prepend=0.0), np.diff(expected, axis=0, prepend=0.0)


def _solve(squares: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Variances [a], their degrees of freedom and the total's [a + 1], and draws of the variances [S, a]."""
    from scipy.optimize import nnls
    from scipy.special import chdtri

    freedom = expected[:, -1]
    scale = np.sqrt(freedom)  # mean squares, each weighed by its degrees of freedom where they cannot all be met
    variances = nnls(expected / scale[:, None], squares / scale)[0]
    inverse = np.linalg.pinv(expected)
    weights = np.vstack([inverse, inverse.sum(axis=0)])
    size = np.append(variances, variances.sum())
    degrees = size**2 / np.maximum((weights**2 * (squares**2 / freedom)).sum(axis=1), 1e-300)
    # Latin hypercube: each sum of squares meets every quantile of its χ² once
    rng, quantiles = np.random.default_rng(0), (np.arange(2000) + 0.5) / 2000
    spread = np.array([f / chdtri(f, rng.permutation(quantiles)) for f in freedom])
    return variances, degrees, np.maximum(inverse @ (squares[:, None] * spread), 0.0).T


def _test_set(pairs: Pairs) -> tuple[float, float]:
    """Variance of one Δ over test sets, and the part of it that all seeds have in common; means over the pairs."""
    test = float(pairs.test_variance.mean())
    if pairs.by_sample is None:
        return test, 0.0
    cell = group_codes(pairs.x, pairs.student, pairs.labels)
    shared = float(np.mean([image_variance(pairs.by_sample[cell == c]) for c in range(cell.max() + 1)]))
    return test, min(test, shared)


def _by_x(pairs: Pairs) -> tuple[tuple[float, float], ...]:
    try:
        table = seed_table(pairs)
    except NotEnoughData:
        return ()
    return tuple(zip(table.x.tolist(), np.sqrt(table.variance).tolist(), strict=True))


def noise_of(**sds: float) -> NoiseModel:
    """A noise model from standard deviations by address that are taken as known."""
    total = sum(sd**2 for sd in sds.values())
    shares = {name: sds[name] ** 2 / total for name in (*SHARED_FIRST, "test_set") if sds.get(name)}
    components = tuple(
        Component(name, sds[name], sds[name], sds[name], share, np.inf) for name, share in shares.items()
    )
    common = shares.get("seed", 0.0) + shares.get("teacher", 0.0)
    return NoiseModel(components, (), total**0.5, np.inf, (), common, common + shares.get("upstream", 0.0))


NOISE_TABLES: dict[str, NoiseModel] = {
    "demo_digits": noise_of(seed=0.031, teacher=0.040, upstream=0.022, finetune=0.071),
    "demo_fractals": noise_of(seed=0.016, teacher=0.020, upstream=0.011, finetune=0.035),
    "cifar10_fashion": noise_of(teacher=0.0138, upstream=0.0059, finetune=0.0189),
    "cifar10_mnist": noise_of(finetune=0.0237),
}
"""Noise of ΔE (error rates) measured on studies of this project, for a plan without rows of its own: docs/calibration.md."""
