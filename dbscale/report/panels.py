"""What the plots show, before anyone draws: panels of measured points and fitted curves on the axes of a grid.

Both renderers, the page's and the paper's, draw these; they add nothing of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dbscale.report.curves import few
from dbscale.report.schema import AxisName, BoundaryFile, BoundaryRecord, Curve, DeltaPoint, LawsFile
from dbscale.report.table import Run, RunTable, Setting

ARM_NAMES = {"plain": "plain", "distilled": "distilled", "scratch": "no upstream data"}
AXIS_TITLES: dict[str, str] = {
    "upstream_samples": "upstream images",
    "downstream_samples": "labelled downstream images",
    "num_params": "parameters",
}


@dataclass(frozen=True)
class Series:
    """One arm in one panel: every run, the mean over seeds, and the law's curve where there is one."""

    arm: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    seeds: tuple[int, ...]
    curve: Curve | None = None

    @property
    def means(self) -> list[tuple[float, float]]:
        """(x, mean over seeds), by x."""
        groups: dict[float, list[float]] = {}
        for x, y in zip(self.x, self.y, strict=True):
            groups.setdefault(x, []).append(y)
        return [(x, float(np.mean(ys))) for x, ys in sorted(groups.items())]


@dataclass(frozen=True)
class Panel:
    """One small plot; `column` and `row` name what is held fixed in it."""

    column: str
    row: str
    series: tuple[Series, ...]
    level: float | None = None
    """Error without upstream data, a horizontal line."""
    points: tuple[DeltaPoint, ...] = ()
    boundary: tuple[BoundaryRecord, ...] = ()


@dataclass(frozen=True)
class PanelGrid:
    """Panels that share their axes, row by row."""

    name: str
    setting: Setting
    axis: AxisName
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    panels: tuple[Panel, ...]
    ticks: tuple[float, ...] = field(default=())

    @property
    def error_range(self) -> tuple[float, float]:
        """Smallest and largest error of any run or fitted curve; (0.1, 1) where there is none."""
        values = [y for panel in self.panels for series in panel.series for y in series.y]
        values += [y for panel in self.panels for series in panel.series if series.curve for y in series.curve.y if y]
        values = [y for y in values if y > 0]
        return (min(values), max(values)) if values else (0.1, 1.0)

    def blocks(self, width: int) -> list[PanelGrid]:
        """The same panels in grids of at most `width` columns."""
        parts = [self.columns[i : i + width] for i in range(0, len(self.columns), width)]
        return [
            PanelGrid(
                self.name, self.setting, self.axis, part, self.rows,
                tuple(panel for panel in self.panels if panel.column in part), self.ticks,
            )
            for part in parts
        ]  # fmt: skip


def error_by_upstream(table: RunTable, laws: LawsFile, setting: Setting) -> PanelGrid:
    """Columns are students, rows are D_f."""
    runs = table.pretrained.where(setting=setting)
    scratch = table.scratch_of(setting)
    panels = []
    for labels in runs.values("downstream_samples"):
        for student in runs.students:
            part = runs.where(student=student, downstream_samples=labels)
            floor = scratch.where(student=student, downstream_samples=labels).column("error_rate")
            curves = _curves(laws, setting, "upstream_samples", student=student, downstream_samples=labels)
            panels.append(
                Panel(student_label(runs, student), labels_label(labels), _series(part, "upstream_samples", curves),
                      level=float(np.mean(floor)) if floor else None)
            )  # fmt: skip
    return _grid("error_by_upstream", setting, "upstream_samples", panels, runs)


def error_by_labels(table: RunTable, laws: LawsFile, setting: Setting) -> PanelGrid:
    """Columns are students, rows are a few D_p."""
    runs = table.pretrained.where(setting=setting)
    panels = []
    for size in few(runs.values("upstream_samples")):
        for student in runs.students:
            part = runs.where(student=student, upstream_samples=size)
            curves = _curves(laws, setting, "downstream_samples", student=student, upstream_samples=size)
            panels.append(
                Panel(
                    student_label(runs, student),
                    upstream_label(size),
                    _series(part, "downstream_samples", curves),
                )
            )
    return _grid("error_by_labels", setting, "downstream_samples", panels, runs)


def error_by_params(table: RunTable, laws: LawsFile, setting: Setting) -> PanelGrid:
    """Columns are D_f, rows are a few D_p."""
    runs = table.pretrained.where(setting=setting)
    panels = []
    for size in few(runs.values("upstream_samples")):
        for labels in runs.values("downstream_samples"):
            part = runs.where(upstream_samples=size, downstream_samples=labels)
            curves = _curves(laws, setting, "num_params", upstream_samples=size, downstream_samples=labels)
            panels.append(Panel(labels_label(labels), upstream_label(size), _series(part, "num_params", curves)))
    return _grid("error_by_params", setting, "num_params", panels, runs)


def delta_by_upstream(table: RunTable, boundary: BoundaryFile, setting: Setting) -> PanelGrid:
    """Columns are students with both arms, rows are D_f; measured ΔE, its curve and the boundary."""
    runs = table.pretrained.where(setting=setting).both_arms
    panels = [
        delta_panel(boundary, setting, student, labels, student_label(runs, student), labels_label(labels))
        for labels in runs.values("downstream_samples")
        for student in runs.students
    ]
    return _grid("delta_by_upstream", setting, "upstream_samples", panels, runs)


def delta_panel(
    boundary: BoundaryFile, setting: Setting, student: str | None, labels: int | None, column: str, row: str,
    *, free: bool = False,
) -> Panel:  # fmt: skip
    """ΔE of one student and D_f, or pooled under None; its curve from the laws, or free of any (pooled only)."""
    here = {"student": student, "downstream_samples": labels}
    curves = [curve for curve in boundary.curves if _matches(curve, setting, **here) and (curve.law is None) == free]
    return Panel(
        column, row, (Series("delta", (), (), (), curves[0] if curves else None),), None,
        tuple(point for point in boundary.points if _matches(point, setting, **here)),
        tuple(record for record in boundary.boundaries if _matches(record, setting, seed=None, **here)),
    )  # fmt: skip


def _grid(name: str, setting: Setting, axis: AxisName, panels: Sequence[Panel], runs: RunTable) -> PanelGrid:
    return PanelGrid(
        name, setting, axis, tuple(dict.fromkeys(panel.column for panel in panels)),
        tuple(dict.fromkeys(panel.row for panel in panels)), tuple(panels), tuple(map(float, runs.values(axis))),
    )  # fmt: skip


def _series(runs: RunTable, axis: str, curves: Sequence[Curve]) -> tuple[Series, ...]:
    return tuple(
        Series(
            arm, *_columns(runs.where(arm=arm), axis), next((curve for curve in curves if curve.arm == arm), None)
        )
        for arm in runs.arms
    )  # fmt: skip


def _columns(runs: Iterable[Run], axis: str) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    found = sorted((float(getattr(run, axis)), run.error_rate, run.seed) for run in runs)
    x, y, seeds = zip(*found, strict=True) if found else ((), (), ())
    return x, y, seeds


def _curves(laws: LawsFile, setting: Setting, axis: str, **fixed: object) -> list[Curve]:
    return [curve for curve in laws.curves if curve.axis == axis and _matches(curve, setting, **fixed)]


def _matches(item: Curve | DeltaPoint | BoundaryRecord, setting: Setting, **fixed: object) -> bool:
    same = (item.variant, item.upstream_dataset, item.dataset) == tuple(setting)
    return same and all(getattr(item, name) == value for name, value in fixed.items())


def count_text(value: float) -> str:
    """1,000 as 1k, 38,400,000 as 38.4M: short, and exact enough to recognise."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def student_label(runs: RunTable, student: str) -> str:
    return f"{student} · {count_text(runs.params(student))} parameters"


def labels_label(count: int) -> str:
    return f"{count:,} labels"


def upstream_label(count: int) -> str:
    return f"{count:,} upstream images"
