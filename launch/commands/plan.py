"""`dbscale plan`: what a grid needs, what of it stands, and what the rest will take.  Writes nothing."""

from __future__ import annotations

import argparse
from collections import Counter

from dbscale.study.cost import CostModel
from dbscale.study.plan import Plan
from launch.options import AddCommand, add_study, study_of
from launch.study import Study, plan_study
from launch.text import duration, table

STATES = ("done", "running", "interrupted", "failed", "blocked", "new")
STAGES = ("pretrain", "distill", "finetune")


def add_commands(add: AddCommand) -> None:
    parser = add("plan", run, "show what a grid needs: cells by stage and state, predicted device-hours, jobs")
    add_study(parser)
    parser.add_argument("--cells", action="store_true", help="also list every cell with its state and predicted time")


def run(arguments: argparse.Namespace) -> int:
    study = study_of(arguments)
    plan, cost = plan_study(study)
    print(describe(study, plan, cost))
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
    return text
