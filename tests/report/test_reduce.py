"""rows.csv holds one row a finished grid point, says what is missing, and reads back as it was written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbscale.errors import TableError
from dbscale.report.csv_rows import from_records, to_csv
from dbscale.report.reduce import read_table, reduce_grid
from dbscale.report.table import COLUMNS, REQUIRED, Run, RunTable
from dbscale.study.store import Store


def test_every_finished_point_is_a_row(make_store):
    store = make_store()
    table = reduce_grid(store, "tiny")
    assert len(table) == 2 * 2 * 2 * (1 + 2 * 4)  # seeds, D_f, students, scratch and two arms of four D_p
    assert not table.missing
    assert table.arms == ("plain", "distilled")
    assert table.students == ("h2", "h4")
    assert all(run.upstream_dataset == "" for run in table.scratch)
    assert all(run.teacher_params == 50_000 for run in table.where(arm="distilled"))
    assert all(run.linear_probe_error is not None for run in table.pretrained)


def test_a_failed_teacher_is_named_for_every_point_it_blocks(make_store):
    store = make_store(failed=lambda cell: cell.recipe.model.heads == 1 and cell.recipe.data.num_samples == 2000)
    table = reduce_grid(store, "tiny")
    assert {point.arm for point in table.missing} == {"distilled"}
    assert {point.upstream_samples for point in table.missing} == {2000}
    assert len(table.missing) == 2 * 2 * 2
    assert {(point.state, point.reason, point.log) for point in table.missing} == {
        ("failed", "non-finite <loss> at step 7", "logs/one.txt")
    }
    assert all(point.culprit.startswith("pretrain-") for point in table.missing)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_tables_read_back_as_written(make_store, name):
    store = make_store()
    table = reduce_grid(store, "tiny")
    again = read_table(store.grid_dir("tiny") / name)
    assert again.runs == table.runs


def test_reducing_twice_gives_the_same_file(make_store):
    store = make_store()
    path = store.grid_dir("tiny") / "rows.csv"
    reduce_grid(store, "tiny")
    first = path.read_bytes()
    reduce_grid(store, "tiny")
    assert path.read_bytes() == first


def test_unplanned_grid_names_the_nearest(make_store):
    with pytest.raises(TableError, match="did you mean 'tiny'"):
        reduce_grid(make_store(), "tinny")


def test_empty_store_says_what_to_do(tmp_path: Path):
    with pytest.raises(TableError, match="dbscale submit"):
        reduce_grid(Store(tmp_path), "demo")


def record_of(**changes: object) -> dict[str, object]:
    run = Run(
        variant="base", arm="plain", student="h2", num_params=10, upstream_dataset="up", upstream_samples=100,
        dataset="down",
        downstream_samples=10, seed=0, error_rate=0.5,
    )  # fmt: skip
    return {
        **{name: value for name, value in dataclasses.asdict(run).items() if value not in (None, "")},
        **changes,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error_rate": "nan"}, "error_rate is 'nan'"),
        ({"error_rate": 50.0}, "shares between 0 and 1"),
        ({"error_rate": "low"}, "not a number"),
        ({"num_params": 0}, "num_params is 0"),
        ({"downstream_samples": -3}, "downstream_samples is -3"),
        ({"upstream_samples": 10.5}, "not a whole number"),
        ({"arm": "distiled"}, "did you mean 'distilled'"),
        ({"arm": "scratch"}, "0 goes with scratch"),
        ({"seed": ""}, "'seed' is empty"),
    ],
)
def test_bad_values_name_row_column_and_value(change, message):
    with pytest.raises(TableError, match=message) as caught:
        from_records(
            [record_of(), record_of(seed=1, **change) if "seed" not in change else record_of(**change)],
            COLUMNS,
            where="t.csv",
        )
    assert "t.csv, row 2" in str(caught.value)


@pytest.mark.parametrize("column", [name for name in REQUIRED if name not in ("variant", "student")])
def test_a_missing_column_is_named(column):
    header = [name if name != column else f"{name}s" for name in COLUMNS]
    with pytest.raises(TableError, match=f"no column '{column}'; did you mean '{column}s'"):
        from_records([record_of()], header, where="t.csv")


def test_equal_rows_count_once_and_contradictions_are_refused():
    table = from_records([record_of(), record_of()], COLUMNS, where="t.csv")
    assert len(table) == 1
    assert any("repeated rows" in note for note in table.warnings)
    with pytest.raises(TableError, match="already has error_rate"):
        from_records([record_of(), record_of(error_rate=0.4)], COLUMNS, where="t.csv")


def test_mixed_studies_and_extreme_errors_are_noted():
    records = [record_of(num_classes=10), record_of(num_classes=100, seed=1, error_rate=0.0)]
    notes = " ".join(from_records(records, COLUMNS, where="t.csv").warnings)
    assert "two studies mixed" in notes
    assert "exactly 0 or 1" in notes


def test_a_foreign_table_needs_only_the_measured_columns(tmp_path: Path):
    path = tmp_path / "theirs.csv"
    path.write_text(
        "arm,num_params,upstream_samples,dataset,downstream_samples,seed,error_rate,notes\n"
        "plain,25557032,1000,imagenet,1281167,0,0.25,good\n"
    )
    table = read_table(path)
    assert table.runs[0].student == "25,557,032 parameters"
    assert "notes" in table.warnings[0]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_floats_survive_csv_exactly(errors):
    runs = tuple(
        dataclasses.replace(from_records([record_of()], COLUMNS, where="t").runs[0], seed=i, error_rate=e)
        for i, e in enumerate(errors)
    )
    lines = to_csv(RunTable(runs)).splitlines()
    header = lines[0].split(",")
    again = from_records([dict(zip(header, line.split(","), strict=True)) for line in lines[1:]], header, where="t")
    assert again.runs == runs


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_a_file_that_is_no_table_is_named(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(bytes(range(256)))
    with pytest.raises(TableError, match=f"{name} is not a"):
        read_table(path)
