"""Run a plan in this process, cell after cell: for debuggers, and for `dbscale run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dbscale.study.resources import StopRequest
from dbscale.study.store import Store
from launch.cluster import Cluster
from launch.schedule import Task
from launch.worker import Result, run_bundle


def run_inline(
    tasks: Sequence[Task], store: Store, data_dir: Path, cluster: Cluster, stop: StopRequest
) -> dict[str, Result]:
    """What became of each cell; call inside `stop_on_signals(stop)`."""
    results: dict[str, Result] = {}
    for task in tasks:
        if stop.requested:
            break
        done = run_bundle(task.keys, store, data_dir, cluster.shape(task.stage).resources, stop)
        results.update({result.key: result for result in done})
    return results
