"""docs/schemas.md names every column and field that the reducer writes."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from dbscale import laws
from dbscale.report import schema
from dbscale.report.table import COLUMNS, REQUIRED, kind_of
from dbscale.study import hunt
from tests.report.verdicts import HELPS_THEN_HURTS, make_contrast, make_verdict

TEXT = (Path(__file__).parents[2] / "docs" / "schemas.md").read_text(encoding="utf-8")
SETTING = {"variant", "upstream_dataset", "dataset"}
PARTS = {
    "## boundary.json": (schema.BoundaryFile,), "**contrasts[]**": (schema.ContrastRecord,), "**verdict**": (laws.Verdict,),
    "**points[]**": (laws.DeltaPoint,), "**noise**": (laws.NoiseModel, laws.Component), "**power**": (laws.Power,),
    "**halves[]**": (schema.HalfRecord, schema.Note), "## laws.json": (schema.LawsFile,),
    "**laws[]**": (schema.LawRecord, schema.ParamRecord, schema.CandidateRecord),
    "**curves[]**": (schema.LawCurve, schema.Band), "**predictions[]**": (schema.Prediction,),
    "**transfer[]**": (schema.TransferRecord,), "**levers[]**": (schema.LeverRecord,),
    "**predictors[]**": (schema.PredictorRecord,), "## hunt.json": (hunt.HuntLog,), "**waves[]**": (hunt.WaveRecord,),
    "**findings[]**": (hunt.Finding,), "**bought[]**": (hunt.Bought,),
}  # fmt: skip


def names_of(record: Any) -> set[str]:
    return {each.name for each in fields(record)} if is_dataclass(record) else set(record.model_fields)


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_is_described_with_its_type(column):
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| `{column}`") and line.count("|") == 4][:1]
    kind = {str: "text", int: "int", float: "float"}[kind_of(column)]
    assert f"| {kind} |" in line
    assert ("•" in line) == (column in REQUIRED)


@pytest.mark.parametrize("part", PARTS)
def test_every_field_is_described_where_its_record_is(part):
    own = re.split(r"\n\*\*|\n## ", TEXT.split(f"\n{part}", 1)[1], maxsplit=1)[0]
    named = set(re.findall(r"`(\w+)`", own))
    known = set().union(*map(names_of, PARTS[part]))
    assert known - SETTING <= named


@pytest.mark.parametrize(
    "kind", [laws.Verdict.__annotations__["kind"], schema.ParamRecord.model_fields["status"].annotation]
)
def test_every_value_of_a_status_is_described(kind):
    values = get_args(kind) or get_args(vars(laws.boundary)[kind])
    assert len(values) > 2 and all(f"`{value}`" in TEXT for value in values)


def test_a_file_that_could_not_be_read_elsewhere_is_not_written(tmp_path: Path):
    """JSON knows no NaN: what has no value is null."""
    verdict = make_verdict(HELPS_THEN_HURTS, root=float("nan"))
    record = schema.BoundaryFile(grid="g", source="s", level=0.9, min_effect=0.005, answers=(), notes=(),
                                 contrasts=(make_contrast(verdict),))  # fmt: skip
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        schema.write(tmp_path / "boundary.json", record)
    assert list(tmp_path.iterdir()) == []
