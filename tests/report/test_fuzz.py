"""Any table is either refused with a clear message or fitted and drawn: nothing else may happen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dbscale.errors import TableError
from dbscale.report.csv_rows import from_records
from dbscale.report.fits import Options, fit_grid
from dbscale.report.page import setting_part
from dbscale.report.table import COLUMNS
from dbscale.report.terminal import summary

ODD = ("", "nan", "inf", "-1", "0", "1", "1.0", "many", "1e300", "0.3333", "-0.0", "2000000000000")

POINT = ("arm", "num_params", "upstream_samples", "dataset", "downstream_samples", "seed")


def random_records(rng: np.random.Generator) -> list[dict[str, Any]]:
    """A table of a few runs with sizes, arms and errors drawn wildly, and sometimes a broken field."""
    sizes = rng.choice([0, 1, 10, 500, 501, 2000, 10**6], size=rng.integers(1, 6))
    labels = rng.choice([1, 100, 1000, 10**5], size=rng.integers(1, 4))
    params = rng.choice([1, 50_000, 10**7, 10**9], size=rng.integers(1, 4))
    style = rng.integers(4)
    points: dict[tuple[object, ...], dict[str, Any]] = {}
    for _ in range(rng.integers(1, 40)):
        size = int(rng.choice(sizes))
        error = (0.5, float(rng.random()), float(rng.integers(2)), float(np.exp(-rng.exponential(3))))[style]
        record = {
            "arm": "scratch" if size == 0 else str(rng.choice(["plain", "distilled"])),
            "num_params": int(rng.choice(params)), "upstream_samples": size, "upstream_dataset": "up" if size else "",
            "dataset": str(rng.choice(["a", "b"])), "downstream_samples": int(rng.choice(labels)),
            "seed": int(rng.integers(3)), "error_rate": error, "num_test_samples": rng.choice(["", 1, 300]),
        }  # fmt: skip
        if rng.random() < 0.01:
            record[str(rng.choice(list(record)))] = str(rng.choice(ODD))
        points[tuple(record[name] for name in POINT) if rng.random() > 0.002 else (len(points),)] = record
    return list(points.values())


def refuse_or_fit(seed: int) -> bool:
    """Whether the table could be fitted; everything that the page draws is made too."""
    try:
        table = from_records(random_records(np.random.default_rng(seed)), COLUMNS, where="fuzz.csv")
    except TableError as error:
        assert "fuzz.csv" in str(error)
        return False
    findings = fit_grid(table, options=Options(num_bootstraps=8))
    assert summary(findings)
    assert all(answer.endswith((".", ". ")) for answer in findings.boundary.answers)
    for number, setting in enumerate(table.settings):
        part = setting_part(table, findings.laws, findings.boundary, setting, number)
        assert part.by_upstream
    return True


@pytest.mark.parametrize("start", range(0, 40, 10))
def test_odd_tables_are_refused_or_fitted(start: int):
    assert sum(refuse_or_fit(seed) for seed in range(start, start + 10)) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 2000, 100))
def test_a_thousand_odd_tables_are_refused_or_fitted(start: int):
    assert sum(refuse_or_fit(seed) for seed in range(start, start + 100)) >= 40
