"""Tables as the field sends them: the boundary that was put in comes out, or a sentence says why it does not.

Plain runs err by 0.5 − 0.02·(log2 D_p − 9), distilled ones by 0.01·(12 − log2 D_p) less: ΔE is 3, 2, 1, −1, −2 and −3
points at 512, 1,024, 2,048, 8,192, 16,384 and 32,768 upstream images, and the boundary lies at 4,096. Seeds differ in the
level by 0.2 points and in ΔE by 0.1.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from dbscale.launch.cli import main
from dbscale.laws import judge
from dbscale.report import schema
from dbscale.report.pairing import pair_arms
from dbscale.report.schema import BoundaryFile
from dbscale.report.table import read_table

Rows = list[dict[str, Any]]
DELTA = {512: 0.03, 1024: 0.02, 2048: 0.01, 8192: -0.01, 16_384: -0.02, 32_768: -0.03}


def study() -> Rows:
    return [
        {
            "arm": arm, "num_params": 50_000, "upstream_dataset": "up", "upstream_samples": upstream, "dataset": "birds",
            "downstream_samples": 1000, "seed": seed,
            "error_rate": round(0.5 - 0.02 * (math.log2(upstream) - 9) + 0.002 * seed
                                - (delta + 0.0005 * (-1) ** seed if arm == "distilled" else 0), 6),
        }
        for arm in ("plain", "distilled") for upstream, delta in DELTA.items() for seed in range(4)
    ]  # fmt: skip


def as_csv(rows: Rows, delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def assert_boundary(path: Path, **columns: str) -> None:
    """What the table's pairs say, by the value."""
    table = read_table(path, columns)
    pairs, notes = pair_arms(table, table.settings[0])
    assert pairs is not None and notes == ()
    verdict = judge(pairs)
    assert (verdict.kind, verdict.direction) == ("crossing", "b_to_a")
    assert [(point.x, round(point.delta, 6)) for point in verdict.points] == list(DELTA.items())
    assert verdict.root == pytest.approx(4096, rel=0.05)


def changed(**change: Callable[[Any], Any]) -> Rows:
    return [{**row, **{name: new(row.get(name)) for name, new in change.items()}} for row in study()]


SPELLINGS: dict[str, Callable[[], str]] = {
    "German Excel": lambda: as_csv(study(), ";").replace(".", ","),
    "tabs and Windows": lambda: "\ufeff" + as_csv(study(), "\t"),
    "comments": lambda: "# from the lab's notebook\n" + as_csv(study()) + "# the end\n",
    "counts and per cent": lambda: as_csv(changed(
        num_params=lambda n: f"{n // 1000}K", downstream_samples=lambda n: f"{n:,}", upstream_samples=lambda n: f"{n:,}",
        error_rate=lambda e: f"{100 * e:.6g} %")),
    "NA of R": lambda: as_csv(changed(top5_error_rate=lambda _: "NA", train_loss=lambda _: "NaN", host=lambda _: "NA")),
    "JSON lines": lambda: "".join(json.dumps(row) + "\n" for row in study()),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_boundary_is_found_in_any_spelling(tmp_path: Path, spelling: str):
    path = tmp_path / "rows.csv"
    path.write_bytes(SPELLINGS[spelling]().encode())
    assert_boundary(path)


def test_nan_of_parquet_is_missing(tmp_path: Path):
    path = tmp_path / "rows.csv"  # known by content
    pa.parquet.write_table(pa.Table.from_pylist([{**row, "top5_error_rate": math.nan} for row in study()]), path)
    assert_boundary(path)


def test_columns_of_other_names_are_pointed_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, out = tmp_path / "theirs.csv", tmp_path / "out"
    path.write_text(as_csv(study(), ";").replace(".", ",").replace("error_rate", "top1=err"))
    assert main(["reduce", "--table", str(path)]) == 1
    assert "no column 'error_rate'; known: arm, dataset" in capsys.readouterr().err
    assert main(["reduce", "--table", str(path), "--column", "error_rate"]) == 1
    assert "--column 'error_rate': write NAME=COLUMN" in capsys.readouterr().err
    assert_boundary(path, error_rate="top1=err")
    assert main(["reduce", "--table", str(path), "--out", str(out), "--column", "error_rate=top1=err"]) == 0
    record = schema.read(BoundaryFile, out / "boundary.json").contrasts[0]
    assert record.verdict is not None and record.verdict.kind == "crossing"


def test_a_table_is_judged_by_a_difference_and_a_level_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "theirs.csv"
    path.write_text(as_csv(study()))
    for command, options in (("reduce", ()), ("reduce", ("--min-effect", "0.3")), ("report", ("--level", "0.8"))):
        assert main([command, "--table", str(path), "--out", str(tmp_path / "out"), *options]) == 0
        found = schema.read(BoundaryFile, tmp_path / "out" / "boundary.json")
        judged = {"--min-effect": found.min_effect, "--level": found.level}
        assert judged == {"--min-effect": 0.005, "--level": 0.9} | dict(
            zip(options[::2], map(float, options[1::2]), strict=True)
        )
    capsys.readouterr()
    assert main(["reduce", "--table", str(path), "--min-effect", "2"]) == 1
    assert "--min-effect 2: write a share between 0 and 1" in capsys.readouterr().err
    assert main(["reduce", "demo", "--store", str(tmp_path), "--level", "0.8"]) == 1
    assert "--level belongs to --table" in capsys.readouterr().err


def test_rows_longer_than_the_header_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Thousands without quotes in the last column: 1,024 read as 1, the boundary as about 8."""
    rows = [{**{k: v for k, v in row.items() if k != "upstream_samples"}, "upstream_samples": f"{row['upstream_samples']:,}"}
            for row in study()]  # fmt: skip
    path = tmp_path / "rows.csv"
    path.write_text(as_csv(rows).replace('"', ""))
    assert main(["reduce", "--table", str(path), "--out", str(tmp_path)]) == 1
    assert "rows.csv, line 6: 9 cells under a header of 8 (line 1)" in capsys.readouterr().err
    path.write_text(as_csv(rows))
    assert_boundary(path)


def test_arms_of_different_size_need_a_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = study()
    for row in rows:
        row["num_params"] += 1930 * (row["arm"] == "distilled")
    path = tmp_path / "rows.csv"
    path.write_text(as_csv(rows))
    why = "student: plain has '50,000 parameters', distilled has '51,930 parameters'; the arms' models differ in size: add"
    table = read_table(path)
    pairs, notes = pair_arms(table, table.settings[0])
    assert pairs is None and why in notes[0]
    assert main(["advise", "--table", str(path), "--dp", "20k", "--df", "1000", "--params", "50k"]) == 1
    assert why in capsys.readouterr().err
    path.write_text(as_csv([{**row, "student": "S"} for row in rows]))
    assert_boundary(path)


def test_advice_beyond_the_measured_sizes_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "rows.csv"
    path.write_text(as_csv(study()))
    ask = ["advise", "--table", str(path), "--dp", "20k", "--df", "1000", "--params"]
    assert main([*ask, "50k"]) == 0
    assert "extrapolation" not in capsys.readouterr().out
    assert main([*ask, "5M"]) == 0
    assert "This point is an extrapolation: 5,000,000 parameters are above the measured" in capsys.readouterr().out
