"""Panels as Plotly figures, written as plain mappings: the page draws them, nothing here computes.

Every trace carries its arm in `meta`, so that the page can switch arms on and off in all figures at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dbscale.report.panels import AXIS_TITLES, Panel, PanelGrid, Series
from dbscale.report.plotly_axes import Figure, Spec, axis_title, base_layout, error_ticks, grid_layout, log_axis, placed
from dbscale.report.schema import BoundaryRecord, Curve
from dbscale.report.style import INK, LOOKS, MUTED, RULE

POOLED_HEIGHT = 300
DELTA_TITLE = "◂ plain better   ΔE, points   distilled better ▸"
"""Read along a vertical axis, upwards."""


def error_figure(grid: PanelGrid, figure_id: str) -> Figure:
    """Error against an axis: runs, means, laws and bands of every arm."""
    layout = grid_layout(grid, "top-1 error", log_y=True, tick_format=".3~%", y_ticks=error_ticks(grid.error_range))
    traces: list[Spec] = []
    shown: set[str] = set()
    for panel, axes in placed(grid):
        for series in panel.series:
            traces += _error_traces(series, axes, shown)
        if panel.level is not None:
            traces.append(_scratch_trace(grid, panel.level, axes, shown))
    return Figure(figure_id, {"data": traces, "layout": layout}, layout["height"])


def _error_traces(series: Series, axes: Spec, shown: set[str]) -> Iterator[Spec]:
    look = LOOKS[series.arm]
    group = {"legendgroup": series.arm, "meta": {"arm": series.arm}, "name": look.name, "legendrank": look.rank}
    if series.curve is not None:
        yield from _band(series.curve, look.faded(0.13), {**axes, **group})
        yield {
            **axes, **group, "type": "scatter", "mode": "lines", "x": series.curve.x, "y": series.curve.y,
            "line": {"color": look.color, "width": 2, "dash": look.dash}, "showlegend": False,
            "hovertemplate": f"{look.name}, {series.curve.law} law<br>%{{x:,.4s}}: %{{y:.2%}}<extra></extra>",
        }  # fmt: skip
    if series.x:
        yield {
            **axes, **group, "type": "scatter", "mode": "markers", "x": series.x, "y": series.y,
            "customdata": series.seeds,
            "marker": {
                "color": look.color, "symbol": look.marker, "size": 7, "opacity": 0.8,
                "line": {"width": 1.4, "color": look.color},
            },
            "showlegend": series.arm not in shown,
            "hovertemplate": f"{look.name}, seed %{{customdata}}<br>%{{x:,}}: %{{y:.2%}}<extra></extra>",
        }  # fmt: skip
        shown.add(series.arm)


def _band(curve: Curve, fill: str, common: Spec) -> Iterator[Spec]:
    """Two invisible edges with the space between them filled."""
    edge = {
        **common,
        "type": "scatter",
        "mode": "lines",
        "x": curve.x,
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    yield {**edge, "y": curve.low}
    yield {**edge, "y": curve.high, "fill": "tonexty", "fillcolor": fill}


def _scratch_trace(grid: PanelGrid, level: float, axes: Spec, shown: set[str]) -> Spec:
    look = LOOKS["scratch"]
    first = "scratch" not in shown
    shown.add("scratch")
    ends = (min(grid.ticks) / 1.5, max(grid.ticks) * 1.5)
    return {
        **axes, "type": "scatter", "mode": "lines", "x": ends, "y": [level, level], "name": look.name,
        "showlegend": first,
        "legendgroup": "scratch", "legendrank": look.rank, "meta": {"arm": "scratch"},
        "line": {"color": look.color, "width": 1.6, "dash": look.dash},
        "hovertemplate": f"{look.name}: %{{y:.2%}}<extra></extra>",
    }  # fmt: skip


def delta_figure(grid: PanelGrid, figure_id: str) -> Figure:
    """ΔE against D_p: measured means with intervals, the laws' difference, the boundary with its interval."""
    layout = grid_layout(grid, DELTA_TITLE if len(grid.rows) > 1 else "ΔE, points", log_y=False, tick_format="+.3~g")
    traces: list[Spec] = []
    for number, (panel, axes) in enumerate(placed(grid)):
        first, curve = number == 0, panel.series[0].curve
        if curve is not None:
            traces += _delta_curve(curve, axes, first)
        traces += _delta_points(panel, axes, first)
        layout["shapes"] += [_zero_line(axes), *_boundary_shapes(panel.boundary, axes)]
    return Figure(figure_id, {"data": traces, "layout": layout}, layout["height"])


def pooled_figure(panel: Panel, ticks: Sequence[float], figure_id: str) -> Figure:
    """The page's first picture: ΔE against D_p over all students and labels."""
    axes = {"xaxis": "x", "yaxis": "y"}
    layout = base_layout(POOLED_HEIGHT)
    curve = panel.series[0].curve
    method = "law" if curve is None or curve.law else "law_free"
    layout |= {
        "xaxis": log_axis(ticks) | {"title": axis_title(AXIS_TITLES["upstream_samples"])},
        "yaxis": {
            "title": axis_title(DELTA_TITLE), "tickformat": "+.3~g", "gridcolor": RULE, "zeroline": False,
            "nticks": 6,
        },
        "shapes": [_zero_line(axes), *_boundary_shapes(panel.boundary, axes, method)],
        "showlegend": False, "margin": {"l": 58, "r": 8, "t": 8, "b": 44},
    }  # fmt: skip
    traces = [*(_delta_curve(curve, axes, True) if curve else ()), *_delta_points(panel, axes, True)]
    return Figure(figure_id, {"data": traces, "layout": layout}, POOLED_HEIGHT)


def _delta_curve(curve: Curve, axes: Spec, first: bool) -> Iterator[Spec]:
    look = LOOKS["delta"]
    scaled = curve.model_copy(update={name: _hundredfold(getattr(curve, name)) for name in ("y", "low", "high")})
    common = {**axes, "legendgroup": "law", "meta": {"arm": "delta"}}
    yield from _band(scaled, look.faded(0.12), common)
    source, dash = ("laws", "solid") if curve.law else ("through the paired runs", "dot")
    yield {
        **common, "type": "scatter", "mode": "lines", "x": scaled.x, "y": scaled.y, "showlegend": first,
        "name": "difference of the fitted laws, with interval",
        "line": {"color": look.color, "width": 2, "dash": dash},
        "hovertemplate": f"{source}<br>%{{x:,.4s}}: %{{y:+.2f}} points<extra></extra>",
    }  # fmt: skip


def _hundredfold(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else 100 * value for value in values]


def _delta_points(panel: Panel, axes: Spec, first: bool) -> Iterator[Spec]:
    points = sorted(panel.points, key=lambda point: point.upstream_samples)
    if not points:
        return
    means = [100 * point.delta.value for point in points]
    up = [100 * (point.delta.high - point.delta.value) if point.delta.high is not None else 0.0 for point in points]
    # Colour and shape say which arm wins; a zero or an interval across zero stays readable from the line.
    wins = ["distilled" if mean > 0 else "plain" for mean in means]
    yield {
        **axes, "type": "scatter", "mode": "markers", "x": [point.upstream_samples for point in points], "y": means,
        "error_y": {"type": "data", "array": up, "thickness": 1.4, "width": 4, "color": MUTED},
        "meta": {"arm": "delta"},
        "marker": {
            "color": [LOOKS[win].color for win in wins], "size": 9,
            "line": {"width": 1.6, "color": [LOOKS[win].color for win in wins]},
            "symbol": [LOOKS[win].marker for win in wins],
        },
        "customdata": [point.num_seeds for point in points], "name": "measured: mean over paired seeds, with interval",
        "legendgroup": "measured", "showlegend": first,
        "hovertemplate": "%{x:,} upstream images<br>ΔE %{y:+.2f} points, %{customdata} seeds<extra></extra>",
    }  # fmt: skip


def _zero_line(axes: Spec) -> Spec:
    return {
        "type": "line", "xref": f"{axes['xaxis']} domain", "yref": axes["yaxis"], "x0": 0, "x1": 1, "y0": 0, "y1": 0,
        "line": {"color": INK, "width": 1}, "layer": "below",
    }  # fmt: skip


def _boundary_shapes(records: Sequence[BoundaryRecord], axes: Spec, method: str = "law") -> Iterator[Spec]:
    """A line at the root and a shade over its interval, by the method whose curve is drawn."""
    for record in records:
        root = record.upstream_samples
        if record.method != method or root is None:
            continue
        place = {"xref": axes["xaxis"], "yref": f"{axes['yaxis']} domain", "y0": 0, "y1": 1, "layer": "below"}
        low, high = root.low or record.measured_range[0] / 2, root.high or record.measured_range[1] * 2
        yield {
            **place,
            "type": "rect",
            "x0": low,
            "x1": high,
            "fillcolor": "rgba(60,69,87,0.10)",
            "line": {"width": 0},
        }
        yield {
            **place,
            "type": "line",
            "x0": root.value,
            "x1": root.value,
            "line": {"color": INK, "width": 1.2, "dash": "dot"},
        }
