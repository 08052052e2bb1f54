"""Student's t quantile. scipy is loaded on first use only."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=256)
def student_quantile(level: float, degrees: int) -> float:
    """Half-width of the central interval of Student's t in standard errors; one degree of freedom is the least."""
    from scipy.special import stdtrit

    return float(stdtrit(max(degrees, 1), 0.5 + level / 2))
