"""The page in a real browser: it logs no error, fetches nothing, and its switches switch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dbscale.study.store import Store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 180_000
"""A busy machine is slow, not wrong."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (apt-get install chromium)")


@pytest.fixture(scope="module")
def opened(reported: Store) -> Iterator[tuple[Any, list[str]]]:
    """The report of a synthetic grid, and what the browser had to say about it."""
    from playwright.sync_api import sync_playwright

    path = reported.grid_dir("tiny") / "report.html"
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS, timeout=PATIENCE_MS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else said.append(request.url),
        )
        page.goto(path.as_uri(), timeout=PATIENCE_MS)
        page.wait_for_selector("#s1-pooled .main-svg")
        yield page, said
        browser.close()


def visible_traces(page: Any, figure: str, arm: str) -> int:
    return page.evaluate(
        "([id, arm]) => document.getElementById(id).data"
        ".filter((trace) => (trace.meta || {}).arm === arm && trace.visible !== false).length",
        [figure, arm],
    )


def test_it_opens_without_errors_requests_or_sideways_scrolling(opened):
    page, said = opened
    page.evaluate("dbscaleReport.drawAll()")
    page.wait_for_function("[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('.main-svg'))")
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") == 1280


def test_no_button_sends_the_data_away(opened):
    page, _ = opened
    titles = page.eval_on_selector_all(".modebar-btn", "(all) => all.map((button) => button.dataset.title || '')")
    assert any("Zoom" in title for title in titles)
    assert not [title for title in titles if "cloud" in title.lower() or "link" in title.lower()]


def test_the_answer_is_on_the_first_screen(opened):
    page, _ = opened
    box = page.locator("#answer").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 800


def test_an_arm_can_be_switched_off_and_on(opened):
    page, said = opened
    page.evaluate("dbscaleReport.drawAll()")
    assert visible_traces(page, "s1-upstream-0", "distilled") > 0
    page.click("button[data-arm=distilled]")
    assert visible_traces(page, "s1-upstream-0", "distilled") == 0
    assert visible_traces(page, "s1-upstream-0", "plain") > 0
    assert page.get_attribute("button[data-arm=distilled]", "aria-pressed") == "false"
    page.click("button[data-arm=distilled]")
    assert visible_traces(page, "s1-upstream-0", "distilled") > 0
    assert said == []


def test_the_error_axis_switches_between_log_and_linear(opened):
    page, said = opened
    page.evaluate("dbscaleReport.drawAll()")
    kind = "document.getElementById('s1-upstream-0').layout.yaxis.type"
    assert page.evaluate(kind) == "log"
    page.click("button[data-scale=linear]")
    page.wait_for_function(f"{kind} === 'linear'")
    page.click("button[data-scale=log]")
    page.wait_for_function(f"{kind} === 'log'")
    assert said == []


def test_cells_can_be_filtered(opened):
    page, _ = opened
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.fill("input[data-filter=cells]", "distill h4")
    shown = page.locator("#cells tbody tr:visible")
    assert shown.count() > 0
    assert all("distill" in text for text in shown.all_inner_texts())
    page.fill("input[data-filter=cells]", "")


def test_nothing_is_squeezed_on_paper(opened):
    """Keys of cells may break over two lines, not over twenty."""
    page, _ = opened
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 720, "height": 1000})
    tallest = page.evaluate("Math.max(...[...document.querySelectorAll('#cells tr')].map((row) => row.offsetHeight))")
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 1280, "height": 800})
    assert tallest < 100


def test_it_prints_and_has_its_picture_taken(opened, tmp_path: Path):
    """Set DBSCALE_SCREENSHOT to keep the picture: the README's is made this way."""
    page, _ = opened
    page.evaluate("window.scrollTo(0, 0)")
    target = Path(os.environ.get("DBSCALE_SCREENSHOT") or tmp_path / "report.png")
    page.screenshot(path=target)
    assert target.stat().st_size > 20_000
    assert len(page.pdf()) > 20_000
