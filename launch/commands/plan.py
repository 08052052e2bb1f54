"""`dbscale plan`: what a grid needs, what of it stands, and what the rest will take.

Writes nothing but, with --calibrate, the machine's speed for this plan and later ones: measured on the grid's own
cells, cut short, in a temporary store. Data, loop, engine and evaluation are those of the grid, only the steps are few.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbscale.errors import ConfigError, FileError
from dbscale.files import hostname
from dbscale.launch.preflight import check
from dbscale.launch.status import hunt_as_data, hunt_so_far, states_table, table
from dbscale.launch.study import AddCommand, Study, add_json, add_study, plan_study, print_json, study_of
from dbscale.study import cost as costs
from dbscale.study.cell import Cell
from dbscale.study.cost import STAGES, Calibration, CostModel, Measured, duration, step_flops
from dbscale.study.grid import overlapping_draws, unlike_cells
from dbscale.study.plan import Plan, read_plan
from dbscale.study.recipe import Budget, Stage
from dbscale.study.resources import StopRequest
from dbscale.study.store import Row, Store

LONG_ON_A_CPU_S = 7 * 86400.0
"""A grid that takes longer was meant for GPUs: the plan then says what it would take there."""
WARMUP_STEPS, FEWEST_STEPS, MOST_STEPS = 8, 10, 1000
LEAST_SHARE_S = 1.0


def add_commands(add: AddCommand) -> None:
    parser = add("plan", run, "show what a grid needs: cells by stage and state, predicted device-hours, jobs")
    add_study(parser)
    parser.add_argument("--calibrate", nargs="?", type=float, const=60.0, metavar="SECONDS",
                        help="first measure this machine on the grid's cells, cut short, for about 60 seconds; later "
                        "plans on this store use it")  # fmt: skip
    parser.add_argument("--cells", action="store_true", help="also list every cell with its state and predicted time")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    study = study_of(arguments)
    plan, cost = plan_study(study)
    if arguments.calibrate is not None:
        calibration = calibrate(study, plan, seconds=arguments.calibrate)
        costs.write_calibration(study.store, calibration)
        if not arguments.json:
            print(describe_calibration(calibration, study.cluster.cost_model().probed(calibration)) + "\n")
        plan, cost = plan_study(study)
    if arguments.json:
        print_json(as_data(study, plan, cost, cells=arguments.cells))
        return 0
    print("\n".join([describe(study, plan, cost), *power_text(study, plan, cost)]))
    if arguments.cells:
        rows = [(cell.key, plan.states[cell.key], duration(cost.seconds(cell))) for cell in plan.cells]
        print("\n" + table(rows, header=("cell", "state", "predicted")))
    return 0


def as_data(study: Study, plan: Plan, cost: CostModel, *, cells: bool) -> dict[str, Any]:
    """The same page for a program: times in device-seconds, counts of cells by stage and state."""
    counts = Counter((cell.recipe.stage, plan.states[cell.key]) for cell in plan.cells)
    return {
        "grid": plan.grid.name, "question": plan.grid.question.strip(), "store": study.store.root,
        "cluster": study.cluster.executor, "device": cost.device.name, "num_points": len(plan.points),
        "num_cells": len(plan.cells), "predicted_s": plan.predicted_s,
        "cells_by_stage": {
            stage: {state: count for (at, state), count in counts.items() if at == stage}
            for stage in STAGES if any(at == stage for at, _ in counts)
        },
        "waves": [
            {"bundles": len(wave.bundles), "cells": sum(len(each.cells) for each in wave.bundles),
             "longest_s": max(each.predicted_s for each in wave.bundles)} for wave in plan.waves
        ],
        "hunt": hunt_as_data(study.store, plan.grid.name),
        "not_packed": study.missing_datasets, "stale": plan.stale, "notes": plan.notes,
        "power": [line.strip() for line in power_text(study, plan, cost) if line],
        **({"cells": [{"key": cell.key, "state": plan.states[cell.key], "predicted_s": cost.seconds(cell)}
                      for cell in plan.cells]} if cells else {}),
    }  # fmt: skip


def describe(study: Study, plan: Plan, cost: CostModel) -> str:
    """The page that `dbscale plan` prints."""
    grid = plan.grid
    lines = [
        f"grid {grid.name}: {grid.question.strip()}",
        f"store {study.store.root}, cluster {study.cluster.executor}",
        "",
    ]
    if grid.hunt is not None:
        lines[1:1] = [
            "`dbscale hunt` chooses its runs (--dry-run shows the next ones); this is the grid as it would be run whole",
            *hunt_so_far(study.store, grid.name)[1:],
        ]
    counts = Counter((cell.recipe.stage, plan.states[cell.key]) for cell in plan.cells)
    stages = {stage: (stage,) for stage in STAGES if stage in {cell.recipe.stage for cell in plan.cells}}
    lines += [states_table(counts, stages, header=("stage",)), ""]
    lines += [f"{len(plan.points)} points measured by {len(plan.cells)} cells; {device_time(study, plan, cost)}"]
    for number, wave in enumerate(plan.waves, start=1):
        longest = max(bundle.predicted_s for bundle in wave.bundles)
        cells = sum(len(bundle.cells) for bundle in wave.bundles)
        lines.append(f"wave {number}: {counted(cells, 'cell')} in {counted(len(wave.bundles), 'bundle')}, "
                     f"the longest {duration(longest)}")  # fmt: skip
    lines += memory_text(study, plan)
    if study.missing_datasets:
        lines.append(f"not packed yet: {', '.join(study.missing_datasets)} (`dbscale submit` packs them; ids of cells "
                     "that read them are provisional until then)")  # fmt: skip
    if study.missing_weights:
        lines.append(f"not imported yet: {', '.join(study.missing_weights)} (`dbscale submit` imports them; ids of cells "
                     "that use them are provisional until then)")  # fmt: skip
    lines += overlapping_draws(grid, study.sizes)
    lines += plan.notes
    lines += check(study, plan).lines
    if plan.stale:
        lines.append(f"{len(plan.stale)} cells of an earlier plan are no longer asked for; their results stay")
    if not plan.waves:
        running = plan.count()["running"]
        lines.append(f"nothing to start: {running} cells run" if running else "nothing left to run")
    return "\n".join(lines)


def power_text(study: Study, plan: Plan, cost: CostModel) -> list[str]:
    """What the design can tell apart, for grids that compare a plain and a distilled arm."""
    design = design_of(plan, cost)
    if design is None:
        return []
    from dbscale.report.power import plan_power
    from dbscale.report.reduce import collect

    known = None
    with contextlib.suppress(ConfigError, FileError):  # the plan's notes name a damaged plan.json
        known = read_plan(study.store, plan.grid.name) if plan.count()["done"] else None
    table = collect(study.store, known) if known is not None else None
    noise = plan.grid.noise or f"{plan.grid.name}_{plan.grid.downstream[0].dataset}"
    return ["", *plan_power(table, noise, **design)]


def design_of(plan: Plan, cost: CostModel) -> dict[str, Any] | None:
    """Sizes and costs of the main contrast: the first downstream set, students with both arms; None without any."""
    main = [point for point in plan.points if point.cell.recipe.data.dataset == plan.grid.downstream[0].dataset]
    distilled = [point for point in main if point.arm == "distilled"]
    sizes = sorted({point.upstream_num_samples for point in distilled})
    if not sizes:
        return None
    students = {point.student for point in distilled}
    runs = [point.cell for point in main if point.student in students and point.arm in ("plain", "distilled")]
    upstream = {cell.init.key: cell.init for cell in runs if cell.init is not None}
    draws = Counter((cell.init.key, cell.recipe.data.num_samples) for cell in runs if cell.init is not None)
    finetunes, finetune_s = max(draws.values()), sum(map(cost.seconds, runs))
    return {
        "num_x": len(sizes), "num_seeds": len(plan.grid.seeds), "num_students": len(students),
        "num_labels": len({cell.recipe.data.num_samples for cell in runs}), "finetunes": finetunes,
        "step_octaves": math.log2(sizes[-1] / sizes[0]) / max(len(sizes) - 1, 1),
        "cost_upstream": sum(map(cost.seconds, upstream.values())) / len(upstream),
        "cost_finetune": finetune_s / len(upstream) / finetunes,
    }  # fmt: skip


def counted(number: int, thing: str) -> str:
    """1 cell, 2 cells."""
    return f"{number} {thing}" + "s" * (number != 1)


def device_time(study: Study, plan: Plan, cost: CostModel) -> str:
    """Predicted device time left, and what that means on this machine."""
    text = f"{duration(plan.predicted_s)} of {cost.device.name} time left"
    if study.cluster.executor == "local" and plan.predicted_s:
        workers = study.cluster.num_workers()
        text += f", {duration(plan.predicted_s / workers)} on {counted(workers, 'worker')}"
    if cost.device.name == "cpu" and plan.predicted_s > LONG_ON_A_CPU_S:
        hours = {kind: CostModel(costs.DEVICES[kind]).hours(plan.todo) for kind in ("h100", "a100")}
        told = " or ".join(f"{left:,.0f} {kind.upper()}-hours" for kind, left in hours.items())
        text += f"; on GPUs about {told}, see --cluster slurm"
    return text


def memory_text(study: Study, plan: Plan) -> list[str]:
    """What the largest cell needs of each accelerator; nothing on CPUs, whose workers `Cluster.num_workers` counts."""
    if study.cluster.device == "cpu":
        return []
    shapes = {stage: study.cluster.shape(stage).resources for stage in STAGES}
    known = [(cell, found) for cell in unlike_cells(plan.cells)
             if (found := costs.device_memory(cell, shapes[cell.recipe.stage])) is not None]  # fmt: skip
    if not known:
        return []
    cell, memory = max(known, key=lambda each: each[1].total)
    how = shapes[cell.recipe.stage]
    engine = "plain DDP" if how.zero_stage is None else f"ZeRO stage {how.zero_stage}"
    devices = "one device" if how.num_processes == 1 else f"each of {how.num_processes} devices"
    return [
        f"memory: {cell.key} needs about {memory.total / 1e9:.1f} GB on {devices} under {engine}: "
        f"{memory.states / 1e9:.1f} GB of weights and optimizer, {memory.activations / 1e9:.1f} GB of activations for "
        f"{memory.micro_batch} images at once; resources.micro_batch lowers the latter"
    ]


def calibrate(study: Study, plan: Plan, *, seconds: float) -> Calibration:
    """Run cut-off copies of the smallest and the largest cell of each stage for about `seconds`.

    Raises ConfigError when their data is not packed or a cell fails.
    """
    study.require_datasets()
    chosen, measured = extreme_cells(plan.cells), []
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="dbscale-calibrate-") as folder:
        for number, cell in enumerate(chosen):
            share_s = (deadline - time.monotonic()) / (len(chosen) - number)
            measured.append(measure(study, Store(Path(folder)), cell, max(share_s, LEAST_SHARE_S)))
    flops_per_s, overhead_s = costs.fit_step_times([(each.step_flops, each.step_time_s) for each in measured])
    ratios: dict[Stage, list[float]] = {}
    for each in measured:
        ratios.setdefault(each.stage, []).append(each.step_time_s / (each.step_flops / flops_per_s + overhead_s))
    return Calibration(
        host=hostname(), device=study.cluster.device, created=time.time(), flops_per_s=flops_per_s,
        step_overhead_s=overhead_s, cell_overhead_s=statistics.median(each.overhead_s for each in measured),
        stage_scale={stage: statistics.fmean(found) for stage, found in ratios.items()}, measured=tuple(measured),
    )  # fmt: skip


def extreme_cells(cells: Sequence[Cell]) -> list[Cell]:
    """For each stage, the cell with the fewest operations a step and the one with the most; one where all are alike."""
    chosen: list[Cell] = []
    for stage in STAGES:
        found = sorted((cell for cell in cells if cell.recipe.stage == stage), key=step_flops)
        chosen += {step_flops(cell): cell for cell in found[:1] + found[-1:]}.values()
    return chosen


def describe_calibration(calibration: Calibration, cost: CostModel) -> str:
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


def measure(study: Study, store: Store, cell: Cell, share_s: float) -> Measured:
    """Train a copy of the cell in `store` for about `share_s`."""
    warm, _ = _run(study, store, cell, WARMUP_STEPS)
    num_steps = int(share_s / max(warm.timing.step_time_s, 1e-6))
    row, wall_s = _run(study, store, cell, min(max(num_steps, FEWEST_STEPS), MOST_STEPS))
    return Measured(
        cell=cell.key, stage=cell.recipe.stage, num_steps=row.num_steps, step_flops=step_flops(cell),
        step_time_s=row.timing.step_time_s, overhead_s=max(wall_s - row.timing.train_time_s, 0.0),
    )  # fmt: skip


def _run(study: Study, store: Store, cell: Cell, num_steps: int) -> tuple[Row, float]:
    """The row of `cell` after `num_steps`, and its wall time without that of its parents, which train for one step."""
    from dbscale.training.run import run_cell

    short = _cut(cell, num_steps)
    for parent in short.lineage[:-1]:
        _run(study, store, parent, 1)
    store.write_spec(short.spec())
    resources = study.cluster.shape(cell.recipe.stage).resources.model_copy(update={"tracker": None})
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        outcome = run_cell(store, short.key, data_dir=study.data_dir, resources=resources, stop=StopRequest())
    if outcome.row is None:
        raise ConfigError(f"the short copy of {cell.key} {outcome.status}: {outcome.reason}")
    return outcome.row, time.perf_counter() - started


def _cut(cell: Cell, num_steps: int) -> Cell:
    """The same cell with fewer steps, on parents of one step."""
    training = cell.recipe.training.model_copy(update={"budget": Budget(steps=num_steps)})
    teacher, init = (parent and _cut(parent, 1) for parent in (cell.teacher, cell.init))
    return Cell(cell.recipe.model_copy(update={"training": training}), cell.fingerprint, teacher=teacher, init=init)
