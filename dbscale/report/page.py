"""`report.html`: one self-contained page that works offline; the answer first, then what it rests on.

Draws a table, its findings and its background; never fits. All values are escaped by the template.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dbscale import __version__
from dbscale.files import atomic_open
from dbscale.report import panels
from dbscale.report.answers import leading
from dbscale.report.background import Background, day, of_grid, of_table
from dbscale.report.boundary_figure import boundary_figure
from dbscale.report.checklist import Part, checklist
from dbscale.report.costs import Cost, duration
from dbscale.report.figures import delta_figure, error_figure, pooled_figure
from dbscale.report.fits import Findings
from dbscale.report.notes import setting_of
from dbscale.report.plotly_axes import Figure
from dbscale.report.predictors import Correlation, correlations
from dbscale.report.reduce import load_plan
from dbscale.report.refresh import refresh, refresh_table
from dbscale.report.schema import BoundaryFile, FitRecord, LawsFile, LeverRecord, TransferRecord
from dbscale.report.style import LOOKS
from dbscale.report.table import RunTable, Setting
from dbscale.report.trust_figures import predicted_figure, residual_figure
from dbscale.report.words import percent, symbols
from dbscale.study.store import Store

TEMPLATES = Path(__file__).parent / "templates"
WIDEST = 4
"""Panels side by side on a laptop screen."""
CURVES = {False: "line: difference of the fitted laws", True: "line: through the paired runs, no law assumed"}
"""What the line of the first picture is, by whether it is free of any law."""


@dataclass(frozen=True)
class SettingPart:
    """The figures and fits of one downstream set (and variant)."""

    label: str
    pooled: Figure | None
    """The page's first picture."""
    pooled_curve: str
    """What its line is."""
    boundary: Figure | None
    delta: tuple[Figure, ...]
    by_upstream: tuple[Figure, ...]
    by_labels: tuple[Figure, ...]
    by_params: tuple[Figure, ...]
    predicted: Figure | None
    residuals: Figure | None
    fits: tuple[FitRecord, ...]
    transfer: tuple[TransferRecord, ...]
    levers: tuple[LeverRecord, ...]

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
    background: Background
    checklist: tuple[Part, ...]
    footer: str

    @property
    def figures(self) -> dict[str, Any]:
        return {figure.id: figure.spec for setting in self.settings for figure in setting.figures}


def write_report(store: Store, grid_name: str) -> Path:
    """Write `<store>/grids/<name>/report.html`, fitting anew only where rows changed; returns its path."""
    table, findings = refresh(store, grid_name)
    page = make_page(table, findings, of_grid(store, load_plan(store, grid_name), table))
    return _write(page, store.grid_dir(grid_name))


def write_table_report(path: Path, folder: Path) -> Path:
    """The same from a table alone, with laws.json and boundary.json beside it; returns the page's path."""
    table, findings = refresh_table(path, folder)
    return _write(make_page(table, findings, of_table(path, table)), folder)


def _write(page: Page, folder: Path) -> Path:
    with atomic_open(folder / "report.html", "w") as file:
        file.write(render(page))
    return folder / "report.html"


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
        "minus": lambda text: text.replace("-", "−"),
        "share": lambda value: "–" if value is None else percent(value),
    }
    parts = {name: Markup((TEMPLATES / f"report.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    return environment.get_template("report.html.j2").render(
        page=page, css=parts["css"], javascript=parts["js"], plotly=Markup(get_plotlyjs())
    )  # fmt: skip


def make_page(table: RunTable, findings: Findings, background: Background) -> Page:
    laws, boundary = findings.laws, findings.boundary
    return Page(
        grid=table.grid, question=table.question, answers=boundary.answers,
        tiles=tuple(_tiles(table, background.cost)),
        notes=(*laws.notes, *boundary.notes), settings=tuple(
            setting_part(table, laws, boundary, setting, number) for number, setting in enumerate(table.settings, start=1)
        ),
        arms=tuple(_arm(name) for name in (*table.arms, *(("scratch",) if len(table.scratch) else ()))),
        level=percent(laws.level, 0), law_names=_law_names(laws),
        predictors=tuple(correlations(table, level=laws.level)),
        background=background, checklist=checklist(table, laws, boundary, background.specs),
        footer=f"dbscale {__version__}. {background.origin}; page written {day()}. "
        "Numbers: the table of runs, laws.json and boundary.json.",
    )  # fmt: skip


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
    if cost.num_done:
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
    free = bool(records) and leading(table, setting, boundary.boundaries, laws.fits).method == "law_free"
    pooled = panels.delta_panel(boundary, setting, None, None, "all students", "all labels", free=free)
    return SettingPart(
        label=setting.label(table),
        pooled_curve=CURVES[free],
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
        levers=tuple(item for item in laws.levers if setting_of(item) == setting),
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
