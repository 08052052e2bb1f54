"""Laws and boundaries recover what a synthetic world was made of, and say so when there is nothing to recover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dbscale.report import schema
from dbscale.report.fits import Findings, Options, fit_grid
from dbscale.report.schema import BoundaryFile, LawsFile
from dbscale.report.table import RunTable

FAST = Options(num_bootstraps=60)
TRUE_BOUNDARY = 8000.0
SMALL = {"students": {"h1": 50_000}, "downstream": (100, 1000, 10000)}


@pytest.fixture(scope="module")
def findings(make_table) -> Findings:
    return fit_grid(make_table(), options=FAST)


def pooled(findings: Findings, method: str) -> schema.BoundaryRecord:
    return next(r for r in findings.boundary.boundaries if r.student is None and r.method == method)


def test_the_true_law_is_chosen_and_recovered(findings: Findings):
    chosen = {fit.arm: fit for fit in findings.laws.fits if fit.chosen}
    assert {fit.law for fit in chosen.values()} == {"additive"}
    for arm, alpha in (("plain", 0.5), ("distilled", 0.3)):
        assert chosen[arm].params["alpha"].value == pytest.approx(alpha, abs=0.07)
        assert (chosen[arm].rmsd_log or 1.0) < 0.1


def test_every_law_is_fitted_to_each_arm(findings: Findings):
    found = {(fit.law, fit.arm, fit.student) for fit in findings.laws.fits if fit.status == "fitted"}
    students = ("h1", "h2", "h4")
    for arm in ("plain", "distilled"):
        assert {("additive", arm, None), ("product", arm, None)} <= found
        assert {("transfer_gap", arm, student) for student in students} <= found


@pytest.mark.parametrize("method", ["law", "law_free"])
def test_the_boundary_is_found_near_the_truth(findings: Findings, method: str):
    record = pooled(findings, method)
    assert record.status == "crossing"
    assert record.upstream_samples is not None
    assert abs(math.log2(record.upstream_samples.value / TRUE_BOUNDARY)) < 0.7
    low, high = record.upstream_samples.low, record.upstream_samples.high
    assert low is not None and high is not None and low < TRUE_BOUNDARY < high


def test_boundaries_cover_every_student_and_label_count(findings: Findings):
    places = {(r.student, r.downstream_samples) for r in findings.boundary.boundaries if r.method == "law"}
    assert places == {(s, d) for s in ("h1", "h2", "h4") for d in (100, 1000, 10000)} | {(None, None)}


def test_held_out_points_are_predicted_by_a_fit_that_never_saw_them(findings: Findings):
    held = [p for p in findings.laws.predictions if p.held_out]
    assert {p.upstream_samples for p in held} == {128000}
    ratios = [math.log(p.predicted / p.measured) for p in held if p.predicted]
    assert np.std(ratios) < 0.3
    assert len(held) == 2 * 3 * 3 * 3


def test_scratch_runs_stay_out_of_the_fits(make_table, findings: Findings):
    table = make_table()
    assert all(fit.num_runs <= len(table.pretrained) // 2 for fit in findings.laws.fits)
    assert not any(p.upstream_samples == 0 for p in findings.laws.predictions)


def test_files_read_back(findings: Findings, tmp_path):
    findings.write(tmp_path)
    assert schema.read(LawsFile, tmp_path / "laws.json") == findings.laws
    assert schema.read(BoundaryFile, tmp_path / "boundary.json") == findings.boundary


def test_equal_tables_give_equal_findings(make_table):
    first, second = (fit_grid(make_table(**SMALL), options=FAST) for _ in range(2))
    assert first == second


def test_arms_that_do_not_differ_have_no_boundary(make_table):
    def same(arm: str, upstream: int, params: int, labels: int) -> float:
        return 0.05 + 4.0 * max(upstream, 50) ** -0.4 + 0.5 * labels**-0.5

    found = fit_grid(make_table(error=same, noise=0.05, **SMALL), options=FAST)
    records = [pooled(found, method) for method in ("law", "law_free")]
    assert [record.status for record in records] == ["no_crossing", "no_crossing"]
    assert all(record.upstream_samples is None for record in records)
    assert "no boundary" in found.boundary.answers[0]


def test_distilling_that_always_helps_is_said_so(make_table):
    def helps(arm: str, upstream: int, params: int, labels: int) -> float:
        return (0.05 + 4.0 * max(upstream, 50) ** -0.4 + 0.5 * labels**-0.5) * (0.7 if arm == "distilled" else 1.0)

    found = fit_grid(make_table(error=helps, **SMALL), options=FAST)
    assert "nowhere clearly raises it" in found.boundary.answers[0]


def test_a_curve_that_does_not_fall_is_named(make_table):
    def rising(arm: str, upstream: int, params: int, labels: int) -> float:
        return 0.2 + 0.01 * math.log(max(upstream, 1)) + 0.5 * labels**-0.5

    notes = " ".join(fit_grid(make_table(error=rising, **SMALL), options=FAST).laws.notes)
    assert "does not fall with upstream data in 3 of 3 curves" in notes
    assert "h1 at 100 labels" in notes


def test_a_poor_fit_is_named_with_its_number(make_table):
    def humped(arm: str, upstream: int, params: int, labels: int) -> float:
        return 0.4 if upstream in (2000, 32000) else 0.1

    notes = " ".join(fit_grid(make_table(error=humped, **SMALL), options=FAST).laws.notes)
    assert "law misses plain error by" in notes
    assert "times the spread between seeds" in notes


def test_too_few_sizes_are_an_answer(make_table):
    found = fit_grid(make_table(upstream=(500, 2000), **SMALL), options=FAST)
    assert {fit.status for fit in found.laws.fits} == {"not_enough_data"}
    assert all("at least 3 values of D_p" in fit.reason for fit in found.laws.fits)
    assert "too little data" in found.boundary.answers[0]
    assert any("only measurements are shown" in note for note in found.laws.notes)


def test_a_half_finished_study_fits_the_arm_it_has(make_table):
    table = make_table(**SMALL).where(lambda run: run.arm != "distilled" or run.upstream_samples < 1000)
    found = fit_grid(table, options=FAST)
    assert {fit.arm for fit in found.laws.fits if fit.chosen and fit.status == "fitted"} == {"plain"}
    assert {curve.arm for curve in found.laws.curves} == {"plain"}
    assert "complete pairs at 1 values of D_p" in found.boundary.answers[0]


def test_a_teacher_among_the_students_counts_for_its_arm_alone(make_table):
    table = make_table(downstream=(100, 1000)).where(lambda run: (run.arm, run.student) != ("distilled", "h1"))
    found = fit_grid(table, options=FAST)
    assert {record.student for record in found.boundary.boundaries} == {"h2", "h4", None}
    drawn = {(curve.arm, curve.student) for curve in found.laws.curves if curve.student}
    assert ("plain", "h1") in drawn and ("distilled", "h1") not in drawn


def test_one_student_and_one_label_count_still_have_laws(make_table):
    found = fit_grid(make_table(downstream=(1000,), students={"h2": 200_000}), options=FAST)
    chosen = {fit.law for fit in found.laws.fits if fit.chosen}
    assert chosen <= {"additive", "product", "m4_product"} and chosen
    gaps = [fit for fit in found.laws.fits if fit.law == "transfer_gap"]
    assert all(fit.status == "failed" and "downstream_samples" in fit.reason for fit in gaps)


def test_a_plain_arm_alone_is_described(make_table):
    table = make_table(**SMALL).where(lambda run: run.arm != "distilled")
    found = fit_grid(table, options=FAST)
    assert not found.boundary.boundaries
    assert "falls from" in found.boundary.answers[0]
    assert "cannot be judged" in found.boundary.answers[0]


def test_an_empty_table_concludes_nothing():
    found = fit_grid(RunTable(()), options=FAST)
    assert found.laws.fits == ()
    assert "nothing to conclude" in found.boundary.answers[0]


def test_two_downstream_sets_are_fitted_apart(make_table):
    found = fit_grid(make_table(datasets=("digits", "letters"), **SMALL), options=FAST)
    assert len(found.boundary.answers) == 2
    assert {fit.dataset for fit in found.laws.fits} == {"digits", "letters"}


def test_the_transfer_gap_is_told_for_every_student_and_arm(make_table):
    def gapped(arm: str, upstream: int, params: int, labels: int) -> float:
        return 0.9 * labels**-0.3 if arm == "scratch" else (3.0 * upstream**-0.4 + 0.2) * labels**-0.3

    found = fit_grid(make_table(error=gapped, noise=0.01, **SMALL), options=FAST)
    assert {(item.student, item.arm) for item in found.laws.transfer} == {("h1", "plain"), ("h1", "distilled")}
    for item in found.laws.transfer:
        assert item.gap.value == pytest.approx(0.2, rel=0.25)
        assert item.share == pytest.approx(0.2 / (3.0 * 128000**-0.4 + 0.2), abs=0.1)
        # From scratch the same error takes (0.9 / 0.227)^(1 / 0.3) times the labels: too far beyond 10,000 to say.
        assert item.worth is None
