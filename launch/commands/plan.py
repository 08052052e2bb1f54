"""`dbscale plan`: what a grid needs, what of it stands, and what the rest will take.

Writes nothing but, with --calibrate, the machine's speed for this plan and later ones.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from typing import Any

from dbscale.study.calibration import write_calibration
from dbscale.study.cost import DEVICES, CostModel
from dbscale.study.plan import Plan, read_plan
from launch.options import AddCommand, add_study, study_of
from launch.study import Study, plan_study
from launch.text import duration, table

LONG_ON_A_CPU_S = 7 * 86400.0
"""A grid that takes longer was meant for GPUs: the plan then says what it would take there."""
STATES = ("done", "running", "interrupted", "failed", "blocked", "new")
STAGES = ("pretrain", "distill", "finetune")


def add_commands(add: AddCommand) -> None:
    parser = add("plan", run, "show what a grid needs: cells by stage and state, predicted device-hours, jobs")
    add_study(parser)
    parser.add_argument("--calibrate", nargs="?", type=float, const=60.0, metavar="SECONDS",
                        help="first measure this machine on the grid's cells, cut short, for about 60 seconds; later "
                        "plans on this store use it")  # fmt: skip
    parser.add_argument("--cells", action="store_true", help="also list every cell with its state and predicted time")


def run(arguments: argparse.Namespace) -> int:
    study = study_of(arguments)
    plan, cost = plan_study(study)
    if arguments.calibrate is not None:
        from launch.calibrate import calibrate
        from launch.calibrate import describe as describe_calibration

        calibration = calibrate(study, plan, seconds=arguments.calibrate)
        write_calibration(study.store, calibration)
        print(describe_calibration(calibration, study.cluster.cost_model().probed(calibration)) + "\n")
        plan, cost = plan_study(study)
    print("\n".join([describe(study, plan, cost), *power_text(study, plan, cost)]))
    if arguments.cells:
        rows = [(cell.key, plan.states[cell.key], duration(cost.seconds(cell))) for cell in plan.cells]
        print("\n" + table(rows, header=("cell", "state", "predicted")))
    return 0


def describe(study: Study, plan: Plan, cost: CostModel) -> str:
    """The page that `dbscale plan` prints."""
    grid = plan.grid
    lines = [
        f"grid {grid.name}: {grid.question.strip()}",
        f"store {study.store.root}, cluster {study.cluster.executor}",
        "",
    ]
    lines += [states_table(plan), ""]
    lines += [f"{len(plan.points)} points measured by {len(plan.cells)} cells; {device_time(study, plan, cost)}"]
    for number, wave in enumerate(plan.waves, start=1):
        longest = max(bundle.predicted_s for bundle in wave.bundles)
        cells = sum(len(bundle.cells) for bundle in wave.bundles)
        lines.append(f"wave {number}: {cells} cells in {len(wave.bundles)} bundles, the longest {duration(longest)}")
    if study.missing_datasets:
        lines.append(f"not packed yet: {', '.join(study.missing_datasets)} (`dbscale submit` packs them; ids of cells "
                     "that read them are provisional until then)")  # fmt: skip
    if plan.stale:
        lines.append(f"{len(plan.stale)} cells of an earlier plan are no longer asked for; their results stay")
    if not plan.waves:
        lines.append("nothing left to run")
    return "\n".join(lines)


def power_text(study: Study, plan: Plan, cost: CostModel) -> list[str]:
    """What the design can tell apart, for grids that compare two arms."""
    design = design_of(plan, cost)
    if design is None:
        return []
    from dbscale.report.power import Design, plan_power
    from dbscale.report.reduce import collect

    known = read_plan(study.store, plan.grid.name) if plan.count()["done"] else None
    table = collect(study.store, known) if known is not None else None
    return ["", *plan_power(Design(**design), table, f"{plan.grid.name}_{plan.grid.downstream[0].dataset}")]


def design_of(plan: Plan, cost: CostModel) -> dict[str, Any] | None:
    """Sizes and costs of the main contrast: the first downstream set, students with both arms; None without any."""
    main = [point for point in plan.points if point.cell.recipe.data.dataset == plan.grid.downstream[0].dataset]
    distilled = [point for point in main if point.arm == "distilled"]
    sizes = sorted({point.upstream_num_samples for point in distilled})
    if not sizes:
        return None
    students = {point.student for point in distilled}
    runs = [point.cell for point in main if point.student in students and point.upstream_num_samples]
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


def states_table(plan: Plan) -> str:
    """Cells by stage and state; columns that are empty everywhere are left out."""
    counts = Counter((cell.recipe.stage, plan.states[cell.key]) for cell in plan.cells)
    shown = [state for state in STATES if any(counts[stage, state] for stage in STAGES)]
    stages = [stage for stage in STAGES if any(counts[stage, state] for state in STATES)]
    rows = [(stage, *(counts[stage, state] for state in shown)) for stage in stages]
    return table(rows, header=("stage", *shown))


def device_time(study: Study, plan: Plan, cost: CostModel) -> str:
    """Predicted device time left, and what that means on this machine."""
    text = f"{duration(plan.predicted_s)} of {cost.device.name} time left"
    if study.cluster.executor == "local" and plan.predicted_s:
        workers = study.cluster.num_workers()
        text += f", {duration(plan.predicted_s / workers)} on {workers} workers"
    if cost.device.name == "cpu" and plan.predicted_s > LONG_ON_A_CPU_S:
        gpu = CostModel(DEVICES["h100"])
        left = sum(gpu.seconds(cell) for wave in plan.waves for bundle in wave.bundles for cell in bundle.cells)
        text += f"; on GPUs about {left / 3600:,.0f} H100-hours, see --cluster slurm"
    return text
