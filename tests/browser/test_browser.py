"""The explorer as a visitor meets it: a real server, a real Chromium, every page, no error anywhere."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.explorer import PAGES, PATIENCE_S, chromium, serve, settled
from tests.small_zoo import make_results, make_zoo

pytestmark = pytest.mark.browser


PROBE = re.compile(r"/\w+/_stcore/(health|host-config)$")
"""Streamlit's frontend asks for these below the page's path first, gets a 404, and asks at the root."""


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    zoo = make_zoo(folder / "zoo")
    with serve(zoo, make_results(folder, zoo)) as url:
        yield url


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A window that fails the test on an error on the console, an uncaught exception, or a request to elsewhere."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    context.set_default_timeout(1000 * PATIENCE_S)
    window = context.new_page()
    troubles: list[str] = []
    window.on("console", lambda message: troubles.append(f"{message.text} {message.location.get('url')}")
              if message.type == "error" and not PROBE.search(str(message.location.get("url"))) else None)
    window.on("pageerror", lambda error: troubles.append(str(error)))
    window.on("request", lambda request: troubles.append(f"asked the network for {request.url}")
              if not request.url.startswith(("http://localhost:", "data:", "blob:", "about:")) else None)
    yield window
    context.close()
    assert not troubles


def opened(page: Page, address: str, name: str, query: str = "") -> Page:
    page.goto(f"{address}/{PAGES[name]}?{query}")
    return healthy(page)


def healthy(page: Page) -> Page:
    settled(page)
    for sign in ("stException", "stAlertContentError"):
        shown = page.locator(f"[data-testid={sign}]")
        assert shown.count() == 0, shown.all_inner_texts()
    return page


def drawn(page: Page) -> list[str]:
    """What the charts show: the data that plotly holds for each of them, first to last."""
    return page.evaluate("""() => [...document.querySelectorAll('[data-testid=stPlotlyChart] .js-plotly-plot')]
        .map(plot => JSON.stringify(plot.data))""")


def redrawn(page: Page, before: list[str], *, timeout_s: float = PATIENCE_S) -> list[str]:
    """What the charts show once they differ from ``before``; a control may take a moment to reach the server."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        healthy(page)
        if (now := drawn(page)) != before:
            return now
        page.wait_for_timeout(100)
    raise AssertionError(f"the charts did not change within {timeout_s} s of using a control at {page.url}")


def press(page: Page, label: str, key: str, times: int = 1) -> None:
    """Move a slider by its keyboard."""
    thumb = page.locator(".st-key-" + label).get_by_role("slider")
    thumb.focus()
    for _ in range(times):
        thumb.press(key)


@pytest.mark.parametrize("name", PAGES)
def test_every_page_opens_and_draws(page: Page, address: str, name: str) -> None:
    opened(page, address, name)
    charts = page.locator("[data-testid=stPlotlyChart]")
    assert charts.count() >= (1 if name == "training" else 2)
    assert len(drawn(page)) == charts.count()
    widths = [box["width"] for chart in charts.all() if (box := chart.bounding_box())]
    assert min(widths) > 150
    over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert over <= 0, "the page is wider than its window"


def test_the_menu_leads_to_every_page(page: Page, address: str) -> None:
    opened(page, address, "verdict")
    for name in [*list(PAGES)[1:], "verdict"]:
        page.get_by_test_id("stSidebarNav").get_by_role("link", name=name.capitalize()).click()
        page.wait_for_url(re.compile(rf"/{PAGES[name]}(\?|$)"))
        healthy(page)


@pytest.mark.parametrize("name", [name for name in PAGES if name not in ("verdict", "training")])
def test_model_loops_and_mask_change_the_figures(page: Page, address: str, name: str) -> None:
    opened(page, address, name)
    before = drawn(page)

    press(page, "loops", "ArrowRight", times=2)
    page.wait_for_url(re.compile("loops=5"))
    more_loops = redrawn(page, before)

    page.locator(".st-key-model").get_by_role("combobox").click()
    page.get_by_role("option", name="automaton-deep").click()
    page.wait_for_url(re.compile("model=automaton-deep"))
    other_model = redrawn(page, more_loops)

    press(page, "t", "ArrowLeft", times=8)
    page.wait_for_url(re.compile(r"t=0\.6"))
    redrawn(page, other_model)


def test_a_link_to_any_page_works_before_the_first_page_was_opened(page: Page, tmp_path: Path) -> None:
    with serve(make_zoo(tmp_path)) as fresh:
        page.goto(f"{fresh}/lens?loops=2")
        healthy(page)
        names = page.get_by_test_id("stSidebarNav").get_by_role("link").all_inner_texts()
        assert [name.split()[-1] for name in names] == [name.capitalize() for name in PAGES]
        assert page.locator(".st-key-loops").inner_text().split()[:3] == ["Loops", "S", "2"]
        page.goto("about:blank")   # before the server goes


def test_a_link_reopens_what_it_was_copied_from(page: Page, address: str) -> None:
    opened(page, address, "lens")
    press(page, "loops", "ArrowRight")
    healthy(page)
    page.locator(".st-key-lens").get_by_role("radio", name="logit lens").or_(
        page.locator(".st-key-lens").get_by_role("button", name="logit lens")).first.click()
    healthy(page)
    press(page, "t", "ArrowLeft", times=4)
    healthy(page)
    _click_cell(page, 9)
    page.get_by_text("of 18 free positions masked").wait_for()
    healthy(page)
    page.locator(".st-key-example").get_by_role("spinbutton").press("ArrowUp")
    healthy(page)
    page.wait_for_function("location.href.includes('example=1')", timeout=60_000)  # the address follows the page
    healthy(page)
    link, shown = page.url, drawn(page)
    for part in ("loops=4", "masking=by+hand", "mask=", "lens=logit+lens", "example=1"):
        assert part in link
    page.goto("about:blank")
    page.goto(link)
    assert drawn(healthy(page)) == shown


def test_the_mask_is_drawn_by_clicking_cells(page: Page, address: str) -> None:
    opened(page, address, "lens")
    assert "18 of 18 free positions masked" in page.locator("[data-testid=stSidebar]").inner_text()
    before = drawn(page)
    _click_cell(page, 8)
    page.get_by_text("17 of 18 free positions masked").wait_for()
    assert drawn(healthy(page)) != before
    assert re.search(r"mask=[0-9a-f]{6}", page.url)
    _click_cell(page, 8)                                                    # and back
    page.get_by_text("18 of 18 free positions masked").wait_for()
    healthy(page)
    _click_cell(page, 2)                                                    # a given cell stays as it is
    page.wait_for_timeout(500)
    healthy(page)
    assert "18 of 18 free positions masked" in page.locator("[data-testid=stSidebar]").inner_text()


def test_a_mask_drawn_by_hand_stays_on_other_pages(page: Page, address: str) -> None:
    opened(page, address, "lens")
    _click_cell(page, 20)
    page.get_by_text("17 of 18 free positions masked").wait_for()
    for name in ("Attention", "Verdict", "Denoise"):
        page.get_by_test_id("stSidebarNav").get_by_role("link", name=name).click()
        page.wait_for_url(re.compile(f"/{PAGES[name.lower()]}" + r"(\?|$)"))
        healthy(page)
    assert "17 of 18 free positions masked" in page.locator("[data-testid=stSidebar]").inner_text()


def test_figures_and_tables_download(page: Page, address: str, tmp_path: Path) -> None:
    opened(page, address, "lens")
    for kind, sign in (("csv", b"depth,pos"), ("html", b"plotly")):
        with page.expect_download() as download:
            page.locator(f".st-key-{kind}-lens").get_by_role("button", name=kind.upper()).first.click()
        download.value.save_as(tmp_path / f"lens.{kind}")
        assert sign in (tmp_path / f"lens.{kind}").read_bytes()


def _click_cell(page: Page, position: int) -> None:
    """Click the middle of a cell of the board."""
    board = page.locator("[class*=st-key-editor] .js-plotly-plot")
    place = board.evaluate("""(plot, i) => {
        const {xaxis, yaxis} = plot._fullLayout, box = plot.getBoundingClientRect();
        return {x: box.left + xaxis._offset + xaxis.d2p(plot.calcdata[0][i].x),
                y: box.top + yaxis._offset + yaxis.d2p(plot.calcdata[0][i].y)};
    }""", position)
    page.mouse.move(place["x"], place["y"])
    handle = board.element_handle()   # plotly takes a click only where it has seen the pointer
    page.wait_for_function("([plot, i]) => (plot._hoverdata || []).some(p => p.pointNumber === i)",
                           arg=[handle, position])
    page.mouse.click(place["x"], place["y"])
