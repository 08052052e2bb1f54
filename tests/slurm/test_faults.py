"""One fault of each kind on a real SLURM: the job comes back by itself and every step counts."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slurm
STEPS = 60


@pytest.fixture
def running(place: Any, submit: Callable[..., Any], sandbox: Any, wait_until: Callable[..., None]) -> Callable[[], str]:
    """Submit the grid with slow steps and wait for the first; the raw id of a running job."""

    def start() -> str:
        place.behave(steps=STEPS, step_s=0.1, checkpoint=5)
        assert submit().returncode == 0
        wait_until(lambda: any(len(steps) > 7 for steps in place.steps().values()))
        return sandbox.jobs("RUNNING")[0]

    return start


@pytest.fixture
def finish_and_check(
    place: Any, sandbox: Any, wait_until: Callable[..., None], all_ended: Callable[[], None], num_cells: int
) -> Callable[..., None]:
    """Once the fault has struck, everything is done without help; `saved`: it came with a warning, so no step was
    taken twice."""

    def finish(*, saved: bool) -> None:
        wait_until(sandbox.restarts)
        check(place, all_ended, num_cells, saved=saved)

    return finish


def check(place: Any, all_ended: Callable[[], None], num_cells: int, *, saved: bool) -> None:
    place.behave(steps=STEPS, step_s=0, checkpoint=5)
    all_ended()
    assert len(place.done()) == num_cells
    for steps in place.steps().values():
        assert sorted(set(steps)) == list(range(STEPS))
        assert len(steps) == STEPS or not saved
    assert max(len(place.store.attempts(key)) for key in place.done()) > 1
    assert (place.store.grid_dir("tiny") / "report.html").exists()


@pytest.mark.parametrize(
    ("fault", "saved"),
    [
        (lambda sandbox, job: sandbox.send(job, "USR2"), True),
        (lambda sandbox, job: sandbox.requeue(job), True),
        (lambda sandbox, job: sandbox.preempt(), True),
        (lambda sandbox, job: sandbox.tell("scontrol", "update", f"JobId={job}", "TimeLimit=1"), True),
        (lambda sandbox, job: sandbox.kill_rank(job), False),
        (lambda sandbox, job: sandbox.kill_batch_shell(job), True),
        (lambda sandbox, job: (sandbox.power_off(1), sandbox.power_off(2)), False),
    ],
    ids=["warning", "requeue", "preemption", "time-limit", "killed-rank", "killed-batch-shell", "power-cut"],
)
def test_the_job_comes_back(
    running: Callable[[], str], sandbox: Any, finish_and_check: Callable[..., None],
    fault: Callable[[Any, str], Any], saved: bool,
) -> None:  # fmt: skip
    fault(sandbox, running())
    finish_and_check(saved=saved)


def test_a_job_that_nobody_could_requeue_is_handed_in_again_by_the_reducer(
    place: Any, running: Callable[[], str], sandbox: Any, all_ended: Callable[..., None], num_cells: int
) -> None:
    """Its script and its rank are gone at once, as on a slow machine after SLURM's few seconds between TERM and KILL."""
    job = running()
    assert sandbox.kill_batch_shell(job)
    assert sandbox.kill_rank(job)
    check(place, lambda: all_ended(900.0), num_cells, saved=False)  # twice through the grid
    logs = [path.read_text() for path in place.store.grid_dir("tiny").glob("jobs/*/*_0_log.out")]
    assert sum("handed in again: a reducer after them" in text for text in logs) == 1


def test_a_controller_that_restarts_changes_nothing(
    place: Any, running: Callable[[], str], sandbox: Any, finish_and_check: Callable[..., None]
) -> None:
    job = running()
    sandbox.script("stop-ctld")
    status = place.run("status")
    assert status.returncode == 0
    assert "from the store alone" in status.stdout
    sandbox.kill_rank(job)
    sandbox.script("start-ctld")
    finish_and_check(saved=False)


def test_a_frozen_process_does_not_hold_up_its_job(
    place: Any, running: Callable[[], str], sandbox: Any, finish_and_check: Callable[..., None]
) -> None:
    job = running()
    assert sandbox.kill_rank(job, signal.SIGSTOP)
    sandbox.requeue(job)
    finish_and_check(saved=False)


def test_processes_of_a_node_that_was_cut_off_are_fenced_off(
    place: Any, running: Callable[[], str], sandbox: Any, finish_and_check: Callable[..., None],
    wait_until: Callable[..., None],
) -> None:  # fmt: skip
    """Its job was started elsewhere while its processes live on: they end without a word to the store."""
    job = running()
    place.behave(steps=STEPS, step_s=2, checkpoint=5)  # SLURM takes its time
    sandbox.cut_off(int(sandbox.node_of(job).removeprefix("n")))
    logs = place.store.grid_dir("tiny") / "jobs"
    wait_until(lambda: any("superseded by a later start" in path.read_text() for path in logs.glob("*/*_log.out")))
    finish_and_check(saved=False)


def test_preemption_with_term_alone(
    running: Callable[[], str], sandbox: Any, finish_and_check: Callable[..., None], wait_until: Callable[..., None]
) -> None:
    running()
    with sandbox.no_user_signal():
        sandbox.preempt()
        wait_until(sandbox.restarts)
    finish_and_check(saved=True)


def test_a_rank_of_one_element_costs_the_other_elements_nothing(
    place: Any, submit: Callable[..., Any], sandbox: Any, wait_until: Callable[..., None], all_ended: Callable[[], None]
) -> None:
    """One element of an array has the array's number as its own: to requeue by it would requeue them all."""
    place.behave(steps=STEPS, step_s=0.1, checkpoint=5)
    assert submit("--set", "cluster.target_min=0.01").returncode == 0
    wait_until(lambda: len(place.steps()) == 4 and all(len(steps) > 7 for steps in place.steps().values()))
    jobs = sandbox.slurm("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").split()
    array = next(job for job in jobs if "_" in job).partition("_")[0]
    wait_until(lambda: sandbox.kill_rank(array))
    wait_until(sandbox.restarts)
    place.behave(steps=STEPS, step_s=0, checkpoint=5)
    all_ended()
    attempts = sorted(len(place.store.attempts(key)) for key in place.done() if "pretrain" in key)
    assert attempts == [1, 1, 1, 2]


@pytest.mark.parametrize("fault", ["store_read_only", "store_full"])
def test_a_store_that_cannot_be_written_to_for_a_while_costs_no_job(
    place: Any, submit: Callable[..., Any], sandbox: Any, wait_until: Callable[..., None],
    all_ended: Callable[..., None], num_cells: int, faults: ModuleType, fault: str,
) -> None:  # fmt: skip
    """Of jobs that run just then, and of one that starts."""
    with faults.disk_of_its_own(place.store.root) as own_disk:
        if not own_disk:
            pytest.skip("nothing may be mounted here")
        place.behave(steps=STEPS, step_s=0.1, checkpoint=5)
        assert submit("--set", "cluster.target_min=0.01").returncode == 0
        wait_until(lambda: len(place.steps()) == 4 and all(len(steps) > 7 for steps in place.steps().values()))
        sandbox.requeue(sandbox.jobs("RUNNING")[0])
        chaos = faults.Chaos(place, sandbox, random.Random(0), [], own_disk)
        getattr(faults, fault)(chaos, "", seconds=10)
        wait_until(sandbox.restarts)
        check(place, all_ended, num_cells, saved=False)
