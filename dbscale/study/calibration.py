"""`<store>/calibration.json`: what a probe of the machine measured, for plans to come.

`dbscale plan --calibrate` writes it; `cost.CostModel.probed` uses it.
"""

from __future__ import annotations

import socket
from pathlib import Path

from pydantic import Field

from dbscale.files import read_json, write_json
from dbscale.strict import Strict, validate
from dbscale.study.recipe import Stage
from dbscale.study.store import Store


class Measured(Strict):
    """One cell of the probe."""

    cell: str
    stage: Stage
    num_steps: int
    step_flops: float
    step_time_s: float
    overhead_s: float
    """Wall time of the cell outside its steps."""


class Calibration(Strict):
    """Speed of one machine on one grid's cells."""

    host: str
    device: str
    """Kind, as the cluster file names it."""
    created: float
    """Unix time."""
    flops_per_s: float = Field(gt=0)
    step_overhead_s: float = Field(ge=0)
    cell_overhead_s: float = Field(ge=0)
    stage_scale: dict[Stage, float] = {}
    """Measured over fitted, by stage."""
    measured: tuple[Measured, ...] = ()

    def fits(self, device: str) -> bool:
        """Whether it speaks of such a device here; accelerators are alike on every host, CPUs are not."""
        return self.device == device and (device != "cpu" or self.host == socket.gethostname())


def calibration_path(store: Store) -> Path:
    return store.root / "calibration.json"


def read_calibration(store: Store) -> Calibration | None:
    path = calibration_path(store)
    return validate(Calibration, read_json(path), where=str(path)) if path.exists() else None


def write_calibration(store: Store, calibration: Calibration) -> None:
    write_json(calibration_path(store), calibration.model_dump(mode="json"))
