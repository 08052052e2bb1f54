"""Errors of parameters and predictions: bootstrap, curvature, profile, rolling origins, and what they cover."""

from __future__ import annotations

import numpy as np
import pytest

from dbscale.laws import LawError, bootstrap, error_weights, fit_law, profile_interval, seed_spread
from dbscale.laws.resample import refit, resample_counts
from dbscale.laws.rolling import rolling_origin

X = np.geomspace(1e3, 1e6, 20)
TRUTH = {"E": 0.1, "b": 8.0, "c": -0.4}


def noisy(seed: int, size: float = 0.03) -> np.ndarray:
    return (0.1 + 8 * X**-0.4) * np.exp(size * np.random.default_rng(seed).standard_normal(len(X)))


def coverage(num_draws: int, interval) -> dict[str, float]:
    """Share of draws whose interval holds the truth, per parameter."""
    hits = {name: 0 for name in TRUTH}
    for seed in range(num_draws):
        for name, (low, high) in interval(fit_law("power_plus", X, noisy(seed), loss="least_squares_log")).items():
            hits[name] += low <= TRUTH[name] <= high
    return {name: n / num_draws for name, n in hits.items()}


INTERVALS = {
    "curvature": lambda fit: fit.parameter_interval(0.9),
    "bootstrap": lambda fit: bootstrap(fit, num_resamples=300).interval(0.9),
    "profile": lambda fit: {name: profile_interval(fit, name, 0.9) for name in TRUTH},
}


def test_intervals_cover_in_a_few_draws() -> None:
    assert min(coverage(20, INTERVALS["curvature"]).values()) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("kind", INTERVALS)
def test_nominal_90_percent_intervals_cover_85_to_95(kind: str) -> None:
    for name, share in coverage(500, INTERVALS[kind]).items():
        assert 0.85 <= share <= 0.95, (kind, name, share)


def test_three_roads_to_an_interval_agree() -> None:
    fit = fit_law("power_plus", X, noisy(1), loss="least_squares_log")
    curvature, resampled = fit.parameter_interval(0.9), bootstrap(fit, num_resamples=150).interval(0.9)
    for name in TRUTH:
        widths = [b - a for a, b in (curvature[name], resampled[name], profile_interval(fit, name, 0.9))]
        assert max(widths) < 2.5 * min(widths), (name, widths)


def test_huber_errors_resemble_the_bootstraps(chinchilla) -> None:
    fit = fit_law("chinchilla", *chinchilla)
    resampled = bootstrap(fit, num_resamples=200).stderr
    for name, size in fit.stderr.items():
        assert 0.5 < size / resampled[name] < 2, name


@pytest.mark.slow
def test_chinchilla_bootstrap_errors(chinchilla) -> None:
    published = {"A": 124.5, "B": 1293, "E": 0.0257, "alpha": 0.0154, "beta": 0.0206}
    assert bootstrap(fit_law("chinchilla", *chinchilla), num_resamples=4000).stderr == pytest.approx(published, rel=0.1)


def test_clusters_are_drawn_together_and_alike_for_both_arms() -> None:
    labels = np.repeat(["a", "b", "c", "d"], 3)
    counts = resample_counts(labels, 50, seed=1)
    assert np.all(counts.reshape(50, 4, 3) == counts.reshape(50, 4, 3)[:, :, :1])
    assert np.all(counts.sum(axis=1) == 12)
    np.testing.assert_array_equal(counts, resample_counts(labels, 50, seed=1))


def test_batched_refits_equal_single_fits() -> None:
    fit = fit_law("power_plus", X, noisy(2), loss="least_squares_log")
    counts = resample_counts(len(X), 5, seed=3)
    for theta, weights in zip(refit(fit, counts), counts, strict=True):
        alone = fit_law("power_plus", X, noisy(2), loss="least_squares_log", weights=weights)
        assert fit.to_params(theta) == pytest.approx(alone.params, rel=1e-3)


def test_a_term_that_vanished_may_come_back_in_a_resample() -> None:
    """At its floor the logarithm of G has no slope; intervals of no width would follow."""
    d_p, d_f = (c.ravel() for c in np.meshgrid(np.geomspace(1e3, 1e6, 6), np.geomspace(1e2, 1e4, 5)))
    x = {"upstream_samples": d_p, "downstream_samples": d_f}
    y = 8 * d_p**-0.4 * d_f**-0.3 * np.exp(0.05 * np.random.default_rng(2).standard_normal(len(d_p)))
    fit = fit_law("transfer_gap", x, y, loss="least_squares_log")
    assert "G" in fit.at_bound
    resampled, profiled = bootstrap(fit, num_resamples=100).interval()["G"], profile_interval(fit, "G")
    assert resampled[0] < 1e-6 and 1e-4 < resampled[1] < 0.05
    assert profiled[0] < 1e-6 and 1e-4 < profiled[1] < 0.05


def test_resampled_targets_are_fitted_each() -> None:
    fit = fit_law("power_plus", X, noisy(2), loss="least_squares_log")
    others = np.array([noisy(7), noisy(8)])
    for theta, y in zip(refit(fit, np.ones((2, len(X))), np.log(others)), others, strict=True):
        alone = fit_law("power_plus", X, y, loss="least_squares_log")
        assert fit.to_params(theta) == pytest.approx(alone.params, rel=1e-3)


def test_the_hierarchy_adds_spread_at_every_level() -> None:
    x, y = np.repeat(X, 2), np.repeat(0.1 + 8 * X**-0.4, 2) * np.tile([1.05, 0.95], len(X))
    fit = fit_law("power_plus", x, y, loss="least_squares_log")
    cells, seeds = np.repeat(np.arange(len(X)), 2), np.tile([0, 1], len(X))
    whole_cells = bootstrap(fit, num_resamples=100, clusters=cells)
    with_seeds = bootstrap(fit, num_resamples=100, clusters=cells, within=seeds)
    with_tests = bootstrap(fit, num_resamples=100, clusters=cells, within=seeds, target_stderr=0.1 * y)
    spreads = [b.stderr["c"] for b in (whole_cells, with_seeds, with_tests)]
    assert spreads[0] < 0.5 * spreads[1] < 0.5 * spreads[2]


def test_rolling_origins_never_see_what_they_predict() -> None:
    y = noisy(3)
    spoiled = np.where(X[15] < X, 5 * y, y)
    clean, changed = (rolling_origin(fit_law("power", X, v, loss="least_squares_log")) for v in (y, spoiled))
    first = 0  # trains on the smallest 40 %
    seen_before = slice(8, 15)
    np.testing.assert_allclose(clean.error[first, seen_before], changed.error[first, seen_before], atol=1e-3)
    assert np.all(np.isnan(clean.error[first, :8])) and np.all(clean.distance[:, 0] == 0)


def test_prediction_intervals_widen_with_distance_when_the_law_is_wrong() -> None:
    bent = 0.1 + 0.5 / (1 + X / 3e4)
    fit = fit_law("power", X, bent, loss="least_squares_log")
    far = np.array([2e6, 8e6])
    low, high = fit.interval(far, 0.9)
    mean_low, mean_high = fit.interval(far, 0.9, kind="mean")
    assert np.all(np.log(high / low) > np.log(mean_high / mean_low))
    assert np.log(high / low)[1] > np.log(high / low)[0]
    with pytest.raises(LawError, match="level"):
        fit.interval(far, 90)


def test_weights_follow_the_binomial_and_the_seeds() -> None:
    errors = np.array([0.5, 0.02, 0.5, 0.02])
    weights = error_weights(errors, 10_000, space="linear")
    assert weights[1] / weights[0] == pytest.approx(0.25 / (0.02 * 0.98), rel=0.02)
    spread = seed_spread([0.10, 0.12, 0.30, 0.36], ["a", "a", "b", "b"])
    assert spread / np.array([0.10, 0.12, 0.30, 0.36]) == pytest.approx(np.log(1.2) / np.sqrt(2), rel=1e-6)
    assert np.all(seed_spread([0.1, 0.2], ["a", "b"]) == 0)
