"""Fits of public scaling-law tables and of fresh learning curves: `make bench-laws`, or `python tests/bench/bench_laws.py`.

Prints markdown tables: what was measured, the figure, and the goal. The tables are read from ../shared/data/laws (or
$DBSCALE_SHARED/data/laws) and their README states the protocols; without the folder it says so and leaves them out.
`--fresh` adds learning curves of 25 classifiers trained here (minutes), `--simulate N` the coverage of parameter
intervals in N simulated tables. One core is enough.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from scipy.optimize import least_squares

from dbscale.laws import (
    Prices,
    Resampling,
    Selection,
    allocate,
    bootstrap,
    fit_law,
    parameter_intervals,
    select_law,
    transfer_gap,
)
from dbscale.laws.select import FAR, TRIM, TRUST, trimmed_mean

T = TypeVar("T")
HALF_POINTS = 10


def table_folder() -> Path | None:
    beside = Path(__file__).resolve().parents[2].parent / "shared"
    folder = Path(os.environ.get("DBSCALE_SHARED", beside)) / "data" / "laws"
    return folder if folder.is_dir() else None


def show(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def rmsle(predicted: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.log(predicted) - np.log(y)) ** 2)))


# Learning curves: the average against plain means of the same fits.


@dataclass(frozen=True)
class Curve:
    family: str
    x: np.ndarray
    y: np.ndarray
    ahead: np.ndarray
    truth: np.ndarray
    ceiling: float | None = None


SETS = {"bird": "image: birds", "cal": "image: Caltech", "c": "image: CIFAR", "inet": "image: ImageNet"}


def public_curves(folder: Path) -> Iterator[Curve]:
    """The protocol of the tables, and a second one inside the rows to fit: their smaller half (in log x) foretells the
    next factor of four."""
    rows = defaultdict(list)
    with (folder / "revisiting.csv").open() as file:
        for row in csv.DictReader(file):
            rows[row["domain"], row["task"], row["model"]].append(
                (float(row["seen_examples"]), float(row["loss"]), row["split"] == "fit")
            )
    for (domain, task, _), curve in rows.items():
        x, y, seen = np.array(sorted(curve)).T
        seen = seen > 0
        image = domain == "IC"
        ceiling = 1.0 if image else None
        family = SETS[task.rsplit("_", 1)[0]] if image else domain
        yield Curve(family, x[seen], y[seen], x[~seen], y[~seen], ceiling)
        few = seen & (x <= max(np.sqrt(x[seen].min() * x[seen].max()), np.sort(x[seen])[:HALF_POINTS][-1]))
        near = seen & ~few & (x <= 4 * x[few].max())
        if image and near.any():
            yield Curve("image, half of each curve", x[few], y[few], x[near], y[near], ceiling)
    with (folder / "rectified_flan.csv").open() as file:
        for row in csv.DictReader(file):
            sizes = [c for c in row if c.isdigit() and c != "0"]
            x, y = np.array([float(s) for s in sizes]), np.array([float(row[s]) for s in sizes])
            for name, end, reach in (("FLAN", 204_800, np.inf), ("FLAN, shorter", 51_200, 204_800)):
                near = (x > end) & (x <= reach)
                yield Curve(name, x[x <= end], y[x <= end], x[near], y[near])


def fresh_curves() -> Iterator[Curve]:
    """Test errors of classifiers, 17 sizes each: the last five are foretold from 12, the last eight from nine. The fourth
    family was made after the average's rule had been chosen; without the third the same rule would have been."""
    from sklearn.datasets import (
        load_digits,
        make_circles,
        make_classification,
        make_gaussian_quantiles,
        make_hastie_10_2,
        make_moons,
    )
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.ensemble import AdaBoostClassifier, ExtraTreesClassifier, RandomForestClassifier
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import LogisticRegression, Perceptron, RidgeClassifier, SGDClassifier
    from sklearn.naive_bayes import BernoulliNB, GaussianNB
    from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC, LinearSVC
    from sklearn.tree import DecisionTreeClassifier

    def made(size: int, seed: int, d: int, i: int, r: int, c: int, k: int, s: float, f: float) -> tuple:
        return make_classification(size, d, n_informative=i, n_redundant=r, n_classes=c, n_clusters_per_class=k,
                                   class_sep=s, flip_y=f, random_state=seed)  # fmt: skip

    pixels, digits = load_digits(return_X_y=True)
    pixels = pixels / 16
    shown = [
        (pixels, digits), made(12_000, 0, 40, 10, 0, 5, 3, 1.0, 0.0), made(12_000, 1, 20, 15, 0, 3, 3, 0.7, 0.05),
        made(12_000, 2, 100, 20, 0, 10, 3, 1.5, 0.0),
        make_gaussian_quantiles(n_samples=12_000, n_features=10, n_classes=4, random_state=3),
    ]  # fmt: skip
    models = (LogisticRegression, KNeighborsClassifier, GaussianNB, LinearDiscriminantAnalysis, DecisionTreeClassifier)
    yield from learning_curves("", models, shown, 0, 0, 5, 30)
    other = [
        (pixels, digits), made(9_000, 11, 30, 12, 4, 4, 2, 1.2, 0.02), made(9_000, 12, 60, 8, 0, 2, 5, 0.9, 0.0),
        make_moons(9_000, noise=0.25, random_state=13),
    ]  # fmt: skip
    others = (SVC, lambda: RandomForestClassifier(20, random_state=0), lambda: Perceptron(random_state=0), RidgeClassifier,
              NearestCentroid)  # fmt: skip
    yield from learning_curves("other ", others, other, 1, 100, 3, 30)
    noisy = pixels + 0.4 * np.random.default_rng(0).standard_normal(pixels.shape)
    third = [
        (noisy, digits), made(9_000, 21, 50, 15, 5, 6, 1, 0.8, 0.03), make_hastie_10_2(9_000, random_state=22),
        made(9_000, 23, 15, 10, 2, 3, 4, 1.1, 0.01),
    ]  # fmt: skip
    thirds = (lambda: ExtraTreesClassifier(20, random_state=0), lambda: LogisticRegression(C=0.03), LinearSVC,
              lambda: KNeighborsClassifier(11), BernoulliNB)  # fmt: skip
    yield from learning_curves("third ", thirds, third, 2, 300, 3, 40)
    halves = np.hstack([pixels[:, :32], 0.3 * np.random.default_rng(1).standard_normal((len(pixels), 32))])
    fourth = [
        (halves, digits), made(9_000, 31, 25, 10, 5, 8, 1, 1.0, 0.02), made(9_000, 32, 80, 12, 0, 2, 6, 1.3, 0.0),
        make_circles(9_000, noise=0.15, factor=0.6, random_state=33),
    ]  # fmt: skip
    fourths = (lambda: AdaBoostClassifier(n_estimators=20, random_state=0), lambda: SGDClassifier(random_state=0),
               lambda: make_pipeline(Nystroem(n_components=30, random_state=0), LogisticRegression()),
               lambda: DecisionTreeClassifier(max_depth=5, random_state=0), lambda: KNeighborsClassifier(1))  # fmt: skip
    yield from learning_curves("fourth ", fourths, fourth, 3, 500, 3, 40)


def learning_curves(
    prefix: str, models: Sequence, sets: Sequence, split: int, first: int, repeats: int, smallest: int
) -> Iterator[Curve]:
    """Mean test errors of `repeats` subsets (seeds from `first` on) of each size, of every model on every set."""
    for features, labels in sets:
        order = np.random.default_rng(split).permutation(len(labels))
        test, train = order[: len(labels) // 3], order[len(labels) // 3 :]
        sizes = np.unique(np.round(np.geomspace(smallest, len(train), 17)).astype(int))
        for model in models:
            errors = []
            for size in sizes:
                picks = [np.random.default_rng(first + seed).permutation(train)[:size] for seed in range(repeats)]
                guesses = [model().fit(features[p], labels[p]).predict(features[test]) for p in picks]
                errors.append(np.mean([np.mean(guess != labels[test]) for guess in guesses]))
            x, y = sizes.astype(float), np.maximum(errors, 1e-4)
            for kept in (12, 9):
                yield Curve(f"{prefix}classifiers, {kept} sizes", x[:kept], y[:kept], x[kept:], y[kept:], 1.0)


@dataclass(frozen=True)
class Judged:
    """One curve's selection, and every law's log prediction ahead."""

    curve: Curve
    selection: Selection
    logs: dict[str, np.ndarray]

    @classmethod
    def of(cls, curve: Curve) -> Judged:
        found = select_law(curve.x, curve.y, ceiling=curve.ceiling)
        return cls(curve, found, {c.name: np.log(c.fit.predict(curve.ahead)) for c in found.candidates if c.fit})

    def error(self, log_prediction: np.ndarray) -> float:
        return float(np.sqrt(np.mean((log_prediction - np.log(self.curve.truth)) ** 2)))

    def rule(self, trust: float, far: float, trim: float, shift: bool) -> np.ndarray:
        """What an average by another rule foretells: weights near the data 1/rms^trust, from `far` of the measured range
        beyond it all alike, each without `trim` of the weight at either end."""
        highest = np.inf if self.curve.ceiling is None else np.log(self.curve.ceiling)
        each = np.minimum([self.logs[c.name] - shift * c.shift for c, _ in self.selection.members], highest)
        noise = np.maximum([c.in_sample for c, _ in self.selection.members], 1e-9)
        weight, alike = (noise.min() / noise) ** trust, np.full(len(each), 1 / len(each))
        x = self.curve.x
        share = np.clip(np.log(self.curve.ahead / x.max()) / np.log(x.max() / x.min()) / far, 0, 1)
        near, middle = (trimmed_mean(each, w, trim) for w in (weight / weight.sum(), alike))
        return (1 - share) * near + share * middle

    @property
    def equal(self) -> float:
        """Error of the plain mean of saturating, m4 and bnsl."""
        return self.error(np.mean([self.logs[n] for n in ("saturating", "m4", "bnsl")], axis=0))

    @property
    def median(self) -> float:
        """Error of the median of all laws."""
        return self.error(np.median(list(self.logs.values()), axis=0))


RULES = {
    f"trust {trust}, alike from {far:.2g} ranges on, {trim:.2g} trimmed{', level moved' if shift else ''}": (
        trust, far, trim, shift,
    )
    for trust in (0, 1, 2, 3, 4, 6) for far in (0.25, 1 / 3, 0.5, 2 / 3, 1.0, 1e9)
    for trim in (0.0, 0.1, 0.2, 0.35) for shift in (False, True)
}  # fmt: skip


def averages(curves: Iterator[Curve]) -> None:
    """Mean over curves of the rms error of log y ahead, by family."""
    judged = defaultdict(list)
    seconds = []
    for curve in curves:
        one, took = timed(lambda c=curve: Judged.of(c))
        judged[curve.family].append(one)
        seconds.append(took)
    heads = "family (curves) | the average | equal mean of saturating, m4, bnsl | median of all | best single law"
    print(f"\n| {heads} | 90 % covers, log-width |\n|---|---|---|---|---|---|")
    for family, each in judged.items():
        own = np.mean([rmsle(j.selection.predict(j.curve.ahead), j.curve.truth) for j in each])
        equal, median = np.mean([[j.equal, j.median] for j in each], axis=0)
        single = {n: np.mean([j.error(j.logs[n]) for j in each]) for n in each[0].logs}
        best = min(single, key=lambda n: single[n])
        ends = [j.selection.interval(j.curve.ahead, 0.9) for j in each]
        inside = [
            np.mean((low <= j.curve.truth) & (j.curve.truth <= high)) for (low, high), j in zip(ends, each, strict=True)
        ]
        width = np.median(np.concatenate([np.log(high / low) for low, high in ends]))
        show(f"{family} ({len(each)})", f"{own:.5f}", f"{equal:.5f}", f"{median:.5f}", f"{best} {single[best]:.5f}",
             f"{np.mean(inside):.2f}, {width:.3f}")  # fmt: skip
    every = [j for each in judged.values() for j in each]
    for name, part in (
        ("all", every),
        ("third and fourth", [j for j in every if j.curve.family[:5] in ("third", "fourt")]),
    ):
        if part:
            own = np.mean([rmsle(j.selection.predict(j.curve.ahead), j.curve.truth) for j in part])
            plain = np.mean([[j.equal, j.median] for j in part], axis=0)
            show(f"{name} ({len(part)})", *(f"{each:.5f}" for each in (own, *plain)), "", "")
    show("CPU seconds a curve, mean (most)", f"{np.mean(seconds):.2f} ({max(seconds):.2f})", "", "", "", "")
    leave_one_out(judged)


def leave_one_out(judged: dict[str, list[Judged]]) -> None:
    """Would another rule have been chosen on the other families, and how does it do on the one left out?

    Chosen is the rule with the least mean log ratio to the better of the two plain means. Families of one source, such as
    the same curves cut at two lengths, are left out together.
    """
    plain = {f: min(np.mean([[j.equal, j.median] for j in each], axis=0)) for f, each in judged.items()}
    ratio = {
        (rule, family): np.mean([j.error(j.rule(*options)) for j in each]) / plain[family]
        for rule, options in RULES.items() for family, each in judged.items()
    }  # fmt: skip
    own = next(rule for rule, options in RULES.items() if options == (TRUST, FAR, TRIM, True))
    print("\n| family left out | rule chosen on the others | its error there | the rule in use | the better plain mean |\n"
          "|---|---|---|---|---|")  # fmt: skip
    for family in judged:
        others = [f for f in judged if source(f) != source(family)]
        best = min(RULES, key=lambda r: np.mean([np.log(ratio[r, f]) for f in others]))
        show(family, best, *(f"{size * plain[family]:.5f}" for size in (ratio[best, family], ratio[own, family], 1.0)))


def source(family: str) -> str:
    return family.partition(":")[0].partition(",")[0]


# Single tables.


def chinchilla(folder: Path, num_resamples: int) -> None:
    with (folder / "chinchilla.csv").open() as file:
        rows = np.array([[float(v) for v in row.values()] for row in csv.DictReader(file)])
    size, flops, loss = rows[np.argsort(rows[:, 2])[:-5]].T
    x = {"num_params": size, "num_samples": flops / (6 * size)}
    fits, seconds = zip(*(timed(lambda s=s: fit_law("chinchilla", x, loss, seed=s)) for s in range(10)), strict=True)
    show("Chinchilla objective, worst of 10 seeds", f"{max(f.objective for f in fits):.9f}", "≤ 0.00101828")
    show("Chinchilla parameters", ", ".join(f"{k} {v:.6g}" for k, v in fits[0].params.items()), "within 1 %")
    show("Chinchilla, CPU seconds per fit (mean)", f"{np.mean(seconds):.3f}", "")
    resampled, took = timed(lambda: bootstrap(fits[0], Resampling(num_resamples)))
    sizes = zip(fits[0].params, resampled.params.std(axis=0, ddof=1), strict=True)
    errors = ", ".join(f"{k} {v:.4g}" for k, v in sizes)
    show(f"Chinchilla standard errors, {num_resamples:,} resamples", errors,
         "A 124.5, B 1293, E .0257, alpha .0154, beta .0206 within 10 %")  # fmt: skip
    show("… CPU seconds on one core", f"{took:.1f}", "≤ 15 s on two cores")


def rectified(folder: Path) -> None:
    with (folder / "rectified_flan.csv").open() as file:
        rows = list(csv.DictReader(file))
    sizes = [c for c in rows[0] if c.isdigit() and c != "0"]
    x = np.array([float(s) for s in sizes])
    inside, ahead, plain = [], [], []
    for row in rows:
        y = np.array([float(row[s]) for s in sizes])
        inside.append(rmsle(fit_law("rectified", x, y, loss="least_squares_log").predict(x), y))
        plain.append(rmsle(fit_law("power_plus", x, y, loss="least_squares_log").predict(x), y))
        early = x <= 204_800
        short = fit_law("rectified", x[early], y[early], loss="least_squares_log")
        ahead.append(rmsle(short.predict(x[~early]), y[~early]))
    show("FLAN, 30 models: rectified, in-sample RMSD of log loss", f"{np.mean(inside):.5f}", "≤ .008")
    show("FLAN: power_plus, in-sample", f"{np.mean(plain):.4f}", ".036 published for the plain law")
    show("FLAN: rectified from ≤ 204,800, larger sizes", f"{np.mean(ahead):.4f}", "≤ .029")


def syn2real(folder: Path) -> None:
    with (folder / "syn2real.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if float(r["upstream_samples"]) > 0 and r["model"] == "r50"]
    x = {n: np.array([float(r[n]) for r in rows]) for n in ("upstream_samples", "downstream_samples")}
    y = np.array([float(r["error_rate"]) for r in rows])
    gap, small = (fit_law(n, x, y, loss="least_squares_log", ceiling=1.0) for n in ("transfer_gap", "product"))
    figure = f"{gap.objective:.4g} against {small.objective:.4g}"
    show("syn2real, ResNet-50: transfer_gap against product, objective", figure, "never worse")
    found = transfer_gap(gap)
    show("… G by profile likelihood", f"{found.gap:.3g} ({found.interval[0]:.3g} to {found.interval[1]:.3g})", "")


# Solvers.


def solvers(curves: Iterator[Curve]) -> None:
    """The whole fit against scipy alone from the same number of starts, and batched refits against scipy's."""
    curves = [c for c in curves if c.family.startswith("image: ")][::4]
    heads = (
        "law, 12 image curves | our fit, CPU ms | scipy from the best 6 starts, ms | scipy's objective / ours, worst"
    )
    print(f"\n| {heads} | refit, batched, ms | by scipy, ms | scipy's / ours, worst |\n|---|---|---|---|---|---|---|")
    for name in ("power_plus", "saturating", "rectified", "m4", "bnsl"):
        took, peer, ratio, batched, single, worst = [], [], [], [], [], []
        for curve in curves:
            fit, seconds = timed(lambda c=curve, n=name: fit_law(n, c.x, c.y, loss="least_squares_log"))
            took.append(seconds)
            found, seconds = timed(lambda f=fit: scipy_fit(f))
            peer.append(seconds)
            ratio.append(found / fit.objective)
        weights = np.random.default_rng(0).exponential(size=(64, len(curve.y)))
        theirs, seconds = timed(lambda f=fit, w=weights: [scipy_refit(f, row, f.theta) for row in w])
        single.append(seconds / 64)
        ours, seconds = timed(lambda f=fit, w=weights: batched_refits(f, w))
        batched.append(seconds / 64)
        worst.append(np.max(np.array(theirs) / ours))
        show(name, *(f"{1e3 * np.mean(v):.1f}" for v in (took, peer)), f"{max(ratio):.4f}",
             *(f"{1e3 * np.mean(v):.2f}" for v in (batched, single)), f"{max(worst):.4f}")  # fmt: skip


def batched_refits(fit, weights: np.ndarray) -> np.ndarray:
    from dbscale.laws.uncertainty import refit

    theta = refit(fit, weights)
    return np.array([fit.problem.objective(t[None], w[None])[0] for t, w in zip(theta, weights, strict=True)])


def scipy_refit(fit, weights: np.ndarray, start: np.ndarray) -> float:
    """scipy.optimize.least_squares with the law's own derivatives."""
    problem, root = fit.problem, np.sqrt(weights)
    free = problem.lower < problem.upper
    margin = 1e-9 * (1 + np.abs(start))
    inner = np.clip(start, problem.lower + margin, problem.upper - margin)[free]

    def at(part: np.ndarray) -> np.ndarray:
        whole = fit.theta.copy()
        whole[free] = part
        return whole[None]

    def residual(part: np.ndarray) -> np.ndarray:
        r = problem.residual(at(part))[0]
        return root * np.where(np.isfinite(r), r, 1e6)

    def slopes(part: np.ndarray) -> np.ndarray:
        return (root * problem.residual_jacobian(at(part))[1][0][free]).T

    with np.errstate(all="ignore"):
        return float(
            least_squares(residual, inner, slopes, (problem.lower[free], problem.upper[free]), x_scale="jac").cost
        )


def scipy_fit(fit) -> float:
    """scipy from the best six of the starts that the fit screens."""
    from dbscale.laws.fit import spread_starts

    starts = spread_starts(fit.problem, 48 * len(fit.theta), fit.seed)
    order = np.argsort(fit.problem.objective(starts, fit.weights[None]), kind="stable")[:6]
    return min(scipy_refit(fit, fit.weights, starts[k]) for k in order)


def simulated_coverage(count: int) -> None:
    x, truth = np.geomspace(1e3, 1e6, 20), {"E": 0.1, "b": 8.0, "c": -0.4}
    hits = defaultdict(int)
    for seed in range(count):
        y = (0.1 + 8 * x**-0.4) * np.exp(0.03 * np.random.default_rng(seed).standard_normal(20))
        fit = fit_law("power_plus", x, y, loss="least_squares_log")
        for kind, found in (
            ("curvature", parameter_intervals(fit, 0.9)),
            ("bootstrap", bootstrap(fit, Resampling(300)).interval(0.9)),
        ):
            for name, ends in found.items():
                hits[kind, name] += ends is not None and ends[0] <= truth[name] <= ends[1]
    for kind in ("curvature", "bootstrap"):
        figure = ", ".join(f"{n} {hits[kind, n] / count:.3f}" for n in truth)
        show(f"coverage of 90 % parameter intervals, {kind}, {count} draws", figure, ".85 to .95")


def allocation() -> None:
    axes = (np.geomspace(1e3, 2.56e5, 5), [2.5e6, 1e7, 3.8e7], [300.0, 1000.0, 3000.0])
    d_p, size, d_f = (c.ravel() for c in np.meshgrid(*axes))
    y = 0.03 + 6 * d_p**-0.35 + 20 * size**-0.35 + 1.5 * d_f**-0.35
    x = {"upstream_samples": d_p, "num_params": size, "downstream_samples": d_f}
    laws, took = timed(lambda: select_law(x, y, ceiling=1.0))
    show("selection among four laws on 45 cells, CPU seconds", f"{took:.2f}", "")
    prices = Prices(upstream_image=1e-3, downstream_label=0.1, train_flop=1e-16)
    _, took = timed(lambda: allocate({"plain": laws}, prices, 500.0))
    show("allocate with 200 draws, CPU seconds", f"{took:.2f}", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--resamples", type=int, default=4000)
    parser.add_argument("--fresh", action="store_true", help="also train classifiers for curves that no table holds")
    parser.add_argument("--simulate", type=int, default=0, help="simulated tables for coverage of parameters")
    options = parser.parse_args()
    folder = table_folder()
    print("| measured | figure | goal |\n|---|---|---|")
    if folder is None:
        show("public tables", "skipped: shared/data/laws is not here; set DBSCALE_SHARED to its shared folder", "")
    else:
        chinchilla(folder, options.resamples)
        rectified(folder)
        syn2real(folder)
    allocation()
    if options.simulate:
        simulated_coverage(options.simulate)
    curves = [*(public_curves(folder) if folder else ()), *(fresh_curves() if options.fresh else ())]
    if curves:
        averages(iter(curves))
        solvers(iter(curves))


if __name__ == "__main__":
    main()
