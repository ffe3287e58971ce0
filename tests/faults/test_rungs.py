"""Trials of several seeds that wait at rungs and in brackets, whatever ends the processes that put them there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rung_searches import BRACKETS, SEEDS, check, check_folder, config
from searches import EXAMPLES, Child, trials, until

from peftscape.analysis.sources import load
from peftscape.search.cohort import Cohort
from peftscape.search.storage import Storage
from peftscape.search.study import run_search
from peftscape.search.trial import Trial


def test_a_trial_of_two_seeds_is_compared_by_their_mean_in_its_bracket(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a Ctrl-C in the middle: no lane is trained or scored twice."""
    out, told, steps = tmp_path / "run", dict[tuple[int, int], list[float]](), list[int]()
    passing, step = Trial.pass_rung, Cohort.step

    def noted(self: Trial) -> None:
        assert (self.number, len(self.rungs)) not in told
        told[self.number, len(self.rungs)] = [self.scores[lane.seed] for lane in self.lanes]
        passing(self)

    def broken(self: Cohort) -> list[float]:
        steps.append(1)
        if len(steps) == 9:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trial, "pass_rung", noted)
    monkeypatch.setattr(Cohort, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        run_search(config(base), out, quiet=True)
    assert told
    records = run_search(config(base), out, quiet=True).records
    check(records)
    check_folder(out)
    for record in records:
        assert [r.validation for r in record.rungs] == [
            pytest.approx(np.mean(told[record.number, i])) for i in range(len(record.rungs))
        ]
        assert [s.seed for s in record.scores] == ([1, 2] if record.state == "complete" else [])
    assert all(len(seeds) == SEEDS for seeds in told.values())
    trained = sum(record.curve[-1][0] for record in records)
    assert load(out).spent["examples"] == SEEDS * trained < SEEDS * len(BRACKETS) * EXAMPLES


@pytest.mark.faults
def test_a_killed_trial_goes_on_in_its_bracket_with_all_its_seeds(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = Child(lambda: run_search(config(base), out, quiet=True), tmp_path / "log")

    def promoted() -> dict[int, Any]:
        known = trials(out) if (out / "study.db").is_file() else {}
        return {n: t for n, t in known.items() if t["state"] == "RUNNING" and t.get("rungs:promoted")}

    found = until(promoted)
    child.kill()
    child.wait()
    before = {n: t["rungs:values"] for n, t in trials(out).items() if "rungs:values" in t}
    assert before.keys() >= found.keys()
    records = run_search(config(base), out, quiet=True).records
    check(records)
    check_folder(out)
    for number, rows in before.items():
        assert [r.validation for r in records[number].rungs][: len(rows)] == [row[0] for row in rows]


@pytest.mark.postgres
def test_two_folders_share_rungs_on_postgresql(base: Path, tmp_path: Path, server: str) -> None:
    """A trial goes on where its lanes lie; places are shared, and what one worker had in flight another takes up."""
    of, folders = config(base), [tmp_path / "a", tmp_path / "b"]
    children = [
        Child(lambda f=folder: run_search(of, f, quiet=True, storage_url=server), tmp_path / "log")  # type: ignore[misc]
        for folder in folders
    ]
    assert [child.wait(240) for child in children] == [0, 0], children[0].said()
    storage = Storage(folders[0], of, server)
    study = storage.study()
    check(study.records)
    trained = sum(record.curve[-1][0] for record in study.records)
    assert study.spent["examples"] == SEEDS * trained, "no lane was trained by both"
    assert len({t.user_attrs["worker"] for t in storage.trials} if storage.refresh() == 0 else ()) == 2
    storage.close()
    assert not [path for folder in folders for path in (folder / "checkpoints").glob("*")]
