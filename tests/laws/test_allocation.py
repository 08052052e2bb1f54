"""Where the money goes: optima and exchange rates in closed form, the four cost cases, arms, and what lies outside."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dbscale.laws import LawError, Prices, Selection, allocate, exchange_rates, fit_law, select_law, transfer_gap
from dbscale.laws.allocation import affordable

CASES = ("free", "inference", "training", "training_and_inference")
D_P, D_F = (c.ravel() for c in np.meshgrid(np.geomspace(1e3, 1e6, 6), np.geomspace(1e2, 1e5, 6)))
PAIR = {"upstream_samples": D_P, "downstream_samples": D_F}


@pytest.fixture(scope="module")
def product() -> Selection:
    """E = 3·D_p^-.3·D_f^-.1."""
    return select_law(PAIR, 3.0 * D_P**-0.3 * D_F**-0.1, laws=["product"], num_resamples=20)


@pytest.fixture(scope="module")
def laws(grid, arms) -> dict[str, Selection]:
    return {arm: select_law(grid, y, laws=["additive"], num_resamples=40) for arm, y in arms.items()}


def test_the_split_equals_the_closed_form(product) -> None:
    """With linear prices the optimum spends in the ratio of the exponents, 3 : 1, and trades at the prices' ratio."""
    prices = Prices(upstream_image=0.01, downstream_label=1.0)
    advice = allocate({"plain": product}, prices, 1000.0, at={"num_params": 1e7})
    assert advice.spend["upstream_images"] == pytest.approx(750, rel=0.01)
    assert advice.spend["downstream_labels"] == pytest.approx(250, rel=0.03)
    assert sum(advice.spend.values()) == pytest.approx(1000)
    assert advice.point["upstream_samples"] == pytest.approx(75_000, rel=0.01) and advice.point["num_params"] == 1e7
    assert advice.expected_error == pytest.approx(3 * 75_000**-0.3 * 250**-0.1, rel=1e-3)
    assert advice.exchange_rates["upstream_samples_per_downstream_sample"][0] == pytest.approx(100, rel=0.03)
    assert (advice.arm, advice.arm_probability, advice.other_error) == ("plain", 1.0, None)


def test_exchange_rates_by_hand(product) -> None:
    """(∂E/∂D_f)/(∂E/∂D_p) = (.1/D_f)/(.3/D_p): 40,000 against 500 gives 80/3 upstream samples a label."""
    rates = exchange_rates(product, {"upstream_samples": 4e4, "downstream_samples": 500.0, "num_params": 1e7})
    assert list(rates) == ["upstream_samples_per_downstream_sample"]
    assert rates["upstream_samples_per_downstream_sample"] == pytest.approx((80 / 3,) * 3, rel=1e-3)
    size = np.repeat([1e6, 4e6, 2e7], 12)
    d_p, d_f = np.tile(np.geomspace(1e3, 1e5, 4), 9), np.tile(np.repeat([1e2, 1e3, 1e4], 4), 3)
    three = {"upstream_samples": d_p, "num_params": size, "downstream_samples": d_f}
    law = select_law(three, 50 * d_p**-0.3 * size**-0.2 * d_f**-0.1, laws=["product"], num_resamples=20)
    found = exchange_rates(law, {"upstream_samples": 1e4, "num_params": 4e6, "downstream_samples": 1e3})
    # 1 % of M against one D_p: .01·M·(.2/M)/(.3/D_p) = .01·.2/.3·10,000 = 66.7.
    assert found["upstream_samples_per_percent_of_params"][0] == pytest.approx(200 / 3, rel=2e-3)
    assert found["upstream_samples_per_downstream_sample"][0] == pytest.approx((0.1 / 1e3) / (0.3 / 1e4), rel=2e-3)
    only = select_law({"downstream_samples": d_f[:12]}, d_f[:12] ** -0.3, laws=["power"], num_resamples=5)
    assert exchange_rates(only, {"downstream_samples": 100.0}) == {}


def test_exchange_rates_carry_the_draws_and_the_level(laws) -> None:
    point = {"upstream_samples": 2e4, "num_params": 1e7, "downstream_samples": 1000.0}
    value, low, high = exchange_rates(laws["plain"], point, 0.9)["upstream_samples_per_downstream_sample"]
    # .35·1.5·1000^-1.35 against .35·6·20,000^-1.35
    assert value == pytest.approx(1.5 / 6 * 20**1.35, rel=0.1) and low < value < high
    _, near, far = exchange_rates(laws["plain"], point, 0.5)["upstream_samples_per_downstream_sample"]
    assert low < near < far < high


def test_prices_by_hand() -> None:
    """One upstream image of 2 with 3 epochs of 10 tokens, 6 FLOP each a parameter at 1e-3, M = 5, teacher 7."""
    prices = Prices(2.0, 11.0, 1e-3, tokens_per_image=10, upstream_epochs=3, downstream_epochs=2, teacher_params=7)
    assert prices.upstream_step("plain", 5) == pytest.approx(2 + 0.03 * 30)
    assert prices.upstream_step("distilled", 5) == pytest.approx(2 + 0.03 * (30 + 8 * 7))
    assert prices.downstream_step(5) == pytest.approx(11 + 0.02 * 30)
    spend = prices.spend("distilled", {"upstream_samples": 100, "num_params": 5, "downstream_samples": 10})
    assert spend == pytest.approx(
        {
            "upstream_images": 200,
            "upstream_training": 90,
            "teacher": 168,
            "downstream_labels": 110,
            "downstream_training": 6,
        }
    )
    plain = prices.spend("plain", {"upstream_samples": 100, "num_params": 5, "downstream_samples": 10})
    assert plain["teacher"] == 0 and sum(plain.values()) == pytest.approx(406)


def test_a_teacher_is_billed_by_case_and_only_where_it_teaches() -> None:
    """2 FLOP a parameter forward, 6 to train it: 0, 2, 6 and 8 times 5e6 parameters."""
    for case, times in zip(CASES, (0, 2, 6, 8), strict=True):
        prices = Prices(train_flop=1e-15, teacher_params=5e6, teacher_case=case)
        extra = prices.upstream_step("distilled", 2e7) - prices.upstream_step("plain", 2e7)
        assert extra == pytest.approx(1e-15 * 197 * times * 5e6)
    with pytest.raises(LawError, match="did you mean 'inference'"):
        Prices(teacher_case="inferences")
    with pytest.raises(LawError, match=r"Prices.tokens_per_image must not be negative, got -1"):
        Prices(tokens_per_image=-1)


def test_a_dear_teacher_turns_the_advice(laws) -> None:
    def advice(case: str):
        prices = Prices(
            upstream_image=1e-3, downstream_label=0.05, train_flop=2e-14, teacher_params=3e8, teacher_case=case
        )
        return allocate(laws, prices, 40.0, limits={"num_params": (2.5e6, 3.8e7)})

    free, paid = advice("free"), advice("training_and_inference")
    assert (free.arm, paid.arm) == ("distilled", "plain")
    assert free.spend["teacher"] == paid.spend["teacher"] == 0
    assert free.expected_error < paid.expected_error < paid.other_error


def test_both_arms_are_weighed_draw_by_draw(laws) -> None:
    prices = Prices(upstream_image=1e-3, downstream_label=0.1, train_flop=1e-16)
    advice = allocate(laws, prices, 500.0, limits={"num_params": (2.5e6, 3.8e7)})
    alone = {
        arm: allocate({arm: own}, prices, 500.0, limits={"num_params": (2.5e6, 3.8e7)}) for arm, own in laws.items()
    }
    other = "plain" if advice.arm == "distilled" else "distilled"
    assert advice.expected_error == alone[advice.arm].expected_error < alone[other].expected_error == advice.other_error
    assert advice.point == alone[advice.arm].point
    low, high = advice.error_interval
    assert (low, high) == tuple(
        float(e[0]) for e in laws[advice.arm].curve_interval({n: [v] for n, v in advice.point.items()})
    )
    narrow = allocate(laws, prices, 500.0, limits={"num_params": (2.5e6, 3.8e7)}, level=0.5)
    assert low < narrow.error_interval[0] < narrow.error_interval[1] < high
    assert all(a <= b for a, b in advice.ranges.values()) and set(advice.ranges) == set(advice.point)


def test_a_close_race_is_no_certainty(grid, arms) -> None:
    """The same arm twice, its noise drawn anew: each wins in some of the draws."""
    rng = np.random.default_rng(5)
    twins = {arm: select_law(grid, arms["plain"] * np.exp(0.03 * rng.standard_normal(90)), laws=["additive"],
                             num_resamples=60, seed=seed) for seed, arm in enumerate(arms)}  # fmt: skip
    prices = Prices(upstream_image=1e-3, downstream_label=0.1)
    assert 0.05 < allocate(twins, prices, 300.0, at={"num_params": 1e7}).arm_probability < 1.0
    # The same noise in both, drawn alike, and one a tenth better: that one wins in every draw.
    pair = {arm: select_law(grid, scale * arms["plain"], laws=["additive"], num_resamples=20)
            for arm, scale in (("plain", 1.0), ("distilled", 0.9))}  # fmt: skip
    sure = allocate(pair, prices, 300.0, at={"num_params": 1e7})
    assert (sure.arm, sure.arm_probability) == ("distilled", 1.0)


def test_what_lies_outside_the_measured_range_is_named(product) -> None:
    """Much money buys the largest values measured; limits that reach further are used, and named."""
    prices = Prices(upstream_image=1e-3, downstream_label=0.01)
    rich = allocate({"plain": product}, prices, 1e7, at={"num_params": 1e7})
    assert rich.point == pytest.approx({"upstream_samples": 1e6, "num_params": 1e7, "downstream_samples": 1e5})
    assert rich.extrapolated == () and rich.spend["unspent"] == pytest.approx(1e7 - 1e3 - 1e3)
    far = {"upstream_samples": (1e3, 4e6), "downstream_samples": (1e2, 4e5)}
    held = allocate({"plain": product}, prices, 1e7, at={"num_params": 1e7}, limits=far)
    assert held.extrapolated == ("upstream_samples", "downstream_samples")
    assert held.point["upstream_samples"] == pytest.approx(4e6) and held.point["downstream_samples"] == pytest.approx(
        4e5
    )
    one = allocate({"plain": product}, prices, 1e7, at={"num_params": 1e7}, limits={"downstream_samples": (10.0, 50.0)})
    assert one.extrapolated == ("downstream_samples",)


def test_what_cannot_be_allocated_is_said(laws, product) -> None:
    with pytest.raises(LawError, match=r"smallest point within the limits costs .*, the budget is 1$"):
        allocate(laws, Prices(upstream_image=1.0), 1.0)
    with pytest.raises(LawError, match="arms must be 'plain' and/or 'distilled', got"):
        allocate({"teacher": laws["plain"]}, Prices(), 1.0)
    with pytest.raises(LawError, match="budget must be above 0, got -5"):
        allocate(laws, Prices(), -5)
    with pytest.raises(LawError, match="no law varies num_params"):
        allocate({"plain": product}, Prices(), 1.0)


def test_the_transfer_gap_by_hand() -> None:
    """G = 1.2 beside 8·D_p^-.4 at D_p = 10⁶, which is .0318; at D_f = 10⁵ the gap is worth 1.2·10^-1.5."""
    y = (8 * D_P**-0.4 + 1.2) * D_F**-0.3 * np.exp(0.01 * np.random.default_rng(0).standard_normal(36))
    fit = fit_law("transfer_gap", PAIR, y, loss="least_squares_log")
    found = transfer_gap(fit)
    assert found.interval[0] < 1.2 < found.interval[1] and found.gap == fit.params["G"]
    assert found.share == pytest.approx(1.2 / (1.2 + 8 * 1e6**-0.4), abs=0.01)
    assert found.gap_error == pytest.approx(1.2 * 1e5**-0.3, rel=0.1)
    inner = transfer_gap(fit, 0.5)
    assert found.interval[0] < inner.interval[0] < inner.interval[1] < found.interval[1] and inner.level == 0.5
    fixed = transfer_gap(fit_law("transfer_gap", PAIR, y, fixed={"G": 1.0}, loss="least_squares_log"))
    assert fixed.gap == 1.0 and fixed.interval == (1.0, 1.0)


def test_a_gap_that_vanished_keeps_the_profiles_upper_end() -> None:
    d_p, d_f = (c.ravel() for c in np.meshgrid(np.geomspace(500, 5e4, 5), np.geomspace(100, 1e4, 3)))
    y = 3 * d_p**-0.12 * d_f**-0.15 * np.exp(0.06 * np.random.default_rng(0).standard_normal(15))
    x = {"upstream_samples": d_p, "downstream_samples": d_f}
    found = transfer_gap(fit_law("transfer_gap", x, y, loss="least_squares_log"))
    assert (found.gap, found.share, found.gap_error, found.interval[0]) == (0, 0, 0, 0)
    held = fit_law("transfer_gap", x, y, fixed={"G": found.interval[1]}, loss="least_squares_log")
    free = fit_law("transfer_gap", x, y, loss="least_squares_log")
    assert free.degrees * (held.objective / free.objective - 1) == pytest.approx(stats.t.ppf(0.95, 10) ** 2, rel=0.01)


def test_a_gap_is_read_at_one_model_size_only(grid, arms) -> None:
    with pytest.raises(LawError, match="at one model size"):
        transfer_gap(fit_law("transfer_gap", grid, arms["plain"]))
    with pytest.raises(LawError, match="got E = E_inf"):
        transfer_gap(fit_law("product", PAIR, D_P**-0.3))


def test_no_point_is_bought_with_fewer_labels_than_the_limits_ask() -> None:
    """At 1 a label and .01 an image, 100 buys 10 to 90 labels beside 1,000 to 9,000 images, and none beside 9,500."""
    prices = Prices(upstream_image=0.01, downstream_label=1.0)
    limits = {"upstream_samples": (1000.0, 20_000.0), "num_params": (1e4, 1e5), "downstream_samples": (10.0, 1000.0)}
    found = affordable("plain", prices, 100.0, limits)
    assert found["downstream_samples"].min() >= 10 * (1 - 1e-9)
    assert found["downstream_samples"].max() == pytest.approx(90)
    assert found["upstream_samples"].max() <= 9000 * (1 + 1e-9)
