"""The sandbox as Python sees it: what can be asked of it, what can go wrong with it, and whether it left anything."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")


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
            timeout=600,
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

    def public_ports(self, job: str) -> set[int]:
        """Ports that processes of a job listen on for other machines."""
        return {
            connection.laddr.port
            for process in self._processes(job, is_rank)
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.ip not in ("127.0.0.1", "::1")
        }

    def kill_rank(self, job: str, number: int = signal.SIGKILL) -> bool:
        """Send a signal to one training process of a job; False when it has none just now."""
        return self._signal(job, number, is_rank)

    def kill_batch_shell(self, job: str) -> bool:
        return self._signal(job, signal.SIGKILL, lambda words: bool(words) and words[-1].endswith("slurm_script"))

    def _signal(self, job: str, number: int, is_it: Callable[[list[str]], bool]) -> bool:
        for process in self._processes(job, is_it):
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
                return True
        return False

    def _processes(self, job: str, is_it: Callable[[list[str]], bool]) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if ours and environment.get("SLURM_JOB_ID") == job and is_it(process.cmdline()):
                    yield process

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

    def cut_off(self, node: int, seconds: float = 3.0) -> None:
        """A node loses its connection and finds it again: SLURM starts its jobs anew, the old processes live on."""
        self.script("cut-off", str(node))
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


def is_rank(words: list[str]) -> bool:
    """Whether a command line is that of a training process, and not of the srun that started it."""
    modules = {"dbscale.launch.slurm.job", "dbscale.launch.slurm.reducer"}
    return not modules.isdisjoint(words) and not words[0].endswith("srun")


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


def left_over(folder: Path) -> list[str]:
    """What a sandbox that was torn down left behind: files, and processes that name its folder."""
    found = [str(path) for path in folder.parent.glob("*")]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"{folder}/" in " ".join([*process.cmdline(), process.environ().get("SLURM_CONF", "")]):
                found.append(f"{process.pid}: {process.cmdline()}")
    return found
