"""Real training on a real SLURM: one task per rank over two nodes, DDP and ZeRO, killed and resumed to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dbscale.launch.worker import port_of_job

pytestmark = pytest.mark.slurm
NULL, ONE, TWO, THREE = (f"cluster.resources.zero_stage={each}" for each in ("null", 1, 2, 3))


@pytest.mark.parametrize("engine", [ONE, *(pytest.param(each, marks=pytest.mark.slow) for each in (NULL, TWO, THREE))])
def test_a_killed_rank_costs_time_and_no_bit(
    real: Callable[[str], Any], results: Callable[[Any], dict[str, Any]], sandbox: Any,
    wait_until: Callable[..., None], all_ended: Callable[..., None], engine: str,
) -> None:  # fmt: skip
    shape = [engine, "cluster.resources.num_processes=2", "cluster.slurm.nodes=2"]
    options = [word for each in shape for word in ("--set", each)]
    quiet, shaken = real("quiet"), real("shaken")
    for place in (quiet, shaken):
        done = place.run("submit", "--cluster", str(place.folder / "cluster.yaml"), *options)
        assert done.returncode == 0, done.stderr
        if place is shaken:
            wait_until(lambda: any((shaken.store.root / "cells").glob("*/progress.json")), 300)
            job = sandbox.jobs("RUNNING")[0]
            assert sandbox.public_ports(job) == {port_of_job(job, 0)}
            assert sandbox.kill_rank(job)
        all_ended(600)
    assert len(results(quiet)) == 5
    assert results(shaken) == results(quiet)
    assert max(len(shaken.store.attempts(key)) for key in shaken.done()) > 1
