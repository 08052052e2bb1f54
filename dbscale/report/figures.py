"""Every figure of a study, declared once: the page shows it, `dbscale export` writes it as SVG and PDF.

Draws records and runs, computes nothing of science. Colours come from a theme, so that one declaration serves light,
dark and paper; the width of panels is the page's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt

from dbscale.files import write_atomic
from dbscale.laws import Verdict
from dbscale.report.schema import AxisName, Band, BoundaryFile, ContrastRecord, LawsFile, OfSetting
from dbscale.report.table import RunTable, Setting
from dbscale.report.words import AXES, COMPONENTS, axis_of, count, is_rate, metric_of, side_of, stratum, where

Rows = list[dict[str, Any]]
DATA = alt.NamedData(name="rows")
"""Rows stay out of Altair, which would copy them with every step of a declaration."""
HIDDEN = alt.param(name="hidden", value=[])
"""Arms switched off. The page's script sets it when a legend is clicked: Vega-Lite binds no legend of panels."""
ARMS = ("plain", "distilled", "teacher", "scratch")
"""In the order of the theme's colours; no figure has more than three."""
SHAPES = ("circle", "diamond", "square", "triangle-up")
PAPER_WIDTH = 210
"""Of a panel on paper, in pixels; a single panel is twice as wide."""
ASIDE = 1.06
"""Single seeds stand a little to the right of their mean."""
FONT = "Inter, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


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
        return spec | {"datasets": {"rows": self.rows}, "config": config(**THEMES[theme]) if theme else {}}


THEMES = {
    "light": {"ink": "#1d2430", "muted": "#5c6678", "rule": "#e3e6ec", "page": "#ffffff",
              "colors": ("#1f5fae", "#d2690a", "#8892a3", "#14805e")},
    "dark": {"ink": "#e7eaf0", "muted": "#9aa5b8", "rule": "#2c3442", "page": "#12161d",
             "colors": ("#6ea9f5", "#f2a055", "#7f8a9c", "#4cc39a")},
}  # fmt: skip


def config(*, ink: str, muted: str, rule: str, page: str, colors: Sequence[str]) -> dict[str, Any]:
    """Vega-Lite's config: type, colours, and the named styles that marks refer to."""
    axis = {
        "domainColor": muted, "tickColor": muted, "gridColor": rule, "labelColor": muted, "titleColor": muted,
        "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": 400, "titlePadding": 8, "tickSize": 4,
    }  # fmt: skip
    text = {"labelColor": ink, "titleColor": muted, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 400}
    return {
        "font": FONT, "background": page, "view": {"stroke": None}, "axis": axis, "axisX": {"grid": False},
        "legend": text | {"orient": "top", "symbolStrokeWidth": 2, "offset": 4, "symbolLimit": 8},
        "header": text | {"labelFontWeight": 500, "title": None, "labelPadding": 4, "labelAnchor": "start"},
        "range": {"category": list(colors), "symbol": list(SHAPES)}, "facet": {"spacing": 22},
        "style": {
            "zero": {"color": muted, "strokeWidth": 1}, "zone": {"color": muted, "opacity": 0.14},
            "band": {"color": muted, "opacity": 0.2}, "line": {"color": muted, "strokeWidth": 1.5},
            "root": {"color": colors[3], "opacity": 0.14}, "root-line": {"color": colors[3], "strokeDash": [4, 3]},
            "seed": {"color": muted, "opacity": 0.6, "size": 12}, "guide": {"color": muted, "strokeDash": [3, 3]},
        },
    }  # fmt: skip


def log_x(title: str, values: Iterable[float], margin: float = 1.25) -> alt.X:
    """A log axis with a tick at every measured value."""
    ticks = sorted(set(values))
    domain = [ticks[0] / margin, ticks[-1] * margin]
    axis = alt.Axis(values=ticks, format=".3~s", labelOverlap="parity")
    return alt.X("x:Q", title=title, axis=axis, scale=alt.Scale(type="log", domain=domain, nice=False))


def log_ticks(values: Iterable[float]) -> list[float]:
    """Round values within the range; finer ones where that is narrow."""
    known = [value for value in values if value > 0]
    low, high = min(known) * 0.97, max(known) * 1.03
    fine = [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8] if high < 4 * low else [1, 2, 5]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**decade for decade in decades for digit in fine if low <= digit * 10.0**decade <= high]


def panelled(layers: Sequence[tuple[str, Any]], rows: Rows, panels: Sequence[str], height: int) -> Any:
    """Layers, with the part of the rows that each draws, over one table; a panel for each name."""
    zoom = alt.selection_interval(
        name="zoom", bind="scales", zoom="wheel![event.ctrlKey || event.metaKey]",
        translate="[pointerdown[event.pointerType == 'mouse'], window:pointerup] > window:pointermove!",
    )  # fmt: skip
    wide = 2 if len(panels) == 1 else 1
    present = {row["part"] for row in rows}
    *drawn, top = [layer for name, layer in layers if name in present]
    chart = alt.layer(*drawn, top.add_params(zoom)).properties(width=wide * PAPER_WIDTH, height=height)
    switches = [HIDDEN] if "run" in present else []
    if len(panels) == 1:
        return chart.properties(data=DATA).add_params(*switches)
    order = alt.Facet("panel:N", title=None, sort=list(panels))
    chart = chart.facet(order, columns=min(len(panels), 3), data=DATA)
    return chart.resolve_axis(x="independent").add_params(*switches)


def part(name: str) -> Any:
    """A chart of the rows of one part, without data of its own."""
    return alt.Chart().transform_filter(f"datum.part == '{name}'")


def hunt_figure(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """The path of a hunt: octaves of interval and of wrong advice against device-hours, a panel a target."""
    if not rows:
        return None
    x = alt.X("x:Q", title="device-hours")
    y = alt.Y("y:Q", title="octaves", scale=alt.Scale(zero=True))
    color = alt.Color("series:N", title=None)
    chart = part("path").mark_line(point=True).encode(x, y, color=color, tooltip=["series:N", "x:Q", "y:Q"])
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    told = "Octaves of the boundary's interval and of wrong advice left, against device-hours"
    return Figure("hunt", panelled([("path", chart)], list(rows), panels, 200), list(rows), told)


# The difference of two sides.


def delta_figure(name: str, records: Sequence[ContrastRecord], height: int = 250) -> Figure | None:
    """Δ with its intervals, curve and boundary; one panel a contrast. All are of one metric, axis and pair of sides."""
    judged = [(record, record.verdict) for record in records if record.verdict is not None]
    if not judged:
        return None
    first, scale = judged[0][0], 100 if is_rate(judged[0][0].metric) else 1
    signs = [f"{side_of(first, 'a')} lower", f"{side_of(first, 'b')} lower", "sign not established"]
    rows = [row for record, verdict in judged for row in _delta_rows(stratum(record), verdict, scale, signs)]
    x = log_x(axis_of(first), (point.x for _, verdict in judged for point in verdict.points))
    unit = " (points)" if scale == 100 else ""
    title = f"{metric_of(first.metric)}, {first.a} − {first.b}{unit}"
    chart = panelled(_delta_layers(x, title, signs), rows, [stratum(record) for record, _ in judged], height)
    told = (
        f"{metric_of(first.metric)} of {side_of(first, 'a')} minus that of {side_of(first, 'b')} over {axis_of(first)}"
    )
    return Figure(name, chart, rows, f"{told}, {where(first)}")


def _delta_rows(panel: str, verdict: Verdict, scale: float, signs: Sequence[str]) -> Iterator[dict[str, Any]]:
    delta = verdict.min_effect * scale
    yield {"panel": panel, "part": "zone", "low": -delta, "high": delta, "y": 0}
    if verdict.interval is not None:
        low, high = verdict.interval
        yield {"panel": panel, "part": "root", "x": verdict.root, "low": low, "high": high}
    for x, *ends in zip(*(verdict.curve[name] for name in ("x", "delta", "low", "high")), strict=True):
        y, low, high = (scale * end for end in ends)
        yield {"panel": panel, "part": "curve", "x": x, "y": y, "low": low, "high": high}
    for point in verdict.points:
        ends = {name: scale * getattr(point, name) for name in ("low", "high", "low_all", "high_all")}
        sign = signs[1 if point.low_all > 0 else 0 if point.high_all < 0 else 2]
        yield {"panel": panel, "part": "point", "x": point.x, "y": scale * point.delta, **ends, "sign": sign,
               "seeds": point.num_seeds}  # fmt: skip
        for value in point.by_seed:
            yield {"panel": panel, "part": "seed", "x": ASIDE * point.x, "y": scale * value}


def band_rows(band: Band) -> Iterator[dict[str, Any]]:
    """One row a point of a curve; what is unknown is left out."""
    for x, y, low, high in zip(band.x, band.y, band.low, band.high, strict=True):
        if None not in (y, low, high):
            yield {"x": x, "y": y, "low": low, "high": high}


def _delta_layers(x: alt.X, title: str, signs: Sequence[str]) -> list[tuple[str, Any]]:
    """From back to front: what does not matter, the boundary, the curve, seeds, intervals, means."""
    y = alt.Y("y:Q", title=title)
    low, high = alt.Y("low:Q", title=title), alt.Y2("high:Q")
    color = alt.Color("sign:N", title=None, scale=alt.Scale(domain=list(signs)))
    tooltip = [
        alt.Tooltip("x:Q", title=x["title"], format=",.0f"), alt.Tooltip("y:Q", title="difference", format="+.2f"),
        alt.Tooltip("low_all:Q", title="from (simultaneous)", format="+.2f"),
        alt.Tooltip("high_all:Q", title="to (simultaneous)", format="+.2f"),
        alt.Tooltip("seeds:Q", title="seeds"), alt.Tooltip("sign:N", title="established"),
    ]  # fmt: skip
    whisker = part("point").encode(x=x, color=color)
    return [
        ("zone", part("zone").mark_rect(style="zone").encode(y=low, y2=high)),
        ("zone", part("zone").mark_rule(style="zero").encode(y=y)),
        ("root", part("root").mark_rect(style="root").encode(x=alt.X("low:Q", title=x["title"]), x2="high:Q")),
        ("root", part("root").mark_rule(style="root-line").encode(x=x)),
        ("curve", part("curve").mark_area(style="band").encode(x=x, y=low, y2=high)),
        ("curve", part("curve").mark_line(style="line").encode(x=x, y=y)),
        ("seed", part("seed").mark_circle(style="seed").encode(x=x, y=y)),
        ("point", whisker.mark_rule(strokeWidth=1).encode(y=alt.Y("low_all:Q", title=title), y2="high_all:Q")),
        ("point", whisker.mark_rule(strokeWidth=3.5).encode(y=low, y2=high)),
        ("point", whisker.mark_point(filled=True, size=75, opacity=1).encode(y=y, tooltip=tooltip)),
    ]


# Errors of the arms, with their laws.


def error_figure(
    name: str, table: RunTable, laws: LawsFile, setting: Setting, *, axis: AxisName = "upstream_samples",
    metric: str = "error_rate",
) -> Figure:  # fmt: skip
    """Every run and the laws' curves over one axis; a panel for each combination of the others worth a curve."""
    runs = table.where(lambda run: getattr(run, metric) is not None and run.dataset == setting.dataset)
    panel_of, own = _panel_names(axis), _worth_drawing(runs.pretrained.where(setting=setting), axis)
    rows: Rows = [
        {"panel": panel_of(run), "part": "run", "arm": run.arm, "x": getattr(run, axis), "y": getattr(run, metric),
         "seed": str(run.seed)}
        for run in own
    ]  # fmt: skip
    if axis == "upstream_samples":
        rows += _scratch_rows(runs.scratch, panel_of, metric)
    panels = list(dict.fromkeys(row["panel"] for row in rows if row["part"] == "run"))
    rows += [
        {"panel": panel_of(curve), "part": "law", "arm": curve.arm, **row}
        for curve in laws.curves if (setting_of(curve), curve.metric, curve.axis) == (setting, metric, axis)
        for row in band_rows(curve.band)
    ]  # fmt: skip
    rows = [row for row in rows if row["panel"] in panels]
    layers = _arm_layers(log_x(AXES[axis], own.values(axis)), metric_of(metric), metric, rows)
    told = f"{metric_of(metric)} over {AXES[axis]}, {setting.dataset}"
    return Figure(name, panelled(layers, rows, panels, 190), rows, told)


def setting_of(record: OfSetting) -> Setting:
    return Setting(record.variant, record.upstream_dataset, record.dataset)


def _panel_names(axis: AxisName) -> Any:
    """How the panel of a run or curve is called: by what the axis does not show."""
    names = {
        "upstream_samples": lambda run: f"{run.student}, {run.downstream_samples:,} labels",
        "downstream_samples": lambda run: f"{run.student}, {run.upstream_samples:,} upstream images",
        "num_params": lambda run: f"{run.upstream_samples:,} upstream images, {run.downstream_samples:,} labels",
    }
    return names[axis]


def _worth_drawing(runs: RunTable, axis: AxisName) -> RunTable:
    """Over labels or model size, only the smallest and the largest of each other axis: more panels than that tire."""
    if axis == "upstream_samples":
        return runs
    others = [name for name in ("upstream_samples", "downstream_samples") if name != axis]
    ends = {name: {runs.values(name)[0], runs.values(name)[-1]} for name in others}
    return runs.where(lambda run: all(getattr(run, name) in ends[name] for name in others))


def _scratch_rows(runs: RunTable, panel_of: Any, metric: str) -> Rows:
    """Runs without upstream data, which have no place on a log axis: a level each."""
    return [
        {"panel": panel_of(run), "part": "level", "arm": run.arm, "y": getattr(run, metric), "seed": str(run.seed)}
        for run in runs
    ]


def upstream_figure(name: str, table: RunTable, setting: Setting) -> Figure | None:
    """Upstream test error of both arms and of the teachers; a panel a student."""
    runs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in table.pretrained:
        if (run.variant, run.upstream_dataset) == (setting.variant, setting.upstream_dataset):
            for arm, error in ((run.arm, run.upstream_error_rate), ("teacher", run.teacher_error_rate)):
                if error is not None:
                    row = {"panel": run.student, "arm": arm, "x": run.upstream_samples, "seed": str(run.seed)}
                    runs[tuple(row.values())] = row | {"part": "run", "y": error}
    if not runs:
        return None
    rows = list(runs.values())
    panels = [student for student in table.students if any(row["panel"] == student for row in rows)]
    x = log_x(AXES["upstream_samples"], (row["x"] for row in rows))
    chart = panelled(_arm_layers(x, "upstream error", "error_rate", rows), rows, panels, 190)
    return Figure(name, chart, rows, f"upstream test error, {setting.upstream_dataset}")


def _arm_layers(x: alt.X, title: str, metric: str, rows: Rows) -> list[tuple[str, Any]]:
    """Laws and runs by arm; arms that the parameter `hidden` lists are not shown."""
    ticks = log_ticks(row[name] for row in rows for name in ("y", "low", "high") if row.get(name))
    axis = alt.Axis(format=".1~%" if is_rate(metric) else ".2~f", values=ticks)
    y = alt.Y("y:Q", title=title, axis=axis, scale=alt.Scale(type="log", nice=False, padding=8))
    arms = [arm for arm in ARMS if any(row.get("arm") == arm for row in rows)]
    color, shape = (channel("arm:N", title=None, scale=alt.Scale(domain=arms)) for channel in (alt.Color, alt.Shape))
    tooltip = [
        alt.Tooltip("arm:N"), alt.Tooltip("x:Q", title=x["title"], format=",.4~g"),
        alt.Tooltip("y:Q", title=title, format=".2%" if is_rate(metric) else ".4f"), alt.Tooltip("seed:N"),
    ]  # fmt: skip

    def opacity(value: float) -> Any:
        return alt.when("indexof(hidden, datum.arm) < 0").then(alt.value(value)).otherwise(alt.value(0))

    level = part("level").mark_rule(strokeDash=[2, 3])
    area, line = part("law").mark_area(), part("law").mark_line(strokeWidth=1.8)
    mark = part("run").mark_point(filled=True, size=42).encode(shape=shape, tooltip=tooltip)
    return [
        ("level", level.encode(y=y, color=color, opacity=opacity(0.7), tooltip=tooltip)),
        ("law", area.encode(x=x, y=alt.Y("low:Q", title=title), y2="high:Q", color=color, opacity=opacity(0.16))),
        ("law", line.encode(x=x, y=y, color=color, opacity=opacity(1))),
        ("run", mark.encode(x=x, y=y, color=color, opacity=opacity(0.85))),
    ]


# What the results rest on.


def predicted_figure(name: str, laws: LawsFile, setting: Setting) -> Figure | None:
    """Measured against predicted error, by laws that saw the run and by laws that did not."""
    panels = ("laws fitted to all runs", "largest D_p held out")
    rows: Rows = [
        {"panel": panels[each.held_out], "part": "run", "arm": each.arm, "x": each.measured, "y": each.predicted,
         "seed": str(each.seed)}
        for each in laws.predictions
        if each.predicted and each.measured > 0 and setting_of(each) == setting
    ]  # fmt: skip
    if not rows:
        return None
    ends = [end(row[name] for row in rows for name in "xy") for end in (min, max)]
    rows += [{"panel": panel, "part": "guide", "x": end, "y": end} for panel in panels for end in ends]
    x = alt.X("x:Q", title="measured error", axis=alt.Axis(format=".1~%", tickCount=5),
              scale=alt.Scale(type="log", nice=False, padding=8))  # fmt: skip
    *_, runs = _arm_layers(x, "predicted error", "error_rate", rows)
    diagonal = part("guide").mark_line(style="guide").encode(x=x, y=runs[1].encoding.y)
    chart = panelled([("guide", diagonal), runs], rows, panels, 260)
    return Figure(name, chart, rows, f"predicted against measured error, {setting.dataset}")


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


def halves_figure(name: str, record: ContrastRecord) -> Figure | None:
    """The means of two disjoint halves of the seeds, side by side."""
    if not record.halves:
        return None
    scale = 100 if is_rate(record.metric) else 1
    names = [f"seeds {', '.join(half.seeds)}" for half in record.halves]
    rows: Rows = [{"part": "zero", "y": 0}]
    for half, half_name in zip(record.halves, names, strict=True):
        for point in half.verdict.points:
            ends = {"y": scale * point.delta, "low": scale * point.low, "high": scale * point.high}
            rows.append({"part": "mean", "half": half_name, "x": count(point.x), **ends})
    x = alt.X("x:N", title=axis_of(record), sort=None, axis=alt.Axis(labelAngle=0))
    color, offset = alt.Color("half:N", title=None, sort=names), alt.XOffset("half:N", sort=names)
    mean, y = part("mean").encode(x=x, xOffset=offset, color=color), alt.Y("y:Q", title="difference")
    chart = alt.layer(
        part("zero").mark_rule(style="zero").encode(y=y),
        mean.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", title="difference"), y2="high:Q"),
        mean.mark_point(filled=True, size=60, opacity=1).encode(
            y=y, tooltip=["half:N", "x:N", alt.Tooltip("y:Q", title="difference", format="+.2f")]),
        data=DATA,
    ).properties(width=2 * PAPER_WIDTH, height=200)  # fmt: skip
    return Figure(name, chart, rows, f"two halves of the seeds, {where(record)}")


def study_figures(table: RunTable, laws: LawsFile, boundary: BoundaryFile) -> dict[str, Figure]:
    """Every figure of a study by name, in the page's order."""
    return {figure.name: figure for figure in _study_figures(table, laws, boundary.contrasts) if figure is not None}


def contrast_figures(record: ContrastRecord) -> dict[str, Figure]:
    """The figures of one contrast that stands alone."""
    found = (
        delta_figure("verdict", [record], height=330),
        halves_figure("halves", record),
        noise_figure("noise", [record]),
    )
    return {figure.name: figure for figure in found if figure is not None}


def group_of(record: ContrastRecord, contrasts: Sequence[ContrastRecord]) -> str:
    """Name of the figure that shows a contrast beside those of the same metric and test set."""
    return f"delta-{slug(record.metric, where(record, contrasts))}"


def _study_figures(table: RunTable, laws: LawsFile, contrasts: Sequence[ContrastRecord]) -> Iterator[Figure | None]:
    main = [record for record in contrasts if record.main]
    yield delta_figure("verdict", main, height=330)
    yield from (halves_figure("halves", record) for record in main)
    yield noise_figure("noise", contrasts)
    groups: dict[str, list[ContrastRecord]] = {}
    for record in contrasts:
        groups.setdefault(group_of(record, contrasts), []).append(record)
    yield from (delta_figure(name, group, height=190) for name, group in groups.items())
    for setting in {(s.variant, s.upstream_dataset): s for s in table.settings}.values():
        yield upstream_figure(f"upstream-{slug(setting.variant, setting.upstream_dataset)}", table, setting)
    for setting in table.settings:
        yield from _setting_figures(table, laws, setting, slug(setting.label(table)))


def _setting_figures(table: RunTable, laws: LawsFile, setting: Setting, name: str) -> Iterator[Figure | None]:
    own = table.pretrained.where(setting=setting)
    yield error_figure(f"error-{name}", table, laws, setting)
    if any(run.test_loss for run in own):
        yield error_figure(f"loss-{name}", table, laws, setting, metric="test_loss")
    if len(own.values("downstream_samples")) > 1:
        yield error_figure(f"labels-{name}", table, laws, setting, axis="downstream_samples")
    if len(own.students) > 1:
        yield error_figure(f"size-{name}", table, laws, setting, axis="num_params")
    yield predicted_figure(f"predicted-{name}", laws, setting)


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
