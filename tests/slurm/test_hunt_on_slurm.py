"""`make hunt CLUSTER=slurm` on a real SLURM, with a stand-in for training: from wave to wave by itself, through a fault."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from dbscale.study.hunt import read_log

pytestmark = pytest.mark.slurm
HUNT = {"range": [16, 256], "per_octave": 1, "budget_hours": 1, "wave": 4, "finetunes": 1}
ROOT = 70.0


def test_a_hunt_goes_from_wave_to_wave_though_the_job_between_two_is_started_again(
    place: Any, sandbox: Any, wait_until: Callable[..., None], all_ended: Callable[..., None]
) -> None:
    grid = yaml.safe_load((place.folder / "grid.yaml").read_text())
    (place.folder / "grid.yaml").write_text(
        yaml.safe_dump(grid | {"hunt": HUNT, "students": ["h2"], "min_effect": 0.01})
    )
    place.behave(steps=1, step_s=0.0, boundary={"root": ROOT, "slope": 0.1, "noise": 0.1})
    typed = place.run("hunt", "--cluster", str(place.folder / "cluster.yaml"))
    assert typed.returncode == 0, typed.stderr
    assert "the job that plans the next wave" in typed.stdout
    started_again: list[str] = []

    def is_over() -> bool:
        for path in place.store.grid_dir("tiny").glob("submits/*.json"):
            with contextlib.suppress(ValueError, FileNotFoundError):
                record = json.loads(path.read_text())
                job = str(record["job"])
                if record["kind"] == "reduce" and not started_again and job in sandbox.jobs("RUNNING"):
                    sandbox.requeue(job)
                    started_again.append(job)
        log = read_log(place.store, "tiny")
        return log is not None and log.waves[-1].stopped is not None

    wait_until(is_over, 900.0)
    all_ended(300.0)
    log = read_log(place.store, "tiny")
    assert log is not None and started_again
    last = log.waves[-1]
    assert last.stopped == "crossing"
    assert len(place.done()) == 7 * last.findings[0].num_pairs  # nothing was run for a wave that was planned twice
    assert all(steps == [0] for steps in place.steps().values())
    assert (place.store.grid_dir("tiny") / "report.html").exists()
