"""Anyone's table as it stands in its file: columns of cells, and the line that each row begins on.

A column is read as numbers, words or labels by whoever knows what it means; every refusal names file, line, column,
value and remedy. Files become sheets in `reader`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Any

from dbscale.errors import TableError, nearest
from dbscale.report.numerals import Numeral, is_missing, parse_numeral


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

    def numbers(self, column: str) -> list[int | float | None]:
        """A column as finite numbers, None where missing.

        Raises TableError for what is no number, for per cent beside shares, and where `1,014` could mean two things.
        """
        cells = [None if is_missing(cell) else cell for cell in self.cells(column)]
        numerals = {row: self._numeral(column, row) for row, cell in enumerate(cells) if isinstance(cell, str)}
        self._check_unit(column, cells, numerals)
        mark = self._decimal_mark(column, numerals)
        values: list[int | float | None] = [
            numerals[row].value(mark) if row in numerals else self._typed(column, row, cell)
            for row, cell in enumerate(cells)
        ]
        for row, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                raise TableError(f"{self.place(row)}: {column} is {shown(self.cells(column)[row])}, not a finite number; "
                                 "leave the row out or give the measured value")  # fmt: skip
        return values

    def measured(self, column: str) -> list[int | float]:
        """The same for a column in which nothing may be missing."""
        values = self.numbers(column)
        if None in values:
            raise TableError(f"{self.place(values.index(None))}: {column} is empty; fill it in or remove the row")
        return [value for value in values if value is not None]

    def texts(self, column: str) -> list[str]:
        """A column as words without blanks around them, empty where missing.

        Raises TableError where nothing but such blanks keeps two words apart: which of them was meant, only people know.
        """
        words = ["" if is_missing(cell) else str(cell) for cell in self.cells(column)]
        first: dict[str, int] = {}
        for row, word in enumerate(words):
            before = first.setdefault(word.strip(), row)
            if words[before] != word:
                raise TableError(
                    f"{self.place(row)}: {column} is {shown(word)}, on {self.unit} {self.lines[before]} "
                    f"{shown(words[before])}; nothing but blanks keeps them apart, write both alike"
                )
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
            column, value = self.assignment(condition, option)
            sheet = sheet.take(sheet.matches(column, value))
        return sheet

    def assignment(self, text: str, option: str) -> tuple[str, str]:
        """Column and value of `COLUMN=VALUE`, split where the left side is a column: names may hold `=` too."""
        splits = [(text[:i], text[i + 1 :]) for i, letter in enumerate(text) if letter == "="]
        known = [(column.strip(), value.strip()) for column, value in splits if column.strip() in self.columns]
        if not known:
            name = splits[0][0] if splits else text
            raise TableError(f"{option} {text!r}: write COLUMN=VALUE; {closest(name, self.columns)}")
        return known[-1]

    def matches(self, column: str, value: str) -> list[int]:
        """Rows whose cell is `value`, as a word or as a number. Raises TableError where there is none."""
        words, numeral = self.texts(column), parse_numeral(value)
        rows = {row for row, word in enumerate(words) if word == value}
        if numeral is not None:
            number = numeral.value(numeral.mark or ".")
            rows |= {row for row, label in enumerate(self.labels(column)) if label == number}
        if not rows:
            raise TableError(f"{self.name}: no row has {column}={value}; {closest(value, dict.fromkeys(words))}")
        return sorted(rows)

    def take(self, rows: Sequence[int]) -> Sheet:
        """These rows only."""
        columns = {name: [cells[row] for row in rows] for name, cells in self.columns.items()}
        return replace(self, columns=columns, lines=[self.lines[row] for row in rows])

    def _numeral(self, column: str, row: int) -> Numeral:
        numeral = parse_numeral(self.columns[column][row])
        if numeral is None:
            raise self._no_number(column, row)
        return numeral

    def _typed(self, column: str, row: int, cell: Any) -> int | float | None:
        """A cell of a typed file; a truth value or a date is no number."""
        if cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool)):
            return cell
        if isinstance(cell, Decimal):
            return float(cell)
        raise self._no_number(column, row)

    def _no_number(self, column: str, row: int) -> TableError:
        found = shown(self.columns[column][row])
        return TableError(f"{self.place(row)}: {column} is {found}, not a number; write 0.253, 25.3 %, 64000 or 64K, "
                          "or remove the row")  # fmt: skip

    def _check_unit(self, column: str, cells: Sequence[Any], numerals: Mapping[int, Numeral]) -> None:
        """A column is in per cent throughout or nowhere."""
        kinds: dict[bool, int] = {}
        for row, cell in enumerate(cells):
            if cell is not None:
                kinds.setdefault(row in numerals and numerals[row].unit == "%", row)
        if len(kinds) == 2:
            percent, plain = kinds[True], kinds[False]
            raise TableError(f"{self.place(percent)}: {column} is {shown(cells[percent])}, on {self.unit} "
                             f"{self.lines[plain]} {shown(cells[plain])}; write the whole column in one unit")  # fmt: skip

    def _decimal_mark(self, column: str, numerals: Mapping[int, Numeral]) -> str:
        """`.` or `,`: what the column itself shows, else the rest of the sheet, else the habit of its delimiter."""
        marks: dict[str, int] = {}
        for row, numeral in numerals.items():
            if numeral.mark is not None:
                marks.setdefault(numeral.mark, row)
        if len(marks) == 2:
            point, comma = (shown(self.columns[column][marks[mark]]) for mark in ".,")
            raise TableError(f"{self.place(marks[','])}: {column} is {comma}, on {self.unit} {self.lines[marks['.']]} "
                             f"{point}; write all numbers with one decimal mark")  # fmt: skip
        doubtful = [row for row, numeral in numerals.items() if numeral.is_ambiguous]
        if marks or not doubtful:
            return next(iter(marks), ".")
        written = {"," if "," in self.columns[column][row] else "." for row in doubtful}
        if len(written) == 1:
            mark = self._mark_of_the_sheet(*written)
            if mark is not None:
                return mark
        text = self.columns[column][doubtful[0]].strip()
        raise TableError(f"{self.place(doubtful[0])}: {column} is {text!r}, which may be "
                         f"{text.replace(',', '').replace('.', '')} or {text.replace(',', '.')}; write thousands "
                         "without a mark")  # fmt: skip

    def _mark_of_the_sheet(self, written: str) -> str | None:
        """The decimal mark where a column holds nothing but the like of `1,014` (`written` is the comma) or `1.014`."""
        if len(self._evidence & {".", ","}) == 1:
            return next(iter(self._evidence & {".", ","}))
        # A comma between cells is the habit of lands with a decimal point; `;` of those with a decimal comma.
        if self.delimiter == "," or (written == "." and self.delimiter != ";"):
            return "."
        return written if "plain thousands" in self._evidence else None

    @cached_property
    def _evidence(self) -> set[str]:
        """Decimal marks that some number of the sheet decides, and whether one writes thousands without a mark."""
        numerals = (
            parse_numeral(cell) for cells in self.columns.values() for cell in cells
            if isinstance(cell, str) and not is_missing(cell)
        )  # fmt: skip
        found = set()
        for numeral in filter(None, numerals):
            if numeral.mark is not None:
                found.add(numeral.mark)
            elif not numeral.is_ambiguous and len(numeral.readings["."]) > 3:
                found.add("plain thousands")
        return found
