"""The page of a study holds its answer, its tables and its figures, needs no network, and trusts no name."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dbscale.laws import make_pairs
from dbscale.report import schema, words
from dbscale.report.findings import Options, contrast, find, refresh_table
from dbscale.report.page import compare_page, export_figures, of_grid, of_table, write_page, write_table_report
from dbscale.report.reduce import collect, load_plan
from dbscale.report.schema import BoundaryFile
from dbscale.report.table import RunTable, read_table, to_csv
from dbscale.report.words import say
from dbscale.study.cost import duration
from dbscale.study.store import Store
from tests.report.test_findings import study

FAST = Options(num_draws=200, num_resamples=20)
STUDY = Path(__file__).parents[2] / "docs" / "studies" / "cifar10"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def html(reported: Store) -> str:
    return (reported.grid_dir("tiny") / "report.html").read_text(encoding="utf-8")


def words_of(html: str) -> str:
    """What a reader sees, without scripts and styles."""
    bare = re.sub(r"<(script|style).*?</\1>", " ", html, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", bare))


def test_the_answer_comes_first_and_is_that_of_the_file(html: str, reported: Store):
    boundary = schema.read(BoundaryFile, reported.grid_dir("tiny") / "boundary.json")
    text = words_of(html)
    dataset, verdict = boundary.answers[0].removeprefix("On ").split(": ", 1)
    first = (verdict[:1].upper() + verdict[1:]).split(". ")[0]
    assert dataset == "digits" and first in text
    assert text.index(first) < text.index("What the answer rests on") < text.index("Every verdict")


def test_it_is_one_file_below_two_megabytes_that_names_no_other(html: str):
    assert len(html.encode()) < 2 * MEGABYTE
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"]+\"", own)
    assert "default-src 'none'" in own
    assert html.count("window.vegaEmbed=") == 1


def test_every_figure_has_its_place_and_its_declaration(html: str):
    (specs,) = re.findall(r"<script type=\"text/plain\" id=\"specs\">(.*?)</script>", html)
    names = set(json.loads(gzip.decompress(base64.b64decode(specs))))
    assert {"verdict", "noise", "delta-error_rate-digits", "error-digits", "predicted-digits"} <= names
    assert names == set(re.findall(r"<div class=\"plot\" id=\"([^\"]+)\"", html))


def test_names_are_escaped(html: str):
    assert "distilling from h1 &lt;pay&gt;?" in html and "<pay>" not in html
    assert "node &lt;1&gt;" in html and "non-finite &lt;loss&gt; at step 7" in html


def test_a_failed_teacher_is_named_with_what_it_costs(html: str):
    text = words_of(html)
    assert "Cells without a result" in text and "logs/one.txt" in text and "its parent has no row" in text
    # The teacher of 2,000 images and seed 1 is a point itself at two label counts, and stands before two students' pairs.
    assert re.search(r"failed deit\S*|failed pretrain", text)
    assert "points have no result" in text


def test_the_tables_hold_the_measured_differences(html: str, reported: Store):
    boundary = schema.read(BoundaryFile, reported.grid_dir("tiny") / "boundary.json")
    assert boundary.contrasts[0].verdict is not None
    for point in boundary.contrasts[0].verdict.points:
        assert f"<b>{100 * point.delta:+.1f}</b>".replace("-", "−") in html


def test_what_was_run_and_the_checklist_stand_at_the_end(html: str):
    text = words_of(html)
    assert "cells took" in text and "AdamW" in text
    assert text.index("What was run") < text.index("Reproducibility checklist")


def test_the_checklist_says_what_is_known_and_what_is_not_recorded(html: str, tmp_path: Path):
    def answers(page: str) -> dict[str, str]:
        part = page[page.index('<section id="checklist">') :]
        return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", part, flags=re.S))

    known = answers(html)
    assert len(known) == 20
    assert known["How many models, of which sizes?"] == "h2 (200,000 parameters), h4 (800,000 parameters)"
    assert known["On how much data?"] == "D_p 500, 2,000, 8,000, 32,000; D_f 100, 1,000; seeds 0, 1"
    assert known["Which metric, on which data?"] == "digits; test sets of 2,000 images"
    assert known["Which architecture and optimiser?"].startswith("pretrain: AdamW, lr 0.001, weight decay")
    table = study(seeds=2)
    page = write_page(table, find(table, options=FAST), of_table(Path("rows.csv"), table), tmp_path)
    unknown = answers(page.read_text())
    for question in ("Which architecture and optimiser?", "Are images repeated in training?"):
        assert unknown[question] == "not recorded in rows.csv; see the grid’s YAML"
    assert unknown["How is compute counted?"].startswith("multiply-adds")
    assert unknown["Which metric, on which data?"] == "digits; test sets of 10,000 images"


def test_a_table_alone_is_enough(tmp_path: Path):
    path = tmp_path / "theirs" / "rows.csv"
    path.parent.mkdir()
    path.write_text(to_csv(study(seeds=2)))
    page = write_table_report(path, tmp_path / "out")
    text = words_of(page.read_text())
    assert page == tmp_path / "out" / "report.html"
    assert "Made from the table rows.csv alone" in text and "theirs" in text
    assert "16 of 16 measured points finished" in text and "2 seeds behind the main verdict" in text
    assert "device time of" not in text and "The table does not say what its 16 runs cost." in text
    assert (tmp_path / "out" / "boundary.json").exists() and (tmp_path / "out" / "laws.json").exists()
    paths = export_figures(*refresh_table(path, tmp_path / "out"), tmp_path / "out" / "figures")
    assert {path.suffix for path in paths} == {".svg", ".pdf"} and all(path.stat().st_size > 1000 for path in paths)


def test_a_study_without_runs_still_has_a_page(tmp_path: Path):
    table = RunTable((), question="Nothing yet?")
    page = write_page(table, find(table, options=FAST), of_table(Path("rows.csv"), table), tmp_path)
    assert "No finished run with upstream data yet: there is nothing to conclude." in words_of(page.read_text())


def test_a_table_is_judged_by_the_options_that_it_cannot_hold(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text(to_csv(study()))
    options = replace(FAST, min_effect=0.3, level=0.8)
    text = words_of(write_table_report(path, tmp_path, options=options).read_text())
    assert "dbscale report --table rows.csv --min-effect 0.3 --level 0.8" in text
    found = schema.read(schema.BoundaryFile, tmp_path / "boundary.json")
    assert (found.min_effect, found.level) == (0.3, 0.8)


def test_a_study_that_cannot_be_judged_gives_the_reason_and_shows_the_runs(tmp_path: Path):
    table = study().where(arm="plain")
    page = write_page(table, find(table, options=FAST), of_table(Path("rows.csv"), table), tmp_path)
    text = words_of(page.read_text())
    assert "There is no verdict on the error, because no distilled run has error_rate" in text
    assert 'id="error-digits"' in page.read_text()


def test_any_contrast_has_the_same_kind_of_page(tmp_path: Path):
    pairs = make_pairs([1e15, 4e15] * 4, [0.3, 0.2] * 4 + 0 * [1], seed=[s for s in range(4) for _ in "xy"])
    names = {"column": "model", "a": "vit", "b": "resnet", "along": "train_flops", "dataset": "theirs"}
    record = contrast(pairs, names, "test_loss", Options(num_draws=200, min_effect=0.02))
    page = compare_page(record, tmp_path, notes=["3 rows have no partner"])
    text = words_of(page.read_text())
    assert "Which gives the lower test loss: model vit or model resnet?" in text
    assert "Model resnet gives the lower test loss: by more than 0.02 at 1e15 and 4e15 FLOPs" in text
    assert "3 rows have no partner" in text and "Made from the table theirs" in text
    assert len(page.read_bytes()) < 2 * MEGABYTE and 'id="verdict"' in page.read_text()


def test_a_lost_cell_counts_the_points_that_it_costs(reported: Store):
    """The teacher of 2,000 images and seed 1 stands before two students' distilled runs, each with two label counts."""
    plan = load_plan(reported, "tiny")
    found = of_grid(reported, plan, collect(reported, plan))
    lost = [(cell["state"], cell["key"].split("-")[0], cell["points_lost"]) for cell in found.missing]
    assert lost[0] == ("failed", "pretrain", 4) and found.missing[0]["log"] == "logs/one.txt"
    assert sorted(lost[1:]) == [("blocked", "finetune", 1)] * 4
    assert found.cells[0]["state"] != "done" and found.cells[-1]["state"] == "done"
    done = sum(cell["state"] == "done" for cell in found.cells)
    assert found.cost.startswith(f"{done} of {len(found.cells)} cells took ")
    assert [stage["stage"] for stage in found.stages] == ["pretrain", "distill", "finetune"]
    assert sum(stage["num_cells"] for stage in found.stages) == done


def test_a_run_without_a_time_has_no_speed_and_no_cost():
    first, second = study(seeds=1, sizes=(1000,))
    runs = (replace(first, device_time_s=4.0, train_time_s=2.0, samples_seen=None), replace(second, samples_seen=300))
    cells = of_table(Path("rows.csv"), RunTable(runs)).cells
    assert [(cell["key"], cell["images_per_s"]) for cell in cells] == [(first.key, None)]


def test_the_cost_is_set_against_the_plan_of_all_cells_or_of_those_that_ran(reported: Store):
    """Every cell took 3.6 s of device time."""
    plan = load_plan(reported, "tiny")
    some = of_grid(reported, plan, collect(reported, plan))
    done = [cell["key"] for cell in some.cells if cell["state"] == "done"]
    finished = plan.model_copy(update={"cells": tuple(done)})
    whole = of_grid(reported, finished.model_copy(update={"predicted_device_s": 7.2 * len(done)}), RunTable(()))
    share, so_far = (
        say(code, share=0.5, predicted=duration(7.2 * len(done))) for code in ("cost_share", "cost_so_far")
    )
    assert whole.cost.endswith(f"{share}.") and share != so_far
    partly = of_grid(reported, plan.model_copy(update={"predicted_device_s": 7.2 * len(done)}), RunTable(()))
    assert partly.cost.endswith(f"{so_far}.")


def test_a_recipe_that_cannot_be_read_is_named_on_the_page(make_store):
    store = make_store()
    plan = load_plan(store, "tiny")
    damaged, missing = list(plan.cells)[:2]
    (store.cell_dir(damaged) / "recipe.json").write_text("{")
    (store.cell_dir(missing) / "recipe.json").unlink()
    found = of_grid(store, plan, collect(store, plan))
    assert len(found.specs) == len(plan.cells) - 2
    (note,) = found.notes
    assert note.code == "table" and damaged in note.text and "recipe.json" in note.text


def test_costs_are_summed_by_stage():
    names = {"upstream_key": "up", "upstream_device_time_s": 100.0, "upstream_samples_seen": 5000, "device": "cpu"}
    runs = tuple(
        replace(run, **names, device_time_s=time, train_time_s=time / 2, samples_seen=300, num_attempts=tries)
        for run, time, tries in zip(study(seeds=1, sizes=(1000, 2000)), (1.0, 2.0, 3.0, 6.0), (1, 1, 2, 1), strict=True)
    )
    upstream, finetune = of_table(Path("rows.csv"), RunTable(runs)).stages
    shared = {"host": "", "device": "cpu", "data_wait_share": None}
    assert upstream == shared | {"stage": "pretrain", "num_cells": 1, "device_time_s": 100.0, "longest_s": 100.0,
                                 "images_per_s": 50.0, "num_attempts": None}  # fmt: skip
    # Images a second: 600, 300, 200 and 100.
    assert finetune == shared | {"stage": "finetune", "num_cells": 4, "device_time_s": 12.0, "longest_s": 6.0,
                                 "images_per_s": 250.0, "num_attempts": 5}  # fmt: skip


def test_a_tables_cost_counts_every_upstream_run_once():
    table = read_table(STUDY / "rows.csv")
    background = of_table(STUDY / "rows.csv", table)
    assert {stage["stage"]: stage["num_cells"] for stage in background.stages} == {
        "pretrain": 30,
        "distill": 20,
        "finetune": 280,
    }
    assert background.cost == "330 of 330 cells took 2.0 h of device time."


def test_the_page_says_what_an_error_is_where_it_is_not_top_1(tmp_path: Path):
    table = study(seeds=2)
    assert words.task_notes(table) == [] and words.predicted(table) == "top-1 error rate"
    runs = tuple(dataclasses.replace(run, task="segmentation") for run in table)
    table = dataclasses.replace(table, runs=runs)
    page = write_page(table, find(table, options=FAST), of_table(Path("rows.csv"), table), tmp_path).read_text()
    text = words_of(page)
    assert "On digits the error is 1 − mIoU (mean intersection over union of the classes that occur)." in text
    assert "1 − mIoU (mean intersection over union of the classes that occur) and test loss on" in text
    assert "top-1" not in text
