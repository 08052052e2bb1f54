"""Every figure of a study, declared once: the page shows it, `dbscale export` writes it as SVG and PDF.

Draws records and runs, computes nothing of science. Colours come from templates/theme.json, so that one declaration
serves light, dark and paper; the width of panels is the page's.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt

from dbscale.files import write_atomic
from dbscale.laws import Verdict
from dbscale.report.schema import AxisName, ContrastRecord, LawsFile
from dbscale.report.table import RunTable, Setting
from dbscale.report.words import AXES, COMPONENTS, axis_of, is_rate, listed, metric_of, side_of, stratum, where

Rows = list[dict[str, Any]]
Layers = Sequence[tuple[str, Any]]
"""Marks from back to front, each with the part of the rows that it draws."""
DATA = alt.NamedData(name="rows")
"""Rows stay out of Altair, which would copy them with every step of a declaration."""
HIDDEN = alt.param(name="hidden", value=[])
"""Arms switched off. The page's script sets it when a legend is clicked: Vega-Lite binds no legend of panels."""
ARMS = ("plain", "distilled", "plain_matched", "self_distilled", "teacher", "scratch")
"""In the order of the theme's colours."""
PAPER_WIDTH = 210
"""Width of a panel on paper, in pixels; a single panel is twice as wide."""
ASIDE = 1.06
"""Single seeds stand a little to the right of their mean."""


@dataclass(frozen=True)
class Figure:
    """A chart with a name that ids and file names are made of."""

    name: str
    chart: Any
    """Altair's declaration over the data named `rows`."""
    rows: Rows
    title: str
    """What it shows, for those who cannot see it."""

    def spec(self, theme: str = "") -> dict[str, Any]:
        """Vega-Lite, with the colours of a theme (`light` or `dark`) or, for the page, without."""
        spec = self.chart.to_dict(validate=False)
        return spec | {"datasets": {"rows": self.rows}, "config": themes()[theme] if theme else {}}


def themes() -> dict[str, dict[str, Any]]:
    """Vega-Lite's config by theme: type, colours, and the named styles that marks refer to."""
    table = json.loads((Path(__file__).parent / "templates" / "theme.json").read_text(encoding="utf-8"))
    config = string.Template(json.dumps(table["config"]))
    return {name: json.loads(config.substitute(colors)) for name, colors in table["palettes"].items()}


def log_x(title: str, values: Iterable[float]) -> alt.X:
    """A log axis with a tick at every measured value."""
    ticks = sorted(set(values))
    domain = [ticks[0] / 1.25, ticks[-1] * 1.25]
    axis = alt.Axis(values=ticks, format=".3~s", labelOverlap="parity")
    return alt.X("x:Q", title=title, axis=axis, scale=alt.Scale(type="log", domain=domain, nice=False))


def log_ticks(values: Iterable[float]) -> list[float]:
    """Round values within the range; finer ones where that is narrow."""
    known = [value for value in values if value > 0]
    low, high = min(known) * 0.97, max(known) * 1.03
    fine = [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8] if high < 4 * low else [1, 2, 5]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    return [digit * 10.0**decade for decade in decades for digit in fine if low <= digit * 10.0**decade <= high]


def panelled(name: str, layers: Layers, rows: Rows, height: int, title: str) -> Figure:
    """Layers over one table of rows; a panel for each of their panels, in their order."""
    zoom = alt.selection_interval(
        name="zoom", bind="scales", zoom="wheel![event.ctrlKey || event.metaKey]",
        translate="[pointerdown[event.pointerType == 'mouse'], window:pointerup] > window:pointermove!",
    )  # fmt: skip
    panels, parts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("panel", "part"))
    *drawn, top = [layer for part, layer in layers if part in parts]
    width = PAPER_WIDTH * (2 if len(panels) == 1 else 1)
    chart = alt.layer(*drawn, top.add_params(zoom)).properties(width=width, height=height)
    switches = [HIDDEN] if "run" in parts else []
    if len(panels) == 1:
        return Figure(name, chart.properties(data=DATA).add_params(*switches), rows, title)
    order = alt.Facet("panel:N", title=None, sort=panels)
    chart = chart.facet(order, columns=min(len(panels), 3), data=DATA)
    return Figure(name, chart.resolve_axis(x="independent").add_params(*switches), rows, title)


def part(name: str) -> Any:
    """A chart of the rows of one part, without data of its own."""
    return alt.Chart().transform_filter(f"datum.part == '{name}'")


def band(name: str, x: alt.X, y: str) -> Any:
    """The area between the ends of a part's rows."""
    return part(name).encode(x=x, y=alt.Y("low:Q", title=y), y2="high:Q")


def hunt_figure(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """The path of a hunt: octaves of interval and of wrong advice against device-hours, a panel a target."""
    if not rows:
        return None
    x = alt.X("x:Q", title="device-hours")
    y = alt.Y("y:Q", title="octaves", scale=alt.Scale(zero=True))
    color = alt.Color("series:N", title=None)
    chart = part("path").mark_line(point=True).encode(x, y, color=color, tooltip=["series:N", "x:Q", "y:Q"])
    told = "Octaves of the boundary's interval and of wrong advice left, against device-hours"
    return panelled("hunt", [("path", chart)], list(rows), 200, told)


# The difference of two sides.


def delta_figure(name: str, records: Sequence[ContrastRecord], height: int = 250) -> Figure | None:
    """Δ with its intervals, curve and boundary; one panel a contrast. All are of one metric, axis and pair of sides."""
    return _delta_figure(name, records, [(stratum(each), each.verdict) for each in records], height)


def halves_figure(name: str, record: ContrastRecord) -> Figure | None:
    """The same of two disjoint halves of the seeds, side by side."""
    panels = [(f"seeds {listed(half.seeds)}", half.verdict) for half in record.halves]
    return _delta_figure(name, [record], panels, 200)


def _delta_figure(
    name: str, records: Sequence[ContrastRecord], panels: Sequence[tuple[str, Verdict | None]], height: int
) -> Figure | None:
    judged = [(panel, verdict) for panel, verdict in panels if verdict is not None]
    if not judged:
        return None
    first, scale = records[0], 100 if is_rate(records[0].metric) else 1
    sides = [side_of(first, side) for side in "ab"]
    signs = [*(f"{side} lower" for side in sides), "sign not established"]
    rows = [row for panel, verdict in judged for row in _delta_rows(panel, verdict, scale, signs)]
    x = log_x(axis_of(first), (point.x for _, verdict in judged for point in verdict.points))
    title = f"{metric_of(first.metric)}, {first.a} − {first.b}{' (points)' if scale == 100 else ''}"
    told = f"{metric_of(first.metric)} of {sides[0]} minus that of {sides[1]} over {axis_of(first)}, {where(first)}"
    return panelled(name, _delta_layers(x, title, signs), rows, height, told)


def _delta_rows(panel: str, verdict: Verdict, scale: float, signs: Sequence[str]) -> Iterator[dict[str, Any]]:
    delta = verdict.min_effect * scale
    yield {"panel": panel, "part": "zone", "low": -delta, "high": delta, "y": 0}
    if verdict.interval is not None:
        low, high = verdict.interval
        yield {"panel": panel, "part": "root", "x": verdict.root, "low": low, "high": high}
    for x, *ends in zip(*verdict.curve.values(), strict=True):
        values: dict[str, float] = dict(zip(("y", "low", "high"), ends, strict=True))
        yield {"panel": panel, "part": "curve", "x": x, **_scaled(values, scale)}
    for point in verdict.points:
        ends = {name: getattr(point, name) for name in ("low", "high", "low_all", "high_all")} | {"y": point.delta}
        sign = signs[1 if point.low_all > 0 else 0 if point.high_all < 0 else 2]
        yield {"panel": panel, "part": "point", "x": point.x, **_scaled(ends, scale), "sign": sign,
               "seeds": point.num_seeds}  # fmt: skip
        for value in point.by_seed:
            yield {"panel": panel, "part": "seed", "x": ASIDE * point.x, "y": scale * value}


def _scaled(values: dict[str, float], scale: float) -> dict[str, float]:
    return {name: scale * value for name, value in values.items()}


def _delta_layers(x: alt.X, title: str, signs: Sequence[str]) -> Layers:
    """From back to front: what does not matter, the boundary, the curve, seeds, intervals, means."""
    y = alt.Y("y:Q", title=title)
    color = alt.Color("sign:N", title=None, scale=alt.Scale(domain=list(signs)))
    told = (("x", x["title"], ",.0f"), ("y", "difference", "+.2f"), ("low_all", "from (simultaneous)", "+.2f"),
            ("high_all", "to (simultaneous)", "+.2f"))  # fmt: skip
    tooltip = [alt.Tooltip(f"{name}:Q", title=text, format=spec) for name, text, spec in told]
    tooltip += [alt.Tooltip("seeds:Q", title="seeds"), alt.Tooltip("sign:N", title="established")]
    mean, root = part("point").encode(x=x, y=y, color=color), part("root")
    wide = mean.mark_rule(strokeWidth=1).encode(y=alt.Y("low_all:Q", title=title), y2="high_all:Q")
    return [
        ("zone", part("zone").mark_rect(style="zone").encode(y=alt.Y("low:Q", title=title), y2="high:Q")),
        ("zone", part("zone").mark_rule(style="zero").encode(y=y)),
        ("root", root.mark_rect(style="root").encode(x=alt.X("low:Q", title=x["title"]), x2="high:Q")),
        ("root", root.mark_rule(style="root-line").encode(x=x)),
        ("curve", band("curve", x, title).mark_area(style="band")),
        ("curve", part("curve").mark_line(style="line").encode(x=x, y=y)),
        ("seed", part("seed").mark_circle(style="seed").encode(x=x, y=y)),
        ("point", wide),
        ("point", band("point", x, title).mark_rule(strokeWidth=3.5).encode(color=color)),
        ("point", mean.mark_point(filled=True, size=75, opacity=1).encode(tooltip=tooltip)),
    ]


# Errors of the arms, with their laws.

PANELS: dict[AxisName, str] = {
    "upstream_samples": "{0.student}, {0.downstream_samples:,} labels",
    "downstream_samples": "{0.student}, {0.upstream_samples:,} upstream images",
    "num_params": "{0.upstream_samples:,} upstream images, {0.downstream_samples:,} labels",
}
"""How the panel of a run or curve is called: by what the axis does not show."""


def error_figure(
    name: str, table: RunTable, laws: LawsFile, setting: Setting, *, axis: AxisName = "upstream_samples",
    metric: str = "error_rate",
) -> Figure:  # fmt: skip
    """Every run and the laws' curves over one axis; a panel for each combination of the others worth a curve."""
    runs = table.where(lambda run: getattr(run, metric) is not None and run.dataset == setting.dataset)
    own = _worth_drawing(runs.pretrained.where(setting=setting), axis)
    rows = [_run_row(PANELS[axis].format(run), run, getattr(run, axis), getattr(run, metric)) for run in own]
    panels = {row["panel"] for row in rows}
    # A run without upstream data has no place on a log axis of D_p: a level, and over another axis no panel.
    levels = (_run_row(PANELS[axis].format(run), run, None, getattr(run, metric)) for run in runs.scratch)
    rows += [row | {"part": "level"} for row in levels]
    for curve in laws.curves:
        if (curve.setting, curve.metric, curve.axis) == (setting, metric, axis):
            names = {"panel": PANELS[axis].format(curve), "part": "law", "arm": curve.arm}
            known = zip(*curve.band.model_dump().values(), strict=True)
            rows += [names | dict(zip(("x", "y", "low", "high"), at, strict=True)) for at in known if None not in at]
    told = f"{metric_of(metric)} over {AXES[axis]}, {setting.dataset}"
    rows = [row for row in rows if row["panel"] in panels]
    return panelled(name, _arm_layers(log_x(AXES[axis], own.values(axis)), metric, rows), rows, 190, told)


def _run_row(panel: str, run: Any, x: float | None, y: float | None, arm: str = "") -> dict[str, Any]:
    return {"panel": panel, "part": "run", "arm": arm or run.arm, "x": x, "y": y, "seed": str(run.seed)}


def _worth_drawing(runs: RunTable, axis: AxisName) -> RunTable:
    """Over labels or model size, only the smallest and the largest of each other axis: more panels than that tire."""
    if axis == "upstream_samples":
        return runs
    others = [name for name in ("upstream_samples", "downstream_samples") if name != axis]
    ends = {name: {runs.values(name)[0], runs.values(name)[-1]} for name in others}
    return runs.where(lambda run: all(getattr(run, name) in ends[name] for name in others))


def upstream_figure(name: str, table: RunTable, setting: Setting) -> Figure | None:
    """Upstream test error of both arms and of the teachers, every run once; a panel a student."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in table.pretrained.where(variant=setting.variant, upstream_dataset=setting.upstream_dataset):
        for arm, error in ((run.arm, run.upstream_error_rate), ("teacher", run.teacher_error_rate)):
            # The teacher of the arm `self_distilled` is one more plain run of the student's size.
            if error is not None and (arm, run.arm) != ("teacher", "self_distilled"):
                key = (table.students.index(run.student), arm, run.upstream_samples, run.seed)
                found[key] = _run_row(run.student, run, run.upstream_samples, error, arm)
    if not found:
        return None
    rows = sorted(found.values(), key=lambda row: table.students.index(row["panel"]))
    x = log_x(AXES["upstream_samples"], (row["x"] for row in rows))
    told = f"upstream test error, {setting.upstream_dataset}"
    return panelled(name, _arm_layers(x, "upstream_error_rate", rows), rows, 190, told)


def _arm_layers(x: alt.X, metric: str, rows: Rows, title: str = "") -> Layers:
    """Laws and runs by arm; arms that the parameter `hidden` lists are not shown."""
    title, rate = title or metric_of(metric), is_rate(metric)
    ticks = log_ticks(row[name] for row in rows for name in ("y", "low", "high") if row.get(name))
    axis = alt.Axis(format=".1~%" if rate else ".2~f", values=ticks)
    y = alt.Y("y:Q", title=title, axis=axis, scale=alt.Scale(type="log", nice=False, padding=8))
    arms = [arm for arm in ARMS if any(row.get("arm") == arm for row in rows)]
    color, shape = (channel("arm:N", title=None, scale=alt.Scale(domain=arms)) for channel in (alt.Color, alt.Shape))
    tooltip = [
        alt.Tooltip("arm:N"), alt.Tooltip("x:Q", title=x["title"], format=",.4~g"),
        alt.Tooltip("y:Q", title=title, format=".2%" if rate else ".4f"), alt.Tooltip("seed:N"),
    ]  # fmt: skip

    def shown(mark: Any, opacity: float, **channels: Any) -> Any:
        is_on = alt.when("indexof(hidden, datum.arm) < 0")
        return mark.encode(color=color, opacity=is_on.then(alt.value(opacity)).otherwise(alt.value(0)), **channels)

    return [
        ("level", shown(part("level").mark_rule(strokeDash=[2, 3]), 0.7, y=y, tooltip=tooltip)),
        ("law", shown(band("law", x, title).mark_area(), 0.16)),
        ("law", shown(part("law").mark_line(strokeWidth=1.8), 1, x=x, y=y)),
        ("run", shown(part("run").mark_point(filled=True, size=42), 0.85, x=x, y=y, shape=shape, tooltip=tooltip)),
    ]


# What the results rest on.


def predicted_figure(name: str, laws: LawsFile, setting: Setting, metric: str = "error_rate") -> Figure | None:
    """Measured against predicted, by laws that saw the run and by laws that did not."""
    panels, what = ("laws fitted to all runs", "largest D_p held out"), metric_of(metric)
    own = [each for each in laws.predictions if (each.setting, each.metric) == (setting, metric)]
    known = [each for each in own if each.predicted and each.measured > 0]
    rows = [_run_row(panels[each.held_out], each, each.measured, each.predicted) for each in known]
    if not rows:
        return None
    ends = [end(row[name] for row in rows for name in "xy") for end in (min, max)]
    rows += [{"panel": panel, "part": "guide", "x": end, "y": end} for panel in panels for end in ends]
    x = alt.X("x:Q", title=f"measured {what}", scale=alt.Scale(type="log", nice=False, padding=8),
              axis=alt.Axis(format=".1~%" if is_rate(metric) else ".2~f", tickCount=5))  # fmt: skip
    *_, runs = _arm_layers(x, metric, rows, f"predicted {what}")
    diagonal = part("guide").mark_line(style="guide").encode(x=x, y=runs[1].encoding.y)
    return panelled(
        name, [("guide", diagonal), runs], rows, 260, f"predicted against measured {what}, {setting.dataset}"
    )


def noise_figure(name: str, contrasts: Sequence[ContrastRecord]) -> Figure | None:
    """Shares of the variance of one difference, by where the noise comes from; a bar a pooled contrast."""
    rows: Rows = [
        {"contrast": f"{metric_of(record.metric)}, {where(record)}", "share": each.share, "sd": each.sd,
         "source": COMPONENTS.get(each.name, each.name), "order": list(COMPONENTS).index(each.name)}
        for record in contrasts if record.pooled and record.noise for each in record.noise.components
    ]  # fmt: skip
    if not rows:
        return None
    bars, sources = (list(dict.fromkeys(row[name] for row in rows)) for name in ("contrast", "source"))
    chart = alt.Chart(DATA).mark_bar(height=16).encode(
        x=alt.X("share:Q", title="share of the variance of one difference", axis=alt.Axis(format="%", tickCount=5),
                scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("contrast:N", title=None, sort=bars, axis=alt.Axis(labelLimit=260)),
        color=alt.Color("source:N", title=None, scale=alt.Scale(domain=sources, scheme="tableau10"),
                        legend=alt.Legend(columns=3, labelLimit=240)),
        order="order:Q",
        tooltip=[alt.Tooltip("source:N"), alt.Tooltip("share:Q", format=".0%"), alt.Tooltip("sd:Q", format=".2~g")],
    ).properties(width=2 * PAPER_WIDTH, height=28 * len(bars))  # fmt: skip
    return Figure(name, chart, rows, "where the noise of a difference comes from")


# Which figures there are.


def study_figures(
    contrasts: Sequence[ContrastRecord], table: RunTable | None = None, laws: LawsFile | None = None
) -> dict[str, Figure]:
    """Every figure by name, in the page's order; without table and laws those of contrasts that stand alone."""
    main = [record for record in contrasts if record.main]
    found = [delta_figure("verdict", main, height=330), *(halves_figure("halves", record) for record in main)]
    found.append(noise_figure("noise", contrasts))
    if table is not None and laws is not None:
        found += [delta_figure(name, group, height=190) for name, group in grouped(contrasts).items()]
        for setting in {(s.variant, s.upstream_dataset): s for s in table.settings}.values():
            name = f"upstream-{slug(setting.variant, setting.upstream_dataset)}"
            found.append(upstream_figure(name, table, setting))
        found += _setting_figures(table, laws)
    return {figure.name: figure for figure in found if figure is not None}


def grouped(contrasts: Sequence[ContrastRecord]) -> dict[str, list[ContrastRecord]]:
    """Contrasts that share a metric and a test set, by the name of the figure that shows them side by side."""
    groups: dict[str, list[ContrastRecord]] = {}
    for record in contrasts:
        groups.setdefault(f"delta-{slug(record.metric, where(record, contrasts))}", []).append(record)
    return groups


def _setting_figures(table: RunTable, laws: LawsFile) -> Iterator[Figure | None]:
    for setting in table.settings:
        name, own = slug(setting.label(table)), table.pretrained.where(setting=setting)
        yield error_figure(f"error-{name}", table, laws, setting)
        if any(run.test_loss for run in own):
            yield error_figure(f"loss-{name}", table, laws, setting, metric="test_loss")
        if len(own.values("downstream_samples")) > 1:
            yield error_figure(f"labels-{name}", table, laws, setting, axis="downstream_samples")
        if len(own.students) > 1:
            yield error_figure(f"size-{name}", table, laws, setting, axis="num_params")
        yield predicted_figure(f"predicted-{name}", laws, setting)
        yield predicted_figure(f"predicted_loss-{name}", laws, setting, "test_loss")


def slug(*names: str) -> str:
    """Names as part of an id or a file name."""
    return "-".join("".join(c if c.isalnum() else "_" for c in name) for name in names if name)


def export(figures: Iterable[Figure], folder: Path) -> list[Path]:
    """Write every figure as SVG and PDF, in light colours; returns the paths."""
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures:
        svg = vl_convert.vegalite_to_svg(figure.spec("light"))
        for suffix, data in ((".svg", svg.encode()), (".pdf", vl_convert.svg_to_pdf(svg))):
            write_atomic(folder / f"{figure.name}{suffix}", data)
            paths.append(folder / f"{figure.name}{suffix}")
    return paths
