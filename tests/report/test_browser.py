"""The page in a real browser: it logs no error, fetches nothing, draws everything, and its figures answer to the mouse."""

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
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
LONGEST_WAIT_MS = 180_000
"""A busy machine is slow, not wrong."""
MARKS = "#error-digits path[aria-roledescription='point']"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (apt-get install chromium)")


@pytest.fixture(scope="module")
def opened(reported: Store) -> Iterator[tuple[Any, list[str]]]:
    """The report of a synthetic grid with every figure drawn, and what the browser had to say about it."""
    from playwright.sync_api import sync_playwright

    path = reported.grid_dir("tiny") / "report.html"
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS, timeout=LONGEST_WAIT_MS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(LONGEST_WAIT_MS)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else said.append(request.url),
        )
        page.goto(path.as_uri(), timeout=LONGEST_WAIT_MS)
        page.evaluate("dbscaleReport.drawAll()")
        yield page, said
        browser.close()


def visible_marks(page: Any, arm: str) -> int:
    """Runs of an arm that are drawn in the first error figure and not transparent."""
    return page.eval_on_selector_all(
        MARKS,
        "(all, arm) => all.filter((mark) => mark.getAttribute('aria-label').includes('arm: ' + arm)"
        " && mark.getAttribute('opacity') !== '0').length",
        arm,
    )


def scale_type(page: Any, figure: str, channel: str) -> str:
    return page.evaluate("([id, name]) => dbscaleReport.drawn.get(id).view.scale(name).type", [figure, channel])


def test_it_opens_without_errors_requests_or_sideways_scrolling(opened):
    page, said = opened
    assert said == []
    empty = page.evaluate("[...document.querySelectorAll('.plot')].filter((plot) => plot.offsetParent"
                          " && !plot.querySelector('svg')).map((plot) => plot.id)")  # fmt: skip
    assert empty == []
    assert page.evaluate("document.documentElement.scrollWidth") == 1280


def test_the_answer_is_on_the_first_screen(opened):
    page, _ = opened
    box = page.locator("#answer").bounding_box()
    assert box is not None and box["y"] + box["height"] < 800


def test_no_menu_sends_the_data_away(opened):
    page, _ = opened
    entries = page.eval_on_selector_all(".vega-actions a", "(all) => all.map((entry) => entry.textContent)")
    assert set(entries) == {"Save as SVG", "Save as PNG"}


def test_axes_are_logarithmic(opened):
    page, _ = opened
    assert [scale_type(page, "error-digits", channel) for channel in "xy"] == ["log", "log"]
    assert scale_type(page, "verdict", "x") == "log"


def test_a_mark_tells_its_values_when_pointed_at(opened):
    page, said = opened
    mark = page.locator(MARKS).first
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    told = page.inner_text("#vg-tooltip-element")
    assert "arm" in told and "upstream images" in told and "%" in told
    page.mouse.move(5, 5)
    assert said == []


def test_a_click_on_the_legend_hides_an_arm_and_shows_it_again(opened):
    page, said = opened
    before = {arm: visible_marks(page, arm) for arm in ("plain", "distilled")}
    assert all(count > 0 for count in before.values())
    entry = page.locator("#error-digits .role-legend-label text", has_text="distilled").first
    entry.scroll_into_view_if_needed()
    entry.click(force=True)
    page.wait_for_timeout(200)
    assert (visible_marks(page, "distilled"), visible_marks(page, "plain")) == (0, before["plain"])
    entry.click(force=True)
    page.wait_for_timeout(200)
    assert visible_marks(page, "distilled") == before["distilled"]
    assert said == []


def test_dragging_pans_and_a_double_click_resets(opened):
    page, _ = opened
    domain = "dbscaleReport.drawn.get('verdict').view.scale('x').domain()"
    page.locator("#verdict").scroll_into_view_if_needed()
    box = page.locator("#verdict svg.marks").bounding_box()
    assert box is not None
    start = page.evaluate(domain)
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 80, middle[1], steps=4)
    page.mouse.up()
    assert page.evaluate(domain)[0] < start[0]
    page.mouse.dblclick(*middle)
    page.wait_for_timeout(200)
    assert page.evaluate(domain) == pytest.approx(start)


def test_cells_can_be_filtered(opened):
    page, _ = opened
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.fill("input[data-filter=cells]", "distill h4")
    shown = page.locator("#cells tbody tr:visible")
    assert shown.count() > 0
    assert all("distill" in text for text in shown.all_inner_texts())
    page.fill("input[data-filter=cells]", "")


def test_a_phone_and_a_dark_room_are_served_too(opened):
    page, said = opened
    page.set_viewport_size({"width": 400, "height": 800})
    page.emulate_media(color_scheme="dark")
    page.evaluate("dbscaleReport.drawAll()")
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 29)"
    assert page.evaluate("dbscaleReport.drawn.get('verdict').view.background()") == "#12161d"
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 800})
    page.evaluate("dbscaleReport.drawAll()")
    assert said == []


def test_it_prints_and_has_its_picture_taken(opened, tmp_path: Path):
    """Set DBSCALE_SCREENSHOT to keep the picture: the README's is made this way."""
    page, _ = opened
    page.evaluate("window.scrollTo(0, 0)")
    target = Path(os.environ.get("DBSCALE_SCREENSHOT") or tmp_path / "report.png")
    page.screenshot(path=target)
    assert target.stat().st_size > 20_000
    assert len(page.pdf()) > 20_000
