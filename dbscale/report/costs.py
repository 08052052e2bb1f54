"""What was run where, for how long, and how that compares with the plan's prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dbscale.report.table import MissingPoint, RunTable
from dbscale.report.words import percent
from dbscale.study.plan import PlanRecord
from dbscale.study.store import Row, Store


@dataclass(frozen=True)
class StageCost:
    """Finished cells of one stage on one device of one host."""

    stage: str
    device: str
    host: str
    num_cells: int
    device_time_s: float
    longest_s: float
    images_per_s: float | None
    """Median over cells; None where a table does not tell."""
    data_wait_share: float | None
    """Mean over cells; None where a table does not tell."""
    num_attempts: int | None


@dataclass(frozen=True)
class Cost:
    """Of a whole grid."""

    stages: tuple[StageCost, ...]
    actual_s: float
    predicted_s: float
    num_done: int
    num_cells: int

    @property
    def sentence(self) -> str:
        """Actual against predicted, said."""
        text = f"{self.num_done} of {self.num_cells} cells took {duration(self.actual_s)} of device time"
        if self.predicted_s <= 0 or not self.num_done:
            return f"{text}."
        if self.num_done < self.num_cells:
            return f"{text}; the plan predicts {duration(self.predicted_s)} for all of them."
        share = percent(self.actual_s / self.predicted_s, 0)
        return f"{text}, {share} of the {duration(self.predicted_s)} that the plan predicted."


@dataclass(frozen=True)
class LostCell:
    """A cell without a result and how many points its absence costs."""

    key: str
    state: str
    reason: str
    log: str
    points_lost: int


def cost_of(plan: PlanRecord, rows: Sequence[Row]) -> Cost:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.stage, row.timing.device, row.timing.host), []).append(row)
    order = ("pretrain", "distill", "finetune")
    stages = [
        _stage(*place, group)
        for place, group in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0]))
    ]
    actual = sum(row.timing.device_time_s for row in rows)
    return Cost(tuple(stages), actual, plan.predicted_device_s, len(rows), len(plan.cells))


def _stage(stage: str, device: str, host: str, rows: Sequence[Row]) -> StageCost:
    times = [row.timing.device_time_s for row in rows]
    return StageCost(
        stage, device, host, len(rows), sum(times), max(times),
        float(np.median([row.timing.images_per_s for row in rows])),
        float(np.mean([row.timing.data_wait_share for row in rows])), sum(row.timing.num_attempts for row in rows),
    )  # fmt: skip


def cost_of_table(table: RunTable) -> Cost:
    """Of the runs of a table and the upstream runs they name, where their times are known; nothing was predicted."""
    finetunes = [run for run in table if run.device_time_s is not None]
    upstream = {run.upstream_key: run for run in table if run.upstream_key and run.upstream_device_time_s is not None}
    groups: dict[tuple[str, str, str], list[tuple[float, float | None, int | None]]] = {}
    for run in upstream.values():
        time = run.upstream_device_time_s or 0.0
        speed = run.upstream_samples_seen / time if run.upstream_samples_seen and time else None
        groups.setdefault((run.upstream_stage or "upstream", run.device, run.host), []).append((time, speed, None))
    for run in finetunes:
        speed = run.samples_seen / run.train_time_s if run.samples_seen and run.train_time_s else None
        place = ("finetune", run.device, run.host)
        groups.setdefault(place, []).append((run.device_time_s or 0.0, speed, run.num_attempts))
    stages = tuple(_table_stage(*place, cells) for place, cells in sorted(groups.items(), key=_by_stage))
    count = len(upstream) + len(finetunes)
    return Cost(stages, sum(stage.device_time_s for stage in stages), 0.0, count, count)


def _by_stage(item: tuple[tuple[str, str, str], object]) -> tuple[bool, bool, tuple[str, str, str]]:
    """Pretraining, then distilling, then finetuning."""
    stage = item[0][0]
    return stage == "finetune", stage == "distill", item[0]


def _table_stage(
    stage: str, device: str, host: str, cells: Sequence[tuple[float, float | None, int | None]]
) -> StageCost:
    times, speeds, attempts = ([value for value in column if value is not None] for column in zip(*cells, strict=True))
    return StageCost(
        stage, device, host, len(cells), sum(times), max(times),
        float(np.median(speeds)) if speeds else None, None, sum(attempts) if attempts else None,
    )  # fmt: skip


def lost_cells(table: RunTable, store: Store, plan: PlanRecord) -> list[LostCell]:
    """Cells without a row, failed ones first, then by how many points they stand in the way of."""
    found: dict[str, list[MissingPoint]] = {}
    for point in table.missing:
        found.setdefault(point.culprit, []).append(point)
        if point.key != point.culprit and store.state(point.key) in ("failed", "blocked"):
            found.setdefault(point.key, []).append(point)
    lost = []
    for key in (key for key in plan.cells if key in found):
        points, attempt = found[key], store.last_attempt(key)
        same = points[0].culprit == key
        reason = points[0].reason if same else (attempt.reason if attempt and attempt.reason else "blocked")
        log = points[0].log if same else (attempt.log if attempt and attempt.log else "")
        lost.append(LostCell(key, store.state(key), reason, log, len({(p.variant, p.key) for p in points})))
    return sorted(lost, key=lambda cell: (cell.state != "failed", -cell.points_lost))


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "–"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
