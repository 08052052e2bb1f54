"""The four arms of a study, run: each trains what it says, from paired beginnings, and what should cost alike does."""

from __future__ import annotations

import pytest
import torch

from dbscale.data import load_manifest
from dbscale.report.reduce import collect
from dbscale.strict import validate
from dbscale.study.cost import CostModel
from dbscale.study.grid import Grid, expand, merged_cells
from dbscale.study.plan import make_plan, record

TRAINING = {"budget": {"steps": 12}, "optim": {"lr": 1e-3}, "global_batch": 16, "precision": "fp32"}
ARMS = ["plain", "distilled", "plain_matched", "self_distilled"]
SMALL = {"kind": "deit", "head_width": 8, "depth": 2, "patch_size": 4}
GRID = {
    "name": "arms", "question": "?", "datasets": {"up": {"source": "fractals"}, "down": {"source": "fractals"}},
    "upstream": {"dataset": "up", "num_samples": [40]}, "downstream": [{"dataset": "down", "num_samples": [24]}],
    "image_size": 16, "models": {"h1": {**SMALL, "heads": 1}, "h2": {**SMALL, "heads": 2}},
    "students": ["h2"], "teachers": {"h2": "h1"}, "arms": ARMS, "seeds": [0],
    "pretrain": TRAINING, "finetune": TRAINING, "distill": {"alpha": 0.5, "head": "parallel"},
}  # fmt: skip


@pytest.fixture
def points(bench):
    """One finetune an arm, all run."""
    prints = {name: load_manifest(bench.data_dir / "shards" / name).fingerprint for name in ("up", "down")}
    found = expand(validate(Grid, GRID, where="t"), prints)
    for cell in merged_cells(found):
        bench.store.write_spec(cell.spec())
        outcome = bench.run(cell)
        assert outcome.status == "done", outcome.reason
    return {point.arm: point for point in found}


def test_arms_cost_and_lead_to_rows_as_their_names_say(points, bench):
    row = {arm: bench.store.read_row(point.cell.init.key) for arm, point in points.items()}
    distilled, by_self = points["distilled"].cell.init, points["self_distilled"].cell.init
    paid = row["distilled"].train_flops + bench.store.read_row(distilled.teacher.key).train_flops
    # Planned by predicted operations, which leave the head out; counted ones agree to 2 %, and a step is 5 % here.
    assert row["plain_matched"].train_flops == pytest.approx(paid, rel=0.05)
    assert row["plain_matched"].num_steps > row["plain"].num_steps == row["distilled"].num_steps
    assert row["self_distilled"].num_params == bench.store.read_row(by_self.teacher.key).num_params

    weights = {arm: bench.weights(point.cell.init) for arm, point in points.items()}
    teacher = bench.weights(by_self.teacher)
    assert not torch.equal(teacher["head.weight"], weights["plain"]["head.weight"]), "another run than the plain arm's"
    assert len({row[arm].weights_sha256 for arm in ARMS}) == 4

    grid = validate(Grid, GRID, where="t")
    plan = make_plan(grid, tuple(points.values()), states={}, cost=CostModel(), target_s=60)
    table = collect(bench.store, record(plan, CostModel()))
    assert [run.arm for run in table] == ARMS and table.arms == tuple(ARMS)
    assert [run.upstream_key for run in table] == [points[arm].cell.init.key for arm in ARMS]
    assert [run.teacher_params is not None for run in table] == [False, True, False, True]
