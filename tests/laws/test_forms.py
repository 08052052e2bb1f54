"""Every form: its gradient, its scaling in x and y, the laws it says it contains, and the equations that define it."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from dbscale.laws import FORMS, Form, LawError, find_form, fit_law
from dbscale.laws.form import LOG_CEILING, LOG_FLOOR, Param

EVERY_FORM = pytest.mark.parametrize("name", FORMS)


def columns(name: str, n: int = 25) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    x = {v: np.exp(rng.normal(0, 1.5, n)) for v in FORMS[name].variable_names}
    if "teacher_loss" in x:
        x |= {"teacher_loss": 1 + rng.random(n), "supervised_loss": 1 + rng.random(n)}
    if "unique_samples" in x:
        x["num_samples"] = x["unique_samples"] * (1 + 9 * rng.random(n))
    return x


def thetas(form: Form, count: int = 20, seed: int = 0) -> np.ndarray:
    """Coordinates [count, p] drawn from each parameter's range of first guesses, for y near 0.35."""
    rng = np.random.default_rng(seed)
    columns = []
    for p in form.params:
        level = 0.35 if p.unit else 1.0
        value = level * (
            np.exp(rng.uniform(*np.log(p.start), count)) if p.kind == "log" else rng.uniform(*p.start, count)
        )
        columns.append(np.log(value) if p.kind == "log" else value)
    return np.stack(columns, axis=1)


@EVERY_FORM
def test_the_jacobian_is_the_derivative(name: str) -> None:
    form, x, theta = FORMS[name], columns(name), thetas(FORMS[name])
    y, jacobian = form.jacobian(x, theta)
    inside = np.isfinite(y) & (y < 1e6)
    assert inside.mean() > 0.8
    for k in range(theta.shape[1]):
        step = np.zeros(theta.shape[1])
        step[k] = 1e-6
        slope = (form.evaluate(x, theta + step) - form.evaluate(x, theta - step)) / 2e-6
        size = np.abs(jacobian).max(axis=1) + np.abs(y)
        assert np.max(np.abs(slope - jacobian[:, k])[inside] / size[inside]) < 1e-6


@EVERY_FORM
def test_scaled_coordinates_describe_the_same_curve(name: str) -> None:
    form, x, theta = FORMS[name], columns(name), thetas(FORMS[name])
    units = {
        v.name: 1.0 if not v.scaled else 37.0 if v.unit_of or v.name == "num_samples" else 5.0 for v in form.variables
    }
    units |= {"y": 7.0 if form.scales_with_y else 1.0}
    matrix, shift = form.unscaling(units)
    plain = form.evaluate(x, theta @ matrix.T + shift)
    scaled = units["y"] * form.evaluate({n: c / units[n] for n, c in x.items()}, theta)
    inside = np.isfinite(plain) & np.isfinite(scaled) & (np.abs(plain) < 1e12)
    assert inside.mean() > 0.7
    np.testing.assert_allclose(scaled[inside], plain[inside], rtol=1e-8)


def test_laws_that_keep_their_form_in_another_unit_of_y_say_so() -> None:
    unable = {name for name, form in FORMS.items() if not form.scales_with_y}
    assert unable == {"log_law", "apple_supervised", "apple_distillation"}


@pytest.mark.parametrize(("name", "inner"), [(f.name, inner) for f in FORMS.values() for inner in f.contains])
def test_a_law_reproduces_the_laws_it_contains(name: str, inner: str) -> None:
    form = FORMS[name]
    small = find_form(inner, form.variable_names)
    embed = form.contains[inner]
    x = columns(name)
    if "unique_samples" in x:
        x["num_samples"] = x["unique_samples"] * 1.5
    middle = {p.name: float(np.mean(p.start)) for p in form.params}
    for theta in thetas(small, 10, seed=3):
        values = {k: float(v[0]) for k, v in small.natural(theta).items()}
        if name == "data_constrained" and not 1 / 3 < values["alpha"] / values["beta"] < 3:
            continue  # the compute-optimal size leaves the range of floats
        expected = small.evaluate(x, theta)
        np.testing.assert_allclose(form.evaluate(x, form.coordinates(middle | embed(values))), expected, rtol=1e-6)


def test_m4_product_solves_its_equation() -> None:
    form, x = FORMS["m4_product"], columns("m4_product")
    p = {"E_inf": 0.1, "E0": 0.9, "a": 0.7, "K": 3.0, "alpha": 0.4, "beta": 0.2, "gamma": 0.3}
    y = form.evaluate(x, form.coordinates(p))
    right = 3.0 * x["upstream_samples"] ** -0.4 * x["num_params"] ** -0.2 * x["downstream_samples"] ** -0.3
    np.testing.assert_allclose((y - 0.1) / (0.9 - y) ** 0.7, right, rtol=1e-9)


def test_m4_solves_its_equation() -> None:
    p = {"E": 0.1, "E0": 0.9, "a": 0.7, "b": 3.0, "c": -0.4}
    x = np.geomspace(1e-6, 1e9, 60)
    y = FORMS["m4"].evaluate({"x": x}, FORMS["m4"].coordinates(p))
    inner = slice(5, 50)  # further out y equals E0 or E to rounding
    left = (y[inner] - p["E"]) / (p["E0"] - y[inner]) ** p["a"]
    np.testing.assert_allclose(left, p["b"] * x[inner] ** p["c"], rtol=1e-6)
    assert np.all(np.diff(y) <= 0) and np.all((y >= p["E"]) & (y <= p["E0"]))


def test_published_constants_give_published_losses() -> None:
    """Chinchilla at N = 70e9, D = 1.4e12 with the constants of 2404.10102: E + A/N^α + B/D^β by hand."""
    p = {"E": 1.81722, "A": 477.83, "B": 2143.4, "alpha": 0.34731, "beta": 0.36717}
    form = FORMS["chinchilla"]
    x = {"num_params": np.array([70e9]), "num_samples": np.array([1.4e12])}
    by_hand = 1.81722 + 477.83 * 70e9**-0.34731 + 2143.4 * 1.4e12**-0.36717
    assert form.evaluate(x, form.coordinates(p))[0] == pytest.approx(by_hand, rel=1e-12)


def test_data_constrained_counts_repeats_ever_less() -> None:
    form = FORMS["data_constrained"]
    p = {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353, "beta": 0.353, "R_D": 15.4, "R_N": 5.31}
    epochs = np.array([1.0, 2.0, 4.0, 16.0, 64.0, 1000.0])
    x = {"num_params": np.full(6, 1e9), "unique_samples": np.full(6, 1e10), "num_samples": 1e10 * epochs}
    loss = form.evaluate(x, form.coordinates(p))
    gains = -np.diff(loss) / np.diff(epochs)
    assert np.all(gains > -1e-12) and np.all(np.diff(gains) < 1e-12)


def test_the_transfer_gap_needs_both_samples_and_may_have_a_size() -> None:
    p = {"E_inf": 0.1, "A": 8.0, "G": 2.0, "alpha": 0.5, "delta": 0.25, "beta": 0.5}
    form = FORMS["transfer_gap"]
    x = {"upstream_samples": np.array([16.0]), "num_params": np.array([256.0]), "downstream_samples": np.array([4.0])}
    assert form.evaluate(x, form.coordinates(p))[0] == pytest.approx(0.1 + (8 / 4 + 2) / 4 / 2, rel=1e-12)
    assert find_form("transfer_gap", ("upstream_samples", "downstream_samples")).param_names == (
        *("E_inf", "A", "G", "alpha", "beta"),
    )
    with pytest.raises(LawError, match="downstream_samples to vary"):
        find_form("transfer_gap", ("upstream_samples", "num_params"))


def test_a_vanished_amplitude_is_lifted_to_the_floor() -> None:
    theta = FORMS["power_plus"].coordinates({"E": 0.2, "b": 0.0, "c": -1.0})
    assert theta.tolist() == [0.2, pytest.approx(np.log(1e-60)), -1.0]


def test_unknown_laws_and_columns_name_the_nearest() -> None:
    with pytest.raises(LawError, match="did you mean 'power_plus'"):
        find_form("powerplus")
    with pytest.raises(LawError, match="upstream_samples"):
        FORMS["transfer_gap"].columns({"upstream_sample": [1.0], "downstream_samples": [1.0]})


def test_importing_the_laws_needs_neither_scipy_nor_torch() -> None:
    code = "import sys, dbscale.laws as l; l.fit_law; sys.exit(any(m in sys.modules for m in ('scipy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_column_is_not_enough_for_a_law_of_two_variables() -> None:
    for table in ({"upstream_samples": [1.0, 2.0]}, {"accuracy": [1.0, 2.0]}):
        with pytest.raises(LawError, match="is missing"):
            find_form("chinchilla").columns(table)


@EVERY_FORM
def test_an_equation_names_every_parameter_and_none_is_missing(name: str) -> None:
    form = FORMS[name]
    words = set(re.findall(r"\w+", form.equation))
    hidden = {"R_D", "R_N"} if name == "data_constrained" else set()  # of its effective N and D
    assert set(form.param_names) - words == hidden


@pytest.mark.parametrize("name", ["m4", "m4_product"])
def test_at_no_curvature_an_m4_law_has_the_slope_that_it_comes_from(name: str) -> None:
    """At a = 0 the law is E + right side; the slope in a is that of the implicit equation on its way there."""
    form, x = FORMS[name], columns(name)
    at = {p.name: {"E0": 0.9, "a": 0.0, "E": 0.1, "E_inf": 0.1, "b": 0.3, "K": 0.3, "c": -0.1}.get(p.name, 0.05)
          for p in form.params}  # fmt: skip
    y, jacobian = form.jacobian(x, form.coordinates(at)[None])
    near = form.evaluate(x, form.coordinates(at | {"a": 1e-7}))
    below = y[0] < 0.85
    assert below.sum() > 10
    np.testing.assert_allclose(
        jacobian[0, form.param_names.index("a")][below], ((near - y[0]) / 1e-7)[below], rtol=1e-4
    )


def test_effective_data_and_distillation_by_hand() -> None:
    form = FORMS["effective_data"]
    x = {"downstream_samples": np.array([100.0]), "num_params": np.array([16.0])}
    assert form.evaluate(x, form.coordinates({"k": 3.0, "alpha": 0.5, "beta": 0.25}))[0] == pytest.approx(3 * 10 * 2)
    form = FORMS["apple_distillation"]
    p = {"A": 8.0, "B": 4.0, "alpha": 0.5, "beta": 0.5, "gamma": 2.0, "c0": 1.0, "c1": 3.0, "d1": 0.5, "f1": 0.5}
    x = {"num_params": np.array([256.0]), "num_samples": np.array([64.0]), "teacher_loss": np.array([2.0]),
         "supervised_loss": np.array([4.0])}  # fmt: skip
    # L_T/(L_S·d1) is 1, so the bend is 2^(−1.5); 8/16 + 4/8 is 1.
    assert form.evaluate(x, form.coordinates(p))[0] == pytest.approx(2 + 0.5 * 2**-1.5)


def test_an_exponent_ends_at_two() -> None:
    """y = .1 + x^-4 over two decades: beyond 2 an exponent only says that its term vanished after the first level."""
    x = np.geomspace(1, 100, 9)
    fit = fit_law("additive", {"upstream_samples": x}, 0.1 + x**-4.0)
    assert fit.params["alpha"] == pytest.approx(2.0, abs=1e-6) and "alpha" in fit.at_bound


def test_only_what_is_fitted_by_its_logarithm_has_a_floor_and_a_ceiling() -> None:
    free, bound, level = (
        Param("A", "log", (1.0, 2.0)),
        Param("A", "log", (1.0, 2.0), 0.5, 3.0),
        Param("E", "linear", (0, 1)),
    )
    assert (
        (free.lower, free.upper) == (LOG_FLOOR, LOG_CEILING) and 0 < LOG_FLOOR < 1e-50 and 1e50 < LOG_CEILING < np.inf
    )
    assert (bound.lower, bound.upper) == (0.5, 3.0) and (level.lower, level.upper) == (-np.inf, np.inf)
    assert Param("A", "log", (1.0, 2.0), 0.5).upper == LOG_CEILING
