"""Distill or not, for one planned study: the chosen law of every downstream set asked at one point.

Fits as `fits` does; the comparison and its sentence are `dbscale.laws.advice`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dbscale.errors import TableError, nearest
from dbscale.laws import Advice as LawAdvice
from dbscale.laws import Bootstrap
from dbscale.laws import advise as advise_from_laws
from dbscale.report.fits import Options, fit_laws
from dbscale.report.table import RunTable, Setting


@dataclass(frozen=True)
class Advice:
    """What the laws of one downstream set say about one point."""

    label: str
    """The downstream set, and whatever else tells the settings of the table apart."""
    law: str
    student: str | None
    """The measured student whose law was asked, for laws without a size term."""
    from_laws: LawAdvice

    @property
    def sentence(self) -> str:
        asked = f" (law of {self.student}, the nearest in size)" if self.student else ""
        return f"{self.label}{asked}: {self.from_laws.sentence}"

    def text(self) -> str:
        """The sentence and a small table, for a terminal."""
        basis = f"{self.law} law; intervals hold {self.from_laws.level:.0%} of refits."
        return f"{self.sentence}\n\n{self.from_laws.table()}\n{basis}"


def advise(
    table: RunTable, upstream_samples: float, downstream_samples: float, num_params: float, *,
    dataset: str | None = None, wrong: Mapping[str, np.ndarray] | None = None, options: Options | None = None,
) -> tuple[Advice, ...]:  # fmt: skip
    """One advice for every downstream set (or for `dataset`). Raises TableError without both arms or for bad values."""
    settings = [setting for setting in table.settings if dataset in (None, setting.dataset)]
    if not settings:
        known = table.pretrained.values("dataset")
        raise TableError(
            f"no runs on {dataset!r}; {nearest(str(dataset), known)}"
            if known
            else "the table has no runs with upstream data"
        )
    if "distilled" not in table.arms or "plain" not in table.arms:
        raise TableError(f"advice compares a plain and a distilled arm; the table has {', '.join(table.arms)} only")
    point = {
        "upstream_samples": upstream_samples,
        "downstream_samples": downstream_samples,
        "num_params": num_params,
    }
    for name, value in point.items():
        if not (np.isfinite(value) and value > 0):
            raise TableError(f"{name} is {value:g}; it must be above 0")
    return tuple(_advice(table, setting, point, dict(wrong or {}), options or Options()) for setting in settings)


def _advice(
    table: RunTable,
    setting: Setting,
    point: Mapping[str, float],
    wrong: dict[str, np.ndarray],
    options: Options,
) -> Advice:
    runs = table.pretrained.where(setting=setting)
    _, chosen = fit_laws(runs, setting, wrong, options)
    if chosen is None or len(chosen.usable) < 2:
        raise TableError(f"no law fits both arms on {setting.label(table)}: `dbscale report` says why")
    student = None
    if None not in chosen.arms["plain"].fits:
        student = min(runs.students, key=lambda name: abs(np.log(runs.params(name) / point["num_params"])))
    fits = {arm: fit.of(student or runs.students[0]) for arm, fit in chosen.arms.items()}
    return Advice(setting.label(table), chosen.law, student, _ask(fits, point, options.level))


def _ask(fits: Mapping[str, Bootstrap], point: Mapping[str, float], level: float) -> LawAdvice:
    upstream, labels, params = (point[name] for name in ("upstream_samples", "downstream_samples", "num_params"))
    return advise_from_laws(fits, upstream_samples=upstream, downstream_samples=labels, num_params=params, level=level)


UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}


def parse_count(text: str) -> float:
    """`200k`, `22M`, `1_281_167` or `2e5` as a number. Raises TableError."""
    plain = text.strip().replace("_", "").replace(",", "")
    scale = UNITS.get(plain[-1:].lower(), 1.0)
    try:
        value = float(plain[:-1] if scale > 1 else plain) * scale
    except ValueError:
        raise TableError(f"{text!r} is not a count; write 2000, 200k, 22M or 1.3G") from None
    if not (np.isfinite(value) and value > 0):
        raise TableError(f"{text!r} must be above 0")
    return value
