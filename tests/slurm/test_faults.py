"""One fault of each kind on a real SLURM: the job comes back by itself and every step counts."""

from __future__ import annotations

import signal
from collections.abc import Callable
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


def finish_and_check(place: Any, all_ended: Callable[[], None], num_cells: int, *, saved: bool) -> None:
    """Everything is done without help; `saved`: the fault came with a warning, so no step was taken twice."""
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
        (lambda sandbox, job: sandbox.kill_rank(job), False),
        (lambda sandbox, job: (sandbox.power_off(1), sandbox.power_off(2)), False),
    ],
    ids=["warning", "requeue", "preemption", "killed-rank", "power-cut"],
)
def test_the_job_comes_back(
    place: Any, running: Callable[[], str], sandbox: Any, all_ended: Callable[[], None], num_cells: int,
    fault: Callable[[Any, str], Any], saved: bool,
) -> None:  # fmt: skip
    fault(sandbox, running())
    finish_and_check(place, all_ended, num_cells, saved=saved)


def test_a_controller_that_restarts_changes_nothing(
    place: Any, running: Callable[[], str], sandbox: Any, all_ended: Callable[[], None], num_cells: int
) -> None:
    job = running()
    sandbox.script("stop-ctld")
    status = place.run("status")
    assert status.returncode == 0
    assert "from the store alone" in status.stdout
    sandbox.kill_rank(job)
    sandbox.script("start-ctld")
    finish_and_check(place, all_ended, num_cells, saved=False)


def test_a_frozen_process_that_wakes_up_late_is_fenced_off(
    place: Any, running: Callable[[], str], sandbox: Any, all_ended: Callable[[], None], num_cells: int
) -> None:
    """A node that lost its connection: its job was started elsewhere while its processes live on."""
    job = running()
    sandbox.kill_rank(job, signal.SIGSTOP)
    sandbox.requeue(job)
    finish_and_check(place, all_ended, num_cells, saved=False)
