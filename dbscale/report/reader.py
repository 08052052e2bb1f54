"""One reader for every table: CSV by any usual delimiter, JSON lines, Parquet and Arrow, told by content, not by name.

The standard library's csv parses text, because pyarrow's reader does not tell the line of a row; pyarrow reads what is
binary. Nothing is dropped, shifted or cut without a word: what is no table is refused with its line.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dbscale.errors import TableError
from dbscale.report.sheet import Sheet, parse_numeral, shown

COMMENT = re.compile(r"\s*#(?!N/A|DIV/0!|REF!|NAME\?|NUM!|VALUE!|NULL!)")
"""Start of a comment line; Excel's error values begin alike."""
DELIMITERS = ("\t", ";", ",")
"""Blanks are one only where none of these is: they stand inside names and words too."""
BINARY = {
    b"PK\x03\x04": "an Excel workbook or a zip archive", b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"\x89HDF": "an HDF5 file", b"SQLite format 3": "a database", b"\x80\x04": "a pickle",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
}  # fmt: skip


def read_sheet(path: Path) -> Sheet:
    """The table in a file: CSV by any usual delimiter, JSON lines, Parquet or Arrow, told by content. Raises TableError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise TableError(f"no table at {path}") from None
    except OSError as error:
        raise TableError(f"cannot read {path}: {error.strerror}; give the path of a table") from None
    return parse_sheet(raw, str(path))


def parse_sheet(raw: bytes, name: str) -> Sheet:
    """The table in a file's bytes; `name` is what messages call it."""
    raw = _unpacked(raw, name)
    for start, what in BINARY.items():
        if raw.startswith(start):
            raise TableError(f"{name} is {what}, not a table; save it as CSV or Parquet")
    if raw.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        sheet = _from_arrow(raw, name)
    else:
        text = _decoded(raw, name)
        start = text.lstrip()[:1]
        sheet = (_from_json(text, name) if start and start in "{[" else None) or _from_csv(text, name)
    if not len(sheet):
        raise TableError(f"{name}: no rows below the header; there is nothing to read")
    return sheet


def _unpacked(raw: bytes, name: str) -> bytes:
    unpackers = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ": lzma.decompress}
    for start, unpack in unpackers.items():
        if raw.startswith(start):
            try:
                return unpack(raw)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise TableError(f"{name} is compressed and damaged ({error}); copy it again") from None
    return raw


def _decoded(raw: bytes, name: str) -> str:
    """UTF-8, or UTF-16 with its mark, as Excel's "Unicode text" has it."""
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        before, what = raw[: error.start].count(b"\n"), f"byte 0x{raw[error.start]:02x} is not a table's text in UTF-8"
    else:
        if text.strip() == "":
            raise TableError(f"{name} is empty; a table begins with the names of its columns")
        if "\0" not in text:
            return text
        before, what = text.count("\n", 0, text.index("\0")), "a NUL byte, so this is not a table"
    raise TableError(f"{name}, line {before + 1}: {what}; save it as CSV in UTF-8, or as Parquet")


def _from_arrow(raw: bytes, name: str) -> Sheet:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    buffer = pyarrow.BufferReader(raw)
    try:
        # Not parquet.read_table(path), which makes columns of folders called `seed=3`.
        if raw.startswith(b"PAR1"):
            table = pyarrow.parquet.ParquetFile(buffer).read()
        else:
            open_ = pyarrow.ipc.open_file if raw.startswith(b"ARROW1") else pyarrow.ipc.open_stream
            table = open_(buffer).read_all()
        _check_names(table.column_names, f"{name}, line 1")
        columns = {column: _values(table.column(column)) for column in table.column_names}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())[:150]
        raise TableError(
            f"{name} is not a table in Parquet or Arrow, or it is damaged ({why}); write it again"
        ) from None
    return Sheet(name, columns, range(1, table.num_rows + 1), unit="row")


def _values(column: Any) -> list[Any]:
    """An Arrow column as Python values; dates as text, spans of time as numbers in their own unit."""
    from pyarrow import int64, string, types

    if types.is_temporal(column.type):
        column = column.cast(int64() if types.is_duration(column.type) else string())
    cells = column.to_pylist()
    return [cell.decode(errors="backslashreplace") if isinstance(cell, bytes) else cell for cell in cells]


def _from_json(text: str, name: str) -> Sheet | None:
    """JSON lines, or one list of records; None where `[` begins a CSV header."""
    is_list = text.lstrip().startswith("[")
    lines = [text] if is_list else io.StringIO(text, newline=None)
    records: list[tuple[int, Any]] = []
    for line, each in enumerate(lines, start=1):
        try:
            found = json.loads(each, object_pairs_hook=_no_doubles) if each.strip() else []
        except (ValueError, RecursionError) as error:
            if is_list and not re.match(r"\s*\[\s*{", text):
                return None
            if is_list:
                raise TableError(
                    f"{name} begins as a list of records in JSON, and is none ({error}); write it again"
                ) from None
            raise TableError(f"{name}, line {line}: no record in JSON ({error}); write one record a line") from None
        records += enumerate(found, start=1) if is_list else [(line, found)] if each.strip() else []
    return _from_records(records, name, "record" if is_list else "line")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for before, after in pairwise(sorted(key for key, _ in pairs)):
        if before == after:
            raise ValueError(f"key {after!r} stands twice")
    return {_printable(key): _printable(value) if isinstance(value, str) else value for key, value in pairs}


def _printable(text: str) -> str:
    """Without half characters, which JSON can spell and no terminal can show."""
    return text.encode("utf-8", "backslashreplace").decode()


def _from_records(records: Sequence[tuple[int, Any]], name: str, unit: str) -> Sheet:
    """The columns of records; where a record lacks a key, its cell is missing."""
    for line, record in records:
        if not isinstance(record, dict):
            raise TableError(f'{name}, {unit} {line}: {shown(record)} is not a record; write {{"column": value, …}}')
    if len(records) == 1 and records[0][1] and all(isinstance(value, dict | list) for value in records[0][1].values()):
        raise TableError(f"{name} holds whole columns; write one record a line (pandas: orient='records', lines=True)")
    header = dict.fromkeys(key for _, record in records for key in record)
    columns = {key: [record.get(key) for _, record in records] for key in header}
    return Sheet(name, columns, [line for line, _ in records], unit)


class _Record(NamedTuple):
    line: int
    """The file's line that it begins on."""
    cells: list[str]


def _from_csv(text: str, name: str) -> Sheet:
    lines = list(io.StringIO(text, newline=""))
    forced = re.fullmatch(r'"?sep=(.)"?\s*', lines[0])
    if forced:  # Excel's own first line
        lines[0] = "\n"
    comments = _comment_lines(lines)
    kept = ["\n" if number in comments else line for number, line in enumerate(lines, start=1)]
    delimiter = forced.group(1) if forced else _delimiter(kept)
    records = _records(kept, delimiter, name)
    if not records:
        raise TableError(f"{name} holds comments only; a table begins with the names of its columns")
    told = {number: _cells(lines[number - 1], delimiter) for number in sorted(comments)}
    above = [_Record(number, cells) for number, cells in told.items() if number < records[0].line]
    header, rows, notes = _with_header(records, above[-1:], name)
    _check_shape(header, rows, name)
    names = _names(header, rows, name)
    alike = [
        number for number, cells in told.items()
        if number > header.line and len(cells) == len(names) > 1 and any(map(parse_numeral, cells))
    ]  # fmt: skip
    if alike:
        notes.append(f"{name}: {len(alike)} lines that begin with # were left out as comments although they look like "
                     f"rows (line {alike[0]} is the first)")  # fmt: skip
    columns = {column: [row.cells[place] for row in rows] for place, column in names.items()}
    return Sheet(name, columns, [row.line for row in rows], "line", delimiter, tuple(notes))


def _comment_lines(lines: Sequence[str]) -> set[int]:
    """Numbers of the lines that begin with # outside of quotes."""
    found, quoted = set(), False
    for number, line in enumerate(lines, start=1):
        if not quoted and COMMENT.match(line):
            found.add(number)
        else:
            quoted ^= line.count('"') % 2 == 1
    return found


def _records(lines: Sequence[str], delimiter: str, name: str) -> list[_Record]:
    """Rows that hold anything. Raises TableError where quotes do not close."""
    if delimiter == " ":
        lines = [line.replace("\t", " ").strip() + "\n" for line in lines]
    # Strict, because a quote that never closes would else swallow the rest of the file.
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    csv.field_size_limit(max(csv.field_size_limit(), sum(map(len, lines))))  # a cell may be as long as the file
    records, line = [], 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                records.append(_Record(line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise TableError(f"{name}, line {line}: quotes that do not close, or text beside them ({error}); write a quote "
                         "inside a cell twice, and quotes around the whole cell") from None  # fmt: skip
    return records


def _cells(line: str, delimiter: str) -> list[str]:
    """The cells of a comment line, without its #."""
    try:
        records = _records([line.lstrip().lstrip("#")], delimiter, "")
    except TableError:
        return []
    return [cell.strip() for record in records for cell in record.cells]


def _delimiter(lines: Sequence[str]) -> str:
    """The delimiter under which all rows are as wide as the header; else the header's most frequent one."""
    head = next((line.strip() for line in lines if line.strip(' \t;,"\r\n')), "")
    widths = {mark: _width(lines, mark) for mark in DELIMITERS if mark in head}
    if any(widths.values()):
        return max(widths, key=lambda mark: widths[mark])
    has_blanks = len(head.split()) > 1
    if has_blanks and _width(lines, " "):
        return " "
    if widths:
        return max(widths, key=head.count)
    return " " if has_blanks and any(len(line.split()) > 1 for line in lines if line.strip() != head) else ","


def _width(lines: Sequence[str], delimiter: str) -> int:
    """Number of cells in every row, the header's included; 0 where they differ."""
    try:
        header, rows = _trimmed(_records(lines, delimiter, ""))
    except (TableError, ValueError):
        return 0
    return len(header.cells) if all(len(row.cells) == len(header.cells) for row in rows) else 0


def _trimmed(records: Sequence[_Record]) -> tuple[_Record, list[_Record]]:
    """Header and rows without the empty cells that delimiters at the end of every row leave."""
    header, *rows = records
    named = max(place for place, cell in enumerate(header.cells) if cell.strip()) + 1
    widths = {len(row.cells) for row in rows}
    is_padded = named < len(header.cells) or (len(widths) == 1 and widths != {named})
    if not is_padded or any(cell.strip() for row in rows for cell in row.cells[named:]):
        return header, rows
    return _Record(header.line, header.cells[:named]), [_Record(row.line, row.cells[:named]) for row in rows]


def _with_header(
    records: list[_Record], above: Sequence[_Record], name: str
) -> tuple[_Record, list[_Record], list[str]]:
    """Header, rows, and what to tell of it: numpy.savetxt and gnuplot write theirs as a comment, the one `above`."""
    first = records[0]
    numeric = [parse_numeral(cell) is not None for cell in first.cells]
    for comment in above if any(numeric) else ():
        if len(comment.cells) == len(first.cells) and not any(map(parse_numeral, comment.cells)):
            told = f"{name}, line {comment.line}: the names of the columns were taken from this comment"
            header, rows = _trimmed([comment, *records])
            return header, rows, [told]
    if all(numeric):
        raise TableError(f"{name}, line {first.line}: the first row holds numbers ({shown(first.cells[0])} …); put the "
                         "names of the columns above it")  # fmt: skip
    header, rows = _trimmed(records)
    return header, rows, []


def _check_shape(header: _Record, rows: Sequence[_Record], name: str) -> None:
    """Every row has the header's cells, and none is the header again."""
    width, names = len(header.cells), [cell.strip() for cell in header.cells]
    for line, cells in rows:
        if len(cells) != width:
            many = "put numbers such as 1,000 and text with delimiters into quotes; R's row names: row.names = FALSE"
            few = "fill in what is missing, or repair the end of the file"
            raise TableError(f"{name}, line {line}: {len(cells)} cells under a header of {width} (line {header.line}); "
                             f"{many if len(cells) > width else few}")  # fmt: skip
        if [cell.strip() for cell in cells] == names:
            raise TableError(f"{name}, line {line}: the header again; were two files joined? Remove this line")


def _names(header: _Record, rows: Sequence[_Record], name: str) -> dict[int, str]:
    """Place and name of every column; pandas leaves the first one, its index, without."""
    names = {}
    for place, column in enumerate(cell.strip() for cell in header.cells):
        full = [row for row in rows if row.cells[place].strip()]
        if column == "" and full and place > 0:
            raise TableError(f"{name}, line {header.line}: column {place + 1} has no name, and holds "
                             f"{shown(full[0].cells[place])} on line {full[0].line}; name it")  # fmt: skip
        if column or full:
            names[place] = column or "Unnamed: 0"
    _check_names(list(names.values()), f"{name}, line {header.line}")
    return names


def _check_names(names: Sequence[str], place: str) -> None:
    for before, after in pairwise(sorted(names)):
        if before == after:
            raise TableError(f"{place}: column {after!r} stands twice in the header; rename one")
