"""`report.html`: one self-contained page that works offline; the answer first, then what it rests on.

Reads plan, rows, laws.json and boundary.json; draws, never fits. All values are escaped by the template.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dbscale import __version__
from dbscale.report import panels
from dbscale.report.boundary_figure import boundary_figure
from dbscale.report.checklist import Part, checklist
from dbscale.report.costs import Cost, LostCell, cost_of, duration, lost_cells
from dbscale.report.figures import delta_figure, error_figure, pooled_figure
from dbscale.report.fits import Findings
from dbscale.report.notes import setting_of
from dbscale.report.plotly_axes import Figure
from dbscale.report.predictors import Correlation, correlations
from dbscale.report.reduce import load_plan
from dbscale.report.refresh import refresh
from dbscale.report.schema import BoundaryFile, FitRecord, LawsFile, TransferRecord
from dbscale.report.style import LOOKS
from dbscale.report.table import RunTable, Setting
from dbscale.report.trust_figures import predicted_figure, residual_figure
from dbscale.report.words import percent, symbols
from dbscale.study.plan import PlanRecord
from dbscale.study.store import Store, atomic_open

TEMPLATES = Path(__file__).parent / "templates"
WIDEST = 4
"""Panels side by side on a laptop screen."""


@dataclass(frozen=True)
class SettingPart:
    """The figures and fits of one downstream set (and variant)."""

    label: str
    pooled: Figure | None
    """The page's first picture."""
    boundary: Figure | None
    delta: tuple[Figure, ...]
    by_upstream: tuple[Figure, ...]
    by_labels: tuple[Figure, ...]
    by_params: tuple[Figure, ...]
    predicted: Figure | None
    residuals: Figure | None
    fits: tuple[FitRecord, ...]
    transfer: tuple[TransferRecord, ...]

    @property
    def equations(self) -> list[str]:
        return list(dict.fromkeys(f"{fit.law}: {fit.equation}" for fit in self.fits if fit.equation))

    @property
    def figures(self) -> list[Figure]:
        single = [self.pooled, self.boundary, self.predicted, self.residuals]
        return [f for f in single if f] + [*self.delta, *self.by_upstream, *self.by_labels, *self.by_params]


@dataclass(frozen=True)
class Tile:
    value: str
    label: str


@dataclass(frozen=True)
class Page:
    """Everything the template shows."""

    grid: str
    question: str
    answers: tuple[str, ...]
    tiles: tuple[Tile, ...]
    notes: tuple[str, ...]
    settings: tuple[SettingPart, ...]
    arms: tuple[dict[str, str], ...]
    level: str
    law_names: str
    predictors: tuple[Correlation, ...]
    cost: Cost
    missing: tuple[LostCell, ...]
    cells: tuple[dict[str, Any], ...]
    checklist: tuple[Part, ...]
    footer: str

    @property
    def figures(self) -> dict[str, Any]:
        return {figure.id: figure.spec for setting in self.settings for figure in setting.figures}


def write_report(store: Store, grid_name: str) -> Path:
    """Write `<store>/grids/<name>/report.html`, fitting anew only where rows changed; returns its path."""
    table, findings = refresh(store, grid_name)
    page = make_page(store, load_plan(store, grid_name), table, findings)
    path = store.grid_dir(grid_name) / "report.html"
    with atomic_open(path, "w") as file:
        file.write(render(page))
    return path


def render(page: Page) -> str:
    """The page as HTML, everything inlined."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "duration": duration,
        "symbol": symbols,
        "share": lambda value: "–" if value is None else percent(value),
    }
    parts = {name: Markup((TEMPLATES / f"report.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    return environment.get_template("report.html.j2").render(
        page=page, css=parts["css"], javascript=parts["js"], plotly=Markup(get_plotlyjs())
    )  # fmt: skip


def make_page(store: Store, plan: PlanRecord, table: RunTable, findings: Findings) -> Page:
    laws, boundary = findings.laws, findings.boundary
    rows = {key: store.read_row(key) for key in plan.cells}
    done = [row for row in rows.values() if row is not None]
    specs = [store.read_spec(key) for key in plan.cells if (store.cell_dir(key) / "recipe.json").exists()]
    cost = cost_of(plan, done)
    return Page(
        grid=plan.grid, question=plan.question, answers=boundary.answers, tiles=tuple(_tiles(table, cost)),
        notes=(*laws.notes, *boundary.notes), settings=tuple(
            setting_part(table, laws, boundary, setting, number) for number, setting in enumerate(table.settings, start=1)
        ),
        arms=tuple(_arm(name) for name in (*table.arms, *(("scratch",) if len(table.scratch) else ()))),
        level=percent(laws.level, 0), law_names=_law_names(laws),
        predictors=tuple(correlations(table, level=laws.level)),
        cost=cost, missing=tuple(lost_cells(table, store, plan)), cells=tuple(_cells(store, plan, rows)),
        checklist=checklist(table, laws, boundary, specs),
        footer=f"dbscale {__version__}. Planned {_day(plan.created)}; page written {_day(None)}. "
        "Numbers: rows.csv, laws.json and boundary.json beside this file.",
    )  # fmt: skip


def _day(seconds: float | None) -> str:
    moment = (
        datetime.datetime.now(tz=datetime.UTC)
        if seconds is None
        else datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    )
    return f"{moment:%d %B %Y %H:%M} UTC"


def _law_names(laws: LawsFile) -> str:
    names = list(dict.fromkeys(fit.law.replace("_", " ") for fit in laws.fits if fit.chosen))
    return f" ({', '.join(names)})" if names else ": no law could be fitted"


def _tiles(table: RunTable, cost: Cost) -> Iterable[Tile]:
    total = len(table) + len(table.missing)
    yield Tile(f"{len(table)} of {total}", "measured points finished")
    if len(table.pretrained):
        best = min(table.pretrained, key=lambda run: run.error_rate)
        yield Tile(
            percent(best.error_rate),
            f"lowest error: {best.dataset}, {best.arm} {best.student}, {best.upstream_samples:,} upstream images",
        )
        yield _upstream_tile(table)
    yield Tile(duration(cost.actual_s), f"device time for {cost.num_done} cells")


def _upstream_tile(table: RunTable) -> Tile:
    """What upstream data does to error, at the same student, labels and seed: from the smallest D_p to the largest."""
    sizes = table.pretrained.values("upstream_samples")
    ends = []
    for size in (sizes[0], sizes[-1]):
        errors = [max(run.error_rate, 1e-4) for run in table.pretrained.where(upstream_samples=size)]
        ends.append(math.exp(float(np.mean(np.log(errors)))))
    return Tile(
        f"× {ends[1] / ends[0]:.2f}",
        f"error, typical change from {sizes[0]:,} to {sizes[-1]:,} upstream images",
    )


def setting_part(table: RunTable, laws: LawsFile, boundary: BoundaryFile, setting: Setting, number: int) -> SettingPart:
    """The figures and fits of one setting, numbered for the ids of its figures."""
    records = [record for record in boundary.boundaries if setting_of(record) == setting]
    known = [record for record in records if record.status != "not_enough_data"]
    predictions = [prediction for prediction in laws.predictions if setting_of(prediction) == setting]
    runs = table.pretrained.where(setting=setting)
    delta = panels.delta_by_upstream(table, boundary, setting)
    grids = {
        "upstream": panels.error_by_upstream(table, laws, setting),
        "labels": panels.error_by_labels(table, laws, setting),
        "params": panels.error_by_params(table, laws, setting),
    }
    drawn = {
        name: tuple(error_figure(block, f"s{number}-{name}-{i}") for i, block in enumerate(grid.blocks(WIDEST)))
        for name, grid in grids.items()
    }
    pooled = panels.delta_panel(boundary, setting, None, None, "all students", "all labels")
    return SettingPart(
        label=setting.label(table),
        pooled=pooled_figure(pooled, grids["upstream"].ticks, f"s{number}-pooled") if records else None,
        boundary=boundary_figure(known, runs.values("upstream_samples"), f"s{number}-boundary") if known else None,
        delta=tuple(delta_figure(block, f"s{number}-delta-{i}") for i, block in enumerate(delta.blocks(WIDEST)))
        if records
        else (),
        by_upstream=drawn["upstream"],
        by_labels=drawn["labels"] if len(runs.values("downstream_samples")) > 1 else (),
        by_params=drawn["params"] if len(runs.students) > 1 else (),
        predicted=predicted_figure(predictions, f"s{number}-predicted") if predictions else None,
        residuals=residual_figure(predictions, f"s{number}-residuals") if predictions else None,
        fits=tuple(fit for fit in laws.fits if setting_of(fit) == setting),
        transfer=tuple(item for item in laws.transfer if setting_of(item) == setting),
    )


def _arm(name: str) -> dict[str, Any]:
    """A toggle button with the arm's line and mark."""
    from markupsafe import Markup

    look = LOOKS[name]
    glyphs = {
        "plain": '<circle cx="13" cy="5" r="4" fill="{}"/>',
        "distilled": '<path d="M13 0.6L17.4 5L13 9.4L8.6 5Z" fill="#fff" stroke="{}" stroke-width="1.6"/>',
        "scratch": "",
    }
    dashes = {"solid": "none", "dash": "5 3", "dot": "2 2"}[look.dash]
    return {
        "name": name,
        "label": look.name,
        "color": look.color,
        "dashes": dashes,
        "glyph": Markup(glyphs[name]).format(look.color),
    }


def _cells(store: Store, plan: PlanRecord, rows: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """One mapping a cell, unfinished ones first."""
    entries = [_cell(store, key, rows[key]) for key in plan.cells]
    yield from sorted(entries, key=lambda entry: entry["state"] == "done")


def _cell(store: Store, key: str, row: Any) -> dict[str, Any]:
    if row is None:
        return {"key": key, "state": store.state(key)} | dict.fromkeys(
            ("arm", "dataset", "samples", "seed", "params", "error", "time"), ""
        )
    return {
        "key": key, "state": "done", "arm": row.arm, "dataset": row.dataset, "samples": f"{row.num_samples:,}",
        "seed": row.seed,
        "params": panels.count_text(row.num_params), "error": percent(row.error_rate),
        "time": duration(row.timing.device_time_s),
    }  # fmt: skip
