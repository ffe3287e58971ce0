"""The report is one file without requests, with all text escaped, at every size of study."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import optuna
import plotly.graph_objects as go
import pytest
import synthetic
from rich.console import Console

from peftscape.analysis import units
from peftscape.analysis.ablation import missing
from peftscape.analysis.figures import family, front_figure, hovers
from peftscape.analysis.findings import find
from peftscape.analysis.forms import write
from peftscape.analysis.front import front
from peftscape.analysis.picks import picks
from peftscape.analysis.report import write_report
from peftscape.analysis.sources import Study, from_optuna, load
from peftscape.analysis.table import front_json, front_table, trials_json
from peftscape.analysis.watch import watch
from peftscape.spaces.record import Score

EVIL = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importances take a second a report, and have tests of their own: one report here has them."""
    if "loads_nothing" not in request.node.name:
        monkeypatch.setattr("peftscape.analysis.findings.importances", lambda *_, **__: ())


class Page(HTMLParser):
    """The elements that load something, the text outside scripts, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = [*self.inside, tag] if tag in ("script", "style") else self.inside
        self.loads += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self.inside = self.inside[:-1]

    def handle_data(self, data: str) -> None:
        (self.scripts if self.inside[-1:] == ["script"] else self.text).append(data)


def page(study: Study, folder: Path) -> Page:
    return Page(write_report(study, folder / "report.html").read_text(encoding="utf-8"))


def of(*records: synthetic.Record) -> Study:
    return from_optuna(synthetic.store(list(records), optuna.storages.InMemoryStorage())[0], source="runs/demo")


@pytest.mark.parametrize("n", [1, 60, 800])
def test_the_report_loads_nothing_and_holds_every_trial(n: int, tmp_path: Path) -> None:
    found = page(synthetic.study(n, retested=min(n, 6)), tmp_path)
    assert found.loads == ["data:,"]
    text = " ".join(found.text)
    assert "peftscape export runs/demo --trial" in text
    assert len(found.scripts) >= 2
    assert sum("plotly.js v" in script for script in found.scripts) == 1
    assert "showSendToCloud: false" in found.scripts[-1]  # plotly's "share" button would upload the data
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_study_without_a_complete_trial_says_so(tmp_path: Path) -> None:
    for records in ([], [synthetic.record(0, None), synthetic.record(1, None, costs=None)]):
        text = " ".join(page(of(*records), tmp_path).text)
        assert "No trial is complete yet" in text
        assert ("diverged" in text) == bool(records)


def test_text_of_records_is_text_everywhere(tmp_path: Path) -> None:
    evil = synthetic.record(0, label=EVIL, textbook=EVIL, design={"placements": [{"method": EVIL, "note": EVIL}]})
    failed = synthetic.record(1, None, label=EVIL, failure=synthetic.Failure(kind=EVIL, message=EVIL))
    study = dataclasses.replace(of(evil, failed), name=EVIL, config={"x": EVIL}, environment={EVIL: EVIL}, source=EVIL)
    found = page(study, tmp_path)
    assert sum(EVIL in text for text in found.text) >= 8
    assert len(found.scripts) == len(page(of(synthetic.record(0)), tmp_path).scripts)
    assert not any("alert(1)" in s and "<script" in s for s in found.scripts if "FIGURES" in s)
    assert all("<script" not in hover for hover in hovers(study).values())
    assert all("<script" not in str(front_figure(study, cost)) for cost in units.SHOWN)


def test_figures_are_valid_plotly_and_show_every_score() -> None:
    study = synthetic.study(60, retested=5)
    for cost in units.SHOWN:
        figure = front_figure(study, cost, picks(study))
        go.Figure(figure)
        shown = [
            n
            for trace in figure["data"]
            if not trace["name"].startswith(("front members", "test mean"))
            for n in trace.get("customdata", ())
        ]
        assert sorted(shown) == [r.number for r in study.records if r.scores or r.rungs]


def test_a_figure_of_zero_cost_has_a_place_for_it() -> None:
    study = of(*(synthetic.record(i, 0.8 + i / 50, adapter) for i, adapter in enumerate([0, 500, 90_000])))
    figure = front_figure(study, next(cost for cost in units.SHOWN if cost.name == "adapter_bytes"))
    ticks = dict(zip(figure["layout"]["xaxis"]["ticktext"], figure["layout"]["xaxis"]["tickvals"], strict=True))
    points = [x for trace in figure["data"] for x in trace["x"]]
    assert min(points) == ticks["0"] < 4 * 500
    assert all(math.isfinite(math.log10(x)) for x in points)


@pytest.mark.parametrize(("metric", "stretched"), [("accuracy", False), ("matthews", True)])
def test_an_interval_of_two_seeds_does_not_stretch_an_axis_of_shares(metric: str, stretched: bool) -> None:
    """The t-interval of 0.3 and 0.8 is 0.55 +- 3.2; a share ends at 0 and 1, and for a correlation all is shown."""
    retests = tuple(Score(seed=i, validation=0.8, test=test) for i, test in enumerate((0.3, 0.8), start=1))
    made = [synthetic.record(i, 0.8 + i / 50, 1000 * (i + 1), metric=metric, retests=retests) for i in range(2)]
    axes = synthetic.study(8).objectives
    study = Study(
        name="s", source="runs/s", records=tuple(made), objectives=(dataclasses.replace(axes[0], name=metric), axes[1])
    )
    low, high = front_figure(study, units.SHOWN[0])["layout"]["yaxis"]["range"]
    assert (low < -2 and high > 3) if stretched else (-0.1 <= low < 0.3 and 0.8 < high <= 1.1)


def test_the_front_is_formed_for_each_cost() -> None:
    study = synthetic.study(60)
    costly = [
        dataclasses.replace(r, costs=r.costs and dataclasses.replace(r.costs, peak_bytes=10**9 - r.costs.trainable))
        for r in study.records
    ]
    study = dataclasses.replace(study, records=tuple(costly))
    rings = {}
    for cost in units.SHOWN:
        (trace,) = [t for t in front_figure(study, cost)["data"] if t["name"].startswith("front members")]
        rings[cost.name] = set(trace["customdata"])
    assert rings["trainable"] == {r.number for r in front(study.records, study.objectives)}
    assert rings["peak_bytes"] != rings["trainable"]


def test_cards_recommend_the_best_within_each_limit() -> None:
    study = synthetic.study(80)
    for pick in picks(study):
        able = [r for r in study.records if r.state == "complete" and r.costs.trainable <= pick.limit]
        assert pick.record.validation == max(r.validation for r in able)
        if pick.cheaper:
            assert pick.cheaper.costs.trainable < pick.record.costs.trainable
    assert picks(of(synthetic.record(0, None))) == ()


def test_the_notes_say_what_the_test_can_show(tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", " ".join(page(synthetic.study(60, retested=5), tmp_path).text))
    assert "5 designs were retested with 5 further seeds each" in text
    assert "The test set has 500 examples" in text
    assert "selected by validation scores alone" in text


def test_the_terminal_table_fits_80_columns_and_shows_markup_as_text() -> None:
    study = of(synthetic.record(0, label="lora [red]r8[/red]"), synthetic.record(1, 0.95, 10**6))
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(front_table(study))
    text = console.export_text()
    assert "[red]" in text.replace("\n", "")
    assert max(map(len, text.splitlines())) <= 80
    assert "1M" in text


def test_json_is_strict_and_states_the_reference() -> None:
    study = synthetic.study(60, retested=4)
    data = json.loads(json.dumps(front_json(study), allow_nan=False))
    assert [m["number"] for m in data["members"]] == [r.number for r in front(study.records, study.objectives)]
    assert data["hypervolume"] > 0
    assert set(data["reference"]) == {"accuracy", "trainable"}
    everything = json.loads(json.dumps(trials_json(study), allow_nan=False))
    assert len(everything["trials"]) == 60
    assert front_json(of(synthetic.record(0, None)))["hypervolume"] is None


def test_the_report_says_what_noise_leaves_and_what_matters(tmp_path: Path) -> None:
    study = synthetic.study(60, retested=5)
    text = re.sub(r"\s+", " ", " ".join(page(study, tmp_path).text))
    for said in ("What noise leaves of it", "indistinguishable from the best", "Optimism of selection", "What matters"):
        assert said in text
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    spots = [html.index(f'id="{part}"') for part in ("answer", "front", "likely", "matters", "all", "repeat")]
    assert spots == sorted(spots)


def test_markdown_has_the_answer_and_no_markup_of_records(tmp_path: Path) -> None:
    evil = synthetic.record(0, label=f"{EVIL} | a", textbook=None)
    failed = synthetic.record(1, None, failure=synthetic.Failure(kind=EVIL, message="a|b\nc"))
    text = write(of(evil, failed), tmp_path / "r.md", "md").read_text(encoding="utf-8")
    assert "## What to use" in text
    assert "<script" not in text
    assert "a\\|b c" in text
    with pytest.raises(ValueError, match="expected html, md or png"):
        write(of(evil), tmp_path / "r.pdf", "pdf")


def test_notebooks_show_fronts_and_studies() -> None:
    study = synthetic.study(20)
    evil = dataclasses.replace(study, name=EVIL)
    found = front(study.records, study.objectives)
    assert found._repr_html_().count("<tr>") == len(found) + 1
    assert "<script" not in evil._repr_html_()
    assert "on the front" in evil._repr_html_()


def test_a_live_view_goes_on_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([ValueError("database is locked"), synthetic.study(12)])

    def read() -> Study:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    watch(read, every=0.0, rounds=2)
    assert "complete" in capsys.readouterr().out


def test_the_path_to_the_best_design_says_which_steps_are_predicted(tmp_path: Path) -> None:
    def lora(number: int, score: float, rank: int, lr: float, book: str | None = None) -> synthetic.Record:
        design = {"placements": [{"method": "lora", "sites": ["q"], "rank": rank}], "training": {"lr": lr}}
        return synthetic.record(number, score, 1000 * rank, design=design, textbook=book)

    study = of(lora(0, 0.8, 8, 0.1, "Hu et al. 2021"), lora(1, 0.9, 16, 0.3), lora(2, 0.7, 4, 0.2))
    text = re.sub(r"\s+", " ", " ".join(page(study, tmp_path).text))
    assert "1 step is predicted from the other trials: peftscape search --ablate trains it" in text
    step = missing(find(study).path)[0]
    made = synthetic.record(5, 0.85, design=dict(step))
    whole = dataclasses.replace(study, ablations=(made,))
    text = re.sub(r"\s+", " ", " ".join(page(whole, tmp_path).text))
    assert "recorded for this path" in text
    assert "--ablate" not in text


def test_a_source_without_adapters_says_how_to_train_a_design(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(json.dumps(r.to_json()) for r in synthetic.records(12)))
    text = " ".join(page(load(file), tmp_path).text)
    assert "peftscape train design-" in text
    assert "peftscape export" not in text


def test_a_curve_says_what_to_expect_and_where_it_extrapolates(tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", " ".join(page(synthetic.study(60, retested=5), tmp_path).text))
    assert "What quality to expect at a cost, and what cost for a quality" in text
    assert "(extrapolated)" in text
    assert "By these curves the best come from" in text


def test_one_retest_seed_has_no_interval(tmp_path: Path) -> None:
    study = of(synthetic.record(0, retests=(Score(seed=1, validation=0.9, test=0.9, n_test=500),)))
    assert "(one seed)" in " ".join(page(study, tmp_path).text)
    assert json.dumps(front_json(study), allow_nan=False)


def test_designs_are_grouped_by_method() -> None:
    pair = [{"method": "lora"}, {"method": "ia3"}]
    assert family(synthetic.record(0)) == "lora"
    assert family(synthetic.record(0, design={"placements": pair})) == "combined"
    assert family(synthetic.record(0, design={"placements": [], "training": {}})) == "head only"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (12_345, "12.3k"), (999_999, "1M"), (0.5, "0.5")],
)
def test_amounts(value: float, text: str) -> None:
    assert units.amount(value) == text


def test_limits_are_round_and_span() -> None:
    assert units.round_limits(2310, 9000) == (5000, 10_000)
    for low, high in ((1, 1), (2310, 22e6), (5, 10**9)):
        found = units.round_limits(low, high)
        assert found[0] >= low
        assert found[-1] >= high
        assert len(found) <= 10


@pytest.mark.parametrize(("low", "high"), [(2e3, 3e6), (1.001e9, 1.004e9), (3e5, 4e6), (1, 1e12), (5e5, 5.0001e5)])
def test_ticks_are_few_and_distinct(low: float, high: float) -> None:
    values, labels = units.log_ticks(low, high)
    assert 2 <= len(values) <= 10
    assert len(set(labels)) == len(labels)
    assert all(low <= v <= high for v in values)
