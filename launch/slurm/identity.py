"""Which job this is, in SLURM's numbers, from its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class JobIdentity:
    """This job as SLURM numbers it."""

    name: str
    """`123_4` for element 4 of array 123: what scontrol and squeue are given, because one element of every array has
    the array's own number as its raw id, and that number alone would mean the whole array."""
    raw: str
    """SLURM_JOB_ID, another one for each element."""
    restart: int

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> JobIdentity:
        array, raw = environ.get("SLURM_ARRAY_JOB_ID"), environ["SLURM_JOB_ID"]
        name = f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else raw
        return cls(name, raw, int(environ.get("SLURM_RESTART_COUNT", "0")))

    def __str__(self) -> str:
        return f"{self.name}.{self.restart}"
