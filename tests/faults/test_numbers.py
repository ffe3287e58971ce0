"""NaN and infinity in a loss, a gradient or a metric: one lane stops, its neighbours never notice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from searches import STEPS, complete, tiny

from peftscape.search.cohort import Cohort
from peftscape.search.lane import Lane, new_lane
from peftscape.search.metrics import Metric
from peftscape.search.session import Session, open_session
from peftscape.search.study import run_search
from peftscape.spaces.design import Design

#: Of five families, so that every way of sharing a pass is there.
DESIGNS: list[list[dict[str, Any]]] = [
    [{"method": "lora", "rank": 4}],
    [{"method": "lora", "rank": 2}],
    [{"method": "sequential_adapter"}],
    [{"method": "ia3"}, {"method": "bitfit"}],
    [{"method": "prefix_tuning"}],
]


@pytest.fixture(scope="module")
def session(base: Path) -> Session:
    return open_session(tiny(base))


def lanes(session: Session) -> list[Lane]:
    return [
        new_lane(
            Design.from_json({"placements": placements}),
            seed=i,
            steps=STEPS,
            backbone=session.backbone,
            head=session.head,
        )
        for i, placements in enumerate(DESIGNS)
    ]


def poison(lane: Lane, where: str, value: float) -> None:
    """Make the lane's next loss, or its next gradient alone, one that is not finite."""
    param = next(iter(lane.params.values()))
    if where == "loss":
        with torch.no_grad():
            param.fill_(value)
    else:
        param.register_hook(lambda grad: torch.full_like(grad, value))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("sick", range(len(DESIGNS)))
def test_neighbours_of_a_lane_that_is_not_finite_are_bit_identical(
    session: Session, where: str, value: float, sick: int
) -> None:
    """Against a run of the same shape in which that lane stays finite, and leaves at the same step."""
    found = []
    for poisoned in (True, False):
        cohort, all_ = session.cohort(), lanes(session)
        cohort.admit(*all_)
        for step in range(STEPS):
            if step == 3 and poisoned:
                poison(all_[sick], where, value)
            cohort.step()
            if step == 3:
                cohort.retire(all_[sick])
                assert (all_[sick].failure is not None) == poisoned
        cohort.close()
        found.append(all_)
    failure = found[0][sick].failure
    assert failure is not None
    assert (failure.kind, failure.step) == ("not finite", 3)
    for i, (one, other) in enumerate(zip(*found, strict=True)):
        if i != sick:
            assert one.losses == other.losses
            for key, tensor in other.adapter().items():
                assert torch.equal(one.adapter()[key], tensor), (i, key)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_never_on_a_front(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Optuna takes an infinite accuracy for the best trial of all."""
    score, calls = Metric.score, []

    def strange(self: Metric, logits: Any, targets: Any) -> float:
        calls.append(1)
        return value if len(calls) == 2 else score(self, logits, targets)

    monkeypatch.setattr(Metric, "score", strange)
    study = run_search(tiny(base, budget={"trials": 4}), tmp_path, quiet=True)
    failed = [r for r in study.records if r.state == "failed"]
    assert [(r.failure.kind, r.failure.step) for r in failed if r.failure] == [("not finite", STEPS)]
    assert len(complete(tmp_path)) == 3
    assert str(failed[0].number) not in {path.name for path in (tmp_path / "adapters").iterdir()}


def test_the_record_of_a_lane_that_is_not_finite_says_where(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Cohort.step

    def sick(self: Cohort) -> list[float]:
        for lane in self.lanes:
            if lane.name == "1" and lane.step == 5:
                poison(lane, "loss", math.nan)
        return step(self)

    monkeypatch.setattr(Cohort, "step", sick)
    study = run_search(tiny(base, budget={"trials": 4}), tmp_path, quiet=True)
    failure = study.records[1].failure
    assert failure is not None
    assert (study.records[1].state, failure.kind, failure.step) == ("failed", "not finite", 5)
    assert study.spent["lost_s"] > 0
    assert {r.state for r in study.records if r.number != 1} == {"complete"}
