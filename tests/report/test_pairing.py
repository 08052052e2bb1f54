"""Pairs by hand: which rows belong together, what their differences are, and which column keeps the others apart."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbscale.errors import TableError
from dbscale.launch.cli import main
from dbscale.laws import Pairs
from dbscale.report import pairing
from dbscale.report.pairing import pair_arms, pair_rows, pair_upstream
from dbscale.report.reader import parse_sheet
from dbscale.report.sheet import Sheet
from dbscale.report.table import Run, RunTable, runs_of


def sheet_of(text: str) -> Sheet:
    return parse_sheet(text.encode(), "t.csv")


def rows_of(pairs: Pairs, *names: str) -> list[tuple[Any, ...]]:
    return sorted(zip(*(getattr(pairs, name).tolist() for name in names), strict=True), key=str)


TWO_MODELS = """model,seed,dataset,flops,loss
x,0,birds,10,3.0
x,0,birds,100,2.0
x,1,birds,10,3.5
x,1,birds,100,2.5
y,1,birds,100,2.25
y,1,birds,10,3.0
y,0,birds,100,2.25
y,0,birds,10,2.0
z,0,birds,10,9.0
"""
OPTIONS = {"a": {"model": "x"}, "b": {"model": "y"}, "along": "flops", "metric": "loss", "pair": ["seed"]}


def compare(text: str, **options: Any) -> tuple[Pairs, tuple[str, ...]]:
    return pair_rows(sheet_of(text), **(OPTIONS | options))


def test_differences_are_a_minus_b_of_rows_that_agree():
    pairs, notes = compare(TWO_MODELS)
    assert rows_of(pairs, "x", "seed", "delta") == [(10, 0, 1.0), (10, 1, 0.5), (100, 0, -0.25), (100, 1, 0.25)]
    assert notes == ()


def test_every_argument_counts():
    pairs, _ = compare(TWO_MODELS, a={"model": "y"}, b={"model": "x"})
    assert rows_of(pairs, "x", "seed", "delta")[0] == (10, 0, -1.0)
    pairs, notes = compare(TWO_MODELS, b={"model": "z"})
    assert rows_of(pairs, "x", "delta") == [(10, -6.0)]
    assert notes == (
        "3 of 4 rows of model=x have no partner; model=x has a row with flops 10, seed 1, model=z has none",
    )
    pairs, _ = compare(TWO_MODELS, along="loss", metric="flops", a={"model": "x", "seed": "0"}, pair=["dataset"],
                       b={"model": "y", "seed": "0"})  # fmt: skip
    assert rows_of(pairs, "x", "seed", "delta") == [(2.0, "birds", 90)]


def test_further_pair_columns_are_strata():
    strata = [("birds", 100, "a", 1), ("fish", 100, "a", 2), ("fish", 200, "b", 3)]
    text = "model,seed,dataset,labels,head,flops,loss\n" + "".join(
        f"{model},0,{dataset},{labels},{head},10,{value + (model == 'x')}\n"
        for model in "xy" for dataset, labels, head, value in strata
    )  # fmt: skip
    one, _ = compare(text, pair=["seed", "dataset", "labels"])
    assert rows_of(one, "student", "labels", "delta") == [("birds", 100, 1), ("fish", 100, 1), ("fish", 200, 1)]
    by_labels, _ = compare(text.replace(",100,b", ",300,b").replace("fish,100", "fish,300"), pair=["seed", "labels"])
    assert rows_of(by_labels, "student", "delta") == [(100, 1), (200, 1), (300, 1)]
    assert len(set(by_labels.labels.tolist())) == 1
    two, _ = compare(text, pair=["seed", "dataset", "labels", "head"])
    assert rows_of(two, "student", "labels") == [("birds", "100 / a"), ("fish", "100 / a"), ("fish", "200 / b")]


def test_labels_pair_as_numbers():
    pairs, _ = compare("model,seed,flops,loss\nx,0,1e3,3\ny,0.0,1K,2\n")
    assert rows_of(pairs, "x", "seed", "delta") == [(1000, 0, 1)]


def test_sides_measured_elsewhere_are_interpolated_in_log_x():
    """B at 10 and 1000 is 4 and 2, so at 100, half way on the log scale, 3; A's 1 and 10,000 lie outside."""
    text = "model,seed,flops,loss\n" + "".join(f"x,0,{x},{y}\n" for x, y in [(1, 9), (100, 5), (10_000, 1)])
    pairs, notes = compare(text + "y,0,10,4\ny,0,1000,2\n")
    assert rows_of(pairs, "x", "seed", "delta") == [(100, 0, pytest.approx(2.0))]
    assert notes == (
        "the two sides were not measured at the same flops: their values at 3 flops of a were interpolated linearly in "
        "log flops, each inside its own range; 2 points lie outside of one and were left out",
    )


def test_interpolation_puts_all_repetitions_on_one_grid():
    """Seed 1 of A was measured elsewhere (a run's wall time, say): both sides are read at the longest curve's x."""
    a = [(0, 10, 1.0), (0, 100, 2.0), (0, 1000, 3.0), (1, math.sqrt(10), 0.0), (1, 2000, 4.0)]
    b = [(seed, x, 0.0) for seed in (0, 1) for x in (5, 5000)]
    text = "model,seed,flops,loss\n" + "".join(
        f"{m},{s},{x!r},{y}\n" for m, rows in (("x", a), ("y", b)) for s, x, y in rows
    )
    pairs, _ = compare(text)
    slope = 4 / math.log(2000 / math.sqrt(10))
    wanted = [4 - slope * math.log(2000 / x) for x in (10, 100, 1000)]
    found = rows_of(pairs, "seed", "x", "delta")
    assert [row[:2] for row in found] == [(0, 10), (0, 100), (0, 1000), (1, 10), (1, 100), (1, 1000)]
    assert [row[2] for row in found] == pytest.approx([1, 2, 3, *wanted])


@pytest.mark.parametrize(("shared", "num_x"), [(2, 2), (1, 4)])
def test_the_grid_is_what_all_repetitions_share_if_that_is_half(shared: int, num_x: int):
    """Of four x of each repetition of A the first few are those of the other too; B stands at the ends."""
    text = "model,seed,flops,loss\n" + "".join(
        f"x,{seed},{x if place < shared else x + seed},1\n"
        for seed in (0, 1)
        for place, x in enumerate([10, 20, 30, 40])
    )
    pairs, _ = compare(text + "".join(f"y,{seed},{x},0\n" for seed in (0, 1) for x in (1, 100)))
    assert len(set(pairs.x.tolist())) == num_x and len(pairs.x) == 2 * num_x


def test_a_gap_is_not_filled_where_most_rows_pair():
    text = TWO_MODELS.replace("y,0,birds,100,2.25\n", "") + "x,0,birds,1000,1\ny,0,birds,1000,1\n"
    pairs, notes = compare(text)
    assert rows_of(pairs, "x", "seed") == [(10, 0), (10, 1), (100, 1), (1000, 0)]
    assert notes == (
        "1 of 5 rows of model=x have no partner; model=x has a row with flops 100, seed 0, model=y has none",
    )


def test_half_of_a_side_measured_alike_is_enough_to_compare_measured_values():
    """Two of the four x of either side are the other's too: nothing is interpolated, and what is left over is told."""
    text = "model,seed,flops,loss\n" + "".join(f"x,0,{x},{y}\n" for x, y in [(10, 9), (20, 7), (40, 5), (80, 3)])
    pairs, notes = compare(text + "".join(f"y,0,{x},{y}\n" for x, y in [(10, 8), (30, 6), (40, 4), (60, 2)]))
    assert rows_of(pairs, "x", "delta") == [(10, 1), (40, 1)]
    assert notes == (
        "2 of 4 rows of model=x and 2 of 4 rows of model=y have no partner; what keeps them apart is flops: model=x has "
        "20, 80, model=y has 30, 60",
    )


def test_what_only_the_second_side_has_is_told_as_its_own():
    pairs, notes = compare(TWO_MODELS.replace("x,0,birds,10,3.0\n", ""))
    assert rows_of(pairs, "x", "seed") == [(10, 1), (100, 0), (100, 1)]
    assert notes == (
        "1 of 4 rows of model=y have no partner; model=y has a row with flops 10, seed 0, model=x has none",
    )


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TWO_MODELS.replace("y,0", "y,2").replace("y,1", "y,3"), {},
         "no row of model=x pairs with one of model=y; what keeps them apart is seed: model=x has 0, 1, model=y has 2, 3"),
        (TWO_MODELS.replace("birds", "Birds", 4), {"pair": ["seed", "dataset"]},
         "apart is dataset: model=x has 'Birds', model=y has 'birds' .'Birds' and 'birds' differ in spelling only"),
        (TWO_MODELS.replace(",10,", ",5,", 2), {"a": {"model": "x", "flops": "5"}},
         "apart is flops: model=x, flops=5 has 5, model=y has 10, 100"),
        ("model,seed,dataset,flops,loss\nx,0,a,1,1\nx,1,b,1,1\ny,0,b,1,1\ny,1,a,1,1\n", {"pair": ["seed", "dataset"]},
         "model=x has a row with flops 1, seed 0, dataset 'a', model=y has none"),
        (TWO_MODELS.replace("y,0", "y,2").replace("y,1", "y,3").replace("birds", "fish", 4), {"pair": ["seed", "dataset"]},
         "apart is seed: model=x has 0, 1, model=y has 2, 3; what keeps them apart is dataset: .*'fish', .*'birds'"),
        (TWO_MODELS, {"a": {"model": "w"}}, "t.csv: no row has model=w; did you mean|no row has model=w; known: x, y, z"),
        (TWO_MODELS, {"a": {"model": "x", "loss": "9"}}, "no row has model=x and loss=9; each side needs"),
        (TWO_MODELS, {"b": {"seed": "0"}}, "t.csv, line 2 is a row of both sides; let a and b differ"),
        (TWO_MODELS, {"pair": []}, "no column to pair by; name the one of the repetition, such as seed"),
        (TWO_MODELS, {"pair": ["sed"]}, "no column 'sed'; did you mean 'seed'"),
        (TWO_MODELS, {"along": "flop"}, "no column 'flop'; did you mean 'flops'"),
        (TWO_MODELS, {"metric": "model"}, "line 2: model is 'x', not a number"),
        (TWO_MODELS, {"pair": ["dataset"]}, "line 4 has the flops '10', dataset 'birds' of line 2; pair by what tells "
                                            "them apart too .seed."),
        (TWO_MODELS + "x,0,birds,10,3.0\n", {}, "line 11 has the flops '10', seed '0' of line 2; remove one of them"),
        (TWO_MODELS.replace("x,1", "x,"), {}, "line 4: seed is empty; fill it in, leave it out of the pair columns"),
    ],
)  # fmt: skip
def test_what_does_not_pair_is_explained_by_column(text: str, options: dict[str, Any], message: str):
    with pytest.raises(TableError, match=message):
        compare(text, **options)


def test_of_many_values_the_first_four_are_named_numbers_before_words():
    assert pairing._few([5, 4.0, 2.5, "b", 1]) == "1, 2.5, 4, 5, …"
    assert pairing._few(["b", 4.0, 2.5, 1]) == "1, 2.5, 4, 'b'"


def test_rows_without_a_value_are_left_out_and_told():
    pairs, notes = compare(
        TWO_MODELS.replace("x,0,birds,10,3.0", "x,0,birds,10,NA").replace("y,1,birds,100", "y,1,birds,0")
    )
    assert rows_of(pairs, "x", "seed") == [(10, 1), (100, 0)]
    assert notes[:2] == ("1 rows without loss, or with flops not above 0, were left out",) * 2


# The arms of a study.


def run_of(arm: str, error: float, **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "variant": "base", "arm": arm, "student": "S", "num_params": 10, "upstream_dataset": "up", "upstream_samples": 100,
        "dataset": "down", "downstream_samples": 20, "seed": 0, "error_rate": error,
    } | changes  # fmt: skip
    return Run(**fields)


def both_arms(plain: float, distilled: float, **changes: Any) -> list[Run]:
    return [run_of("plain", plain, **changes), run_of("distilled", distilled, **changes)]


def arms_of(runs: list[Run], **options: Any) -> tuple[Pairs | None, tuple[str, ...]]:
    table = RunTable(tuple(runs))
    return pair_arms(table, table.settings[0], **options)


def test_arms_pair_by_student_size_labels_seed_and_draw():
    runs = [
        *both_arms(0.5, 0.25), *both_arms(0.5, 0.375, upstream_samples=200), *both_arms(0.5, 0.75, downstream_samples=30),
        *both_arms(0.5, 0.625, seed=1), *both_arms(0.5, 0.5, finetune=1), *both_arms(0.25, 0.5, student="T", num_params=20),
        run_of("plain", 0.9, student="teacher"), run_of("scratch", 0.9, upstream_samples=0, upstream_dataset=""),
        *both_arms(0.9, 0.1, dataset="other"), *both_arms(0.9, 0.1, variant="other"),
    ]  # fmt: skip
    pairs, notes = arms_of(runs)
    assert pairs is not None and notes == ()
    assert rows_of(pairs, "student", "x", "labels", "seed", "draw", "delta") == [
        ("S", 100, 20, 0, 0, 0.25), ("S", 100, 20, 0, 1, 0.0), ("S", 100, 20, 1, 0, -0.125), ("S", 100, 30, 0, 0, -0.25),
        ("S", 200, 20, 0, 0, 0.125), ("T", 100, 20, 0, 0, -0.25),
    ]  # fmt: skip


def test_teachers_and_the_metric_are_taken_from_the_runs():
    runs = both_arms(0.5, 0.25, test_loss=2.0) + both_arms(0.5, 0.25, seed=1, test_loss=1.0)
    runs[1] = dataclasses.replace(runs[1], teacher_key="teacher 0", test_loss=1.75)
    pairs, _ = arms_of(runs, metric="test_loss")
    assert pairs is not None
    assert rows_of(pairs, "seed", "delta", "test_variance") == [(0, 0.25, 0), (1, 0.0, 0)]
    assert pairs.teacher.tolist()[0] != "teacher 0"  # one teacher is not known: none is taken
    runs[3] = dataclasses.replace(runs[3], teacher_key="teacher 1")
    known, _ = arms_of(runs)
    assert known is not None and rows_of(known, "seed", "teacher") == [(0, "teacher 0"), (1, "teacher 1")]


def test_the_test_sets_noise_is_paired_by_sample():
    """Of 4 images plain errs on 2, distilled on 1 of these and 1 other: differences 1, 0, 0, −1 have variance 1/2."""
    runs = [dataclasses.replace(run, key=run.arm) for run in both_arms(0.5, 0.5)]
    wrong = {"plain": np.array([True, True, False, False]), "distilled": np.array([False, True, False, True])}
    pairs, _ = arms_of(runs, wrong=wrong)
    assert pairs is not None and pairs.by_sample is not None
    assert pairs.by_sample[0].tolist() == [1, 0, 0, -1]
    assert pairs.test_variance.tolist() == [0.5 / 4]
    unequal, _ = arms_of(runs, wrong=wrong | {"plain": np.array([True])})
    assert unequal is not None and unequal.by_sample is None and unequal.test_variance.tolist() == [0]


def test_the_test_sets_noise_of_other_tasks_is_paired_by_sample_too():
    """What each image adds to 1 − mIoU: differences .25, −.25 have variance 1/16."""
    runs = [dataclasses.replace(run, key=run.arm) for run in both_arms(0.5, 0.5)]
    wrong = {"plain": np.array([0.5, 0.25], np.float32), "distilled": np.array([0.25, 0.5], np.float32)}
    pairs, _ = arms_of(runs, wrong=wrong)
    assert pairs is not None and pairs.by_sample is not None
    assert pairs.by_sample[0].tolist() == [0.25, -0.25] and pairs.test_variance.tolist() == [1 / 16 / 2]
    mixed, _ = arms_of(runs, wrong=wrong | {"plain": np.array([True, False])})
    assert mixed is not None and mixed.by_sample is None, "of two tasks, nothing can be paired"


def test_without_single_results_the_binomial_bounds_the_noise():
    pairs, _ = arms_of(both_arms(0.5, 0.2, num_test_samples=100))
    assert pairs is not None and pairs.test_variance.tolist() == pytest.approx([0.0025 + 0.0016])


def test_the_upstream_contrast_counts_each_upstream_run_once():
    up = {"upstream_error_rate": 0.5, "upstream_test_loss": 1.5, "upstream_key": "p"}
    other = {"upstream_error_rate": 0.375, "upstream_test_loss": 1.0, "upstream_key": "d", "teacher_key": "t"}
    runs = [
        dataclasses.replace(run, **(up if run.arm == "plain" else other))
        for changes in ({}, {"downstream_samples": 30}, {"dataset": "other"}, {"finetune": 1})
        for run in both_arms(0.9, 0.1, **changes)
    ]
    table = RunTable((*runs, *both_arms(0.9, 0.1, seed=1), *both_arms(0.9, 0.1, variant="v", upstream_error_rate=0.2)))
    wrong = {"p": np.array([True, False]), "d": np.array([False, False])}
    pairs, notes = pair_upstream(table, table.settings[0], wrong=wrong)
    assert pairs is not None and notes == ()
    assert rows_of(pairs, "student", "x", "seed", "delta", "teacher", "test_variance") == [
        ("S", 100, 0, 0.125, "t", 0.125)
    ]
    loss, _ = pair_upstream(table, table.settings[0], metric="test_loss")
    assert loss is not None and rows_of(loss, "seed", "delta", "test_variance") == [(0, 0.5, 0)]
    runs[2] = dataclasses.replace(runs[2], upstream_error_rate=0.25)
    first, said = pair_upstream(RunTable(tuple(runs)), table.settings[0])
    assert first is not None and first.delta.tolist() == [0.125]
    assert said == ("1 rows give another upstream_error_rate than the first row of their run, which was used",)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([run_of("plain", 0.5)], "no distilled run has error_rate: there is nothing to compare"),
        ([run_of("distilled", 0.5)], "no plain run has error_rate: there is nothing to compare"),
        ([run_of("plain", 0.5), run_of("distilled", 0.5, seed=7)],
         "no plain run pairs with a distilled one; what keeps them apart is seed: plain has 0, distilled has 7"),
        ([run_of("plain", 0.5), run_of("distilled", 0.5, dataset="Down")],
         "no distilled run of base, up, down has error_rate; what keeps them apart is dataset: plain has 'down', "
         "distilled has 'Down' ('Down' and 'down' differ in spelling only; if they are one, write them alike)"),
        ([run_of("plain", 0.5, student="10 parameters"), run_of("distilled", 0.5, num_params=12, student="12 parameters")],
         "no plain run pairs with a distilled one; what keeps them apart is student: plain has '10 parameters', distilled "
         "has '12 parameters'; the arms' models differ in size: add a column `student` that names each model alike in "
         "both arms"),
    ],
)  # fmt: skip
def test_arms_that_do_not_pair_are_explained(runs: list[Run], message: str):
    assert arms_of(runs) == (None, (message,))


def test_students_of_other_names_need_no_further_column():
    (why,) = arms_of([run_of("plain", 0.5), run_of("distilled", 0.5, student="T")])[1]
    assert why.endswith("what keeps them apart is student: plain has 'S', distilled has 'T'")
    sizes = [run_of("plain", 0.5, student="10 parameters"), run_of("distilled", 0.5, student="10 parameters", seed=1)]
    (why,) = arms_of(sizes)[1]
    assert why.endswith("what keeps them apart is seed: plain has 0, distilled has 1")


def test_a_student_column_pairs_models_of_different_size():
    """A distillation head adds 1,930 parameters: by name the arms are one model."""
    header = "arm,student,num_params,upstream_dataset,upstream_samples,dataset,downstream_samples,seed,error_rate\n"
    text = header + "plain,S,50000,up,1000,birds,100,0,0.5\ndistilled,S,51930,up,1000,birds,100,0,0.25\n"
    table = runs_of(sheet_of(text))
    pairs, notes = pair_arms(table, table.settings[0])
    assert pairs is not None and notes == () and pairs.delta.tolist() == [0.25]


def test_what_is_left_over_is_told(make_table):
    table = make_table(students={"h2": 200_000}, downstream=(100,)).where(
        lambda run: not (run.arm == "distilled" and run.seed == 1)
    )
    pairs, notes = pair_arms(table, table.settings[0])
    assert pairs is not None and set(pairs.seed.tolist()) == {0, 2} and len(pairs.x) == 10
    assert notes == (
        "5 of 15 runs of plain have no partner; what keeps them apart is seed: plain has 1, distilled has 0, 2",
    )


# At the command line.


def study(slope: float, seeds: int = 4) -> str:
    """Two recipes along compute: x wins below 1,000, y above, by `slope` a decade, with a seed's noise of a tenth of it."""
    text = io.StringIO("model,seed,flops,loss\n")
    text.seek(0, io.SEEK_END)
    for seed in range(seeds):
        for exponent in range(1, 6):
            base = 5 - 0.5 * exponent
            text.write(f"y,{seed},{10**exponent},{base}\n")
            noise = 0.1 * slope * ((seed * 7 + exponent * 3) % 5 - 2) / 2
            text.write(f"x,{seed},{10**exponent},{base + slope * (exponent - 3) + noise!r}\n")
    return text.getvalue()


def test_compare_judges_any_two_values_of_any_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "t.csv"
    path.write_text(study(slope=0.1))
    options = ["--a", "model=x", "--b", "model=y", "--along", "flops", "--metric", "loss", "--pair", "seed"]
    assert main(["compare", str(path), *options, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    verdict = record["verdict"]
    assert (record["a"], record["b"], record["along"], record["metric"]) == ("x", "y", "flops", "loss")
    assert record["main"] is False, "it is no study's one question"
    assert verdict["kind"] == "crossing" and verdict["direction"] == "a_to_b"
    assert 400 < verdict["root"] < 2500
    assert verdict["level"] == 0.9 and verdict["min_effect"] == 0.005
    assert main(["compare", str(path), *options]) == 0
    assert capsys.readouterr().out.startswith("Model x gives the lower loss up to about ")
    assert main(["compare", str(path), *options, "--min-effect", "1", "--level", "0.8", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert (verdict["level"], verdict["min_effect"]) == (0.8, 1)


def test_compare_says_why_nothing_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "t.csv"
    path.write_text(TWO_MODELS.replace("y,0", "y,2").replace("y,1", "y,3"))
    options = ["--a", "model=x", "--b", "model=y", "--along", "flops", "--metric", "loss"]
    assert main(["compare", str(path), *options]) == 1
    assert "what keeps them apart is seed: model=x has 0, 1, model=y has 2, 3" in capsys.readouterr().err
    assert main(["compare", str(path), *options, "--where", "dataset=birds", "--where", "model=x"]) == 1
    assert "no row has model=y; known: x" in capsys.readouterr().err
