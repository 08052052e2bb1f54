"""Verdicts and contrasts built by hand, by the rules of the contract: signs of simultaneous intervals against δ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dbscale.laws import Component, DeltaPoint, NoiseModel, Power, Verdict
from dbscale.report.schema import ContrastRecord

Point = tuple[float, float, float]
"""x, Δ, and half the width of its simultaneous interval."""


def delta_point(x: float, delta: float, half: float, seeds: int = 8) -> DeltaPoint:
    """Its interval alone is half as wide; two seeds lie .01 to either side."""
    return DeltaPoint(
        x=x, delta=delta, stderr=half / 4, degrees=20.0, num_seeds=seeds, by_seed=(delta - 0.01, delta + 0.01),
        low=delta - half / 2, high=delta + half / 2, low_all=delta - half, high_all=delta + half,
    )  # fmt: skip


def make_verdict(points: Sequence[Point], *, min_effect: float = 0.005, seeds: int = 8, **fields: Any) -> Verdict:
    """`fields` override what the rules give: root, interval, more_seeds, notes, law_root …"""
    found = [delta_point(*point, seeds) for point in points]
    positive, negative = [p.x for p in found if p.low_all > 0], [p.x for p in found if p.high_all < 0]
    better = "b" if positive else "a" if negative else None
    no_harm, no_gain = all(p.low_all > -min_effect for p in found), all(p.high_all < min_effect for p in found)
    gain, harm = any(p.low_all > min_effect for p in found), any(p.high_all < -min_effect for p in found)
    named: dict[str, Any] = {"kind": "undecided", "better": better, "more_seeds": 24}
    if positive and negative:
        turn = "b_to_a" if positive[0] < negative[-1] else "a_to_b"
        middle = (found[0].x * found[-1].x) ** 0.5
        named = {"kind": "crossing", "better": None, "direction": turn, "root": middle,
                 "interval": (middle / 1.5, middle * 1.5), "bracket": (found[0].x, found[-1].x)}  # fmt: skip
    elif (no_harm and gain) or (no_gain and harm):
        named = {"kind": "one_sign", "better": better}
    elif no_harm or no_gain:
        named = {"kind": "excluded", "better": better}
    curve = {"x": [p.x for p in found], "delta": [p.delta for p in found], "low": [p.low_all for p in found],
             "high": [p.high_all for p in found]}  # fmt: skip
    given: dict[str, Any] = {
        "direction": None, "root": None, "interval": None, "bracket": None, "more_seeds": None, "level": 0.9,
        "family": 1, "smallest_effect": 0.021, "doubt": 0.3,
    }  # fmt: skip
    return Verdict(points=tuple(found), curve=curve, min_effect=min_effect, num_seeds=seeds, **(given | named | fields))


def make_contrast(verdict: Verdict | None, **fields: Any) -> ContrastRecord:
    """A plain and a distilled arm along D_p on digits, the study's main contrast."""
    given: dict[str, Any] = {
        "variant": "base", "upstream_dataset": "fractals", "dataset": "digits", "a": "plain", "b": "distilled",
        "along": "upstream_samples", "metric": "error_rate", "main": True,
    }  # fmt: skip
    return ContrastRecord(**(given | fields), verdict=verdict)


def make_noise() -> NoiseModel:
    components = tuple(
        Component(name, sd, sd / 2, 2 * sd, share, 10.0)
        for name, sd, share in (("seed", 0.04, 0.5), ("upstream", 0.04, 0.5))
    )
    return NoiseModel(components, ("teacher_in_upstream",), 0.0566, 12.0, ((1000.0, 0.03),), 0.5, None)


def make_power(**fields: Any) -> Power:
    given: dict[str, Any] = {
        "smallest_effect": 0.021, "width_octaves": None, "chance_of_crossing": None, "seeds_for_half": 30,
        "finetunes_for_half": None, "cost_of_seeds": None, "cost_of_finetunes": None, "best_finetunes": None,
    }  # fmt: skip
    return Power(**(given | fields))


HELPS_THEN_HURTS: tuple[Point, ...] = ((1000.0, 0.05, 0.02), (4000.0, 0.0, 0.02), (16000.0, -0.04, 0.02))
