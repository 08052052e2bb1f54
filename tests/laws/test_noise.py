"""Where noise comes from: components of a balanced table by hand, what cannot be told apart, and what more runs leave."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from dbscale.laws import NOISE_TABLES, NoiseModel, Pairs, fit_noise, make_pairs, noise_of


def balanced(
    seed: float = 0.175, teacher: float = 0.010625**0.5, upstream: float = 0.00625**0.5, rest: float = 0.05
) -> Pairs:
    """Two seeds, x, students and labels; the two seeds deviate from each mean by ± a sum of ± the four numbers.

    16 rows: sums of squares 16 · number²; degrees of freedom 1, 1, 2 and 4.
    """
    rows = []
    for s, x, student, labels in product((1, -1), repeat=4):
        noise = s * (seed + x * teacher + x * student * upstream + labels * rest)
        rows.append((3 + x, s, student, labels, 0.01 * x + 0.02 * student - 0.03 * labels + noise))
    x, seeds, students, labels, delta = zip(*rows, strict=True)
    return make_pairs(x, delta, seed=seeds, student=students, labels=labels)


def sds(model: NoiseModel | None) -> dict[str, float]:
    assert model is not None
    return {c.name: c.sd for c in model.components}


def test_components_of_a_balanced_table_by_hand() -> None:
    # mean squares .49, .17, .05 and .01; one upstream run has 2 rows, a teacher 4, a seed 8
    model = fit_noise(balanced())
    assert model is not None
    assert {name: sd**2 for name, sd in sds(model).items()} == pytest.approx(
        {"seed": 0.04, "teacher": 0.03, "upstream": 0.02, "finetune": 0.01}
    )
    assert [c.share for c in model.components] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert model.sd == pytest.approx(0.1**0.5)
    assert model.correlation_students == pytest.approx(0.7) and model.correlation_labels == pytest.approx(0.9)
    assert model.confounded == ("interaction_in_finetune", "test_set_in_finetune")
    finetune = model.components[-1]
    assert finetune.degrees == pytest.approx(4)
    low, high = (np.sqrt(0.04 / stats.chi2.ppf(q, 4)) for q in (0.95, 0.05))
    assert (finetune.low, finetune.high) == pytest.approx((low, high), rel=2e-3)
    upstream = model.components[2]  # (.05 − .01) / 2, so its variance is (2·.05²/2 + 2·.01²/4) / 4
    assert upstream.degrees == pytest.approx(2 * 0.02**2 / ((0.0025 + 0.00005) / 4))
    # total: 1/8 · .49 + 1/8 · .17 + 1/4 · .05 + 1/2 · .01
    variance = 2 * ((0.49 / 8) ** 2 + (0.17 / 8) ** 2 + (0.05 / 4) ** 2 / 2 + (0.01 / 2) ** 2 / 4)
    assert model.degrees == pytest.approx(2 * 0.1**2 / variance)


def test_noise_of_the_pooled_delta_by_x() -> None:
    model = fit_noise(balanced())
    assert model is not None
    # pooled, the seeds deviate by ± (.175 ± teacher): sums of squares 2 (.175 ± t)² on one degree each
    squares = np.array([2 * (0.175 + side * 0.010625**0.5) ** 2 for side in (-1, 1)])
    expected = np.sqrt((4 * squares.sum() / 2 + squares) / 5)
    assert [x for x, _ in model.by_x] == [2, 4]
    assert [sd for _, sd in model.by_x] == pytest.approx(expected)


def test_a_component_that_would_be_negative_is_zero_and_the_rest_shares_it() -> None:
    model = fit_noise(balanced(seed=0.0, teacher=0.0, upstream=0.0))
    found = sds(model)
    assert found["seed"] == found["teacher"] == found["upstream"] == 0
    assert found["finetune"] ** 2 == pytest.approx(0.04 / 8)  # one variance on all 8 degrees of freedom


def test_one_student_or_one_value_leaves_addresses_together() -> None:
    one_student = fit_noise(balanced().of(student=1))
    assert one_student is not None and set(sds(one_student)) == {"seed", "upstream", "finetune"}
    assert "teacher_in_upstream" in one_student.confounded and one_student.correlation_students is None
    cell = fit_noise(balanced().of(1, 1))
    assert cell is not None and set(sds(cell)) == {"seed", "upstream"}
    assert {"teacher_in_upstream", "finetune_in_upstream", "test_set_in_upstream"} <= set(cell.confounded)
    assert cell.correlation_labels is None
    pairs = balanced()
    one_x = fit_noise(pairs.rows(np.flatnonzero(pairs.x == 4)))
    assert (
        one_x is not None
        and "teacher_in_seed" in one_x.confounded
        and set(sds(one_x)) == {"seed", "upstream", "finetune"}
    )
    assert one_x.correlation_students == pytest.approx(one_x.components[0].share)


def test_draws_tell_the_finetune_from_the_labels() -> None:
    """Two draws ± d about each run: the finetune is those alone, and the labels' share has an address of its own."""
    pairs = balanced()
    both = [np.concatenate([getattr(pairs, n)] * 2) for n in ("x", "seed", "student", "labels")]
    delta = np.concatenate([pairs.delta + 0.03, pairs.delta - 0.03])
    model = fit_noise(
        make_pairs(both[0], delta, seed=both[1], student=both[2], labels=both[3], draw=np.repeat([0, 1], 16))
    )
    # draws: sum of squares 32 · .0009 on 16 degrees; labels: mean square 2 · .01
    assert sds(model)["finetune"] ** 2 == pytest.approx(0.0018)
    assert sds(model)["interaction"] ** 2 == pytest.approx((0.02 - 0.0018) / 2)
    assert model is not None and model.confounded == ("test_set_in_finetune",)


def test_students_with_teachers_of_their_own_share_none() -> None:
    pairs = balanced()
    own = make_pairs(
        pairs.x, pairs.delta, seed=pairs.seed, student=pairs.student, labels=pairs.labels, teacher=pairs.student
    )
    model = fit_noise(own)
    assert model is not None and "teacher" not in sds(model) and "teacher_in_upstream" in model.confounded
    share = {c.name: c.share for c in model.components}
    assert model.correlation_students == pytest.approx(share["seed"])
    assert model.correlation_labels == pytest.approx(share["seed"] + share["upstream"])


def test_the_test_set_is_taken_out_of_the_last_address() -> None:
    pairs = balanced()
    known = make_pairs(
        pairs.x, pairs.delta, seed=pairs.seed, student=pairs.student, labels=pairs.labels, test_variance=[0.004] * 16
    )
    model = fit_noise(known)
    assert sds(model)["test_set"] ** 2 == pytest.approx(0.004) and sds(model)["finetune"] ** 2 == pytest.approx(0.006)
    assert model is not None and model.sd == pytest.approx(0.1**0.5) and "test_set_in_finetune" not in model.confounded
    (known_sd,) = [each for each in model.components if each.name == "test_set"]
    assert known_sd.low == known_sd.high == known_sd.sd, "what is known has no interval"
    # samples say that both seeds err on the same images: then no seed averages that out, and finetunes hold all of theirs
    images = {row: np.array([1, 0, 0, -1]) for row in range(16)}
    shared = fit_noise(
        make_pairs(pairs.x, pairs.delta, seed=pairs.seed, student=pairs.student, labels=pairs.labels, by_sample=images)
    )
    assert shared is not None and shared.shared_test == pytest.approx(
        0.125
    )  # capped: the variance of one Δ over test sets
    assert sds(shared)["finetune"] ** 2 == pytest.approx(0.01)
    assert shared.variance_of_mean(1000) == pytest.approx(0.125 + 0.1 / 1000)


def test_one_seed_has_no_noise_model() -> None:
    assert fit_noise(make_pairs([1, 2], [0, 1], seed=[0, 0])) is None
    assert fit_noise(make_pairs([1, 2], [0, 1], seed=[0, 1])) is None


def test_rows_without_a_second_seed_are_left_out() -> None:
    pairs = balanced()
    columns = {n: np.append(getattr(pairs, n), value) for n, value in (("seed", 1), ("student", 1), ("labels", 9))}
    model = fit_noise(make_pairs(np.append(pairs.x, 9), np.append(pairs.delta, 5.0), **columns))
    assert sds(model) == pytest.approx(sds(fit_noise(pairs)))


def test_components_are_unbiased_on_tables_with_gaps() -> None:
    rng, found = np.random.default_rng(0), []
    grid = np.array(list(product(range(4), range(3), range(2), range(3))))
    for _ in range(100):
        kept = grid[rng.random(len(grid)) < 0.8]
        parts = [
            (0.1, kept[:, 0]),
            (0.2, kept[:, 0] * 3 + kept[:, 1]),
            (0.3, kept[:, 0] * 6 + kept[:, 1] * 2 + kept[:, 2]),
        ]
        delta = 0.2 * rng.standard_normal(len(kept)) + sum(sd * rng.standard_normal(100)[group] for sd, group in parts)
        model = fit_noise(make_pairs(kept[:, 1] + 1, delta, seed=kept[:, 0], student=kept[:, 2], labels=kept[:, 3]))
        found.append([sds(model)[n] ** 2 for n in ("seed", "teacher", "upstream", "finetune")])
    means = np.mean(found, axis=0)
    assert means[3] == pytest.approx(0.04, rel=0.1) and means[2] == pytest.approx(0.09, rel=0.15)
    assert means.sum() == pytest.approx(0.18, rel=0.1)  # none below 0 pushes the small ones up a little


def test_intervals_of_components_hold_the_truth() -> None:
    rng, hits = np.random.default_rng(2), []
    grid = np.array(list(product(range(4), range(5), range(2), range(2))))
    true = {"seed": 0.02, "teacher": 0.03, "upstream": 0.02, "finetune": 0.03}
    for _ in range(100):
        groups = (
            grid[:, 0],
            grid[:, 0] * 5 + grid[:, 1],
            grid[:, 0] * 10 + grid[:, 1] * 2 + grid[:, 2],
            np.arange(len(grid)),
        )
        delta = sum(sd * rng.standard_normal(100)[g] for sd, g in zip(true.values(), groups, strict=True))
        model = fit_noise(make_pairs(grid[:, 1] + 1, delta, seed=grid[:, 0], student=grid[:, 2], labels=grid[:, 3]))
        assert model is not None
        hits.append([c.low <= true[c.name] <= c.high for c in model.components])
    covered = np.mean(hits, axis=0)
    assert ((covered >= 0.83) & (covered <= 0.97)).all(), covered


# What more runs leave.


def test_variance_of_a_mean_by_hand() -> None:
    model = noise_of(seed=0.4, teacher=0.3, upstream=0.2, finetune=0.1)
    assert model.variance_of_mean(1) == pytest.approx(0.3)
    assert model.variance_of_mean(2, 5) == pytest.approx((0.16 + 0.09 + 0.04 + 0.01 / 5) / 2)
    assert model.variance_of_mean(2, 5, num_students=2, num_labels=4) == pytest.approx((0.25 + 0.02 + 0.01 / 40) / 2)
    assert noise_of(interaction=0.2).variance_of_mean(1, 5, num_students=2, num_labels=4) == pytest.approx(0.04 / 8)
    assert noise_of(test_set=0.2).variance_of_mean(2, 5, num_labels=4) == pytest.approx(0.04 / 40)
    assert model.sd == pytest.approx(0.3**0.5) and model.correlation_students == pytest.approx(0.25 / 0.3)
    assert model.correlation_labels == pytest.approx(0.29 / 0.3)


@pytest.mark.parametrize(
    ("sds", "costs", "best"),
    [
        ({"upstream": 0.03, "finetune": 0.1}, (9, 1), 10),  # √(.01 · 9 / .0009)
        ({"upstream": 0.03, "finetune": 0.1}, (1, 9), 1),  # √(.01 / (.0009 · 9)) = 1.1
        ({"seed": 0.03, "teacher": 0.04, "finetune": 0.1}, (4, 1), 4),  # √(.01 · 4 / .0025)
        ({"interaction": 0.05, "finetune": 0.1}, (4, 1), 4),
        ({"upstream": 0.1, "finetune": 0.1}, (6, 1), 2),  # √6 = 2.4: 2 costs (.015)(8), 3 (.01333)(9)
        ({"upstream": 0.001, "finetune": 0.1}, (9, 1), 16),  # no more than 16
        ({"finetune": 0.1}, (9, 1), 16),
        ({"upstream": 0.1}, (9, 1), 1),
    ],
)
def test_best_number_of_finetunes(sds: dict, costs: tuple[float, float], best: int) -> None:
    assert noise_of(**sds).best_finetunes(*costs) == best


def test_named_tables_have_the_sizes_that_were_measured() -> None:
    assert NOISE_TABLES["demo_digits"].sd == pytest.approx(0.09, abs=0.005)
    assert NOISE_TABLES["demo_fractals"].sd == pytest.approx(0.045, abs=0.005)
    assert NOISE_TABLES["cifar10_fashion"].sd == pytest.approx(0.0242, abs=0.0005)
    pooled = NOISE_TABLES["cifar10_fashion"].variance_of_mean(1, num_students=2, num_labels=3) ** 0.5
    assert pooled == pytest.approx(0.0176, abs=0.002)
