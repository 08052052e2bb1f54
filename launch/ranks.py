"""Which rank this process is, told to torch, Accelerate and DeepSpeed through the environment.

One task per rank, in process: on clusters that track jobs by cgroup a signal reaches the task itself but none of its
children, so a launcher in between would die of it with nothing saved.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dbscale.study.resources import Resources

FIRST_PORT, NUM_PORTS = 20000, 12000
"""Below the ports that Linux hands to outgoing connections (from 32768)."""


@dataclass(frozen=True)
class Rank:
    """This process among those that train one cell together."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> Rank:
        """From SLURM's or submitit's variables; a process that nobody started is rank 0 of 1."""
        executor = environ.get("SUBMITIT_EXECUTOR")
        if executor == "slurm":
            size, nodes = int(environ["SLURM_NTASKS"]), int(environ.get("SLURM_JOB_NUM_NODES", "1"))
            return cls(int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"]), size, size // nodes)
        if executor == "local":
            size = int(environ["SUBMITIT_LOCAL_NTASKS"])
            return cls(int(environ["SUBMITIT_LOCAL_GLOBALID"]), int(environ["SUBMITIT_LOCAL_LOCALID"]), size, size)
        return cls(0, 0, 1, 1)


def rank_environment(rank: Rank, *, master: str, port: int) -> dict[str, str]:
    """What torch.distributed, Accelerate and DeepSpeed read; empty for a single process, which needs no rendezvous."""
    if rank.world_size == 1:
        return {}
    return {
        "RANK": str(rank.rank),
        "LOCAL_RANK": str(rank.local_rank),
        "WORLD_SIZE": str(rank.world_size),
        "LOCAL_WORLD_SIZE": str(rank.local_world_size),
        "LOCAL_SIZE": str(rank.local_world_size),
        "MASTER_ADDR": master,
        "MASTER_PORT": str(port),
    }


def port_of_job(job: str, restart: int) -> int:
    """A rendezvous port all ranks agree on without talking: another one after each restart, so that a stale rank
    of the attempt before finds nobody there."""
    digits = int("".join(filter(str.isdigit, job)) or 0)
    return FIRST_PORT + (digits * 31 + restart * 7919) % NUM_PORTS


def thread_environment(resources: Resources) -> dict[str, str]:
    """Threads of the math libraries; must be set before numpy and torch are imported."""
    threads = str(resources.threads or 1)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {name: threads for name in names} if resources.threads or resources.num_processes > 1 else {}
