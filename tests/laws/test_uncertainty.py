"""How sure a fit is: resamples by hand, closed forms of weighted lines, profiles at bounds, and what intervals cover."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from dbscale.laws import LawError, Loss, bootstrap, fit_law, parameter_intervals, premise, profile_interval
from dbscale.laws.uncertainty import Bootstrap, Resampling, central_quantile, refit, restarts, says_nothing

X = np.geomspace(1e3, 1e6, 20)
TRUTH = {"E": 0.1, "b": 8.0, "c": -0.4}
LINE_X, LINE_Y = np.exp([0.0, 1, 2, 3, 4]), np.exp([2.0, 1.3, 1.1, 0.2, 0.1])


def noisy(seed: int, size: float = 0.03) -> np.ndarray:
    return (0.1 + 8 * X**-0.4) * np.exp(size * np.random.default_rng(seed).standard_normal(len(X)))


def line(weights: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intercept and slope [B] of weighted lines of `logs` [B, n] over log x, in closed form."""
    x = np.log(LINE_X)
    total = weights.sum(axis=1)
    mean_x, mean_y = weights @ x / total, (weights * logs).sum(axis=1) / total
    slope = (weights * (x - mean_x[:, None]) * logs).sum(axis=1) / (weights * (x - mean_x[:, None]) ** 2).sum(axis=1)
    return mean_y - slope * mean_x, slope


def params_of(drawn: Bootstrap) -> np.ndarray:
    """[B, p] in the table's units."""
    return drawn.fit.to_params(drawn.theta)


# Resamples.


def test_weights_have_the_moments_of_a_bootstrap() -> None:
    """Mean, variance and skewness 1 for clusters; products of two such inside."""
    how = Resampling(40_000, clusters=np.array(["a", "a", "b"]), within=np.array([0, 1, 0]), seed=1)
    outer = Resampling(40_000, clusters=how.clusters, seed=1).weights(3)
    assert outer[:, 0].mean() == pytest.approx(1, abs=0.02) and outer[:, 0].var() == pytest.approx(1, abs=0.03)
    assert stats.skew(outer[:, 0]) == pytest.approx(1, abs=0.05)
    assert outer.min() > 0 and outer.max() < 4
    both = how.weights(3)
    inner = both / outer
    assert np.mean(both**2, axis=0) == pytest.approx(4, rel=0.06)
    assert np.corrcoef(inner.T)[np.triu_indices(3, 1)] == pytest.approx(0, abs=0.02)


def test_rows_of_a_cluster_are_drawn_together_and_those_within_apart() -> None:
    how = Resampling(20, clusters=np.array(["a", "a", "a", "b"]), within=np.array(["s", "s", "t", "s"]))
    w = how.weights(4)
    np.testing.assert_array_equal(w[:, 0], w[:, 1])
    assert np.all(w[:, 0] != w[:, 2]) and np.all(w[:, 0] != w[:, 3])
    alone = Resampling(20).weights(4)
    assert len(np.unique(alone)) == 80
    assert how.num_clusters(4) == 2 and Resampling(20).num_clusters(4) == 4


def test_arms_are_paired_by_their_labels_whatever_else_they_hold() -> None:
    one = Resampling(10, clusters=np.array(["h1|1000|0", "h1|4000|0"]), seed=5).weights(2)
    two = Resampling(10, clusters=np.array(["h1|4000|0", "h2|4000|0", "h1|1000|0"]), seed=5).weights(3)
    np.testing.assert_array_equal(one, two[:, [2, 0]])
    other = Resampling(10, clusters=np.array(["h1|1000|0", "h1|4000|0"]), seed=6).weights(2)
    assert np.all(one != other)


def test_every_resample_is_the_weighted_fit_by_hand() -> None:
    own = np.array([1.0, 2.0, 1.0, 3.0, 1.0])
    fit = fit_law("power", LINE_X, LINE_Y, weights=own, loss="least_squares_log")
    drawn = bootstrap(
        fit, Resampling(num_resamples=7, clusters=["a", "b", "b", "c", "d"], within=[0, 0, 1, 0, 0], seed=2)
    )
    how = Resampling(7, np.array(["a", "b", "b", "c", "d"]), np.array([0, 0, 1, 0, 0]), None, 2)
    intercept, slope = line(how.weights(5) * own, np.tile(np.log(LINE_Y), (7, 1)))
    np.testing.assert_allclose(params_of(drawn), np.stack([np.exp(intercept), slope], axis=1), rtol=1e-5)
    assert drawn.num_clusters == 4


def test_the_test_sets_noise_is_redrawn_in_units_of_y() -> None:
    """All rows in one cluster leave the test set alone: log b of a constant law spreads by √Σ(stderr/y)²/n."""
    y, stderr = np.array([2.0, 2.0, 4.0, 4.0]), np.array([0.1, 0.1, 0.4, 0.0])
    fit = fit_law("power", [1.0, 2, 3, 4], y, fixed={"c": 0.0}, loss="least_squares_log")
    drawn = bootstrap(fit, Resampling(num_resamples=4000, clusters=["a"] * 4, stderr=stderr))
    expected = np.sqrt(0.05**2 + 0.05**2 + 0.1**2) / 4
    assert np.log(params_of(drawn)[:, 0]).std() == pytest.approx(expected, rel=0.04)
    assert np.log(params_of(drawn)[:, 0]).mean() == pytest.approx(np.log(np.sqrt(8)), abs=0.003)
    linear = fit_law("power", [1.0, 2, 3, 4], y, fixed={"c": 0.0}, loss="least_squares")
    plain = params_of(bootstrap(linear, Resampling(num_resamples=4000, clusters=["a"] * 4, stderr=stderr)))[:, 0]
    assert plain.std() == pytest.approx(np.sqrt(0.1**2 + 0.1**2 + 0.4**2) / 4, rel=0.04)
    assert params_of(bootstrap(fit, Resampling(num_resamples=50, clusters=["a"] * 4)))[:, 0].std() < 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": ["a"]}, r"clusters has shape \(1,\), the table 5 rows"),
        ({"within": ["a"] * 4}, "within has shape"),
        ({"stderr": [-0.1] * 5}, "stderr must not be negative"),
        ({"num_resamples": 0}, "at least 1, got 0"),
    ],
)
def test_wrong_columns_are_refused(options: dict, words: str) -> None:
    fit = fit_law("power", LINE_X, LINE_Y, loss="least_squares_log")
    with pytest.raises(LawError, match=words):
        bootstrap(fit, Resampling(**options))


def test_batched_refits_equal_single_fits() -> None:
    fit = fit_law("power_plus", X, noisy(2), loss="least_squares_log")
    weights, others = Resampling(3, seed=3).weights(len(X)), np.array([noisy(7), noisy(8), noisy(9)])
    targets = np.log(others / fit.units["y"])
    for theta, w, y in zip(refit(fit, weights, targets), weights, others, strict=True):
        alone = fit_law("power_plus", X, y, loss="least_squares_log", weights=w)
        assert fit.to_params(theta[None])[0] == pytest.approx(list(alone.params.values()), rel=1e-3)
    assert refit(fit, np.empty((0, len(X)))).shape == (0, 3)


# Intervals.


def test_percentiles_are_widened_as_the_formula_says() -> None:
    """Three draws of a constant law, two clusters left: √(4/3)·t(3)/z times the distance from the estimate."""
    fit = fit_law("power", [1.0, 2, 3, 4], np.exp([0.9, 1.1, 1.0, 1.0]), fixed={"c": 0.0}, loss="least_squares_log")
    logs = np.array([0.8, 1.0, 1.3])
    drawn = Bootstrap(fit, np.stack([logs - np.log(fit.units["y"]), np.zeros(3)], axis=1), num_clusters=4)
    wider = np.sqrt(4 / 3) * stats.t.ppf(0.75, 3) / stats.norm.ppf(0.75)
    low, high = 1 + wider * (np.quantile(logs, [0.25, 0.75]) - 1)
    assert drawn.interval(0.5) == {"b": pytest.approx((np.exp(low), np.exp(high)), rel=1e-6), "c": (0.0, 0.0)}


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_curvature_and_profile_of_a_line_are_students_interval(level: float) -> None:
    """For a law that is linear in its coordinates all roads lead to slope ± t·stderr."""
    for weights in (np.ones(5), np.array([1.0, 3.0, 2.0, 2.0, 5.0])):
        fit = fit_law("power", LINE_X, LINE_Y, weights=weights, loss="least_squares_log")
        reach = stats.t.ppf(0.5 + level / 2, 3) * fit.stderr["c"]
        expected = (fit.params["c"] - reach, fit.params["c"] + reach)
        assert parameter_intervals(fit, level)["c"] == pytest.approx(expected, rel=1e-5)
        assert profile_interval(fit, "c", level) == pytest.approx(expected, rel=2e-3)


def test_amplitudes_have_intervals_in_logarithms() -> None:
    fit = fit_law("power", LINE_X, LINE_Y, loss="least_squares_log")
    low, high = parameter_intervals(fit)["b"]
    reach = stats.t.ppf(0.95, 3) * fit.stderr["b"] / fit.params["b"]
    assert (low, high) == pytest.approx((fit.params["b"] * np.exp(-reach), fit.params["b"] * np.exp(reach)), rel=1e-5)
    assert profile_interval(fit, "b") == pytest.approx((low, high), rel=5e-3)


def test_fixed_parameters_have_no_width_and_undetermined_ones_no_interval() -> None:
    d_p, d_f = (c.ravel() for c in np.meshgrid(np.geomspace(1e3, 1e6, 6), np.geomspace(1e2, 1e4, 5)))
    y = (0.1 + d_f**-0.4) * np.exp(0.01 * np.random.default_rng(0).standard_normal(len(d_p)))
    x = {"upstream_samples": d_p, "downstream_samples": d_f}
    fit = fit_law("additive", x, y, fixed={"C": 1.0, "A": 0.0}, loss="least_squares_log")
    assert "alpha" in fit.undetermined
    for found in (parameter_intervals(fit), bootstrap(fit, Resampling(num_resamples=40)).interval()):
        assert found["C"] == (1.0, 1.0) and found["A"] == (0.0, 0.0) and found["alpha"] is None
        assert found["gamma"] is not None and found["gamma"][0] < 0.4 < found["gamma"][1]
    with pytest.raises(LawError, match="fixed; there is nothing to profile"):
        profile_interval(fit, "C")
    with pytest.raises(LawError, match="did you mean 'gamma'"):
        profile_interval(fit, "gama")


@pytest.fixture(scope="module")
def gap_fit():
    """A table with no gap whose noise leaves room for one: as small and as noisy as those of real studies."""
    d_p, d_f = (c.ravel() for c in np.meshgrid(np.geomspace(500, 5e4, 5), np.geomspace(100, 1e4, 3)))
    y = 3 * d_p**-0.12 * d_f**-0.15 * np.exp(0.06 * np.random.default_rng(0).standard_normal(len(d_p)))
    return fit_law("transfer_gap", {"upstream_samples": d_p, "downstream_samples": d_f}, y, loss="least_squares_log")


def test_a_gap_at_its_bound_has_the_profiles_interval(gap_fit) -> None:
    """Percentiles would say [0, 0]. The end is where the objective, all else fitted anew, has risen by t²/degrees."""
    assert "G" in gap_fit.at_bound
    low, high = profile_interval(gap_fit, "G")
    assert low == 0 and high == pytest.approx(0.508, abs=0.01)
    held = fit_law("transfer_gap", gap_fit.x, gap_fit.y, fixed={"G": high}, loss="least_squares_log")
    rise = gap_fit.degrees * (held.objective / gap_fit.objective - 1)
    assert rise == pytest.approx(stats.t.ppf(0.95, gap_fit.degrees) ** 2, rel=0.01)
    assert parameter_intervals(gap_fit)["G"] == (low, high)
    assert bootstrap(gap_fit, Resampling(num_resamples=60)).interval()["G"] == (low, high)
    assert profile_interval(gap_fit, "G", 0.5)[1] < high
    assert bootstrap(gap_fit, Resampling(60)).interval(0.5)["G"] == profile_interval(gap_fit, "G", 0.5)
    assert parameter_intervals(gap_fit, 0.5)["G"] == profile_interval(gap_fit, "G", 0.5)


def test_a_term_that_vanished_comes_back_in_resamples_that_show_it(gap_fit) -> None:
    """At its floor the logarithm of an amplitude has no slope: refits start once more with the term regrown."""
    place = gap_fit.form.param_names.index("G")
    drawn = params_of(bootstrap(gap_fit, Resampling(60)))[:, place]
    assert gap_fit.params["G"] == 0 and 0.05 < np.mean(drawn > 0.01) < 0.95
    for start, grown in zip(restarts(gap_fit), (False, True), strict=True):
        assert (start[place] > gap_fit.lower[place] + 1) is np.bool_(grown)
        np.testing.assert_array_equal(np.delete(start, place), np.delete(gap_fit.theta, place))
    assert len(restarts(fit_law("power_plus", X, noisy(2)))) == 1


def test_intervals_end_where_the_law_does() -> None:
    """E of a curve that nearly reaches 0 is .004 ± more than that: the interval begins at 0, the law's bound."""
    fit = fit_law("power_plus", X, noisy(3, 0.1) - 0.096, loss="least_squares_log")
    half = stats.t.ppf(0.95, fit.degrees) * fit.stderr["E"]
    assert fit.at_bound == () and fit.params["E"] - half < 0
    assert parameter_intervals(fit)["E"] == (0.0, pytest.approx(fit.params["E"] + half))


def test_resamples_pressed_against_a_bound_call_for_the_profile(gap_fit) -> None:
    """Not the estimate but a tenth of the draws lies on the bound: percentiles are no guide there either."""
    fit = fit_law("power_plus", X, 0.004 + noisy(3, 0.1) - 0.1, loss="least_squares_log")
    drawn = bootstrap(fit, Resampling(num_resamples=200))
    at_zero = np.mean(params_of(drawn)[:, 0] <= 1e-9)
    assert fit.at_bound == () and at_zero > 0.05
    assert drawn.interval()["E"] == profile_interval(fit, "E")
    assert drawn.interval()["E"][0] == 0


def test_an_exponent_at_its_upper_bound_keeps_its_lower_end() -> None:
    """The truth, 2.5, lies beyond the law's 2: the interval ends there, and says something all the same."""
    d_p, d_f = (c.ravel() for c in np.meshgrid(np.geomspace(1e3, 1e5, 6), np.geomspace(1e2, 1e4, 5)))
    y = (0.1 + 3e6 * d_p**-2.5 + d_f**-0.4) * np.exp(0.02 * np.random.default_rng(0).standard_normal(30))
    fit = fit_law("additive", {"upstream_samples": d_p, "downstream_samples": d_f}, y, loss="least_squares_log")
    ends = parameter_intervals(fit)["alpha"]
    assert "alpha" in fit.at_bound and ends is not None and 0 < ends[0] < ends[1] == 2.0


@pytest.mark.parametrize(
    ("ends", "is_log", "box", "empty"),
    [
        ((0.0, np.inf), True, (1.0, np.inf), True),
        ((1.0, 1.3e6), True, (1.0, np.inf), True),
        ((1.0, 1.1e6), True, (1.0, np.inf), False),
        ((0.0, 0.5), True, (1.0, np.inf), False),
        ((0.0, 1.1e6), True, (1.0, np.inf), False),
        ((0.0, 1.3e6), True, (1.0, np.inf), True),
        ((0.0, 1.3e6), True, (2.0, np.inf), False),
        ((0.0, 2.0), False, (0.0, 2.0), True),
        ((0.0, 1.9), False, (0.0, 2.0), False),
        ((-np.inf, 1.0), False, (-np.inf, np.inf), False),
    ],
)
def test_an_interval_as_wide_as_the_law_says_nothing(ends: tuple, is_log: bool, box: tuple, empty: bool) -> None:
    """A factor of e^14 = 1.2 million, above the estimate where the amplitude may vanish, or the whole box [0, 2]."""
    assert says_nothing(ends, is_log=is_log, box=box) is empty


def test_huber_profiles_resemble_huber_curvature() -> None:
    x = np.geomspace(1, 1e3, 80)
    y = 3 * x**-0.4 * np.exp(0.05 * np.random.default_rng(0).standard_t(4, 80))
    fit = fit_law("power", x, y, loss=Loss("huber", "log", 0.05))
    curved, profiled = parameter_intervals(fit)["c"], profile_interval(fit, "c")
    assert curved is not None
    assert profiled[1] - profiled[0] == pytest.approx(curved[1] - curved[0], rel=0.2)
    assert sum(profiled) / 2 == pytest.approx(fit.params["c"], abs=0.1 * (profiled[1] - profiled[0]))


def test_the_central_quantile_is_students_of_at_least_one_degree() -> None:
    """t(.95): 6.314 with one degree, 2.920 with two; 1.645 of the normal."""
    assert [central_quantile(0.9, df) for df in (0.2, 1.0, 2.0)] == pytest.approx([6.3138, 6.3138, 2.9200], rel=1e-4)
    assert central_quantile(0.9) == pytest.approx(1.6449, rel=1e-4)


# The premise of Theorem 1.

PLAIN = {"E": (0.05, 0.04, 0.06), "b": (4.0, 3.0, 5.0), "c": (-0.3, -0.35, -0.28)}


def resampled(changes: dict, law: str = "power_plus", undetermined: str = ""):
    """What `premise` asks of a Bootstrap, with these values and intervals."""
    found = PLAIN | changes
    held = fit_law(law, X, noisy(0), fixed={n: found[n][0] for n in found}, loss="least_squares_log")
    intervals = {n: None if n == undetermined else ends[1:] for n, ends in found.items()}
    return SimpleNamespace(fit=held, interval=lambda level: intervals)


def test_the_premise_by_hand() -> None:
    """.08 [.06, .09] less .05 [.04, .06]: .03 − √(.02² + .01²) to .03 + √(.01² + .01²), and so on."""
    found = premise(
        resampled({}), resampled({"E": (0.08, 0.06, 0.09), "b": (6.0, 4.0, 9.0), "c": (-0.5, -0.6, -0.45)}), level=0.8
    )
    assert found.floor == pytest.approx((0.03, 0.03 - np.hypot(0.02, 0.01), 0.03 + np.hypot(0.01, 0.01)))
    # exponents .5 [.45, .6] and .3 [.28, .35]
    assert found.exponent == pytest.approx((0.2, 0.2 - np.hypot(0.05, 0.05), 0.2 + np.hypot(0.1, 0.02)))
    logs = np.log([6 / 4, 5 / 4, 9 / 6, 4 / 3])
    assert found.log_factor == pytest.approx(
        (logs[0], logs[0] - np.hypot(logs[2], logs[1]), logs[0] + np.hypot(logs[2], logs[3]))
    )
    assert (found.verdict, found.level) == ("holds", 0.8)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"E": (0.08, 0.079, 0.081), "c": (-0.5, -0.5, -0.5)}, "holds"),
        ({"E": (0.08, 0.079, 0.081), "b": (9.0, 8.5, 9.5)}, "holds"),
        ({"E": (0.08, 0.079, 0.081)}, "not determined"),  # exponents and factors are equal
        ({"E": (0.055, 0.045, 0.065), "c": (-0.5, -0.5, -0.5)}, "not determined"),
        ({"E": (0.03, 0.025, 0.035), "c": (-0.5, -0.5, -0.5)}, "fails"),
        ({"E": (0.08, 0.079, 0.081), "b": (2.0, 1.9, 2.1), "c": (-0.2, -0.2, -0.2)}, "fails"),
        ({"E": (0.08, 0.079, 0.081), "b": (2.0, 1.9, 2.1), "c": (-0.31, -0.35, -0.28)}, "not determined"),
        ({"E": (0.0, 0.0, 0.001)}, "fails"),
    ],
)
def test_the_premise_needs_a_higher_floor_and_a_steeper_or_larger_term(changes: dict, verdict: str) -> None:
    assert premise(resampled({}), resampled(changes)).verdict == verdict


def test_what_is_not_determined_leaves_the_premise_open() -> None:
    better = {"E": (0.08, 0.079, 0.081), "c": (-0.5, -0.5, -0.5)}
    open_floor = premise(resampled({}), resampled(better, undetermined="E"))
    assert open_floor.verdict == "not determined" and open_floor.floor[1:] == (-np.inf, np.inf)
    vanished = premise(resampled({"b": (4.0, 0.0, 5.0)}), resampled(better))
    assert (
        vanished.log_factor[1] == pytest.approx(-np.hypot(np.log(4 / 3), np.log(5 / 4)))
        and vanished.log_factor[2] == np.inf
    )
    assert vanished.verdict == "holds"


def test_the_premise_of_fits_with_resamples() -> None:
    """Floors .05 and .1, exponents .3 and .6, noise of 1 %: it holds; the arms changed over it fails."""
    rng = np.random.default_rng(0)
    x = np.geomspace(1e2, 1e6, 60)
    arms = [
        bootstrap(
            fit_law("power_plus", x, y * np.exp(0.01 * rng.standard_normal(60)), loss="least_squares_log"),
            Resampling(100),
        )
        for y in (0.05 + 2 * x**-0.3, 0.1 + 9 * x**-0.6)
    ]
    held = premise(*arms)
    assert (
        held.verdict == "holds" and held.floor[1] < 0.05 < held.floor[2] and held.exponent[1] < 0.3 < held.exponent[2]
    )
    assert premise(*arms[::-1]).verdict == "fails" and premise(*arms, level=0.5).floor[1] > held.floor[1]
    d_p, d_f = (c.ravel() for c in np.meshgrid(np.geomspace(1e3, 1e6, 5), np.geomspace(1e2, 1e4, 4)))
    pair = {"upstream_samples": d_p, "downstream_samples": d_f}
    law = bootstrap(
        fit_law("additive", pair, 0.05 + 3 * d_p**-0.3 + d_f**-0.4, loss="least_squares_log"), Resampling(5)
    )
    same = premise(law, law)
    assert same.exponent[0] == 0 and same.verdict == "not determined"


def test_the_premise_is_asked_of_one_law_with_a_floor() -> None:
    power = bootstrap(fit_law("power", X, noisy(0)), Resampling(2))
    with pytest.raises(LawError, match="power has no floor"):
        premise(power, power)
    with pytest.raises(LawError, match="fit one law to both arms"):
        premise(power, resampled({}))


# What they cover.


def coverage(num_draws: int, interval) -> dict[str, float]:
    """Share of draws whose interval holds the truth, per parameter."""
    hits = dict.fromkeys(TRUTH, 0)
    for seed in range(num_draws):
        for name, (low, high) in interval(fit_law("power_plus", X, noisy(seed), loss="least_squares_log")).items():
            hits[name] += low <= TRUTH[name] <= high
    return {name: n / num_draws for name, n in hits.items()}


INTERVALS = {
    "curvature": lambda fit: parameter_intervals(fit, 0.9),
    "bootstrap": lambda fit: bootstrap(fit, Resampling(num_resamples=200)).interval(0.9),
    "profile": lambda fit: {name: profile_interval(fit, name, 0.9) for name in TRUTH},
}


def test_estimates_are_unbiased_and_their_errors_those_of_repetitions() -> None:
    fits = [fit_law("power_plus", X, noisy(s), loss="least_squares_log") for s in range(60)]
    slopes, said = [f.params["c"] for f in fits], [f.stderr["c"] for f in fits]
    assert np.mean(slopes) == pytest.approx(-0.4, abs=3 * np.std(slopes) / np.sqrt(60))
    assert np.mean(said) == pytest.approx(np.std(slopes, ddof=1), rel=0.25)


def test_half_of_the_50_percent_intervals_hold_the_truth() -> None:
    """Two-sided: 80 draws of a nominal half lie within .35 and .65 (2.7 standard errors)."""
    shares = coverage(80, lambda fit: parameter_intervals(fit, 0.5))
    assert all(0.35 <= share <= 0.65 for share in shares.values()), shares


@pytest.mark.slow
@pytest.mark.parametrize("kind", INTERVALS)
def test_nominal_90_percent_intervals_cover_85_to_95(kind: str) -> None:
    for name, share in coverage(500, INTERVALS[kind]).items():
        assert 0.85 <= share <= 0.95, (kind, name, share)


def test_chinchilla_errors_are_near_those_published(chinchilla) -> None:
    published = {"A": 124.5, "E": 0.0257, "alpha": 0.0154, "beta": 0.0206}
    fit = fit_law("chinchilla", *chinchilla)
    resampled = params_of(bootstrap(fit, Resampling(600))).std(axis=0)
    drawn = dict(zip(fit.form.param_names, resampled, strict=True))
    for name, size in published.items():
        assert drawn[name] == pytest.approx(size, rel=0.12), name
        assert fit.stderr[name] == pytest.approx(size, rel=0.25), name


@pytest.mark.slow
def test_chinchillas_longest_tail_needs_4000_resamples(chinchilla) -> None:
    fit = fit_law("chinchilla", *chinchilla)
    drawn = params_of(bootstrap(fit, Resampling(4000)))[:, fit.form.param_names.index("B")]
    assert drawn.std() == pytest.approx(1293, rel=0.2)
