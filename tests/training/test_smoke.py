"""One step on trial: each task and stage goes through, a misfit is one sentence, and the study's own store is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dbscale.study.recipe import Budget, TimmModel
from dbscale.study.task import Detection, Segmentation
from dbscale.training.smoke import try_step
from tests.training.conftest import PLAIN

SHORT: dict[str, Any] = {"budget": Budget(steps=1), "global_batch": 2}
KINDS: dict[str, dict[str, Any]] = {
    "classes": {},
    "masks": {"dataset": "masks", "task": Segmentation()},
    "boxes": {"dataset": "boxes", "task": Detection(width=64, num_convs=1), "label_smoothing": 0.0, "num_samples": 16},
}


def tried(bench: Any, *cells: Any) -> str | None:
    return try_step([cell.spec() for cell in cells], bench.data_dir, Path("/nowhere"), PLAIN)


@pytest.mark.parametrize("kind", KINDS)
def test_each_task_takes_its_step(kind: str, bench: Any) -> None:
    parent = bench.cell(**SHORT)
    child = bench.cell("finetune", init=parent, **SHORT, **KINDS[kind])
    assert tried(bench, parent, child) is None
    assert bench.store.state(parent.key) == bench.store.state(child.key) == "new", "it has a store of its own"


def test_a_teacher_guides_its_step_in_any_precision(bench: Any) -> None:
    for precision in ("fp32", "bf16", "fp16"):
        teacher = bench.cell(seed=1, precision=precision, **SHORT)
        assert tried(bench, teacher, bench.cell("distill", teacher=teacher, precision=precision, **SHORT)) is None


def test_a_misfit_is_one_sentence(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cell = bench.cell(model=TimmModel(kind="timm", name="resnet10t", kwargs={"no_such": 1}), **SHORT)
    said = tried(bench, cell)
    assert said is not None and "timm cannot create 'resnet10t'" in said and "\n" not in said
    assert "Traceback" in capsys.readouterr().err, "the log says more"
    assert "has fingerprint" in str(tried(bench, bench.cell(fingerprint="0" * 32, **SHORT)))
