"""Numbers as people and tools write them: `1,281,167`, `64K`, `2e6`, `25.3 %`, `0,654`, and what stands for none.

One cell may be read two ways (`1,014`); which decimal mark a table uses is told by `sheet`, which sees more of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from dbscale.errors import TableError

MISSING = frozenset(("", "na", "n/a", "#n/a", "<na>", "nan", "nat", "null", "none", ".", "-", "--", "–", "—"))
"""Texts (in lower case) that R, pandas, Spark, Excel and people write where nothing was measured."""
UNITS = {"": 0, "%": -2, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}
"""Power of ten that a number's last letter stands for."""
NEUTRAL = "_'’ \u00a0\u2009\u202f"
"""Marks that group digits in threes and are never a decimal mark."""
NUMBER = re.compile(
    rf"([-+\u2212]?)\s*([0-9][0-9.,{NEUTRAL}]*|[.,][0-9]+)(?:[eE]([-+]?[0-9]{{1,6}}))?\s*([kKmMbBgGtT%]?)"
)
BODY = {
    mark: re.compile(
        rf"(?:[0-9]+|[1-9][0-9]{{0,2}}([{group}{NEUTRAL}])[0-9]{{3}}(?:\1[0-9]{{3}})*)(?:{re.escape(mark)}[0-9]*)?"
        rf"|{re.escape(mark)}[0-9]+"
    )
    for mark, group in ((".", ","), (",", "."))
}
"""The digits of a number under each decimal mark; the other mark may group them, from 1,000 on."""


class Numeral(NamedTuple):
    """A number as it is written: what its digits mean depends on which mark is the decimal one."""

    sign: str
    readings: Mapping[str, str]
    """Decimal mark -> digits with a decimal point."""
    power: int
    unit: str

    @property
    def mark(self) -> str | None:
        """The decimal mark, if this number alone decides it."""
        return next(iter(self.readings)) if len(self.readings) == 1 else None

    @property
    def is_ambiguous(self) -> bool:
        """Whether it is `1,014` or `1.014`."""
        return len(set(self.readings.values())) > 1

    def value(self, mark: str) -> int | float:
        """Exact for whole numbers; through text, so that 25.3 % is the float 0.253."""
        digits = self.readings[mark]
        if self.power == 0 and digits.isdecimal() and len(digits) <= 40:
            return int(self.sign + digits)
        return float(f"{self.sign}{digits}e{self.power}")


def parse_numeral(text: str) -> Numeral | None:
    """`1,281,167`, `64K`, `2e6`, `25.3 %`, `0,654` taken apart; None for what is no number."""
    found = NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    sign, body, exponent, unit = found.groups()
    readings = {}
    for mark, pattern in BODY.items():
        if pattern.fullmatch(body.strip()):
            readings[mark] = "".join(c for c in body.replace(mark, "\0") if c.isdigit() or c == "\0").replace("\0", ".")
    if not readings:
        return None
    unit = unit.lower()
    return Numeral(sign.replace("\u2212", "-"), readings, int(exponent or 0) + UNITS[unit], unit)


def parse_count(text: str) -> float:
    """`200k`, `22M`, `1,281,167` or `2e5` as a number above 0, as in tables. Raises TableError."""
    numeral = parse_numeral(text)
    value = None if numeral is None or numeral.unit == "%" else numeral.value(numeral.mark or ".")
    if value is None:
        raise TableError(f"{text!r} is not a count; write 2000, 200k, 22M or 1.3G")
    if not (math.isfinite(value) and value > 0):
        raise TableError(f"{text!r} must be above 0")
    return value


def is_missing(cell: Any) -> bool:
    if isinstance(cell, str):
        return cell.strip().lower() in MISSING
    return cell is None or (isinstance(cell, float | Decimal) and math.isnan(cell))
