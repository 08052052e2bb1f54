"""Selection: the right law wins, losers are shown, short tables are told so, and the average predicts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dbscale.laws import LawError, NotEnoughData, select_law

X = np.geomspace(1e3, 1e6, 24)


def test_a_curved_table_does_not_get_a_plain_power_law() -> None:
    rng = np.random.default_rng(0)
    y = (0.2 + 30 * X**-0.6) * np.exp(0.01 * rng.standard_normal(len(X)))
    chosen = select_law(X[:18], y[:18], candidates=["power", "power_plus", "saturating"])
    by_name = {c.name: c for c in chosen.candidates}
    assert chosen.best.name == "power_plus"
    assert by_name["power"].weight < 0.1 < by_name["power_plus"].weight
    assert all(name in chosen.report() for name in by_name)
    low, high = chosen.interval(X[18:], 0.9)
    assert np.mean((low <= y[18:]) & (y[18:] <= high)) >= 0.75
    assert sum(c["weight"] for c in json.loads(chosen.to_json())["candidates"]) == pytest.approx(1)


def test_not_enough_data_is_an_answer_per_law_and_in_all() -> None:
    y = 0.1 + 8 * X[:4] ** -0.4
    chosen = select_law(X[:4], y, candidates=["power", "bnsl"])
    assert "not enough data" in next(c for c in chosen.candidates if c.name == "bnsl").reason
    with pytest.raises(NotEnoughData, match="distinct points"):
        select_law(X[:2], y[:2], candidates=["power_plus", "bnsl"])


def test_grids_choose_among_the_laws_of_their_columns(grid, arms) -> None:
    chosen = select_law(grid, arms["plain"])
    assert {c.name for c in chosen.candidates} == {"additive", "product", "m4_product"}
    assert chosen.best.name == "additive"
    # Levels a factor of four apart lie beyond the usual horizon: the nearest ones count all the same.
    assert all(np.isfinite(c.rolling) for c in chosen.candidates)
    with pytest.raises(LawError, match="no law has the columns"):
        select_law({"a": X, "b": X}, X)
