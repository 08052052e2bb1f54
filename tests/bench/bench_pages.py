"""Calibration of whole pages on simulated studies: `make bench-pages`, or run this file; type it again to go on.

Where bench_verdicts judges one contrast at a time, this puts a table of runs through what a page holds: every contrast is
judged, `words` says the main one, and in every fifth study the laws are fitted too (they take ten times as long, and
sharpen a boundary but never claim one). A study has two downstream sets, two students, error,
test loss and upstream error: fifteen verdicts. Its noise is drawn from the demo's repetitions (ROWS): whole seeds with
a random sign, in both arms, all sets and all D_p at once, so that tails and correlations are the real ones; a third of
each student's variance is the seed's, shared, the rest another seed's.

Every world is a line of OUT (JSON), worlds that it holds are not made again, and the tables are printed from it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from bench_verdicts import LEVEL, MIN_EFFECT, SHAPES, contradict, is_wrong, make_shape, other_directions

from dbscale.report import words
from dbscale.report.findings import Options, family_of, study_questions
from dbscale.report.law_findings import ArmLaws, arm_laws
from dbscale.report.schema import ContrastRecord
from dbscale.report.table import Run, RunTable, read_table

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "docs" / "studies" / "demo" / "rows.parquet"
METRICS = ("error_rate", "test_loss", "upstream_error_rate")
ARMS, STUDENTS = ("plain", "distilled"), {"h2": 50_000, "h4": 200_000}
SCALE = {"error_rate": 1.0, "test_loss": 3.0, "upstream_error_rate": 1.0}
"""Size of a metric beside error, for its level and for its truth."""
SECOND = 0.6
"""ΔE on the second downstream set and upstream, as a share of that on the first."""
SHARED = 1 / 3
"""Of the variance of one student's noise: that which the students of one seed have in common."""
LAWS_EVERY = 5
SEEDS = (2, 3, 4, 6, 8, 10)
OPTIONS = Options(level=LEVEL, min_effect=MIN_EFFECT, num_draws=300, num_resamples=20)


@dataclass(frozen=True)
class Noise:
    """Deviations of real seeds from their mean."""

    sizes: tuple[int, ...]
    """D_p."""
    datasets: tuple[str, ...]
    parts: Mapping[str, np.ndarray]
    """Metric -> [seeds, arms, datasets, D_p]; alike for all datasets where the metric is an upstream one."""
    test_samples: tuple[int, ...]


def read_noise(path: Path) -> Noise:
    """Deviations of the rows' seeds, widened for the degree of freedom that their mean takes."""
    table = read_table(path).pretrained
    axes = [table.values(name) for name in ("seed", "dataset", "upstream_samples")]
    parts = {metric: np.full((len(axes[0]), 2, *map(len, axes[1:])), np.nan) for metric in METRICS}
    for run in table:
        seed, dataset, size = (axis.index(getattr(run, name)) for axis, name in
                               zip(axes, ("seed", "dataset", "upstream_samples"), strict=True))  # fmt: skip
        for metric, part in parts.items():
            part[seed, ARMS.index(run.arm), dataset, size] = getattr(run, metric)
    wide = (len(axes[0]) / (len(axes[0]) - 1)) ** 0.5
    tests = tuple(next(run.num_test_samples or 0 for run in table if run.dataset == name) for name in axes[1])
    return Noise(tuple(axes[2]), tuple(axes[1]), {m: wide * (p - p.mean(axis=0)) for m, p in parts.items()}, tests)


@dataclass(frozen=True)
class Study:
    """A table that could have been, and what is true of every contrast."""

    table: RunTable
    truth: Mapping[tuple[str, str], np.ndarray]
    """(metric, dataset) -> Δ at every D_p."""
    roots: Mapping[str, float]
    """Where Δ crosses 0, by direction; alike for all contrasts."""
    num_seeds: int


def make_study(shape: str, rng: np.random.Generator, noise: Noise) -> Study:
    """Plain error falls from .3 by a sixteenth an octave; the distilled arm's is lower by the truth."""
    x = np.array(noise.sizes, float)
    truth, roots = make_shape(shape, rng, x)
    level = 0.3 * (x / x[0]) ** -0.1
    num_seeds = int(rng.choice(SEEDS))
    truths = {
        (metric, dataset): truth * SCALE[metric] * (SECOND if place or metric.startswith("upstream") else 1.0)
        for metric, (place, dataset) in product(METRICS, enumerate(noise.datasets))
    }
    seeds = rng.choice(len(noise.parts["error_rate"]), num_seeds, replace=False)
    runs: list[Run] = []
    for seed, real in enumerate(seeds):
        sign = rng.choice([-1.0, 1.0])
        for student, size in STUDENTS.items():
            other, turned = rng.integers(len(noise.parts["error_rate"])), rng.choice([-1.0, 1.0])
            off = {
                metric: SHARED**0.5 * sign * part[real] + (1 - SHARED) ** 0.5 * turned * part[other]
                for metric, part in noise.parts.items()
            }
            for a, d, k in product(range(2), range(len(noise.datasets)), range(len(x))):
                dataset = noise.datasets[d]
                true = {m: SCALE[m] * level[k] - a * truths[m, dataset][k] for m in METRICS}
                runs.append(Run(
                    variant="base", arm=ARMS[a], student=student, num_params=size, upstream_dataset="up",
                    upstream_samples=noise.sizes[k], dataset=dataset, downstream_samples=300, seed=seed,
                    num_test_samples=noise.test_samples[d], upstream_key=f"{ARMS[a]}-{student}-{k}-{seed}",
                    key=f"{ARMS[a]}-{student}-{dataset}-{k}-{seed}",
                    **{metric: max(float(value + off[metric][a, d, k]), 1e-3) for metric, value in true.items()},
                ))  # fmt: skip
    return Study(RunTable(tuple(runs), grid="simulated", min_effect=MIN_EFFECT), truths, roots, num_seeds)


def measure(study: Study, noise: Noise, *, with_laws: bool) -> dict[str, Any]:
    """What one page claims, held against the truth; whatever is false of any verdict is false of the page."""
    arms = arm_laws(study.table, OPTIONS) if with_laws else ArmLaws(study.table, {})
    questions = study_questions(study.table, {}, OPTIONS)
    contrasts = [question.record(arms, OPTIONS, family_of(questions)) for question in questions]
    main, wrong, false, invented, held, laws, width = contrasts[0].verdict, [], [], [], [], [], []
    assert main is not None
    for record in contrasts:
        verdict = record.verdict
        if verdict is None:
            continue
        dataset = record.dataset if record.dataset in noise.datasets else noise.datasets[0]
        truth = study.truth[record.metric, dataset]
        wrong.append(any(p.low_all > 0 > t or p.high_all < 0 < t for p, t in zip(verdict.points, truth, strict=True)))
        false.append(is_false(verdict, truth))
        invented.append(verdict.kind == "crossing" and not study.roots)
        if verdict.kind == "crossing" and study.roots and verdict.interval:
            root, (low, high) = study.roots.get(verdict.direction or "", 0.0), verdict.interval
            held.append(bool(low <= root <= high))
            width.append(float(np.log2(high / low)))
            if verdict.law_interval:
                laws.append(bool(verdict.law_interval[0] <= root <= verdict.law_interval[1]))
    halves = [half.verdict for half in contrasts[0].halves]
    return {
        "seeds": study.num_seeds, "kind": main.kind, "verdicts": len(wrong), "wrong sign": sum(wrong),
        "false verdict": sum(false), "false crossing": sum(invented), "root held": held, "law root held": laws,
        "octaves": width, "contradict": contradict(*halves) if halves else None,
        "other directions": other_directions(*halves) if halves else None,
        "main wrong sign": wrong[0], "main false verdict": false[0], "main false crossing": invented[0],
        "sentence": says_false(contrasts, study, noise),
    }  # fmt: skip


def is_false(verdict: Any, truth: np.ndarray) -> bool:
    """`is_wrong`, by the verdict's own δ."""
    return bool(is_wrong(verdict, truth * MIN_EFFECT / verdict.min_effect))


def says_false(contrasts: Sequence[ContrastRecord], study: Study, noise: Noise) -> bool:
    """Whether the page's first sentence names a side as the better one at a D_p where the other is."""
    record, text = contrasts[0], words.answer(contrasts[0])
    truth = dict(zip(noise.sizes, study.truth["error_rate", record.dataset], strict=True))
    claims = re.findall(
        r"(distillation|plain pretraining) gives the lower \w+(?::[^;.]*?)? at ([\d, and]+) upstream", text
    )
    return any(
        truth[int(x.replace(",", ""))] * (1 if side == "distillation" else -1) < 0
        for side, places in claims for x in re.findall(r"\d[\d,]*\d", places)
    )  # fmt: skip


def rows_of(out: Path) -> Iterator[dict[str, Any]]:
    if out.exists():
        yield from (json.loads(line) for line in out.read_text().splitlines())


COLUMNS = ("decided", "crossing", "wrong sign", "false verdict", "false crossing", "root held", "octaves", "law root held",
           "contradict", "other directions", "false sentence")  # fmt: skip


def counted(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, list[float]]:
    """The values behind each column; "main / page" columns count the page."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        found["decided"].append(row["kind"] != "undecided")
        found["crossing"].append(row["kind"] == "crossing")
        for name in ("wrong sign", "false verdict", "false crossing"):
            found[name].append(row[name] > 0)
        for name in ("root held", "octaves", "law root held"):
            found[name] += row[name]
        for name in ("contradict", "other directions"):
            found[name] += [] if row[name] is None else [row[name]]
        found["false sentence"].append(row["sentence"])
    return found


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a shape, then one a number of seeds."""
    print(f"| worlds | pages | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}")
    groups = {shape: [row for row in rows if row["shape"] == shape] for shape in SHAPES}
    groups |= {f"all shapes, {seeds} seeds": [row for row in rows if row["seeds"] == seeds] for seeds in SEEDS}
    for name, part in groups.items():
        if part:
            values = counted(part)
            cells = [f"{np.mean(values[c]):.3f} ({len(values[c])})" if values[c] else "" for c in COLUMNS]
            print(f"| {name} | {len(part)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROWS, help="a table whose seeds are the noise")
    parser.add_argument("--worlds", type=int, default=200, help="worlds of each shape")
    parser.add_argument("--first", type=int, default=2_000_000, help="first random seed")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "pages.jsonl", help="one line a world")
    parser.add_argument("--show", action="store_true", help="only print the tables of what is there")
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["shape"], row["number"]) for row in rows_of(asked.out)}
    noise = read_noise(asked.rows)
    worlds = product(range(asked.first, asked.first + asked.worlds), SHAPES)
    for number, shape in sorted(worlds, key=lambda world: world[0] % LAWS_EVERY == 0):  # those with laws last
        if not asked.show and (shape, number) not in done:
            study = make_study(shape, np.random.default_rng([number, SHAPES.index(shape)]), noise)
            found = measure(study, noise, with_laws=number % LAWS_EVERY == 0)
            line = json.dumps({"shape": shape, "number": number, **found}, default=bool)
            with asked.out.open("a") as file:
                file.write(line + "\n")
    show(list(rows_of(asked.out)))


if __name__ == "__main__":
    main()
