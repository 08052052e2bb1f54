"""A real SLURM for the tests: raised once, torn down at the end; and a workplace whose jobs run on it.

Needs root and Debian's slurm-wlm, slurmdbd, munge and mariadb-server (`tests/slurm/sandbox.sh install`). Without them
the tests skip with the reason, unless DBSCALE_REQUIRE_SLURM=1 says that they must run. With SANDBOX_DIR set, the
sandbox of that folder is used and left standing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

HERE = Path(__file__).parent
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")
CLUSTER = {
    "executor": "slurm",
    "target_min": 60,
    "requeue_limit": 8,
    "resources": {"threads": 1, "zero_stage": None, "device": "cpu", "checkpoint_interval_s": 1},
    "slurm": {"partition": "low", "time_limit_min": 10, "signal_delay_s": 60, "array_parallelism": 4},
    "reducer": {"memory_gb": 0.5},
}

TRAINING = {"budget": {"steps": 60}, "optim": {"lr": 1e-3}, "global_batch": 16, "precision": "fp32"}
GRID = {
    "name": "ranks", "question": "Do two nodes train as one?", "image_size": 32,
    "datasets": {"digits": {"source": "digits", "image_size": 32}},
    "upstream": {"dataset": "digits", "num_samples": [64]},
    "downstream": [{"dataset": "digits", "num_samples": [32]}],
    "models": {"h1": {"kind": "deit", "heads": 1, "head_width": 16, "depth": 2, "patch_size": 8},
               "h2": {"kind": "deit", "heads": 2, "head_width": 16, "depth": 2, "patch_size": 8}},
    "students": ["h2"], "teachers": {"h2": "h1"}, "seeds": [0],
    "pretrain": TRAINING, "finetune": TRAINING, "distill": {"alpha": 0.5},
}  # fmt: skip
TIMED = ("timing", "resources")

_spec = importlib.util.spec_from_file_location("dbscale_launch_conftest", HERE.parent / "launch" / "conftest.py")
assert _spec is not None and _spec.loader is not None
_launch = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _launch
_spec.loader.exec_module(_launch)
workplace, wait_until, num_cells = _launch.workplace, _launch.wait_until, _launch.num_cells
"""The same stand-ins for training as the launch tests use."""


def missing() -> str | None:
    """Why no sandbox can be raised here."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if absent:
        return f"not installed: {', '.join(absent)} (tests/slurm/sandbox.sh install)"
    return None if os.geteuid() == 0 else "a SLURM sandbox needs root"


@dataclass(frozen=True)
class Sandbox:
    """The cluster, and what can go wrong with it."""

    environment: dict[str, str]
    num_nodes: int = 2

    def script(self, *words: str) -> str:
        done = subprocess.run(
            [str(HERE / "sandbox.sh"), *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def slurm(self, *words: str) -> str:
        """A SLURM command; tried again while slurmctld is away."""
        for _ in range(20):
            done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode == 0:
                return done.stdout
            time.sleep(1)
        raise AssertionError(f"{words}: {done.stderr}")

    def tell(self, *words: str) -> None:
        """A command about a job that may have ended by itself just now; tried again while slurmctld is away."""
        for _ in range(20):
            done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode == 0 or "contact" not in done.stderr:
                return
            time.sleep(1)
        raise AssertionError(f"{words}: {done.stderr}")

    def state(self, job: str) -> str:
        return self.slurm("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T").strip()

    def restarts(self) -> int:
        """How often jobs that wait or run were started again."""
        return sum(map(int, self.slurm("squeue", "--noheader", "--array", "--Format=RestartCnt").split()))

    def jobs(self, *states: str) -> list[str]:
        """Raw ids of the jobs in these states, or of all that are left."""
        only = [f"--states={','.join(states)}"] if states else []
        return self.slurm("squeue", "--noheader", "--array", *only, "--format=%A").split()

    def preempt(self, seconds: int = 2) -> None:
        """A job of the high partition takes all nodes for a while."""
        self.slurm("sbatch", "--partition=high", f"--nodes={self.num_nodes}", "--exclusive", "--output=/dev/null",
                   "--wrap", f"sleep {seconds}")  # fmt: skip

    def send(self, job: str, name: str) -> None:
        self.tell("scancel", f"--signal={name}", job)

    def requeue(self, job: str) -> None:
        self.tell("scontrol", "requeue", job)

    def kill_rank(self, job: str, number: int = signal.SIGKILL) -> bool:
        """Send a signal to one training process of a job; False when it has none just now."""
        return self._signal(job, number, lambda words: "submitit.core._submit" in words)

    def kill_batch_shell(self, job: str) -> bool:
        return self._signal(job, signal.SIGKILL, lambda words: bool(words) and words[-1].endswith("slurm_script"))

    def _signal(self, job: str, number: int, is_it: Callable[[list[str]], bool]) -> bool:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if ours and environment.get("SLURM_JOB_ID") == job and is_it(process.cmdline()):
                    process.send_signal(number)
                    return True
        return False

    @contextlib.contextmanager
    def no_user_signal(self) -> Iterator[None]:
        """Meanwhile preemption sends TERM alone, as clusters without `preempt_send_user_signal` do."""
        path = Path(self.environment["SLURM_CONF"])
        text = path.read_text()
        path.write_text(text.replace("SlurmctldParameters=preempt_send_user_signal", ""))
        self.slurm("scontrol", "reconfigure")
        try:
            yield
        finally:
            path.write_text(text)
            self.slurm("scontrol", "reconfigure")

    def power_off(self, node: int, seconds: float = 3.0) -> None:
        """Everything of a node dies at once; it comes back and reports what it lost."""
        self.script("kill-node", str(node))
        time.sleep(seconds)
        self.script("start-node", str(node))

    def restart_node_daemon(self, node: int, seconds: float = 1.0) -> None:
        """slurmd ends and starts again; its jobs live on meanwhile."""
        self.script("stop-daemon", str(node))
        time.sleep(seconds)
        self.script("start-node", str(node))

    def node_of(self, job: str) -> str:
        """A node that the job runs on, or the first when it has just left."""
        nodes = self.slurm("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%N").strip()
        return next(iter(self.slurm("scontrol", "show", "hostnames", nodes or "n1").split()), "n1")

    def restart_controller(self, seconds: float = 3.0) -> None:
        self.script("stop-ctld")
        time.sleep(seconds)
        self.script("start-ctld")

    def clear(self) -> None:
        """Cancel everything and wait for an empty queue."""
        self.slurm("scancel", "--user=root")
        deadline = time.monotonic() + 60
        while self.jobs() and time.monotonic() < deadline:
            time.sleep(0.2)


@contextlib.contextmanager
def own_ports(count: int) -> Iterator[int]:
    """The first of `count` ports in a row that nobody listens on; the one before it is held, so that sandboxes raised
    at the same moment do not collide."""
    for first in range(21800, 29000, 50):
        with contextlib.ExitStack() as probes:
            sockets = [probes.enter_context(socket.socket()) for _ in range(count + 1)]
            if all(is_free(probe, first + i) for i, probe in enumerate(sockets)):
                for probe in sockets[1:]:
                    probe.close()
                yield first + 1
                return
    raise AssertionError("no free ports")


def is_free(probe: socket.socket, port: int) -> bool:
    """Binds `probe` to it."""
    try:
        probe.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    reason = missing()
    if reason is not None:
        if os.environ.get("DBSCALE_REQUIRE_SLURM") == "1":
            pytest.fail(f"DBSCALE_REQUIRE_SLURM=1, but {reason}")
        pytest.skip(reason)
    kept = os.environ.get("SANDBOX_DIR")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("slurm") / "sandbox"
    wanted = {"DIR": folder, "GRACE": 4, "CRED_EXPIRE": 5, "KILLWAIT": 3, "TIMEOUT": 120}
    with contextlib.nullcontext() if kept else own_ports(8) as port, pytest.MonkeyPatch.context() as patch:
        if port is not None:
            wanted["PORT"] = port
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        cluster = Sandbox({**os.environ, **{f"SANDBOX_{name}": str(value) for name, value in wanted.items()}})
        try:
            cluster.script("up")
            yield cluster
        finally:
            if not kept:
                cluster.script("down", "--wipe")
        assert kept or not left_over(folder)


def left_over(folder: Path) -> list[str]:
    """What a sandbox that was torn down left behind: files, and processes that name its folder."""
    found = [str(path) for path in folder.parent.glob("*")]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"{folder}/" in " ".join([*process.cmdline(), process.environ().get("SLURM_CONF", "")]):
                found.append(f"{process.pid}: {process.cmdline()}")
    return found


@pytest.fixture
def place(workplace: Any, sandbox: Sandbox) -> Iterator[Any]:
    """A workplace whose `make grid` goes to the sandbox."""
    (workplace.folder / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    environment = {**workplace.environment, "SLURM_CONF": sandbox.environment["SLURM_CONF"]}
    yield replace(workplace, environment=environment)
    sandbox.clear()


@pytest.fixture
def submit(place: Any) -> Callable[..., Any]:
    """`make grid CLUSTER=…` as typed on a login node."""
    return lambda *options: place.run("submit", "--cluster", str(place.folder / "cluster.yaml"), *options)


@pytest.fixture
def all_ended(sandbox: Sandbox, wait_until: Callable[..., None]) -> Callable[..., None]:
    """Wait until nothing waits or runs."""
    return lambda timeout_s=300.0: wait_until(lambda: not sandbox.jobs(), timeout_s)


@pytest.fixture
def real(place: Any, tmp_path: Path) -> Callable[..., Any]:
    """Makes workplaces with the real training that share one folder of data; wide: more cells."""

    def make(name: str, *, steps: int = 60, wide: bool = False) -> Any:
        folder = tmp_path / name
        folder.mkdir()
        training = {**TRAINING, "budget": {"steps": steps}}
        grid = {**GRID, "pretrain": training, "finetune": training}
        if wide:
            grid["upstream"] = {"dataset": "digits", "num_samples": [64, 128]}
        (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
        (folder / "data").symlink_to(tmp_path / "shared-data", target_is_directory=True)
        (tmp_path / "shared-data").mkdir(exist_ok=True)
        (folder / "cluster.yaml").write_text((place.folder / "cluster.yaml").read_text())
        environment = {**place.environment, "PYTHONPATH": str(HERE.parents[1])}
        return replace(place, folder=folder, environment=environment)

    return make


@pytest.fixture
def results() -> Callable[[Any], dict[str, Any]]:
    """Every row without what is measured by the clock, and the bits that say which test samples were right."""

    def read(place: Any) -> dict[str, Any]:
        rows = {key: json.loads(text) for key, text in place.rows().items()}
        bits = {key: (place.store.cell_dir(key) / "correct.npz").read_bytes() for key in rows}
        return {
            key: ({name: value for name, value in row.items() if name not in TIMED}, bits[key])
            for key, row in rows.items()
        }

    return read
