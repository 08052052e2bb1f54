"""The page is one offline file with the answer, valid figures, every failed cell and only escaped values."""

from __future__ import annotations

import json
import re
from pathlib import Path

import plotly.graph_objects
import pytest

from dbscale.report.page import write_report
from dbscale.report.paper import export_figures
from dbscale.report.refresh import refresh
from dbscale.report.terminal import summary
from dbscale.study.store import Store


@pytest.fixture(scope="module")
def html(reported: Store) -> str:
    return (reported.grid_dir("tiny") / "report.html").read_text()


@pytest.fixture(scope="module")
def own_html(html: str) -> str:
    """The page without the plotting library."""
    return re.sub(r"<script>/\*\*.*?</script>", "", html, flags=re.S)


def test_the_answer_stands_before_any_figure(reported: Store, own_html: str):
    _, findings = refresh(reported, "tiny")
    answer = findings.boundary.answers[0]
    assert answer in own_html
    assert own_html.index(answer) < own_html.index('class="plot"')


def test_nothing_is_fetched(own_html: str):
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", own_html)
    assert "url(" not in own_html
    assert "default-src 'none'" in own_html
    assert "showSendToCloud: false" in own_html


def test_every_figure_is_valid_plotly_and_has_its_place(own_html: str):
    data = re.search(r'<script type="application/json" id="figures">(.*?)</script>', own_html, re.S)
    assert data is not None
    figures = json.loads(data.group(1))
    assert len(figures) >= 7
    for name, spec in figures.items():
        plotly.graph_objects.Figure(spec)
        assert f'id="{name}"' in own_html


def test_both_arms_and_the_scratch_line_are_drawn(own_html: str):
    data = re.search(r'id="figures">(.*?)</script>', own_html, re.S)
    assert data is not None
    arms = {trace.get("meta", {}).get("arm") for trace in json.loads(data.group(1))["s1-upstream-0"]["data"]}
    assert arms == {"plain", "distilled", "scratch"}


def test_failed_and_blocked_cells_are_named_with_reason_and_log(own_html: str):
    assert "non-finite &lt;loss&gt; at step 7" in own_html
    assert "logs/one.txt" in own_html
    assert re.search(r"pretrain-deit_h1\S*-n2000-s1", own_html)
    assert "its parent has no row" in own_html
    assert "points have no result" in own_html


def test_values_are_escaped(own_html: str):
    assert "Does distilling from h1 &lt;pay&gt;?" in own_html
    assert "<pay>" not in own_html
    assert "node &lt;1&gt;" in own_html


def test_cost_is_stated_against_the_prediction(own_html: str):
    assert re.search(r"\d+ of \d+ cells took [\d.]+ min of device time; the plan predicts", own_html)


def test_the_checklist_is_filled_in(own_html: str):
    assert "arXiv 2502.18969" in own_html
    for said in ("Huber", "AdamW, lr 0.001", "runs without upstream data (8)", "h2 (200,000)"):
        assert said in own_html


def test_fits_are_kept_while_rows_stay_the_same(reported: Store, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr("dbscale.report.refresh.fit_grid", refuse)
    write_report(reported, "tiny")
    (reported.grid_dir("tiny") / "laws.json").write_text("{}")
    with pytest.raises(AssertionError, match="fitted again"):
        write_report(reported, "tiny")
    monkeypatch.undo()
    write_report(reported, "tiny")


def test_a_grid_without_any_result_still_has_a_page(make_store_in, tmp_path: Path):
    empty = make_store_in(tmp_path, lambda cell: True)
    text = write_report(empty, "tiny").read_text()
    assert "nothing to conclude" in text
    assert "non-finite &lt;loss&gt;" in text


def test_the_terminal_gets_the_same_answer(reported: Store):
    _, findings = refresh(reported, "tiny")
    text = summary(findings)
    assert text.startswith(findings.boundary.answers[0])
    assert "additive" in text and "pooled" in text


def test_figures_for_papers_are_svg_and_pdf(reported: Store, tmp_path: Path):
    paths = export_figures(reported, "tiny", tmp_path)
    names = {path.name for path in paths}
    assert {
        f"digits-base-{what}.svg" for what in ("error-by-upstream", "error-by-params", "delta-by-upstream")
    } <= names
    assert {path.suffix for path in paths} == {".svg", ".pdf"}
    assert all(path.stat().st_size > 1000 for path in paths)


def test_equal_findings_give_equal_figures(reported: Store, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("dbscale.report.paper.FORMATS", ("svg",))
    first, second = ([path.read_bytes() for path in export_figures(reported, "tiny", tmp_path)] for _ in range(2))
    assert first == second
