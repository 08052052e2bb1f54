"""Columns of a sheet: numbers as people write them, decimal marks, labels, and rows chosen by a condition."""

from __future__ import annotations

import pytest

from dbscale.errors import TableError
from dbscale.report.reader import parse_sheet
from dbscale.report.sheet import Sheet, is_missing, near_spellings, parse_count, parse_numeral


def sheet_of(text: str) -> Sheet:
    return parse_sheet(text.encode(), "t.csv")


def refusal(text: str | bytes, column: str | None = None) -> str:
    """The sentence that refuses a table, or a column of it read as numbers."""
    with pytest.raises(TableError) as caught:
        sheet = parse_sheet(text.encode() if isinstance(text, str) else text, "t.csv")
        if column is not None:
            sheet.numbers(column)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1281167", 1281167), ("1,281,167", 1281167), ("1_281_167", 1281167), ("1 281 167", 1281167),
        ("1\u202f281\u00a0167", None), ("1\u202f281\u202f167", 1281167), ("1'281'167", 1281167), ("64K", 64000),
        ("64 k", 64000), ("1.28M", 1280000), ("13B", 13e9), ("13g", 13e9), ("2T", 2e12), ("2e6", 2e6), ("1.5E-3", 0.0015),
        ("25.3%", 0.253), ("25.3 %", 0.253), ("-0.5", -0.5), ("\u22120.5", -0.5), ("+3", 3), (".5", 0.5), ("5.", 5),
        ("1,014.45", 1014.45), ("86.57M", 86570000), ("007", 7),
        ("1,28,167", None), ("12,34", None), ("1,,000", None), ("0,654.5", None), ("1.2.3", None), ("0x10", None),
        ("1e", None), ("12 apples", None), ("64Ki", None), ("True", None), ("inf", None), ("2024-01-15", None), ("", None),
        ("1/2", None), ("--5", None), ("5-", None), ("%", None), ("K", None), ("1,000_000", None), ("\uff15", None),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(text: str, value: float | None):
    """Under a decimal point; `12,34` has a decimal comma."""
    numeral = parse_numeral(text)
    found = numeral.readings.get(".") and numeral.value(".") if numeral else None
    assert found == value


def test_whole_numbers_stay_exact():
    seed = 2**63 - 25
    value = sheet_of(f"seed,y\n{seed},1\n").numbers("seed")[0]
    assert value == seed and isinstance(value, int)
    assert parse_numeral("9" * 5000).value(".") == float("inf")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text", ["", "NA", "n/a", "NaN", "nan", "null", "NULL", "None", "<NA>", "#N/A", ".", "-", " NA "]
)
def test_what_stands_for_nothing(text: str):
    assert is_missing(text)
    assert sheet_of(f"x,y\n1,0.5\n2,{text}\n").numbers("y") == [0.5, None]


@pytest.mark.parametrize(
    ("text", "value"), [("200k", 2e5), ("22M", 22e6), ("1,281,167", 1281167), ("2e5", 2e5), (" 7 ", 7), ("0.5", 0.5)]
)
def test_counts_on_the_command_line_are_read_as_in_tables(text: str, value: float):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["many", "0", "-5", "25%", "", "nan"])
def test_what_is_no_count_is_told(text: str):
    with pytest.raises(TableError, match=r"must be above 0|is not a count; write 2000"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "samples", "error"),
    [
        ("samples;error\n1000;0,65421\n", [1000], [0.65421]),
        ("samples;error\n1.000;0,65\n2.000;0,4\n", [1000, 2000], [0.65, 0.4]),  # the errors show whose point it is
        ("samples;error\n1.281.167;0,5\n", [1281167], [0.5]),
        ("samples;error\n1000;0.654\n", [1000], [0.654]),
        ("samples;error\n1000;1.234\n2000;2.345\n", [1000, 2000], [1.234, 2.345]),  # thousands have no mark here
        ("samples;error\n1000;1,234\n2000;2,345\n", [1000, 2000], [1.234, 2.345]),
        ('samples,error\n"1,000",0.5\n"64,000",0.4\n', [1000, 64000], [0.5, 0.4]),
        ('samples,error\n1000,"0,65"\n2000,"0,4"\n', [1000, 2000], [0.65, 0.4]),  # Google Sheets in German
        ('samples,error\n"1,014.45",1.234\n', [1014.45], [1.234]),
        ("samples\terror\n1,281,167\t1.234\n", [1281167], [1.234]),
        ("samples\terror\n1\t1.234\n2\t2.345\n", [1, 2], [1.234, 2.345]),
        ("samples;error\n1 000;0,5\n", [1000], [0.5]),
        ("samples;error\n64K;25,3 %\n", [64000], [0.253]),
        ("samples;error\n1,5K;0,5\n", [1500], [0.5]),
    ],
)
def test_the_decimal_mark_is_told_by_the_table(text: str, samples: list[float], error: list[float]):
    sheet = sheet_of(text)
    assert (sheet.numbers("samples"), sheet.numbers("error")) == (samples, error)


def test_what_may_mean_two_things_is_refused():
    for text in ("samples;error\n1,014;2\n", "samples;error\n1.014;2\n", "samples\terror\n1,014\t2\n"):
        assert "which may be 1014 or 1.014" in refusal(text, "samples")
    assert refusal("x;y\n1,5;2\n1.5;3\n", "x") == (
        "t.csv, line 3: x is '1.5', on line 2 '1,5'; write all numbers with one decimal mark"
    )
    assert "may be" in refusal('x,y\n"1,014",2\n1.014,3\n', "x")


def test_per_cent_and_shares_do_not_mix_in_a_column():
    assert refusal("x,y\n1,0.3\n2,25%\n", "y") == (
        "t.csv, line 3: y is '25%', on line 2 '0.3'; write the whole column in one unit"
    )
    assert sheet_of("x,y\n1,30%\n2,NA\n3,25 %\n").numbers("y") == [0.3, None, 0.25]


def test_counts_with_and_without_letters_mix():
    assert sheet_of("x,y\n64K,1\n64000,1\n").numbers("x") == [64000, 64000]


@pytest.mark.parametrize("cell", ["inf", "-Infinity", "True", "2024-01-15", "1e999", "many", "#DIV/0!", "x" * 5000])
def test_what_is_no_finite_number_is_refused_where_it_stands(cell: str):
    message = refusal(f"x,y\n1,0.5\n\n{cell},0.4\n", "x")
    assert message.startswith("t.csv, line 4: x is ")
    assert message.endswith(("or remove the row", "leave the row out or give the measured value"))
    assert cell[:20] in message and len(message) < 200


def test_spellings_near_each_other_are_pointed_out():
    (said,) = near_spellings(["birds", "Birds", "fish", "birds_2", 7])
    assert said == "'Birds' and 'birds' differ in spelling only; if they are one, write them alike"
    assert len(near_spellings(["vit-small", "vit_small", "vit small"])) == 1


def test_conditions_choose_rows_by_word_or_number():
    sheet = sheet_of("seed,lr=0.1,name\n0,1,a\n0.0,2,a\n1,3,b\n")
    assert sheet.where(["seed=0"]).numbers("lr=0.1") == [1, 2]
    assert sheet.where(["lr=0.1=3"]).texts("name") == ["b"]
    both = sheet.where(["name=a", "lr=0.1=2"])
    assert list(both.lines) == [3]
    with pytest.raises(TableError, match="--where 'nam=a': write COLUMN=VALUE; did you mean 'name'"):
        sheet.where(["nam=a"])
    with pytest.raises(TableError, match=r"t.csv: no row has name=c; known: a, b"):
        sheet.where(["name=c"])
    with pytest.raises(TableError, match="write COLUMN=VALUE"):
        sheet.where(["name"])


def test_labels_are_numbers_where_all_of_them_are():
    assert sheet_of("seed,y\n0,1\n0.0,2\nNA,3\n").labels("seed") == [0, 0, None]
    assert sheet_of("seed,y\n0,1\ns1,2\n,3\n").labels("seed") == ["0", "s1", None]
