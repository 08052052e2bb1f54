"""One look for the page and the paper: colours that stay apart without colour vision, a marker and a dash per arm."""

from __future__ import annotations

from dataclasses import dataclass

INK, MUTED, RULE, PAPER = "#1d2430", "#667084", "#e3e6ec", "#ffffff"


@dataclass(frozen=True)
class Look:
    """How an arm is drawn; `marker` and `dash` are Plotly's names, the others matplotlib's."""

    name: str
    color: str
    marker: str
    dash: str
    mpl_marker: str
    mpl_dash: str
    rank: int = 1000
    """Place in a legend."""

    def faded(self, alpha: float) -> str:
        red, green, blue = (int(self.color[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},{alpha})"


# Blue and orange differ in lightness too: they survive deuteranopia, protanopia and a grey print.
LOOKS = {
    "plain": Look("plain", "#1f4e8c", "circle", "solid", "o", "-", 1),
    "distilled": Look("distilled", "#d9730d", "diamond-open", "dash", "D", "--", 2),
    "scratch": Look("no upstream data", "#7b8494", "x-thin-open", "dot", "x", ":", 3),
    "delta": Look("law", "#3c4557", "square", "solid", "s", "-"),
    "law_free": Look("paired runs", "#3c4557", "square-open", "dot", "s", ":"),
}
