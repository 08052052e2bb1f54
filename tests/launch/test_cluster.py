"""Cluster files: shipped ones load, mistakes are named, stages override; a plan is cut into tasks; workers are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dbscale.errors import ConfigError
from dbscale.launch import sbatch_options
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


SHIPPED = {"executor": "slurm", "slurm": {"gpus_per_node": 1, "memory_gb": 64}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gres": "gpu:a100:2"}, "gres 'gpu:a100:2' asks for 2 GPUs a node and gpus_per_node for 1; set gpus_per_node to"),
        ({"gres": "gpu:a100:1;id"}, "slurm.gres"),
        ({"gpus_per_node": "a100:0"}, "slurm.gpus_per_node: takes a number of GPUs, or types with numbers such as"),
        ({"gpus_per_node": "a100"}, "found 'a100'"),
        ({"gpus_per_node": -1}, "found -1"),
        ({"gpus_per_node": True}, "found True"),
        ({"gpus_per_node": "1g.5gb:1,a100:1"}, None),
        ({"licenses": "matlab 1"}, "slurm.licenses"),
        ({"memory_per_cpu_gb": 4}, "memory_gb and memory_per_cpu_gb exclude each other in SLURM; set all but one"),
        ({"sbatch": {"mem-per-gpu": "8G"}}, "memory_gb and sbatch.mem-per-gpu exclude each other"),
        ({"array": 0}, "slurm.array: takes true, false (no job arrays) or the most elements of one array, found 0"),
        ({"array": "no"}, "found 'no'"),
        ({"sbatch": {"array": "0-9"}}, "slurm.sbatch: 'array' has a key of its own: write slurm.array"),
        ({"sbatch": {"mem": "8G"}}, "'mem' has a key of its own: write slurm.memory_gb"),
        ({"sbatch": {"time": 60}}, "write slurm.time_limit_min"),
        ({"sbatch": {"ntasks-per-node": 4}}, "'ntasks-per-node' follows from the ranks: write resources.num_processes"),
        ({"sbatch": {"output": "x"}}, "'output' is dbscale's own, which finds, fences and requeues jobs by it; remove it"),
        ({"sbatch": {"dependency": "afterok:1"}}, "'dependency' is dbscale's own"),
        ({"sbatch": {"no-requeue": True}}, "'no-requeue' is dbscale's own"),
        ({"sbatch": {"job-name": "mine"}}, "'job-name' is dbscale's own"),
        ({"sbatch": {"job_name": "mine"}}, "'job_name' is no long option of sbatch"),
        ({"sbatch": {"--mail-user": "me"}}, "'--mail-user' is no long option of sbatch; did you mean 'mail-user'"),
        ({"sbatch": {"p": "gpu"}}, None),
        ({"sbatch": {"exclusive": False}}, "'exclusive' is False; write text or a number, true to pass --exclusive without"),
        ({"sbatch": {"comment": "a$(id)"}}, "'comment' is 'a$(id)', which SLURM or a shell could misread"),
        ({"sbatch": {"comment": "a\nb"}}, "could misread"),
        ({"sbatch": {"comment": ["a"]}}, "'comment' is ['a']; write text"),
        ({"sbatch": {"comment": None}}, "'comment' is None; write text"),
    ],
)  # fmt: skip
def test_a_house_rule_is_kept_or_refused_in_one_sentence(
    tmp_path: Path, change: dict[str, Any], said: str | None
) -> None:
    path = write(tmp_path, {**SHIPPED, "slurm": {**SHIPPED["slurm"], **change}})
    if said is None:
        load_cluster(path)
        return
    with pytest.raises(ConfigError) as error:
        load_cluster(path)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).count(said) == 1


def test_the_reducer_asks_for_no_gpu_and_for_memory_in_the_clusters_words(tmp_path: Path) -> None:
    wishes = {"gres": "gpu:a100:1", "licenses": "scratch", "sbatch": {"gpus-per-task": 1, "mail-type": "END"}}

    def reducer(reducer: dict[str, Any], **slurm: Any) -> Any:
        return (
            load_cluster(write(tmp_path, {"executor": "slurm", "slurm": slurm, "reducer": reducer}))
            .reducer_shape()
            .slurm
        )

    shape = reducer({}, **wishes)
    assert (shape.gres, shape.gpus_per_node, shape.licenses, shape.sbatch) == (None, 0, "scratch", {"mail-type": "END"})
    assert (shape.memory_gb, shape.memory_per_cpu_gb) == (8.0, None)
    for made in (reducer({}, memory_per_cpu_gb=2.0), reducer({"memory_per_cpu_gb": 4.0}, memory_gb=64.0)):
        assert (made.memory_gb, made.memory_per_cpu_gb, made.cpus_per_task) == (None, 4.0, 2)
    assert reducer({"memory_gb": 16.0}, memory_per_cpu_gb=2.0).memory_gb == 16.0
    assert reducer({"memory_gb": None}).memory_gb is None


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


@pytest.mark.parametrize(
    ("section", "name", "taken", "refused"),
    [("cluster", "workers", 1, 0), ("cluster", "cells_per_device", 1, 0), ("cluster", "target_min", 1e-9, 0.0),
     ("cluster", "requeue_limit", 0, -1), ("slurm", "nodes", 1, 0), ("slurm", "cpus_per_task", 1, 0),
     ("slurm", "memory_gb", 1e-9, 0.0), ("slurm", "memory_per_cpu_gb", 1e-9, 0.0), ("slurm", "time_limit_min", 1, 0),
     ("slurm", "signal_delay_s", 1, 0), ("slurm", "array_parallelism", 1, 0), ("slurm", "array", 1, 0),
     ("slurm", "gpus_per_node", 0, -1), ("slurm", "setup", ("x" * 4096,), ("x" * 4097,)),
     ("slurm", "partition", "p" * 256, "p" * 257)],
)  # fmt: skip
def test_every_field_of_a_cluster_ends_where_it_says(section: str, name: str, taken: Any, refused: Any) -> None:
    def made(value: Any) -> Any:
        data = {"executor": "slurm", "slurm": {}} | (
            {name: value} if section == "cluster" else {"slurm": {name: value}}
        )
        cluster = Cluster.model_validate(data)
        return getattr(cluster if section == "cluster" else cluster.slurm, name)

    assert made(taken) == taken
    with pytest.raises(ValueError, match=name):
        made(refused)


def test_what_a_cluster_file_leaves_out() -> None:
    cluster = Cluster.model_validate({"executor": "slurm", "slurm": {}})
    known = {"workers": "auto", "cells_per_device": 1, "target_min": 5.0, "requeue_limit": 3, "device": "cpu"}
    assert known.items() <= cluster.model_dump().items()
    asked = {"nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "memory_gb": None, "time_limit_min": 240,
             "signal_delay_s": 120, "array_parallelism": 64, "array": True, "sbatch": {}, "setup": ()}  # fmt: skip
    assert cluster.slurm is not None and asked.items() <= cluster.slurm.model_dump().items()
    assert [cluster.model_copy(update={"slurm": cluster.slurm.model_copy(update={"array": array})}).slurm.array_limit
            for array in (True, False, 1, 500)] == [None, 1, 1, 500]  # fmt: skip


def test_the_first_option_that_sbatch_lacks_is_named_with_the_nearest() -> None:
    known = sbatch_options.names_in("  --mail-type=type   notify\n  -A, --account=name\n  --comment=name\n")
    assert known == {"mail-type", "account", "comment"}
    sbatch_options.check_names(["mail-type", "comment"], known, where="sbatch here")
    for name, told in (("mail-typ", "did you mean 'mail-type'"), ("account", "known: comment, mail-type|did you mean")):
        with pytest.raises(ConfigError, match=f"slurm.sbatch.{name}: sbatch here has no option --{name}; .*{told}"):
            sbatch_options.check_names(["comment", name], known, where="sbatch here")


def test_cells_share_a_gpu(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    shared = load_cluster("shared_gpu")
    assert shared.num_workers() == 2 * shared.cells_per_device > 2
    assert load_cluster("shared_gpu", ["cells_per_device=3", "resources.num_processes=2"]).num_workers() == 3
    assert load_cluster("local").num_workers() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert load_cluster("shared_gpu").num_workers() == load_cluster("local").num_workers()  # no GPU: cores, as ever


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
