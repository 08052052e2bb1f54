"""Measured ΔE pairs equal seeds, uses single results where they exist, and states its uncertainty."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dbscale.errors import TableError
from dbscale.report.deltas import complete_groups, delta_points, pairs_of, pooled_variance, sampling_variance
from dbscale.report.mistakes import read_mistakes
from dbscale.report.table import RunTable


def first_pairs(table: RunTable):
    return pairs_of(table, table.settings[0])


def test_pairs_share_student_sizes_and_seed(make_table):
    table = make_table()
    pairs = first_pairs(table)
    assert len(pairs) == len(table.where(arm="plain"))
    assert all(pair.plain.place == pair.distilled.place for pair in pairs)
    assert {pair.distilled.arm for pair in pairs} == {"distilled"}


def test_incomplete_pairs_are_left_out(make_table):
    table = make_table().where(lambda run: not (run.arm == "distilled" and run.seed == 1))
    assert {pair.plain.seed for pair in first_pairs(table)} == {0, 2}


def test_points_are_means_over_seeds_with_students_interval(make_table):
    table = make_table(students={"h2": 200_000}, downstream=(100,))
    pairs = first_pairs(table)
    point = next(p for p in delta_points(pairs, {}, level=0.9) if p.upstream_samples == 500 and p.student == "h2")
    deltas = [pair.delta for pair in pairs if pair.plain.upstream_samples == 500]
    assert point.delta.value == pytest.approx(np.mean(deltas))
    groups = [[p.delta for p in pairs if p.plain.upstream_samples == size] for size in (500, 2000, 8000, 32000, 128000)]
    spread = np.mean([np.var(group, ddof=1) for group in groups])
    seeds_only = stats.t.ppf(0.95, 10) * np.sqrt(spread / 3)
    assert point.delta.high is not None
    assert point.delta.high - point.delta.value >= seeds_only * 0.999


def test_pooled_points_average_over_students_and_labels(make_table):
    pairs = first_pairs(make_table())
    points = [point for point in delta_points(pairs, {}, level=0.9) if point.student is None]
    assert [point.upstream_samples for point in points] == [500, 2000, 8000, 32000, 128000]
    wanted = np.mean([pair.delta for pair in pairs if pair.plain.upstream_samples == 2000])
    assert points[1].delta.value == pytest.approx(wanted)


def test_means_are_taken_over_equal_sets_only(make_table):
    table = make_table().where(lambda run: (run.arm, run.student, run.upstream_samples) != ("distilled", "h4", 2000))
    points = [point for point in delta_points(first_pairs(table), {}, level=0.9) if point.student is None]
    assert [point.upstream_samples for point in points] == [500, 8000, 32000, 128000]
    assert len(complete_groups(first_pairs(table))) == 4 * 3


def test_a_student_without_a_distilled_arm_has_no_delta(make_table):
    table = make_table().where(lambda run: (run.arm, run.student) != ("distilled", "h1"))
    assert table.pretrained.both_arms.students == ("h2", "h4")
    assert {point.student for point in delta_points(first_pairs(table), {}, level=0.9)} == {"h2", "h4", None}


def test_one_seed_leaves_the_interval_open(make_table):
    points = delta_points(first_pairs(make_table(seeds=(0,))), {}, level=0.9)
    assert all(point.delta.low is None and point.delta.high is None for point in points)


def test_paired_test_samples_have_less_noise_than_unpaired_ones(make_table):
    pair = first_pairs(make_table())[0]
    rng = np.random.default_rng(0)
    hard = rng.random(2000) < pair.plain.error_rate
    paired = sampling_variance(pair, {pair.plain.key: hard, pair.distilled.key: hard ^ (rng.random(2000) < 0.02)})
    assert 0 < paired < sampling_variance(pair, {}) / 3


def test_pooled_variance_is_the_mean_of_unbiased_ones():
    groups = [[1.0, 2.0, 3.0], [5.0, 5.0, 8.0]]
    assert pooled_variance(groups) == (pytest.approx(np.mean([np.var(g, ddof=1) for g in groups])), 4)
    assert pooled_variance([[1.0], []]) == (0.0, 0)


def test_mistakes_are_read_from_packed_bits(tmp_path):
    correct, counted = (
        np.array([1, 0, 1, 0, 1, 1, 0, 1, 1, 0], bool),
        np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 1], bool),
    )
    path = tmp_path / "correct.npz"
    np.savez(path, num_samples=np.int64(10), correct=np.packbits(correct), counted=np.packbits(counted))
    assert read_mistakes(path).tolist() == (~correct[counted]).tolist()


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "correct.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(TableError, match=r"correct\.npz cannot be read"):
        read_mistakes(path)
