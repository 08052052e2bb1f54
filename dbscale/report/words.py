"""Numbers and names as people say them."""

from __future__ import annotations

from collections.abc import Iterable

from dbscale.report.schema import Estimate

SYMBOLS = (
    ("E_inf", "E∞"), ("^-alpha", "^(−α)"), ("^-beta", "^(−β)"), ("^-gamma", "^(−γ)"), ("alpha", "α"), ("beta", "β"),
    ("gamma", "γ"), ("*", "·"), (" - ", " − "), ("E0", "E₀"),
    ("transfer_gap", "transfer gap"), ("m4_product", "m4 product"),
)  # fmt: skip


def about(value: float) -> str:
    """A count as one would say it: two significant digits, thousands apart."""
    return f"{float(f'{value:.2g}'):,.0f}"


def symbols(text: str) -> str:
    """A law's name, equation or parameter in mathematics' own letters."""
    for plain, letter in SYMBOLS:
        text = text.replace(plain, letter)
    return text


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def points_text(delta: float) -> str:
    """A difference of error rates in percentage points."""
    return f"{100 * delta:+.1f} points".replace("-", "−")


def interval_text(estimate: Estimate) -> str:
    low = about(estimate.low) if estimate.low is not None else "below the searched range"
    high = about(estimate.high) if estimate.high is not None else "beyond the searched range"
    return f"{low} to {high}"


def listed(items: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last
