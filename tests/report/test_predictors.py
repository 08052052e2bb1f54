"""Rank correlations of checkpoints match scipy and ask for enough of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from dbscale.report.predictors import correlations
from dbscale.report.table import RunTable


def with_predictor(table: RunTable, noise: float) -> RunTable:
    rng = np.random.default_rng(0)
    runs = tuple(
        dataclasses.replace(run, transrate=-run.error_rate + noise * rng.standard_normal(), upstream_key=run.key)
        for run in table
    )
    return dataclasses.replace(table, runs=runs)


def test_correlations_match_scipy_and_hold_their_interval(make_table):
    table = with_predictor(make_table(students={"h2": 200_000}, downstream=(100,)), 0.05)
    (found,) = correlations(table, level=0.9)
    runs = table.pretrained
    wanted = stats.spearmanr(runs.column("transrate"), runs.column("error_rate"))[0]
    assert found.rho == pytest.approx(wanted)
    assert found.low is not None and found.high is not None
    assert found.low < found.rho < found.high < 0
    assert found.num_checkpoints == len(runs)


def test_tables_without_predictors_have_no_section(make_table):
    assert not list(correlations(make_table(students={"h2": 200_000}, downstream=(100,)), level=0.9))


def test_few_checkpoints_say_nothing(make_table):
    table = with_predictor(
        make_table(students={"h2": 200_000}, downstream=(100,), seeds=(0,), upstream=(500, 2000)), 0.05
    )
    assert not list(correlations(table, level=0.9))
