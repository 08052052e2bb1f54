"""The batch script as a shell sees it: quoting, its log, what it requeues, what its job may import."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main


def calls(slurm: Path, name: str) -> list[str]:
    lines = (slurm / "calls").read_text().splitlines() if (slurm / "calls").exists() else []
    return [line for line in lines if line.startswith(f"{name} ")]


@pytest.mark.parametrize("bad", ["$(touch x)", "a\nb", "`id`", "it's", 'say "x"', "100%", "a\\b", "a;b"])
def test_paths_that_a_shell_or_slurm_could_misread_are_refused(
    submit: Any, slurm: Path, workplace: Any, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = str(workplace.folder / "cluster.yaml")
    code = main(["submit", *workplace.where, "--cluster", cluster, "--store", str(workplace.folder / bad)])
    assert code == 1
    assert "could misread" in capsys.readouterr().err
    assert not calls(slurm, "sbatch")


def test_a_space_in_a_path_is_one_word_to_the_shell(submit: Any, slurm: Path, workplace: Any) -> None:
    store = workplace.folder / "my store"
    assert submit("--store", str(store))[0] == 0
    lines = (slurm / "script-101").read_text().splitlines()
    command = shlex.split(next(line for line in lines if line.startswith("srun ")))
    assert command[-1].startswith(str(store))
    assert run_script(slurm, "echo said >&2").returncode == 0
    assert (Path(command[-1]) / "55_0_log.out").read_text() == "said\n"


def run_script(slurm: Path, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The first script, with `body` in place of srun and of the modules it loads, as job 55."""
    shadow = slurm / "run-101"
    shadow.write_text((slurm / "script-101").read_text().replace("module load cuda", f"srun() {{ {body}; }}"))
    return subprocess.run(
        ["bash", str(shadow)], env={**os.environ, "SLURM_JOB_ID": "55", **environment}, cwd=slurm, text=True,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip


def log_folder(slurm: Path) -> Path:
    found = re.search(r"^log=(\S+)/", (slurm / "script-101").read_text(), re.MULTILINE)
    assert found is not None
    return Path(found[1])


@pytest.mark.parametrize(
    ("start", "restarts", "requeued"),
    [("RUNNING             0         ", "0", 1), ("RUNNING 3", "3", 1), ("RUNNING 5", "5", 0), ("COMPLETING 0", "0", 0),
     ("CANCELLED 0", "0", 0), ("PENDING 1", "1", 0), ("RUNNING 1", "0", 0)],
)  # fmt: skip
@pytest.mark.parametrize("body", ["return 9", "exit 9", "set -e; (exit 9)", "kill -9 $BASHPID"])
def test_the_script_keeps_the_exit_code_and_requeues_while_the_limit_allows_and_this_start_still_runs(
    submit: Any, slurm: Path, body: str, start: str, restarts: str, requeued: int
) -> None:
    submit()
    (slurm / "queue").write_text(start)
    (slurm / "calls").unlink()
    done = run_script(slurm, body, SLURM_RESTART_COUNT=restarts)
    if "kill" in body:
        assert done.returncode == -signal.SIGKILL  # of the shell itself: left to `launch.slurm.ending`
    else:
        assert done.returncode == 9
        assert len(calls(slurm, "scontrol")) == requeued


def test_a_log_that_cannot_be_opened_is_waited_for(submit: Any, slurm: Path) -> None:
    """SLURM itself would give the job up for good, had it been told to open the log."""
    submit()
    script, folder = slurm / "script-101", log_folder(slurm)
    assert "#SBATCH --output=/dev/null" in script.read_text()
    folder.rename(slurm / "away")
    script.write_text(script.read_text().replace("sleep 5", f"mv {slurm}/away {folder}"))
    assert run_script(slurm, "echo said").returncode == 0
    assert (folder / "55_0_log.out").read_text() == "said\n"


@pytest.mark.parametrize("path", ["/mine:", ":/mine", "/mine::.", "lib:/mine:."])
def test_a_job_imports_nothing_from_the_folder_it_was_submitted_from(submit: Any, slurm: Path, path: str) -> None:
    """`export PYTHONPATH=$MINE:$PYTHONPATH` with nothing in one of them names the working folder."""
    submit()
    (slurm / "show.py").write_text(f"import sys; print([p for p in sys.path if p in ('', '/mine') or '{slurm}' in p])")
    python = shlex.quote(sys.executable)
    assert run_script(slurm, f"cat show.py | {python}; {python} -m show", PYTHONPATH=path).returncode == 1
    assert (log_folder(slurm) / "55_0_log.out").read_text().startswith("['/mine']\n")
