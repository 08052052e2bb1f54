"""Where distillation stops paying: per student and D_f and pooled, from the fitted laws and free of any law.

Reads roots with `dbscale.laws.boundary`; what to say about them is in `words`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbscale.errors import LawError, NotEnoughData
from dbscale.laws import find_boundary
from dbscale.laws.boundary import Boundary, read_boundary
from dbscale.laws.delta_curve import DeltaCurves, PairedDelta
from dbscale.report.arm_fits import FEWEST_SIZES, ArmFit
from dbscale.report.curves import MARGIN, rounded
from dbscale.report.deltas import Pair, complete_groups, sampling_variance
from dbscale.report.schema import BoundaryRecord, Curve, Estimate
from dbscale.report.table import RunTable, Setting

REACH = 4.0
"""How many times beyond the measured range a root is looked for."""
EVERY = 4
"""Of the searched grid, the share of points kept for plots is one in this many."""


@dataclass(frozen=True)
class Cell:
    """One student and D_f, or None for pooled; all seeds, or one."""

    setting: Setting
    student: str | None = None
    num_params: int | None = None
    downstream_samples: int | None = None
    seed: int | None = None

    def holds(self, pair: Pair) -> bool:
        run = pair.plain
        return (
            self.student in (None, run.student)
            and self.downstream_samples in (None, run.downstream_samples)
            and self.seed in (None, run.seed)
        )


def cells_of(runs: RunTable, setting: Setting) -> list[Cell]:
    """Every student and D_f that both arms measured, pooled last."""
    singles = [
        Cell(setting, student, runs.params(student), labels)
        for student in runs.both_arms.students
        for labels in runs.both_arms.values("downstream_samples")
    ]
    return [*singles, Cell(setting)]


def law_boundaries(
    runs: RunTable, arms: Mapping[str, ArmFit], *, level: float
) -> Iterator[tuple[BoundaryRecord, Curve]]:
    """From the chosen law's fits, every cell and pooled. `runs` are those of one setting, both arms."""
    setting, law = arms["plain"].setting, arms["plain"].law
    measured = _measured(runs)
    curves: list[DeltaCurves] = []
    for cell in cells_of(runs, setting):
        if cell.student is None:
            pooled = DeltaCurves(
                curves[0].grid, *(np.mean([getattr(c, n) for c in curves], axis=0) for n in ("best", "drawn"))
            )
            found = read_boundary(pooled, level=level, method="laws", at={}, measured=measured)
        else:
            own = _delta_curves(arms, cell, measured)
            curves.append(own)
            found = read_boundary(own, level=level, method="laws", at={}, measured=measured)
        yield record(cell, found, "law", law), delta_curve(cell, found, law)


def _delta_curves(arms: Mapping[str, ArmFit], cell: Cell, measured: tuple[float, float]) -> DeltaCurves:
    """ΔE of one cell from paired draws of both arms."""
    grid = np.geomspace(measured[0] / REACH, measured[1] * REACH, 161)
    columns = {
        "upstream_samples": grid,
        "num_params": np.full(len(grid), float(cell.num_params or 1)),
        "downstream_samples": np.full(len(grid), float(cell.downstream_samples or 1)),
    }
    plain, plain_draws = arms["plain"].predict(str(cell.student), columns)
    distilled, distilled_draws = arms["distilled"].predict(str(cell.student), columns)
    return DeltaCurves(grid, plain - distilled, plain_draws - distilled_draws)


def free_boundaries(
    runs: RunTable,
    setting: Setting,
    pairs: Sequence[Pair],
    wrong: dict[str, np.ndarray],
    *,
    level: float,
    seed: int,
) -> Iterator[tuple[BoundaryRecord, Curve | None]]:
    """From the paired measurements alone: every cell, pooled, and pooled for each seed. Pooled curves are kept."""
    seeds = sorted({pair.plain.seed for pair in pairs})
    by_seed = [Cell(setting, seed=each) for each in seeds] if len(seeds) > 1 else []
    for cell in (*cells_of(runs, setting), *by_seed):
        try:
            found = find_boundary(paired_delta(pairs, wrong, cell), level=level, reach=REACH, seed=seed)
        except LawError as error:
            yield _without(cell, runs, str(error)), None
        except np.linalg.LinAlgError:
            # Replicates that agree to the last digit leave no noise to weigh the points by.
            yield _without(cell, runs, "the paired runs do not determine a curve."), None
        else:
            pooled = cell == Cell(setting)
            yield record(cell, found, "law_free", None), delta_curve(cell, found, None) if pooled else None


def _without(cell: Cell, runs: RunTable, reason: str) -> BoundaryRecord:
    return BoundaryRecord(
        **_names(cell), method="law_free", status="not_enough_data", measured_range=_measured(runs), words=(reason,)
    )


def paired_delta(pairs: Sequence[Pair], wrong: dict[str, np.ndarray], cell: Cell) -> PairedDelta:
    """ΔE by D_p and seed; pooled means average over students and D_f. Raises NotEnoughData below three D_p."""
    groups = complete_groups([pair for pair in pairs if cell.holds(pair)])
    sizes, seeds = [size for size, _ in groups], [seed for _, seed in groups]
    if len(set(sizes)) < FEWEST_SIZES:
        raise NotEnoughData(f"complete pairs at {len(set(sizes))} values of D_p, a boundary needs {FEWEST_SIZES}.")
    deltas = [np.mean([pair.delta for pair in group]) for group in groups.values()]
    if not np.any(deltas):
        raise NotEnoughData("ΔE is exactly 0 in every pair: the arms gave equal results.")
    # Without single results the noise of the test set shows in the scatter between seeds, which is inferred.
    noise = [np.sqrt(np.mean([sampling_variance(pair, wrong) for pair in group])) for group in groups.values()]
    return PairedDelta(
        np.array(sizes, dtype=float), np.array(deltas), np.array(noise) if wrong else None, np.array(seeds)
    )


def record(cell: Cell, found: Boundary, method: str, law: str | None) -> BoundaryRecord:
    root = None
    if found.root is not None:
        low, high = found.interval or (None, None)
        root = Estimate(value=found.root, low=low, high=high)
    return BoundaryRecord.model_validate(
        {
            **_names(cell), "method": method, "law": law, "status": found.status, "direction": found.direction,
            "upstream_samples": root, "probability": found.crossing_probability,
            "probability_inside": found.inside_probability, "measured_range": found.measured_range,
            "words": found.diagnostics,
        }
    )  # fmt: skip


def _names(cell: Cell) -> dict[str, Any]:
    return {
        **cell.setting._asdict(), "student": cell.student, "num_params": cell.num_params,
        "downstream_samples": cell.downstream_samples, "seed": cell.seed,
    }  # fmt: skip


def _measured(runs: RunTable) -> tuple[float, float]:
    """The D_p range that both arms cover."""
    both = [runs.where(arm=arm).values("upstream_samples") for arm in ("plain", "distilled")]
    return float(max(sizes[0] for sizes in both)), float(min(sizes[-1] for sizes in both))


def delta_curve(cell: Cell, found: Boundary, law: str | None) -> Curve:
    """The drawn part of ΔE: the measured range and a little beyond."""
    x = np.array(found.curve["upstream_samples"])
    low, high = found.measured_range
    shown = (x >= low / (MARGIN * 1.01)) & (x <= high * MARGIN * 1.01)
    parts = {name: rounded(np.array(found.curve[key])[shown][::EVERY]) for name, key in DELTA_PARTS.items()}
    return Curve(
        **cell.setting._asdict(), arm="delta", law=law, axis="upstream_samples", student=cell.student,
        upstream_samples=None, downstream_samples=cell.downstream_samples, **parts,
    )  # fmt: skip


DELTA_PARTS = {"x": "upstream_samples", "y": "delta", "low": "lower", "high": "upper"}
