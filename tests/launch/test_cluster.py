"""Cluster files: shipped ones load, mistakes are named, stages override; a plan is cut into tasks; workers are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dbscale.errors import ConfigError
from dbscale.launch.cluster import CONFIGS, Cluster, load_cluster, tasks_of
from dbscale.strict import validate
from dbscale.study.cost import CostModel
from dbscale.study.grid import Grid, expand
from dbscale.study.plan import Plan, make_plan

SLURM = {"executor": "slurm", "resources": {"num_processes": 4}, "slurm": {"nodes": 2, "gpus_per_node": 2}}


def write(folder: Path, data: dict[str, Any]) -> str:
    (folder / "c.yaml").write_text(yaml.safe_dump(data))
    return str(folder / "c.yaml")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "clusters").glob("*.yaml")))
def test_shipped_clusters_load_by_name(name: str) -> None:
    assert isinstance(load_cluster(name), Cluster)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"slurm": {"partitoin": "gpu"}}, "partition"),
        ({"resources": {"micro_batchs": 4}}, "micro_batch"),
        ({"stages": {"distil": {}}}, "distil"),
        ({"stages": {"distill": {"slurm": {"qso": "x"}}}}, "qos"),
        ({"resources": {"num_processes": 3}}, "num_processes 3"),
        ({"slurm": None}, "slurm"),
        ({"workers": 0}, "workers"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_cluster(write(tmp_path, {**SLURM, **change}))


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint", "reservation", "exclude"])
@pytest.mark.parametrize("value", ["a b", "a;b", "$(touch x)", "`id`", "a\nb", "a'b", 'a"b', "--wrap=x", ""])
def test_nothing_that_a_shell_could_read_passes_for_a_name(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load_cluster(write(tmp_path, {**SLURM, "slurm": {"nodes": 2, key: value}}))


def test_setup_is_lines_of_shell_and_each_is_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="setup"):
        load_cluster(write(tmp_path, {**SLURM, "slurm": {"nodes": 2, "setup": ["module load cuda\nrm x"]}}))


def test_a_stage_overrides_part_of_its_shape(tmp_path: Path) -> None:
    change = {"stages": {"finetune": {"resources": {"num_processes": 1}, "slurm": {"nodes": 1, "gpus_per_node": 1}}}}
    cluster = load_cluster(write(tmp_path, {**SLURM, **change}))
    assert cluster.shape("pretrain").tasks_per_node == 2
    assert cluster.shape("finetune").tasks_per_node == 1
    assert cluster.shape("finetune").slurm.gpus_per_node == 1
    assert cluster.shape_key("pretrain") == cluster.shape_key("distill") != cluster.shape_key("finetune")


def test_overrides_come_before_validation(tmp_path: Path) -> None:
    assert load_cluster("local", ["workers=3"]).num_workers() == 3
    with pytest.raises(ConfigError, match="did you mean 'workers'"):
        load_cluster("local", ["worker=3"])


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'local'"):
        load_cluster("locla")


def test_auto_workers_are_at_least_one_and_at_most_the_cores() -> None:
    import os

    assert 1 <= load_cluster("local").num_workers() <= len(os.sched_getaffinity(0))


@pytest.fixture
def plan(workplace: Any) -> Plan:
    grid = validate(Grid, yaml.safe_load((workplace.folder / "grid.yaml").read_text()), where="grid.yaml")
    return make_plan(grid, expand(grid, {}), states={}, cost=CostModel(), target_s=1e9, workers=1)


def test_one_shape_keeps_lineages_together(plan: Plan) -> None:
    tasks = tasks_of(plan, CostModel(), load_cluster("local"))
    assert [each.wave for each in tasks] == [1, 2]
    assert [each.stage for each in tasks] == ["pretrain", "distill"], "the heaviest stage gives the resources"
    assert not tasks[0].parents
    assert sorted(tasks[1].parents) == sorted({cell.teacher.key for cell in plan.cells if cell.teacher})
    for task, wave in zip(tasks, plan.waves, strict=True):
        assert task.keys == tuple(cell.key for bundle in wave.bundles for cell in bundle.cells)
        assert task.predicted_s == pytest.approx(sum(bundle.predicted_s for bundle in wave.bundles))


def test_another_shape_for_finetunes_makes_tasks_of_their_own(plan: Plan) -> None:
    tasks = tasks_of(plan, CostModel(), load_cluster("local", ["stages.finetune.resources.threads=2"]))
    assert [each.stage for each in tasks] == ["pretrain", "finetune", "distill", "finetune"]
    assert set(tasks[1].parents) == set(tasks[0].keys)


def test_of_one_wave_what_others_build_on_starts_first_and_the_longest_first(workplace: Any) -> None:
    grid = validate(Grid, yaml.safe_load((workplace.folder / "grid.yaml").read_text()), where="grid.yaml")
    plan = make_plan(grid, expand(grid, {}), states={}, cost=CostModel(), target_s=1e-9)
    tasks = tasks_of(plan, CostModel(), load_cluster("local", ["stages.finetune.resources.threads=2"]))
    kinds = [(task.wave, task.stage) for task in tasks]
    assert kinds == [(1, "pretrain")] * 4 + [(1, "finetune")] * 4 + [(2, "distill")] * 2 + [(2, "finetune")] * 2
    for kind in set(kinds):
        seconds = [task.predicted_s for task in tasks if (task.wave, task.stage) == kind]
        assert seconds == sorted(seconds, reverse=True)
    assert tasks[0].predicted_s > tasks[3].predicted_s, "two sizes of model"
