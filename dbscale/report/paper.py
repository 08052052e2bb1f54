"""The page's panels as figures for a paper: SVG and PDF by matplotlib, with the same colours, marks and dashes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbscale.files import atomic_open
from dbscale.report import panels
from dbscale.report.fits import Findings
from dbscale.report.panels import AXIS_TITLES, Panel, PanelGrid, Series, count_text
from dbscale.report.refresh import refresh, refresh_table
from dbscale.report.schema import Curve
from dbscale.report.style import INK, LOOKS, MUTED, RULE
from dbscale.report.table import RunTable, Setting
from dbscale.study.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "pdf")
PANEL_INCHES = (1.9, 1.5)
WIDEST = 4
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.edgecolor": MUTED, "axes.linewidth": 0.6, "axes.spines.top": False,
    "axes.spines.right": False, "xtick.color": MUTED, "ytick.color": MUTED, "text.color": INK, "axes.labelcolor": INK,
    "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.5, "legend.frameon": False, "lines.linewidth": 1.2,
    "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "dbscale",
}  # fmt: skip


def export_figures(store: Store, grid_name: str, out_dir: Path) -> tuple[Path, ...]:
    """Write every figure of a grid's report to `out_dir`, one SVG and one PDF each; returns the paths."""
    table, findings = refresh(store, grid_name)
    return draw_figures(table, findings, out_dir)


def export_table_figures(path: Path, out_dir: Path) -> tuple[Path, ...]:
    """The same from a table alone, with laws.json and boundary.json beside the figures."""
    table, findings = refresh_table(path, out_dir)
    return draw_figures(table, findings, out_dir)


def draw_figures(table: RunTable, findings: Findings, out_dir: Path) -> tuple[Path, ...]:
    """The figures of a table that was fitted; the same inputs give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        for number, setting in enumerate(table.settings):
            prefix = "".join(c if c.isalnum() else "-" for c in f"{setting.dataset}-{setting.variant}")
            prefix = f"{number}-{prefix}" if len(table.settings) > 1 else prefix
            for name, figure in _figures(table, findings, setting):
                paths += _save(figure, out_dir, f"{prefix}-{name}")
    return tuple(paths)


def _save(figure: Figure, out_dir: Path, name: str) -> Iterator[Path]:
    import matplotlib.pyplot as plt

    for kind in FORMATS:
        path = out_dir / f"{name}.{kind}"
        stamp: dict[str, Any] = {"Date": None} if kind == "svg" else {"CreationDate": None}
        with atomic_open(path, "wb") as file:
            figure.savefig(file, format=kind, metadata=stamp, bbox_inches="tight")
        yield path
    plt.close(figure)


def _figures(table: RunTable, findings: Findings, setting: Setting) -> Iterator[tuple[str, Figure]]:
    laws, boundary = findings.laws, findings.boundary
    grids = [panels.error_by_upstream(table, laws, setting)]
    runs = table.pretrained.where(setting=setting)
    if len(runs.values("downstream_samples")) > 1:
        grids.append(panels.error_by_labels(table, laws, setting))
    if len(runs.students) > 1:
        grids.append(panels.error_by_params(table, laws, setting))
    for grid in grids:
        for part, block in enumerate(grid.blocks(WIDEST)):
            yield f"{grid.name}{part or ''}".replace("_", "-"), _draw(block, _draw_errors, "top-1 error")
    if any(point.dataset == setting.dataset for point in boundary.points):
        for part, block in enumerate(panels.delta_by_upstream(table, boundary, setting).blocks(WIDEST)):
            yield f"delta-by-upstream{part or ''}", _draw(block, _draw_delta, "ΔE (points)")


def _draw(grid: PanelGrid, draw_panel: Callable[[Axes, Panel], None], label: str) -> Figure:
    """A grid of small plots with shared axes, names at the edges and one legend."""
    import matplotlib.pyplot as plt

    rows, columns = len(grid.rows), len(grid.columns)
    size = (PANEL_INCHES[0] * columns + 0.8, PANEL_INCHES[1] * rows + 0.9)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for panel in grid.panels:
        place = grid.rows.index(panel.row), grid.columns.index(panel.column)
        one = axes[place]
        one.set_xscale("log")
        draw_panel(one, panel)
        one.set_xticks(grid.ticks, [count_text(tick) for tick in grid.ticks])
        one.minorticks_off()
        if place[0] == 0:
            one.set_title(panel.column)
        if place[1] == columns - 1:
            one.annotate(panel.row, (1.03, 0.5), xycoords="axes fraction", va="center", rotation=-90, color=MUTED)
    figure.supxlabel(AXIS_TITLES[grid.axis], fontsize=8)
    figure.supylabel(label, fontsize=8)
    handles, names = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside upper left", ncols=len(handles))
    return figure


def _draw_errors(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    for series in panel.series:
        _draw_series(axes, series)
    if panel.level is not None:
        look = LOOKS["scratch"]
        axes.axhline(panel.level, color=look.color, linestyle=look.mpl_dash, label=look.name)


def _draw_series(axes: Axes, series: Series) -> None:
    look = LOOKS[series.arm]
    if series.curve is not None:
        _draw_curve(axes, series.curve, look.color, look.mpl_dash)
    hollow = "none" if series.arm == "distilled" else look.color
    axes.plot(
        series.x, series.y, look.mpl_marker, color=look.color, markerfacecolor=hollow, markersize=3.5,
        markeredgewidth=0.9,
        label=look.name,
    )  # fmt: skip


def _draw_curve(axes: Axes, curve: Curve, color: str, dash: str, scale: float = 1.0) -> None:
    x, y, low, high = (_numbers(values) for values in (curve.x, curve.y, curve.low, curve.high))
    axes.fill_between(x, low * scale, high * scale, color=color, alpha=0.13, linewidth=0)
    axes.plot(x, y * scale, linestyle=dash, color=color)


def _numbers(values: tuple[float | None, ...]) -> Any:
    import numpy as np

    return np.array([np.nan if value is None else value for value in values])


def _draw_delta(axes: Axes, panel: Panel) -> None:
    look = LOOKS["delta"]
    axes.axhline(0, color=INK, linewidth=0.6)
    curve = panel.series[0].curve
    if curve is not None:
        _draw_curve(axes, curve, look.color, look.mpl_dash, 100)
    for point in panel.points:
        arm = LOOKS["distilled" if point.delta.value > 0 else "plain"]
        half = 100 * (point.delta.high - point.delta.value) if point.delta.high is not None else 0
        axes.errorbar(
            point.upstream_samples, 100 * point.delta.value, yerr=half, fmt=arm.mpl_marker, color=arm.color,
            ecolor=MUTED,
            elinewidth=0.9, capsize=2, markersize=4, markerfacecolor="white" if point.delta.value > 0 else arm.color,
        )  # fmt: skip
    for record in panel.boundary:
        if record.method == "law" and record.upstream_samples is not None:
            root = record.upstream_samples
            axes.axvspan(
                root.low or record.measured_range[0],
                root.high or record.measured_range[1],
                color=look.color,
                alpha=0.1,
                linewidth=0,
            )
            axes.axvline(root.value, color=INK, linestyle=":", linewidth=0.9)
