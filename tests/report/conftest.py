"""A synthetic study with known laws: distillation helps below a known D_p and hurts above it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dbscale.report.table import Run, RunTable
from dbscale.strict import validate
from dbscale.study.cell import Cell
from dbscale.study.cost import CostModel
from dbscale.study.grid import Grid, Point, expand
from dbscale.study.plan import PlanRecord, make_plan, record, write_plan
from dbscale.study.recipe import DeiT
from dbscale.study.store import Attempt, Row, Store, Timing, Upstream

BOUNDARY = 8000.0
MODELS = {
    name: {"kind": "deit", "heads": heads, "head_width": 16, "depth": 4, "patch_size": 8}
    for name, heads in (("h1", 1), ("h2", 2), ("h4", 4))
}
PARAMS = {"h1": 50_000, "h2": 200_000, "h4": 800_000}
TEST_SAMPLES = 2000


def true_error(arm: str, upstream: int, params: int, downstream: int) -> float:
    """Additive laws whose upstream terms cross at BOUNDARY; from scratch the upstream term is at its worst."""
    if arm == "scratch":
        return 0.75 * downstream**-0.05
    exponent = 0.5 if arm == "plain" else 0.3
    term = 0.1 * (upstream / BOUNDARY) ** -exponent
    return float(0.02 + term + 1.5 * params**-0.3 + 1.2 * downstream**-0.5)


def noisy(error: float, rng: np.random.Generator, *, noise: float) -> float:
    seed_noise = error * np.exp(noise * rng.standard_normal())
    return rng.binomial(TEST_SAMPLES, min(max(seed_noise, 0.0), 0.99)) / TEST_SAMPLES


@pytest.fixture(scope="session")
def make_table() -> Callable[..., RunTable]:
    """Runs without a store: three students, two arms, five D_p, three D_f, scratch runs too."""

    def make(
        *, upstream=(500, 2000, 8000, 32000, 128000), downstream=(100, 1000, 10000), seeds=(0, 1, 2),
        datasets=("digits",), noise=0.02, error: Callable[..., float] = true_error, students=PARAMS,
    ) -> RunTable:  # fmt: skip
        rng = np.random.default_rng(0)
        arms = [("scratch", 0), *itertools.product(("plain", "distilled"), upstream)]
        runs = tuple(
            Run(
                variant="base", arm=arm, student=student, num_params=students[student],
                upstream_dataset="fractals" if size else "", upstream_samples=size, dataset=dataset,
                downstream_samples=labels, seed=seed, num_test_samples=TEST_SAMPLES, num_classes=10,
                error_rate=noisy(error(arm, size, students[student], labels), rng, noise=noise),
                key=f"{arm}-{student}-{size}-{dataset}-{labels}-{seed}",
            )
            for seed, (arm, size), student, dataset, labels in itertools.product(
                seeds, arms, students, datasets, downstream
            )
        )  # fmt: skip
        return RunTable(runs, grid="synthetic", question="Does distillation pay?")

    return make


def grid_config() -> dict:
    training = {"budget": {"epochs": 2}, "optim": {"lr": 1e-3}, "global_batch": 64, "precision": "fp32"}
    return {
        "name": "tiny", "question": "Does distilling from h1 <pay>?",
        "datasets": {"fractals": {"source": "fractals"}, "digits": {"source": "digits"}},
        "upstream": {"dataset": "fractals", "num_samples": [500, 2000, 8000, 32000]},
        "downstream": [{"dataset": "digits", "num_samples": [100, 1000]}],
        "image_size": 32, "scratch": True, "seeds": [0, 1],
        "models": MODELS,
        "students": ["h2", "h4"], "teachers": {"h2": "h1", "h4": "h1"},
        "pretrain": training, "finetune": training, "distill": {"alpha": 0.5},
    }  # fmt: skip


def cell_row(cell: Cell, rng: np.random.Generator) -> Row:
    """A plausible row for any cell of `grid_config`."""
    recipe, init = cell.recipe, cell.init
    arm = "distilled" if any(each.recipe.stage == "distill" for each in cell.lineage) else "plain"
    if init is None and recipe.stage == "finetune":
        arm = "scratch"
    params = PARAMS[f"h{recipe.model.heads}"]  # type: ignore[union-attr]
    size = init.recipe.data.num_samples if init else recipe.data.num_samples if recipe.stage != "finetune" else 0
    labels = recipe.data.num_samples if recipe.stage == "finetune" else 10_000
    error = noisy(true_error(arm, size, params, labels), rng, noise=0.02)
    upstream = None
    if init:
        upstream = Upstream(
            dataset="fractals", num_samples=size, stage=init.recipe.stage, error_rate=0.3,
            linear_probe_error=min(1.0, error + 0.1), transrate=1 / (error + 0.1),
        )  # fmt: skip
    timing = Timing(
        train_time_s=3.0, eval_time_s=0.5, step_time_s=0.01, images_per_s=900.0, data_wait_share=0.01,
        device_time_s=3.6,
        peak_memory_bytes=10**8, device="cpu", host="node <1>",
    )  # fmt: skip
    return Row(
        key=cell.key, id=cell.id, stage=recipe.stage, arm=arm, model="deit", dataset=recipe.data.dataset,
        num_samples=recipe.data.num_samples, seed=recipe.seed, num_params=params, num_classes=10,
        num_steps=recipe.num_steps, samples_seen=recipe.num_steps * 64, train_flops=1e12, error_rate=error,
        test_loss=2 * error, num_test_samples=TEST_SAMPLES, train_loss=error, weights_sha256="0" * 64,
        upstream=upstream,
        timing=timing,
    )  # fmt: skip


def attempt(number: int, status: str, reason: str | None, log: str | None) -> Attempt:
    return Attempt.model_validate(
        {
            "number": number,
            "status": status,
            "host": "node",
            "pid": 1,
            "started": 10.0,
            "ended": 12.0,
            "reason": reason,
            "log": log,
        }
    )


def small_plan() -> tuple[PlanRecord, tuple[Point, ...]]:
    grid = validate(Grid, grid_config(), where="conftest")
    points = expand(grid, {"fractals": "f", "digits": "d"})
    cost = CostModel()
    return record(make_plan(grid, points, states={}, cost=cost, target_s=60.0), cost), points


MakeStore = Callable[..., Store]


@pytest.fixture(scope="session")
def make_store_in() -> MakeStore:
    """`make_store_in(folder, failed)`: a planned grid `tiny` with rows of all cells but those that `failed` picks."""

    def make(folder: Path, failed: Callable[[Cell], bool] = lambda cell: False) -> Store:
        store = Store(folder / "out")
        plan, points = small_plan()
        write_plan(store, plan)
        rng = np.random.default_rng(1)
        lost: set[str] = set()
        for cell in {parent.key: parent for point in points for parent in _lineage(point.cell)}.values():
            store.write_spec(cell.spec())
            if any(parent.key in lost for parent in cell.parents):
                store.write_attempt(cell.key, attempt(1, "blocked", "its parent has no row", "logs/two.txt"))
                lost.add(cell.key)
            elif failed(cell):
                store.write_attempt(cell.key, attempt(1, "failed", "non-finite <loss> at step 7", "logs/one.txt"))
                lost.add(cell.key)
            else:
                store.write_attempt(cell.key, attempt(1, "done", None, "logs/ok.txt"))
                store.write_row(cell_row(cell, rng))
        return store

    return make


@pytest.fixture(scope="session")
def reported(make_store_in: MakeStore, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A grid in which one teacher failed, with its report written."""
    from dbscale.report.page import write_report

    def fails(cell: Cell) -> bool:
        return (cell.recipe.model, cell.recipe.data.num_samples, cell.recipe.seed) == (DeiT(**MODELS["h1"]), 2000, 1)

    store = make_store_in(tmp_path_factory.mktemp("reported"), fails)
    write_report(store, "tiny")
    return store


@pytest.fixture
def make_store(make_store_in: MakeStore, tmp_path: Path) -> MakeStore:
    return lambda failed=lambda cell: False: make_store_in(tmp_path, failed)


def _lineage(cell: Cell) -> list[Cell]:
    return [ancestor for parent in cell.parents for ancestor in _lineage(parent)] + [cell]
