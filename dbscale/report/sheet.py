"""Anyone's table as it stands in its file: columns of cells, the line that each row begins on, and what cells mean.

A column is read as numbers, words or labels by whoever knows what it is; every refusal names file, line, column, value
and remedy. Numbers are those of people and tools: `1,281,167`, `64K`, `2e6`, `25.3 %`, `0,654`. Files become sheets in
`reader`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Any, NamedTuple

from dbscale.errors import TableError, nearest

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
    readings = {
        mark: "".join("." if c == mark else c for c in body if c.isdigit() or c == mark)
        for mark, pattern in BODY.items() if pattern.fullmatch(body.strip())
    }  # fmt: skip
    unit = unit.lower()
    return Numeral(sign.replace("\u2212", "-"), readings, int(exponent or 0) + UNITS[unit], unit) if readings else None


def parse_count(text: str) -> float:
    """`200k`, `22M`, `1,281,167` or `2e5` as a number above 0, as in tables. Raises TableError."""
    numeral = parse_numeral(text)
    if numeral is None or numeral.unit == "%":
        raise TableError(f"{text!r} is not a count; write 2000, 200k, 22M or 1.3G")
    value = numeral.value(numeral.mark or ".")
    if not (math.isfinite(value) and value > 0):
        raise TableError(f"{text!r} must be above 0")
    return value


def is_missing(cell: Any) -> bool:
    if isinstance(cell, str):
        return cell.strip().lower() in MISSING
    return cell is None or (isinstance(cell, float | Decimal) and math.isnan(cell))


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def closest(name: str, names: Iterable[str]) -> str:
    """`nearest` among the twenty names that are most alike, long ones cut."""
    cut = [each if len(each) <= 40 else f"{each[:39]}…" for each in names]
    return nearest(name, cut if len(cut) <= 20 else difflib.get_close_matches(name, cut, n=20, cutoff=0.0))


def near_spellings(words: Iterable[object]) -> list[str]:
    """A sentence for every group of words that differ in capitals, blanks, dashes or underscores alone."""
    groups: dict[str, list[str]] = {}
    for word in sorted({word for word in words if isinstance(word, str)}):
        groups.setdefault(" ".join(re.split(r"[\s_-]+", word.casefold())).strip(), []).append(word)
    return [
        f"{' and '.join(map(repr, group))} differ in spelling only; if they are one, write them alike"
        for group in groups.values() if len(group) > 1
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sheet:
    """Columns of cells, equally long: text as written, or the values of a typed file."""

    name: str
    """The file, as messages name it."""
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int]
    """The line each row begins on; in files without lines the row's number."""
    unit: str = "line"
    delimiter: str = ","
    notes: tuple[str, ...] = ()
    """What was left out of the sheet, and what was taken for something else."""

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """Where row `row` (from 0) stands: `t.csv, line 7`."""
        return f"{self.name}, {self.unit} {self.lines[row]}"

    def cells(self, column: str) -> Sequence[Any]:
        """A column as it stands. Raises TableError naming the nearest."""
        if column not in self.columns:
            raise TableError(f"{self.name}: no column {shown(column)}; {closest(column, self.columns)}")
        return self.columns[column]

    def wrong(self, column: str, row: int, what: str) -> TableError:
        """What is wrong with a cell, and what to do."""
        return TableError(f"{self.place(row)}: {column} is {shown(self.columns[column][row])}, {what}")

    def numbers(self, column: str) -> list[int | float | None]:
        """A column as finite numbers, None where missing.

        Raises TableError for what is no number, for per cent beside shares, and where `1,014` could mean two things.
        """
        present = {row: cell for row, cell in enumerate(self.cells(column)) if not is_missing(cell)}
        numerals: dict[int, Numeral] = {}
        values: list[int | float | None] = [None] * len(self)
        for row, cell in present.items():
            numeral = parse_numeral(cell) if isinstance(cell, str) else None
            if numeral is not None:
                numerals[row] = numeral
            elif isinstance(cell, int | float | Decimal) and not isinstance(cell, bool):
                values[row] = float(cell) if isinstance(cell, Decimal) else cell
            else:
                raise self.wrong(column, row, "not a number; write 0.253, 25.3 %, 64000 or 64K, or remove the row")
        percent = {row: row in numerals and numerals[row].unit == "%" for row in present}
        self._check_alike(column, percent, "write the whole column in one unit")
        mark = self._decimal_mark(column, numerals)
        for row in present:
            value = numerals[row].value(mark) if row in numerals else values[row]
            if value is None or not math.isfinite(value):
                raise self.wrong(column, row, "not a finite number; leave the row out or give the measured value")
            values[row] = value
        return values

    def measured(self, column: str) -> list[int | float]:
        """A column as finite numbers, of which none may be missing."""
        values = self.numbers(column)
        if None in values:
            raise TableError(f"{self.place(values.index(None))}: {column} is empty; fill it in or remove the row")
        return [value for value in values if value is not None]

    def texts(self, column: str) -> list[str]:
        """A column as words without blanks around them, empty where missing.

        Raises TableError where nothing but such blanks keeps two words apart: which of them was meant, only people know.
        """
        words = ["" if is_missing(cell) else str(cell) for cell in self.cells(column)]
        rows: dict[str, dict[int, str]] = {}
        for row, word in enumerate(words):
            rows.setdefault(word.strip(), {})[row] = word
        for alike in rows.values():
            self._check_alike(column, alike, "nothing but blanks keeps them apart, write both alike")
        return [word.strip() for word in words]

    def labels(self, column: str) -> list[int | float | str | None]:
        """A column as numbers where all its cells are, else as words; None where missing."""
        try:
            return list(self.numbers(column))
        except TableError:
            return [word or None for word in self.texts(column)]

    def where(self, conditions: Sequence[str], *, option: str = "--where") -> Sheet:
        """The rows that meet every `COLUMN=VALUE`. Raises TableError for unknown columns and where no row is left."""
        sheet = self
        for condition in conditions:
            sheet = sheet.take(sheet.matches(*sheet.assignment(condition, option)))
        return sheet

    def assignment(self, text: str, option: str) -> tuple[str, str]:
        """Column and value of `COLUMN=VALUE`, split where the left side is a column: names may hold `=` too."""
        splits = [(text[:i].strip(), text[i + 1 :].strip()) for i, letter in enumerate(text) if letter == "="]
        known = [(column, value) for column, value in splits if column in self.columns]
        if not known:
            name = splits[0][0] if splits else text
            raise TableError(f"{option} {text!r}: write COLUMN=VALUE; {closest(name, self.columns)}")
        return known[-1]

    def matches(self, column: str, value: str) -> list[int]:
        """Rows whose cell is `value`, as a word or as a number. Raises TableError where there is none."""
        words, numeral = self.texts(column), parse_numeral(value)
        number = numeral.value(numeral.mark or ".") if numeral else value
        rows = [
            row for row, each in enumerate(zip(words, self.labels(column), strict=True)) if {value, number} & {*each}
        ]
        if not rows:
            raise TableError(f"{self.name}: no row has {column}={value}; {closest(value, dict.fromkeys(words))}")
        return rows

    def take(self, rows: Sequence[int]) -> Sheet:
        """A sheet of these rows alone."""
        columns = {name: [cells[row] for row in rows] for name, cells in self.columns.items()}
        return replace(self, columns=columns, lines=[self.lines[row] for row in rows])

    def _check_alike(self, column: str, kinds: Mapping[int, Hashable], remedy: str) -> None:
        """Refuse rows of different kinds in one column."""
        for row, kind in kinds.items():
            first = next(iter(kinds))
            if kind != kinds[first]:
                other = f"on {self.unit} {self.lines[first]} {shown(self.columns[column][first])}"
                raise self.wrong(column, row, f"{other}; {remedy}")

    def _decimal_mark(self, column: str, numerals: Mapping[int, Numeral]) -> str:
        """`.` or `,`: what the column itself shows, else the rest of the sheet, else the habit of its delimiter."""
        sure = {row: numeral.mark for row, numeral in numerals.items() if numeral.mark is not None}
        self._check_alike(column, sure, "write all numbers with one decimal mark")
        doubtful = {row: self.columns[column][row].strip() for row, each in numerals.items() if each.is_ambiguous}
        if sure or not doubtful:
            return next(iter(sure.values()), ".")
        written = {"," if "," in text else "." for text in doubtful.values()}
        marks = self._evidence & {".", ","}
        if len(written) == 1 and len(marks) == 1:
            return next(iter(marks))
        # A comma between cells is the habit of lands with a decimal point; `;` of those with a decimal comma.
        if len(written) == 1 and (self.delimiter == "," or (written == {"."} and self.delimiter != ";")):
            return "."
        if len(written) == 1 and "plain thousands" in self._evidence:
            return next(iter(written))
        row, text = next(iter(doubtful.items()))
        either = f"{re.sub('[.,]', '', text)} or {text.replace(',', '.')}"
        raise TableError(
            f"{self.place(row)}: {column} is {text!r}, which may be {either}; write thousands without a mark"
        )

    @cached_property
    def _evidence(self) -> set[str]:
        """Decimal marks that some number of the sheet decides, and whether one writes thousands without a mark."""
        texts = (cell for cells in self.columns.values() for cell in cells if isinstance(cell, str))
        numerals = list(filter(None, (parse_numeral(text) for text in texts if not is_missing(text))))
        plain = any(not (n.mark or n.is_ambiguous) and len(n.readings["."]) > 3 for n in numerals)
        return {numeral.mark for numeral in numerals if numeral.mark} | ({"plain thousands"} if plain else set())
