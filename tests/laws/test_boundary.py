"""The boundary: known crossings found, none invented, and the answer said in words."""

from __future__ import annotations

import numpy as np
import pytest

from dbscale.laws import (
    Boundary,
    LawError,
    PairedDelta,
    bootstrap,
    boundaries_by_group,
    boundary_surface,
    find_boundary,
)
from dbscale.laws import fit_law as fit

AT = {"num_params": 1e7, "downstream_samples": 1000.0}
LEVELS = np.geomspace(1e3, 2.56e5, 7)
TRUE_ROOT = (6 / 2.2) ** 10  # where 6·D^-.35 = 2.2·D^-.25


@pytest.fixture(scope="module")
def fits(grid, arms):
    return {arm: fit("additive", grid, y, loss="least_squares_log") for arm, y in arms.items()}


def world(seed: int, truth, *, seeds: int = 3, images: int = 10_000, seed_noise: float = 0.004) -> PairedDelta:
    """Paired ΔE with seed noise and the test set's: a tenth of the images are judged differently by the arms."""
    rng = np.random.default_rng(seed)
    d_p = np.repeat(LEVELS, seeds)
    size = np.sqrt(0.1 / images)
    noise = rng.normal(0, size, len(d_p)) + rng.normal(0, seed_noise, len(d_p))
    return PairedDelta(d_p, truth(d_p) + noise, np.full(len(d_p), size), np.tile(np.arange(seeds), len(LEVELS)))


def falling(root: float, slope: float = 0.03):
    return lambda d: -slope * np.log10(d / root)


@pytest.mark.parametrize("paired", [False, True])
def test_laws_find_the_crossing(fits, paired: bool) -> None:
    arms = [bootstrap(f, num_resamples=200) for f in fits.values()] if paired else list(fits.values())
    found = find_boundary(*arms, at=AT)
    assert found.status == "crossing" and found.direction == "positive_to_negative"
    assert found.root is not None and found.interval is not None
    assert abs(np.log2(found.root / TRUE_ROOT)) < 0.5
    assert found.interval[0] < TRUE_ROOT < found.interval[1]


def test_a_crossing_beyond_the_range_is_called_extrapolated(fits) -> None:
    found = find_boundary(fits["plain"], fits["distilled"], at=AT, measured_range=(1e3, 8e3))
    assert found.status == "extrapolated" and found.root is not None and found.root > 8e3
    assert any("extrapolation" in words for words in found.diagnostics)


def test_equal_arms_have_no_crossing(fits) -> None:
    found = find_boundary(fits["plain"], fits["plain"], at=AT)
    assert found.status == "no_crossing" and found.root is None and found.diagnostics


def test_a_missing_variable_is_named(fits) -> None:
    with pytest.raises(LawError, match="downstream_samples"):
        find_boundary(fits["plain"], fits["distilled"], at={"num_params": 1e7})
    with pytest.raises(LawError, match="both arms"):
        find_boundary(fits["plain"])


@pytest.mark.parametrize("method", ["gaussian_process", "isotonic"])
def test_pairs_find_the_crossing_without_a_law(method: str) -> None:
    found = find_boundary(world(1, falling(1e4)), method=method, num_draws=200)
    assert found.status == "crossing"
    assert found.root is not None and found.interval is not None
    assert abs(np.log2(found.root / 1e4)) < 1
    assert found.interval[0] < found.root < found.interval[1]
    assert Boundary.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        (lambda d: 0.04 + 0 * d, "undertrained"),
        (lambda d: -0.04 + 0 * d, "never pays"),
        (lambda d: 0 * d, "noise"),
        (lambda d: 0.03 * np.log10(d / 1e4), "reverse"),
    ],
)
def test_failure_signs_become_words(truth, words: str) -> None:
    found = find_boundary(world(2, truth), num_draws=200)
    assert found.status == "no_crossing" and found.root is None
    assert words in " ".join(found.diagnostics)


def test_arms_that_become_equal_do_not_cross() -> None:
    found = [find_boundary(world(seed, lambda d: 0.03 * (d / 1e3) ** -1.0), num_draws=200) for seed in range(20)]
    assert [each.status for each in found].count("no_crossing") >= 18
    assert any("become equal" in words for each in found for words in each.diagnostics)


def test_too_few_levels_or_broken_rows_are_refused() -> None:
    with pytest.raises(LawError, match="at least 3"):
        PairedDelta(np.array([1e3, 1e4]), np.array([0.1, -0.1]))
    with pytest.raises(LawError, match="finite"):
        PairedDelta(LEVELS, np.full(7, np.nan))


def test_each_group_has_its_own_boundary_or_its_reason() -> None:
    one, other = world(3, falling(4e3)), world(4, falling(6e4))
    d_p = np.concatenate([one.upstream_samples, other.upstream_samples, [1e3]])
    delta = np.concatenate([one.delta, other.delta, [0.1]])
    groups = ["small"] * 21 + ["large"] * 21 + ["alone"]
    found, refused = boundaries_by_group(d_p, delta, groups, num_draws=200)
    small, large = found["small"].root, found["large"].root
    assert small is not None and large is not None and small < large
    assert "at least 3" in refused["alone"]


def test_the_surface_has_a_boundary_for_every_size_and_downstream_set(fits) -> None:
    surface = boundary_surface(
        fits["plain"], fits["distilled"], num_params=[2.5e6, 1e7], downstream_samples=[300.0, 3000.0], num_draws=100
    )
    assert [tuple(b.at.values()) for b in surface] == [(m, f) for m in (2.5e6, 1e7) for f in (300.0, 3000.0)]


def bending(root: float, slope: float, bend: float):
    return lambda d: -slope * (np.log10(d / root) + bend * np.log10(d / root) ** 2 / 2)


def simulate(count: int) -> dict[str, float]:
    """Many worlds with a crossing (anywhere inside the middle of the range) and many without."""
    errors, covered, found_none = [], [], []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        root = np.exp(rng.uniform(np.log(3e3), np.log(8e4)))
        slope, bend = rng.uniform(0.025, 0.05), rng.uniform(0, 0.3)
        curve = bending(root, slope, bend)
        found = find_boundary(world(seed, curve), num_draws=300)
        if found.root is not None and found.interval is not None:
            errors.append(abs(np.log2(found.root / root)))
            covered.append(found.interval[0] <= root <= found.interval[1])
        kind, level = seed % 3, rng.uniform(0.01, 0.04)
        shapes = (lambda d, v=level: v + 0 * d, lambda d, v=level: v * (d / 1e3) ** -0.3, lambda d: 0 * d)
        found_none.append(find_boundary(world(10_000 + seed, shapes[kind]), num_draws=300).status == "no_crossing")
    return {
        "found": len(errors) / count,
        "median_error": float(np.median(errors)),
        "coverage": float(np.mean(covered)),
        "none_reported": float(np.mean(found_none)),
    }


def test_simulated_worlds_in_small() -> None:
    figures = simulate(6)
    assert figures["median_error"] <= 0.4
    assert figures["coverage"] >= 0.7
    assert figures["none_reported"] >= 0.8


@pytest.mark.slow
def test_simulated_worlds_in_earnest() -> None:
    figures = simulate(600)  # the standard error of the coverage is 0.01
    assert figures["median_error"] <= 0.25
    assert 0.85 <= figures["coverage"] <= 0.95
    assert figures["none_reported"] >= 0.95
