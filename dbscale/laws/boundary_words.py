"""The boundary's diagnostics in words: what a pattern of ΔE usually means and what to do about it."""

from __future__ import annotations

import numpy as np


def explain(
    status: str,
    direction: str,
    probability: float,
    root: float | None,
    measured: tuple[float, float],
    delta: np.ndarray,
) -> list[str]:
    """Sentences for the report. `delta` is the best curve of ΔE over the measured range."""
    low, high = measured
    words = []
    if status == "extrapolated" and root is not None:
        side = "above" if root > high else "below"
        words.append(
            f"The crossing at {root:,.0f} lies {side} the measured range {low:,.0f} to {high:,.0f}: "
            "it is an extrapolation; measure there before relying on it."
        )
    if status == "no_crossing":
        words.append(
            f"No crossing is established between {low:,.0f} and {high:,.0f} upstream samples "
            f"({100 * probability:.0f} % of the drawn curves cross within reach): the range may be too short."
        )
        words += _without_crossing(direction, delta)
    if status == "crossing" and direction != "positive_to_negative":
        words.append("ΔE is nowhere clearly positive and then clearly negative: the root is held by the trend alone.")
    return words


def _without_crossing(direction: str, delta: np.ndarray) -> list[str]:
    if direction == "always_positive" and delta[-1] < 0.25 * delta.max():
        return ["ΔE shrinks to almost nothing: the arms may become equal rather than cross; measure larger D_p."]
    if direction == "always_positive":
        trend = "and does not shrink" if delta[-1] >= delta[0] else "though it shrinks towards the end"
        return [
            f"ΔE stays positive {trend}: is the plain arm undertrained, or the range too short?"
            if delta[-1] < delta[0]
            else f"ΔE stays positive {trend}: is the teacher undertrained at large D_p, or the plain arm too?"
        ]
    if direction == "always_negative":
        return ["ΔE is negative throughout: distilling never pays here; is the teacher too weak, or D_p too large?"]
    if direction == "negative_to_positive":
        return [
            "ΔE turns from negative to positive, the reverse of a boundary: is the teacher undertrained at small D_p?"
        ]
    return [
        "ΔE lies within its noise everywhere: more seeds or more test images are needed before any sign can be read."
    ]
