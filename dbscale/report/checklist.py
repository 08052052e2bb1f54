"""The reproducibility checklist for scaling-law studies of arXiv 2502.18969, answered from a study's own files.

The questions are worded anew after that survey; an answer that the files do not hold says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dbscale.report.arm_fits import LOSS
from dbscale.report.schema import BoundaryFile, FitRecord, LawsFile
from dbscale.report.table import RunTable
from dbscale.report.words import percent, symbols
from dbscale.study.cell import CellSpec

UNKNOWN = "not recorded in rows.csv; see the grid's YAML"


@dataclass(frozen=True)
class Entry:
    question: str
    answer: str


@dataclass(frozen=True)
class Part:
    title: str
    entries: tuple[Entry, ...]


def checklist(table: RunTable, laws: LawsFile, boundary: BoundaryFile, specs: Sequence[CellSpec]) -> tuple[Part, ...]:
    """The four parts of the survey: hypothesis, training, data collection, fitting."""
    return (
        Part("The law", _hypothesis(laws)),
        Part("Training", _training(table, specs)),
        Part("What was measured", _collection(table)),
        Part("The fit", _fitting(table, laws, boundary)),
    )


def _hypothesis(laws: LawsFile) -> tuple[Entry, ...]:
    equations = list(dict.fromkeys(f"{fit.law}: {fit.equation}" for fit in laws.fits if fit.equation))
    chosen = list(dict.fromkeys(f"{fit.law} on {fit.dataset}" for fit in laws.fits if fit.chosen))
    why = "the smallest residuals, in sample and on the held-out largest D_p together"
    variables = (
        "D_p unique upstream images, M parameters with the downstream head, D_f unique labelled downstream images"
    )
    return (
        Entry("Which forms are considered?", symbols("; ".join(equations)) or "none could be fitted"),
        Entry("Which is used, and why?", f"{', '.join(chosen) or 'none'}; {why}"),
        Entry("What are the variables?", variables),
        Entry("What is predicted?", "top-1 error rate on the downstream test split after finetuning"),
        Entry("Are the arms tied?", "no: every parameter is fitted to each arm on its own"),
    )


def _training(table: RunTable, specs: Sequence[CellSpec]) -> tuple[Entry, ...]:
    students = ", ".join(f"{name} ({table.params(name):,})" for name in table.students)
    models = f"{len(table.pretrained)} finetuned runs of {len(table.students)} students: {students} parameters"
    sizes = f"D_p {_values(table, 'upstream_samples')}; D_f {_values(table, 'downstream_samples')}"
    compute = "multiply-adds as two operations, backward as two forwards, the teacher's forward included (train_flops)"
    return (
        Entry("How many models, of which sizes?", models),
        Entry("On how much data?", f"{sizes}; seeds {_values(table, 'seed')}"),
        Entry("Are images repeated in training?", _epochs(table)),
        Entry("Which architecture and optimiser?", _optimiser(specs)),
        Entry(
            "How were hyperparameters chosen?",
            "fixed per stage over all sizes, as the grid states; not tuned per point",
        ),
        Entry("How is compute counted?", compute),
    )


def _values(table: RunTable, column: str) -> str:
    return ", ".join(f"{value:,}" for value in table.pretrained.values(column))


def _epochs(table: RunTable) -> str:
    shares = [run.upstream_samples_seen / run.upstream_samples for run in table.pretrained if run.upstream_samples_seen]
    if not shares:
        return UNKNOWN
    times = f"{min(shares):.3g} to {max(shares):.3g} times"
    return f"yes: upstream runs see each image {times}; the laws speak of this schedule alone"


def _optimiser(specs: Sequence[CellSpec]) -> str:
    texts = []
    for stage in ("pretrain", "distill", "finetune"):
        recipe = next((spec.recipe for spec in specs if spec.recipe.stage == stage), None)
        if recipe is not None:
            optim, training = recipe.training.optim, recipe.training
            texts.append(
                f"{stage}: AdamW, lr {optim.lr:g}, weight decay {optim.weight_decay:g}, warm-up and cosine, "
                f"batch {training.global_batch}, {training.precision}"
            )
    return "; ".join(texts) or UNKNOWN


def _collection(table: RunTable) -> tuple[Entry, ...]:
    sizes = ", ".join(f"{size:,}" for size in sorted({run.num_test_samples for run in table if run.num_test_samples}))
    metric = f"top-1 error on {', '.join(table.values('dataset'))}; test sets of {sizes or 'unrecorded size'} images"
    left_out = f"runs without upstream data ({len(table.scratch)}) are shown, not fitted"
    return (
        Entry("Which metric, on which data?", metric),
        Entry("How many checkpoints per run?", "one: the last; no intermediate checkpoint enters a fit"),
        Entry("Are metrics smoothed or changed?", "no; in log fits an error of 0 stands for half the smallest above 0"),
        Entry("Are runs left out?", f"{left_out}; {len(table.missing)} points have no result"),
        Entry(
            "Are runs and code available?",
            "rows.csv holds every run; `dbscale report --table rows.csv` fits and draws all of this from it",
        ),
    )


def _fitting(table: RunTable, laws: LawsFile, boundary: BoundaryFile) -> tuple[Entry, ...]:
    fits = [fit for fit in laws.fits if fit.status == "fitted"]
    held = ", ".join(percent(fit.held_out_rmsd_log) for fit in fits if fit.chosen and fit.held_out_rmsd_log is not None)
    counts = dict.fromkeys(
        f"{fit.law} {fit.arm}: {fit.num_runs} runs, {len(fit.params)} parameters" for fit in fits if fit.chosen
    )
    intervals = (
        f"{percent(laws.level, 0)} percentile intervals from {laws.num_bootstraps} refits; upstream runs are redrawn "
        "with all their finetunes, the same ones in both arms"
    )
    validated = f"the largest D_p held out: root mean square log error {held}" if held else "too few values of D_p"
    return (
        Entry("Which objective?", f"Huber (δ = {LOSS.delta:g}) on log(predicted / measured)"),
        Entry("Which optimiser, from where?", f"damped Newton on scaled parameters{_starts(fits)}"),
        Entry("How many points, how many parameters?", "; ".join(counts) or "no fit"),
        Entry("How uncertain?", intervals),
        Entry("How was it validated?", validated),
        Entry("Is any claim extrapolated?", _extrapolated(boundary)),
    )


def _starts(fits: Sequence[FitRecord]) -> str:
    """How many of the deterministic starts ended at the best objective."""
    starts = [fit.law_fit["starts"] for fit in fits if fit.law_fit is not None]
    if not starts:
        return ""
    reached = f"{min(s['reached'] for s in starts)} to {max(s['reached'] for s in starts)}"
    return (
        f" from {max(s['tried'] for s in starts)} deterministic starts, {reached} of which reached the best objective"
    )


def _extrapolated(boundary: BoundaryFile) -> str:
    found = [record for record in boundary.boundaries if record.status == "extrapolated"]
    return (
        f"{len(found)} of {len(boundary.boundaries)} boundaries lie outside the measured D_p and are marked so"
        if found
        else "no"
    )
