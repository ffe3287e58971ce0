"""The report in a real headless Chromium: no errors, no requests, figures drawn, hover, sorting, filter, paper."""

import dataclasses
import itertools
import os
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
from peftscape.analysis.runs import compare
from peftscape.analysis.runs_report import write_comparison
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

    def __init__(self, chromium: Any, path: Path, width: int = 1200, wait: str = "#plot .main-svg") -> None:
        self.page = chromium.new_page(viewport={"width": width, "height": 900})
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.resolve().as_uri())
        self.page.wait_for_selector(wait, timeout=60_000)

    def is_quiet_and_alone(self) -> bool:
        """No message in the console, no dialog, and no request but for the file itself."""
        return self.said == [] and all(url.startswith(("file:", "data:", "blob:")) for url in self.asked)

    def picture(self, name: str) -> None:
        """A screenshot of all of it, where `PEFTSCAPE_SHOTS` names a folder: to be looked at."""
        if folder := os.environ.get("PEFTSCAPE_SHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(500)
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def opened(chromium: Any, study: Study, folder: Path, width: int = 1200) -> Opened:
    return Opened(chromium, write(study, folder / "report.html"), width)


@pytest.mark.parametrize("n", [1, 10, 5000])
def test_it_opens_without_errors_or_requests_and_draws(n: int, chromium: Any, tmp_path: Path) -> None:
    found = opened(chromium, synthetic.study(n, retested=min(n, 6)), tmp_path)
    found.picture(f"report-{n}")
    assert found.is_quiet_and_alone(), (found.said, found.asked)
    assert found.page.locator("#plot .scatterlayer .point").count() >= 1
    assert found.page.locator("#trials tbody tr").count() == n
    drawn = "id => document.getElementById(id)?.querySelector('.main-svg') !== null"
    for place in found.page.locator(".figure").all():
        assert found.page.evaluate(drawn, place.get_attribute("id"))
    found.page.close()


def test_hover_sorting_and_filter_work(chromium: Any, tmp_path: Path) -> None:
    page = opened(chromium, synthetic.study(60, retested=4), tmp_path).page
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


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_needs_no_sideways_scrolling_and_cuts_no_title(width: int, chromium: Any, tmp_path: Path) -> None:
    found = opened(chromium, synthetic.study(60, retested=4), tmp_path, width=width)
    page = found.page
    found.picture(f"phone-{width}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = """() => [...document.querySelectorAll(".xtitle, .ytitle")].filter(title => {
      const own = title.getBoundingClientRect(), box = title.closest(".js-plotly-plot").getBoundingClientRect();
      return own.left < box.left - 1 || own.right > box.right + 1
        || own.top < box.top - 1 || own.bottom > box.bottom + 1;
    }).map(title => title.textContent)"""
    assert page.evaluate(cut) == []
    page.close()


def test_paper_holds_the_figures_and_the_fronts_members(chromium: Any, tmp_path: Path) -> None:
    found = opened(chromium, synthetic.study(60, retested=4), tmp_path)
    paper = found.page.pdf(format="A4")
    assert paper.startswith(b"%PDF")
    if folder := os.environ.get("PEFTSCAPE_SHOTS"):
        (Path(folder) / "paper.pdf").write_bytes(paper)
    found.page.emulate_media(media="print")
    assert found.page.locator("#trials tbody tr:visible").count() == found.page.locator("#trials tr.member").count()
    assert not found.page.locator("#filter").is_visible()
    assert found.page.evaluate("document.querySelector('#likely ~ .tall').scrollHeight") <= found.page.evaluate(
        "document.querySelector('#likely ~ .tall').clientHeight + 2"
    )
    found.page.close()


def test_names_are_text(chromium: Any, tmp_path: Path) -> None:
    study = synthetic.study(30, retested=3)
    evil = tuple(dataclasses.replace(r, label=f"{EVIL} {'long ' * 40}", textbook=EVIL) for r in study.records)
    found = opened(chromium, dataclasses.replace(study, records=evil, name=EVIL), tmp_path)
    found.picture("names")
    assert found.is_quiet_and_alone(), (found.said, found.asked)
    assert EVIL in found.page.locator("h1").text_content()
    assert found.page.evaluate("document.documentElement.scrollWidth") <= 1200
    found.page.close()


def test_a_screen_reader_finds_its_way(chromium: Any, tmp_path: Path) -> None:
    page = opened(chromium, synthetic.study(60, retested=4), tmp_path).page
    assert page.evaluate("document.documentElement.lang") == "en"
    levels = [int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => h.tagName)")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    asked = "[role=img], [role=region], [role=group], input, button, section"
    nameless = """asked => [...document.querySelectorAll(asked)]
      .filter(e => !e.closest(".js-plotly-plot .plotly") && !(e.getAttribute("aria-label") || e.textContent.trim()
        || document.getElementById(e.getAttribute("aria-labelledby"))))
      .map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(nameless, asked) == []
    assert page.evaluate("[...document.querySelectorAll('th')].filter(h => !h.scope).length") == 0
    page.get_by_role("button", name="Validation").click()
    assert page.locator("th[aria-sort]").count() == 1
    page.close()


def test_compared_runs_are_drawn_with_their_bands(chromium: Any, tmp_path: Path) -> None:
    studies = [
        dataclasses.replace(
            synthetic.study(30, seed=seed),
            config={"name": f"{EVIL}{seed}", "search": {"sampler": EVIL if seed % 2 else "tpe", "seed": seed}},
            ended_s={i: 10.0 * (i + 1) for i in range(30)},
        )
        for seed in range(6)
    ]
    found = Opened(chromium, write_comparison(compare(studies), tmp_path / "compare.html"), wait="#trials .main-svg")
    found.page.wait_for_selector("#surfaces .main-svg")
    found.picture("compare")
    assert found.is_quiet_and_alone(), (found.said, found.asked)
    assert found.page.locator("#trials .fills path").count() >= 2
    assert found.page.locator("#time .main-svg").count() >= 1
    found.page.close()


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    found = write(synthetic.study(40), tmp_path / "front.png", "png")
    assert found.read_bytes().startswith(b"\x89PNG")
    assert found.stat().st_size > 20_000


def test_without_a_browser_it_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFTSCAPE_BROWSER", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="apt install chromium"):
        write(synthetic.study(3), tmp_path / "front.png", "png")
