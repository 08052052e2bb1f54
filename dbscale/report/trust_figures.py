"""How far to trust a law: predicted against measured error, and residuals over upstream data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dbscale.report.plotly_axes import Figure, Spec, axis_title, base_layout, error_ticks, log_axis, log_range
from dbscale.report.schema import Prediction
from dbscale.report.style import INK, LOOKS, MUTED, RULE

HEIGHT = 380
WHICH_RUN = "%{customdata[0]}, D_p %{customdata[1]:,}, D_f %{customdata[2]:,}, seed %{customdata[3]}"


def predicted_figure(predictions: Sequence[Prediction], figure_id: str) -> Figure:
    """Predicted against measured; filled marks were seen by the law, crosses were held out."""
    layout = base_layout(HEIGHT)
    traces = [
        trace
        for arm in ("plain", "distilled")
        for held_out in (False, True)
        for trace in _predicted_trace(predictions, arm, held_out)
    ]
    values = [p.measured for p in predictions if p.measured > 0] + [p.predicted for p in predictions if p.predicted]
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    axis = {
        "type": "log", "range": log_range(low / 1.1, high * 1.1), "tickformat": ".3~%",
        "tickvals": error_ticks((low, high)), "gridcolor": RULE, "zeroline": False, "ticks": "outside",
        "tickcolor": RULE,
    }  # fmt: skip
    layout["shapes"] = [
        {
            "type": "line", "xref": "x", "yref": "y", "line": {"color": MUTED, "width": 1}, "layer": "below",
            "x0": low, "x1": high, "y0": low, "y1": high,
        }
    ]  # fmt: skip
    layout |= {
        "xaxis": axis | {"title": axis_title("measured error")},
        "yaxis": axis | {"title": axis_title("predicted error")},
    }
    return Figure(figure_id, {"data": traces, "layout": layout}, HEIGHT)


def _predicted_trace(predictions: Sequence[Prediction], arm: str, held_out: bool) -> Iterator[Spec]:
    chosen = [p for p in predictions if p.arm == arm and p.held_out == held_out and p.predicted is not None]
    if chosen:
        yield {
            **_look(arm, held_out), "x": [p.measured for p in chosen], "y": [p.predicted for p in chosen],
            "customdata": [[p.student, p.upstream_samples, p.downstream_samples, p.seed] for p in chosen],
            "hovertemplate": f"{WHICH_RUN}<br>measured %{{x:.2%}}, predicted %{{y:.2%}}<extra></extra>",
        }  # fmt: skip


def _look(arm: str, held_out: bool) -> Spec:
    look = LOOKS[arm]
    marker = {
        "color": look.color, "symbol": "cross-thin-open" if held_out else look.marker, "size": 9 if held_out else 6,
        "opacity": 1 if held_out else 0.55, "line": {"width": 1.8 if held_out else 1},
    }  # fmt: skip
    name = f"{look.name}, {'held out: largest D_p' if held_out else 'fitted'}"
    return {"type": "scatter", "mode": "markers", "name": name, "meta": {"arm": arm}, "marker": marker}


def residual_figure(predictions: Sequence[Prediction], figure_id: str) -> Figure:
    """Predicted over measured, by D_p: a trend shows that the law's shape is wrong."""
    layout = base_layout(HEIGHT)
    usable = [p for p in predictions if p.predicted and p.measured > 0]
    traces = [
        trace
        for arm in ("plain", "distilled")
        for held_out in (False, True)
        for trace in _residual_trace(usable, arm, held_out)
    ]
    sizes = sorted({float(p.upstream_samples) for p in usable})
    layout["shapes"] = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "yref": "y",
            "y0": 0,
            "y1": 0,
            "line": {"color": INK, "width": 1},
            "layer": "below",
        }
    ]
    layout |= {
        "xaxis": log_axis(sizes) | {"title": axis_title("upstream images")},
        "yaxis": {
            "title": axis_title("predicted above measured"), "tickformat": "+.0%", "gridcolor": RULE, "zeroline": False,
        },
    }  # fmt: skip
    return Figure(figure_id, {"data": traces, "layout": layout}, HEIGHT)


def _residual_trace(predictions: Sequence[Prediction], arm: str, held_out: bool) -> Iterator[Spec]:
    chosen = [p for p in predictions if p.arm == arm and p.held_out == held_out]
    if chosen:
        # The arms stand a little apart, so that neither hides the other.
        shift = 0.94 if arm == "plain" else 1.06
        yield {
            **_look(arm, held_out), "x": [p.upstream_samples * shift for p in chosen],
            "y": [(p.predicted or 0) / p.measured - 1 for p in chosen], "showlegend": False,
            "customdata": [[p.student, p.upstream_samples, p.downstream_samples, p.seed] for p in chosen],
            "hovertemplate": f"{WHICH_RUN}<br>%{{y:+.1%}}<extra></extra>",
        }  # fmt: skip
