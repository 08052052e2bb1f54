"""rows.csv holds one row a finished grid point, says what is missing, and reads back as it was written."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from dbscale.errors import TableError
from dbscale.report.findings import Options, find, refresh
from dbscale.report.reduce import collect, load_mistakes, load_plan, read_mistakes, reduce_grid
from dbscale.report.table import COLUMNS, read_table, to_csv
from dbscale.study.store import Row, Store


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


def distinct_row(row: Row, start: int) -> Row:
    """The row with a value of its own in every measured field, counting from `start`."""
    numbers = itertools.count(start)
    timing = row.timing.model_copy(update={
        name: next(numbers) for name in ("train_time_s", "device_time_s", "num_attempts", "eval_time_s")
    } | {"device": f"device {start}", "host": f"host {start}"})  # fmt: skip
    counts = ("num_params", "num_classes", "num_steps", "samples_seen", "num_test_samples", "replaced_samples")
    shares = ("error_rate", "top5_error_rate", "calibration_error", "train_flops", "test_loss", "train_loss")
    return row.model_copy(update={
        "timing": timing, "weights_sha256": f"weights {start}", **{name: next(numbers) for name in counts},
        **{name: next(numbers) / 1000 for name in shares},
    })  # fmt: skip


def test_every_column_comes_from_its_own_field(make_store):
    """Finetune, upstream run and teacher have different values everywhere; a column from the wrong run shows."""
    store = make_store()
    point = next(p for p in load_plan(store, "tiny").points if p.arm == "distilled" and p.seed == 1)
    keys = (point.cell, point.upstream_cell, point.teacher_cell)
    own, upstream, teacher = (distinct_row(store.read_row(key), 100 * place) for place, key in enumerate(keys, start=1))
    copied = {"error_rate": 0.901, "linear_probe_error": 0.902, "transrate": 0.903, "stage": "distill"}
    own = own.model_copy(update={"upstream": own.upstream.model_copy(update=copied), "task": "detection"})
    for row in (own, upstream, teacher):
        store.write_row(row)
    (run,) = (run for run in collect(store, load_plan(store, "tiny")) if run.key == point.cell)
    assert dataclasses.asdict(run) == {
        "variant": "base", "arm": "distilled", "student": point.student, "model": point.model, "num_params": 104,
        "upstream_dataset": "fractals", "upstream_samples": point.upstream_num_samples, "dataset": "digits",
        "downstream_samples": point.num_samples, "seed": 1, "finetune": 0, "task": "detection", "error_rate": 0.11,
            "test_loss": 0.114,
        "top5_error_rate": 0.111, "calibration_error": 0.112, "num_test_samples": 108, "num_classes": 105,
        "train_loss": 0.115, "num_steps": 106, "samples_seen": 107, "train_flops": 0.113, "upstream_stage": "distill",
        "upstream_error_rate": 0.901, "upstream_test_loss": 0.214, "upstream_samples_seen": 207,
        "upstream_train_flops": 0.213, "linear_probe_error": 0.902, "transrate": 0.903, "teacher_params": 304,
        "teacher_error_rate": 0.31, "replaced_samples": 109, "train_time_s": 100, "device_time_s": 101,
        "upstream_device_time_s": 201, "num_attempts": 102, "device": "device 100", "host": "host 100",
        "weights_sha256": "weights 100", "teacher_key": point.teacher_cell, "upstream_key": point.upstream_cell,
        "key": point.cell,
    }  # fmt: skip
    reduce_grid(store, "tiny")
    for name in ("rows.csv", "rows.parquet"):
        assert run in read_table(store.grid_dir("tiny") / name).runs
    with (store.grid_dir("tiny") / "rows.csv").open(encoding="utf-8", newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    types = pyarrow.parquet.read_schema(store.grid_dir("tiny") / "rows.parquet")
    assert tuple(types.names) == COLUMNS
    assert {str(types.field(name).type) for name in ("arm", "key", "host")} == {"string"}
    assert {str(types.field(name).type) for name in ("seed", "num_classes", "teacher_params")} == {"int64"}
    assert {str(types.field(name).type) for name in ("error_rate", "transrate")} == {"double"}


def test_what_a_spreadsheet_does_to_rows_csv_is_undone(make_store):
    """Saved again by Excel: a mark at the start, other line ends and delimiters."""
    store = make_store()
    table = reduce_grid(store, "tiny")
    path = store.grid_dir("tiny") / "rows.csv"
    for text in ("\ufeff" + to_csv(table).replace("\n", "\r\n"), "sep=;\n" + to_csv(table).replace(",", ";")):
        path.write_bytes(text.encode())
        assert read_table(path).runs == table.runs


def test_impossible_results_cost_their_own_cell_and_are_named(make_store):
    store = make_store()
    cell = load_plan(store, "tiny").points[3].cell
    store.write_row(store.read_row(cell).model_copy(update={"error_rate": 1.5}))
    table = reduce_grid(store, "tiny")
    assert len(table) == 71
    (lost,) = table.missing
    assert (lost.culprit, "row.json" in lost.reason, "error_rate" in lost.reason) == (cell, True, True)


CORRECT = np.array([1, 0, 1, 0, 1, 1, 0, 1, 1, 0], bool)
COUNTED = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 1], bool)


def bitmap(path: Path, **changes: Any) -> Path:
    content = {"num_samples": np.int64(10), "correct": np.packbits(CORRECT), "counted": np.packbits(COUNTED)}
    np.savez(path, **{**content, **changes})
    return path


def test_mistakes_are_read_from_packed_bits(make_store, tmp_path: Path):
    path = bitmap(tmp_path / "correct.npz")
    row = a_row(make_store()).model_copy(update={"num_test_samples": 9})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for known in (None, digest):
        found = read_mistakes(path, row.model_copy(update={"correct_sha256": known}))
        assert found.tolist() == [False, True, False, False, False, True, False, False, True]


def test_every_bit_of_the_last_byte_counts(make_store, tmp_path: Path):
    full = np.packbits(np.arange(16) != 15)
    path = bitmap(
        tmp_path / "correct.npz", num_samples=np.int64(16), correct=full, counted=np.packbits(np.ones(16, bool))
    )
    row = a_row(make_store()).model_copy(update={"num_test_samples": 16})
    assert np.flatnonzero(read_mistakes(path, row)).tolist() == [15]


def test_what_samples_add_to_another_tasks_error_is_read_as_it_is(make_store, tmp_path: Path):
    path = tmp_path / "correct.npz"
    errors = np.array([0.5, np.nan, -0.25], np.float32)
    np.savez(path, num_samples=np.int64(3), counted=np.packbits([True, False, True]), errors=errors)
    row = a_row(make_store()).model_copy(update={"num_test_samples": 2, "task": "segmentation"})
    assert read_mistakes(path, row).tolist() == [0.5, -0.25], "the second could not be decoded"
    with pytest.raises(TableError, match="cannot be used"):
        read_mistakes(path, row.model_copy(update={"task": "classification"}))
    np.savez(path, num_samples=np.int64(3), counted=np.packbits([True, False, True]), errors=errors[:2])
    with pytest.raises(TableError, match="does not hold a number for each of 3 samples"):
        read_mistakes(path, row)


def a_row(store: Store) -> Row:
    row = store.read_row(load_plan(store, "tiny").points[0].cell)
    assert row is not None
    return row


DAMAGE = {
    "nothing": lambda path: path.write_bytes(b""),
    "no zip": lambda path: path.write_bytes(b"not a zip"),
    "half a zip": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "no file": lambda path: path.unlink(),
    "a count that no memory holds": lambda path: bitmap(path, num_samples=np.int64(2**60)),
    "a sample too many": lambda path: bitmap(path, num_samples=np.int64(17)),
    "no numbers": lambda path: bitmap(path, correct=np.array(["a", "b"])),
    "other samples counted": lambda path: bitmap(path, counted=np.packbits(CORRECT)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bitmap_costs_its_cell_and_is_named(make_store, tmp_path: Path, damage: str):
    row = a_row(make_store()).model_copy(update={"num_test_samples": 9})
    path = bitmap(tmp_path / "correct.npz")
    DAMAGE[damage](path)
    with pytest.raises(
        TableError, match=r"correct\.npz (cannot be used|counts 6 samples, the cell's row 9).*run the cell again"
    ):
        read_mistakes(path, row)


def test_another_cells_bitmap_is_refused_and_the_others_are_used(make_store):
    """Sound by itself, but not the one that the row names."""
    store = make_store()
    keys = [point.cell for point in load_plan(store, "tiny").points[:3]]
    for number, key in enumerate(keys):
        path = bitmap(store.cell_dir(key) / "correct.npz", correct=np.packbits(np.arange(10) > number))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        row = store.read_row(key)
        store.write_row(row.model_copy(update={"num_test_samples": 9, "correct_sha256": digest}))
    first, second, _ = (store.cell_dir(key) / "correct.npz" for key in keys)
    first.write_bytes(second.read_bytes())
    found, damaged = load_mistakes(store, keys)
    assert sorted(found) == sorted(keys[1:])
    assert len(damaged) == 1 and keys[0] in damaged[0] and "is not what the cell's row describes" in damaged[0]
    table, findings = refresh(store, "tiny")
    assert damaged[0] in [note.text for note in findings.boundary.notes]
    assert len(table) == 72, "the cell's result stands"


def test_the_grids_smallest_effect_reaches_the_verdicts(make_store):
    store = make_store()
    plan = load_plan(store, "tiny").model_copy(update={"min_effect": 0.03})
    table = collect(store, plan)
    assert table.min_effect == 0.03
    assert Options().min_effect == 0.005
    found = find(table, options=None)
    assert found.boundary.min_effect == 0.03
