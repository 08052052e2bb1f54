"""One step of every new kind of recipe on real data, before anything is queued: in a process of its own, for it needs torch.

A kind is all that decides whether a cell can be trained: stage, models, data, augmentation, precision; not the number of
samples, steps or the seed. Kinds of which a cell has run on this store before are left out. What a step does is
`dbscale.training.smoke`'s.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dbscale.errors import ConfigError
from dbscale.launch.study import Study
from dbscale.strict import Strict
from dbscale.study.cell import Cell, CellSpec, canonical_json
from dbscale.study.grid import unlike_cells
from dbscale.study.plan import Plan
from dbscale.study.recipe import Budget
from dbscale.study.resources import Resources
from dbscale.study.weights import weights_dir

PROVEN = frozenset({"done", "running", "interrupted"})
"""States of cells that have come as far as training."""
ANSWER = "smoke: "
TIMEOUT_S = 1800.0


class Job(Strict):
    """What the process is told, on its standard input."""

    data_dir: str
    weights: str
    """Folder of the store's imported weights."""
    lineages: tuple[tuple[CellSpec, ...], ...]
    """Each a cell, cut to one step, after all it builds on."""
    resources: tuple[Resources, ...]
    """What the last cell of each lineage runs with."""


def smoke(study: Study, plan: Plan) -> int:
    """Try one step of each new kind of recipe; returns how many there were.

    Raises ConfigError naming the first cell that cannot be trained, with the reason.
    """
    cells = new_kinds(plan)
    if not cells:
        return 0
    shapes = [study.cluster.shape(cell.recipe.stage).resources for cell in cells]
    job = Job(
        data_dir=str(study.data_dir.absolute()),
        weights=str(Path(weights_dir(study.store)).absolute()),
        lineages=tuple(tuple(part.spec() for part in cut(cell).lineage) for cell in cells),
        resources=tuple(shapes),
    )
    print(f"trying one step of {len(cells)} kinds of recipe (--no-smoke leaves it out)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "dbscale.launch.smoke"]
    done = subprocess.run(
        command, input=job.model_dump_json(), capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    answers = [line.removeprefix(ANSWER) for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode or len(answers) != len(cells):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ConfigError(f"the trial of one step ended with code {done.returncode}: {said}; --no-smoke leaves it out")
    for cell, answer in zip(cells, answers, strict=True):
        if answer != "good":
            raise ConfigError(f"{cell.key} cannot be trained: {answer} (one step was tried; nothing was started)")
    return len(cells)


def new_kinds(plan: Plan) -> list[Cell]:
    """The first cell of each kind of which none has come as far as training."""
    kinds: dict[str, Cell] = {}
    for cell in unlike_cells(plan.todo):
        kinds.setdefault(kind_of(cell), cell)
    proven = unlike_cells([cell for cell in plan.cells if plan.states[cell.key] in PROVEN])
    known = set(map(kind_of, proven))
    return [cell for kind, cell in kinds.items() if kind not in known]


def kind_of(cell: Cell) -> str:
    """Equal for cells that differ in nothing that a first step could show."""
    recipe = cell.recipe.model_dump(mode="json", exclude={"seed": True, "draw": True, "training": {"budget"}})
    del recipe["data"]["num_samples"], recipe["data"]["subset_seed"]
    parents = [parent.recipe.model.model_dump(mode="json") for parent in cell.parents]
    return canonical_json([recipe, parents])


def cut(cell: Cell) -> Cell:
    """The same cell with one step of the smallest batch, on parents cut in the same way."""
    training = cell.recipe.training
    batch = min(training.global_batch, 2 * training.augment.repeats)
    training = training.model_copy(update={"budget": Budget(steps=1), "global_batch": batch})
    teacher, init = (parent and cut(parent) for parent in (cell.teacher, cell.init))
    return Cell(cell.recipe.model_copy(update={"training": training}), cell.fingerprint, teacher=teacher, init=init)


def run(job: Job) -> Sequence[str]:
    """`good`, or why not, for each lineage."""
    from dbscale.training.smoke import try_step

    pairs = zip(job.lineages, job.resources, strict=True)
    places = Path(job.data_dir), Path(job.weights)
    return [try_step(lineage, *places, resources) or "good" for lineage, resources in pairs]


if __name__ == "__main__":
    for line in run(Job.model_validate_json(sys.stdin.read())):
        print(f"{ANSWER}{line}", flush=True)
