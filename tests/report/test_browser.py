"""The page in headless Chromium: laptop and phone, light and dark, offline, every control."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import planted_study
import pytest
from planted import Report

from tangentlab.records import read_study
from tangentlab.report import write_ledger

sync_api = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
SCREENS = {"laptop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail(
                "no Chromium found, and in CI the page must be opened; looked for chromium, google-chrome"
            )
        pytest.skip("no Chromium found")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(params=[(screen, scheme) for screen in SCREENS for scheme in ("light", "dark")], ids="-".join)
def opened(
    request: pytest.FixtureRequest, browser: sync_api.Browser
) -> Iterator[Callable[[Path], sync_api.Page]]:
    """Opens a page; afterwards, nothing may have been logged, thrown or asked for."""
    screen, scheme = request.param
    context = browser.new_context(
        viewport=SCREENS[screen],
        color_scheme=scheme,
        has_touch=screen == "phone",
        is_mobile=screen == "phone",
    )
    page = context.new_page()
    wrong: list[str] = []
    own: list[str] = []
    page.on("console", lambda message: wrong.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((*own, "data:", "blob:"))
            else wrong.append(f"request: {request.url}")
        ),
    )

    def open_page(html: Path) -> sync_api.Page:
        own.append(html.resolve().as_uri())
        page.goto(own[-1])
        return page

    yield open_page
    context.close()
    assert wrong == []


def _undrawn(page: sync_api.Page, within: str = "body") -> int:
    """Plots of the views shown without a drawing of some size, after scrolling past all of them."""
    page.evaluate(
        """async (within) => {
            for (const plot of document.querySelectorAll(`${within} .panels:not([hidden]) .plot`)) {
                plot.scrollIntoView({ behavior: "instant", block: "center" });
                await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
            }
        }""",
        within,
    )
    page.wait_for_timeout(100)
    return page.evaluate(
        """(within) => {
          const plots = [...document.querySelectorAll(`${within} .panels:not([hidden]) .plot`)];
          return plots.filter((plot) => {
            const box = plot.querySelector("svg.main-svg")?.getBoundingClientRect();
            const inked = plot.querySelector(".scatterlayer path, .heatmaplayer image");
            return !box || box.width < 50 || box.height < 50 || !inked;
          }).length;
        }""",
        within,
    )


def test_page_draws_reacts_and_fits(opened: Callable[[Path], sync_api.Page], report: Report) -> None:
    page = opened(report.html)
    assert page.title() == "4 runs on digits – tangentlab report"
    assert _undrawn(page) == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"

    # The slider moves every map, its moment and the cursor of the curve beside it.
    figure = page.locator("#specialization")
    heat = "document.querySelector('#specialization .plot').data[0].z[0][0]"
    last = page.evaluate(heat)
    figure.locator("input[type=range]").fill("0")
    assert figure.locator("output").inner_text() == "0"
    assert figure.locator(".moment").first.inner_text() == "epoch 0"
    assert page.evaluate(heat) != last
    cursor = "document.querySelector('#specialization .plot.lines').layout.shapes.at(-1).x0"
    assert page.evaluate(cursor) == 0

    # The selector shows other inputs, drawn.
    button = figure.get_by_role("button", name="PGD", exact=True)
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert figure.locator(".panels:visible").get_attribute("data-view") == "2"
    assert _undrawn(page, "#specialization") == 0

    # The legend hides a line in all panels.
    page.locator("#ranks .legend button").first.click()
    shown = (
        "[...document.querySelectorAll('#ranks .panels:not([hidden]) .plot')].map((p) => p.data[0].visible)"
    )
    assert page.evaluate(shown) == [False] * 4

    # The other theme: the page and the plots change their colours, and change back.
    line = "document.querySelector('#accuracies .plot').data[0].line.color"
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(f"[{line}, {ground}]")
    page.locator("#theme").click()
    after = page.evaluate(f"[{line}, {ground}]")
    assert before[0] != after[0]
    assert before[1] != after[1]
    page.locator("#theme").click()
    assert page.evaluate(f"[{line}, {ground}]") == before
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_study_draws_reacts_and_fits(opened: Callable[[Path], sync_api.Page], study: Path) -> None:
    page = opened(study / "report.html")
    assert page.title() == "Study: gap – tangentlab report"
    assert _undrawn(page) == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"

    # Every verdict is in view without scrolling sideways, its sign in a colour of its own.
    words = page.locator(".word")
    assert [word.split()[-1] for word in words.all_inner_texts()] == list(planted_study.VERDICTS)
    assert all(words.nth(i).bounding_box()["x"] < page.viewport_size["width"] - 60 for i in range(4))
    colours = [words.nth(i).evaluate("(word) => getComputedStyle(word).color") for i in range(3)]
    assert len(set(colours)) == 3

    # The selector shows the other quantity, the legend hides seeds and mean of one method.
    figure = page.locator("#values-curves")
    figure.get_by_role("button", name="share of the change").click()
    assert _undrawn(page, "#values-curves") == 0
    dots = page.locator("#values-statistics")
    dots.locator(".legend button").first.click()
    shown = "document.querySelector('#values-statistics .plot').data.map((trace) => trace.visible)"
    assert page.evaluate(shown) == [False, False, True, True, True, True]


def test_ledger_needs_no_plots(opened: Callable[[Path], sync_api.Page], study: Path, tmp_path: Path) -> None:
    page = opened(write_ledger([read_study(study).verdicts] * 2, tmp_path / "ledger.html"))
    assert page.locator("svg.forest").count() == 6
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
