"""Which bundle starts next, how bundles are cut by shape, what is left after a crash."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dbscale.strict import validate
from dbscale.study.cost import CostModel
from dbscale.study.grid import Grid, expand
from dbscale.study.plan import Plan, make_plan
from dbscale.study.store import CellState
from launch.schedule import Task, next_ready, rest_after_crash, tasks_of


@pytest.fixture
def plan(workplace: Any) -> Plan:
    grid = validate(Grid, yaml.safe_load((workplace.folder / "grid.yaml").read_text()), where="grid.yaml")
    return make_plan(grid, expand(grid, {}), states={}, cost=CostModel(), target_s=1e9, workers=1)


def task(*keys: str, parents: tuple[str, ...] = (), restarts: int = 0) -> Task:
    return Task(keys=keys, parents=frozenset(parents), stage="finetune", wave=1, predicted_s=1.0, restarts=restarts)


def test_a_task_waits_for_its_parents_and_no_longer() -> None:
    teacher, student = task("teacher"), task("student", parents=("teacher",))
    assert next_ready([student, teacher], []) is teacher
    assert next_ready([student], [teacher]) is None
    assert next_ready([student], []) is student


def test_one_shape_keeps_lineages_together(plan: Plan) -> None:
    tasks = tasks_of(plan, CostModel(), lambda stage: "same")
    assert [each.wave for each in tasks] == [1, 2]
    assert not tasks[0].parents
    assert all("pretrain" in key for key in tasks[1].parents)


def test_another_shape_for_finetunes_makes_tasks_of_their_own(plan: Plan) -> None:
    tasks = tasks_of(plan, CostModel(), lambda stage: stage == "finetune")
    assert [each.stage for each in tasks] == ["pretrain", "finetune", "distill", "finetune"]
    assert set(tasks[1].parents) == set(tasks[0].keys)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_order_of_finishing_runs_every_task(data: st.DataObject) -> None:
    """Whatever depends on whatever earlier: nothing is forgotten, and parents always come first."""
    names = [str(i) for i in range(data.draw(st.integers(1, 8)))]
    tasks = [
        task(name, parents=tuple(data.draw(st.sets(st.sampled_from(names[:i])) if i else st.just(set()))))
        for i, name in enumerate(names)
    ]
    waiting, done = data.draw(st.permutations(tasks)), []
    while waiting:
        ready = next_ready(waiting, [])
        assert ready is not None
        assert ready.parents <= {key for each in done for key in each.keys}
        waiting.remove(ready)
        done.append(ready)
    assert len(done) == len(tasks)


def test_the_cell_that_killed_its_process_comes_last_with_its_children() -> None:
    whole = task("a", "a1", "b", "b1", "c")
    parents = {"a1": ("a",), "b1": ("b",)}
    rest = rest_after_crash(whole, {"a": "interrupted", "a1": "new", "b": "done", "b1": "new", "c": "failed"}, parents)
    assert rest is not None
    assert rest.keys == ("b1", "a", "a1")
    assert rest.restarts == 0, "two cells were settled"


def test_only_starts_that_settle_nothing_count() -> None:
    states: dict[str, CellState] = {"a": "interrupted", "b": "new"}
    rest = rest_after_crash(task("a", "b", restarts=1), states, {})
    assert rest is not None and rest.restarts == 2
    rest = rest_after_crash(task("a", "b", restarts=1), {**states, "b": "done"}, {})
    assert rest is not None and rest.restarts == 0


def test_nothing_is_left_when_all_is_settled() -> None:
    assert rest_after_crash(task("a", "b"), {"a": "done", "b": "blocked"}, {}) is None
