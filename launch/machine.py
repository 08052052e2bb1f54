"""How many bundles this machine can run at once, asked of the kernel and the GPU driver, without torch."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from dbscale.study.resources import Resources

MEMORY_PER_WORKER_BYTES = 1.5e9
"""A process with torch, a small model and its data, on CPU."""


def available_workers(resources: Resources) -> int:
    """One bundle per GPU set when there are GPUs, otherwise one per physical core and 1.5 GB of free memory."""
    gpus = visible_gpus() if resources.device != "cpu" else ()
    if gpus:
        return max(1, len(gpus) // resources.num_processes)
    cores_per_bundle = resources.num_processes * (resources.threads or 1)
    by_memory = int(psutil.virtual_memory().available / (MEMORY_PER_WORKER_BYTES * resources.num_processes))
    return max(1, min(physical_cores() // cores_per_bundle, by_memory))


def visible_gpus() -> tuple[int, ...]:
    """Indices of the NVIDIA GPUs this process may use; CUDA_VISIBLE_DEVICES is honoured where it lists indices."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:
        return tuple(int(part) for part in asked.split(",") if part.strip().isdigit())
    folder = Path("/proc/driver/nvidia/gpus")
    return tuple(range(len(list(folder.iterdir())))) if folder.is_dir() else ()


def physical_cores() -> int:
    """Physical cores among the CPUs this process may run on, capped by a container's CPU quota."""
    allowed = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in allowed}
    quota = _cpu_quota()
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cpu_quota() -> float | None:
    """CPUs' worth of time that control groups grant, None without a limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(1.0, int(limit) / int(period))
