"""`report.html`: one self-contained page that works offline; the answer first, then what it rests on.

Draws a table, its findings and where they came from (a grid's store, or a table alone, which knows less); never fits.
The template escapes all values; figures are Vega-Lite, drawn by the Vega that the page carries.
"""

from __future__ import annotations

import base64
import datetime
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dbscale import __version__
from dbscale.errors import FileError
from dbscale.files import atomic_open
from dbscale.report import words
from dbscale.report.figures import Figure, export, grouped, hunt_figure, slug, study_figures, themes
from dbscale.report.findings import Findings, Options, refresh, refresh_table
from dbscale.report.hunt import HuntStory, hunt_story
from dbscale.report.reduce import load_plan
from dbscale.report.schema import ContrastRecord, Note
from dbscale.report.table import MissingPoint, Run, RunTable
from dbscale.report.words import say
from dbscale.study.cell import CellSpec
from dbscale.study.cost import duration
from dbscale.study.plan import PlanRecord
from dbscale.study.store import Store

TEMPLATES = Path(__file__).parent / "templates"
MOST_NOTES = 5
"""Notes that are open on the page; further ones fold."""
STAGES = ("pretrain", "distill", "finetune")
Cell = dict[str, Any]
"""A line of the page's table of cells: `key`, `state`, and what is known of its row, by the row's names."""


def write_report(store: Store, grid_name: str) -> Path:
    """Write `<store>/grids/<name>/report.html`, judging anew only where rows changed; returns its path."""
    table, findings = refresh(store, grid_name)
    background = of_grid(store, load_plan(store, grid_name), table)
    story = hunt_story(store, grid_name, findings.boundary.contrasts)
    return write_page(table, findings, background, store.grid_dir(grid_name), story)


def write_table_report(
    path: Path, folder: Path, columns: Mapping[str, str] | None = None, options: Options | None = None
) -> Path:
    """The same from a table alone, with laws.json and boundary.json beside it; returns the page's path."""
    table, findings = refresh_table(path, folder, options, columns)
    return write_page(table, findings, of_table(path, table), folder)


def export_figures(table: RunTable, findings: Findings, folder: Path) -> list[Path]:
    """Every figure of a study as SVG and PDF; returns the paths."""
    return export(study_figures(findings.boundary.contrasts, table, findings.laws).values(), folder)


# Where the runs came from.


@dataclass(frozen=True)
class Background:
    """What a page tells beside the verdicts: which cells there are, what they cost, how they were trained."""

    origin: str
    """A sentence for the footer."""
    cells: tuple[Cell, ...]
    """Unfinished ones first."""
    cost: str
    """Actual device time against the planned one, said."""
    missing: tuple[Cell, ...] = ()
    """Cells without a result, with reason, log and points_lost by their absence."""
    specs: tuple[CellSpec, ...] = ()
    notes: tuple[Note, ...] = ()
    """Damaged files that the page does without."""

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Costs by stage, device and host, in the order cells run."""
        groups: dict[tuple[str, ...], list[Cell]] = {}
        for cell in self.cells:
            if cell["state"] == "done":
                groups.setdefault((cell["stage"], cell["device"], cell["host"]), []).append(cell)
        ordered = sorted(groups.items(), key=lambda item: (STAGES.index(item[0][0]), item[0]))
        return [dict(zip(("stage", "device", "host"), place, strict=True)) | _sums(cells) for place, cells in ordered]


def _sums(cells: Sequence[Cell]) -> dict[str, Any]:
    def over(function: Any, name: str) -> Any:
        known = [cell[name] for cell in cells if cell.get(name) is not None]
        return function(known).item() if known else None

    return {
        "num_cells": len(cells), "device_time_s": over(np.sum, "device_time_s"), "longest_s": over(np.max, "device_time_s"),
        "images_per_s": over(np.median, "images_per_s"), "data_wait_share": over(np.mean, "data_wait_share"),
        "num_attempts": over(np.sum, "num_attempts"),
    }  # fmt: skip


def of_grid(store: Store, plan: PlanRecord, table: RunTable) -> Background:
    """All that the store holds of a planned grid."""
    rows = {key: store.read_row(key) for key in plan.cells}
    cells = [
        {"state": "done"} | row.model_dump(exclude={"timing"}) | row.timing.model_dump() if row else
        {"key": key, "state": store.state(key)} for key, row in rows.items()
    ]  # fmt: skip
    specs, notes = _specs(store, plan)
    return Background(
        f"Planned {day(plan.created)}", tuple(sorted(cells, key=lambda cell: cell["state"] == "done")),
        _cost(cells, plan.predicted_device_s), tuple(_lost_cells(table, store, plan)), tuple(specs), tuple(notes),
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
    upstream = {run.upstream_key: _upstream_cell(run) for run in table if run.upstream_key}
    found = [*upstream.values(), *(_finetune_cell(run) for run in table)]
    cells = tuple(cell for cell in found if cell["device_time_s"] is not None)
    cost = _cost(cells, 0.0) if cells else say("no_cost", count=len(table))
    return Background(f"Made from the table {path.name} alone", cells, cost)


def _upstream_cell(run: Run) -> Cell:
    return {
        "key": run.upstream_key, "state": "done", "stage": run.upstream_stage or "pretrain", "arm": run.arm,
        "dataset": run.upstream_dataset, "num_samples": run.upstream_samples, "seed": run.seed,
        "error_rate": run.upstream_error_rate, "device": run.device, "host": run.host,
        "device_time_s": run.upstream_device_time_s,
        "images_per_s": _speed(run.upstream_samples_seen, run.upstream_device_time_s),
    }  # fmt: skip


def _finetune_cell(run: Run) -> Cell:
    own = {"state": "done", "stage": "finetune", "num_samples": run.downstream_samples}
    return vars(run) | own | {"images_per_s": _speed(run.samples_seen, run.train_time_s)}


def _speed(samples: float | None, seconds: float | None) -> float | None:
    return samples / seconds if samples and seconds else None


def _cost(cells: Sequence[Cell], predicted_s: float) -> str:
    """Actual against predicted device time, said."""
    times = [cell["device_time_s"] for cell in cells if cell["state"] == "done"]
    of_plan = ""
    if predicted_s > 0 and times:
        code = "cost_so_far" if len(times) < len(cells) else "cost_share"
        of_plan = say(code, share=sum(times) / predicted_s, predicted=duration(predicted_s))
    return say("cost", done=len(times), cells=len(cells), time=duration(sum(times)), of_plan=of_plan)


def _lost_cells(table: RunTable, store: Store, plan: PlanRecord) -> list[Cell]:
    """Cells without a row, failed ones first, then by how many points they stand in the way of."""
    found: dict[str, list[MissingPoint]] = {}
    for point in table.missing:
        found.setdefault(point.culprit, []).append(point)
        if point.key != point.culprit and store.state(point.key) in ("failed", "blocked"):
            found.setdefault(point.key, []).append(point)
    lost = []
    for key in (key for key in plan.cells if key in found):
        told = found[key][0] if found[key][0].culprit == key else store.last_attempt(key)
        lost.append({
            "key": key, "state": store.state(key), "reason": (told and told.reason) or "blocked",
            "log": (told and told.log) or "", "points_lost": len({(p.variant, p.key) for p in found[key]}),
        })  # fmt: skip
    return sorted(lost, key=lambda cell: (cell["state"] != "failed", -cell["points_lost"]))


def day(seconds: float | None = None) -> str:
    """A moment in Unix time, or now, as a page dates it."""
    utc = datetime.UTC
    moment = datetime.datetime.now(tz=utc) if seconds is None else datetime.datetime.fromtimestamp(seconds, utc)
    return f"{moment:%d %B %Y %H:%M} UTC"


# The page.


def write_page(
    table: RunTable, findings: Findings, background: Background, folder: Path, hunt: HuntStory | None = None
) -> Path:
    """The page of a study, and of the hunt that chose its runs, if one did; returns its path."""
    laws, boundary = findings.laws, findings.boundary
    path = hunt_figure(hunt.rows) if hunt else None
    return _write(
        folder / "report.html", title=table.grid, question=table.question, contrasts=boundary.contrasts,
        figures=study_figures(boundary.contrasts, table, laws) | ({path.name: path} if path else {}),
        notes=(*boundary.notes, *laws.notes, *background.notes), origin=background.origin,
        study={"laws": laws, "boundary": boundary, "settings": table.settings, "table": table, "background": background,
               "hunt": hunt},
    )  # fmt: skip


def compare_page(record: ContrastRecord, folder: Path, *, notes: Sequence[str] = ()) -> Path:
    """The same kind of page for one contrast of any table, with its SVG-ready figure; returns the page's path."""
    record = record.model_copy(update={"main": True})
    sides = " or ".join(words.side_of(record, side) for side in "ab")
    return _write(
        folder / "compare.html", title=record.dataset, contrasts=(record,), figures=study_figures([record]),
        question=f"Which gives the lower {words.metric_of(record.metric)}: {sides}?",
        notes=[Note(code="table", text=text) for text in notes], origin=f"Made from the table {record.dataset}", study={},
    )  # fmt: skip


def _write(
    path: Path, *, contrasts: Sequence[ContrastRecord], figures: Mapping[str, Figure], notes: Sequence[Note],
    origin: str, study: Mapping[str, Any], **texts: str,
) -> Path:  # fmt: skip
    """Write the page, everything inlined; `study` holds what only a whole study has."""
    import jinja2
    from markupsafe import Markup

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {name: value for name, value in vars(words).items() if callable(value)}
    environment.filters |= {"slug": slug, "duration": duration,
                            "epochs": lambda run: run.upstream_samples_seen / run.upstream_samples}  # fmt: skip
    environment.globals["span"] = words.span
    parts = {name: Markup((TEMPLATES / f"report.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    html = environment.get_template("report.html.j2").render(
        contrasts=contrasts, main=next((record for record in contrasts if record.main), None), figures=figures,
        groups=grouped(contrasts), open_notes=notes[:MOST_NOTES], more_notes=notes[MOST_NOTES:],
        family=words.family_text(contrasts), footer=f"dbscale {__version__}. {origin}; page written {day()}.",
        specs=packed({name: figure.spec() for name, figure in figures.items()}), themes=themes(), vega=Markup(_vega()),
        css=parts["css"], javascript=parts["js"], study=study, **study, **texts,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path, "w") as file:
        file.write(html)
    return path


def packed(value: object) -> str:
    """JSON, compressed (a tenth of its size) and as text that any page may hold; report.js unpacks it."""
    return base64.b64encode(gzip.compress(json.dumps(value, allow_nan=False).encode(), mtime=0)).decode()


@cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script, safe inside a script element."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
