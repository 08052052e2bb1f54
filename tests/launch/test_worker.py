"""A bundle in one process: every cell gets its turn, blocked ones a second, and a stop is obeyed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial

import pytest

from dbscale.study.resources import Resources, StopRequest
from launch.ranks import Rank, port_of_job, rank_environment, thread_environment
from launch.signals import ProcessMark, stop_on_signals, watch_processes
from launch.worker import LOST_EXIT, Result, end_with_peers, work_through


def runner(statuses: dict[str, list[str]]) -> Callable[[str], Result]:
    """Answers each turn of a key with the next of its statuses."""
    return lambda key: Result(key, statuses[key].pop(0) if len(statuses[key]) > 1 else statuses[key][0])


def test_failures_and_blocks_stop_nobody_else() -> None:
    statuses = {"a": ["failed"], "b": ["blocked"], "c": ["done"]}
    results = work_through(list("abc"), runner(statuses), StopRequest(), ready=lambda key: False)
    assert [result.status for result in results] == ["failed", "blocked", "done"]


def test_a_blocked_cell_gets_another_turn_when_its_parent_came_late() -> None:
    statuses = {"student": ["blocked", "done"], "other": ["done"]}
    results = work_through(["student", "other"], runner(statuses), StopRequest(), ready=lambda key: True)
    assert [result.status for result in results] == ["done", "done"]


def test_a_rank_whose_cell_failed_ends_with_its_peers() -> None:
    """They may wait for it in a collective; what is left of the bundle starts again."""
    with pytest.raises(SystemExit) as ended:
        work_through(
            list("ab"), partial(end_with_peers, runner({"a": ["failed"]})), StopRequest(), ready=lambda _: True
        )
    assert ended.value.code == LOST_EXIT
    run = partial(end_with_peers, runner({"a": ["done"], "b": ["blocked"]}))
    results = work_through(list("ab"), run, StopRequest(), ready=lambda _: False)
    assert [result.status for result in results] == ["done", "blocked"]


def test_a_stop_between_cells_leaves_the_rest_alone() -> None:
    stop = StopRequest()

    def run(key: str) -> Result:
        stop.ask("SIGTERM")
        return Result(key, "interrupted")

    assert [result.key for result in work_through(["a", "b"], run, stop, ready=lambda key: True)] == ["a"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_asks_and_the_handlers_before_come_back(number: signal.Signals) -> None:
    before, stop = signal.getsignal(number), StopRequest()
    with stop_on_signals(stop):
        os.kill(os.getpid(), number)
        assert stop.reason == number.name
    assert signal.getsignal(number) is before


def test_the_death_of_a_watched_process_asks_to_stop(wait_until: Callable[..., None]) -> None:
    import subprocess
    import sys

    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    stop = StopRequest()
    watch_processes(stop, (ProcessMark.of(child.pid),), interval_s=0.01)
    assert not stop.requested
    child.kill()
    wait_until(lambda: stop.requested, 10)
    child.communicate()


def test_another_process_with_the_same_pid_is_not_the_one_marked() -> None:
    mine = ProcessMark.of()
    assert mine.alive
    assert not ProcessMark(mine.pid, mine.started - 100).alive


def test_ranks_come_from_slurm_or_from_submitit_or_are_one() -> None:
    slurm = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "5",
             "SLURM_LOCALID": "1"}  # fmt: skip
    assert Rank.of(slurm) == Rank(5, 1, 8, 4)
    local = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1",
             "SUBMITIT_LOCAL_LOCALID": "1"}  # fmt: skip
    assert Rank.of(local) == Rank(1, 1, 2, 2)
    assert Rank.of({}) == Rank(0, 0, 1, 1)


def test_a_lone_process_meets_nobody_and_each_restart_meets_elsewhere() -> None:
    assert rank_environment(Rank(0, 0, 1, 1), master="h", port=1) == {}
    told = rank_environment(Rank(3, 1, 4, 2), master="node1", port=29500)
    assert (told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"]) == ("3", "1", "4")
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("node1", "29500")
    ports = [port_of_job("1234", restart) for restart in range(20)]
    assert len(set(ports)) == 20
    assert all(1024 < port < 65536 for port in ports)


def test_threads_reach_the_math_libraries() -> None:
    assert thread_environment(Resources(threads=3))["OMP_NUM_THREADS"] == "3"
    assert thread_environment(Resources()) == {}
