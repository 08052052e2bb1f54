"""Which backend computes the distillation losses changes a run by rounding alone, and the row says which it was."""

from __future__ import annotations

from typing import Any

import pytest

from dbscale.study.recipe import Attention, DeiT, Distill
from dbscale.study.resources import Resources

LOSSES = ("loss", "ce", "kl", "attention_kl")
DISTILL = Distill(alpha=0.5, temperature=3.0, attention=Attention(beta=20.0, layers="all", head_map="repeat"))


def distilled(bench: Any, backend: str) -> tuple[Any, list[dict[str, Any]]]:
    """Row and metrics of a student of two heads that a teacher of one has taught, logits and maps."""
    teacher = bench.cell(model=DeiT(heads=1, head_width=8, depth=2, patch_size=4))
    student = bench.cell("distill", teacher=teacher, distill=DISTILL)
    resources = Resources(zero_stage=None, threads=1, kd_backend=backend)  # pyright: ignore[reportArgumentType]
    for cell in (teacher, student):
        outcome = bench.run(cell, resources)
        assert outcome.status == "done", outcome.reason
    return outcome.row, bench.fingerprint(student)["metrics"]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # the tracer's
def test_the_backend_changes_a_run_by_rounding_alone(bench_of):
    row, metrics = distilled(bench_of("auto"), "auto")
    assert (row.kd_backend, row.resources["attention_backend"]) == ("eager", "eager") and row.teacher is not None
    other_row, other_metrics = distilled(bench_of("compile"), "compile")
    assert (other_row.kd_backend, other_row.resources["attention_backend"]) == ("compile", "compile")
    assert other_row.weights_sha256 != row.weights_sha256, "the two did run different code"
    assert len(metrics) == len(other_metrics) > 0
    for line, other in zip(metrics, other_metrics, strict=True):
        for name in LOSSES:
            # Maps of a fresh student differ by a KL of 6e-6, of which the textbook form has few digits.
            assert other[name] == pytest.approx(line[name], rel=1e-4, abs=1e-7), name
    assert other_row.train_loss == pytest.approx(row.train_loss, rel=1e-4)


def test_the_row_says_what_computed_the_losses(bench):
    row, _ = distilled(bench, "eager")
    assert (row.kd_backend, row.resources["attention_backend"]) == ("eager", "eager")


def test_a_run_without_a_teacher_names_no_backend(bench):
    row = bench.run(bench.cell()).row
    assert row.kd_backend is None and "attention_backend" not in row.resources
