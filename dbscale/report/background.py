"""What a page tells beside the verdicts: which cells there are, what they cost, how they were trained.

From a grid's store, or from a table alone, which knows less. Reads; the page draws, `words` holds the checklist.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbscale.errors import FileError
from dbscale.report.schema import BoundaryFile, LawsFile, Note
from dbscale.report.table import MissingPoint, RunTable
from dbscale.report.words import checklist, count, duration, listed, percent, say, symbols
from dbscale.study.cell import CellSpec
from dbscale.study.plan import PlanRecord
from dbscale.study.store import Row, Store

STAGES = ("pretrain", "distill", "finetune")


class CellCost(NamedTuple):
    """What one finished cell took; None where a table does not tell."""

    stage: str
    device: str
    host: str
    device_time_s: float
    images_per_s: float | None = None
    data_wait_share: float | None = None
    num_attempts: int | None = None


@dataclass(frozen=True)
class Background:
    """Where the runs came from; the mappings are lines of the page's tables."""

    origin: str
    """A sentence for the footer."""
    costs: tuple[CellCost, ...]
    cost: str
    """Actual device time against the planned one, said; empty where unknown."""
    missing: tuple[dict[str, Any], ...] = ()
    """Cells without a result: key, state, reason, log, and points_lost by their absence."""
    cells: tuple[dict[str, Any], ...] = ()
    """Unfinished ones first."""
    specs: tuple[CellSpec, ...] = ()
    notes: tuple[Note, ...] = ()
    """Damaged files that the page does without."""

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Costs by stage, device and host, in the order cells run."""
        groups: dict[tuple[str, str, str], list[CellCost]] = {}
        for cost in self.costs:
            groups.setdefault(cost[:3], []).append(cost)
        ordered = sorted(groups.items(), key=lambda item: (STAGES.index(item[0][0]), item[0]))
        return [dict(zip(("stage", "device", "host"), place, strict=True)) | _sums(cells) for place, cells in ordered]


def _sums(cells: Sequence[CellCost]) -> dict[str, Any]:
    def over(function: Any, name: str) -> Any:
        known = [getattr(cell, name) for cell in cells if getattr(cell, name) is not None]
        return function(known).item() if known else None

    return {
        "num_cells": len(cells), "device_time_s": over(np.sum, "device_time_s"), "longest_s": over(np.max, "device_time_s"),
        "images_per_s": over(np.median, "images_per_s"), "data_wait_share": over(np.mean, "data_wait_share"),
        "num_attempts": over(np.sum, "num_attempts"),
    }  # fmt: skip


def of_grid(store: Store, plan: PlanRecord, table: RunTable) -> Background:
    """All that the store holds of a planned grid."""
    rows = {key: store.read_row(key) for key in plan.cells}
    specs, notes = _specs(store, plan)
    costs = tuple(_cost_of_row(row) for row in rows.values() if row is not None)
    entries = [_entry(store, key, row) for key, row in rows.items()]
    return Background(
        f"Planned {day(plan.created)}", costs, _cost_text(costs, len(plan.cells), plan.predicted_device_s),
        tuple(_lost_cells(table, store, plan)), tuple(sorted(entries, key=lambda entry: entry["state"] == "done")),
        tuple(specs), tuple(notes),
    )  # fmt: skip


def _specs(store: Store, plan: PlanRecord) -> tuple[list[CellSpec], list[Note]]:
    """The recipes that can be read, and a note on each that cannot."""
    specs, notes = [], []
    for key in plan.cells:
        if not (store.cell_dir(key) / "recipe.json").exists():
            continue
        try:
            specs.append(store.read_spec(key))
        except FileError as error:
            notes.append(Note(code="table", text=str(error)))
    return specs, notes


def of_table(path: Path, table: RunTable) -> Background:
    """What a table of runs tells of itself; every upstream run that it names counts once."""
    upstream = {run.upstream_key: run for run in table if run.upstream_key and run.upstream_device_time_s is not None}
    costs = [
        CellCost(run.upstream_stage or "pretrain", run.device, run.host, run.upstream_device_time_s or 0.0,
                 _speed(run.upstream_samples_seen, run.upstream_device_time_s))
        for run in upstream.values()
    ] + [
        CellCost("finetune", run.device, run.host, run.device_time_s, _speed(run.samples_seen, run.train_time_s),
                 num_attempts=run.num_attempts)
        for run in table if run.device_time_s is not None
    ]  # fmt: skip
    text = _cost_text(costs, len(costs), 0.0) or say("no_cost", count=len(table))
    return Background(f"Made from the table {path.name} alone", tuple(costs), text)


def _speed(samples: float | None, seconds: float | None) -> float | None:
    return samples / seconds if samples and seconds else None


def _cost_of_row(row: Row) -> CellCost:
    timing = row.timing
    return CellCost(row.stage, timing.device, timing.host, timing.device_time_s, timing.images_per_s,
                    timing.data_wait_share, timing.num_attempts)  # fmt: skip


def _cost_text(costs: Sequence[CellCost], num_cells: int, predicted_s: float) -> str:
    """Actual against predicted, said."""
    if not costs:
        return ""
    actual = sum(cost.device_time_s for cost in costs)
    text = say("cost", done=len(costs), cells=num_cells, time=duration(actual))
    if predicted_s <= 0:
        return text + say("end")
    code = "cost_so_far" if len(costs) < num_cells else "cost_share"
    return text + say(code, share=actual / predicted_s, predicted=duration(predicted_s))


def _lost_cells(table: RunTable, store: Store, plan: PlanRecord) -> list[dict[str, Any]]:
    """Cells without a row, failed ones first, then by how many points they stand in the way of."""
    found: dict[str, list[MissingPoint]] = {}
    for point in table.missing:
        found.setdefault(point.culprit, []).append(point)
        if point.key != point.culprit and store.state(point.key) in ("failed", "blocked"):
            found.setdefault(point.key, []).append(point)
    lost = []
    for key in (key for key in plan.cells if key in found):
        point, attempt = found[key][0], store.last_attempt(key)
        told = point if point.culprit == key else attempt
        lost.append({
            "key": key, "state": store.state(key), "reason": (told and told.reason) or "blocked",
            "log": (told and told.log) or "", "points_lost": len({(p.variant, p.key) for p in found[key]}),
        })  # fmt: skip
    return sorted(lost, key=lambda cell: (cell["state"] != "failed", -cell["points_lost"]))


def _entry(store: Store, key: str, row: Row | None) -> dict[str, Any]:
    """A cell's line in the list of all cells."""
    if row is None:
        names = ("arm", "dataset", "samples", "seed", "params", "error", "time")
        return {"key": key, "state": store.state(key)} | dict.fromkeys(names, "")
    return {
        "key": key, "state": "done", "arm": row.arm, "dataset": row.dataset, "samples": count(row.num_samples),
        "seed": row.seed, "params": count(row.num_params), "error": percent(row.error_rate),
        "time": duration(row.timing.device_time_s),
    }  # fmt: skip


def day(seconds: float | None = None) -> str:
    """A moment, or now, as a page dates it."""
    utc = datetime.UTC
    moment = datetime.datetime.now(tz=utc) if seconds is None else datetime.datetime.fromtimestamp(seconds, utc)
    return f"{moment:%d %B %Y %H:%M} UTC"


def answered_checklist(
    table: RunTable, laws: LawsFile, boundary: BoundaryFile, specs: Sequence[CellSpec]
) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """The reproducibility checklist of arXiv 2502.18969, filled in from the study's own files."""
    fitted = [law for law in laws.laws if not law.reason and law.metric == "error_rate"]
    verdicts = [record.verdict for record in boundary.contrasts if record.verdict is not None]
    shares = [run.upstream_samples_seen / run.upstream_samples for run in table.pretrained if run.upstream_samples_seen]
    sizes = sorted({run.num_test_samples for run in table if run.num_test_samples})
    return checklist(
        forms=symbols("; ".join(dict.fromkeys(f"{law.law}: {law.equation}" for law in fitted))),
        tried=listed(dict.fromkeys(each.law for law in fitted for each in law.candidates)),
        students=", ".join(f"{name} ({table.params(name):,} parameters)" for name in table.students),
        data=f"D_p {_values(table, 'upstream_samples')}; D_f {_values(table, 'downstream_samples')}",
        seeds=_values(table, "seed"), optimiser=_optimiser(specs),
        epochs=f"{min(shares):.3g} to {max(shares):.3g} times" if shares else "",
        datasets=listed(table.values("dataset")), test_sizes=listed(map(count, sizes)),
        left_out=f"{len(table.scratch)} runs without upstream data are shown, not fitted; {len(table.missing)} points "
        "have no result",
        points="; ".join(f"{law.dataset}, {law.arm}: {law.num_runs} runs" for law in fitted),
        held_out=listed(percent(law.held_out) for law in fitted if law.held_out is not None),
        verdicts=str(len(verdicts)), level=percent(boundary.level, 0),
    )  # fmt: skip


def _values(table: RunTable, column: str) -> str:
    return ", ".join(f"{value:,}" for value in table.pretrained.values(column))


def _optimiser(specs: Sequence[CellSpec]) -> str:
    texts = []
    for stage in STAGES:
        recipe = next((spec.recipe for spec in specs if spec.recipe.stage == stage), None)
        if recipe is not None:
            optim, training = recipe.training.optim, recipe.training
            texts.append(f"{stage}: AdamW, lr {optim.lr:g}, weight decay {optim.weight_decay:g}, warm-up and cosine, "
                         f"batch {training.global_batch}, {training.precision}")  # fmt: skip
    return "; ".join(texts)
