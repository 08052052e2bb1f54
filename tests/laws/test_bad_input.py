"""Bad tables: a clear message or a recorded warning, never a silent nonsense fit, never another exception."""

from __future__ import annotations

import numpy as np
import pytest

from dbscale.laws import LawError, LawFit, NotEnoughData, fit_law, select_law

X = np.array([1e3, 3e3, 1e4, 3e4, 1e5, 3e5])
Y = 0.1 + 8 * X**-0.4


def changed(values: np.ndarray, row: int, value: float) -> np.ndarray:
    return np.where(np.arange(len(values)) == row, value, values)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (changed(X, 2, np.nan), Y, r"1 value\(s\) not a finite number \(row index 2"),
        (X, changed(Y, 3, np.inf), r"y: 1 value\(s\) not a finite"),
        (changed(X, 0, 0.0), Y, "not above 0"),
        (changed(X, 0, -5.0), Y, "not above 0"),
        (X, changed(Y, 1, -0.1), "negative"),
        (np.full(6, 1e3), Y, "one distinct value"),
        (X[:2], Y[:2], "distinct points"),
        (X, np.full(6, 0.3), "in every row"),
        (X, np.zeros(6), "0 in every row"),
        (X, Y[:4], "6 rows"),
        ([], [], "no rows"),
        (["1e3", "many"], [0.1, 0.2], "'many' is not a number"),
        (X, [["a"]], "not a number"),
        (X[None], Y[None], "one-dimensional"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_words(x, y, words: str) -> None:
    with pytest.raises(LawError, match=words):
        fit_law("power_plus", x, y)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "hubr_log"}, "did you mean 'huber_log'"),
        ({"fixed": {"e": 0.1}}, "no parameter 'e'"),
        ({"bounds": {"c": (1.0, -1.0)}}, "is above"),
        ({"fixed": {"b": -1.0}}, "outside its domain"),
        ({"weights": [1.0]}, "weights have shape"),
        ({"weights": [-1.0] * 6}, "not negative"),
    ],
)
def test_wrong_options_are_refused_in_words(options, words: str) -> None:
    with pytest.raises(LawError, match=words):
        fit_law("power_plus", X, Y, **options)


def test_a_missing_column_names_the_nearest(grid, arms) -> None:
    renamed = {"upstream_sample": grid["upstream_samples"], "downstream_samples": grid["downstream_samples"]}
    with pytest.raises(LawError, match="'upstream_samples' is missing; did you mean 'upstream_sample'"):
        fit_law("transfer_gap", renamed, arms["plain"])


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.repeat(X, 2), np.repeat(Y, 2), "repeat another"),
        (X, changed(Y, 5, 0.0), "y = 0"),
        (X, changed(Y, 0, 1.0), "y = 1"),
        (X, Y[::-1], "rises"),
        (X[:4], Y[:4], "interpolates"),
    ],
)
def test_what_misleads_is_warned_about(x, y, words: str) -> None:
    warnings = fit_law("power_plus", x, y).warnings
    assert any(words in w for w in warnings), warnings


def test_axes_that_vary_together_are_warned_about(grid, arms) -> None:
    diagonal = grid["num_params"] * np.exp(0.01 * np.arange(len(grid["num_params"])) % 3)
    x = {"upstream_samples": diagonal / 1e3, "num_params": grid["num_params"]}
    assert any("vary together" in w for w in fit_law("additive", x, arms["plain"]).warnings)


def random_table(rng: np.random.Generator) -> tuple[str, object, object]:
    """A table of 0 … 12 rows with values that real tables hold, and ones that they should not."""
    n = int(rng.integers(0, 13))
    strange = np.array([0.0, 1.0, -1.0, np.nan, np.inf, 1e-300, 1e300, 0.5])
    x = np.exp(rng.uniform(0, rng.choice([0.1, 10, 300]), n))
    y = rng.choice(
        [rng.random(n), np.round(rng.random(n), 1), (x + 1e-300) ** -0.3 * np.exp(0.1 * rng.standard_normal(n))]
    )
    for column in (x, y):
        if n and rng.random() < 0.3:
            column[rng.integers(0, n)] = rng.choice(strange)
    return str(rng.choice(["power", "power", "power_plus"])), x, y


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_fuzzed_tables_raise_nothing_but_law_errors(count: int) -> None:
    rng, fitted = np.random.default_rng(0), 0
    for _ in range(count):
        name, x, y = random_table(rng)
        try:
            fit = fit_law(name, x, y, loss=str(rng.choice(["huber_log", "least_squares_log", "least_squares"])))
        except LawError as error:
            assert len(str(error)) > 10
            continue
        fitted += 1
        assert np.isfinite(fit.objective) and np.all(np.isfinite(fit.predict(x)))
        assert LawFit.from_json(fit.to_json()).name == name
    assert fitted > count / 10


@pytest.mark.parametrize("name", ["saturating", "m4", "bnsl", "rectified", "log_law"])
def test_fuzzed_tables_of_the_curved_laws(name: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(4):
        _, x, y = random_table(rng)
        try:
            fit = fit_law(name, x, y)
        except LawError:
            continue
        assert np.isfinite(fit.objective)
        fit.report()


def test_selection_survives_short_and_strange_tables() -> None:
    with pytest.raises(NotEnoughData):
        select_law(X[:1].repeat(2) * [1, 2], Y[:2], candidates=["power_plus"])
    chosen = select_law(X, changed(Y, 5, 0.0), candidates=["power", "power_plus"])
    assert np.all(np.isfinite(chosen.interval(np.array([1e6]), 0.9)))
