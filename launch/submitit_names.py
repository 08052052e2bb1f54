"""Every name of submitit that is not of its documented interface: with a new version, look here first.

submitit hands scripts to SLURM. What they run is a command line, never a pickled function. Beside these names the
launcher uses `SlurmExecutor` and `JobEnvironment`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from submitit import JobEnvironment, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths
from submitit.slurm.slurm import _make_sbatch_string

from dbscale.launch.sbatch_options import OWNED_VARIABLES

__all__ = ["REFUSALS", "log_of_job", "render", "submit_array"]
REFUSALS = (FailedJobError, FailedSubmissionError)
"""sbatch failed, or said something that holds no job's number."""


def submit_array(folder: Path, command: str, values: Mapping[str, Any], num_elements: int) -> int:
    """Hand `render`'s script to sbatch; SLURM's id. `folder` must exist. Raises one of REFUSALS with sbatch's words."""
    executor = SlurmExecutor(folder)
    executor.update_parameters(**values)
    if num_elements > 1:
        executor.parameters["map_count"] = num_elements
    with _own_environment():
        return int(executor._submit_command(command).job_id)


def render(folder: Path, command: str, values: Mapping[str, Any], num_elements: int) -> str:
    """The script: `command` on every rank of each element, their logs in `folder`."""
    count = num_elements if num_elements > 1 else None
    return _make_sbatch_string(command=command, folder=folder, map_count=count, **values)


def log_of_job(folder: Path) -> str:
    """Path of the log that submitit writes for this process."""
    job = JobEnvironment()
    return str(JobPaths(folder, job.job_id, job.global_rank).stdout)


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """A job that submits another must not lend it its own numbers: sbatch passes the environment on, and what SLURM
    does not set anew (restarts, memory, tasks) would be taken for the new job's. Nor may variables that stand for
    sbatch's options change what a script says."""
    ours = {name: os.environ.pop(name) for name in list(os.environ)
            if (name.startswith(("SLURM_", "SUBMITIT_")) and name != "SLURM_CONF") or name in OWNED_VARIABLES}  # fmt: skip
    try:
        yield
    finally:
        os.environ.update(ours)
