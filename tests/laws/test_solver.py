"""The minimiser: losses by hand, closed forms, scipy as the reference, batches against single problems."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import least_squares

from dbscale.laws import FORMS, LOSSES, LawError, Loss
from dbscale.laws.solver import Problem, make_loss, minimise, polish

X = np.geomspace(0.01, 100, 30)
TRUTH = {
    "power_plus": {"E": 0.1, "b": 0.3, "c": -0.5},
    "saturating": {"b": 0.5, "g": 0.2, "c": 0.5},
    "rectified": {"E": 0.1, "B": 0.6, "D_l": 0.5, "beta": 0.7},
    "m4": {"E": 0.05, "E0": 0.9, "a": 0.6, "b": 0.4, "c": -0.6},
    "bnsl": {"a": 0.05, "b": 0.5, "c0": 0.1, "c1": 0.4, "d1": 1.0, "f1": 0.4},
}


def make_problem(name: str, y: np.ndarray, loss: str | Loss = "least_squares_log", x: np.ndarray = X) -> Problem:
    form, loss = FORMS[name], make_loss(loss)
    lower = np.array([np.log(p.lower) if p.kind == "log" else p.lower for p in form.params])
    upper = np.array([np.log(p.upper) if p.kind == "log" else p.upper for p in form.params])
    return Problem(form, {"x": x}, np.log(y) if loss.is_log else y, loss, lower, upper)


def noisy(name: str, seed: int = 0, size: float = 0.03) -> np.ndarray:
    form = FORMS[name]
    y = form.evaluate({"x": X}, form.coordinates(TRUTH[name]))
    return y * np.exp(size * np.random.default_rng(seed).standard_normal(len(X)))


def test_losses_by_hand() -> None:
    r = np.array([0.05, -0.3, 0.1])
    huber, square = Loss("huber", "log", 0.1), Loss("least_squares", "log")
    assert huber.rho(r) == pytest.approx([0.00125, 0.1 * (0.3 - 0.05), 0.005])
    assert huber.psi(r) == pytest.approx([0.05, -0.1, 0.1])
    assert huber.curvature(r).tolist() == [1, 0, 1]
    assert huber.majorant(r) == pytest.approx([1, 1 / 3, 1])
    assert square.rho(r) == pytest.approx([0.00125, 0.045, 0.005])
    assert square.psi(r) == pytest.approx(r)
    assert LOSSES["huber_log"].delta == 1e-3 and LOSSES["least_squares"].space == "linear"


@pytest.mark.parametrize(
    ("options", "words"),
    [(("hubr",), "kind 'hubr'"), (("huber", "logs"), "space 'logs'"), (("huber", "log", 0.0), "above 0, got 0.0")],
)
def test_wrong_losses_are_refused(options: tuple, words: str) -> None:
    with pytest.raises(LawError, match=words):
        Loss(*options)
    with pytest.raises(LawError, match="did you mean 'huber_log'"):
        make_loss("hubr_log")


def test_a_weighted_mean_by_hand() -> None:
    """With c held at 0 the power law is a constant: b is the weighted geometric mean, or the weighted mean."""
    y, weights = np.array([1.0, 2.0, 8.0]), np.array([[1.0, 1.0, 2.0]])
    for loss, expected in (("least_squares_log", 2**1.75), ("least_squares", 19 / 4)):
        problem = make_problem("power", y, loss, x=np.array([1.0, 2.0, 3.0]))
        problem.lower[1] = problem.upper[1] = 0.0
        theta, objective = minimise(problem, np.array([[0.0, 0.0]]), weights)
        assert np.exp(theta[0, 0]) == pytest.approx(expected, rel=1e-6)
        logs = np.log(y / expected) if loss == "least_squares_log" else y - expected
        assert objective[0] == pytest.approx(0.5 * float(weights[0] @ logs**2), rel=1e-9)


def test_a_weighted_median_by_hand() -> None:
    """Huber with a small δ finds the weighted median: 2 of (1, 2, 8) with weights 1, 3, 1."""
    problem = make_problem("power", np.array([1.0, 2.0, 8.0]), Loss("huber", "log", 1e-6), x=np.array([1.0, 2.0, 3.0]))
    problem.lower[1] = problem.upper[1] = 0.0
    weights = np.array([1.0, 3.0, 1.0])
    theta, _ = minimise(problem, np.array([[1.5, 0.0]]), weights[None])
    assert np.exp(theta[0, 0]) == pytest.approx(2.0, rel=1e-4)
    assert np.exp(polish(problem, np.array([1.5, 0.0]), weights)[0][0]) == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("loss", ["least_squares_log", "least_squares", Loss("huber", "log", 0.02)])
@pytest.mark.parametrize("name", TRUTH)
def test_both_solvers_reach_what_scipy_reaches(name: str, loss: str | Loss) -> None:
    """scipy alone, with differences for derivatives and its own Huber loss, from the same start."""
    y = noisy(name)
    problem, weights = make_problem(name, y, loss), np.ones(len(X))
    start = problem.form.coordinates(TRUTH[name])
    kind = {"loss": "huber", "f_scale": problem.loss.delta} if problem.loss.kind == "huber" else {}

    def residual(theta: np.ndarray) -> np.ndarray:
        r = problem.residual(theta[None])[0]
        return np.where(np.isfinite(r), r, 1e3)

    peer = least_squares(residual, start, "3-point", (problem.lower, problem.upper), x_scale="jac", xtol=1e-13,
                         ftol=1e-13, gtol=1e-13, **kind)  # fmt: skip
    _, batched = minimise(problem, start[None], weights[None])
    _, polished, converged = polish(problem, start, weights)
    assert converged
    for objective in (batched[0], polished):
        assert objective <= peer.cost * (1 + 1e-5)
    assert polished == pytest.approx(peer.cost, rel=1e-3)


def test_weights_count_alike_in_both_solvers_and_act_like_copies() -> None:
    y, copies = noisy("power_plus", 3), np.arange(len(X)) % 3 + 1
    start = FORMS["power_plus"].coordinates(TRUTH["power_plus"])
    for loss in ("least_squares_log", Loss("huber", "log", 0.02)):
        weighted = make_problem("power_plus", y, loss)
        copied = make_problem("power_plus", np.repeat(y, copies), loss, x=np.repeat(X, copies))
        batched = minimise(weighted, start[None], copies[None].astype(float), tolerance=1e-13)[1][0]
        alone = polish(weighted, start, copies.astype(float))
        assert batched == pytest.approx(alone[1], rel=1e-6)
        np.testing.assert_allclose(alone[0], polish(copied, start, np.ones(copies.sum()))[0], atol=1e-5)


def test_every_row_of_a_batch_is_solved_as_if_it_were_alone() -> None:
    problem = make_problem("m4", noisy("m4"))
    rng = np.random.default_rng(0)
    weights, targets = rng.exponential(size=(5, len(X))), problem.target + 0.02 * rng.standard_normal((5, len(X)))
    starts = np.tile(problem.form.coordinates(TRUTH["m4"]), (5, 1))
    theta, objective = minimise(problem, starts, weights, targets=targets)
    for k in range(5):
        alone = minimise(problem, starts[:1], weights[k : k + 1], targets=targets[k : k + 1])
        np.testing.assert_allclose(theta[k], alone[0][0], rtol=1e-7, atol=1e-9)
        own = Problem(problem.form, problem.x, targets[k], problem.loss, problem.lower, problem.upper)
        assert objective[k] == pytest.approx(own.objective(theta[k][None], weights[k][None])[0])
    assert len({round(o, 9) for o in objective}) == 5


def test_the_box_holds_and_its_edge_is_met_exactly() -> None:
    y = 0.3 * X**-0.5  # the offset's best value is 0, its bound
    problem = make_problem("power_plus", y * np.exp(0.01 * np.cos(np.arange(len(X)))))
    start = np.array([0.01, np.log(0.2), -0.4])
    theta, objective, _ = polish(problem, minimise(problem, start[None], np.ones((1, len(X))))[0][0], np.ones(len(X)))
    assert theta[0] == 0.0
    problem.lower[2] = -0.3
    held, more, _ = polish(problem, start, np.ones(len(X)))
    assert held[2] == -0.3 and more > objective
    capped = make_problem("power_plus", noisy("power_plus"))  # E = .1 in truth
    capped.upper[0] = 0.05
    assert polish(capped, np.array([0.02, np.log(0.3), -0.5]), np.ones(len(X)))[0][0] == 0.05


def test_a_start_outside_the_domain_stays_where_it_is() -> None:
    form = FORMS["m4"]
    theta = form.coordinates({"E": 0.5, "E0": 0.2, "a": 1.0, "b": 1.0, "c": -1.0})  # E0 below E
    problem = make_problem("m4", noisy("m4"))
    found, objective = minimise(problem, theta[None], np.ones((1, len(X))))
    np.testing.assert_array_equal(found[0], theta)
    assert objective[0] == np.inf
    assert polish(problem, theta, np.ones(len(X)))[1:] == (np.inf, False)


def test_steps_and_tolerance_bound_the_work() -> None:
    problem = make_problem("bnsl", noisy("bnsl"))
    start = problem.form.coordinates({**TRUTH["bnsl"], "d1": 20.0, "c1": 0.1})[None]
    few, many = (minimise(problem, start, np.ones((1, len(X))), max_steps=n)[1][0] for n in (2, 200))
    loose = minimise(problem, start, np.ones((1, len(X))), tolerance=0.9)[1][0]
    assert many < few and many < loose


@pytest.mark.parametrize(("status", "converged"), [(0, False), (1, True), (4, True)])
def test_a_search_that_ran_out_of_steps_has_not_converged(
    monkeypatch: pytest.MonkeyPatch, status: int, converged: bool
) -> None:
    """scipy's status 0 says that max_nfev was reached."""

    def ended(*args, **options):
        found = least_squares(*args, **options)
        found.status = status
        return found

    monkeypatch.setattr("scipy.optimize.least_squares", ended)
    problem = make_problem("power_plus", noisy("power_plus"))
    theta = FORMS["power_plus"].coordinates(TRUTH["power_plus"])
    assert polish(problem, theta, np.ones(len(X)))[2] is converged
