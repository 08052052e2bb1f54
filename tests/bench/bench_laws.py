"""Fits of public scaling-law tables, with time per fit: `make bench-laws`, or `python tests/bench/bench_laws.py`.

Prints one markdown table: what was measured, the figure, and the goal. The tables are read from ../shared/data/laws (or
$DBSCALE_SHARED/data/laws) and their README states the protocols; without the folder it says so and stops.
`--simulate N` adds N simulated worlds for parameter coverage; verdicts have `bench_verdicts.py`. One core is enough.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from dbscale.laws import Prices, allocate, bootstrap, fit_law, select_law

T = TypeVar("T")
Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
LOSS = {"E0": (None, float("inf"))}  # these losses lie below 1 by chance; error rates are bounded there by default


def table_folder() -> Path | None:
    beside = Path(__file__).resolve().parents[2].parent / "shared"
    folder = Path(os.environ.get("DBSCALE_SHARED", beside)) / "data" / "laws"
    return folder if folder.is_dir() else None


def show(what: str, figure: str, goal: str = "") -> None:
    print(f"| {what} | {figure} | {goal} |", flush=True)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def rmsle(predicted: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.log(predicted) - np.log(y)) ** 2)))


def chinchilla(folder: Path, num_resamples: int) -> None:
    with (folder / "chinchilla.csv").open() as file:
        rows = np.array([[float(v) for v in row.values()] for row in csv.DictReader(file)])
    size, flops, loss = rows[np.argsort(rows[:, 2])[:-5]].T
    x = {"num_params": size, "num_samples": flops / (6 * size)}
    fits, seconds = zip(*(timed(lambda s=s: fit_law("chinchilla", x, loss, seed=s)) for s in range(10)), strict=True)
    show("Chinchilla objective, worst of 10 seeds", f"{max(f.objective for f in fits):.9f}", "≤ 0.00101828")
    show("Chinchilla parameters", ", ".join(f"{k} {v:.6g}" for k, v in fits[0].params.items()), "within 1 %")
    show("Chinchilla, CPU seconds per fit (mean)", f"{np.mean(seconds):.3f}")
    resampled, took = timed(lambda: bootstrap(fits[0], num_resamples=num_resamples))
    show(
        f"Chinchilla standard errors, {num_resamples:,} resamples",
        ", ".join(f"{k} {v:.4g}" for k, v in resampled.stderr.items()),
        "A 124.5, B 1293, E .0257, alpha .0154, beta .0206 within 10 %",
    )
    show("… CPU seconds on one core", f"{took:.1f}", "≤ 15 s on two cores")


def revisiting(folder: Path, domain: str) -> Iterator[Curve]:
    rows = defaultdict(list)
    with (folder / "revisiting.csv").open() as file:
        for row in csv.DictReader(file):
            if row["domain"] == domain:
                key = row["task"], row["model"]
                rows[key].append((float(row["seen_examples"]), float(row["loss"]), row["split"] == "fit"))
    for curve in rows.values():
        x, y, seen = np.array(curve).T
        seen = seen > 0
        yield x[seen], y[seen], x[~seen], y[~seen]


GOALS = {
    ("IC", "m4"): "≤ .034", ("IC", "bnsl"): "≤ .0315", ("IC", "own pick"): "≤ .030",
    ("NMT", "own pick"): "≤ .0105", ("LM", "own pick"): "≤ .0009",
}  # fmt: skip


TIMED_CURVES = 6


def learning_curves(folder: Path, domain: str, limit: int | None) -> None:
    errors, seconds, covered, widths = defaultdict(list), defaultdict(list), [], []
    bounds = {} if domain == "IC" else {"m4": LOSS}
    for number, (x, y, ahead, truth) in enumerate(list(revisiting(folder, domain))[:limit]):
        start = time.process_time()
        own = select_law(x, y, bounds=bounds)
        seconds["own pick"].append(time.process_time() - start)
        errors["own pick"].append(rmsle(own.predict(ahead), truth))
        for law in own.candidates:
            if law.fit is not None:
                errors[law.name].append(rmsle(law.fit.predict(ahead), truth))
            if number < TIMED_CURVES:
                start = time.process_time()
                fit_law(law.name, x, y, loss="least_squares_log", bounds=bounds.get(law.name))
                seconds[law.name].append(time.process_time() - start)
        low, high = own.interval(ahead, 0.9)
        covered.append((low <= truth) & (truth <= high))
        widths.append(np.log(high / low))
    for name, each in errors.items():
        took = f"{np.mean(seconds[name]):.2f} s, at most {max(seconds[name]):.2f}"
        figure = f"{np.mean(each):.5f} (median {np.median(each):.4f}; {took})"
        show(f"{domain}, {len(each)} curves: {name}", figure, GOALS.get((domain, name), ""))
    inside, width = np.concatenate(covered), np.concatenate(widths)
    coverage = f"{inside.mean():.2f}; {np.mean([c.mean() for c in covered]):.2f}"
    image = domain == "IC"
    show(f"{domain}: 90 % prediction intervals, coverage by point; by curve", coverage, "≥ .75" if image else "")
    show(f"{domain}: median log-width of those intervals", f"{np.median(width):.3f}", "≤ .15" if image else "")


def rectified(folder: Path) -> None:
    with (folder / "rectified_flan.csv").open() as file:
        rows = list(csv.DictReader(file))
    sizes = [c for c in rows[0] if c.isdigit() and c != "0"]
    x = np.array([float(s) for s in sizes])
    inside, ahead, plain = [], [], []
    for row in rows:
        y = np.array([float(row[s]) for s in sizes])
        fit = fit_law("rectified", x, y, loss="least_squares_log")
        inside.append(rmsle(fit.predict(x), y))
        plain.append(rmsle(fit_law("power_plus", x, y, loss="least_squares_log").predict(x), y))
        early = x <= 204_800
        short = fit_law("rectified", x[early], y[early], loss="least_squares_log")
        ahead.append(rmsle(short.predict(x[~early]), y[~early]))
    show("FLAN, 30 models: rectified, in-sample RMSD of log loss", f"{np.mean(inside):.5f}", "≤ .008")
    show("FLAN: power_plus, in-sample", f"{np.mean(plain):.4f}", ".036 published for the plain law")
    show("FLAN: rectified from ≤ 204,800, larger sizes", f"{np.mean(ahead):.4f}", "≤ .029")


def syn2real(folder: Path) -> None:
    with (folder / "syn2real.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if float(r["upstream_samples"]) > 0]
    names = ("upstream_samples", "downstream_samples")
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == model]
        x = {n: np.array([float(r[n]) for r in mine]) for n in names}
        if len(np.unique(x["downstream_samples"])) < 2:
            continue
        y = np.array([float(r["error_rate"]) for r in mine])
        try:
            gap, small = (fit_law(n, x, y, loss="least_squares_log") for n in ("transfer_gap", "product"))
        except ValueError as error:
            show(f"syn2real {model}", str(error))
            continue
        figure = f"{gap.objective:.3g} against {small.objective:.3g}, G {gap.params['G']:.3g}"
        show(f"syn2real {model}: transfer_gap against product, objective", figure, "never worse")


def simulated_coverage(count: int) -> None:
    x, truth = np.geomspace(1e3, 1e6, 20), {"E": 0.1, "b": 8.0, "c": -0.4}
    hits = defaultdict(int)
    for seed in range(count):
        y = (0.1 + 8 * x**-0.4) * np.exp(0.03 * np.random.default_rng(seed).standard_normal(20))
        fit = fit_law("power_plus", x, y, loss="least_squares_log")
        for kind, found in (
            ("curvature", fit.parameter_interval(0.9)),
            ("bootstrap", bootstrap(fit, num_resamples=300).interval(0.9)),
        ):
            for name, (low, high) in found.items():
                hits[kind, name] += low <= truth[name] <= high
    for kind in ("curvature", "bootstrap"):
        figure = ", ".join(f"{n} {hits[kind, n] / count:.3f}" for n in truth)
        show(f"coverage of 90 % parameter intervals, {kind}, {count} draws", figure, ".85 to .95")


def allocation() -> None:
    axes = (np.geomspace(1e3, 2.56e5, 5), [2.5e6, 1e7, 3.8e7], [300.0, 1000.0, 3000.0])
    d_p, size, d_f = (c.ravel() for c in np.meshgrid(*axes))
    y = 0.03 + 6 * d_p**-0.35 + 20 * size**-0.35 + 1.5 * d_f**-0.35
    x = {"upstream_samples": d_p, "num_params": size, "downstream_samples": d_f}
    law, took = timed(lambda: fit_law("additive", x, y, loss="least_squares_log"))
    show("additive on 45 cells, CPU seconds per fit", f"{took:.2f}")
    prices = Prices(upstream_image=1e-3, downstream_label=0.1, train_flop=1e-16)
    _, took = timed(lambda: allocate({"plain": law}, prices, 500.0))
    show("allocate, CPU seconds", f"{took:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--resamples", type=int, default=4000)
    parser.add_argument("--curves", type=int, default=None, help="only the first N curves of each domain")
    parser.add_argument("--simulate", type=int, default=0, help="simulated worlds for coverage")
    options = parser.parse_args()
    folder = table_folder()
    print("| measured | figure | goal |\n|---|---|---|")
    if folder is None:
        show("public tables", "skipped: shared/data/laws is not here; set DBSCALE_SHARED to its shared folder")
    else:
        chinchilla(folder, options.resamples)
        rectified(folder)
        syn2real(folder)
        for domain in ("NMT", "LM", "IC"):
            learning_curves(folder, domain, options.curves)
    allocation()
    if options.simulate:
        simulated_coverage(options.simulate)


if __name__ == "__main__":
    main()
