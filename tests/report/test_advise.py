"""Advice asks the laws at one point, and refuses what the table cannot answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbscale.errors import TableError
from dbscale.report.advise import advise, parse_count
from dbscale.report.fits import Options

FAST = Options(num_bootstraps=40)


@pytest.fixture(scope="module")
def table(make_table):
    return make_table(students={"h1": 50_000, "h2": 200_000, "h4": 800_000}, downstream=(100, 1000), seeds=(0, 1))


def test_few_images_call_for_distilling_and_many_do_not(table):
    (few,) = advise(table, 1000, 1000, 200_000, options=FAST)
    (many,) = advise(table, 120_000, 1000, 200_000, options=FAST)
    assert (few.from_laws.decision, many.from_laws.decision) == ("distill", "plain")
    assert "digits" in few.sentence
    assert "expected error" in few.text()


def test_an_unknown_downstream_set_is_named_with_the_nearest(table):
    with pytest.raises(TableError, match="did you mean 'digits'"):
        advise(table, 1000, 1000, 1e5, dataset="digit", options=FAST)


def test_one_arm_cannot_be_compared(table):
    with pytest.raises(TableError, match="the table has plain only"):
        advise(table.where(lambda run: run.arm != "distilled"), 1000, 1000, 1e5, options=FAST)


@pytest.mark.parametrize("point", [(0, 1, 1), (1, -5, 1), (1, 1, float("nan"))])
def test_impossible_points_are_refused(table, point):
    with pytest.raises(TableError, match="must be above 0"):
        advise(table, *point, options=FAST)


@pytest.mark.parametrize(
    ("text", "value"),
    [("200k", 2e5), ("22M", 2.2e7), ("1_281_167", 1281167), ("2e5", 2e5), ("1,000", 1000), ("1.3G", 1.3e9)],
)
def test_counts_are_read_as_people_write_them(text, value):
    assert parse_count(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "k", "many", "-3", "0", "nan", "inf"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(TableError):
        parse_count(text)


@settings(deadline=None)
@given(st.integers(1, 10**12))
def test_plain_integers_are_themselves(number):
    assert parse_count(str(number)) == number
