"""Every name of submitit that is not of its documented interface: with a new version, look here first.

Beside these the launcher uses `LocalExecutor`, `SlurmExecutor`, `Job` and `JobEnvironment`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from submitit import JobEnvironment
from submitit.core.utils import FailedJobError, environment_variables
from submitit.slurm.slurm import _make_sbatch_string

__all__ = ["FailedJobError", "clear_cut_off_result", "environment_variables", "render"]


def render(folder: Path, python: str, values: Mapping[str, Any], num_elements: int) -> str:
    """The script that `SlurmExecutor(folder, python=python)` with these parameters hands to sbatch."""
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    count = num_elements if num_elements > 1 else None
    return _make_sbatch_string(command=command, folder=folder, map_count=count, **values)


def clear_cut_off_result() -> None:
    """submitit refuses to write its result beside a half-written one of a process that was killed just then."""
    path = JobEnvironment().paths.result_pickle
    path.with_suffix(path.suffix + ".save_tmp").unlink(missing_ok=True)
