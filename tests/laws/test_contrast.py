"""Pairs, their pooling, intervals of means and the smooth curve: values worked out by hand, and fast coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dbscale.laws import LawError, NotEnoughData, Pairs, delta_curves, delta_points, make_pairs
from dbscale.laws.contrast import CORRELATIONS, _noises, image_variance, moderated_variances, seed_table

TWO = {"x": [1.0, 1.0, 1.0, 2.0, 2.0, 2.0], "delta": [0.1, 0.2, 0.3, -0.1, 0.0, 0.1], "seed": [0, 1, 2, 0, 1, 2]}


def table(values: np.ndarray, x: np.ndarray | None = None, **more) -> Pairs:
    """Pairs of one stratum from Δ by seed and x [n, K]."""
    n, k = values.shape
    at = np.geomspace(1e3, 1e3 * 2 ** (k - 1), k) if x is None else x
    return make_pairs(np.tile(at, n), values.ravel(), seed=np.repeat(np.arange(n), k), **more)


# Means and intervals.


def test_means_and_t_intervals_by_hand() -> None:
    first, second = delta_points(make_pairs(**TWO), level=0.9)
    assert (first.x, second.x) == (1.0, 2.0)
    assert (first.delta, second.delta) == pytest.approx((0.2, 0.0))
    assert first.by_seed == pytest.approx((0.1, 0.2, 0.3)) and first.num_seeds == 3
    # both sums of squares are .02 on 2 degrees of freedom: one variance .01 with all 4 degrees of the table
    assert first.degrees == 4 and first.stderr == pytest.approx((0.01 / 3) ** 0.5)
    half = 2.1318467863 * (0.01 / 3) ** 0.5  # t of 4 degrees at .95
    assert (first.low, first.high) == pytest.approx((0.2 - half, 0.2 + half))
    wide = stats.t.ppf(0.5 + 0.9**0.5 / 2, 4) * (0.01 / 3) ** 0.5  # Šidák over two x
    assert (second.low_all, second.high_all) == pytest.approx((-wide, wide))


def test_level_and_family_widen_the_intervals_they_should() -> None:
    pairs = make_pairs(**TWO)
    plain, higher, family = (
        delta_points(pairs, level=level, family=n)[0] for level, n in ((0.9, 1), (0.95, 1), (0.9, 3))
    )
    size = plain.stderr
    assert higher.high - higher.delta == pytest.approx(stats.t.ppf(0.975, 4) * size)
    assert (family.low, family.high) == (plain.low, plain.high)
    assert family.high_all - family.delta == pytest.approx(stats.t.ppf(0.5 + 0.9 ** (1 / 6) / 2, 4) * size)


def test_variances_are_moderated_by_hand() -> None:
    variance, degrees = moderated_variances(np.array([0.02, 0.18]), np.array([1, 2]))
    # pooled .2 / 3; four degrees of it beside the one and two of its own; the table has three in all
    assert variance == pytest.approx([(4 * 0.2 / 3 + 0.02) / 5, (4 * 0.2 / 3 + 0.18) / 6])
    assert degrees.tolist() == [3, 3]
    variance, degrees = moderated_variances(np.array([0.7, 1.4]), np.array([7, 7]))
    assert variance == pytest.approx([1.3 / 11, 2.0 / 11]) and degrees.tolist() == [11, 11]


def test_an_x_with_one_seed_borrows_the_spread_of_the_others() -> None:
    pairs = make_pairs([1, 1, 2], [0.1, 0.3, 0.5], seed=[0, 1, 0])
    first, second = delta_points(pairs)
    assert (second.delta, second.num_seeds, second.degrees) == (0.5, 1, 1)
    assert first.stderr**2 == pytest.approx(0.02 / 2)  # (4 · .02 + .02) / 5 = .02 for one seed
    assert second.stderr**2 == pytest.approx(0.02)


def test_test_variance_is_a_floor_under_the_mean() -> None:
    low = delta_points(make_pairs(**TWO, test_variance=[0.001] * 6))[0]
    high = delta_points(make_pairs(**TWO, test_variance=[0.02, 0.03, 0.04, 0, 0, 0]))
    assert low.stderr**2 == pytest.approx(0.01 / 3)
    assert high[0].stderr ** 2 == pytest.approx(0.09 / 9)  # the mean of three variances .03, over three seeds
    assert high[1].stderr ** 2 == pytest.approx(0.01 / 3)


def test_image_variance_by_hand() -> None:
    same = np.array([[1, 0, -1], [1, 0, -1]])
    assert image_variance(same) == pytest.approx(1 / 3)  # all of it is the images'
    assert image_variance(same[:1]) == pytest.approx(1 / 3)
    assert image_variance(np.array([[1, -1], [-1, 1]])) == 0  # none of it is
    mixed = np.array([[1, 0, 0, -1], [1, 0, -1, 0]])
    # means 1, 0, −½, −½ have variance ½; the rest ½² · 4 on 3 degrees gives 1/3, half of it in the means
    assert image_variance(mixed) == pytest.approx((1 / 2 - 1 / 6) / 4)


def test_samples_add_what_no_seed_averages_out() -> None:
    mixed = [np.array([1, 0, 0, -1]), np.array([1, 0, -1, 0])]
    samples = dict(enumerate([mixed[0], mixed[1], mixed[0], mixed[1]]))
    with_them, without = (
        delta_points(
            make_pairs([1, 1, 2, 2], [0.1, 0.3, 0.1, 0.3], seed=[0, 1, 0, 1], by_sample=each, test_variance=[0] * 4)
        )
        for each in (samples, None)
    )
    assert without[0].stderr ** 2 == pytest.approx(0.01)
    assert with_them[0].stderr ** 2 == pytest.approx(0.01 + 1 / 12)


def test_test_variance_comes_from_samples_where_it_is_not_given() -> None:
    pairs = make_pairs([1, 1], [0, 0], seed=[0, 1], by_sample={0: np.array([1, 0, 0, -1]), 1: np.array([1, 1, 1, 1])})
    assert pairs.test_variance == pytest.approx([0.5 / 4, 0])
    partly = make_pairs([1, 1], [0, 0], seed=[0, 1], by_sample={0: np.array([1, 0, 0, -1])})
    assert partly.by_sample is None and partly.test_variance == pytest.approx([0.5 / 4, 0])


# Pooling.


def strata() -> Pairs:
    """Two students at two x: at x = 2 student b lacks seed 1; a has two draws at x = 1, seed 0."""
    rows = [
        (1, 0, "a", 0, 0.1, 0.04), (1, 0, "a", 1, 0.3, 0.04), (1, 0, "b", 0, 0.4, 0.08), (1, 1, "a", 0, 0.3, 0.04),
        (1, 1, "b", 0, 0.1, 0.04), (2, 0, "a", 0, 0.0, 0.0), (2, 0, "b", 0, 0.4, 0.0), (2, 1, "a", 0, 0.9, 0.0),
    ]  # fmt: skip
    x, seed, student, draw, delta, variance = zip(*rows, strict=True)
    return make_pairs(x, delta, seed=seed, student=student, draw=draw, test_variance=variance)


def test_pooling_means_draws_then_strata_and_leaves_out_what_is_incomplete() -> None:
    pooled = strata().pooled()
    assert list(zip(pooled.x.tolist(), pooled.seed.tolist(), strict=True)) == [(1, 0), (1, 1), (2, 0)]
    assert pooled.delta == pytest.approx([0.3, 0.2, 0.2])  # ((.1 + .3)/2 + .4)/2, (.3 + .1)/2, (0 + .4)/2
    assert pooled.test_variance == pytest.approx([(0.02 + 0.08) / 4, 0.02, 0])  # as if test sets differed
    assert pooled.left_out == 1 and strata().left_out == 0
    points = delta_points(strata())
    assert [p.delta for p in points] == pytest.approx([0.25, 0.2]) and [p.num_seeds for p in points] == [2, 1]


def test_pooling_samples_as_it_pools_deltas() -> None:
    samples = {0: np.array([1, 0]), 1: np.array([1, 1]), 2: np.array([0, -1]), 3: np.array([1, 1])}
    pairs = make_pairs([1] * 4, [0.5, 1, -0.5, 1], seed=[0, 0, 1, 1], student=["a", "b", "a", "b"], by_sample=samples)
    pooled = pairs.pooled()
    assert pooled.by_sample is not None
    assert pooled.by_sample.tolist() == [[1, 0.5], [0.5, 0]]


def test_parts_of_the_pairs() -> None:
    pairs = make_pairs([1, 1, 1, 1], [1, 2, 3, 4], seed=[0] * 4, student=["a", "a", "b", "b"], labels=[10, 100, 10, 100],
                       by_sample={k: np.array([k, 0]) for k in range(4)})  # fmt: skip
    assert pairs.of("a").delta.tolist() == [1, 2] and pairs.of(labels=100).delta.tolist() == [2, 4]
    part = pairs.of("b", 10)
    assert part.delta.tolist() == [3] and part.by_sample is not None and part.by_sample[0].tolist() == [2, 0]
    with pytest.raises(LawError, match=r"no pair has student 'c'.*known: a, b"):
        pairs.of("c")
    with pytest.raises(LawError, match="no pair has labels 5: known: 10, 100"):
        pairs.of(labels=5)


def test_nothing_to_pool_names_the_stratum_that_is_missing() -> None:
    pairs = make_pairs([1, 1, 2], [0, 0, 0], seed=[0, 1, 0], student=["a", "a", "b"])
    with pytest.raises(NotEnoughData, match=r"all 2 strata.*student 'b'"):
        pairs.pooled()


# What is refused.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": [], "delta": [], "seed": []}, "no pairs: A and B were never measured at equal points"),
        ({"delta": [0.1]}, r"delta has shape \(1,\), x has 6 rows"),
        ({"seed": [0, 1]}, r"seed has shape \(2,\)"),
        ({"student": ["a"] * 5}, r"student has shape \(5,\)"),
        ({"x": [1, 1, 0, 2, 2, 2]}, "x is 0.0 in row 2; it must be finite and above 0"),
        ({"delta": [0.1, np.nan, 0.3, 0, 0, 0]}, "delta is nan in row 1; it must be finite"),
        ({"test_variance": [0, 0, 0, 0, 0, -1]}, "test_variance is -1.0 in row 5"),
        ({"seed": [0, 1, 2, 0, 1, 1]}, r"two rows have .* = \(0, 0, 2.0, 1, 0\)"),
        ({"by_sample": {0: np.ones(3), 1: np.ones(4)}}, "different numbers of test samples"),
    ],
)
def test_broken_pairs_are_refused(change: dict, words: str) -> None:
    with pytest.raises(LawError, match=words):
        make_pairs(**(TWO | change))


def test_one_seed_is_not_enough() -> None:
    with pytest.raises(NotEnoughData, match="every pair has seed 7: noise shows only between seeds"):
        delta_points(make_pairs([1, 2], [0, 0], seed=[7, 7]))
    with pytest.raises(NotEnoughData, match="no x has two seeds"):
        delta_points(make_pairs([1, 2], [0, 0], seed=[0, 1]))


# The smooth curve.


def test_with_little_noise_the_curve_goes_through_the_means() -> None:
    x = np.array([1e3, 2e3, 8e3, 1.6e4])
    values = np.array([0.05, 0.03, -0.01, -0.02]) + 1e-5 * np.array([[1], [-1]])
    curves = delta_curves(table(values, x))
    at = np.searchsorted(curves.grid, x)
    assert curves.grid[at].tolist() == x.tolist() and len(curves.grid) == 16 + 32 + 16 + 1
    assert curves.best[at] == pytest.approx(values.mean(axis=0), abs=5e-4)
    assert curves.drawn.shape == (1000, len(curves.grid)) and curves.drawn[:, at].std(axis=0).max() < 5e-4
    assert curves.drawn.std(axis=0).max() > 1e-3  # between measured x it does not pretend to know
    assert np.diff(np.log2(curves.grid)) == pytest.approx(1 / 16)
    narrow = delta_curves(table(values[:, :2], np.array([100.0, 110.0])), num_draws=1)
    assert len(narrow.grid) == 33


def test_every_argument_of_the_curve_counts() -> None:
    values = np.array([[0.05, 0.02, -0.01], [0.01, 0.03, -0.04]])
    plain = delta_curves(table(values), num_draws=50)
    assert np.array_equal(plain.drawn, delta_curves(table(values), num_draws=50).drawn)
    assert not np.array_equal(plain.drawn, delta_curves(table(values), num_draws=50, seed=1).drawn)
    assert len(delta_curves(table(values), num_draws=20).drawn) == 20
    wider = delta_curves(table(values), grid=np.array([500.0, 8000.0]))
    assert wider.grid.tolist() == [500, 8000] and wider.best.shape == (2,)
    noisy = delta_curves(table(values, test_variance=np.full(6, 0.05)), num_draws=1000)
    assert noisy.drawn.std(axis=0).mean() > 1.5 * delta_curves(table(values)).drawn.std(axis=0).mean()


def test_noise_that_a_seed_carries_along_x_moves_the_whole_curve() -> None:
    rng = np.random.default_rng(0)
    own = 0.02 * rng.standard_normal((6, 5))
    shared = (
        own.mean(axis=0) + np.repeat(0.02 * rng.standard_normal((6, 1)), 5, axis=1) + 0.1 * (own - own.mean(axis=0))
    )
    apart, together = (np.corrcoef(delta_curves(table(v)).drawn[:, [0, -1]].T)[0, 1] for v in (own, shared))
    assert together > 0.3 > apart


def test_the_seeds_deviations_weigh_their_correlation_along_x() -> None:
    """Two seeds, two x, sd 1 each: log weights are those of their difference / √2 under a normal law."""
    table = seed_table(make_pairs([1, 2, 1, 2], [0.7, 0.7, -0.7, -0.7], seed=[0, 0, 1, 1]))
    _, scores = _noises(table)
    unit = table.values[0] / table.variance**0.5 * 2**0.5
    laws = [stats.multivariate_normal(cov=[[1, r], [r, 1]]).logpdf(unit) for r in CORRELATIONS]
    assert np.diff(scores[: len(CORRELATIONS)]) == pytest.approx(np.diff(laws), rel=1e-5)
    assert np.ptp(scores.reshape(-1, len(CORRELATIONS)), axis=0).max() < 1e-12  # the same at every scale


# Coverage, on worlds with unequal variances and heavy tails.


def worlds(count: int, seeds: int, images: int = 0):
    """Pairs with truth 0: sd two to one along x, Student's t noise, a part of it shared by all x of a seed."""
    rng = np.random.default_rng(5)
    sd = 0.02 * np.array([1.0, 1.4, 1.2, 0.8, 0.6])
    for _ in range(count):
        noise = 0.5 * rng.standard_t(5, (seeds, 1)) + 0.8 * rng.standard_t(5, (seeds, 5))
        yield sd * noise


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    points = [delta_points(table(values)) for values in worlds(400, seeds=3)]
    single = np.mean([[p.low <= 0 <= p.high for p in each] for each in points])
    every = np.mean([all(p.low_all <= 0 <= p.high_all for p in each) for each in points])
    assert 0.87 <= single <= 0.95
    assert 0.86 <= every <= 0.97


def test_the_curve_holds_the_truth_as_often_as_it_says() -> None:
    inside = []
    for values in worlds(200, seeds=4):
        low, high = np.quantile(delta_curves(table(values), num_draws=200).drawn, [0.05, 0.95], axis=0)
        inside.append(np.mean((low <= 0) & (high >= 0)))
    assert 0.86 <= np.mean(inside) <= 0.97


def test_seeds_that_share_their_test_images_are_not_taken_for_more_images() -> None:
    rng, inside = np.random.default_rng(1), {True: [], False: []}
    for _ in range(200):
        image = rng.choice([-1, 0, 0, 0, 1], (1, 1, 60))
        samples = np.where(rng.random((4, 2, 60)) < 0.8, image, rng.choice([-1, 0, 1], (4, 2, 60)))
        for known in inside:
            by_sample = dict(enumerate(samples.reshape(8, 60))) if known else None
            points = delta_points(table(samples.mean(axis=2), by_sample=by_sample))
            inside[known] += [p.low <= 0 <= p.high for p in points]
    assert 0.86 <= np.mean(inside[True]) <= 0.96
    assert np.mean(inside[False]) < 0.7


@pytest.mark.parametrize(("count", "shortest"), [(4, 0.2), (7, 0.1), (3, 0.3)])
def test_the_curve_bends_no_shorter_than_six_tenths_of_a_step(count: int, shortest: float) -> None:
    """Without noise the best curve is the mean of Gaussian processes, weighed by how likely each makes the points."""
    t, at = np.linspace(0, 1, count), np.linspace(0, 1, 41)
    means = 0.1 * np.array([1.0, -0.5, 0.8, -0.2, 0.3, -0.7, 0.1])[:count]
    found = delta_curves(
        make_pairs(np.tile(1e3 * 64**t, 2), np.append(means + 1e-6, means - 1e-6), seed=np.repeat([0, 1], count)),
        grid=1e3 * 64**at,
        num_draws=1,
    )

    def kernel(a: np.ndarray, b: np.ndarray, length: float, bend: float) -> np.ndarray:
        smooth = np.exp(-0.5 * ((a[:, None] - b) / length) ** 2)
        return np.mean(means**2) * (4 + 4 * np.outer(a - 0.5, b - 0.5) + bend**2 * smooth)

    weights, curves = [], []
    for length in (0.1, 0.2, 0.4, 0.8):
        for bend in (0.1, 0.3, 1.0):
            own = kernel(t, t, max(length, shortest), bend) + 2e-10 * np.eye(count)
            weights.append(-0.5 * (np.linalg.slogdet(own)[1] + means @ np.linalg.solve(own, means)))
            curves.append(kernel(at, t, max(length, shortest), bend) @ np.linalg.solve(own, means))
    share = np.exp(np.array(weights) - max(weights))
    np.testing.assert_allclose(found.best, share @ np.array(curves) / share.sum(), atol=2e-3)
