"""Retests that fail leave a record, and a seed that has ended is not trained again after a stop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from searches import STEPS, complete, tiny, trials

from peftscape.analysis.forms import markdown
from peftscape.analysis.notes import failed_runs, spent
from peftscape.analysis.report import write_report
from peftscape.analysis.runs import compare
from peftscape.analysis.runs_report import compared_json
from peftscape.analysis.runs_report import said as compared_lines
from peftscape.analysis.sources import Study, load
from peftscape.search.cohort import Cohort
from peftscape.search.metrics import Metric
from peftscape.search.retest import FIRST_SEED, TRIES
from peftscape.search.study import run_search
from peftscape.spaces.words import InputError


def sick_loss(patch: pytest.MonkeyPatch) -> None:
    """The loss of every retest is not a number in its third step."""
    step = Cohort.step

    def sick(self: Cohort) -> list[float]:
        for lane in self.lanes:
            if lane.seed >= FIRST_SEED and lane.step == 2:
                with torch.no_grad():
                    next(iter(lane.params.values())).fill_(math.nan)
        return step(self)

    patch.setattr(Cohort, "step", sick)


def sick_score(patch: pytest.MonkeyPatch) -> None:
    """What is scored on the test data, of 30 examples, is infinite."""
    score = Metric.score

    def sick(self: Metric, logits: Any, targets: Any) -> float:
        return math.inf if len(targets) == 30 else score(self, logits, targets)

    patch.setattr(Metric, "score", sick)


def test_a_failed_retest_is_kept_named_and_tried_once_more(base: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        sick_loss(patch)
        of, out = tiny(base, budget={"trials": 1}), tmp_path / "run"
        study = run_search(of, out, quiet=True)
        assert [(run.of, run.seed) for run in study.failed_retests] == [(0, FIRST_SEED)], "not again in one session"
        failure = study.failed_retests[0].failure
        assert (failure.kind, failure.step) == ("not finite", 2)
        assert "loss" in failure.message
        assert study.spent["lost_s"] == pytest.approx(study.failed_retests[0].wall_s, abs=1e-3)
        for more in (1, 2):
            study = run_search(of, out, more_trials=1, quiet=True)
            times = [(run.of, run.seed) for run in study.failed_retests].count((0, FIRST_SEED))
            assert times == min(1 + more, TRIES), "once more after a resume, and not for ever"
    assert not [r for r in study.records if r.retests]
    assert {r.state for r in study.records} == {"complete"}, "the trial itself is as it was"
    loaded = [load(source) for source in (out, f"sqlite:///{out / 'study.db'}")]
    for study in loaded:
        said(study, tmp_path)
    found = compare(loaded)
    told = compared_json(found)["groups"]
    assert [spent["lost_s"] for group in told for spent in group["spent"]] == [study.spent["lost_s"]] * 2
    assert any(line.startswith("Spent by ") and "lost to failures" in line for line in compared_lines(found))


def said(study: Study, folder: Path) -> None:
    """The report, of a folder as of an address, names what failed, and tells what was spent and on what."""
    name = f"{study.records[0].label}, retest with seed {FIRST_SEED}"
    assert name in [row[1] for row in failed_runs(study)]
    parts = dict(spent(study))
    for words in ("Training trials", "Evaluating trials", "Training and scoring retests", "Lost to failures"):
        assert parts[words].endswith("s"), words
    assert parts["Sessions"] == "3"
    assert parts["Retests that failed"] == str(len(study.failed_retests))
    write_report(study, folder / "report.html")
    html, text = (folder / "report.html").read_text(encoding="utf-8"), markdown(study)
    for words in (name, "Failed runs", "Waiting for other workers", "Lost to failures"):
        assert words in html
        assert words in text


def test_a_retest_that_failed_once_may_give_a_score_later(base: Path, tmp_path: Path) -> None:
    of = tiny(base, budget={"trials": 1})
    with pytest.MonkeyPatch.context() as patch:
        sick_score(patch)
        [failed] = run_search(of, tmp_path, quiet=True).failed_retests
    assert (failed.failure.kind, failed.failure.step) == ("not finite", STEPS)
    assert "inf on test data" in failed.failure.message
    study = run_search(of, tmp_path, more_trials=1, quiet=True)
    assert [(run.of, run.seed) for run in study.failed_retests] == [(0, FIRST_SEED)], "it stays in the record"
    assert [score.seed for score in study.records[0].retests] == [FIRST_SEED]


# -- seeds


def test_a_seed_that_has_ended_is_not_trained_again_after_a_stop(base: Path, tmp_path: Path) -> None:
    """Seeds of a design that trains alone come one after the other; it is stopped within the second."""
    space = {"slots": [{"name": "all", "options": [{"method": "full_finetuning"}]}], "training": {"lr": 1e-3}}
    of = tiny(base, space=space, search={"seeds": 2, "retest_seeds": 0}, budget={"trials": 1})
    unbroken = run_search(of, tmp_path / "unbroken", quiet=True).records[0]
    step, trained = Cohort.step, list[tuple[int, int]]()

    def counted(self: Cohort) -> list[float]:
        if len(trained) == STEPS + 2:
            trained.append((-1, -1))
            raise KeyboardInterrupt
        trained.extend((lane.seed, lane.step) for lane in self.lanes)
        return step(self)

    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cohort, "step", counted)
        with pytest.raises(KeyboardInterrupt):
            run_search(of, out, quiet=True)
        assert [trial["state"] for trial in trials(out).values()] == ["WAITING"]
        run_search(of, out, quiet=True)
    again = trained[STEPS + 3 :]
    assert again == [(1, n) for n in range(2, STEPS)], "the first seed's score was kept, the second went on"
    record = complete(out)[0]
    assert [score["validation"] for score in record["scores"]] == [score.validation for score in unbroken.scores]
    assert not list((out / "checkpoints").iterdir())


# -- loading


def test_loading_that_hangs_ends_at_its_time_limit(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = list[float]()

    def hang(config: Any) -> None:
        began.append(time.monotonic())
        time.sleep(60)

    monkeypatch.setattr("peftscape.search.session.open_session", hang)
    with pytest.raises(InputError, match=r"not loaded within 1 s, which is search\.step_limit"):
        run_search(tiny(base, search={"step_limit": "1s"}), tmp_path / "limit", quiet=True)
    assert time.monotonic() - began[0] < 1 + 5
    started = time.monotonic()
    run_search(tiny(base, budget={"time": "8s"}), tmp_path / "time", quiet=True)
    assert time.monotonic() - started < 8, "the report is within the time"
    assert (tmp_path / "time" / "report.html").is_file()


def test_a_design_whose_tensors_find_no_memory_is_recorded_so(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftscape.search import guarded

    new_lane = guarded.new_lane

    def scarce(design: Any, **more: Any) -> Any:
        if more["name"] == "1" or more["seed"] >= FIRST_SEED:
            return torch.empty(2**50)  # what torch itself says of a petabyte
        return new_lane(design, **more)

    monkeypatch.setattr(guarded, "new_lane", scarce)
    study = run_search(tiny(base, budget={"trials": 3}), tmp_path, quiet=True)
    assert [r.state for r in study.records] == ["complete", "failed", "complete"]
    failure = study.records[1].failure
    assert failure is not None
    assert (failure.kind, failure.step) == ("out of memory", 0)
    assert {run.failure.kind for run in study.failed_retests} == {"out of memory"}
