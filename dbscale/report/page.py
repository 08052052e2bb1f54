"""`report.html`: one self-contained page that works offline; the answer first, then what it rests on.

Draws a table, its findings and its background; never fits. The template escapes all values; figures are Vega-Lite,
drawn by the Vega that the page carries.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dbscale import __version__
from dbscale.files import atomic_open
from dbscale.report import words
from dbscale.report.background import Background, answered_checklist, day, of_grid, of_table
from dbscale.report.figures import (
    THEMES,
    Figure,
    config,
    contrast_figures,
    export,
    group_of,
    hunt_figure,
    slug,
    study_figures,
)
from dbscale.report.findings import Findings, refresh, refresh_table
from dbscale.report.hunt import HuntStory, hunt_story
from dbscale.report.reduce import load_plan
from dbscale.report.schema import ContrastRecord, Note
from dbscale.report.table import RunTable
from dbscale.study.store import Store

TEMPLATES = Path(__file__).parent / "templates"
MOST_NOTES = 5
"""Notes that are open on the page; further ones fold."""


def write_report(store: Store, grid_name: str) -> Path:
    """Write `<store>/grids/<name>/report.html`, judging anew only where rows changed; returns its path."""
    table, findings = refresh(store, grid_name)
    background = of_grid(store, load_plan(store, grid_name), table)
    story = hunt_story(store, grid_name, findings.boundary.contrasts)
    return write_page(table, findings, background, store.grid_dir(grid_name), story)


def write_table_report(path: Path, folder: Path, columns: Mapping[str, str] | None = None) -> Path:
    """The same from a table alone, with laws.json and boundary.json beside it; returns the page's path."""
    table, findings = refresh_table(path, folder, columns=columns)
    return write_page(table, findings, of_table(path, table), folder)


def export_figures(store: Store, grid_name: str, folder: Path) -> list[Path]:
    """Every figure of a grid's study as SVG and PDF; returns the paths."""
    table, findings = refresh(store, grid_name)
    return export(study_figures(table, findings.laws, findings.boundary).values(), folder)


def export_table_figures(path: Path, folder: Path, columns: Mapping[str, str] | None = None) -> list[Path]:
    """The same from a table alone."""
    table, findings = refresh_table(path, folder, columns=columns)
    return export(study_figures(table, findings.laws, findings.boundary).values(), folder)


def write_page(
    table: RunTable, findings: Findings, background: Background, folder: Path, hunt: HuntStory | None = None
) -> Path:
    """The page of a study, and of the hunt that chose its runs, if one did; returns its path."""
    laws, boundary = findings.laws, findings.boundary
    figures = study_figures(table, laws, boundary)
    path = hunt_figure(hunt.rows) if hunt else None
    figures |= {path.name: path} if path else {}
    html = render(
        title=table.grid, question=table.question, contrasts=boundary.contrasts, figures=figures,
        notes=(*boundary.notes, *laws.notes), laws=laws, settings=table.settings, table=table, background=background,
        tiles=_tiles(table, findings, background), hunt=hunt,
        checklist=answered_checklist(table, laws, boundary, background.specs), origin=background.origin,
    )  # fmt: skip
    return _write(folder / "report.html", html)


def compare_page(record: ContrastRecord, folder: Path, *, notes: Sequence[str] = ()) -> Path:
    """The same kind of page for one contrast of any table, with its SVG-ready figure; returns the page's path."""
    question = f"Which gives the lower {words.metric_of(record.metric)}: {words.side_of(record, 'a')} or " \
               f"{words.side_of(record, 'b')}?"  # fmt: skip
    record = record.model_copy(update={"main": True})
    html = render(
        title=record.dataset, question=question, contrasts=(record,), figures=contrast_figures(record),
        notes=[Note(code="table", text=text) for text in notes], origin=f"Made from the table {record.dataset}",
    )  # fmt: skip
    return _write(folder / "compare.html", html)


def _write(path: Path, html: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path, "w") as file:
        file.write(html)
    return path


def _tiles(table: RunTable, findings: Findings, background: Background) -> list[tuple[str, str]]:
    """Figures of the study and what they count."""
    tiles = [(f"{len(table)} of {len(table) + len(table.missing)}", "measured points finished")]
    main = findings.boundary.contrasts[0].verdict if findings.boundary.contrasts else None
    if main is not None:
        tiles.append((words.count(main.num_seeds), "seeds behind the main verdict"))
        tiles.append((f"± {words.size_text(main.min_effect, 'error_rate')}", "differences below this do not matter"))
    time = sum(cost.device_time_s for cost in background.costs)
    return [*tiles, *([(words.duration(time), "device time of the finished cells")] if time else [])]


def render(
    *, title: str, question: str, contrasts: Sequence[ContrastRecord], figures: dict[str, Figure], notes: Sequence[Note],
    origin: str, **study: Any,
) -> str:  # fmt: skip
    """The page as HTML, everything inlined; `study` holds what only a whole study has."""
    import jinja2
    from markupsafe import Markup

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {name: getattr(words, name) for name in WORDS}
    environment.filters |= {"cap": words.FORMATS["cap"], "slug": slug}
    parts = {name: Markup((TEMPLATES / f"report.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    groups: dict[str, list[ContrastRecord]] = {}
    for record in contrasts:
        groups.setdefault(group_of(record, contrasts), []).append(record)
    return environment.get_template("report.html.j2").render(
        title=title, question=question, contrasts=contrasts, main=next((r for r in contrasts if r.main), None),
        groups=groups, figures=figures, open_notes=notes[:MOST_NOTES], more_notes=notes[MOST_NOTES:],
        family=words.family_text(contrasts), footer=f"dbscale {__version__}. {origin}; page written {day()}.",
        specs=packed({name: figure.spec() for name, figure in figures.items()}),
        themes={name: config(**colors) for name, colors in THEMES.items()},
        vega=Markup(_vega()), css=parts["css"], javascript=parts["js"],
        study=study or None, **study,
    )  # fmt: skip


WORDS = (
    "about", "answer", "brief", "count", "duration", "effect", "evidence", "is_rate", "metric_of",
    "noise_text", "param_text", "percent", "sentences", "size_text", "stratum", "symbols", "where",
)  # fmt: skip
"""Functions of `words` that the template uses as filters."""


def packed(value: object) -> str:
    """JSON, compressed (a tenth of its size) and as text that any page may hold; report.js unpacks it."""
    return base64.b64encode(gzip.compress(json.dumps(value, allow_nan=False).encode(), mtime=0)).decode()


@cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script, safe inside a script element."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
