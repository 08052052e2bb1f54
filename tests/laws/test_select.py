"""Selection: scores, weights and intervals by hand, nothing foretold from rows that were seen, draws from every source."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from dbscale.laws import LawError, NotEnoughData, fit_law, select_law
from dbscale.laws.select import (
    Calibration,
    Candidate,
    Origins,
    average_errors,
    average_weights,
    blend,
    in_sample_noise,
    lack_of_fit,
    level_shift,
    smooth_curves,
    trimmed_mean,
)
from dbscale.laws.uncertainty import Resampling, refit

X = np.geomspace(1e3, 1e6, 24)
SHORT = np.geomspace(1e3, 1e5, 12)
nan = np.nan


def bent(x: np.ndarray, seed: int = 0, size: float = 0.01) -> np.ndarray:
    return (0.2 + 30 * x**-0.6) * np.exp(size * np.random.default_rng(seed).standard_normal(len(x)))


# Rolling origins.


def test_origins_train_on_the_smaller_levels_of_one_variable_at_a_time() -> None:
    a = Origins.of(
        {"a": np.exp([1.0, 2, 3, 4, 5, 4]), "b": np.array([7.0, 7, 7, 8, 8, 8]), "c": np.exp([0.0, 1, 3, 0, 1, 3])}
    )
    # Five levels: shares .4 … .9 leave 2, 3 and 4 of them; two levels leave no origin, three leave one.
    assert a.axis.tolist() == [0, 0, 0, 2]
    assert a.masks.astype(int).tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 1],
        [1, 1, 0, 1, 1, 0],
    ]
    assert a.distance == pytest.approx(
        np.array([[0, 0, 1, 2, 3, 2], [0, 0, 0, 1, 2, 1], [0, 0, 0, 0, 1, 0], [0, 0, 2, 0, 0, 2]])
    )
    assert a.reach == pytest.approx(a.distance / np.array([[1], [2], [3], [1]]))  # over the logs that were trained on
    none = Origins.of({"a": np.array([1.0, 2, 2])})
    assert none.masks.shape == (0, 3) and none.axis.tolist() == []


def origins_at(distance: list, axis: list | None = None, reach: float = 1.0) -> Origins:
    """Origins whose rows lie at these distances; nan where a row is trained on."""
    d = np.array(distance)
    return Origins(np.array(axis or [0] * len(d)), np.isnan(d), np.nan_to_num(d), reach * np.nan_to_num(d))


def test_near_rows_and_their_root_mean_square_by_hand() -> None:
    """Rows within 1.5 count, else the nearest; each origin counts once: (mean(.01, .04) + .09)/2."""
    origins = origins_at([[nan, 0.5, 1.5, 2.0], [nan, nan, 1.8, 2.5], [nan, nan, nan, 0.7]])
    errors = np.array([[nan, 0.1, -0.2, 9.0], [nan, nan, 0.3, 9.0], [nan, nan, nan, nan]])
    assert origins.near(errors).astype(int).tolist() == [[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert origins.rms(errors) == pytest.approx(np.sqrt((0.025 + 0.09) / 2))
    assert np.isnan(origins.rms(np.full((3, 4), nan)))


def test_held_out_errors_are_of_laws_that_did_not_see_the_rows() -> None:
    y = bent(SHORT)
    spoiled = np.where(SHORT[7] < SHORT, 3 * y, y)
    clean, changed = (
        Origins.of({"x": SHORT}).errors(fit_law("power", SHORT, v, loss="least_squares_log")) for v in (y, spoiled)
    )
    masks = Origins.of({"x": SHORT}).masks
    for origin, mask in enumerate(masks):
        alone = fit_law("power", SHORT[mask], y[mask], loss="least_squares_log")
        last = np.flatnonzero(mask)[-2:]
        shift = np.mean(np.log(alone.predict(SHORT[last])) - np.log(y[last]))
        expected = np.log(alone.predict(SHORT[~mask])) - np.log(y[~mask]) - shift
        np.testing.assert_allclose(clean[origin, ~mask], expected, atol=2e-4)
        assert np.all(np.isnan(clean[origin, mask]))
    first = np.flatnonzero(~masks[0] & ~(SHORT[7] < SHORT))  # rows whose y is the same in both tables
    np.testing.assert_allclose(changed[0, first], clean[0, first], atol=2e-4)
    assert np.all(changed[0, 8:] < clean[0, 8:] - 1)


def test_origins_with_too_few_points_are_left_out() -> None:
    y = bent(SHORT)
    origins = Origins.of({"x": SHORT})
    errors = origins.errors(fit_law("m4", SHORT, y, loss="least_squares_log"))
    seen = origins.masks.sum(axis=1)
    assert [bool(np.isfinite(row).any()) for row in errors] == [n > 5 for n in seen.tolist()]


# Level, weights, scores.


def test_a_law_is_moved_to_the_level_of_the_datas_end() -> None:
    """The last two rows, by weight; rows that were not seen have none."""
    fit = fit_law("power", X[:5], bent(X[:5]), loss="least_squares_log")
    residuals = np.array([[0.5, 0.4, 0.3, 0.2, 0.1], [0.0, 0.0, 0.6, 0.2, nan]])
    weights = np.array([[1.0, 1, 1, 3, 1], [1, 1, 2, 6, 0]])
    assert level_shift(fit, residuals[:1], weights[:1]) == pytest.approx([(3 * 0.2 + 0.1) / 4])
    assert level_shift(fit, residuals[1:], weights[1:]) == pytest.approx([(2 * 0.6 + 6 * 0.2) / 8])
    long = fit_law("power", np.repeat(X, 2), np.repeat(bent(X), 2), loss="least_squares_log")
    r = np.arange(48.0)[None]  # 5 % of 48 rows are 3: the last two levels, four rows
    assert level_shift(long, r, np.ones((1, 48))) == pytest.approx([np.mean([44, 45, 46, 47])])


def test_the_end_that_a_law_is_moved_to_counts_rows_by_their_weight() -> None:
    """Of the first five points, which the first origin trains on, the last two weigh three and one."""
    x = np.geomspace(1, 1000, 12)
    y = x**-0.5 * np.exp(0.01 * np.cos(np.arange(12.0)))
    weights = np.tile([1.0, 3.0], 6)
    errors = Origins.of({"x": x}).errors(fit_law("power", x, y, weights=weights, loss="least_squares_log"))
    refit = fit_law("power", x[:5], y[:5], weights=weights[:5], loss="least_squares_log")
    residual = np.log(refit.predict(x)) - np.log(y)
    assert np.isnan(errors[0, :5]).all()
    assert errors[0, 5:] == pytest.approx(residual[5:] - (3 * residual[3] + residual[4]) / 4, abs=1e-6)


def test_laws_of_several_variables_have_no_end(grid, arms) -> None:
    fit = fit_law("additive", grid, arms["plain"], loss="least_squares_log")
    assert level_shift(fit, np.ones((2, 90)), np.ones((2, 90))).tolist() == [0, 0]


def test_noise_is_weighted_and_per_degree_of_freedom() -> None:
    fit = fit_law("power", X[:4], bent(X[:4]), weights=[1, 1, 2, 0], loss="least_squares_log")
    r, w = fit.residuals, np.array([1, 1, 2, 0]) / (4 / 3)
    assert in_sample_noise(fit) == pytest.approx(np.sqrt(w @ r**2 / 1), rel=1e-9)  # 3 rows of weight, 2 parameters


def test_shares_of_the_average_by_hand() -> None:
    """One and a half points a parameter, 1/rms²: with 8 points bnsl, which has 6 parameters, stays outside."""
    x = np.geomspace(1e3, 1e5, 8)
    y = bent(x, 3, 0.05)
    names = ("power", "power_plus", "saturating", "rectified", "m4", "bnsl")
    fits = [fit_law(name, x, y, loss="least_squares_log") for name in names]
    rms = np.array([np.sqrt(np.sum(f.residuals**2) / (8 - f.num_free)) for f in fits])
    share = rms**-2.0 * np.array([1, 1, 1, 1, 1, 0])
    np.testing.assert_allclose(average_weights(fits), share / share.sum(), rtol=1e-9)
    few = [fit_law(name, x[:5], y[:5], loss="least_squares_log") for name in ("rectified", "m4")]
    assert average_weights(few).tolist() == [1, 0]  # neither has 1.5 points a parameter: the smaller law


def test_the_middle_of_the_weight_counts() -> None:
    """Shares .15, .45, .3, .1 in the order 2, 1, 5, 90: of 1 stays .1, of 2 all, of 5 .05, of 90 nothing."""
    each = np.array([[2.0, -2.0], [1.0, -1.0], [5.0, -5.0], [90.0, -90.0]])
    by_hand = (0.1 * 1 + 0.15 * 2 + 0.05 * 5) / 0.3
    assert trimmed_mean(each, np.array([0.15, 0.45, 0.3, 0.1])) == pytest.approx([by_hand, -by_hand])
    assert trimmed_mean(each[:2], np.array([0.5, 0.5])) == pytest.approx([1.5, -1.5])
    assert trimmed_mean(each[:1], np.array([1.0])) == pytest.approx([2.0, -2.0])


def test_laws_are_blended_by_hand() -> None:
    """By weight at the data, alike from a whole range beyond on, halfway between at half of it."""
    each = np.array([[1.0] * 4, [2.0] * 4, [4.0] * 4, [90.0] * 4])
    weights, reach = np.array([0.4, 0.2, 0.4, 0.0]), np.array([0.0, 0.5, 1.0, 2.0])
    mean, spread = blend(each, weights, reach)
    near = (0.05 * 1 + 0.2 * 2 + 0.05 * 4) / 0.3
    far = (2 + 4) / 2
    assert mean == pytest.approx([near, (near + far) / 2, far, far])
    # shares .4, .2, .4, 0 of 1, 2, 4, 90: mean 2.4, variance 1.84; then equal ones; between 13, 9, 13, 5 of 40, mean 13.325
    between = np.average((each[:, 1] - 13.325) ** 2, weights=[13, 9, 13, 5]) ** 0.5
    assert spread == pytest.approx([1.84**0.5, between, each[:, 2].std(), each[:, 3].std()])


def test_held_out_errors_of_an_average_by_hand() -> None:
    """Near the data by weight, a whole range beyond the plain mean; where a law is missing the others share its weight."""
    origins = origins_at([[nan, 0.0, 1.0], [nan, nan, 0.0]])
    each = np.array(
        [[[nan, 0.1, 0.4], [nan, nan, 0.7]], [[nan, 0.3, 0.8], [nan, nan, nan]], [[nan, 9, 9], [nan, nan, 9]]]
    )
    error = average_errors(origins, each, np.array([0.55, 0.45, 0.0]))
    near = (0.2 * 0.1 + 0.1 * 0.3) / 0.3
    assert np.isnan(error[0, 0]) and error[0, 1:] == pytest.approx([near, 0.6])
    assert np.isnan(error[1, :2]).all() and error[1, 2] == pytest.approx(0.7)


# Calibration.


def test_calibration_by_hand() -> None:
    """Of each origin what exceeds the noise over what it reached, in squares: (.05² − .03²)/1² = .04², and
    (.05² − .03² + .13² − .03²)/(.5² + 1.2²); origins of one variable are averaged, and count for half."""
    origins = origins_at([[nan, 1.0, nan], [nan, 0.5, 1.2], [nan, nan, 2.0]], axis=[0, 0, 1])
    errors = np.array([[nan, -0.05, nan], [nan, 0.05, 0.13], [nan, nan, 0.01]])
    found = Calibration.make(0.03, origins, errors, 3, misfit=0.7)
    second = (0.05**2 + 0.13**2 - 2 * 0.03**2) / (0.5**2 + 1.2**2)
    assert (found.noise, found.misfit) == (0.03, 0.7)
    assert found.drift == pytest.approx([np.sqrt((0.04**2 + second) / 2), 0.0, 0.05])  # the last has no origin
    assert found.degrees.tolist() == [1, 1, np.inf]
    # Each of the first two against the other's drift, t of one degree: 6.31 × the drift
    half = [np.hypot(1.645 * 0.03, 6.314 * drift * d) for drift, d in ((second**0.5, 1.0), (0.04, 0.5), (0.04, 1.2))]
    inside = [half[0] >= 0.05, half[1] >= 0.05, half[2] >= 0.13]
    assert found.coverage == pytest.approx(np.mean(inside))
    level = found.half_width(np.array([[2.0], [1.0], [3.0]]), 0.8, spread=np.array([0.04]))
    z, t = stats.norm.ppf(0.9), stats.t.ppf(0.9, 1)
    by_hand = (z * 0.05) ** 2 + (2 * t * found.drift[0]) ** 2 + (3 * z * 0.05) ** 2
    assert level == pytest.approx(np.sqrt(by_hand), rel=1e-6)


def test_more_origins_are_more_degrees_of_freedom() -> None:
    """Six origins count for three; of two that differ each is judged by the other."""
    six = Calibration.make(0.0, origins_at([[1.0]] * 6), np.array([[0.1], [0.1], [0.1], [0.1], [0.1], [-0.1]]), 1)
    assert (six.drift.tolist(), six.degrees.tolist(), six.coverage) == ([pytest.approx(0.1)], [3.0], 1.0)
    apart = Calibration.make(0.0, origins_at([[1.0], [1.0]]), np.array([[0.1], [0.7]]), 1)
    assert apart.coverage == 0.5  # .1 lies within 6.31 × .7, .7 beyond 6.31 × .1


def test_calibration_without_origins() -> None:
    empty = Calibration.make(0.02, Origins.of({"x": np.array([1.0, 2.0])}), np.zeros((0, 2)), 1)
    assert empty.drift.tolist() == [0.05] and np.isnan(empty.coverage) and empty.misfit == 0
    assert empty.half_width(np.array([[1.0]]), 0.9) == pytest.approx(1.6449 * np.hypot(0.02, 0.05), rel=1e-4)
    one = Calibration.make(0.02, origins_at([[1.0]]), np.array([[0.001]]), 1)
    assert one.drift.tolist() == [0] and one.degrees.tolist() == [1] and np.isnan(one.coverage)  # it judges nothing
    for level in (0, 1, 90):
        with pytest.raises(LawError, match="between 0 and 1"):
            empty.half_width(np.array([[1.0]]), level)


def test_lack_of_fit_by_hand() -> None:
    """Four points measured twice: means .1, −.1, .1, −.1, spread ±.02. Pure .0008, between 2·.04/(4 − 2) = .04."""
    x = {"x": np.repeat([1.0, 2, 3, 4], 2)}
    r = np.repeat([0.1, -0.1, 0.1, -0.1], 2) + np.tile([0.02, -0.02], 4)
    assert lack_of_fit(x, r, 2) == pytest.approx(np.sqrt((0.04 - 0.0008) / 2))
    assert lack_of_fit(x, np.tile([0.2, -0.2], 4), 2) == 0
    assert lack_of_fit({"x": np.arange(8.0)}, r, 2) == 0
    assert lack_of_fit({"x": np.array([1.0, 1, 2, 2, 3, 4, 5])}, r[:7], 2) == 0  # two repeats are too few


def test_misfit_curves_are_smooth_and_of_size_one() -> None:
    grid = np.geomspace(1e3, 1e6, 50)
    drawn = smooth_curves({"x": grid}, {"x": grid}, 4000, np.random.default_rng(0))
    assert drawn.std(axis=0) == pytest.approx(1, abs=0.05) and drawn.mean(axis=0) == pytest.approx(0, abs=0.06)
    near, far = np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1], np.corrcoef(drawn[:, 0], drawn[:, -1])[0, 1]
    assert near == pytest.approx(np.exp(-((4 / 49) ** 2) / 2), abs=0.01) and abs(far) < 0.1
    two = smooth_curves({"a": grid, "b": grid[::-1]}, {"a": grid, "b": grid}, 4000, np.random.default_rng(1))
    assert two.std(axis=0) == pytest.approx(1, abs=0.05)


def test_one_laws_interval_is_its_calibrations() -> None:
    far = np.array([2e5, 8e5])
    found = select_law(SHORT, bent(SHORT), laws=["power"], num_resamples=5)
    origins = Origins.of({"x": SHORT})
    known = Calibration.make(in_sample_noise(found.best), origins, origins.errors(found.best), 1)
    half = known.half_width(np.log(far / 1e5)[None], 0.8)
    low, high = found.interval(far, 0.8)
    np.testing.assert_allclose([low, high], [found.predict(far) * np.exp(s * half) for s in (-1, 1)])
    linear = select_law(SHORT, bent(SHORT), laws=["power"], loss="least_squares", num_resamples=5)
    low, high = linear.interval(far)
    np.testing.assert_allclose((low + high) / 2, linear.predict(far))


def test_intervals_of_a_true_law_cover_two_sided() -> None:
    """Of 60 repetitions, new measurements half a step beyond: .90 nominal, between .82 and .99."""
    x, ahead = np.geomspace(1e3, 1e5, 10), np.array([1.4e5])
    rng, hits = np.random.default_rng(0), []
    for _ in range(60):
        y = 8 * np.append(x, ahead) ** -0.3 * np.exp(0.05 * rng.standard_normal(11))
        low, high = select_law(x, y[:10], laws=["power"], num_resamples=1).interval(ahead, 0.9)
        hits.append(low[0] <= y[10] <= high[0])
    assert 0.82 <= np.mean(hits) <= 0.99


# Selections.


@pytest.fixture(scope="module")
def curve():
    return select_law(SHORT, bent(SHORT, 1, 0.03), num_resamples=60)


def test_the_average_predicts_as_its_formula_says(curve) -> None:
    """Inside by weight; half of the range (log 100) beyond, in half of it all laws weigh alike."""
    inside, far = np.array([5e4]), np.array([1e5 * 100**0.5])
    shares = np.array([c.weight for c in curve.candidates])
    assert len(curve.candidates) == len(curve.members) == 6 and shares.sum() == pytest.approx(1)
    near, logs = (np.array([np.log(c.fit.predict(x)[0]) - c.shift for c in curve.candidates]) for x in (inside, far))
    assert np.log(curve.predict(inside)) == pytest.approx(trimmed_mean(near[:, None], shares))
    both = [trimmed_mean(logs[:, None], w)[0] for w in (shares, np.full(6, 1 / 6))]
    assert np.log(curve.predict(far)) == pytest.approx(np.mean(both))
    np.testing.assert_allclose(curve.predict({"x": far, "other": 0.0}), curve.predict(far))
    for c in curve.candidates:
        assert c.score == pytest.approx(np.sqrt(c.in_sample * c.held_out))
        assert c.shift == pytest.approx(np.mean(c.fit.residuals[-2:]))
    scores = [c.score for c in curve.candidates]
    assert scores == sorted(scores) and curve.best is curve.candidates[0].fit
    assert replace(curve.candidates[0], held_out=nan).score == pytest.approx(curve.candidates[0].in_sample)


def test_the_averages_interval_adds_the_disagreement_of_its_laws(curve) -> None:
    """Far out every law counts alike: the sd of the six predictions."""
    far = np.array([1e7])
    each = np.array([np.log(fit.predict(far)) - c.shift for c, fit in curve.members])
    half = curve.calibration.half_width(np.log(far / SHORT[-1])[None], 0.9, each.std(axis=0))
    low, high = curve.interval(far)
    np.testing.assert_allclose(np.log(high / low), 2 * half)
    assert np.log(np.divide(*curve.interval(far, 0.5)[::-1]))[0] < 2 * half[0]


@pytest.mark.parametrize("loss", ["least_squares_log", "least_squares"])
def test_nothing_is_foretold_above_the_ceiling(loss: str) -> None:
    """A flat curve whose last point happens to be high: laws that follow it rise without limit."""
    x, ahead = np.geomspace(40, 500, 8), np.array([300.0, 8000.0])
    y, laws = np.array([0.49, 0.51, 0.5, 0.5, 0.49, 0.51, 0.5, 0.56]), ["power_plus", "power"]
    free, held = (select_law(x, y, laws=laws, loss=loss, ceiling=top, num_resamples=20) for top in (None, 0.8))
    assert free.predict(ahead)[1] > 1e3 and free.interval(ahead)[1][1] > 1e3 and free.draws(ahead).max() > 1e3
    power = next(c for c in held.candidates if c.name == "power")
    assert power.fit is not None and 0.5 < power.fit.predict(ahead)[1] < 0.8
    if loss.endswith("log"):  # so far out the plain mean of both laws' logarithms, one of them at the ceiling
        mean = (power.fit.predict(ahead)[1] * np.exp(-power.shift) * 0.8) ** 0.5
    else:
        mean = (power.fit.predict(ahead)[1] - power.shift + 0.8) / 2
    assert held.predict(ahead) == pytest.approx([free.predict(ahead)[0], mean], rel=1e-6)
    assert held.interval(ahead)[1][1] == held.draws(ahead).max() == pytest.approx(0.8)
    missed = [max(c.held_out for c in found.candidates) for found in (free, held)]
    assert missed[1] < missed[0] and missed[1] < (np.log(0.8 / 0.49) if loss.endswith("log") else 0.31)


def test_a_linear_loss_averages_y_itself() -> None:
    found = select_law(SHORT, bent(SHORT), laws=["saturating", "rectified"], loss="least_squares", num_resamples=10)
    inside = np.array([3e4])
    each = np.array([fit.predict(inside) - c.shift for c, fit in found.members])
    np.testing.assert_allclose(found.predict(inside), trimmed_mean(each, found.weights))
    assert found.draws(inside).shape == (10, 1)


def test_draws_are_refits_moved_to_their_own_end() -> None:
    """One law inside the data, where nothing is foretold: row s is the fit to resample s."""
    y = bent(SHORT, 1, 0.03)
    clusters = np.arange(1, 13) // 2  # the last row is alone in its cluster
    found = select_law(SHORT, y, laws=["power"], clusters=clusters, num_resamples=9, seed=4)
    weights = Resampling(9, clusters=clusters, seed=4).weights(12)
    drawn = found.draws(SHORT)
    for s in range(9):
        alone = fit_law("power", SHORT, y, weights=weights[s], loss="least_squares_log")
        shift = np.average(alone.residuals[-2:], weights=weights[s][-2:])
        np.testing.assert_allclose(drawn[s], alone.predict(SHORT) * np.exp(-shift), rtol=2e-3)
    np.testing.assert_array_equal(drawn, found.draws(SHORT))
    other = select_law(SHORT, y, laws=["power"], clusters=clusters, num_resamples=9, seed=5)
    assert not np.allclose(other.draws(SHORT), drawn)


def test_laws_are_drawn_in_proportion_to_their_weight(curve) -> None:
    rows = [len(own) for own, _, _ in curve._drawn]
    assert rows == pytest.approx(60 * curve.weights, abs=1.5)
    assert sorted(np.concatenate([own for own, _, _ in curve._drawn]).tolist()) == list(range(60))


def test_stderr_and_clusters_reach_the_draws() -> None:
    y = bent(SHORT, 1, 0.03)
    options = {"laws": ["power"], "num_resamples": 200, "clusters": ["one"] * 12}
    still = select_law(SHORT, y, **options).draws(SHORT)
    moved = select_law(SHORT, y, **options, stderr=0.05 * y).draws(SHORT)
    assert np.ptp(still, axis=0).max() < 1e-6
    # The mean of the last two rows' noise, whatever the slope does: .05/√2 at least.
    assert np.log(moved).std(axis=0)[-2:].mean() == pytest.approx(0.05 / np.sqrt(2), rel=0.15)
    with pytest.raises(LawError, match="within has shape"):
        select_law(SHORT, y, laws=["power"], within=[1])


def test_curves_are_wider_beyond_the_data_as_rolling_origins_say(curve) -> None:
    far = SHORT[-1] * np.exp([0.0, 1.0, 3.0])
    drawn = np.log(curve.draws(far))
    assert np.all(np.diff(drawn.std(axis=0)) > 0)
    calm = replace(curve, calibration=replace(curve.calibration, drift=np.zeros(1)))
    added = drawn - np.log(calm.draws(far))
    quartile = curve.calibration.drift[0] * stats.t.ppf(0.75, curve.calibration.degrees[0])
    assert added[:, 0] == pytest.approx(0)
    assert np.median(np.abs(added), axis=0)[1:] == pytest.approx(quartile * np.array([1, 3]), rel=0.35)
    centre = np.log(calm.draws(far)).mean(axis=0)  # the drawn laws lie about the average, far from the data too
    assert np.log(curve.predict(far)) == pytest.approx(centre, abs=0.05)
    wild = replace(curve, calibration=replace(curve.calibration, drift=np.array([1e9])))
    assert np.log(wild.draws(far) / calm.draws(far)).max() == pytest.approx(20)
    low, high = curve.curve_interval(far, 0.5)
    np.testing.assert_allclose([low, high], np.quantile(curve.draws(far), [0.25, 0.75], axis=0))


def test_what_no_noise_explains_is_drawn_inside_the_data() -> None:
    x = np.repeat(SHORT, 3)
    wave = 8 * x**-0.3 * np.exp(0.1 * np.sin(2 * np.log(x)))
    y = wave * np.exp(0.01 * np.random.default_rng(0).standard_normal(36))
    found = select_law(x, y, laws=["power"], num_resamples=400)
    missed = np.log(found.predict(x) / wave)
    assert found.calibration.misfit == pytest.approx(np.sqrt(np.mean(missed**2) * 12 / 10), rel=0.05)
    low, high = found.curve_interval(SHORT)
    truth = wave[::3]
    assert np.mean((low <= truth) & (truth <= high)) > 0.8
    assert np.median(np.log(high / low)) == pytest.approx(2 * 1.645 * found.calibration.misfit, rel=0.3)


def test_paired_arms_use_the_same_resample() -> None:
    y = bent(SHORT, 1, 0.03)
    labels = [f"h1|{n:.0f}|0" for n in SHORT]
    plain = select_law(SHORT, y, laws=["power"], clusters=labels, num_resamples=50)
    twin = select_law(SHORT, 0.9 * y, laws=["power"], clusters=labels, num_resamples=50)
    np.testing.assert_allclose(twin.draws(SHORT) / plain.draws(SHORT), 0.9, rtol=1e-5)
    apart = select_law(SHORT, 0.9 * y, laws=["power"], clusters=labels, num_resamples=50, seed=1)
    assert np.std(apart.draws(SHORT) / plain.draws(SHORT)) > 1e-3


def test_held_out_rows_are_foretold_by_laws_that_never_saw_them(grid, arms) -> None:
    y = arms["plain"]
    found = select_law(grid, y, laws=["additive", "product"], num_resamples=5)
    last = grid["upstream_samples"] == 2.56e5
    less = select_law({n: c[~last] for n, c in grid.items()}, y[~last], laws=["additive", "product"])
    predicted, measured = found.held_out()
    np.testing.assert_array_equal(measured, y[last])
    np.testing.assert_allclose(predicted, less.predict({n: c[last] for n, c in grid.items()}))
    few = select_law(SHORT[:5], bent(SHORT[:5]), laws=["saturating", "m4"])
    tiny = select_law(SHORT[:3], bent(SHORT[:3]), laws=["saturating"])
    assert np.isfinite(few.held_out()[0]).all() and np.isnan(tiny.held_out()[0]).all()


def test_weights_reach_fit_score_and_held_out(grid, arms) -> None:
    y, w = arms["plain"], np.where(grid["upstream_samples"] > 5e4, 10.0, 1.0)
    plain, heavy = (select_law(grid, y, laws=["product"], weights=v, num_resamples=5) for v in (None, w))
    assert heavy.best.params == fit_law("product", grid, y, weights=w, loss="least_squares_log").params
    assert heavy.candidates[0].in_sample != pytest.approx(plain.candidates[0].in_sample, rel=1e-3)
    assert heavy.held_out()[0].tolist() != plain.held_out()[0].tolist()


def test_a_curved_table_does_not_get_a_plain_power_law() -> None:
    chosen = select_law(X[:18], bent(X[:18]), num_resamples=5)
    assert chosen.best.name in ("power_plus", "m4", "bnsl", "rectified")
    assert chosen.candidates[-1].name == "power"
    low, high = chosen.interval(X[18:], 0.9)
    truth = 0.2 + 30 * X[18:] ** -0.6
    assert np.all((low <= truth) & (truth <= high)) and np.log(high / low).max() < 0.6


def test_grids_choose_among_the_laws_of_their_columns(grid, arms) -> None:
    chosen = select_law(grid, arms["plain"], num_resamples=5, ceiling=1.0)
    assert {c.name for c in chosen.candidates} == {"additive", "product", "m4_product", "transfer_gap"}
    assert chosen.best.name == "additive" and chosen.columns == tuple(grid)
    assert all(np.isfinite(c.held_out) for c in chosen.candidates)
    assert chosen.measured()["num_params"] == (2.5e6, 3.8e7)
    outside = {n: np.array([c.max(), c.max() * (2 if n == "num_params" else 1)]) for n, c in grid.items()}
    assert chosen.extrapolated(outside) == ("num_params",)
    assert chosen.extrapolated({n: c / 2 for n, c in grid.items()}) == tuple(grid)
    assert chosen.extrapolated(grid) == ()
    one = grid["num_params"] == 1e7
    fewer = select_law({n: c[one] for n, c in grid.items()}, arms["plain"][one], num_resamples=5)
    assert fewer.columns == ("upstream_samples", "downstream_samples") and "transfer_gap" in {
        c.name for c in fewer.candidates
    }
    assert fewer.predict(grid).shape == (90,)
    with pytest.raises(LawError, match="columns num_params are missing"):
        chosen.predict({n: grid[n] for n in ("upstream_samples", "downstream_samples")})


def test_columns_may_come_in_any_order_and_by_any_of_their_names(grid, arms) -> None:
    named = {"df": grid["downstream_samples"], "M": grid["num_params"], "D_p": grid["upstream_samples"]}
    own, same = (select_law(x, arms["plain"], laws=["additive"], num_resamples=5) for x in (named, grid))
    assert own.columns == ("D_p", "M", "df") and own.measured()["M"] == (2.5e6, 3.8e7)
    np.testing.assert_allclose(own.predict(named), same.predict(grid))
    np.testing.assert_allclose(own.draws(named), same.draws(grid))
    np.testing.assert_allclose(own.held_out()[0], same.held_out()[0])
    assert own.extrapolated({"df": 1e9, "M": 1e7, "D_p": 1e4}) == ("df",)


def test_laws_over_other_columns_are_no_candidates() -> None:
    rng = np.random.default_rng(0)
    x = {"num_params": np.exp(rng.normal(15, 1, 30)), "num_samples": np.exp(rng.normal(12, 2, 30))}
    x["unique_samples"] = x["num_samples"] / rng.choice([1, 2, 4], 30)
    y = 0.5 + 40 * x["num_params"] ** -0.3 + 20 * x["num_samples"] ** -0.3
    found = select_law(x, y, laws=["chinchilla", "data_constrained"], num_resamples=5)
    assert found.columns == ("num_params", "num_samples") and found.best.name == "chinchilla"
    assert found.candidates[1].reason == "not over num_params, num_samples as chinchilla is"


def test_one_varying_column_gets_the_laws_of_one_variable(grid, arms) -> None:
    own = (grid["num_params"] == 1e7) & (grid["downstream_samples"] == 300)
    found = select_law({n: c[own] for n, c in grid.items()}, arms["plain"][own], num_resamples=5)
    assert found.columns == ("upstream_samples",) and "saturating" in {c.name for c in found.candidates}
    at = {"upstream_samples": np.array([1e4, 1e5]), "num_params": 1e7, "downstream_samples": 300.0}
    assert found.predict(at).shape == (2,) and found.draws(at).shape == (5, 2)


def test_limits_of_a_law_reach_it() -> None:
    y = bent(SHORT)
    held = select_law(
        SHORT, y, laws=["power", "power_plus"], bounds={"power_plus": {"E": (0.3, None)}}, num_resamples=5
    )
    by_name = {c.name: c.fit for c in held.candidates}
    assert by_name["power_plus"].params["E"] >= 0.3
    capped = select_law(SHORT, y, laws=["m4"], ceiling=float(y.max()), num_resamples=5)
    assert capped.best.params["E0"] <= y.max() * (1 + 1e-12)


def test_not_enough_data_is_an_answer_per_law_and_in_all() -> None:
    y = 0.1 + 8 * X[:4] ** -0.4
    chosen = select_law(X[:4], y, laws=["power", "bnsl"], num_resamples=5)
    lost = next(c for c in chosen.candidates if c.name == "bnsl")
    assert "6 free parameters, the table 4 distinct points" in lost.reason and lost == Candidate(
        "bnsl", None, reason=lost.reason
    )
    with pytest.raises(NotEnoughData, match="distinct points"):
        select_law(X[:2], y[:2], laws=["power_plus", "bnsl"])
    with pytest.raises(LawError, match="no law has the columns"):
        select_law({"a": X, "b": X}, X)
    with pytest.raises(LawError, match="did you mean 'power_plus'"):
        select_law(X, X, laws=["powerplus"])
    with pytest.raises(LawError, match="not a finite number"):
        select_law(X, np.where(X > 1e5, nan, 1.0))


def test_reports_and_json_hold_every_law(curve) -> None:
    text, data = curve.report(), json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert all(c.name in text for c in curve.candidates) and curve.best.form.equation in text
    assert [c["name"] for c in data["candidates"]] == [c.name for c in curve.candidates]
    assert sum(c["weight"] for c in data["candidates"]) == pytest.approx(1)
    assert data["candidates"][0]["fit"]["form"] == curve.best.name and data["columns"] == ["x"]
    assert data["noise"] == curve.calibration.noise and data["coverage"] == curve.calibration.coverage
    short = select_law(X[:4], bent(X[:4]), laws=["power", "bnsl"], num_resamples=5)
    assert short.to_dict()["candidates"][-1]["fit"] is None and "distinct points" in short.report()


def test_a_lone_column_may_come_as_an_array(curve) -> None:
    selection = curve
    at = np.array([3.0, 30.0])
    assert selection.predict(at).tolist() == selection.predict({selection.columns[0]: at}).tolist()


def test_the_best_laws_parameters_are_resampled_with_the_table(curve) -> None:
    weights = Resampling(60).weights(12)
    np.testing.assert_allclose(curve.bootstrap.theta, refit(curve.best, weights))
    assert set(curve.bootstrap.interval()) == set(curve.best.params)
