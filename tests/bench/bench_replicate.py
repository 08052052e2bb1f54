"""Run a grid again and again with disjoint seeds, and see whether the verdicts agree: `make replicate`, hours of two cores.

Repetition b takes the grid's own number of seeds from b times that number on; repetition 0 is the grid itself. What is
done stays done: type it again after any interruption. `--rows TABLE` judges the rows that an earlier run kept, without
running anything. Prints one row a repetition and contrast, how many pairs of repetitions contradict each other, and how
often one's intervals hold the others' means. docs/studies/demo/protocol.md says what is asked.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
from bench_verdicts import contradict

from dbscale.laws import Pairs, Verdict, judge
from dbscale.report.pairing import pair_arms, pair_upstream
from dbscale.report.reduce import reduce_grid, write_parquet
from dbscale.report.table import RunTable, read_table
from dbscale.study.grid import Grid, load_grid
from dbscale.study.store import Store

LEVEL = 0.9


def seeds_of(grid: Grid, number: int) -> range:
    size = len(grid.seeds)
    return range(number * size, (number + 1) * size)


def run(grid: Grid, path: Path, store: Path, data: Path, number: int, options: Sequence[str]) -> RunTable:
    """One repetition, to its end; raises CalledProcessError where a cell fails."""
    name = f"{grid.name}_{number}"
    seeds = ",".join(map(str, seeds_of(grid, number)))
    command = [
        sys.executable,
        "-m",
        "dbscale.launch.cli",
        "submit",
        "--grid",
        str(path),
        "--store",
        str(store),
        "--no-report",
    ]
    command += ["--data", str(data), "--set", f"name={name}", "--set", f"seeds=[{seeds}]", *options]
    subprocess.run(command, check=True)
    return reduce_grid(Store(store), name)


def contrasts(table: RunTable) -> Iterator[tuple[str, Pairs]]:
    """The main contrast first: every downstream set, then the upstream error of both arms."""
    for setting in table.settings:
        pairs, _ = pair_arms(table, setting)
        if pairs is not None:
            yield setting.dataset, pairs
    pairs, _ = pair_upstream(table, table.settings[0])
    if pairs is not None:
        yield f"{table.settings[0].upstream_dataset} (upstream)", pairs


def held(verdicts: Sequence[Verdict]) -> Iterator[bool]:
    """Whether an interval of one repetition holds another's mean; both are noisy, hence √2."""
    for one, other in permutations(verdicts, 2):
        for p, q in zip(one.points, other.points, strict=True):
            yield abs(p.delta - q.delta) <= (p.high - p.delta) * 2**0.5


def show(name: str, parts: Sequence[Pairs], min_effect: float) -> None:
    verdicts = [judge(pairs, min_effect=min_effect, level=LEVEL) for pairs in parts]
    for number, verdict in enumerate(verdicts, start=1):
        ends = "; ".join(
            f"{100 * p.delta:+.1f} [{100 * p.low_all:+.1f}, {100 * p.high_all:+.1f}]" for p in verdict.points
        )
        better = {"a": "plain better", "b": "distilled better", None: ""}[verdict.better]
        print(f"| {name} | {number} | {verdict.kind} | {better} | {ends} |")
    if len(verdicts) > 1:
        against = sum(contradict(one, other) for one, other in combinations(verdicts, 2))
        kinds = {(verdict.kind, verdict.better) for verdict in verdicts}
        most = max(sum((v.kind, v.better) == kind for v in verdicts) for kind in kinds)
        cells = [
            judge(pairs.of(student, labels), min_effect=min_effect, level=LEVEL)
            for pairs in parts
            for student, labels in sorted(set(zip(pairs.student.tolist(), pairs.labels.tolist(), strict=True)))[:1]
        ]
        print(
            f"| {name} | all | same verdict: {most} of {len(verdicts)} | contradictions: {against} of "
            f"{len(verdicts) * (len(verdicts) - 1) // 2} pairs | intervals at {LEVEL:.0%} hold the others' means: pooled "
            f"{np.mean(list(held(verdicts))):.2f}, first cell {np.mean(list(held(cells))):.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=Path, default=Path("configs/grids/demo.yaml"))
    parser.add_argument("--store", type=Path, default=Path("out"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--repetitions", type=int, nargs="*", default=list(range(1, 11)), help="their numbers")
    parser.add_argument("--rows", type=Path, help="judge this table instead of running anything")
    parser.add_argument("--keep", type=Path, help="write the rows of all repetitions to this parquet file")
    asked, options = parser.parse_known_args()
    grid = load_grid(asked.grid)
    if asked.rows:
        whole = read_table(asked.rows)
        known = set(whole.values("seed"))
        numbers = [b for b in asked.repetitions if known >= set(seeds_of(grid, b))]
        tables = [whole.where(lambda run, b=b: run.seed in seeds_of(grid, b)) for b in numbers]
    else:
        tables = [run(grid, asked.grid, asked.store, asked.data, b, options) for b in asked.repetitions]
    if asked.keep:
        write_parquet(asked.keep, replace(tables[0], runs=tuple(run for table in tables for run in table)))
    print(
        "| contrast | repetition | verdict | | ΔE in points at each D_p [simultaneous interval] |\n|---|---|---|---|---|"
    )
    found = [dict(contrasts(table)) for table in tables]
    for name in found[0]:
        show(name, [each[name] for each in found], grid.min_effect)


if __name__ == "__main__":
    main()
