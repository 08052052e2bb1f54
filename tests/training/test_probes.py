"""Predictors of transfer: closed forms against direct computation, and their place in a finetune's row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import RidgeClassifier

from dbscale.study.recipe import Budget
from dbscale.training.probes import RIDGES, fit_linear_probe, linear_probe_error, transrate


def clusters(seed, num, dim, num_classes, gap):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % num_classes
    centres = torch.randn(num_classes, dim, generator=draw, dtype=torch.float64)
    return gap * centres[labels] + torch.randn(num, dim, generator=draw, dtype=torch.float64), labels


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(8, 40), st.integers(1, 30), st.integers(2, 4))
def test_transrate_is_its_definition(seed, num, dim, num_classes):
    features, labels = clusters(seed, num, dim, num_classes, 1.0)
    z, eps = (features - features.mean(0)).numpy(), 1e-4

    def rate(part):
        return 0.5 * np.log(np.linalg.eigvalsh(np.eye(dim) + part.T @ part / (len(part) * eps))).sum()

    shares = [(labels.numpy() == c) for c in range(num_classes)]
    expected = rate(z) - sum(chosen.mean() * rate(z[chosen]) for chosen in shares)
    assert transrate(features, labels) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_transrate_grows_with_the_distance_of_the_classes():
    found = [transrate(*clusters(0, 300, 8, 3, gap)) for gap in (0.0, 1.0, 4.0)]
    assert found[0] < found[1] < found[2]


def test_transrate_by_hand():
    """One class along each axis: log(1 + 1/(2ε)) with all samples, ½·log(1 + 1/ε) within a class."""
    features = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]], dtype=torch.float64)
    expected = math.log(51) - 0.5 * math.log(101)
    assert transrate(features, torch.tensor([0, 0, 1, 1]), eps=0.01) == pytest.approx(expected)


def test_the_linear_probe_learns_what_a_line_can_tell():
    """Far apart: no error. All in one place: chance. A feature decides, however small it is beside another."""
    features, labels = clusters(3, 120, 10, 3, 4.0)
    test, truth = clusters(3, 120, 10, 3, 4.0)
    assert linear_probe_error(features, labels, test + 0.1, truth) == 0
    assert 0.5 < linear_probe_error(*clusters(3, 120, 10, 3, 0.0), *clusters(4, 120, 10, 3, 0.0)) < 0.8
    wide = torch.cat([features * 1e-6, 1e3 * torch.randn(120, 1, dtype=torch.float64)], 1)
    assert linear_probe_error(wide, labels, wide, truth) == 0


@pytest.mark.parametrize(("num", "dim"), [(60, 10), (20, 50)], ids=["more samples", "more features"])
def test_the_linear_probe_is_ridge_regression(num, dim):
    features, labels = clusters(3, num, dim, 3, 0.7)
    test, _ = clusters(4, 500, dim, 3, 0.7)
    predict, ridge = fit_linear_probe(features, labels)
    scaled, scaled_test = ((each - features.mean(0)) / features.std(0, correction=0) for each in (features, test))
    reference = RidgeClassifier(alpha=ridge * num).fit(scaled.numpy(), labels.numpy())
    assert predict(test).numpy().tolist() == reference.predict(scaled_test.numpy()).tolist()


def test_the_ridge_is_the_one_with_the_least_cross_validated_error():
    features, labels = clusters(5, 50, 30, 3, 0.5)
    x = ((features - features.mean(0)) / features.std(0, correction=0)).numpy()
    one_hot = np.eye(3)[labels.numpy()]
    y = one_hot - one_hot.mean(0)

    def gcv(ridge):
        hat = x @ np.linalg.inv(x.T @ x + ridge * 50 * np.eye(30)) @ x.T
        return ((y - hat @ y) ** 2).sum() / (49 - np.trace(hat)) ** 2

    assert fit_linear_probe(features, labels)[1] == min(RIDGES, key=gcv)


def test_ridges_are_the_powers_of_ten_from_a_ten_thousandth_to_a_hundred():
    assert list(RIDGES) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0])


def test_constant_features_and_absent_classes_are_no_error():
    features, labels = torch.ones(10, 4, dtype=torch.float64), torch.tensor([0, 2] * 5)
    assert transrate(features, labels) == 0
    assert linear_probe_error(features, labels, features, labels) == 0.5
    assert linear_probe_error(features, labels * 0, features, labels) == 0.5


def test_rows_of_finetunes_carry_their_checkpoints_probe(bench):
    parent = bench.cell(budget=Budget(steps=30))
    short, long = (bench.cell("finetune", init=parent, budget=Budget(steps=n)) for n in (2, 6))
    scratch = bench.cell("finetune")
    rows = [bench.run(cell).row for cell in (parent, short, long, scratch)]
    first, second = rows[1].upstream, rows[2].upstream
    assert 0 <= first.linear_probe_error < 2 / 3, "worse than chance on three classes"
    assert first.transrate > 0
    # The checkpoint's, not the finetuned model's: how long it is finetuned does not matter.
    assert (first.linear_probe_error, first.transrate) == (second.linear_probe_error, second.transrate)
    assert rows[0].upstream is None and rows[3].upstream is None


def test_probe_of_a_resnet(bench):
    from dbscale.study.recipe import TimmModel

    options = {"model": TimmModel(kind="timm", name="resnet10t"), "drop_path": 0.0, "budget": Budget(steps=1)}
    parent = bench.cell(**options)
    bench.run(parent)
    outcome = bench.run(bench.cell("finetune", init=parent, **options))
    assert outcome.status == "done", outcome.reason
    assert outcome.row.upstream.transrate is not None
