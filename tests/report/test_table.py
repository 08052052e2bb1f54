"""Tables are read right or refused in one sentence with file, line, value and remedy; `Run` defines their columns."""

from __future__ import annotations

import bz2
import csv
import datetime
import decimal
import gzip
import io
import itertools
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbscale.errors import TableError
from dbscale.launch.cli import main
from dbscale.report.reader import parse_sheet, read_sheet
from dbscale.report.table import COLUMNS, REQUIRED, Run, RunTable, Setting, runs_of, to_csv
from tests.report.test_sheet import refusal, sheet_of

# The shape of text.

SAMPLES, ERROR, NAMES = [1000, 2000, 4000], [0.5, 0.25, 0.125], ["vit, small", "b", "c"]
PLAIN = 'name,samples,error\n"vit, small",1000,0.5\nb,2000,0.25\nc,4000,0.125\n'
SPELLINGS: dict[str, str | bytes] = {
    "plain": PLAIN,
    "semicolons": PLAIN.replace(",", ";").replace("vit;", "vit,"),
    "German Excel": "name;samples;error\nvit, small;1000;0,5\nb;2000;0,25\nc;4000;0,125\n",
    "Excel's own line": "sep=;\nname;samples;error\nvit, small;1000;0,5\nb;2000;0,25\nc;4000;0,125\n",
    "any other delimiter": "sep=|\nname|samples|error\nvit, small|1000|0.5\nb|2000|0.25\nc|4000|0.125\n",
    "tabs": "name\tsamples\terror\nvit, small\t1000\t0.5\nb\t2000\t0.25\nc\t4000\t0.125\n",
    "blanks": '  name       samples error\n"vit, small"  1000  0.5\n b 2000 0.25  \nc 4000\t0.125\n',
    "R": '"name" "samples" "error"\n"vit, small" 1000 0.5\n"b" 2000 0.25\n"c" 4000 0.125\n',
    "blanks after commas": 'name, samples, error\n"vit, small", 1000, 0.5\nb, 2000, 0.25\nc, 4000, 0.125\n',
    "padded": 'name  ,samples ,error\n"vit, small",1000  ,0.5\nb     ,2000 ,0.25\nc     ,4000 ,0.125 \n',
    "all quoted": '"name","samples","error"\n"vit, small","1000","0.5"\n"b","2000","0.25"\n"c","4000","0.125"\n',
    "comments": "# exported\n#\n" + PLAIN.replace("b,", "# a, half\nb,") + "# the end\n",
    "blank lines": "\n\n" + PLAIN.replace("\n", "\n\n") + ",,\n \n",
    "a mark": PLAIN.encode("utf-8-sig"),
    "UTF-16": PLAIN.encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + PLAIN.encode("utf-16-be"),
    "Windows": PLAIN.replace("\n", "\r\n"),
    "old Macs": PLAIN.replace("\n", "\r"),
    "no last line end": PLAIN.rstrip(),
    "trailing delimiters": PLAIN.replace("\n", ",\n"),
    "trailing delimiters of rows": "name,samples,error\n" + PLAIN.partition("\n")[2].replace("\n", ",\n"),
    "Excel's empty columns": PLAIN.replace("\n", ",,,\n"),
    "thousands": PLAIN.replace("1000", '"1,000"').replace("4000", '"4,000"'),
    "letters": PLAIN.replace("000,", "K,"),
    "per cent": PLAIN.replace("0.5", "50%").replace("0.25", "25 %").replace("0.125", "12.5%"),
    "gzip": gzip.compress(PLAIN.encode()),
    "bzip2": bz2.compress(PLAIN.encode()),
    "xz": lzma.compress(PLAIN.encode()),
    "JSON lines": "".join(json.dumps(row) + "\n" for row in [
        {"name": n, "samples": s, "error": e} for n, s, e in zip(NAMES, SAMPLES, ERROR, strict=True)]),
    "JSON": json.dumps([{"name": n, "samples": f"{s // 1000}K", "error": e}
                        for n, s, e in zip(NAMES, SAMPLES, ERROR, strict=True)], indent=1),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_table_in_many_spellings(spelling: str):
    raw = SPELLINGS[spelling]
    sheet = parse_sheet(raw.encode() if isinstance(raw, str) else raw, "t.csv")
    assert list(sheet.columns) == ["name", "samples", "error"]
    assert (sheet.texts("name"), sheet.numbers("samples"), sheet.numbers("error")) == (NAMES, SAMPLES, ERROR)
    assert sheet.notes == ()


def test_the_files_own_lines_are_named():
    text = '# a\nname,x\n\n"two\nlines",1\n# b\nc,2\r\nd,what\n'
    sheet = sheet_of(text)
    assert list(sheet.lines) == [4, 7, 8]
    assert refusal(text, "x").startswith("t.csv, line 8: x is 'what', not a number")
    assert sheet.texts("name")[0] == "two\nlines"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('samples,error\n"1",1000,0.5\n', "line 2: 3 cells under a header of 2 .line 1.; .*row.names = FALSE"),
        (
            "samples,error\n500,0.5\n1,000,0.4\n",
            "line 3: 3 cells under a header of 2 .line 1.; put numbers such as 1,000",
        ),
        ("samples,error\n1000,0.5,a note\n2000,0.4\n", "line 2: 3 cells"),
        ("samples,error\n1000,0.5,\n2000,0.4\n", "line 2: 3 cells"),
        ("samples,error\n1000,0.5\n2000\n", "line 3: 1 cells under a header of 2 .*fill in what is missing"),
        ("samples,error,\n1000,0.5,7\n", "line 1: column 3 has no name, and holds '7' on line 2; name it"),
        ("1,2\n# a,b\n3,4\n", "line 1: the first row holds numbers .*; put the names of the columns above it"),
        ("samples,,error\n1000,7,0.5\n", "line 1: column 2 has no name, and holds '7' on line 2; name it"),
        ("error,samples,error\n1,2,3\n", "line 1: column 'error' stands twice in the header; rename one"),
        ("x,y\n1,2\nx,y\n3,4\n", "line 3: the header again; were two files joined"),
        ("1000,0.5\n2000,0.4\n", "line 1: the first row holds numbers .'1000' ….; put the names"),
        ('x,y\n1,"2\n3,4\n', "line 2: quotes that do not close"),
        ('x,y\n1,2\n3,"4"5\n', "line 3: quotes that do not close, or text beside them"),
        ("", "t.csv is empty; a table begins with the names"),
        (" \n\n", "t.csv is empty"),
        ("# only\n# this\n", "t.csv holds comments only"),
        ("x,y\n", "no rows below the header"),
        ("[]", "no rows below the header"),
        (b"x,y\n1,\x00\n", "line 2: a NUL byte, so this is not a table; save it as CSV"),
        ("x,y\n1,ä\n".encode("latin1"), "line 2: byte 0xe4 is not a table's text in UTF-8; save it"),
        ("x,y\n1,2\n".encode("utf-16-le"), "a NUL byte"),
        (b"PK\x03\x04rest", "t.csv is an Excel workbook or a zip archive, not a table; save it as CSV"),
        (b"\x1f\x8brest", "t.csv is compressed and damaged"),
        (gzip.compress(b"x,y\n1,2\n" * 100, mtime=0)[:-12], "t.csv is compressed and damaged"),
        (b"PAR1rest", "t.csv is not a table in Parquet or Arrow, or it is damaged"),
        (b"ARROW1rest", "is not a table in Parquet or Arrow"),
        ('{"x": 1}\n{"x": 2\n', "line 2: no record in JSON .* write one record a line"),
        ('{"x": 1}\n[1]\n', "line 2: .1. is not a record"),
        ('{"x": 1, "x": 2}\n', "line 1: .*key 'x' stands twice"),
        ('{\n"x": 1}\n', "line 1: no record in JSON"),
        ('{"x": {"0": 1}, "y": {"0": 2}}', "holds whole columns; write one record a line .*orient='records'"),
        ("[" * 100_000, "."),
    ],
)
def test_what_is_no_table_is_refused_where_it_goes_wrong(text: str | bytes, message: str):
    with pytest.raises(TableError, match=message):
        parse_sheet(text.encode() if isinstance(text, str) else text, "t.csv").numbers("x")


def test_the_index_of_pandas_keeps_its_name():
    sheet = sheet_of(",x,y\n0,1,2\n1,3,4\n")
    assert list(sheet.columns) == ["Unnamed: 0", "x", "y"]
    assert sheet.numbers("x") == [1, 3]


def test_names_in_a_comment_are_taken_and_told():
    """numpy.savetxt writes them so."""
    file = io.BytesIO()
    np.savetxt(file, [[1000, 0.5], [2000, 0.4]], header="samples error")
    sheet = parse_sheet(file.getvalue(), "t.txt")
    assert (sheet.numbers("samples"), sheet.numbers("error")) == ([1000, 2000], [0.5, 0.4])
    assert sheet.notes == ("t.txt, line 1: the names of the columns were taken from this comment",)
    assert list(sheet_of("#params,model\n10,vit\n").columns) == ["params", "model"]


def test_comments_that_look_like_rows_are_told():
    sheet = sheet_of("x,y\n1,2\n#3,4\n5,6\n# 7,8\n# no row\n#N/A,9\n")
    assert sheet.numbers("x") == [1, 5, None]
    assert sheet.notes == (
        "t.csv: 2 lines that begin with # were left out as comments although they look like rows (line 3 is the first)",
    )
    assert sheet_of('x,y\n1,"a\n# b"\n').texts("y") == ["a\n# b"]


def test_blanks_delimit_only_where_nothing_else_does():
    assert list(sheet_of("model name,my top1 error\nvit small b,0.5\n").columns) == ["model name", "my top1 error"]
    assert list(sheet_of("one column\n1\n2\n").columns) == ["one column"]
    assert list(sheet_of("size; MB,error\n1; 2,0.5\n").columns) == ["size", "MB,error"]  # either fits: `;` goes first
    assert list(sheet_of("a;b,c,d\n1;2,3,4\n").columns) == ["a;b", "c", "d"]  # both fit: the wider


def test_a_row_that_breaks_late_is_refused_too():
    text = "samples,error\n" + "".join(f"{n},0.5\n" for n in range(1, 3000)) + "1,000,0.5\n"
    assert "line 3001: 3 cells under a header of 2" in refusal(text)


def test_a_cell_may_be_as_long_as_the_file():
    long = "x" * 300_000
    assert sheet_of(f"name,y\n{long},1\n").texts("name") == [long]


def test_exports_of_wandb_are_read():
    text = '"Step","lr=0.1 - loss","lr=0.1 - loss__MIN","lr=0.3 - loss"\n"0","2.3","2.3",""\n"100","1.1","1.1","1.4"\n'
    sheet = sheet_of(text)
    assert sheet.numbers("lr=0.3 - loss") == [None, 1.4]
    with pytest.raises(TableError, match=r"line 2: lr=0.3 - loss is empty; fill it in or remove the row"):
        sheet.measured("lr=0.3 - loss")


def test_results_of_timm_are_read():
    sheet = sheet_of('model,top1,top1_err,param_count\neva_giant,89.792,10.208,"1,014.45"\nvit_base,85.1,14.9,86.57\n')
    assert sheet.numbers("param_count") == [1014.45, 86.57]
    assert sheet.numbers("top1_err") == [10.208, 14.9]


# Typed files.


def table_bytes(kind: str, table: pa.Table) -> bytes:
    sink = io.BytesIO()
    if kind == "parquet":
        pa.parquet.write_table(table, sink)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, sink)
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["parquet", "feather", "file", "stream"])
@pytest.mark.parametrize("name", ["t.csv", "seed=3/t.parquet"])
def test_arrow_is_known_by_content(tmp_path: Path, kind: str, name: str):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    table = pa.table({
        "name": pa.array(["a", "b", None]).dictionary_encode(), "samples": pa.array([1000, 2**60 + 1, None]),
        "error": [0.5, float("nan"), 0.25], "text": ["64K", "NA", "25"], "raw": [b"a", b"\xff", None],
        "exact": pa.array([decimal.Decimal("0.25"), None, decimal.Decimal("1.50")]), "flag": [True, False, None],
        "day": [datetime.date(2024, 1, 15)] * 3, "list": [[1], None, []],
    })  # fmt: skip
    path.write_bytes(table_bytes(kind, table))
    sheet = read_sheet(path)
    assert list(sheet.columns) == table.column_names  # and no column of the folder
    assert sheet.texts("name") == ["a", "b", ""] and sheet.texts("raw") == ["a", "\\xff", ""]
    assert sheet.numbers("samples") == [1000, 2**60 + 1, None] and sheet.numbers("error") == [0.5, None, 0.25]
    assert sheet.numbers("text") == [64000, None, 25] and sheet.numbers("exact") == [0.25, None, 1.5]
    assert sheet.texts("day")[0] == "2024-01-15"
    for column, value in (("flag", "True"), ("list", r"\[1\]"), ("day", "'2024-01-15'")):
        with pytest.raises(TableError, match=f"row 1: {column} is {value}, not a number"):
            sheet.numbers(column)
    assert sheet.place(1) == f"{path}, row 2"


def test_doubled_names_in_arrow_are_refused():
    raw = table_bytes("file", pa.table([[1], [2]], names=["x", "x"]))
    assert "column 'x' stands twice" in refusal(raw)


def test_records_of_json_may_lack_keys():
    sheet = sheet_of('{"x": 1, "extra": {"a": [1]}}\n\n{"y": 2.5, "x": "64K"}\n{"x": NaN}\n')
    assert list(sheet.columns) == ["x", "extra", "y"] and list(sheet.lines) == [1, 3, 4]
    assert sheet.numbers("x") == [1, 64000, None] and sheet.numbers("y") == [None, 2.5, None]
    assert "not a finite number" in refusal('{"x": Infinity}\n', "x")
    assert list(sheet_of('{"\\ud800": 1}\n').columns) == ["\\ud800"]
    assert list(sheet_of("[step],loss\n1,2\n").columns) == ["[step]", "loss"]


def test_files_that_are_not_there_or_no_files(tmp_path: Path):
    with pytest.raises(TableError, match=r"no table at .*none.csv"):
        read_sheet(tmp_path / "none.csv")
    with pytest.raises(TableError, match=r"cannot read .*: Is a directory; give the path of a table"):
        read_sheet(tmp_path)


# Words, conditions, columns.


def test_words_that_blanks_keep_apart_are_refused():
    message = (
        "t.csv, line 3: name is 'birds ', on line 2 'birds'; nothing but blanks keeps them apart, write both alike"
    )
    with pytest.raises(TableError, match=message):
        sheet_of("name,y\nbirds,1\nbirds ,2\n").texts("name")
    assert sheet_of("name,y\nbirds  ,1\nfish   ,2\n birds  ,3\n").texts("name") == ["birds", "fish", "birds"]


def test_of_many_names_the_nearest_are_shown():
    header = ",".join([*(f"metric {n} of {'x' * n}" for n in range(100)), "error_rat", "y" * 300])
    with pytest.raises(TableError, match="no column 'error_rate'; did you mean 'error_rat'") as caught:
        parse_sheet(f"{header}\n{'1,' * 101}1\n".encode(), "t.csv").numbers("error_rate")
    known = str(caught.value).partition("known: ")[2].split(", ")
    assert len(known) == 20 and known[0] == "error_rat"
    assert refusal(f"x,{'y' * 300}\n1,2\n", "error_rate").endswith(f"known: x, {'y' * 39}…")
    assert "known: x, y" in refusal("x,y\n1,2\n", "error_rate")


# Runs.

MINIMAL = {"arm": "plain", "num_params": "10", "upstream_samples": "100", "dataset": "down", "downstream_samples": "10",
           "seed": "0", "error_rate": "0.5"}  # fmt: skip


def runs_from(*rows: dict[str, Any], columns: dict[str, str] | None = None) -> RunTable:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return runs_of(sheet_of(text.getvalue()), columns)


def test_a_table_of_ones_own_needs_only_what_was_measured():
    assert set(MINIMAL) == set(REQUIRED)
    table = runs_from({**MINIMAL, "num_params": "25,557,032", "notes": "good"})
    assert table.runs == (
        Run(variant="base", arm="plain", student="25,557,032 parameters", num_params=25557032, upstream_samples=100,
            dataset="down", downstream_samples=10, seed=0, error_rate=0.5),
    )  # fmt: skip
    assert table.warnings == ("t.csv: columns that dbscale does not know were left out: notes",)


@pytest.mark.parametrize("column", REQUIRED)
def test_a_column_that_must_be_there_is_named(column: str):
    row = {name if name != column else f"{name}s": value for name, value in MINIMAL.items()}
    with pytest.raises(TableError, match=f"t.csv: no column '{column}'; did you mean '{column}s'"):
        runs_from(row)
    assert runs_from(row, columns={column: f"{column}s"}).runs == runs_from(MINIMAL).runs
    with pytest.raises(TableError, match=f"line 3: '{column}' is empty; fill it in or remove the row"):
        runs_from(MINIMAL, {**MINIMAL, column: "NA"})


@pytest.mark.parametrize(("column", "is_refused"), [("top1_acc", True), ("Accuracy", True), ("acc_error", False)])
def test_accuracies_are_not_taken_for_errors(column: str, is_refused: bool):
    rows = {column if name == "error_rate" else name: value for name, value in MINIMAL.items()}
    if not is_refused:
        assert runs_from(rows, columns={"error_rate": column}).runs
        return
    with pytest.raises(TableError, match=f"column {column!r} holds accuracies by its name.*write 1 - accuracy"):
        runs_from(rows, columns={"error_rate": column})


def test_columns_may_have_other_names():
    rows = {**MINIMAL, "top=1": "0.25"}
    assert runs_from(rows, columns={"error_rate": "top=1"}).runs[0].error_rate == 0.25
    with pytest.raises(TableError, match="eror=top=1: runs have no 'eror'; did you mean 'error_rate'"):
        runs_from(rows, columns={"eror": "top=1"})
    with pytest.raises(TableError, match="no column 'top-2'"):
        runs_from(rows, columns={"test_loss": "top-2"})


@pytest.mark.parametrize("missing", ["", "NA", "NaN", "null"])
def test_optional_values_may_be_missing(missing: str):
    optional = [name for name in COLUMNS if name not in REQUIRED]
    run = runs_from({**MINIMAL, **dict.fromkeys(optional, missing)}).runs[0]
    assert run == runs_from(MINIMAL).runs[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error_rate": "50.0"}, "error_rate is 50; error rates are shares between 0 and 1, or written with %"),
        ({"error_rate": "low"}, "error_rate is 'low', not a number"),
        ({"num_params": "0"}, "num_params is 0; it must be above 0"),
        ({"num_params": "86.57"}, "num_params is '86.57', not a whole number; write 86.57M for a count in millions"),
        ({"downstream_samples": "-3"}, "downstream_samples is -3; it must be above 0"),
        ({"upstream_samples": "-1"}, "upstream_samples is -1; counts start at 0"),
        ({"arm": "distiled"}, "arm is 'distiled'; did you mean 'distilled'"),
        ({"arm": "scratch"}, "arm 'scratch' with upstream_samples 100; 0 goes with scratch"),
        ({"upstream_samples": "0"}, "arm 'plain' with upstream_samples 0; 0 goes with scratch"),
        ({"top5_error_rate": "1.5"}, "top5_error_rate is 1.5; error rates are shares"),
        (
            {"error_rate": "0.25"},
            "seed 0. has error_rate 0.25, but 0.5 at t.csv, line 2; remove one, or tell them apart",
        ),
    ],
)
def test_values_that_cannot_be_name_line_and_remedy(change: dict[str, str], message: str):
    with pytest.raises(TableError, match=message) as caught:
        runs_from(MINIMAL, {**MINIMAL, **change})
    assert str(caught.value).startswith("t.csv, line 3: ")


def test_equal_rows_count_once_and_draws_are_apart():
    table = runs_from(MINIMAL, MINIMAL)
    assert len(table) == 1 and table.warnings == ("1 repeated rows were counted once",)
    draws = runs_from({**MINIMAL, "finetune": "0"}, {**MINIMAL, "finetune": "1", "error_rate": "0.4"})
    assert [run.finetune for run in draws] == [0, 1] and draws.warnings == ()


def test_one_of_anything_is_enough():
    table = runs_from({**MINIMAL, "num_params": "1", "downstream_samples": "1", "upstream_samples": "1"})
    (run,) = table
    assert (run.num_params, run.downstream_samples, run.upstream_samples) == (1, 1, 1)
    assert list(table.pretrained) == [run]


def test_what_looks_odd_is_noted():
    table = runs_from(
        {**MINIMAL, "num_classes": "10", "student": "S"},
        {**MINIMAL, "num_classes": "100", "student": "s", "seed": "1", "error_rate": "0"},
        {**MINIMAL, "seed": "2", "error_rate": "1", "student": "S"},
    )
    assert table.warnings == (
        "student: 'S' and 's' differ in spelling only; if they are one, write them alike",
        "down appears with several class counts (10, 100): are two studies mixed?",
        "2 runs on down have an error of exactly 0 or 1: too small a test set to resolve them",
    )


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_floats_survive_csv_exactly(errors: list[float]):
    runs = tuple(runs_from({**MINIMAL, "seed": seed, "error_rate": repr(e)}).runs[0] for seed, e in enumerate(errors))
    assert runs_of(sheet_of(to_csv(runs))).runs == runs


def test_every_column_survives_csv():
    values: dict[str, Any] = {name: f'{name} é, "1"' for name in COLUMNS}
    numbers = {
        name: 0.1 * (place + 1) / 7 for place, name in enumerate(COLUMNS) if "float" in str(Run.__annotations__[name])
    }
    counts = {name: place + 1 for place, name in enumerate(COLUMNS) if "int" in str(Run.__annotations__[name])}
    run = Run(**{**values, **numbers, **counts, "arm": "plain"})
    assert runs_of(sheet_of(to_csv([run]))).runs == (run,)


# At the command line.


def exact(path: Path, header: str, row: Callable[[int, float], str]) -> Path:
    """A table of the law 0.08 + 9·x^-0.4, to the last digit."""
    sizes = [1000, 2000, 5000, 10_000, 50_000, 200_000, 1_281_167]
    path.write_text(header + "\n" + "".join(row(x, 0.08 + 9 * x**-0.4) + "\n" for x in sizes))
    return path


@pytest.mark.parametrize(
    ("header", "row", "options"),
    [
        ("samples;error", lambda x, y: f"{x};{y!r}".replace(".", ","), ["--x", "samples", "--y", "error"]),
        ("# exported\nsamples\terror", lambda x, y: f"{x}\t{y!r}", ["--x", "x=samples", "--y", "error"]),
        ("samples, error", lambda x, y: f'"{x:,}", {100 * y!r} %', ["--x", "samples", "--y", "error"]),
        ("lr=0.1 - step,lr=0.1 - loss", lambda x, y: f"{x},{y!r}", ["--x", "lr=0.1 - step", "--y", "lr=0.1 - loss"]),
        ("lr=0.1 - step,lr=0.1 - loss", lambda x, y: f"{x},{y!r}", ["--x", "x=lr=0.1 - step", "--y", "lr=0.1 - loss"]),
        ("x,error", lambda x, y: f"{x},{y!r}", ["--y", "error"]),
    ],
)
def test_fit_finds_the_law_in_any_spelling(
    tmp_path: Path, header: str, row: Callable[[int, float], str], options: list[str]
):
    path, out = exact(tmp_path / "t.csv", header, row), tmp_path / "fit.json"
    assert (
        main(["fit", str(path), "--law", "power_plus", "--loss", "least_squares_log", *options, "--out", str(out)]) == 0
    )
    found = json.loads(out.read_text())["params"]
    values = {name: value["value"] if isinstance(value, dict) else value for name, value in found.items()}
    assert values == pytest.approx({"E": 0.08, "b": 9, "c": -0.4}, rel=1e-3)


@pytest.mark.parametrize("given", [[], ["--x", "N=N", "--x", "D=D"], ["--x", "params=N", "--x", "tokens=D"]])
def test_fit_knows_the_names_that_its_law_prints(tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "t.csv"
    points = itertools.product(np.logspace(7.5, 10, 4), np.logspace(9, 11, 4))
    rows = (f"{n:.8g},{d:.8g},{1.69 + 406.4 / n**0.34 + 410.7 / d**0.28:.10g}\n" for n, d in points)
    path.write_text("N,D,loss\n" + "".join(rows))
    assert main(["fit", str(path), "--law", "chinchilla", *given, "--y", "loss"]) == 0
    assert "1.69" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--law", "chinchilla", "--y", "y"], "no column for the law's .* write --x .*=COLUMN; known: x, y"),
        (
            ["--law", "chinchilla", "--x", "x", "--y", "y"],
            "--x 'x': write VARIABLE=COLUMN for one of the law's 2 variables",
        ),
        (["--law", "power_plus", "--x", "size", "--y", "y"], "t.csv: no column 'size'"),
        (["--law", "power_plus", "--x", "x", "--y", "loss"], "t.csv: no column 'loss'; known: x, y"),
        (["--law", "power_plus", "--x", "x", "--y", "y", "--where", "z=1"], "--where 'z=1': write COLUMN=VALUE"),
    ],
)
def test_fit_says_which_column_it_lacks(tmp_path: Path, options: list[str], message: str,
                                         capsys: pytest.CaptureFixture[str]):  # fmt: skip
    path = tmp_path / "t.csv"
    path.write_text("x,y\n1,2\n2,1\n")
    assert main(["fit", str(path), *options]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_setting_is_named_by_what_tells_it_from_the_others():
    own, photos, wide = (
        Setting("base", "up", "birds"),
        Setting("base", "photos", "fish"),
        Setting("wide", "up", "birds"),
    )
    assert own.among([own, own]) == own.among([]) == "birds"
    assert own.among([photos]) == "birds from up" and own.among([wide]) == "birds (base)"
    assert wide.among([own, photos]) == "birds from up (wide)"
    assert Setting("base", "fish", "fish").among([own]) == "fish", "its own upstream set is not said"
