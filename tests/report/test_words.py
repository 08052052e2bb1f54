"""Sentences name the numbers they rest on, and say when something is missing."""

from __future__ import annotations

import dataclasses

import pytest

from dbscale.report.answers import answers, mean_delta
from dbscale.report.notes import about_fits, about_missing
from dbscale.report.schema import BoundaryRecord, Estimate, FitRecord
from dbscale.report.table import MissingPoint, RunTable
from dbscale.report.words import about, listed, symbols


def boundary(**changes: object) -> BoundaryRecord:
    common = {
        "variant": "base", "upstream_dataset": "fractals", "dataset": "digits", "student": None, "num_params": None,
        "downstream_samples": None, "method": "law", "law": "additive", "status": "crossing",
        "direction": "positive_to_negative", "measured_range": (500.0, 128000.0), "probability": 1.0,
        "upstream_samples": Estimate(value=8123.0, low=6512.0, high=9876.0),
    }  # fmt: skip
    return BoundaryRecord.model_validate(common | changes)


def unclear() -> BoundaryRecord:
    """What the paired runs alone may say."""
    return boundary(
        method="law_free",
        law=None,
        status="no_crossing",
        direction="within_noise",
        upstream_samples=None,
        probability=0.4,
    )


@pytest.fixture
def table(make_table) -> RunTable:
    return make_table(students={"h2": 200_000}, downstream=(100, 1000))


def test_a_crossing_is_said_with_its_interval(table):
    (text,) = answers(table, [boundary(), unclear()])
    assert "about 8,100 upstream images (90 % interval 6,500 to 9,900)" in text


def test_an_open_interval_is_not_hidden(table):
    (text,) = answers(table, [boundary(upstream_samples=Estimate(value=8000.0, low=6000.0)), unclear()])
    assert "6,000 to beyond the searched range" in text


def test_an_extrapolation_is_called_one(table):
    root = Estimate(value=300_000.0, low=200_000.0, high=500_000.0)
    (text,) = answers(table, [boundary(status="extrapolated", upstream_samples=root), unclear()])
    assert "an extrapolation" in text
    assert "outside the measured 500 to 128,000" in text


@pytest.mark.parametrize(
    ("direction", "phrase"),
    [
        ("always_positive", "nowhere clearly raises it"),
        ("always_negative", "nowhere clearly lowers it"),
        ("within_noise", "do not differ consistently beyond noise"),
        ("negative_to_positive", "the reverse of a boundary"),
        ("positive_to_negative", "is not established"),
    ],
)
def test_no_crossing_is_an_answer(table, direction, phrase):
    free = boundary(method="law_free", law=None, status="no_crossing", direction=direction, upstream_samples=None)
    (text,) = answers(table, [free])
    assert phrase in text
    assert "mean difference" in text


def test_a_second_opinion_that_disagrees_is_given(table):
    (text,) = answers(table, [boundary(), unclear()])
    assert "do not establish it (40 % of the drawn curves cross)" in text


def test_a_boundary_that_only_the_paired_runs_show_is_said_as_theirs(table):
    law = boundary(status="no_crossing", direction="within_noise", upstream_samples=None)
    free = boundary(method="law_free", law=None, upstream_samples=Estimate(value=2000.0, low=1000.0, high=4000.0))
    (text,) = answers(table, [law, free])
    assert "pays up to about 2,000 upstream images" in text
    assert "rests on the paired runs alone: by the fitted laws the arms do not differ beyond noise" in text
    assert "no boundary" not in text


def test_a_sign_that_only_the_laws_see_is_said_as_theirs(table):
    sign = "always_positive" if mean_delta(table, table.settings[0]) > 0 else "always_negative"
    (text,) = answers(table, [boundary(status="no_crossing", direction=sign, upstream_samples=None), unclear()])
    assert "do not differ consistently beyond noise" in text
    assert "rests on the paired runs alone: by the fitted laws distilling" in text


def test_a_seeds_own_boundary_is_no_answer(table):
    alone = boundary(method="law_free", law=None, seed=1, direction="always_negative", upstream_samples=None)
    (text,) = answers(table, [boundary(), unclear(), alone])
    assert "about 8,100 upstream images" in text


def test_a_poor_law_does_not_give_the_answer(table):
    poor = chosen_fit(rmsd_log=0.4)
    free = boundary(method="law_free", law=None, upstream_samples=Estimate(value=2000.0, low=1000.0, high=4000.0))
    (text,) = answers(table, [boundary(), free], [poor])
    assert "about 2,000 upstream images" in text
    assert "8,100" not in text
    assert "too poorly to locate a boundary" in text


def test_a_law_that_contradicts_the_measured_sign_is_not_believed(table):
    wrong = "always_negative" if mean_delta(table, table.settings[0]) > 0 else "always_positive"
    law = boundary(status="no_crossing", direction=wrong, upstream_samples=None)
    (text,) = answers(table, [law, unclear()])
    assert "do not differ consistently beyond noise" in text


def lost(run, state: str = "failed") -> MissingPoint:
    return MissingPoint(
        run.variant, run.arm, run.student, run.upstream_samples, run.dataset, run.downstream_samples, run.seed, run.key,
        run.key, state, "out of memory", "log.txt",
    )  # fmt: skip


def test_missing_cells_say_what_their_absence_does(table):
    gone = table.where(arm="distilled", upstream_samples=2000)
    rest = table.where(lambda run: run not in gone.runs)
    notes = " ".join(about_missing(dataclasses.replace(rest, missing=tuple(lost(run) for run in gone))))
    assert f"{len(gone)} of {len(table)} points have no result ({len(gone)} failed)" in notes
    assert "No distilled run on digits at 2,000 upstream images has finished" in notes
    assert f"{len(gone)} pairs" in notes


def test_a_complete_table_needs_no_words(table):
    assert not list(about_missing(table))


def chosen_fit(**changes: object) -> FitRecord:
    common = {
        "law": "additive", "variant": "base", "upstream_dataset": "fractals", "dataset": "digits", "arm": "plain",
        "student": None, "status": "fitted", "chosen": True, "rmsd_log": 0.05, "noise_log": 0.05,
    }  # fmt: skip
    return FitRecord.model_validate(common | changes)


def test_two_values_of_an_axis_are_not_an_exponent(table):
    found = list(about_fits(table, table.settings[0], [chosen_fit()]))
    assert any("two values of D_f only" in note for note in found)


def test_laws_that_fail_for_one_reason_share_a_sentence(table):
    failed = {"status": "failed", "chosen": False, "reason": "D_f has one value"}
    fits = [chosen_fit(), chosen_fit(law="product", **failed), chosen_fit(law="transfer_gap", **failed)]
    found = [note for note in about_fits(table, table.settings[0], fits) if "No fit" in note]
    assert found == ["No fit of product and transfer_gap to plain error on digits: D_f has one value."]


def test_both_arms_share_a_warning(table):
    poor = {"rmsd_log": 0.3, "held_out_rmsd_log": 0.5}
    fits = [chosen_fit(**poor), chosen_fit(arm="distilled", **poor)]
    found = " ".join(about_fits(table, table.settings[0], fits))
    assert "misses plain error by 30 % (6.0 times the spread between seeds) and distilled error by 30 %" in found
    assert "without the runs at 128,000 upstream images" in found


@pytest.mark.parametrize(("value", "text"), [(8123, "8,100"), (999, "1,000"), (12.4, "12"), (1_281_167, "1,300,000")])
def test_counts_are_said_with_two_digits(value, text):
    assert about(value) == text


def test_equations_are_shown_in_their_own_letters():
    assert symbols("E = E_inf + A*D_p^-alpha") == "E = E∞ + A·D_p^(−α)"


def test_lists_read_as_sentences_do():
    assert [listed(items) for items in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
