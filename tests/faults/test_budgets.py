"""Budgets of whole searches: nothing is overshot, what is left is used, and what was spent is known."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from searches import BATCH, STEPS, Child, complete, tiny, trials, until

from peftscape.analysis.sources import load
from peftscape.search.cohort import Cohort
from peftscape.search.retest import FIRST_SEED
from peftscape.search.study import run_search

LANE = STEPS * BATCH


def slowed(monkeypatch: pytest.MonkeyPatch, lane_step_s: float) -> None:
    step = Cohort.step

    def slow(self: Cohort) -> list[float]:
        time.sleep(lane_step_s * len(self.lanes))
        return step(self)

    monkeypatch.setattr(Cohort, "step", slow)


def test_the_time_is_from_the_command_to_the_report_on_disk(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading, retests and a slow report included; a command that began 3 s ago has 3 s less."""

    def slow(study: Any, path: Path) -> None:
        time.sleep(0.5)
        path.write_text(study.name)

    monkeypatch.setattr("peftscape.analysis.report.write_report", slow)
    slowed(monkeypatch, 0.03)
    of, began = tiny(base, budget={"time": "20s"}), time.monotonic() - 3
    study = run_search(of, tmp_path, quiet=True, started=began)
    took = time.monotonic() - began
    assert took <= 20
    assert (tmp_path / "report.html").is_file()
    assert took > 10, "the time is used"
    assert any(r.retests for r in study.records)
    spent = study.spent
    assert spent["wall_s"] == pytest.approx(took, abs=1.5)
    assert spent["report_s"] >= 0.5
    assert all(spent[name] > 0 for name in ("training_s", "evaluation_s", "retest_s", "loading_s", "device_s"))
    parts = ("loading_s", "training_s", "evaluation_s", "retest_s", "waiting_s", "report_s", "lost_s")
    assert sum(spent[name] for name in parts) <= spent["wall_s"] + 0.1


def test_examples_of_trials_and_retests_stay_within_their_budget(base: Path, tmp_path: Path) -> None:
    of = tiny(base, budget={"examples": 12 * LANE + 5}, search={"retest_seeds": 2})
    study = run_search(of, tmp_path, quiet=True)
    lanes = len(study.records) + sum(len(r.retests) for r in study.records)
    assert study.spent["examples"] == lanes * LANE <= 12 * LANE
    assert lanes >= 10, "most of it is used"
    assert any(r.retests for r in study.records), "some is kept for retests"


def test_device_seconds_stay_within_their_budget(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, 0.05)
    study = run_search(tiny(base, budget={"device_time": "10s"}), tmp_path, quiet=True)
    assert 4 < study.spent["device_s"] <= 10
    assert any(r.retests for r in study.records)


def test_scoring_retests_is_computing_too(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict, spent = Cohort.predict, list[int]()

    def slow(self: Cohort, split: Any, *lanes: Any) -> Any:
        if any(lane.seed >= FIRST_SEED for lane in lanes):
            time.sleep(0.5)
            spent.append(len(lanes))
        return predict(self, split, *lanes)

    monkeypatch.setattr(Cohort, "predict", slow)
    of = tiny(base, budget={"trials": 4, "device_time": "6s"}, search={"lanes": 1, "retest_seeds": 20})
    study = run_search(of, tmp_path, quiet=True)
    assert sum(spent) >= 4, "some are scored"
    assert 0.5 * len(spent) <= study.spent["device_s"] <= 6, "and no more than there is time for"


@pytest.mark.parametrize("limit", ["peak_bytes", "adapter_bytes", "trainable"])
def test_designs_over_a_limit_give_way_to_smaller_ones(base: Path, tmp_path: Path, limit: str) -> None:
    free = run_search(tiny(base, budget={"trials": 6}), tmp_path / "free", quiet=True)
    prices = sorted(getattr(r.costs, limit) for r in free.records)
    bound = (prices[0] + prices[1]) // 2 if prices[0] != prices[1] else prices[0]
    study = run_search(tiny(base, budget={"trials": 6, limit: bound}), tmp_path / "bound", quiet=True)
    trained = [r for r in study.records if r.state == "complete"]
    refused = [r for r in study.records if r.state == "pruned"]
    assert len(trained) == 6
    assert all(getattr(r.costs, limit) <= bound for r in trained)
    assert refused
    assert len(refused) <= 12, "a design over the limit is followed by one that fits"
    assert all(r.failure is not None and f"over the limit of {bound:,}" in r.failure.message for r in refused)


def test_lanes_that_cannot_end_in_time_make_room_for_those_that_can(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight lanes were begun before anything was measured; three of them can end. The rest goes on later."""
    step = Cohort.step
    slowed(monkeypatch, 0.2)
    of = tiny(base, budget={"time": "16s"}, search={"lanes": 8, "retest_seeds": 0})
    began = time.monotonic()
    study = run_search(of, tmp_path, quiet=True)
    assert time.monotonic() - began <= 16
    done = [r for r in study.records if r.state == "complete"]
    assert 1 <= len(done) < 8
    waiting = [n for n, trial in trials(tmp_path).items() if trial["state"] == "WAITING"]
    assert waiting
    begun: dict[str, int] = {}

    def watched(self: Cohort) -> list[float]:
        for lane in self.lanes:
            begun.setdefault(lane.name, lane.step)
        return step(self)

    monkeypatch.setattr(Cohort, "step", watched)
    run_search(of, tmp_path, more_time_s=60.0, more_trials=len(waiting), quiet=True)
    assert len(complete(tmp_path)) >= len(done) + len(waiting)
    assert any(begun[str(number)] > 0 for number in waiting), "nothing of it is lost"


def test_what_a_killed_session_spent_is_counted(base: Path, tmp_path: Path) -> None:
    of, out = tiny(base, budget={"trials": 500}), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftscape.search.workers.LEASE_S", 1.0)
        child = Child(lambda: run_search(of, out, quiet=True), tmp_path / "log")
        started = time.monotonic()
        until(lambda: len(complete(out)) > 6)
        time.sleep(1)
        took = time.monotonic() - started
        child.kill()
        child.wait()
    spent = load(out).spent
    assert took - 2 < spent["wall_s"] <= took
    done = len(complete(out))
    run_search(tiny(base, budget={"trials": done + 4}), out, quiet=True)
    again = load(out).spent
    assert again["wall_s"] > spent["wall_s"]
    assert again["sessions"] == 2
    assert again["examples"] >= (done + 4) * LANE


def test_more_time_is_beyond_what_was_spent(base: Path, tmp_path: Path) -> None:
    of = tiny(base, budget={"trials": 3})
    before = run_search(of, tmp_path, quiet=True).spent
    study = run_search(of, tmp_path, more_time_s=8.0, quiet=True)
    assert before["wall_s"] < study.spent["wall_s"] <= before["wall_s"] + 8
    assert len(study.records) > 3
