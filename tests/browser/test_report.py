"""The report in a real headless Chromium: no errors, no requests, figures drawn, hover, sorting, filter, paper."""

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))
import optuna
import synthetic

from peftscape.analysis.forms import browser as find_browser
from peftscape.analysis.forms import write
from peftscape.analysis.sources import Study

pytestmark = pytest.mark.browser
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    program = find_browser()
    assert program, "make test-browser needs Chromium: apt install chromium"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


class Opened:
    """A page with what it said and asked for."""

    def __init__(self, chromium: Any, study: Study, folder: Path, width: int = 1200) -> None:
        self.page = chromium.new_page(viewport={"width": width, "height": 900})
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        path = write(study, folder / "report.html")
        self.page.goto(path.resolve().as_uri())
        self.page.wait_for_timeout(500)


@pytest.mark.parametrize("n", [1, 10, 5000])
def test_it_opens_without_errors_or_requests_and_draws(n: int, chromium: Any, tmp_path: Path) -> None:
    opened = Opened(chromium, synthetic.study(n, retested=min(n, 6)), tmp_path)
    opened.page.wait_for_selector("#plot .main-svg", timeout=30_000)
    opened.page.screenshot(path=str(tmp_path / "report.png"))
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert opened.page.locator("#plot .scatterlayer .point").count() >= 1
    assert opened.page.locator("#trials tbody tr").count() == n
    opened.page.close()


def test_hover_sorting_and_filter_work(chromium: Any, tmp_path: Path) -> None:
    page = Opened(chromium, synthetic.study(60, retested=4), tmp_path).page
    page.wait_for_selector("#plot .main-svg")
    trace = "Plotly.Fx.hover(document.getElementById('plot'), [{curveNumber: document.getElementById('plot').data"
    page.evaluate(f"() => {trace}.findIndex(t => t.customdata), pointNumber: 0}}])")
    page.wait_for_selector("#plot .hoverlayer .hovertext")
    assert "#" in page.locator("#plot .hoverlayer").text_content()
    page.get_by_role("button", name="Validation").click()
    scores = [float(v) for v in page.locator("#trials tbody tr td:nth-child(4)").all_text_contents() if v != "–"]
    assert scores == sorted(scores)
    page.fill("#filter", "bitfit")
    shown = page.locator("#trials tbody tr:visible").count()
    assert 0 < shown < 60
    page.locator("#switch button").nth(1).click()
    assert page.locator("#switch button").nth(1).get_attribute("aria-pressed") == "true"
    page.close()


def test_a_phone_needs_no_sideways_scrolling(chromium: Any, tmp_path: Path) -> None:
    page = Opened(chromium, synthetic.study(60, retested=4), tmp_path, width=390).page
    page.wait_for_selector("#plot .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= 392
    page.close()


def test_names_are_text(chromium: Any, tmp_path: Path) -> None:
    study = synthetic.study(30, retested=3)
    evil = tuple(dataclasses.replace(r, label=f"{EVIL} {'long ' * 40}", textbook=EVIL) for r in study.records)
    opened = Opened(chromium, dataclasses.replace(study, records=evil, name=EVIL), tmp_path)
    assert opened.said == []
    assert EVIL in opened.page.locator("h1").text_content()
    opened.page.close()


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    found = write(synthetic.study(40), tmp_path / "front.png", "png")
    assert found.read_bytes().startswith(b"\x89PNG")
    assert found.stat().st_size > 20_000


def test_without_a_browser_it_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFTSCAPE_BROWSER", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="apt install chromium"):
        write(synthetic.study(3), tmp_path / "front.png", "png")
