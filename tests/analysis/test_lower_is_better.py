"""A metric that is minimised (a language model's loss): fronts, fits, picks and words turn round with it."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import synthetic

from peftscape.analysis.belief import believe, evidence
from peftscape.analysis.compare import optimism
from peftscape.analysis.figures import front_figure
from peftscape.analysis.findings import find
from peftscape.analysis.fit import fit_curve
from peftscape.analysis.forms import markdown
from peftscape.analysis.front import front, parse_objectives
from peftscape.analysis.picks import picks
from peftscape.analysis.report import write_report
from peftscape.analysis.sources import Study
from peftscape.analysis.units import SHOWN
from peftscape.spaces.outcomes import pack
from peftscape.spaces.record import Record, Score

AXES = parse_objectives("loss:min,trainable:min", metrics=["loss"])


def law(cost: float) -> float:
    return float(1.5 + 20 * cost**-0.4)


def loss_record(number: int, loss: float, adapter: int, tests: tuple[float, ...] = (), **more: object) -> Record:
    retests = tuple(Score(seed=1000 + i, validation=loss, test=test, n_test=300) for i, test in enumerate(tests))
    return synthetic.record(number, loss, adapter, metric="loss", direction="minimize", retests=retests, **more)


def study(n: int = 30) -> Study:
    """Losses that fall by a law of cost, or lie above it; the front is retested, and a little worse on test."""
    rng = np.random.default_rng(0)
    adapters = np.exp(rng.uniform(6, 14, n)).astype(int)
    above = np.where(rng.random(n) < 0.5, 0.0, rng.gamma(1.5, 0.1, n)) + rng.normal(0, 0.004, n)
    made = []
    for i, (adapter, more) in enumerate(zip(adapters, above, strict=True)):
        design = {"placements": [{"method": "lora", "rank": int(adapter), "sites": ["q"]}]}
        book = "Hu et al. 2021" if i == 0 else None
        made.append(loss_record(i, law(adapter + 2310) + more, int(adapter), design=design, textbook=book))
    for r in front(made, AXES):
        tests = tuple(r.validation + 0.05 + rng.normal(0, 0.004) for _ in range(3))
        made[r.number] = dataclasses.replace(r, retests=loss_record(0, r.validation, 1, tests).retests)
    return Study(name="lm", source="runs/lm", records=tuple(made), objectives=AXES)


def test_fronts_picks_and_claims_prefer_the_lower_loss(tmp_path: Path) -> None:
    of = study()
    rows = [(r.validation, r.costs.trainable) for r in of.records if r.costs]
    wanted = {i for i, (a, b) in enumerate(rows) if not any(x <= a and y <= b and (x, y) != (a, b) for x, y in rows)}
    found = find(of)
    assert {r.number for r in found.members} == wanted
    for pick in picks(of):
        assert pick.record.validation == min(loss for loss, cost in rows if cost <= pick.limit)
    assert found.belief is not None
    believed = found.belief.by_number
    best = min(of.records, key=lambda r: r.validation)
    hopeless = max(of.records, key=lambda r: r.validation - law(r.costs.trainable if r.costs else 1))
    assert believed[best.number].on_front > 0.5 > believed[hopeless.number].on_front
    assert best in found.alike
    gap = optimism(of.records)
    assert gap is not None
    assert 0.03 < gap.interval.mean < 0.07, "a higher loss on test is a worse one"
    assert found.path[-1].score == best.validation
    text = markdown(of)
    assert "better in validation" in text
    assert "Wilson" not in text, "a loss is no share"
    assert "these figures hold the luck of training alone" in text
    page = write_report(of, tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.search(r"[+-]0\.0\d\d against their own", page) is None


def test_a_law_falls_to_its_floor() -> None:
    curve = find(study()).curves["all methods"]
    costs = np.geomspace(3000, 1e6, 12)
    values = [curve.at(float(cost)).value for cost in costs]
    assert (np.diff(values) < 0).all()
    exact = fit_curve(costs, np.array([law(c) for c in costs]) + np.tile([2e-4, -2e-4], 6), direction="minimize")
    assert exact.kind == "saturating"
    for cost in (5e3, 1e5):
        assert exact.at(cost).value == pytest.approx(law(cost), abs=2e-3)
    reached = exact.cost_for(law(2e4)).cost
    assert reached == pytest.approx(2e4, rel=0.1)
    assert exact.cost_for(1.0).cost is None, "below the floor"


def test_the_figure_turns_its_marks_to_the_better_side() -> None:
    of = study()
    marks = front_figure(of, SHOWN[0], picks(of))["layout"]["annotations"]
    assert marks
    assert all(mark["ay"] > 0 for mark in marks), "below a member there is no trial"


def test_the_error_of_a_loss_comes_from_what_each_example_gave() -> None:
    rng = np.random.default_rng(1)
    hard = rng.gamma(2, 1.0, 400)
    made = []
    for i, gain in enumerate((0.0, 0.1, 0.2, 0.3)):
        own = [hard - gain + rng.normal(0, 0.3, 400) for _ in range(2)]
        retests = tuple(
            Score(seed=s, validation=float(o.mean()), test=float(o.mean()), n_test=400, outcomes=pack(o))
            for s, o in enumerate(own)
        )
        made.append(dataclasses.replace(loss_record(i, float(own[0].mean()), 10 ** (i + 2)), retests=retests))
    made.append(loss_record(4, 1.9, 500))
    belief = believe(made, AXES)
    assert belief is not None
    assert belief.drawn
    assert belief.measured
    assert 0.9 < belief.correlation < 0.99, "0.09 of a variance of 2.09 is the designs' own"
    found = evidence(made, correlation=belief.correlation)
    assert found is not None
    seeds = belief.seed_sd
    assert seeds is not None
    wanted = math.sqrt(2.09 / 537 * (1 - belief.correlation) + seeds**2)
    assert found[0][4].error == pytest.approx(wanted, rel=0.15)
    bare = [
        dataclasses.replace(r, retests=tuple(dataclasses.replace(s, outcomes=None) for s in r.retests)) for r in made
    ]
    without = believe(bare, AXES)
    assert without is not None
    assert not without.drawn
