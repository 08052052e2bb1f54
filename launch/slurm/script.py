"""What SLURM is handed: submitit's sbatch parameters for one array, and the exact script they make.

The script opens the job's log itself, starts one rank per task, and when that fails asks to be requeued.
No value of a config reaches a shell unquoted: words are checked by `launch.cluster`, paths here. The exception are
the `setup` lines, which are shell by their nature and come from the cluster file alone.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from launch.cluster import Shape
from launch.ranks import thread_environment
from launch.slurm.queue import SlurmError

SAFE_PATH = re.compile(r"[\w /.,:+@=~()\[\]-]+")
"""SLURM expands `%` and `\\` in paths and has quoting rules of its own in `#SBATCH` lines; newlines end them."""

LOG_TRIES, LOG_WAIT_S = 360, 5
"""Half an hour, as `launch.slurm.job` waits for a store; then it uses up a requeue."""


def parameters(
    shape: Shape, *, folder: Path, name: str, requeue_limit: int, after: Sequence[int] = ()
) -> dict[str, Any]:
    """For `submitit.SlurmExecutor.update_parameters`: one task per rank; logs in `folder`."""
    slurm = shape.slurm
    extra: dict[str, Any] = {"requeue": True, "output": "/dev/null"}  # the log is `log_lines`' business
    if slurm.reservation is not None:
        extra["reservation"] = slurm.reservation
    asked: dict[str, Any] = {
        "job_name": name,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "time": slurm.time_limit_min,
        "nodes": slurm.nodes,
        "ntasks_per_node": shape.tasks_per_node,
        "cpus_per_task": slurm.cpus_per_task,
        "gpus_per_node": slurm.gpus_per_node or None,
        "mem": None if slurm.memory_gb is None else f"{int(slurm.memory_gb * 1024)}M",
        "signal_delay_s": slurm.signal_delay_s,
        "array_parallelism": slurm.array_parallelism,
        "dependency": ":".join(["afterany", *map(str, after)]) if after else None,
        "additional_parameters": extra,
        "setup": setup_lines(shape, folder, requeue_limit),
        # From SLURM 22.05 on srun no longer takes the CPUs per task from sbatch.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={slurm.cpus_per_task}"],
        "stderr_to_stdout": True,
    }
    return {key: value for key, value in asked.items() if value is not None} | {"wckey": None}


def setup_lines(shape: Shape, folder: Path, requeue_limit: int) -> list[str]:
    """All that comes before `srun`; the cluster file's own lines may break in any way, so they come late."""
    exports = {"PYTHONSAFEPATH": "1", **thread_environment(shape.resources)}
    return [
        *requeue_lines(requeue_limit),
        *log_lines(folder),
        *(f"export {name}={value}" for name, value in exports.items()),
        *shape.slurm.setup,
        # An empty or relative entry is the folder the job was submitted from, whatever PYTHONSAFEPATH says.
        """export PYTHONPATH=$(printf %s "${PYTHONPATH:-}" | tr : '\\n' | grep ^/ | paste -sd:)""",
    ]


def requeue_lines(requeue_limit: int) -> list[str]:
    """Requeue a job that a rank's death or a node's fault ended; never one that is being cancelled, that SLURM
    requeues itself, or that was started again elsewhere while this shell lived on.

    SLURM is asked until slurmctld answers, for it may be restarting.
    """
    return [
        # One element of every array has the array's number as its raw id, which alone would mean the whole array.
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        "requeue_unless_done() {",
        f'  [ "$1" -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {int(requeue_limit)} ] || exit "$1"',
        "  for _ in $(seq 50); do",
        '    start=$(squeue --noheader --jobs="$job" --Format=State:20,RestartCnt:10) || { sleep 6; continue; }',
        '    [ "$(echo $start)" = "RUNNING ${SLURM_RESTART_COUNT:-0}" ] || break',
        '    scontrol requeue "$job" && break',
        "    sleep 6",
        "  done",
        '  exit "$1"',
        "}",
        "trap 'requeue_unless_done $?' EXIT",
    ]


def log_lines(folder: Path) -> list[str]:
    """Opened here, because SLURM gives up a job for good whose log's file system is read-only just then."""
    return [
        f'log={shlex.quote(str(folder))}/"${{job}}_0_log.out"',
        f'for _ in $(seq {LOG_TRIES}); do {{ : >>"$log"; }} 2>/dev/null && break; sleep {LOG_WAIT_S}; done',
        'exec >>"$log" 2>&1 || exit 74',
    ]


def python_command() -> str:
    return shlex.quote(sys.executable)


def check_path(path: Path, what: str) -> Path:
    """`path`, absolute. Raises SlurmError for characters that mean something to SLURM or a shell."""
    absolute = path.absolute()
    if not SAFE_PATH.fullmatch(str(absolute)):
        bad = sorted(set(SAFE_PATH.sub("", str(absolute))))
        raise SlurmError(f"{what} {str(absolute)!r} holds {bad}, which SLURM or a shell could misread; choose another")
    return absolute


def render(folder: Path, values: dict[str, Any], num_elements: int) -> str:
    """The sbatch script as submitit writes it."""
    command = " ".join([python_command(), "-u -m submitit.core._submit", shlex.quote(str(folder))])
    return _make_sbatch_string(
        command=command, folder=folder, map_count=num_elements if num_elements > 1 else None, **values
    )
