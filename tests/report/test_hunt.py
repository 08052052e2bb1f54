"""The pairs of a hunt's targets, and how its path is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbscale.laws import judge, make_pairs, noise_of
from dbscale.report.figures import export, hunt_figure
from dbscale.report.hunt import WIDTH, WRONG, equal_cost, hunt_story, target_pairs
from dbscale.report.pairing import pair_arms
from dbscale.report.schema import ContrastRecord
from dbscale.report.table import Run, RunTable
from dbscale.strict import validate
from dbscale.study.grid import Hunt
from dbscale.study.hunt import Bought, Finding, HuntLog, Target, WaveRecord, write_log
from dbscale.study.store import Store


def hunt(**changes: Any) -> Hunt:
    return validate(Hunt, {"budget_hours": 1} | changes, where="test")


def run(**columns: Any) -> Run:
    same = {"variant": "base", "arm": "plain", "student": "s", "num_params": 10, "upstream_samples": 100, "dataset": "d",
            "downstream_samples": 10, "seed": 0, "error_rate": 0.5}  # fmt: skip
    return Run(**(same | columns))


def test_plain_against_distilled_gives_the_reports_own_pairs(make_table: Callable[..., RunTable]) -> None:
    table = make_table(datasets=("digits", "birds"))
    found = target_pairs(table, hunt(), Target("birds"))
    setting = next(each for each in table.settings if each.dataset == "birds")
    known, _ = pair_arms(table, setting)
    assert found is not None and known is not None
    assert np.array_equal(found.delta, known.delta)
    one = target_pairs(table, hunt(pooled=False), Target("birds", "h2", 1000))
    assert one is not None
    assert (set(one.student.tolist()), set(one.labels.tolist())) == ({"h2"}, {1000})
    assert target_pairs(table, hunt(), Target("flowers")) is None
    assert target_pairs(table, hunt(), Target("birds", "h2", 77)) is None


def test_variants_are_paired_by_everything_else() -> None:
    runs = [
        run(variant=variant, arm="distilled", seed=seed, downstream_samples=size, error_rate=error + size / 1000)
        for variant, error in (("soft", 0.3), ("hard", 0.2)) for seed in (0, 1) for size in (10, 20)
    ]  # fmt: skip
    table = RunTable((*runs, run(variant="soft", arm="distilled", seed=2)))
    sides = {"a": {"variant": "soft"}, "b": {"variant": "hard"}}
    found = target_pairs(table, hunt(**sides), Target("d"))
    assert found is not None
    assert found.delta == pytest.approx([0.1] * 4)
    assert found.x.tolist() == [100] * 4
    along = target_pairs(table, hunt(**sides, along="downstream_samples"), Target("d"))
    assert along is not None
    assert along.x.tolist() == [10, 10, 20, 20]
    assert along.labels.tolist() == [100] * 4


def test_along_parameters_each_student_has_its_place() -> None:
    sizes, arms = {"small": 100, "large": 400}, {"plain": 0.5, "distilled": 0.3}
    runs = [
        run(student=student, arm=arm, seed=seed, num_params=size + 10, error_rate=error * size / 400)
        for student, size in sizes.items() for arm, error in arms.items() for seed in (0, 1)
    ]  # fmt: skip
    found = target_pairs(RunTable(tuple(runs)), hunt(along="num_params"), Target("d"), sizes=sizes)
    assert found is not None
    assert found.x.tolist() == [100, 100, 400, 400]
    assert found.delta == pytest.approx([0.05, 0.05, 0.2, 0.2])


def log(**last: Any) -> HuntLog:
    first = WaveRecord(
        number=1, created=0.0, spent_s=0.0, verdict_level=0.95, findings=(Finding(target="digits"),),
        bought=(Bought(x=1000, targets=("digits",), num_pairs=2, gain=None, cost_s=20.0, reason="start"),
                Bought(x=4000, targets=("digits",), num_pairs=1, gain=0.3, cost_s=40.0, reason="explore")),
    )  # fmt: skip
    found = Finding(target="digits", kind="crossing", root=2000.0, low=1500.0, high=3000.0, doubt=0.25, num_pairs=3,
                    stop="crossing")  # fmt: skip
    end = WaveRecord(**({"number": 2, "created": 1.0, "spent_s": 3600.0, "verdict_level": 0.95, "findings": (found,),
                         "bought": (), "stopped": "crossing"} | last))  # fmt: skip
    return HuntLog(grid="g", along="upstream_samples", span=(1000, 4000), target_octaves=1.0, level=0.9, budget_s=7200.0,
                   waves=(first, end))  # fmt: skip


def record(sd: float = 0.02) -> ContrastRecord:
    x, seeds = np.repeat([1000.0, 2000.0, 4000.0], 6), list(range(6)) * 3
    delta = 0.05 * np.log2(2000.0 / x) + 0.01 * np.random.default_rng(0).standard_normal(18)
    verdict = judge(make_pairs(x, delta, seed=seeds))
    noise = noise_of(upstream=sd)
    return ContrastRecord(
        dataset="digits", a="plain", b="distilled", along="upstream_samples", metric="error_rate", verdict=verdict,
        noise=type(noise)(**{**vars(noise), "by_x": ((1000.0, sd), (4000.0, sd))}),
    )  # fmt: skip


def test_the_path_and_the_table_of_waves(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert hunt_story(store, "g", ()) is None
    write_log(store, log(failed_pairs=2))
    story = hunt_story(store, "g", ())
    assert story is not None
    assert [(row["series"], row["x"], row["y"]) for row in story.rows] == [(WRONG, 1.0, 0.25), (WIDTH, 1.0, 1.0)]
    assert story.waves[0]["bought"] == (
        "2 at 1,000: a first look where runs are cheap; 1 at 4,000: nothing was measured there yet"
    )
    assert story.waves[1]["findings"] == "digits: crossing at 2,000"
    assert story.waves[1]["bought"] == "over: every boundary is as sharp as was asked"
    assert "3 pairs in 1 wave. It is over: every boundary" in story.sentences[0]
    assert "2 pairs lack a run that failed: neither" in " ".join(story.sentences)
    assert "each verdict stands on intervals of level 95.0%, so that it holds at 90%" in story.sentences[1]
    two = tuple(Finding(target=name, num_pairs=3) for name in ("digits", "birds"))
    write_log(store, log(findings=two, verdict_level=0.95**0.5))
    story = hunt_story(store, "g", ())
    assert story is not None
    assert (
        "has 2 targets: each verdict stands on intervals of level 97.5%, so that all of them hold at 90%"
        in story.sentences[1]
    )
    (store.grid_dir("g") / "hunt.json").write_text("{")
    assert hunt_story(store, "g", ()) is None


def test_an_equal_fixed_grid_is_priced_by_what_the_hunt_met() -> None:
    """Prices 10 s at 1,000 and 40 s at 4,000, 25 s between; the hunt's 60 s as predicted took 3,600."""
    found = equal_cost(log(), [record()])
    assert found is not None
    seeds, sizes, seconds = found
    assert sizes == 3
    assert seconds == pytest.approx(seeds * (10 + 25 + 40) * 60)
    noisier = equal_cost(log(), [record(sd=0.04)])
    assert noisier is not None
    assert noisier[0] > 3 * seeds / 2
    assert equal_cost(log(), []) is None


def test_the_page_tells_the_path_where_there_is_one(make_store: Callable[..., Store]) -> None:
    from dbscale.report.page import write_report

    store = make_store()
    assert "How the runs were chosen" not in write_report(store, "tiny").read_text()
    write_log(store, log().model_copy(update={"grid": "tiny"}))
    html = write_report(store, "tiny").read_text()
    assert "How the runs were chosen" in html
    assert "3 pairs in 1 wave. It is over: every boundary is as sharp as was asked." in html
    assert 'id="hunt"' in html


def test_the_figure_has_a_panel_a_target_and_goes_to_paper(tmp_path: Path) -> None:
    rows = [
        {"part": "path", "panel": panel, "x": 1.0, "y": y, "series": WRONG}
        for panel in ("one", "two")
        for y in (1, 0.5)
    ]
    figure = hunt_figure(rows)
    assert figure is not None
    assert figure.spec()["datasets"]["rows"] == rows
    assert figure.spec()["facet"]["sort"] == ["one", "two"]
    assert hunt_figure([]) is None
    assert {path.suffix for path in export([figure], tmp_path)} == {".svg", ".pdf"}
