"""Advice for one point follows from the page's verdicts, and says on which axes it reaches beyond them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dbscale.errors import TableError
from dbscale.report.advise import advise
from dbscale.report.findings import Options, find
from dbscale.report.words import answer
from tests.report.test_findings import study

FAST = Options(num_draws=200, num_resamples=20)


@pytest.fixture(scope="module")
def table():
    """One student of 5,000 parameters; distilling helps at 1,000 and 2,000 images and hurts at 4,000 and 8,000."""
    return study(labels=(100, 1000))


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1000, "digits: distillation: 1,000 upstream images lie below the boundary, about 2,"),
     (8000, "digits: plain pretraining: 8,000 upstream images lie above the boundary, about 2,")],
)  # fmt: skip
def test_the_side_of_the_boundary_decides(table, size, expected):
    (found,) = advise(table, size, 100, 5000, options=FAST)
    assert found.sentence.startswith(expected) and "extrapolation" not in found.sentence


def test_advice_rests_on_the_page_s_own_verdict(table):
    (found,) = advise(table, 1000, 1000, 5000, options=FAST)
    assert found.record.downstream_samples == 1000
    page = {each.downstream_samples: each for each in find(table, options=FAST).boundary.contrasts}
    assert found.record.verdict is not None and page[1000].verdict is not None
    assert found.record.verdict.points == page[1000].verdict.points
    assert f"verdict (h2, 1,000 labels): {answer(page[1000])}" in found.text()
    with_loss = replace(table, runs=tuple(replace(r, test_loss=1 - r.error_rate) for r in table))
    (same,) = advise(with_loss, 1000, 1000, 5000, options=FAST)
    assert same.record.metric == "error_rate" and same.sentence == found.sentence


@pytest.mark.parametrize(
    ("point", "told"),
    [((1000, 100, 5e6), "5,000,000 parameters are above the measured 5,000"),
     ((1000, 50, 5000), "50 labels are below the measured 100 to 1,000"),
     ((20_000, 100, 5000), "20,000 upstream images are above the measured 1,000 to 8,000"),
     ((20_000, 50, 5e6), "20,000 upstream images are above the measured 1,000 to 8,000, 5,000,000 parameters are above the "
      "measured 5,000 and 50 labels are below the measured 100 to 1,000")],
)  # fmt: skip
def test_every_axis_beyond_what_was_measured_is_named(table, point, told):
    (found,) = advise(table, *point, options=FAST)
    assert found.sentence.endswith(f" This point is an extrapolation: {told}.")
    assert found.expected == {} and "by its laws" not in found.text()


def test_the_laws_add_what_error_to_expect(table):
    falling = tuple(replace(r, error_rate=r.error_rate * (r.upstream_samples / 1000) ** -0.1) for r in table)
    (found,) = advise(replace(table, runs=falling), 1000, 100, 5000, options=FAST)
    assert set(found.expected) == {"plain", "distilled"}
    assert found.expected["plain"].value == pytest.approx(0.4, rel=0.05)
    assert "plain by its laws: 40." in found.text()


@pytest.mark.parametrize(("labels", "nearest"), [(300, 100), (330, 1000)])
def test_the_nearest_label_count_is_nearest_as_a_ratio(table, labels, nearest):
    """√(100·1000) = 316."""
    (found,) = advise(table, 1000, labels, 5000, options=FAST)
    assert found.record.downstream_samples == nearest


def test_an_undecided_study_gives_no_advice(table):
    runs = tuple(replace(r, error_rate=0.4 + 0.01 * (r.seed - 1.5) * (1 if r.arm == "plain" else -1)) for r in table)
    (found,) = advise(replace(table, runs=runs), 1000, 100, 5000, options=FAST)
    assert found.sentence == "digits: no advice: which side gives the lower error is undecided."
    assert found.record.pooled


@pytest.mark.parametrize(
    ("point", "dataset", "message"),
    [((0, 100, 5000), None, "upstream_samples is 0; it must be above 0"),
     ((1000, float("nan"), 5000), None, "downstream_samples is nan; it must be above 0"),
     ((1000, 100, 5000), "digit", "no runs on 'digit'; did you mean 'digits'")],
)  # fmt: skip
def test_bad_questions_are_refused(table, point, dataset, message):
    with pytest.raises(TableError, match=message):
        advise(table, *point, dataset=dataset, options=FAST)


def test_a_table_that_cannot_be_judged_says_why(table):
    with pytest.raises(TableError, match="the table has plain only"):
        advise(table.where(arm="plain"), 1000, 100, 5000, options=FAST)
    with pytest.raises(TableError, match="digits: every pair has seed 0"):
        advise(table.where(seed=0), 1000, 100, 5000, options=FAST)
    with pytest.raises(TableError, match="no runs with upstream data"):
        advise(table.where(arm="scratch"), 1000, 100, 5000, options=FAST)
