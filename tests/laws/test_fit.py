"""The fit: truth recovered, units, covariance by hand, what a table does not determine, nested laws, bad tables."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbscale.laws import FORMS, LawError, Loss, NotEnoughData, error_weights, fit_law, seed_spread

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


GRID_TRUTH = {
    "additive": {"E_inf": 0.03, "A": 6.0, "B": 20.0, "C": 1.5, "alpha": 0.35, "beta": 0.35, "gamma": 0.35},
    "product": {"E_inf": 0.05, "K": 500.0, "alpha": 0.3, "beta": 0.25, "gamma": 0.2},
    "transfer_gap": {"E_inf": 0.02, "A": 90.0, "G": 3.0, "alpha": 0.5, "delta": 0.1, "beta": 0.2},
}


@pytest.mark.parametrize("name", GRID_TRUTH)
def test_exact_grids_give_the_truth_back(name: str, grid) -> None:
    form = FORMS[name]
    y = form.evaluate(grid, form.coordinates(GRID_TRUTH[name]))
    fit = fit_law(name, grid, y, loss="least_squares_log")
    assert fit.params == pytest.approx(GRID_TRUTH[name], rel=1e-3)
    assert fit.undetermined == fit.at_bound == ()


@pytest.mark.parametrize("seed", range(3))
def test_chinchilla_reaches_its_optimum_from_any_seed(chinchilla, seed: int) -> None:
    fit = fit_law("chinchilla", *chinchilla, seed=seed)
    assert fit.objective == pytest.approx(0.001018274, abs=1e-9)
    expected = {"A": 477.83, "B": 2143.4, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717}
    assert fit.params == pytest.approx(expected, rel=1e-3)
    assert fit.num_starts_reached > 1


# Units.

IN_Y = {"E", "E0", "a", "b", "B"}  # offsets and amplitudes of the laws below, where they scale as y does
NOISY = {
    name: FORMS[name].evaluate({"x": X}, FORMS[name].coordinates(CURVES[name][0]))
    * np.exp(0.03 * np.random.default_rng(2).standard_normal(len(X)))
    for name in ("power_plus", "saturating", "rectified", "m4")
}


@pytest.mark.parametrize("loss", ["least_squares_log", "huber_log", "least_squares", "huber"])
@pytest.mark.parametrize("name", NOISY)
def test_fits_do_not_depend_on_units(name: str, loss: str) -> None:
    y = NOISY[name]
    small, large = fit_law(name, X, y, loss=loss), fit_law(name, 1e3 * X, 100 * y, loss=loss)
    np.testing.assert_allclose(large.predict(1e3 * X), 100 * small.predict(X), rtol=1e-5)
    assert large.at_bound == small.at_bound and large.undetermined == small.undetermined
    scale = 1.0 if "log" in loss else 1e4
    assert large.objective == pytest.approx(scale * small.objective, rel=1e-6)
    exponent = {"power_plus": "c", "saturating": "c", "rectified": "beta", "m4": "c"}[name]
    assert large.params[exponent] == pytest.approx(small.params[exponent], rel=1e-3, abs=1e-6)
    assert large.stderr[exponent] == pytest.approx(small.stderr[exponent], rel=1e-2, nan_ok=True)


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 37.0, 1e9])
def test_parameters_move_with_units_as_the_equation_says(unit: float) -> None:
    """E + b·x^c with x in thousands: b·1000^-c."""
    first, other = (
        fit_law("power_plus", x, y) for x, y in ((X, NOISY["power_plus"]), (1e3 * X, unit * NOISY["power_plus"]))
    )
    p = first.params
    assert other.params == pytest.approx(
        {"E": unit * p["E"], "b": unit * p["b"] * 1e3 ** -p["c"], "c": p["c"]}, rel=1e-4
    )
    assert other.stderr["E"] == pytest.approx(unit * first.stderr["E"], rel=1e-3)


def test_hubers_corner_follows_y_where_the_law_itself_cannot() -> None:
    """apple_supervised keeps no unit of y: its corner under linear losses is read off the table all the same."""
    rng = np.random.default_rng(0)
    x = {"num_params": np.exp(rng.normal(15, 1, 40)), "num_samples": np.exp(rng.normal(12, 2, 40))}
    y = (0.5 + (300 * x["num_params"] ** -0.4 + 20 * x["num_samples"] ** -0.3) ** 0.8) * np.exp(
        0.05 * rng.standard_t(2, 40)
    )
    one, many = (fit_law("apple_supervised", x, scale * y, loss=Loss("huber", "linear", 0.02)) for scale in (1, 50))
    np.testing.assert_allclose(many.predict(x), 50 * one.predict(x), rtol=2e-3)
    squares = fit_law("apple_supervised", x, y, loss="least_squares")
    assert np.abs(squares.predict(x) / one.predict(x) - 1).max() > 0.01


@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), x_unit=st.sampled_from([1e-4, 1e6]), y_unit=st.sampled_from([1e-5, 1e4]))
def test_grids_do_not_depend_on_units(seed: int, x_unit: float, y_unit: float) -> None:
    rng = np.random.default_rng(seed)
    d_p, d_f = (c.ravel() for c in np.meshgrid(np.geomspace(1e3, 1e6, 5), np.geomspace(1e2, 1e4, 4)))
    y = (0.05 + 6 * d_p**-0.35 + 2 * d_f**-0.4) * np.exp(0.02 * rng.standard_normal(len(d_p)))
    for name in ("additive", "transfer_gap"):
        one = fit_law(name, {"upstream_samples": d_p, "downstream_samples": d_f}, y)
        two = fit_law(name, {"upstream_samples": x_unit * d_p, "downstream_samples": d_f}, y_unit * y)
        np.testing.assert_allclose(two.predict(two.x), y_unit * one.predict(one.x), rtol=1e-4)


def test_bounds_and_fixed_values_are_in_the_tables_units() -> None:
    y = 0.1 + 8 * X**-0.4
    fit = fit_law("power_plus", X, y, fixed={"b": 5.0}, bounds={"c": (-0.35, None)})
    assert fit.params["b"] == pytest.approx(5.0) and fit.params["c"] >= -0.35 - 1e-12
    assert np.isnan(fit.stderr["b"]) and fit.fixed == ("b",)
    free = fit_law("power_plus", X, y, bounds={"b": (1.0, 1e3), "E": (0.05, 0.2)})
    assert free.params == pytest.approx({"E": 0.1, "b": 8.0, "c": -0.4}, rel=1e-4)
    held = fit_law("power_plus", X, 100 * y, bounds={"E": (12.0, None)})
    assert held.params["E"] == pytest.approx(12.0) and held.at_bound == ("E",)
    m4 = fit_law("m4", X, 100 * y, fixed={"b": 300.0}, loss="least_squares_log")
    assert m4.params["b"] == pytest.approx(300.0)


def test_a_ceiling_keeps_m4_below_the_largest_value_that_y_can_take() -> None:
    x = np.geomspace(1e4, 1e7, 12)
    y = 0.1 + 1.2 / (1 + x / 2e4)  # m4 with E = .1, E0 = 1.3, a = 1
    rate, free, percent = fit_law("m4", x, y, ceiling=1.0), fit_law("m4", x, y), fit_law("m4", x, 100 * y, ceiling=100)
    assert rate.params["E0"] <= 1 and free.params["E0"] == pytest.approx(1.3, rel=1e-3)
    assert free.objective < rate.objective
    assert percent.params["E0"] == pytest.approx(100 * rate.params["E0"], rel=1e-4)
    assert fit_law("m4", x, y, ceiling=1.0, bounds={"E0": (None, 2.0)}).params == pytest.approx(
        fit_law("m4", x, y, bounds={"E0": (None, 2.0)}).params
    )
    with pytest.raises(LawError, match=r"ceiling 0.5: y reaches 0.9"):
        fit_law("m4", x, y, ceiling=0.5)


# How sure.

LINE_X, LINE_Y, LINE_W = np.exp([0.0, 1, 2, 3]), np.exp([2.0, 1.3, 1.1, 0.2]), np.array([1.0, 2.0, 2.0, 3.0])


def line(w: np.ndarray) -> tuple[float, float, np.ndarray, float]:
    """Slope, intercept, covariance and weighted residual variance of log y over log x = 0, 1, 2, 3, in textbook form."""
    w = w / w.mean()
    x, y = np.log(LINE_X), np.log(LINE_Y)
    middle = w @ x / w.sum()
    spread = w @ (x - middle) ** 2
    slope = w @ ((x - middle) * y) / spread
    intercept = w @ y / w.sum() - slope * middle
    variance = w @ (y - intercept - slope * x) ** 2 / 2
    covariance = variance * np.array(
        [[1 / w.sum() + middle**2 / spread, -middle / spread], [-middle / spread, 1 / spread]]
    )
    return slope, intercept, covariance, variance


@pytest.mark.parametrize("weights", [np.ones(4), LINE_W, 1000 * LINE_W])
def test_covariance_of_a_weighted_line_by_hand(weights: np.ndarray) -> None:
    fit = fit_law("power", LINE_X, LINE_Y, weights=weights, loss="least_squares_log")
    slope, intercept, covariance, _ = line(weights)
    assert fit.params == pytest.approx({"b": np.exp(intercept), "c": slope}, rel=1e-7)
    size = np.array([np.exp(intercept), 1.0])  # the delta method: b = e^intercept
    np.testing.assert_allclose(fit.covariance, covariance * np.outer(size, size), rtol=1e-5)
    assert fit.stderr["c"] == pytest.approx(np.sqrt(covariance[1, 1]), rel=1e-6)
    assert fit.degrees == 2


def test_one_line_in_numbers() -> None:
    """log y = 2.0, 1.3, 1.1, .2 over 0, 1, 2, 3 with weights 1, 2, 2, 3: slope −.5709, by hand."""
    fit = fit_law("power", LINE_X, LINE_Y, weights=LINE_W, loss="least_squares_log")
    # Σw = 8, mean x = 15/8, mean y = 7.4/8; Σw(x−x̄)² = 37 − 225/8 = 8.875; Σw(x−x̄)y = 8.8 − 13.875 = −5.075.
    assert fit.params["c"] == pytest.approx(-5.075 / 8.875, rel=1e-8)
    assert np.log(fit.params["b"]) == pytest.approx(0.925 + 1.875 * 5.075 / 8.875, rel=1e-8)
    assert fit.objective == pytest.approx(0.5 * (LINE_W @ (fit.residuals) ** 2), rel=1e-9)


def test_rows_without_weight_count_for_nothing() -> None:
    without = fit_law("power", LINE_X, LINE_Y, loss="least_squares_log")
    more = (np.append(LINE_X, 50.0), np.append(LINE_Y, 900.0))
    with_row = fit_law("power", *more, weights=[1, 1, 1, 1, 0], loss="least_squares_log")
    assert with_row.params == pytest.approx(without.params, rel=1e-6)
    assert with_row.degrees == 2 and with_row.stderr == pytest.approx(without.stderr, rel=1e-5)


def test_weights_act_like_copies() -> None:
    y, copies = NOISY["power_plus"], np.arange(len(X)) % 3 + 1
    weighted = fit_law("power_plus", X, y, weights=copies)
    copied = fit_law("power_plus", np.repeat(X, copies), np.repeat(y, copies))
    assert weighted.params == pytest.approx(copied.params, rel=1e-6)
    assert weighted.objective == pytest.approx(copied.objective, rel=1e-9)
    assert weighted.params["c"] != pytest.approx(fit_law("power_plus", X, y).params["c"], rel=1e-4)


def test_a_huber_location_and_its_error_by_hand() -> None:
    """log y = 0, .02, −.02, .5 and δ = .05: three rows pull by their distance, one by δ, so log b = .05/3. The sandwich:
    Σψ²/3² times n/(n − p) = 4/3; the median residual, .027·1.48, lies below δ, so the window is δ."""
    y = np.exp([0.0, 0.02, -0.02, 0.5])
    fit = fit_law("power", [1.0, 2, 3, 4], y, fixed={"c": 0.0}, loss=Loss("huber", "log", 0.05))
    middle = 0.05 / 3
    assert np.log(fit.params["b"]) == pytest.approx(middle, rel=1e-6)
    psi = np.array([middle, middle - 0.02, middle + 0.02, -0.05])
    assert fit.stderr["b"] / fit.params["b"] == pytest.approx(np.sqrt(psi @ psi / 9 * 4 / 3), rel=1e-6)
    assert fit.objective == pytest.approx(0.5 * psi[:3] @ psi[:3] + 0.05 * (0.5 - middle - 0.025), rel=1e-9)
    wide = fit_law("power", [1.0, 2, 3, 4], y, fixed={"c": 0.0}, loss=Loss("huber", "log", 0.01))
    far = 1.4826 * np.median(np.abs(wide.residuals))  # beyond δ: curvature counts rows in the residuals' own spread
    inside = np.sum(np.abs(wide.residuals) <= far) * 0.01 / far
    own = np.clip(wide.residuals, -0.01, 0.01)
    assert wide.stderr["b"] / wide.params["b"] == pytest.approx(np.sqrt(own @ own / inside**2 * 4 / 3), rel=1e-6)


def test_huber_errors_are_those_of_repeated_worlds() -> None:
    """The sandwich against the spread of 60 fits; two-sided."""
    rng, found, said = np.random.default_rng(0), [], []
    x = np.geomspace(1, 1e3, 60)
    for _ in range(60):
        y = 3 * x**-0.4 * np.exp(0.05 * rng.standard_t(3, 60))
        fit = fit_law("power", x, y, loss=Loss("huber", "log", 0.03))
        found.append(fit.params["c"])
        said.append(fit.stderr["c"])
    assert np.mean(found) == pytest.approx(-0.4, abs=0.002)
    assert np.mean(said) == pytest.approx(np.std(found, ddof=1), rel=0.2)


def test_what_the_table_does_not_determine_is_named() -> None:
    """A flat grid axis: its amplitude vanished, so nothing is known of its exponent."""
    d_p, d_f = (c.ravel() for c in np.meshgrid(np.geomspace(1e3, 1e6, 6), np.geomspace(1e2, 1e4, 5)))
    x = {"upstream_samples": d_p, "downstream_samples": d_f}
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(len(d_p)))
    fit = fit_law("additive", x, 2 * d_p**-0.4 * noise, bounds={"C": (None, 1e-80)}, loss="least_squares_log")
    assert "gamma" in fit.undetermined and np.isnan(fit.stderr["gamma"])
    assert "not determined by the table" in fit.report() and "± 0\n" not in fit.report()
    assert fit.to_dict()["undetermined"] == list(fit.undetermined) and fit.to_dict()["stderr"]["gamma"] is None
    # With α held at 0 only E + A is known.
    flat = fit_law("additive", x, 0.1 + d_f**-0.4 * noise, fixed={"alpha": 0.0}, loss="least_squares_log")
    assert {"E_inf", "A"} <= {*flat.undetermined, *flat.at_bound}
    assert flat.stderr["gamma"] == pytest.approx(0.004, rel=1.0)


def test_a_vanished_gap_is_at_its_bound() -> None:
    d_p, d_f = (c.ravel() for c in np.meshgrid(np.geomspace(1e3, 1e6, 6), np.geomspace(1e2, 1e4, 5)))
    y = 8 * d_p**-0.4 * d_f**-0.3 * np.exp(0.05 * np.random.default_rng(2).standard_normal(len(d_p)))
    fit = fit_law("transfer_gap", {"upstream_samples": d_p, "downstream_samples": d_f}, y, loss="least_squares_log")
    assert "G" in fit.at_bound and fit.params["G"] == 0.0 and np.isnan(fit.stderr["G"])
    assert "at its bound" in fit.report()


# Laws that contain others.

NESTED = [(f.name, inner) for f in FORMS.values() for inner in f.contains if len(f.variables) == 1]
SHAPES = {
    "falling": lambda x, rng: 0.1 + rng.random() * x ** -rng.uniform(0, 1) * np.exp(0.1 * rng.standard_normal(len(x))),
    "loss": lambda x, rng: 2 + rng.random() * x ** -rng.uniform(0, 1) * np.exp(0.05 * rng.standard_normal(len(x))),
    "bent": lambda x, rng: 0.1 + rng.uniform(0.5, 0.8, len(x)) / (1 + (x / x[len(x) // 2]) ** rng.uniform(0.3, 2)),
    "rising": lambda x, rng: 1e-3 * x ** rng.uniform(0, 0.5) * np.exp(0.1 * rng.standard_normal(len(x))),
    "noise": lambda x, rng: rng.uniform(0.01, 0.99, len(x)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", ["least_squares_log", "huber_log", "least_squares"])
def test_a_law_never_fits_worse_than_one_it_contains(loss: str, shape: str) -> None:
    rng = np.random.default_rng([ord(c) for c in loss + shape])
    x = np.sort(np.exp(rng.normal(8, rng.uniform(0.3, 4), int(rng.integers(9, 20)))))
    y = SHAPES[shape](x / x[0], rng)
    found = {name: fit_law(name, x, y, loss=loss).objective for name in {n for pair in NESTED for n in pair}}
    for outer, inner in NESTED:
        assert found[outer] <= found[inner] * (1 + 1e-6), (outer, inner)


@pytest.mark.parametrize("outer", ["data_constrained", "apple_supervised"])
def test_laws_of_several_variables_never_fit_worse_than_chinchilla(outer: str) -> None:
    rng = np.random.default_rng(1)
    x = {"num_params": np.exp(rng.normal(15, 1, 30)), "num_samples": np.exp(rng.normal(12, 2, 30))}
    x["unique_samples"] = x["num_samples"] / rng.choice([1, 2, 4, 30], 30)
    y = (0.2 + (x["num_samples"] / 1e5) ** -0.2) * np.exp(0.3 * rng.standard_normal(30))
    assert fit_law(outer, x, y).objective <= fit_law("chinchilla", x, y).objective * (1 + 1e-6)


def test_a_rectified_law_that_is_nearly_flat_or_rises_can_still_be_contained() -> None:
    for beta in (-0.5, 1e-6, 0.02):
        y = FORMS["rectified"].evaluate({"x": X / 1e4}, np.array([0.1, -1.0, 0.5, beta]))
        inner, outer = (fit_law(name, X, y, loss="least_squares_log") for name in ("rectified", "bnsl"))
        np.testing.assert_allclose(outer.predict(X), inner.predict(X), rtol=1e-3)


def test_transfer_gap_never_fits_worse_than_product(grid, arms) -> None:
    gap, product = (fit_law(name, grid, arms["plain"]) for name in ("transfer_gap", "product"))
    assert gap.objective <= product.objective * (1 + 1e-9)


def test_an_absent_or_constant_variable_loses_its_term(grid, arms) -> None:
    one_size = grid["num_params"] == 1e7
    x, y = {k: v[one_size] for k, v in grid.items()}, arms["plain"][one_size]
    constant = fit_law("additive", x, y)
    absent = fit_law("additive", {k: v for k, v in x.items() if k != "num_params"}, y)
    assert "B" not in constant.params and "delta" not in fit_law("transfer_gap", x, y).params
    assert any("num_params (1e+07): its term was dropped" in w for w in constant.warnings)
    assert absent.params == constant.params


# The value.


def test_json_holds_what_the_fit_found() -> None:
    fit = fit_law("power_plus", X, NOISY["power_plus"], fixed={"E": 0.0}, seed=3)
    data = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert data["schema"] == "dbscale.laws/law_fit/2" and data["form"] == "power_plus"
    assert data["params"] == fit.params and data["stderr"]["E"] is None and data["fixed"] == ["E"]
    assert data["range"] == {"x": [1e3, pytest.approx(1e6)]} and data["num_points"] == 16 and data["seed"] == 3
    assert data["loss"] == {"kind": "huber", "space": "log", "delta": 1e-3}


def test_the_report_names_equation_parameters_and_warnings() -> None:
    fit = fit_law("power_plus", X[:4], 0.1 + 8 * X[:4] ** -0.4, fixed={"E": 0.1})
    lines = fit.report().splitlines()
    assert "E + b*x^c" in lines[0] and lines[1].split() == ["E", "0.1", "fixed"]
    assert lines[2].split()[:2] == ["b", "8"] and "±" in lines[2]
    said = fit.report({"E": (0.1, 0.1), "b": (7.5, 8.5), "c": None}).splitlines()
    assert said[1] == lines[1] and said[2] == f"{lines[2]}  (90 %: 7.5 to 8.5)"
    assert said[3].split(maxsplit=2)[2] == "not determined by the table"
    assert "4 points" in lines[4] and lines[5].startswith("  warning: 4 distinct points for 3 parameters")


def test_predictions_take_any_shape_and_draws_any_number() -> None:
    fit = fit_law("power", X, 8 * X**-0.3)
    assert fit.predict(2e4) == pytest.approx(8 * 2e4**-0.3, rel=1e-6)
    assert fit.predict({"x": X.reshape(4, 4)}).shape == (4, 4)
    theta = np.stack([fit.theta, fit.theta + np.array([np.log(2), 0.0])])
    np.testing.assert_allclose(fit.predict_draws(X, theta), np.stack([1, 2])[:, None] * 8 * X**-0.3, rtol=1e-6)


def test_the_seed_moves_the_starts_and_not_the_optimum() -> None:
    first, other = (fit_law("m4", X, NOISY["m4"], seed=s, loss="least_squares_log") for s in (0, 1))
    assert first.theta.tolist() != other.theta.tolist()
    assert first.objective == pytest.approx(other.objective, rel=1e-4)
    assert fit_law("m4", X, NOISY["m4"], seed=0, loss="least_squares_log").theta.tolist() == first.theta.tolist()


# Weights of error rates.


def test_weights_of_error_rates_by_hand() -> None:
    """p(1 − p)/n with p drawn in: (.5·99 + .5)/100 = .5 and (.1·99 + .5)/100 = .104; log: over p²."""
    linear = 1 / np.array([0.5 * 0.5 / 99, 0.104 * 0.896 / 99])
    assert error_weights([0.5, 0.1], 99, space="linear") == pytest.approx(linear / linear.mean(), rel=1e-12)
    log = linear * np.array([0.25, 0.104**2])
    assert error_weights([0.5, 0.1], 99) == pytest.approx(log / log.mean(), rel=1e-12)
    noisy = 1 / (1 / linear + np.array([0.03**2, 0.01**2]))
    assert error_weights([0.5, 0.1], 99, seed_stderr=[0.03, 0.01], space="linear") == pytest.approx(
        noisy / noisy.mean()
    )
    with pytest.raises(LawError, match="between 0 and 1"):
        error_weights([1.5], 10)
    with pytest.raises(LawError, match="num_test must be at least 1"):
        error_weights([0.5], 0)


def test_the_spread_between_seeds_is_pooled_by_hand() -> None:
    """Logs apart by log 1.2 in both pairs: each has variance log(1.2)²/2; relative spread log(1.2)/√2."""
    errors = np.array([0.10, 0.12, 0.30, 0.36])
    assert seed_spread(errors, ["a", "a", "b", "b"]) == pytest.approx(errors * np.log(1.2) / np.sqrt(2), rel=1e-9)
    three = seed_spread([0.1, 0.2, 0.4, 0.7], ["a", "a", "a", "b"])  # logs −log 2, 0, log 2 around their mean
    assert three == pytest.approx(np.array([0.1, 0.2, 0.4, 0.7]) * np.log(2), rel=1e-9)
    assert np.all(seed_spread([0.1, 0.2], ["a", "b"]) == 0)


# Bad tables.

X6 = np.array([1e3, 3e3, 1e4, 3e4, 1e5, 3e5])
Y6 = 0.1 + 8 * X6**-0.4


def changed(values: np.ndarray, row: int, value: float) -> np.ndarray:
    return np.where(np.arange(len(values)) == row, value, values)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (changed(X6, 2, np.nan), Y6, r"1 value\(s\) not a finite number \(row index 2"),
        (X6, changed(Y6, 3, np.inf), r"y: 1 value\(s\) not a finite"),
        (changed(X6, 0, 0.0), Y6, "not above 0"),
        (changed(X6, 0, -5.0), Y6, "not above 0"),
        (changed(X6, 4, 1e200), Y6, r"beyond 1e\+100 .* change the column's unit"),
        (changed(X6, 4, 1e-200), Y6, r"x: 1 value\(s\) beyond 1e\+100 or below its inverse"),
        (np.full(6, np.nan), Y6, r"x: 6 value\(s\) not a finite number \(row index 0, 1, 2, 3, 4 …: nan\); drop"),
        (X6, changed(Y6, 1, -0.1), r"1 value\(s\) negative \(row index 1: -0.1\); use loss"),
        (np.full(6, 1e3), Y6, "one distinct value of x"),
        (X6[:2], Y6[:2], "3 free parameters, the table 2 distinct points"),
        (X6, np.full(6, 0.3), "in every row"),
        (X6, np.zeros(6), "0 in every row"),
        (X6, Y6[:4], "6 rows, y has 4"),
        ([], [], "no rows"),
        (["1e3", "many"], [0.1, 0.2], "column 'x' must hold numbers: .*'many'"),
        (X6, [["a"]], "must hold numbers"),
        (X6[None], Y6[None], "one-dimensional"),
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
        ({"weights": [1.0]}, "weights has 1 rows, y has 6"),
        ({"weights": [-1.0] * 6}, "not negative"),
        ({"weights": [0.0] * 6}, "not all 0"),
    ],
)
def test_wrong_options_are_refused_in_words(options, words: str) -> None:
    with pytest.raises(LawError, match=words):
        fit_law("power_plus", X6, Y6, **options)


def test_a_missing_column_names_the_nearest(grid, arms) -> None:
    renamed = {"upstream_sample": grid["upstream_samples"], "downstream_samples": grid["downstream_samples"]}
    with pytest.raises(LawError, match=r"transfer_gap needs upstream_samples .* only \('downstream_samples',\) do"):
        fit_law("transfer_gap", renamed, arms["plain"])
    with pytest.raises(LawError, match="'num_samples' is missing; did you mean 'num_sample'"):
        fit_law("chinchilla", {"num_params": [1.0], "num_sample": [1.0]}, [1.0])
    with pytest.raises(NotEnoughData):
        fit_law("bnsl", X6[:5], Y6[:5])


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.repeat(X6, 2), np.repeat(Y6, 2), r"6 row\(s\) repeat another"),
        (X6, changed(Y6, 5, 0.0), "1 row.* taken as 0.09, half the smallest"),
        (X6, Y6[::-1], "y rises with x"),
        (X6[:4], Y6[:4], "all but interpolates"),
    ],
)
def test_what_misleads_is_warned_about(x, y, words: str) -> None:
    with_trouble = fit_law("power_plus", x, y).warnings
    assert any(re.search(words, w) for w in with_trouble), with_trouble
    assert fit_law("power_plus", X6, Y6).warnings == ()


def test_axes_that_vary_together_are_warned_about(grid, arms) -> None:
    diagonal = grid["num_params"] * np.exp(0.01 * np.arange(len(grid["num_params"])) % 3)
    x = {"upstream_samples": diagonal / 1e3, "num_params": grid["num_params"]}
    assert any("vary together" in w for w in fit_law("additive", x, arms["plain"]).warnings)
    assert not any("vary together" in w for w in fit_law("additive", grid, arms["plain"]).warnings)


def random_table(rng: np.random.Generator) -> tuple[str, np.ndarray, np.ndarray]:
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


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
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
        json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert count / 10 < fitted < count


@pytest.mark.parametrize("name", ["saturating", "m4", "bnsl", "rectified", "log_law"])
def test_fuzzed_tables_of_the_curved_laws(name: str) -> None:
    rng, fitted = np.random.default_rng(1), 0
    for _ in range(8):
        _, x, y = random_table(rng)
        try:
            fit = fit_law(name, x, y)
        except LawError:
            continue
        fitted += 1
        assert np.isfinite(fit.objective) and fit.name in fit.report()
    assert fitted > 0


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1, np.nan], [1, 1, 1, 1, 1, -1], [0] * 6, [np.inf, 1, 1, 1, 1, 1]])
def test_weights_that_weigh_nothing_or_less_are_refused(weights) -> None:
    with pytest.raises(LawError, match="weights must be finite, not negative, and not all 0"):
        fit_law("power", X6, Y6, weights=np.array(weights, float))


def test_a_law_that_cannot_lose_a_variable_needs_it_to_vary() -> None:
    table = {"num_params": np.full(6, 1e6), "num_samples": np.geomspace(1e3, 1e6, 6)}
    with pytest.raises(LawError, match="needs its variables to vary; one distinct value of num_params"):
        fit_law("chinchilla", table, np.geomspace(0.5, 0.1, 6))
