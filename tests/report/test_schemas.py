"""docs/schemas.md names every column and field that the reducer writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbscale.report import schema
from dbscale.report.table import COLUMNS, KINDS, REQUIRED

TEXT = (Path(__file__).parents[2] / "docs" / "schemas.md").read_text(encoding="utf-8")
SETTING = {"variant", "upstream_dataset", "dataset"}
RECORDS = (
    schema.LawsFile, schema.FitRecord, schema.Curve, schema.Prediction, schema.TransferRecord, schema.BoundaryFile,
    schema.BoundaryRecord, schema.DeltaPoint,
)  # fmt: skip


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_is_described_with_its_type(column):
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| `{column}`") and line.count("|") == 4][:1]
    kind = {str: "text", int: "int", float: "float"}[getattr(KINDS[column], "__args__", (KINDS[column],))[0]]
    assert f"| {kind} |" in line
    assert ("•" in line) == (column in REQUIRED and column not in ("variant", "student"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_field_is_described(record):
    missing = [name for name in record.model_fields if name not in SETTING and f"`{name}`" not in TEXT]
    assert not missing


@pytest.mark.parametrize("kind", [schema.BoundaryStatus, schema.Direction])
def test_every_value_of_a_status_is_described(kind):
    assert all(f"`{value}`" in TEXT for value in kind.__args__)
