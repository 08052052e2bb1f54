"""The recipes of docs/schedulers.md, word for word: with the scheduler itself where it is installed, else with a stand-in.

What each recipe must do is the same: start its workers, which leave every row once. Training has a stand-in as everywhere
in these tests; fewer workers than on the page are started.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "schedulers.md").read_text()
NUM_WORKERS = 3
WORKER = """#!/bin/sh
echo "${{PBS_ARRAY_INDEX}}${{LSB_JOBINDEX}}${{JOB_COMPLETION_INDEX}}${{CUDA_VISIBLE_DEVICES}}" >>{folder}/started
PYTHONPATH={path} {python} -m dbscale.launch.cli "$@" --no-report
echo $? >>{folder}/ended
"""
QSUB = """#!/bin/bash -eu
# As PBS does: options on lines of the script, a job for each index, which begins in the user's home.
script=$(realpath "$1"); read -ra words <<<"$(sed -n 's/^#PBS //p' "$script" | tr '\\n' ' ')"
while [ ${#words[@]} -gt 0 ]; do
  case ${words[0]} in
    -J) range=${words[1]} ;;
    -l | -r) ;;
    *) echo "qsub: illegal option ${words[0]}" >&2; exit 2 ;;
  esac
  words=("${words[@]:2}")
done
for index in $(seq "${range%-*}" "${range#*-}"); do
  (export PBS_O_WORKDIR=$PWD PBS_ARRAY_INDEX=$index; cd / && exec bash "$script" >/dev/null 2>&1) &
done
echo "1234[].server"
"""
BSUB = """#!/bin/bash -eu
# As LSF does: a job for each index of -J's brackets, in the folder it was submitted from.
while [[ $1 = -* ]]; do
  case $1 in
    -J) range=${2#*[}; shift 2 ;;
    -o) output=$2; shift 2 ;;
    -n | -gpu | -W) shift 2 ;;
    -r) shift ;;
    *) echo "bsub: illegal option $1" >&2; exit 255 ;;
  esac
done
for index in $(seq "${range%-*}" "$(tr -d ] <<<"${range#*-}")"); do
  LSB_JOBINDEX=$index "$@" >"${output//%I/$index}" 2>&1 &
done
echo "Job <1234> is submitted to default queue."
"""


@dataclass(frozen=True)
class Site:
    """A folder to type a recipe in, with a grid, a virtual environment and the commands of a scheduler."""

    workplace: Any
    wait: Callable[..., None]

    @property
    def folder(self) -> Path:
        return self.workplace.folder

    def install(self, name: str, script: str, where: str = "bin") -> None:
        path = self.folder / where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)

    def type(self, *words: str) -> None:
        """Run a command here; the scheduler's are found first, and nothing but them is known of this checkout."""
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        subprocess.run(words, cwd=self.folder, env={**os.environ, "PATH": path}, check=True, timeout=600)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def assert_done_by(self, workers: list[str]) -> None:
        """All of `workers` end well, and leave every row once."""
        self.wait(lambda: len(self.lines("ended")) == len(workers), 600)
        assert sorted(self.lines("started")) == workers
        assert self.lines("ended") == ["0"] * len(workers)
        paths = self.workplace.store.root.glob("cells/*/attempts/*.json")
        finished = Counter(path.parts[-3] for path in paths if json.loads(path.read_text())["status"] == "done")
        assert finished == dict.fromkeys(self.workplace.done(), 1)


@pytest.fixture
def site(workplace: Any, wait_until: Callable[..., None], num_cells: int) -> Iterator[Site]:
    made = Site(workplace, wait_until)
    (workplace.folder / "grid.yaml").rename(workplace.folder / "birds.yaml")
    words = {"folder": workplace.folder, "path": workplace.environment["PYTHONPATH"], "python": sys.executable}
    script = WORKER.format(**{name: shlex.quote(str(value)) for name, value in words.items()})
    made.install("dbscale", script)
    made.install("dbscale", script, ".venv/bin")
    yield made
    assert len(workplace.done()) == num_cells


def recipe(title: str, language: str = "sh") -> str:
    """The code under a heading, for as many workers as are tried here."""
    (code,) = re.findall(rf"### {re.escape(title)}\n\n```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert len(code.splitlines()) <= 10
    return code.replace("1-16", f"1-{NUM_WORKERS}").replace("range(16)", f"range({NUM_WORKERS})")


def there(code: str, folder: Path) -> str:
    """The recipe with its shared folders in `folder`."""
    return re.sub(r"/(mnt|shared)/(birds\.yaml|out|data|images)", rf"{folder}/\2", code)


INDICES = ["1", "2", "3"]


def test_processes_on_one_machine(site: Site) -> None:
    site.type("bash", "-c", recipe("Processes on one machine"))
    site.assert_done_by(["0", "1", "2", "3"])


def test_pbs(site: Site) -> None:
    site.install("qsub", QSUB)
    site.type("bash", "-c", recipe("PBS"))
    site.assert_done_by(INDICES)


def test_lsf(site: Site) -> None:
    site.install("bsub", BSUB)
    site.type("bash", "-c", recipe("LSF"))
    site.assert_done_by(INDICES)
    assert {path.name for path in site.folder.glob("work-*.log")} == {"work-1.log", "work-2.log", "work-3.log"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def hosts(site: Site) -> Iterator[None]:
    """node1, node2 and node3: this machine, behind a server and a key of the test's own."""
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if server is None or shutil.which("ssh") is None:
        pytest.skip("needs an SSH server and client (Debian: openssh-server, openssh-client)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(
            exist_ok=True
        )  # its place for processes without rights, which a package's service makes
    port, keys = free_port(), site.folder / "keys"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    told = [f"HostKey {keys}/host", f"AuthorizedKeysFile {keys}/user.pub", "StrictModes no", "ListenAddress 127.0.0.1",
            f"Port {port}", "PasswordAuthentication no", "UsePAM no", "PidFile none"]  # fmt: skip
    (keys / "server").write_text("\n".join(told))
    known = [f"Port {port}", "HostName 127.0.0.1", f"IdentityFile {keys}/user", "StrictHostKeyChecking no",
             f"UserKnownHostsFile {keys}/known", "LogLevel ERROR"]  # fmt: skip
    (keys / "client").write_text("\n".join(["Host node*", *known]))
    site.install("ssh", f'#!/bin/sh\nexec {shutil.which("ssh")} -F {keys}/client "$@"\n')
    process = subprocess.Popen([server, "-D", "-e", "-f", str(keys / "server")], stderr=subprocess.DEVNULL)
    site.wait(lambda: listens(port), 60)
    yield
    process.terminate()
    process.wait()


@pytest.mark.usefixtures("hosts")
def test_a_few_machines_over_ssh(site: Site) -> None:
    site.workplace.behave(steps=20, step_s=0.1)
    site.type("bash", "-c", recipe("A few machines, over ssh"))
    assert not site.lines("ended"), "the loop returns while the workers work"
    site.assert_done_by(["", "", ""])
    assert len(list(site.folder.glob("work-node*.log"))) == NUM_WORKERS


def test_kubernetes(site: Site) -> None:
    """Every index runs the container's command; the field names are held to the schemas of old and new releases."""
    job = yaml.safe_load(there(recipe("Kubernetes", "yaml"), site.folder))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == job["spec"]["parallelism"]
    for index in INDICES:
        site.type("bash", "-c", f"JOB_COMPLETION_INDEX={index} {shlex.join(container['command'])} &")
    site.assert_done_by(INDICES)


@pytest.mark.parametrize("release", ["1.29", "1.37"])
def test_the_job_for_kubernetes_is_one(release: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    job = yaml.safe_load(recipe("Kubernetes", "yaml"))
    validator.validate(job, release, strict=True)
    job["spec"]["completion"] = job["spec"].pop("completions")
    with pytest.raises(validator.ValidationError, match="completion"):
        validator.validate(job, release, strict=True)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_ray(site: Site) -> None:
    begin = f"import ray\nray.init(num_gpus={NUM_WORKERS}, include_dashboard=False)\n"
    (site.folder / "recipe.py").write_text(begin + there(recipe("Ray", "python"), site.folder))
    (site.folder / "images").symlink_to("data")
    site.type(sys.executable, "recipe.py")
    site.assert_done_by(["0", "1", "2"])


def test_skypilot(site: Site) -> None:
    """The task's `run`, once for each worker."""
    task = yaml.safe_load(there(recipe("SkyPilot", "yaml"), site.folder))
    for index in INDICES:
        site.type("bash", "-c", f"JOB_COMPLETION_INDEX={index} {task['run']} &")
    site.assert_done_by(INDICES)


@pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="needs skypilot")
def test_the_task_for_skypilot_is_one(tmp_path: Path) -> None:
    import sky  # type: ignore[import-not-found]

    (tmp_path / "work.yaml").write_text(recipe("SkyPilot", "yaml"))
    task = sky.Task.from_yaml(str(tmp_path / "work.yaml"))
    (resources,) = task.resources
    assert (resources.accelerators, resources.use_spot) == ({"A100": 1}, True)
