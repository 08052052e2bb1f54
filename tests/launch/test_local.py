"""A plan on this machine: which bundle starts next, what is left after a crash; and `dbscale submit` with a stand-in for
training: to the end, through kills, and again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbscale.launch import local
from dbscale.launch.cli import main
from dbscale.launch.cluster import Task
from dbscale.launch.local import (
    LINGER_S,
    Display,
    LocalJob,
    gpu_environment,
    import_environment,
    next_ready,
    rest_after_crash,
)
from dbscale.study.resources import Resources
from dbscale.study.store import CellState, Store

ONE = ("--set", "cluster.workers=1")


def task(*keys: str, parents: tuple[str, ...] = (), restarts: int = 0) -> Task:
    return Task(keys=keys, parents=frozenset(parents), stage="finetune", wave=1, predicted_s=1.0, restarts=restarts)


def test_a_task_waits_for_its_parents_and_no_longer() -> None:
    teacher, student = task("teacher"), task("student", parents=("teacher",))
    assert next_ready([student, teacher], []) is teacher
    assert next_ready([student], [teacher]) is None
    assert next_ready([student], []) is student


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


def test_what_another_process_runs_is_not_started_again() -> None:
    rest = rest_after_crash(task("a", "b", "c"), {"a": "done", "c": "damaged"}, {})
    assert rest is not None and rest.keys == ("c",)


@pytest.fixture
def inline(workplace: Any, fakes: ModuleType) -> Callable[..., int]:
    """`dbscale submit --cluster inline` in this process."""
    return lambda *options: main(["submit", "--cluster", "inline", *workplace.where, *options])


def steps_are_whole(steps: dict[str, list[int]], num_steps: int) -> bool:
    """Every cell took each of its steps exactly once, over all attempts."""
    return all(taken == list(range(num_steps)) for taken in steps.values())


def test_a_grid_runs_to_its_report_and_says_so_when_typed_again(workplace: Any, num_cells: int) -> None:
    first = workplace.run("submit")
    assert first.returncode == 0, first.stderr
    assert len(workplace.done()) == num_cells
    assert (workplace.store.grid_dir("tiny") / "report.html").exists()
    assert "It pays." in first.stdout
    assert not list(workplace.store.root.rglob("*.pkl")), "workers are command lines"
    assert {path.stat().st_mode & 0o777 for path in workplace.store.grid_dir("tiny").glob("jobs/*")} == {0o700}
    assert {path.suffix for path in workplace.store.grid_dir("tiny").glob("jobs/*/*")} == {".log"}, "only logs are kept"
    before = workplace.rows()
    again = workplace.run("submit")
    assert again.returncode == 0
    assert "all 18 cells are done" in again.stdout
    assert workplace.rows() == before


def test_one_more_axis_value_runs_only_the_new_cells(workplace: Any, inline: Any, num_cells: int) -> None:
    assert inline() == 0
    before = workplace.rows()
    assert inline("--set", "downstream.0.num_samples=[10, 20, 30]") == 0
    after = workplace.rows()
    assert len(after) == num_cells + 6
    assert {key: after[key] for key in before} == before


def test_a_failed_cell_stops_only_what_builds_on_it(workplace: Any, inline: Any, num_cells: int) -> None:
    workplace.behave(fail=["pretrain-deit_h1w16d2-up-n16"])
    assert inline() == 3
    # Lost: the teacher, its 2 finetunes, its student and that one's 2 finetunes.
    assert len(workplace.done()) == num_cells - 6
    workplace.behave()
    assert inline() == 0
    assert len(workplace.done()) == num_cells


def test_a_cell_that_kills_its_process_costs_the_others_nothing(workplace: Any, num_cells: int) -> None:
    workplace.behave(die=["pretrain-deit_h1w16d2-up-n16"])
    run = workplace.run("submit", *ONE, "--set", "cluster.requeue_limit=1")
    assert run.returncode == 3
    assert len(workplace.done()) == num_cells - 6
    assert "its process died 2 times" in workplace.run("status").stdout


def test_ctrl_c_saves_and_the_same_command_goes_on(
    workplace: Any, num_cells: int, wait_until: Callable[..., None]
) -> None:
    workplace.behave(steps=40, step_s=0.02)
    driver = workplace.start("submit", start_new_session=True)
    wait_until(workplace.steps)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to the driver and the workers
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 130
    assert "resume from their last" in errors
    assert 0 < len(workplace.steps()) < num_cells
    assert not any(workplace.store.state(key) == "failed" for key in workplace.steps())
    workplace.behave(steps=40, step_s=0)
    assert workplace.run("submit", *ONE).returncode == 0
    assert len(workplace.done()) == num_cells
    assert steps_are_whole(workplace.steps(), 40)


def test_workers_notice_that_their_driver_was_killed(
    workplace: Any, num_cells: int, wait_until: Callable[..., None]
) -> None:
    workplace.behave(steps=300, step_s=0.02)
    driver = workplace.start("submit")
    wait_until(workplace.steps)
    workers = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.communicate()
    psutil.wait_procs(workers, timeout=300)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    workplace.behave(steps=300, step_s=0)
    assert workplace.run("submit", *ONE).returncode == 0
    assert len(workplace.done()) == num_cells
    assert steps_are_whole(workplace.steps(), 300)


def test_a_killed_worker_is_started_again(workplace: Any, num_cells: int, wait_until: Callable[..., None]) -> None:
    workplace.behave(steps=20, step_s=0.01)
    driver = workplace.start("submit", *ONE)
    wait_until(workplace.steps)
    store = workplace.store
    running = [key for key in workplace.steps() if store.state(key) == "running"]
    os.kill(store.last_attempt(running[0]).pid, signal.SIGKILL)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    assert "a worker died" in errors
    assert len(workplace.done()) == num_cells


def test_a_second_driver_is_told_who_has_the_store(workplace: Any, wait_until: Callable[..., None]) -> None:
    workplace.behave(steps=500, step_s=0.02)
    driver = workplace.start("submit", *ONE)
    wait_until(workplace.steps)
    second = workplace.run("submit")
    assert second.returncode == 1
    assert f"pid {driver.pid}" in second.stderr
    assert "grid other has nothing waiting or running" in workplace.run("cancel", "--set", "name=other").stdout
    assert driver.poll() is None
    assert workplace.run("cancel").returncode == 0
    driver.communicate(timeout=300)
    assert driver.returncode == 130


@pytest.mark.parametrize("path", ["/mine:", ":/mine", "/mine::.", "lib:/mine:."])
def test_a_worker_imports_nothing_from_the_working_folder(path: str) -> None:
    assert import_environment({"PYTHONPATH": path}) == {"PYTHONSAFEPATH": "1", "PYTHONPATH": "/mine"}
    assert import_environment({})["PYTHONPATH"] == ""


@pytest.mark.parametrize(
    ("gpus", "processes", "chosen"),
    [
        (("0", "1"), 1, ["0", "1", "0"]),
        (("GPU-a", "MIG-b"), 1, ["GPU-a", "MIG-b", "GPU-a"]),
        (("0", "1", "2", "3"), 2, ["0,1", "2,3", "0,1"]),
        (("5",), 2, ["5", "5", "5"]),
        ((), 1, [None, None, None]),
    ],
)
def test_slots_share_the_gpus_by_the_names_they_have(
    monkeypatch: pytest.MonkeyPatch, gpus: tuple[str, ...], processes: int, chosen: list[str | None]
) -> None:
    monkeypatch.setattr(local, "visible_gpus", lambda: gpus)
    resources = Resources(num_processes=processes)
    found = [gpu_environment(resources, slot).get("CUDA_VISIBLE_DEVICES") for slot in range(3)]
    assert found == chosen
    assert gpu_environment(resources.model_copy(update={"device": "cpu"}), 0) == {}


def test_a_worker_is_told_by_its_standard_input_and_leaves_a_log_to_its_owner(
    workplace: Any, num_cells: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file that anybody else could write decides what runs."""
    assert workplace.run("submit").returncode == 0
    (folder,) = (workplace.store.grid_dir("tiny") / "jobs").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    logs = sorted(folder.iterdir())
    assert [path.name for path in logs] == [f"{number}.log" for number in range(1, len(logs) + 1)]
    said = "".join(path.read_text() for path in logs)
    assert said.count("=== ") == 2 * num_cells, "start and end of each cell"
    key = workplace.done()[0]
    assert main(["logs", key, "--store", str(workplace.store.root)]) == 0
    assert f"start {key}" in capsys.readouterr().out


class Still:
    """A process that never ends by itself."""

    def __init__(self, code: int | None) -> None:
        self.code, self.told = code, []

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.told.append("kill")
        self.code = -9

    def terminate(self) -> None:
        self.told.append("terminate")


def test_what_is_left_of_a_bundle_that_lost_a_rank_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(local.time, "monotonic", lambda: now[0])
    ended, left, lost = Still(0), Still(None), Still(1)
    job = LocalJob([ended, left], Path("log"))  # type: ignore[list-item]
    now[0] += 10 * LINGER_S
    assert not job.done() and left.told == [], "a rank that ended well leaves the others their time"
    job.ask_to_stop()
    assert left.told == ["terminate"]
    job = LocalJob([lost, left], Path("log"))  # type: ignore[list-item]
    assert not job.done()
    now[0] += LINGER_S
    assert not job.done() and "kill" not in left.told
    now[0] += 0.5
    assert not job.done() and "kill" in left.told
    assert job.done()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_store_damaged_while_a_grid_runs_ends_whole(workplace: Any, num_cells: int, seed: int) -> None:
    """Files cut, flipped, emptied, swapped and linked under a running driver: the same command, typed again, ends with the
    rows of an undisturbed run, and what a link pointed to is as it was."""
    draw, root = random.Random(seed), workplace.store.root
    secret = workplace.folder / "secret.json"
    secret.write_text("{}")
    workplace.behave(steps=30, step_s=0.01)
    driver = workplace.start("submit", "--set", "cluster.workers=2")
    damage = 0
    while driver.poll() is None and damage < 60:
        names = ("row.json", "recipe.json", "attempts/*.json", "progress.json")
        found = sorted(path for name in names for path in root.glob(f"cells/*/{name}"))
        if found:
            hurt(draw.choice(found), draw.choice(found), secret, draw)
            damage += 1
        time.sleep(0.05)
    _, errors = driver.communicate(timeout=300)
    assert "Traceback" not in errors
    workplace.behave(steps=30, step_s=0)
    for _ in range(3):
        for link in root.glob("cells/*/*"):
            if link.is_symlink():
                link.unlink()
        run = workplace.run("submit", "--set", "cluster.workers=2")
        assert "Traceback" not in run.stderr
        if run.returncode == 0:
            break
    assert run.returncode == 0, run.stderr
    assert len(workplace.done()) == num_cells
    assert all(workplace.store.read_row(key) is not None for key in workplace.done())
    assert secret.read_text() == "{}"
    print(f"seed {seed}: {damage} times damaged")


def hurt(path: Path, other: Path, secret: Path, draw: random.Random) -> None:
    """In one of five ways; what a running cell replaces meanwhile is not there, and that is well, too."""
    with contextlib.suppress(FileNotFoundError):
        whole, way = path.read_bytes(), draw.randrange(5)
        path.unlink()  # it may be a link by now
        if way == 0:
            path.write_bytes(whole[: len(whole) // 2])
        elif way == 1:
            path.write_bytes(whole.replace(b"1", b"7", 1))
        elif way == 2:
            path.write_bytes(b"")
        elif way == 3:
            path.write_bytes(other.read_bytes())
        else:
            path.symlink_to(secret)


def test_a_terminal_shows_one_bar_of_all_cells_and_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    display = Display(
        store=Store(tmp_path), total=4, done=1, predicted_s={"a": 2.0, "b": 2.0, "c": 2.0}, workers=2, interactive=True
    )
    display.update([], {"a": "done", "b": "failed"})
    display.update([], {"a": "done", "b": "done"})  # within a second: not looked at
    display.close()
    shown = capsys.readouterr().err
    assert "2/4" in shown and "0 running, 1 failed" in shown and "3/4" not in shown
    assert shown.count("cells") >= 1
