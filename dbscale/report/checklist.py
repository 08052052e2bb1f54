"""The reproducibility checklist for scaling-law studies of arXiv 2502.18969, answered from a study's own files.

The questions are worded anew after that survey; an answer that the files do not hold says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dbscale.report.arm_fits import LOSS
from dbscale.report.schema import BoundaryFile, LawsFile
from dbscale.report.table import RunTable
from dbscale.report.words import percent
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
    return (
        Entry("Which forms are considered?", "; ".join(equations) or "none could be fitted"),
        Entry("Which is used, and why?", f"{', '.join(chosen) or 'none'}; the smallest residuals, in sample and on the held-out largest D_p together"),
        Entry("What are the variables?", "D_p unique upstream images, M all parameters of the student with its downstream head, D_f unique labelled downstream images"),
        Entry("What is predicted?", "top-1 error rate on the downstream test split after finetuning"),
        Entry("Are the arms tied?", "no: every parameter is fitted to each arm on its own"),
    )  # fmt: skip


def _training(table: RunTable, specs: Sequence[CellSpec]) -> tuple[Entry, ...]:
    students = ", ".join(f"{name} ({table.params(name):,})" for name in table.students)
    return (
        Entry("How many models, of which sizes?", f"{len(table.pretrained)} finetuned runs of {len(table.students)} students: {students} parameters"),
        Entry("On how much data?", f"D_p {_values(table, 'upstream_samples')}; D_f {_values(table, 'downstream_samples')}; seeds {_values(table, 'seed')}"),
        Entry("Are images repeated in training?", _epochs(table)),
        Entry("Which architecture and optimiser?", _optimiser(specs)),
        Entry("How were hyperparameters chosen?", "fixed per stage for all sizes of model and data, as the grid states; not tuned per point"),
        Entry("How is compute counted?", "multiply-adds as two operations, backward as two forwards, the teacher's forward included (train_flops)"),
    )  # fmt: skip


def _values(table: RunTable, column: str) -> str:
    return ", ".join(f"{value:,}" for value in table.pretrained.values(column))


def _epochs(table: RunTable) -> str:
    shares = [run.upstream_samples_seen / run.upstream_samples for run in table.pretrained if run.upstream_samples_seen]
    if not shares:
        return UNKNOWN
    return f"yes: upstream runs see each image {min(shares):.3g} to {max(shares):.3g} times; the laws speak of this schedule alone"


def _optimiser(specs: Sequence[CellSpec]) -> str:
    texts = []
    for stage in ("pretrain", "distill", "finetune"):
        recipe = next((spec.recipe for spec in specs if spec.recipe.stage == stage), None)
        if recipe is not None:
            training = recipe.training
            texts.append(
                f"{stage}: AdamW, lr {training.optim.lr:g}, weight decay {training.optim.weight_decay:g}, warm-up and cosine, "
                f"batch {training.global_batch}, {training.precision}"
            )
    return "; ".join(texts) or UNKNOWN


def _collection(table: RunTable) -> tuple[Entry, ...]:
    sizes = sorted({run.num_test_samples for run in table if run.num_test_samples})
    return (
        Entry("Which metric, on which data?", f"top-1 error on {', '.join(table.values('dataset'))}; test sets of {', '.join(f'{s:,}' for s in sizes) or 'unrecorded size'} images"),
        Entry("How many checkpoints per run?", "one: the last; no intermediate checkpoint enters a fit"),
        Entry("Are metrics smoothed or changed?", "no; an error of 0 stands for half the smallest error above 0 in log fits"),
        Entry("Are runs left out?", f"runs without upstream data ({len(table.scratch)}) are shown, not fitted; {len(table.missing)} points have no result"),
        Entry("Are runs and code available?", "rows.csv beside this page holds every run; `dbscale fit rows.csv` refits from it alone"),
    )  # fmt: skip


def _fitting(table: RunTable, laws: LawsFile, boundary: BoundaryFile) -> tuple[Entry, ...]:
    fits = [fit for fit in laws.fits if fit.status == "fitted"]
    starts = [fit.law_fit["starts"] for fit in fits if "starts" in fit.law_fit]
    reached = f"; {min(s['reached'] for s in starts)} to {max(s['reached'] for s in starts)} of {max(s['tried'] for s in starts)} starts reached the best objective" if starts else ""
    held = [fit.held_out_rmsd_log for fit in fits if fit.chosen and fit.held_out_rmsd_log is not None]
    return (
        Entry("Which objective?", f"Huber (δ = {LOSS.delta:g}) on log(predicted / measured)"),
        Entry("Which optimiser, from where?", f"damped Newton on scaled parameters from many deterministic starts{reached}"),
        Entry("How many points, how many parameters?", "; ".join(dict.fromkeys(f"{f.law} {f.arm}: {f.num_runs} runs, {len(f.params)} parameters" for f in fits if f.chosen)) or "no fit"),
        Entry("How uncertain?", f"{percent(laws.level, 0)} percentile intervals from {laws.num_bootstraps} refits; upstream runs are redrawn with all their finetunes, the same ones in both arms"),
        Entry("How was it validated?", f"the largest D_p held out: root mean square log error {', '.join(percent(h) for h in held)}" if held else "not possible: too few values of D_p"),
        Entry("Is any claim extrapolated?", _extrapolated(boundary)),
    )  # fmt: skip


def _extrapolated(boundary: BoundaryFile) -> str:
    found = [record for record in boundary.boundaries if record.status == "extrapolated"]
    return f"{len(found)} of {len(boundary.boundaries)} boundaries lie outside the measured D_p and are marked so" if found else "no"
