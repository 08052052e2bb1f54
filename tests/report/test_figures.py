"""Axes carry round ticks, panels the right runs, and marks the arm's own look."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dbscale.report import panels
from dbscale.report.curves import few, log_grid
from dbscale.report.fits import Options, fit_grid
from dbscale.report.plotly_axes import error_ticks
from dbscale.report.style import LOOKS


@settings(deadline=None)
@given(st.floats(1e-3, 0.9), st.floats(1.6, 300))
def test_every_error_axis_has_a_few_round_ticks(low, ratio):
    high = min(low * ratio, 1.0)
    ticks = [tick for tick in error_ticks((low, high)) if low <= tick <= high]
    assert high < 1.5 * low or 1 <= len(ticks) <= 12


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=9))
def test_few_values_keep_both_ends(values):
    kept = few(values)
    assert len(kept) <= 3
    assert (kept[0], kept[-1]) == (min(values), max(values))


def test_curves_reach_beyond_the_measured_range():
    grid = log_grid([100, 1000])
    assert grid[0] < 100 and grid[-1] > 1000


def test_arms_differ_in_colour_mark_and_dash():
    plain, distilled = LOOKS["plain"], LOOKS["distilled"]
    assert plain.color != distilled.color
    assert plain.marker != distilled.marker
    assert plain.dash != distilled.dash
    assert abs(luminance(plain.color) - luminance(distilled.color)) > 0.15


def luminance(color: str) -> float:
    """Relative luminance of an sRGB colour: what is left without colour vision."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_panels_hold_every_run_once(make_table):
    table = make_table(students={"h1": 50_000, "h2": 200_000}, downstream=(100, 1000))
    findings = fit_grid(table, options=Options(num_bootstraps=20))
    setting = table.settings[0]
    grid = panels.error_by_upstream(table, findings.laws, setting)
    drawn = sum(len(series.y) for panel in grid.panels for series in panel.series)
    assert drawn == len(table.pretrained)
    assert grid.columns == ("h1 · 50k parameters", "h2 · 200k parameters")
    assert grid.rows == ("100 labels", "1,000 labels")
    assert all(panel.level is not None for panel in grid.panels)
    assert all(series.curve is not None for panel in grid.panels for series in panel.series)
    assert [len(block.columns) for block in grid.blocks(1)] == [1, 1]
    delta = panels.delta_by_upstream(table, findings.boundary, setting)
    assert all(len(panel.points) == 5 and len(panel.boundary) == 2 for panel in delta.panels)
