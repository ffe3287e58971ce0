"""Trials that were stopped at a rung: never on a front, named with their rung, and what stopping them saved."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import synthetic

from peftscape.analysis.figures import front_figure, hovers
from peftscape.analysis.front import front
from peftscape.analysis.more_figures import rung_figure, tuning_figure
from peftscape.analysis.notes import spent
from peftscape.analysis.report import write_report
from peftscape.analysis.sources import Study
from peftscape.analysis.states import counted, saved, state_of
from peftscape.analysis.tuning import tuning_curve
from peftscape.analysis.units import SHOWN
from peftscape.spaces.record import Failure, Record, Rung

RUNGS = (Rung(examples=640, validation=0.7), Rung(examples=1920, validation=0.95))
END = ((3000, 1.0), (6400, 0.5))


def study() -> Study:
    """Three trials to the end, one stopped at each rung (with scores above all others), one waiting, one refused."""
    records: list[Record] = [
        synthetic.record(i, 0.8 + i / 50, 1000 * (i + 1), rungs=RUNGS, curve=END) for i in range(3)
    ]
    for number, rungs, state in ((3, RUNGS[:1], "pruned"), (4, RUNGS, "pruned"), (5, RUNGS[:1], "running")):
        curve = ((rungs[-1].examples, 1.0),)
        records.append(synthetic.record(number, 0.5, 100, state=state, scores=(), rungs=rungs, curve=curve))
    limit = Failure(kind="limit", message="over the limit of 100 parameters")
    records.append(synthetic.record(6, 0.5, 10**6, state="pruned", scores=(), failure=limit))
    axes = synthetic.study(8).objectives
    return Study(name="s", source="runs/s", records=tuple(records), objectives=axes)


def test_states_are_told_in_words() -> None:
    of = study()
    assert [state_of(r) for r in of.records[2:]] == [
        "complete", "stopped at rung 1 (640 examples)", "stopped at rung 2 (1,920 examples)",
        "reached rung 1 (640 examples)", "not trained",
    ]  # fmt: skip
    assert counted(of.records) == "3 complete, 2 stopped early, 1 not trained, 1 waiting at a rung"


def test_a_score_at_a_rung_makes_no_member_of_a_front_and_no_figure_of_a_budget() -> None:
    of = study()
    assert [r.number for r in front(of.records, of.objectives)] == [0, 1, 2]
    curve = tuning_curve(of.records)
    assert curve is not None
    assert curve.expected.max() <= 0.84 + 1e-9
    # 5 trials cost something: those that ended and those that were stopped, which count as the worst.
    mean = (0.80 + 0.82 + 0.84 + 0.80 + 0.80) / 5
    assert abs(curve.expected[0] - mean) < 1e-9
    # Over all draws of n of the 5: the mean of their best score and of what they trained.
    trials = [(0.80, 6400), (0.82, 6400), (0.84, 6400), (0.80, 640), (0.80, 1920)]
    for n, best, work in zip(curve.trials, curve.expected, curve.work, strict=True):
        draws = list(itertools.combinations(trials, int(n)))
        assert best == pytest.approx(sum(max(score for score, _ in draw) for draw in draws) / len(draws))
        assert work == pytest.approx(sum(sum(ex for _, ex in draw) for draw in draws) / len(draws) / 6400)
    figure = tuning_figure({"all methods": curve}, "accuracy")
    assert figure["data"][-1]["x"] == curve.work.tolist()
    assert "Whole trainings" in str(figure["layout"]["xaxis"]["title"])
    (early,) = [t for t in front_figure(of, SHOWN[0])["data"] if t["name"].startswith("stopped early")]
    assert dict(zip(early["customdata"], early["y"], strict=True)) == {3: 0.7, 4: 0.95, 5: 0.7}
    assert "stopped at rung 2 (1,920 examples)" in hovers(of)[4]


def test_the_report_says_where_trials_were_stopped_and_what_it_saved(tmp_path: Path) -> None:
    of = study()
    assert saved(of.records) == ((6400 - 640) + (6400 - 1920), 5 * 6400)
    rows = dict(spent(of))
    assert rows["Stopped at the rung of 640 examples"] == "1 trial"
    assert rows["Training that stopping saved"] == "10,240 of 32,000 examples (32%)"
    html = re.sub(r"\s+", " ", write_report(of, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "stopped at rung 1 (640 examples)" in html
    assert 'id="rungs"' in html
    bare = dataclasses.replace(of, records=of.records[:3])
    assert 'id="rungs"' not in write_report(bare, tmp_path / "b.html").read_text(encoding="utf-8")


def test_the_figure_of_rungs_has_every_score_on_the_way() -> None:
    figure = rung_figure(study().records, "accuracy")
    assert figure is not None
    whole, stopped = figure["data"]
    assert [(x, y) for x, y in zip(stopped["x"], stopped["y"], strict=True) if x] == [
        (640, 0.7),
        (640, 0.7),
        (1920, 0.95),
    ]
    assert [x for x in whole["x"] if x] == [640, 1920, 6400] * 3
