"""Where the money goes: the optimum against a closed form, the four cost cases, exchange rates and advice."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dbscale.laws import LawError, Prices, advise, allocate, effective_data_transferred, fit_law, transfer_gaps

CASES = ("free", "inference", "training", "training_and_inference")


@pytest.fixture(scope="module")
def fits(grid, arms):
    return {arm: fit_law("additive", grid, y, loss="least_squares_log") for arm, y in arms.items()}


def test_the_split_equals_the_closed_form() -> None:
    """For E = K·D_p^-α·D_f^-γ with linear prices the optimum spends in the ratio α : γ."""
    d_p, d_f = (c.ravel() for c in np.meshgrid(np.geomspace(1e3, 1e6, 6), np.geomspace(1e2, 1e5, 6)))
    y = 3.0 * d_p**-0.3 * d_f**-0.1
    law = fit_law("product", {"upstream_samples": d_p, "downstream_samples": d_f}, y, fixed={"E_inf": 0.0})
    advice = allocate({"plain": law}, Prices(upstream_image=0.01, downstream_label=1.0), 1000.0, at={"num_params": 1e7})
    assert advice.spend["upstream_images"] == pytest.approx(750, rel=0.02)
    assert advice.spend["downstream_labels"] == pytest.approx(250, rel=0.05)
    assert sum(advice.spend.values()) == pytest.approx(1000)
    rate = advice.exchange_rates["upstream_samples_per_downstream_sample"][0]
    assert rate == pytest.approx(100, rel=0.05)  # at the optimum, the ratio of the prices


def test_a_teacher_costs_ever_more_through_the_four_cases() -> None:
    totals = [
        Prices(train_flop=1e-15, teacher_params=5e6, teacher_case=case).total("distilled", 1e5, 2e7, 1e3)
        for case in CASES
    ]
    plain = Prices(train_flop=1e-15).total("plain", 1e5, 2e7, 1e3)
    assert totals[0] == plain
    assert totals == sorted(totals) and len(set(totals)) == 4
    forward = 2 * 5e6 * 197 * 1e5 * 1e-15
    assert totals[1] - plain == pytest.approx(forward) and totals[2] - plain == pytest.approx(3 * forward)


def test_a_dear_teacher_turns_the_advice(fits) -> None:
    def advice(case: str) -> str:
        prices = Prices(
            upstream_image=1e-3, downstream_label=0.05, train_flop=2e-14, teacher_params=3e8, teacher_case=case
        )
        return allocate(fits, prices, 40.0, limits={"num_params": (2.5e6, 3.8e7)}).arm

    assert advice("free") == "distilled" and advice("training_and_inference") == "plain"


def test_allocation_is_complete_and_serialisable(fits) -> None:
    advice = allocate(fits, Prices(upstream_image=1e-3, downstream_label=0.1, train_flop=1e-16), 500.0)
    low, high = advice.error_interval
    assert low <= advice.expected_error <= high
    assert 0 <= advice.arm_probability <= 1 and advice.other_arm is not None
    assert json.loads(advice.to_json())["schema"] == "dbscale.laws/allocation/1"
    with pytest.raises(LawError, match="smallest point"):
        allocate(fits, Prices(upstream_image=1.0), 1.0)
    with pytest.raises(LawError, match="'plain'"):
        allocate({"teacher": fits["plain"]}, Prices(), 1.0)
    with pytest.raises(LawError, match="did you mean 'inference'"):
        Prices(teacher_case="inferences")


@pytest.mark.parametrize(("d_p", "decision"), [(2e3, "distill"), (2.4e5, "plain")])
def test_advice_follows_the_boundary(fits, d_p: float, decision: str) -> None:
    advice = advise(fits, upstream_samples=d_p, downstream_samples=1000, num_params=1e7)
    assert advice.decision == decision
    assert advice.boundary_status == "crossing"
    side = "below" if decision == "distill" else "above"
    assert side in advice.sentence and "distilled" in advice.table()
    json.loads(advice.to_json())
    assert "guess" not in advice.sentence


def test_advice_beyond_the_measured_range_is_called_a_guess(fits) -> None:
    advice = advise(fits, upstream_samples=2e3, downstream_samples=1000, num_params=1e9)
    assert advice.extrapolated == ("num_params",)
    assert "num_params (2,500,000 to 38,000,000): a guess by the laws" in advice.sentence


def test_transfer_gaps_and_effective_data() -> None:
    d_p, d_f = (c.ravel() for c in np.meshgrid(np.geomspace(1e3, 1e6, 6), np.geomspace(1e2, 1e4, 5)))
    rng = np.random.default_rng(0)
    x = {"upstream_samples": d_p, "downstream_samples": d_f}
    y = (8 * d_p**-0.4 + 1.2) * d_f**-0.3 * np.exp(0.01 * rng.standard_normal(len(d_p)))
    (gap,) = transfer_gaps({"digits": (x, y)})
    assert gap.interval[0] <= 1.2 <= gap.interval[1]
    assert "digits" in gap.sentence() and "hardly helps" in gap.sentence()
    scratch = fit_law("power_plus", {"downstream_samples": d_f}, 0.05 + 3 * d_f**-0.5)
    reached = effective_data_transferred(scratch, [100.0, 100.0], [0.05 + 3 * 400**-0.5, 0.01])
    assert reached[0] == pytest.approx(300, rel=0.02) and np.isnan(reached[1])
