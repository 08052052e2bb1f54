"""Every boundary of a setting in one figure: root and interval, from the laws and law-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dbscale.report.plotly_axes import Figure, Spec, axis_title, base_layout, log_axis, log_range
from dbscale.report.schema import BoundaryRecord
from dbscale.report.style import LOOKS, MUTED, RULE

WITHOUT_ROOT = {
    "always_positive": "distilling helps, no boundary",
    "always_negative": "distilling hurts, no boundary",
    "": "too little data",
}
NO_BOX = "<extra></extra>"
"""Plotly names the trace in a second box unless told not to."""


def boundary_figure(records: Sequence[BoundaryRecord], ticks: Sequence[float], figure_id: str) -> Figure:
    """Every boundary with its interval, one line each: from the laws and law-free."""
    labels = list(dict.fromkeys(_boundary_label(record) for record in records))
    height = 76 + 26 * len(labels)
    low, high = records[0].measured_range
    traces = [_boundary_trace(records, labels, method) for method in ("law", "law_free")]
    layout = base_layout(height)
    layout |= {
        "xaxis": log_axis(ticks)
        | {
            "title": axis_title("D_p*: upstream images at which distillation stops paying"),
            "range": log_range(low / 4.4, high * 4.4),
        },
        "yaxis": {
            "tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": labels[::-1],
            "range": [-0.7, len(labels) - 0.3],
            "gridcolor": RULE, "zeroline": False, "fixedrange": True, "ticks": "",
        },
        "shapes": [
            {"type": "rect", "xref": "x", "yref": "paper", "x0": low, "x1": high, "y0": 0, "y1": 1, "layer": "below",
             "fillcolor": "rgba(31,78,140,0.05)", "line": {"width": 0}}
        ],
        "margin": {"l": 190, "r": 16, "t": 34, "b": 46},
        "annotations": [*_without_root(records, labels, (low, high))],
    }  # fmt: skip
    return Figure(figure_id, {"data": traces, "layout": layout}, height)


def _boundary_label(record: BoundaryRecord) -> str:
    if record.seed is not None:
        return f"all pooled · seed {record.seed}"
    return "all pooled" if record.student is None else f"{record.student} · {record.downstream_samples:,} labels"


def _boundary_trace(records: Sequence[BoundaryRecord], labels: list[str], method: str) -> Spec:
    look = LOOKS["delta" if method == "law" else "law_free"]
    shift = 0.14 if method == "law" else -0.14
    found = [record for record in records if record.method == method and record.upstream_samples is not None]
    roots = [record.upstream_samples for record in found if record.upstream_samples is not None]
    span = [record.measured_range for record in found]
    return {
        "type": "scatter", "mode": "markers", "x": [root.value for root in roots],
        "y": [len(labels) - 1 - labels.index(_boundary_label(record)) + shift for record in found],
        "error_x": {
            "type": "data", "symmetric": False, "thickness": 1.6, "width": 0, "color": look.color,
            "array": [(root.high or reach[1] * 4) - root.value for root, reach in zip(roots, span, strict=True)],
            "arrayminus": [root.value - (root.low or reach[0] / 4) for root, reach in zip(roots, span, strict=True)],
        },
        "marker": {
            "color": look.color if method == "law" else "#ffffff", "symbol": "square", "size": 8,
            "line": {"color": look.color, "width": 1.6},
        },
        "name": "from the fitted laws" if method == "law" else "from the paired runs, no law assumed",
        "customdata": [[record.probability, _boundary_label(record)] for record in found],
        "hovertemplate": "%{customdata[1]}<br>boundary at %{x:,.0f}, crosses in %{customdata[0]:.0%} of draws" + NO_BOX,
    }  # fmt: skip


def _without_root(
    records: Sequence[BoundaryRecord], labels: list[str], measured: tuple[float, float]
) -> Iterator[Spec]:
    """Where no boundary is established, the line says so, once for both methods; beside a root, on its free side."""
    low, high = measured
    for place, label in enumerate(reversed(labels)):
        here = [record for record in records if _boundary_label(record) == label]
        rootless = [record for record in here if record.upstream_samples is None]
        roots = [record.upstream_samples.value for record in here if record.upstream_samples is not None]
        if rootless:
            x, side = (low * high) ** 0.5, "center"
            if roots:
                x, side = (low / 4.2, "left") if roots[0] > x else (high * 4.2, "right")
            yield {
                "x": math.log10(x), "y": place, "xref": "x", "yref": "y", "text": _said(rootless), "xanchor": side,
                "showarrow": False, "font": {"size": 11, "color": MUTED}, "bgcolor": "rgba(255,255,255,0.75)",
            }  # fmt: skip


def _said(rootless: Sequence[BoundaryRecord]) -> str:
    texts = {record.method: WITHOUT_ROOT.get(record.direction or "", "no boundary established") for record in rootless}
    if len(set(texts.values())) == 1 and len(texts) > 1:
        return next(iter(texts.values()))
    names = {"law": "laws", "law_free": "paired runs"}
    return "; ".join(f"{names[method]}: {text}" for method, text in texts.items())
