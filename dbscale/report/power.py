"""What a planned design can tell apart, before it is spent on: the lines that `dbscale plan` prints.

By the noise of rows at hand, of a pilot perhaps, or of a default table. The statistics are `dbscale.laws.power`'s.
"""

from __future__ import annotations

from typing import Any

from dbscale.errors import LawError
from dbscale.laws import NOISE_TABLES, fit_noise, power
from dbscale.report.pairing import pair_arms
from dbscale.report.table import RunTable
from dbscale.report.words import power_lines, say

ASSUMED_SLOPE = 0.02
"""ΔE per octave at a boundary that plans suppose: as steep as those of the paper's curves and of this project's studies."""
USUAL_NOISE = "cifar10_fashion"


def plan_power(table: RunTable | None, noise_table: str = "", **design: Any) -> list[str]:
    """Lines for `dbscale plan`: what a design can tell apart, by the noise of rows at hand or of a default table.

    `design` are the sizes and costs that `dbscale.laws.power` takes. `table` holds the rows that the grid has already, a
    pilot perhaps, of two seeds or more; `noise_table` names one of NOISE_TABLES, an unknown name stands for the usual one.
    """
    pairs = pair_arms(table, table.settings[0])[0] if table is not None and table.settings else None
    noise, source = (fit_noise(pairs) if pairs is not None else None), "the rows at hand"
    if noise is None:
        name = noise_table if noise_table in NOISE_TABLES else USUAL_NOISE
        noise, source = NOISE_TABLES[name], f"the default table {name}"
    try:
        return power_lines(power(noise, slope=ASSUMED_SLOPE, **design), source, ASSUMED_SLOPE)
    except LawError as error:
        return [say("plan_nothing", reason=str(error))]
