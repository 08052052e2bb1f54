"""Hundreds of tables written by chance and broken by chance: the right result, or one sentence that refuses."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from dbscale.errors import TableError
from dbscale.report.reader import parse_sheet
from dbscale.report.table import Run, RunTable, runs_of

HEADER = ("arm", "student", "num_params", "upstream_dataset", "upstream_samples", "dataset", "downstream_samples", "seed",
          "error_rate", "test_loss", "train_time_s")  # fmt: skip
MISSING = ("", "NA", "NaN", "nan", "null", "None", "-")
TOKENS = [
    *"\0\"';,#=%K-{[ \t\n\r",
    "1,000",
    "nan",
    "inf",
    "1e999",
    "sep=;\n",
    "é",
    "distilled",
    "0x1f",
    "\ufeff",
    "\u2212",
]


def random_runs(rng: np.random.Generator) -> list[dict[str, object]]:
    """A small study whose numbers have few enough digits to be written in any way."""
    found = []
    for seed in range(rng.integers(1, 3)):
        for arm in ("plain", "distilled"):
            for size in rng.choice([500, 1000, 2000, 64_000, 1_281_167], size=rng.integers(1, 4), replace=False):
                loss = None if rng.random() < 0.3 else round(float(rng.uniform(0.1, 9)), 4)
                found.append({
                    "arm": arm, "student": "vit, small", "num_params": 86_570_000, "upstream_dataset": "up",
                    "upstream_samples": int(size), "dataset": "birds", "downstream_samples": 1000, "seed": seed,
                    "error_rate": round(float(rng.uniform(0.01, 0.99)), 4), "test_loss": loss,
                    "train_time_s": round(float(rng.uniform(1, 5000)), 2),
                })  # fmt: skip
    return found


def as_text(rows: list[dict[str, object]], rng: np.random.Generator) -> bytes:
    """The rows as some tool or some country would write them."""
    delimiter = str(rng.choice([",", ";", "\t"]))
    comma = bool(rng.random() < 0.3)
    percent, blanks, quoted, sep = (bool(rng.random() < 0.3) for _ in range(4))
    nothing, end = str(rng.choice(MISSING)), str(rng.choice(["\n", "\r\n", "\r"]))

    def cell(name: str, value: object) -> str:
        if value is None:
            text = nothing
        elif isinstance(value, float):
            text = f"{100 * value:.6g} %" if percent and name == "error_rate" else repr(value)
            text = text.replace(".", ",") if comma else text
        elif isinstance(value, int) and value >= 1000 and rng.random() < 0.5:
            text = f"{value:,}".replace(",", ".") if comma else f"{value:,}"
            text = f"{value / 1e6:g}M".replace(".", "," if comma else ".") if value == 86_570_000 else text
        else:
            text = str(value)
        text = '"' + text + '"' if quoted or delimiter in text else text
        return (" " if blanks else "") + text

    order = list(rng.permutation(len(HEADER)))
    names = [HEADER[place] for place in order]
    lines = [delimiter.join(names), *(delimiter.join(cell(name, row[name]) for name in names) for row in rows)]
    lines = [*(["# from a tool"] if rng.random() < 0.3 and not sep else []), *lines]
    lines = [f"sep={delimiter}", *lines] if sep else lines
    for _ in range(rng.integers(3)):
        lines.insert(int(rng.integers(2, len(lines) + 1)), "")
    text = end.join(lines) + (end if rng.random() < 0.8 else "")
    return text.encode(str(rng.choice(["utf-8", "utf-8-sig", "utf-16"])))


def as_records(rows: list[dict[str, object]], rng: np.random.Generator) -> bytes:
    style = rng.integers(3)
    if style == 0:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if style == 1:
        return json.dumps(rows).encode()
    sink = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def random_table(rng: np.random.Generator) -> tuple[list[dict[str, object]], bytes]:
    rows = random_runs(rng)
    return rows, as_records(rows, rng) if rng.random() < 0.25 else as_text(rows, rng)


def broken(raw: bytes, rng: np.random.Generator) -> bytes:
    """The file after an accident or a few."""
    for _ in range(rng.integers(1, 4)):
        place, other = sorted(rng.integers(0, len(raw) + 1, size=2))
        token = [b"\xff", *(each.encode() for each in TOKENS)][rng.integers(len(TOKENS) + 1)]
        lines = raw.split(b"\n")
        line = int(rng.integers(len(lines)))
        raw = (
            raw[:place] + token + raw[place:], raw[:place] + token + raw[place + 1 :], raw[:place] + raw[place + 1 :],
            raw[:place], raw[:place] + raw[other:], b"\n".join(lines[:line] + lines[line + 1 :]),
            b"\n".join([*lines[: line + 1], *lines[line:]]), b"\n".join([*lines, lines[0], lines[line]]),
            raw.replace(b"error_rate", token, 1), raw + token,
        )[rng.integers(10)]  # fmt: skip
    return raw


def read_or_refuse(raw: bytes) -> RunTable | None:
    """None where the table is refused, in one sentence that names it."""
    try:
        return runs_of(parse_sheet(raw, "fuzz.csv"))
    except TableError as error:
        assert str(error).startswith("fuzz.csv") and "\n" not in str(error) and len(str(error)) < 600
        return None


@pytest.mark.parametrize("start", range(0, 300, 100))
def test_a_table_written_in_any_way_reads_the_same(start: int):
    for seed in range(start, start + 100):
        rows, raw = random_table(np.random.default_rng(seed))
        wanted = tuple(Run(variant="base", **row) for row in rows)  # type: ignore[arg-type]
        assert runs_of(parse_sheet(raw, "fuzz.csv")).runs == wanted, (seed, raw)


@pytest.mark.parametrize("start", range(1000, 1400, 100))
def test_a_broken_table_is_read_or_refused(start: int):
    results = []
    for seed in range(start, start + 100):
        rng = np.random.default_rng(seed)
        results.append(read_or_refuse(broken(random_table(rng)[1], rng)))
    refused = sum(result is None for result in results)
    assert 10 < refused < 95


@pytest.mark.slow
@pytest.mark.parametrize("start", range(10_000, 14_000, 500))
def test_thousands_of_broken_tables_are_read_or_refused(start: int):
    for seed in range(start, start + 500):
        rng = np.random.default_rng(seed)
        read_or_refuse(broken(random_table(rng)[1], rng))
