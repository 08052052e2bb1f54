"""What a planned design can tell apart, before it is spent on: the lines that `dbscale plan` prints.

By the noise of rows at hand, of a pilot perhaps, or of a default table. The statistics are `dbscale.laws.power`'s.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from dbscale.errors import LawError
from dbscale.laws import NOISE_TABLES, NoiseModel, fit_noise, power
from dbscale.report.pairing import pair_arms
from dbscale.report.table import RunTable
from dbscale.report.words import power_lines, say

ASSUMED_SLOPE = 0.02
"""ΔE per octave at a boundary that plans suppose: as steep as those of the paper's curves and of this project's studies."""
USUAL_NOISE = "cifar10_fashion"


@dataclass(frozen=True)
class Design:
    """What a grid plans to measure of its main contrast."""

    num_x: int
    num_seeds: int
    num_students: int
    num_labels: int
    finetunes: int
    """Draws of each finetune."""
    step_octaves: float
    """Mean distance of neighbouring D_p."""
    cost_upstream: float
    cost_finetune: float
    """Device-seconds of one upstream run, and of one draw of its finetunes at all D_f."""


def plan_power(design: Design, table: RunTable | None, noise_table: str = "") -> list[str]:
    """Lines for `dbscale plan`: what the design can tell apart, by the noise of rows at hand or of a default table.

    `table` holds the rows that the grid has already, a pilot perhaps; `noise_table` names one of
    `dbscale.laws.NOISE_TABLES`, an unknown name stands for the usual one.
    """
    noise, source = (_noise_at_hand(table) if table is not None else None), "the rows at hand"
    if noise is None:
        name = noise_table if noise_table in NOISE_TABLES else USUAL_NOISE
        noise, source = NOISE_TABLES[name], f"the default table {name}"
    try:
        found = power(noise, slope=ASSUMED_SLOPE, **asdict(design))
    except LawError as error:
        return [say("plan_nothing", reason=str(error))]
    return power_lines(found, source, ASSUMED_SLOPE)


def _noise_at_hand(table: RunTable) -> NoiseModel | None:
    """Noise of the main contrast in rows that are there; None without two seeds of a pair."""
    pairs = pair_arms(table, table.settings[0])[0] if table.settings else None
    return fit_noise(pairs) if pairs is not None else None
