"""A table of runs, and nothing else, is enough for the fits, the page and the figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbscale.report import schema
from dbscale.report.arm_fits import LAWS
from dbscale.report.background import of_table
from dbscale.report.csv_rows import to_csv
from dbscale.report.fits import Options, choose, fit_candidate
from dbscale.report.page import write_table_report
from dbscale.report.paper import export_table_figures
from dbscale.report.reduce import read_table
from dbscale.report.refresh import refresh_table
from dbscale.report.schema import BoundaryFile, LawsFile
from launch.cli import main

STUDY = Path(__file__).parents[2] / "docs" / "studies" / "cifar10"
SMALL = {"students": {"h2": 200_000}, "downstream": (100, 1000), "seeds": (0, 1)}


@pytest.fixture(scope="module")
def table_path(make_table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rows.csv in a folder that no store knows."""
    path = tmp_path_factory.mktemp("theirs") / "rows.csv"
    path.write_text(to_csv(make_table(**SMALL)))
    return path


def test_the_page_is_written_beside_its_findings(table_path: Path, tmp_path: Path):
    text = write_table_report(table_path, tmp_path).read_text()
    laws = schema.read(LawsFile, tmp_path / "laws.json")
    answers = schema.read(BoundaryFile, tmp_path / "boundary.json").answers
    assert laws.grid == table_path.parent.name
    assert answers[0] in text
    assert "Made from the table rows.csv alone" in text
    assert "measured points finished" in text and "device time for" not in text


def test_findings_are_kept_until_the_table_changes(table_path: Path, tmp_path: Path):
    refresh_table(table_path, tmp_path)
    before = (tmp_path / "laws.json").stat().st_mtime_ns
    refresh_table(table_path, tmp_path)
    assert (tmp_path / "laws.json").stat().st_mtime_ns == before


def test_files_hold_one_record_a_line(table_path: Path, tmp_path: Path):
    _, found = refresh_table(table_path, tmp_path)
    text = (tmp_path / "laws.json").read_text()
    records = sum(len(getattr(found.laws, name)) for name in ("fits", "curves", "predictions", "transfer", "levers"))
    assert text.count("\n") < records + 40
    assert [fit.law_fit is not None for fit in found.laws.fits] == [fit.chosen for fit in found.laws.fits]


def test_every_lever_says_what_doubling_it_does(table_path: Path, tmp_path: Path):
    _, found = refresh_table(table_path, tmp_path)
    assert {lever.arm for lever in found.laws.levers} == {"plain", "distilled"}
    for lever in found.laws.levers:
        assert lever.upstream_samples == 128_000 and lever.downstream_samples == 1000
        assert all(doubled.value < lever.error.value for doubled in lever.doubled.values())
        assert lever.images_per_label is not None and lever.images_per_label.value > 1


def test_boundaries_are_found_for_every_seed(table_path: Path, tmp_path: Path):
    _, found = refresh_table(table_path, tmp_path)
    assert {record.seed for record in found.boundary.boundaries if record.student is None} == {None, 0, 1}


def test_the_commands_take_a_table(table_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for command in ("reduce", "report"):
        assert main([command, "--table", str(table_path), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "20 rows; wrote" not in said and f"{len(read_table(table_path))} rows; wrote" in said
    assert str(tmp_path / "report.html") in said
    assert main(["report", "--table", str(tmp_path / "none.csv")]) == 1
    assert "no table at" in capsys.readouterr().err


def test_figures_for_papers_need_no_store(table_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dbscale.report.paper.FORMATS", ("svg",))
    assert {path.suffix for path in export_table_figures(table_path, tmp_path)} == {".svg"}


def test_a_tables_cost_counts_every_upstream_run_once():
    table = read_table(STUDY / "rows.csv")
    cost = of_table(STUDY / "rows.csv", table).cost
    assert {stage.stage: stage.num_cells for stage in cost.stages} == {"pretrain": 30, "distill": 20, "finetune": 280}
    assert cost.num_cells == 330
    assert cost.sentence.startswith("330 of 330 cells took 2.0 h of device time.")


@pytest.mark.parametrize("number", [0, 1])
def test_the_published_studys_laws_are_those_of_its_rows(number: int):
    """docs/studies/cifar10: `dbscale reduce --table docs/studies/cifar10/rows.csv` writes its files anew."""
    table, laws = read_table(STUDY / "rows.csv"), schema.read(LawsFile, STUDY / "laws.json")
    setting = table.settings[number]
    runs = table.pretrained.where(setting=setting)
    best = choose(runs, [fit_candidate(law, runs, setting, Options(seed=laws.seed)) for law in LAWS])
    stored = {fit.arm: fit for fit in laws.fits if fit.chosen and fit.dataset == setting.dataset}
    assert best is not None and {fit.law for fit in stored.values()} == {best.law}
    for arm, fit in best.arms.items():
        found = fit.predict_runs(runs.where(arm=arm).runs)
        kept = [item for item in laws.predictions if (item.arm, item.dataset) == (arm, setting.dataset)]
        assert [item.predicted for item in kept if not item.held_out] == pytest.approx(found, rel=1e-3)
