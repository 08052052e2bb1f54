"""`make grid CLUSTER=slurm` on a real SLURM, with a stand-in for training: to the end, again, cancelled, broken off."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm
ONE_BUNDLE_EACH = ("--set", "cluster.target_min=0.01")


def test_a_grid_goes_through_and_typed_again_submits_nothing(
    place: Any, submit: Callable[..., Any], all_ended: Callable[[], None], num_cells: int
) -> None:
    place.behave(steps=20, step_s=0.05)
    words = ["submit", "--cluster", str(place.folder / "cluster.yaml"), *ONE_BUNDLE_EACH]
    first = place.start(*words, umask=0o027)
    shown, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    assert shown.count("submitted") == 4  # wave 1 in two arrays, for this cluster's may have 3 elements; the reducer
    during = submit(*ONE_BUNDLE_EACH)
    assert re.search(r"nothing to submit: \d+ cells wait or run", during.stdout)
    assert "in SLURM" in place.run("status", "--wait", "30").stdout
    all_ended()
    assert len(place.done()) == num_cells
    assert all(steps == list(range(20)) for steps in place.steps().values())
    assert (place.store.grid_dir("tiny") / "report.html").exists()
    assert "complete" in place.run("status", "--wait", "30").stdout
    assert "cells are done" in submit(*ONE_BUNDLE_EACH).stdout
    attempts = [place.store.last_attempt(key) for key in place.done()]
    assert all(each.job and each.log for each in attempts)
    assert all("=== " in Path(each.log).read_text() for each in attempts)
    assert not list(place.store.root.rglob("*.pkl")), "nothing is handed over as code"
    assert {path.stat().st_mode & 0o777 for path in place.store.grid_dir("tiny").glob("jobs/*")} == {0o700}
    written = [path for path in place.store.root.rglob("*") if path.name != "fake.json" and not path.is_symlink()]
    assert not [path for path in written if path.stat().st_mode & 0o027]


def test_a_new_value_submits_only_the_new_cells(
    place: Any, submit: Callable[..., Any], all_ended: Callable[[], None], num_cells: int
) -> None:
    place.behave(steps=30, step_s=0.1)
    assert submit().returncode == 0
    assert submit("--set", "downstream.0.num_samples=[10, 20, 30]").returncode == 0
    records = [json.loads(path.read_text()) for path in place.store.grid_dir("tiny").glob("submits/*.json")]
    cells = [key for record in records for keys in record["elements"] for key in keys]
    assert len(cells) == len(set(cells)) == num_cells + 6
    place.behave(steps=30, step_s=0)
    all_ended()
    assert len(place.done()) == num_cells + 6
    assert (place.store.grid_dir("tiny") / "report.html").exists()


def test_cancel_stops_this_grid_for_good_and_nothing_else(
    place: Any, submit: Callable[..., Any], sandbox: Any, wait_until: Callable[..., None],
    all_ended: Callable[..., None], num_cells: int,
) -> None:  # fmt: skip
    place.behave(steps=400, step_s=0.1)
    assert submit().returncode == 0
    assert submit("--set", "name=other", "--set", "seeds=[1]").returncode == 0
    wait_until(lambda: len(place.steps()) > 1)
    others = other_jobs(sandbox)
    cancelled = place.run("cancel")
    assert "cancelled job" in cancelled.stdout, cancelled.stderr
    wait_until(lambda: sandbox.jobs() == others)
    time.sleep(5)  # a requeue would show by now
    assert sandbox.jobs() == others
    assert {place.store.state(key) for key in place.steps() if "-s0-" in key} == {"interrupted"}
    assert {place.store.state(key) for key in place.steps() if "-s1-" in key} == {"running"}
    place.behave(steps=400, step_s=0)
    assert submit().returncode == 0
    all_ended()
    assert len(place.done()) == 2 * num_cells
    assert all(steps == list(range(400)) for steps in place.steps().values())


def other_jobs(sandbox: Any) -> list[str]:
    """Raw ids of the jobs of the grid named other."""
    lines = sandbox.slurm("squeue", "--noheader", "--array", "--format=%A %j").splitlines()
    return [line.split()[0] for line in lines if "dbscale-other-" in line]


def test_a_grid_typed_right_after_cancel_goes_on_whole(
    place: Any, submit: Callable[..., Any], wait_until: Callable[..., None], all_ended: Callable[..., None],
    num_cells: int,
) -> None:  # fmt: skip
    """The jobs that were cancelled still end; their cells are nobody's."""
    place.behave(steps=60, step_s=0.1)
    assert submit(*ONE_BUNDLE_EACH).returncode == 0
    wait_until(lambda: len(place.steps()) == 4)
    assert place.run("cancel").returncode == 0
    again = submit(*ONE_BUNDLE_EACH)
    assert again.returncode == 0, again.stderr
    place.behave(steps=60, step_s=0)
    all_ended()
    assert len(place.done()) == num_cells
    assert all(steps == list(range(60)) for steps in place.steps().values())
    assert (place.store.grid_dir("tiny") / "report.html").exists()


def test_a_failed_teacher_blocks_its_students_with_the_reason(
    place: Any, submit: Callable[..., Any], all_ended: Callable[[], None], num_cells: int
) -> None:
    place.behave(fail=["pretrain-deit_h1w16d2-up-n16"])
    assert submit().returncode == 0
    all_ended()
    assert len(place.done()) == num_cells - 6
    status = place.run("status", "--wait", "30").stdout
    assert "loss is not finite" in status
    assert "blocked" in status


def test_a_login_node_that_dies_while_submitting_leaves_nothing_twice(
    place: Any, submit: Callable[..., Any], all_ended: Callable[[], None], num_cells: int
) -> None:
    place.behave(steps=20, step_s=0.02)
    for delay_s in (0.8, 1.4, 2.0):
        process = place.start("submit", "--cluster", str(place.folder / "cluster.yaml"), *ONE_BUNDLE_EACH)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert submit(*ONE_BUNDLE_EACH).returncode == 0
    all_ended()
    assert len(place.done()) == num_cells
    assert all(sorted(set(steps)) == list(range(20)) for steps in place.steps().values())
    assert (place.store.grid_dir("tiny") / "report.html").exists()


def test_job_scripts_that_cannot_start_are_shown_as_lost(
    place: Any, submit: Callable[..., Any], wait_until: Callable[..., None], all_ended: Callable[..., None]
) -> None:
    broken = submit("--set", "cluster.slurm.setup=[exit 7]", "--set", "cluster.requeue_limit=0")
    assert broken.returncode == 0
    all_ended()

    def status() -> str:
        return place.run("status", "--wait", "30").stdout

    wait_until(lambda: "FAILED, exit code 7:0" in status())  # accounting lags
    assert "log: " in status()
