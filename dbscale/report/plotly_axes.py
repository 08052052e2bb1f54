"""Axes and layout that all Plotly figures of the page share; every figure is a plain mapping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dbscale.report.panels import AXIS_TITLES, Panel, PanelGrid, count_text
from dbscale.report.style import INK, MUTED, RULE

FONT = "Inter, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
PANEL_HEIGHT, TOP, BOTTOM, GAP_X, GAP_Y = 176, 36, 58, 0.024, 16
Spec = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A Plotly figure with its place on the page."""

    id: str
    spec: Spec
    height: int


def placed(grid: PanelGrid) -> Iterator[tuple[Panel, Spec]]:
    """Each panel with its axes' names."""
    for panel in grid.panels:
        number = grid.rows.index(panel.row) * len(grid.columns) + grid.columns.index(panel.column) + 1
        suffix = "" if number == 1 else str(number)
        yield panel, {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}


def base_layout(height: int) -> Spec:
    return {
        "height": height, "autosize": True, "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)", "hovermode": "closest", "shapes": [], "annotations": [],
        "margin": {"l": 64, "r": 8, "t": TOP, "b": BOTTOM},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top", "font": {"size": 12}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#b4bbc7", "activecolor": INK},
        "hoverlabel": {"font": {"family": FONT, "size": 12}, "bgcolor": "#ffffff", "bordercolor": RULE},
    }  # fmt: skip


def error_ticks(ends: tuple[float, float]) -> list[float]:
    """Round error rates for a log axis: the wider its range, the sparser they stand."""
    ratio = ends[1] / ends[0]
    steps = (1, 2, 5) if ratio > 12 else (1, 2, 3, 5, 7) if ratio > 4 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    return [step * 10.0**power for power in range(-4, 1) for step in steps if step * 10.0**power <= 1]


def grid_layout(grid: PanelGrid, y_title: str, *, log_y: bool, tick_format: str, y_ticks: Sequence[float] = ()) -> Spec:
    """Axes of a grid of panels: shared ticks, titles on the outer edge, columns named above, rows at the right."""
    rows, columns = len(grid.rows), len(grid.columns)
    top = TOP + 26
    height = top + BOTTOM + rows * PANEL_HEIGHT + (rows - 1) * GAP_Y
    layout = base_layout(height)
    layout["margin"]["t"] = top
    gap_y = GAP_Y / (height - top - BOTTOM)
    width, tall = (1 - GAP_X * (columns - 1)) / columns, (1 - gap_y * (rows - 1)) / rows
    for row in range(rows):
        for column in range(columns):
            number = row * columns + column + 1
            suffix = "" if number == 1 else str(number)
            x0, y1 = column * (width + GAP_X), 1 - row * (tall + gap_y)
            x_axis = log_axis(grid.ticks) | {
                "domain": [x0, x0 + width],
                "anchor": f"y{suffix}",
                "showticklabels": row == rows - 1,
            }
            y_axis = {
                "domain": [max(0.0, y1 - tall), y1], "anchor": f"x{suffix}", "showticklabels": column == 0,
                "gridcolor": RULE,
                "zeroline": False, "tickformat": tick_format, "nticks": 5, "ticks": "", "automargin": False,
            }  # fmt: skip
            y_axis |= {"type": "log", "tickmode": "array", "tickvals": list(y_ticks)} if log_y else {}
            x_axis |= {"matches": "x"} if number > 1 else {}
            y_axis |= {"matches": "y"} if number > 1 else {}
            layout[f"xaxis{suffix}"], layout[f"yaxis{suffix}"] = x_axis, y_axis
    layout["annotations"] = [*_names(grid, width, tall, gap_y), *_titles(grid, y_title)]
    return layout


def _names(grid: PanelGrid, width: float, tall: float, gap_y: float) -> Iterator[Spec]:
    """Columns are named above, rows in the upper right corner of their last panel."""
    common = {"xref": "paper", "yref": "paper", "showarrow": False}
    for number, column in enumerate(grid.columns):
        x = number * (width + GAP_X) + width / 2
        yield {
            **common, "x": x, "y": 1, "xanchor": "center", "yanchor": "bottom", "yshift": 5,
            "text": f"<b>{escape(column)}</b>", "font": {"size": 12, "color": INK},
        }  # fmt: skip
    for number, row in enumerate(grid.rows):
        yield {
            **common, "x": 1, "y": 1 - number * (tall + gap_y), "xanchor": "right", "yanchor": "top",
            "text": escape(row),
            "bgcolor": "rgba(255,255,255,0.8)", "borderpad": 2, "font": {"size": 12, "color": MUTED},
        }  # fmt: skip


def _titles(grid: PanelGrid, y_title: str) -> Iterator[Spec]:
    common = {"xref": "paper", "yref": "paper", "showarrow": False, "font": {"size": 12, "color": MUTED}}
    yield {
        **common,
        "x": 0.5,
        "y": 0,
        "xanchor": "center",
        "yanchor": "top",
        "yshift": -26,
        "text": AXIS_TITLES[grid.axis],
    }
    yield {
        **common, "x": 0, "y": 0.5, "xanchor": "right", "yanchor": "middle", "xshift": -44, "textangle": -90,
        "text": y_title,
    }  # fmt: skip


def log_axis(ticks: Sequence[float]) -> Spec:
    return {
        "type": "log", "tickmode": "array", "tickvals": list(ticks), "ticktext": [count_text(tick) for tick in ticks],
        "gridcolor": RULE, "zeroline": False, "ticks": "outside", "ticklen": 4, "tickcolor": RULE, "tickangle": 0,
    }  # fmt: skip


def log_range(low: float, high: float) -> list[float]:
    return [math.log10(low), math.log10(high)]


def axis_title(text: str) -> Spec:
    return {"text": text, "font": {"size": 12, "color": MUTED}}


def escape(text: str) -> str:
    """Plotly reads a little HTML in its texts; names from grids must not be any."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
