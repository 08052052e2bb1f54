"""The fit: truth recovered, global optimum, nested laws, options, weights, and JSON."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbscale.laws import FORMS, LawFit, Loss, fit_law

X = np.geomspace(1e3, 1e6, 16)
CURVES = {
    "power": ({"b": 8.0, "c": -0.3}, X),
    "power_plus": ({"E": 0.08, "b": 8.0, "c": -0.4}, X),
    "saturating": ({"b": 20.0, "g": 2e-5, "c": 0.45}, X),
    "m4": ({"E": 0.05, "E0": 0.9, "a": 0.5, "b": 60.0, "c": -0.5}, X),
    "bnsl": ({"a": 0.05, "b": 2.0, "c0": 0.1, "c1": 0.5, "d1": 2e4, "f1": 0.3}, np.geomspace(1e3, 1e6, 40)),
    "rectified": ({"E": 0.1, "B": 300.0, "D_l": 400.0, "beta": 0.6}, X),
    "log_law": ({"A": 3.0, "alpha": 0.4, "beta": 0.7}, X),
}


@pytest.mark.parametrize("name", CURVES)
def test_exact_data_give_the_truth_back(name: str) -> None:
    truth, x = CURVES[name]
    form = FORMS[name]
    y = form.evaluate({"x": x}, form.coordinates(truth))
    fit = fit_law(name, {"samples": x}, y, loss="least_squares_log")
    np.testing.assert_allclose(fit.predict(x), y, rtol=1e-5)
    if name != "bnsl":  # its break's width is the last thing to settle
        assert fit.params == pytest.approx(truth, rel=2e-3)


def test_additive_on_a_noisy_grid(grid, arms) -> None:
    fit = fit_law("additive", grid, arms["plain"], loss="least_squares_log")
    truth = {"E_inf": 0.03, "A": 6, "B": 20, "C": 1.5, "alpha": 0.35, "beta": 0.35, "gamma": 0.35}
    for name, (low, high) in fit.parameter_interval(0.99).items():
        assert low <= truth[name] <= high, name


@pytest.mark.parametrize("seed", range(3))
def test_chinchilla_reaches_its_optimum_from_any_seed(chinchilla, seed: int) -> None:
    fit = fit_law("chinchilla", *chinchilla, seed=seed)
    assert fit.objective <= 0.00101828
    expected = {"A": 477.83, "B": 2143.4, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717}
    assert fit.params == pytest.approx(expected, rel=0.01)
    assert fit.num_starts_reached > 1


NESTED = [(f.name, c.name) for f in FORMS.values() for c in f.contains if len(f.variables) == 1]
SHAPES = {
    "falling": lambda x, rng: 0.1 + rng.random() * x ** -rng.uniform(0, 1) * np.exp(0.1 * rng.standard_normal(len(x))),
    "loss": lambda x, rng: 2 + rng.random() * x ** -rng.uniform(0, 1) * np.exp(0.05 * rng.standard_normal(len(x))),
    "bent": lambda x, rng: 0.1 + rng.uniform(0.5, 0.8, len(x)) / (1 + (x / x[len(x) // 2]) ** rng.uniform(0.3, 2)),
    "rising": lambda x, rng: 1e-3 * x ** rng.uniform(0, 0.5) * np.exp(0.1 * rng.standard_normal(len(x))),
    "noise": lambda x, rng: rng.uniform(0.01, 0.99, len(x)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", ["least_squares_log", "huber_log", "least_squares"])
@settings(max_examples=1, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(seed=st.integers(0, 2**31), n=st.integers(9, 24))
def test_a_law_never_fits_worse_than_one_it_contains(loss: str, shape: str, seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.sort(np.exp(rng.normal(8, rng.uniform(0.3, 4), n)))
    y = SHAPES[shape](x / x[0], rng)
    found = {name: fit_law(name, x, y, loss=loss).objective for name in {n for pair in NESTED for n in pair}}
    for outer, inner in NESTED:
        assert found[outer] <= found[inner] * (1 + 1e-6), (outer, inner)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("outer", ["data_constrained", "apple_supervised"])
def test_laws_of_several_variables_never_fit_worse_than_chinchilla(outer: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = {"num_params": np.exp(rng.normal(15, 1, 30)), "num_samples": np.exp(rng.normal(12, 2, 30))}
    x["unique_samples"] = x["num_samples"] / rng.choice([1, 2, 4, 30], 30)
    y = (0.2 + (x["num_samples"] / 1e5) ** -0.2) * np.exp(0.3 * rng.standard_normal(30))
    inner = fit_law("chinchilla", x, y).objective
    assert fit_law(outer, x, y).objective <= inner * (1 + 1e-6)


def test_a_rectified_law_that_is_nearly_flat_or_rises_can_still_be_contained() -> None:
    for beta in (-0.5, 1e-6, 0.02):
        y = FORMS["rectified"].evaluate({"x": X / 1e4}, np.array([0.1, -1.0, 0.5, beta]))
        inner, outer = (fit_law(name, X, y, loss="least_squares_log") for name in ("rectified", "bnsl"))
        np.testing.assert_allclose(outer.predict(X), inner.predict(X), rtol=1e-3)


def test_transfer_gap_never_fits_worse_than_product(grid, arms) -> None:
    x = {k: grid[k] for k in ("upstream_samples", "downstream_samples")}
    gap, product = (fit_law(name, x, arms["plain"]) for name in ("transfer_gap", "product"))
    assert gap.objective <= product.objective * (1 + 1e-9)


def test_weights_act_like_copies() -> None:
    rng = np.random.default_rng(4)
    y = 8 * X**-0.3 * np.exp(0.1 * rng.standard_normal(len(X)))
    copies = np.arange(len(X)) % 3 + 1
    weighted = fit_law("power", X, y, weights=copies)
    copied = fit_law("power", np.repeat(X, copies), np.repeat(y, copies))
    assert weighted.params == pytest.approx(copied.params, rel=1e-6)
    assert weighted.objective == pytest.approx(copied.objective, rel=1e-9)


def test_fixed_and_bounded_parameters_hold_in_the_tables_units() -> None:
    y = 0.1 + 8 * X**-0.4
    fit = fit_law("power_plus", X, y, fixed={"b": 5.0}, bounds={"c": (-0.35, None)})
    assert fit.params["b"] == pytest.approx(5.0)
    assert fit.params["c"] >= -0.35 - 1e-12
    assert np.isnan(fit.stderr["b"])
    free = fit_law("power_plus", X, y, bounds={"b": (1.0, 1e3)})
    assert free.params == pytest.approx({"E": 0.1, "b": 8.0, "c": -0.4}, rel=1e-4)


def test_m4_knows_error_rates_from_losses() -> None:
    x = np.geomspace(1e3, 1e6, 12)
    y = (0.1 + 0.85 / (1 + x / 2e4)) * np.exp(0.02 * np.sin(np.arange(12)))
    rate, loss = fit_law("m4", x, y), fit_law("m4", x, y, bounds={"E0": (None, np.inf)})
    assert rate.params["E0"] <= 1 and any("error rates" in w for w in rate.warnings)
    assert not any("error rates" in w for w in loss.warnings)
    assert loss.objective <= rate.objective * (1 + 1e-6)
    assert not any("error rates" in w for w in fit_law("m4", x, 3 * y).warnings)


def test_an_absent_or_constant_variable_loses_its_term(grid, arms) -> None:
    one_size = grid["num_params"] == 1e7
    x, y = {k: v[one_size] for k, v in grid.items()}, arms["plain"][one_size]
    constant = fit_law("additive", x, y)
    absent = fit_law("additive", {k: v for k, v in x.items() if k != "num_params"}, y)
    assert "B" not in constant.params
    assert any("num_params" in w for w in constant.warnings)
    assert absent.params == constant.params


def test_json_returns_the_same_law(grid, arms) -> None:
    fit = fit_law("product", grid, arms["plain"], fixed={"E_inf": 0.0})
    again = LawFit.from_json(fit.to_json())
    assert again.params == fit.params
    np.testing.assert_array_equal(again.predict(grid), fit.predict(grid))
    np.testing.assert_array_equal(again.interval(grid)[0], fit.interval(grid)[0])
    assert again.to_json() == fit.to_json()


def test_the_report_names_equation_parameters_and_warnings() -> None:
    fit = fit_law("power_plus", X[:4], 0.1 + 8 * X[:4] ** -0.4)
    text = fit.report()
    assert all(word in text for word in ("E + b*x^c", "warning", *fit.params))


@pytest.mark.parametrize("loss", ["least_squares_log", Loss("huber", "log", 0.02), "least_squares"])
def test_the_batched_solver_agrees_with_scipy(loss) -> None:
    from scipy.optimize import minimize

    rng = np.random.default_rng(5)
    x = np.geomspace(1, 1e3, 25)
    y = 0.2 + 2 * x**-0.5 * np.exp(0.1 * rng.standard_normal(25))
    fit = fit_law("power_plus", x, y, loss=loss)

    def objective(q: np.ndarray) -> float:
        value = q[0] + np.exp(q[1]) * x ** q[2]
        with np.errstate(all="ignore"):
            r = np.log(value) - np.log(y) if fit.loss.is_log else value - y
        return float(np.nan_to_num(fit.loss.rho(r), nan=1e9).sum())

    eager = min(
        (minimize(objective, q, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-10, "fatol": 1e-14}).fun
         for q in ([0.1, 0.5, -0.4], [0.2, 0.7, -0.5])),
    )  # fmt: skip
    assert fit.objective <= eager * (1 + 1e-6)
    assert fit.objective == pytest.approx(eager, rel=1e-3)


def test_predictions_take_any_shape() -> None:
    fit = fit_law("power", X, 8 * X**-0.3)
    assert fit.predict(2e4) == pytest.approx(8 * 2e4**-0.3, rel=1e-6)
    assert fit.predict({"x": X.reshape(4, 4)}).shape == (4, 4)
