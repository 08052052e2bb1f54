"""Measure this machine on a grid's own cells, cut short: the probe behind `dbscale plan --calibrate`.

Real cells in a temporary store: data, loop, engine and evaluation are those of the grid, only the steps are few.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dbscale.errors import ConfigError
from dbscale.files import hostname
from dbscale.study.cell import Cell
from dbscale.study.cost import STAGES, Calibration, CostModel, Measured, fit_step_times, step_flops
from dbscale.study.plan import Plan
from dbscale.study.recipe import Budget
from dbscale.study.resources import StopRequest
from dbscale.study.store import Row, Store
from launch.study import Study

WARMUP_STEPS, FEWEST_STEPS, MOST_STEPS = 8, 10, 1000
LEAST_SHARE_S = 1.0


def calibrate(study: Study, plan: Plan, *, seconds: float) -> Calibration:
    """Run cut-off copies of the smallest and the largest cell of each stage for about `seconds`.

    Raises ConfigError when their data is not packed or a cell fails.
    """
    study.require_datasets()
    chosen, measured = extreme_cells(plan.cells), []
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="dbscale-calibrate-") as folder:
        probe = _Probe(study, Store(Path(folder)))
        for number, cell in enumerate(chosen):
            share_s = (deadline - time.monotonic()) / (len(chosen) - number)
            measured.append(probe.measure(cell, max(share_s, LEAST_SHARE_S)))
    return summarize(measured, study.cluster.device)


def extreme_cells(cells: Sequence[Cell]) -> list[Cell]:
    """For each stage, the cell with the fewest operations a step and the one with the most."""
    chosen = []
    for stage in STAGES:
        found = sorted((cell for cell in cells if cell.recipe.stage == stage), key=step_flops)
        chosen += found[:1] + (found[-1:] if step_flops(found[-1]) > step_flops(found[0]) else []) if found else []
    return chosen


def summarize(measured: Sequence[Measured], device: str) -> Calibration:
    """Speed and overheads that explain what was measured."""
    flops_per_s, overhead_s = fit_step_times([(each.step_flops, each.step_time_s) for each in measured])
    scales = {}
    for stage in STAGES:
        ratios = [
            each.step_time_s / (each.step_flops / flops_per_s + overhead_s) for each in measured if each.stage == stage
        ]
        scales |= {stage: statistics.fmean(ratios)} if ratios else {}
    return Calibration(
        host=hostname(), device=device, created=time.time(), flops_per_s=flops_per_s,
        step_overhead_s=overhead_s, cell_overhead_s=statistics.median(each.overhead_s for each in measured),
        stage_scale=scales, measured=tuple(measured),
    )  # fmt: skip


def describe(calibration: Calibration, cost: CostModel) -> str:
    """What was found, with how well the model meets each measurement."""
    lines = [
        f"calibrated on {calibration.host} ({calibration.device}): {calibration.flops_per_s / 1e9:,.1f} GFLOP/s, "
        f"{calibration.step_overhead_s * 1e3:.2f} ms a step, {calibration.cell_overhead_s:.2f} s a cell"
    ]
    for each in calibration.measured:
        fitted = cost.step_seconds(each.step_flops) * calibration.stage_scale.get(each.stage, 1.0)
        lines.append(f"  {each.cell}: {each.step_time_s * 1e3:.2f} ms a step over {each.num_steps}, "
                     f"model {fitted * 1e3:.2f} ms")  # fmt: skip
    return "\n".join(lines)


class _Probe:
    """Runs cut-off cells of a study in a store of its own."""

    def __init__(self, study: Study, store: Store) -> None:
        self.study, self.store = study, store

    def measure(self, cell: Cell, share_s: float) -> Measured:
        warm, _ = self._run(cell, WARMUP_STEPS)
        num_steps = int(share_s / max(warm.timing.step_time_s, 1e-6))
        row, wall_s = self._run(cell, min(max(num_steps, FEWEST_STEPS), MOST_STEPS))
        return Measured(
            cell=cell.key, stage=cell.recipe.stage, num_steps=row.num_steps, step_flops=step_flops(cell),
            step_time_s=row.timing.step_time_s, overhead_s=max(wall_s - row.timing.train_time_s, 0.0),
        )  # fmt: skip

    def _run(self, cell: Cell, num_steps: int) -> tuple[Row, float]:
        """The row of `cell` after `num_steps`, its parents trained for one step, and its wall time."""
        short = _cut(cell, num_steps)
        for parent in short.parents:
            for each in (*parent.parents, parent):
                self._train(each)
        started = time.perf_counter()
        row = self._train(short)
        return row, time.perf_counter() - started

    def _train(self, cell: Cell) -> Row:
        from dbscale.training.run import run_cell

        self.store.write_spec(cell.spec())
        resources = self.study.cluster.shape(cell.recipe.stage).resources.model_copy(update={"tracker": None})
        with contextlib.redirect_stderr(io.StringIO()):
            outcome = run_cell(
                self.store, cell.key, data_dir=self.study.data_dir, resources=resources, stop=StopRequest()
            )
        if outcome.row is None:
            raise ConfigError(f"the probe's copy of {cell.key} {outcome.status}: {outcome.reason}")
        return outcome.row


def _cut(cell: Cell, num_steps: int) -> Cell:
    """The same cell with fewer steps, on parents of one step."""
    training = cell.recipe.training.model_copy(update={"budget": Budget(steps=num_steps)})
    teacher, init = (parent and _cut(parent, 1) for parent in (cell.teacher, cell.init))
    return Cell(cell.recipe.model_copy(update={"training": training}), cell.fingerprint, teacher=teacher, init=init)
