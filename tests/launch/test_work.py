"""`dbscale work`: workers that come, die and return; what each takes, leaves, retries and gives up."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from dbscale.launch.cli import main
from dbscale.launch.commands import work
from dbscale.launch.lease import LEASE_NAME, Leases
from dbscale.study.store import Attempt, Failure

UP = "pretrain-deit_h1w16d2-up-n16"


@pytest.fixture
def inline(workplace: Any, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`dbscale work` in this process, without long waits."""
    monkeypatch.setattr(work, "AVOID_S", 0.05)
    return lambda *options: main(["work", *workplace.where, *options])


def finished(workplace: Any) -> Counter[str]:
    """How many attempts ended with a row, by cell."""
    paths = workplace.store.root.glob("cells/*/attempts/*.json")
    return Counter(path.parts[-3] for path in paths if json.loads(path.read_text())["status"] == "done")


def survive(workplace: Any, *, workers: int, kills: int, seed: int) -> None:
    """Keep `workers` alive until the grid is done; `kills` of them, chosen at random, die by SIGKILL and are replaced."""
    draw, silent = random.Random(seed), {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def start() -> subprocess.Popen[str]:
        return workplace.start("work", "--no-report", "--lease", "5", **silent)

    crew = [start() for _ in range(workers)]
    deadline, killed = time.monotonic() + 600, 0
    while any(each.poll() is None for each in crew):
        assert time.monotonic() < deadline, "the workers never ended"
        if killed < kills and workplace.steps():
            victim = draw.randrange(workers)
            crew[victim].kill()
            crew[victim].wait()
            crew[victim], killed = start(), killed + 1
        time.sleep(draw.uniform(0.05, 0.4))
    assert {each.returncode for each in crew} == {0}
    assert killed == kills, "the grid was done too early to try them"


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "leases alone"])
def test_six_workers_killed_at_random_write_every_row_once(
    workplace: Any, inline: Any, num_cells: int, locks: bool
) -> None:
    workplace.behave(steps=30, step_s=0.02, checkpoint=5, locks=locks)
    survive(workplace, workers=6, kills=6, seed=1)
    rows = workplace.rows()
    assert len(rows) == num_cells
    assert set(finished(workplace).values()) == {1}
    undisturbed = workplace.store.root.rename(workplace.folder / "kept")
    assert undisturbed.exists()
    assert inline() == 0
    assert workplace.rows() == rows


@pytest.mark.slow
def test_twenty_workers_killed_at_random_write_every_row_once(workplace: Any, num_cells: int) -> None:
    workplace.behave(steps=100, step_s=0.02, checkpoint=5)
    survive(workplace, workers=20, kills=40, seed=2)
    assert len(workplace.rows()) == num_cells
    assert set(finished(workplace).values()) == {1}


def test_one_worker_starts_the_plan_runs_it_and_reports(workplace: Any, inline: Any, num_cells: int) -> None:
    assert inline() == 0
    assert len(workplace.done()) == num_cells
    assert (workplace.store.grid_dir("tiny") / "plan.json").exists()
    assert (workplace.store.grid_dir("tiny") / "report.html").exists()


def test_a_failed_cell_is_left_alone_until_it_is_asked_for(workplace: Any, inline: Any, num_cells: int) -> None:
    workplace.behave(fail=[UP])
    assert inline() == work.SOME_FAILED
    assert len(workplace.done()) == num_cells - 6
    (failed,) = [key for key in workplace.store.standings(keys(workplace)) if key.startswith(UP)]
    assert inline() == work.SOME_FAILED
    assert len(workplace.store.attempts(failed)) == 1
    assert inline("--retry") == work.SOME_FAILED
    assert len(workplace.store.attempts(failed)) == 2, "once for each worker"
    workplace.behave()
    assert inline("--retry") == 0
    assert len(workplace.done()) == num_cells


def keys(workplace: Any) -> list[str]:
    return sorted(path.name for path in (workplace.store.root / "cells").iterdir())


@pytest.mark.parametrize(("failures", "is_tried"), [(2, True), (3, False)])
def test_what_the_machine_did_is_tried_again_as_often_as_a_job(
    workplace: Any, inline: Any, num_cells: int, failures: int, is_tried: bool
) -> None:
    workplace.behave(fail=[UP])
    inline()
    (key,) = [key for key in keys(workplace) if key.startswith(UP)]
    failed = workplace.store.last_attempt(key)
    for number in range(1, failures + 1):
        workplace.store.write_attempt(key, failed.model_copy(update={"number": number, "failure": Failure.STORAGE}))
    workplace.behave()
    assert inline("--set", "cluster.requeue_limit=2") == (0 if is_tried else work.SOME_FAILED)
    assert (len(workplace.done()) == num_cells) == is_tried


@pytest.mark.parametrize("fails", [False, True])
def test_where_another_worker_reduces_this_one_says_how_many_are_done(
    workplace: Any, inline: Any, num_cells: int, fails: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.behave(fail=[UP] if fails else [])
    folder = workplace.store.grid_dir("tiny")
    folder.mkdir(parents=True)
    with Leases().hold(folder / LEASE_NAME, print) as held:
        assert held and inline() == (work.SOME_FAILED if fails else 0)
    done = num_cells - 6 if fails else num_cells
    assert f"{done} of {num_cells} cells are done; another worker reduces" in capsys.readouterr().out
    assert not (folder / "report.html").exists()


def test_a_cell_that_kills_every_worker_is_given_up(workplace: Any, num_cells: int) -> None:
    workplace.behave(die=[UP])
    for _ in range(60):
        if workplace.run("work", "--no-report").returncode == work.SOME_FAILED:
            break
    assert len(workplace.done()) == num_cells - 6
    (attempts,) = [workplace.store.attempts(key) for key in keys(workplace) if key.startswith(UP)]
    assert attempts[-1].status == "failed"
    assert f"died {work.MOST_DEATHS} times in a row" in (attempts[-1].reason or "")


def attempt(status: Any, reason: str | None = None, step: int | None = None) -> Attempt:
    return Attempt(number=1, status=status, host="h", pid=1, started=0, reason=reason, resumed_from_step=step)


def test_only_silent_deaths_without_progress_count() -> None:
    dead, stopped = attempt("interrupted", "killed"), attempt("interrupted", "SIGTERM")
    assert work.deaths_in_a_row([]) == 0
    assert work.deaths_in_a_row([dead, dead, attempt("running")]) == 3
    assert work.deaths_in_a_row([dead, stopped]) == 0
    assert work.deaths_in_a_row([dead, stopped, dead]) == 1
    assert work.deaths_in_a_row([dead, attempt("interrupted", "killed", 5), attempt("interrupted", "killed", 5)]) == 2


def test_a_worker_that_is_asked_to_stop_says_how_to_go_on(
    workplace: Any, inline: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num_cells: int
) -> None:
    def interrupted(self: work.Worker, task: Any) -> None:
        self.stop.ask("SIGTERM")

    monkeypatch.setattr(work.Worker, "_work_on", interrupted)
    assert inline() == work.STOPPED
    assert f"stopped (SIGTERM) with {num_cells} cells left" in capsys.readouterr().err


def test_many_ranks_are_refused(inline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert inline("--set", "cluster.resources.num_processes=2") == 1
    assert "one worker for each GPU" in capsys.readouterr().err
