"""Searches that stop trials at rungs: what goes on is what brute force says, and is the training that never stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from searches import BATCH, EXAMPLES, Child, make_base, tiny, trials, until

from peftscape.analysis.sources import load
from peftscape.search.cohort import Cohort
from peftscape.search.config import SearchConfig
from peftscape.search.config_values import value_errors
from peftscape.search.disk import DiskError
from peftscape.search.guarded import Guarded
from peftscape.search.progress import stopped
from peftscape.search.rung_study import FLOOR, waits
from peftscape.search.session import open_session
from peftscape.search.storage import Storage
from peftscape.search.study import run_search
from peftscape.spaces.record import Record, Rung, Score
from peftscape.spaces.words import InputError

FACTOR, TRIALS = 2, 8
SEARCH: dict[str, Any] = {
    "lanes": 3, "rungs": 2, "factor": FACTOR, "rung_rule": "quality", "retest_seeds": 0, "seed": 1,
}  # fmt: skip
RUNGS = (EXAMPLES // 4, EXAMPLES // 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reports have tests of their own; a forked process must not wait for threads that it does not have."""
    monkeypatch.setattr("peftscape.analysis.report.write_report", lambda study, path: path.write_text(study.name))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(base: Path, *, budget: dict[str, Any] | None = None, **search: Any) -> SearchConfig:
    return tiny(base, search=SEARCH | search, budget=budget or {"trials": TRIALS})


def trained(records: tuple[Record, ...]) -> int:
    """Examples of all records' first seeds."""
    return sum(record.curve[-1][0] for record in records if record.curve)


def test_the_head_alone_is_the_floor_of_what_waits(base: Path, tmp_path: Path) -> None:
    of = tiny(base, search={**SEARCH, "textbook": True}, space="unified", budget={"trials": 30})
    run_search(of, tmp_path, quiet=True)
    floors = {t["record"]["label"] for t in trials(tmp_path).values() if t.get(FLOOR)}
    assert floors == {"head_only"}


def check(records: tuple[Record, ...], out: Path) -> None:
    """Every trial has ended, and at each rung the best `1 / FACTOR` of those that reached it went on, or more."""
    assert {record.state for record in records} <= {"complete", "pruned"}
    assert {trial["state"] for trial in trials(out).values()} <= {"COMPLETE", "PRUNED"}
    assert not list((out / "checkpoints").glob("*")), "what is done with is removed"
    for record in records:
        ends = [*(rung.examples for rung in record.rungs), *([EXAMPLES] if record.state == "complete" else [])]
        assert ends == [*RUNGS, EXAMPLES][: len(ends)]
        assert record.curve[-1][0] == ends[-1], "it was trained so far, and no farther"
        assert (len(record.rungs) == 2) or record.state == "pruned"
    for i in range(len(RUNGS)):
        here = [record for record in records if len(record.rungs) > i]
        gone = {r.number for r in here if len(r.rungs) > i + 1 or r.state == "complete"}
        places = len(here) // FACTOR
        last = sorted((r.rungs[i].validation for r in here), reverse=True)[max(places - 1, 0)]
        better = {r.number for r in here if r.rungs[i].validation > last}
        assert places <= len(gone)
        assert better <= gone, "the best of a rung go on, sooner or later"


@pytest.fixture(scope="module")
def unbroken(
    base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[Record, ...], Path, set[tuple[str, int]]]:
    """A search with rungs, its folder, and which trials waited, at which steps."""
    out = tmp_path_factory.mktemp("runs") / "rungs"
    waited: set[tuple[str, int]] = set()
    with pytest.MonkeyPatch.context() as patch:
        put_by = Guarded.put_by
        patch.setattr("peftscape.analysis.report.write_report", lambda study, path: path.write_text(study.name))
        patch.setattr(
            Guarded,
            "put_by",
            lambda self, *lanes: (waited.update((x.name, x.step) for x in lanes), put_by(self, *lanes)),
        )
        records = run_search(config(base), out, quiet=True).records
    return records, out, waited


def test_the_best_at_each_rung_go_on_and_the_rest_is_stopped(unbroken: Any) -> None:
    records, out, _ = unbroken
    assert [record.number for record in records] == list(range(TRIALS))
    check(records, out)
    assert load(out).spent["examples"] == trained(records) < 0.7 * TRIALS * EXAMPLES
    assert load(out).records == records


def test_a_trial_that_waited_is_the_training_that_never_stopped(base: Path, unbroken: Any, tmp_path: Path) -> None:
    records, _, waited = unbroken
    whole = {r.number: r for r in run_search(config(base, rungs=0), tmp_path / "whole", quiet=True).records}
    assert any(records[int(name)].state == "complete" for name, _ in waited), "some went on from there, to the end"
    for record in records:
        plain = whole[record.number]
        assert (plain.digest, plain.rungs) == (record.digest, ())
        steps = record.curve[-1][0] // BATCH
        if record.state == "complete":
            assert record.validation == pytest.approx(plain.validation, abs=1 / 20 + 1e-9)
        assert [x for _, x in record.curve] == pytest.approx([x for _, x in plain.curve[:steps]], abs=1e-5)


def test_a_stopped_search_goes_on_with_what_waited(
    base: Path, unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while trials wait; the next session decides as an unbroken one does."""
    records, out, step = unbroken[0], tmp_path / "broken", Cohort.step
    for after in (5, 4):
        steps: list[int] = []

        def patched(self: Cohort, steps: list[int] = steps, after: int = after) -> list[float]:
            steps.append(1)
            if len(steps) > after:
                raise KeyboardInterrupt
            return step(self)

        with monkeypatch.context() as patch:
            patch.setattr(Cohort, "step", patched)
            with pytest.raises(KeyboardInterrupt):
                run_search(config(base), out, quiet=True)
        storage = Storage(out, config(base))
        assert storage.waiting > 0
        assert {r.state for r in load(out).records} <= {"running", "pruned", "complete"}
        storage.close()
    found = run_search(config(base), out, quiet=True).records
    check(found, out)
    assert [(r.number, r.digest, r.state, len(r.rungs)) for r in found] == [
        (r.number, r.digest, r.state, len(r.rungs)) for r in records
    ]
    assert load(out).spent["examples"] == trained(found), "nothing was trained twice"


def test_a_disk_that_is_full_where_a_trial_waits_leaves_it_waiting(
    base: Path, unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Guarded, *lanes: Any) -> None:
        raise DiskError(tmp_path, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Guarded, "put_by", full)
        with pytest.raises(DiskError):
            run_search(config(base), tmp_path / "run", quiet=True)
    storage = Storage(tmp_path / "run", config(base))
    assert storage.waiting == 1
    assert not [t for t in storage.trials if t.state.name == "WAITING" and waits(t)], "it is not asked for anew"
    storage.close()
    found = run_search(config(base), tmp_path / "run", quiet=True).records
    check(found, tmp_path / "run")
    assert [r.digest for r in found] == [r.digest for r in unbroken[0]]


def test_a_killed_search_loses_no_trial_that_waits(base: Path, tmp_path: Path) -> None:
    of, out = config(base), tmp_path / "run"
    child = Child(lambda: run_search(of, out, quiet=True), tmp_path / "log")
    until(lambda: sum("rungs:values" in t for t in trials(out).values()) >= 4 if (out / "study.db").is_file() else 0)
    child.kill()
    child.wait()
    before = {n: t["rungs:values"] for n, t in trials(out).items() if "rungs:values" in t}
    records = run_search(of, out, quiet=True).records
    check(records, out)
    assert [record.number for record in records] == list(range(TRIALS))
    for number, rows in before.items():
        scores = [rung.validation for rung in records[number].rungs]
        assert scores[: len(rows)] == [row[0] for row in rows], "what was scored is not scored again"


def test_two_workers_share_what_waits(base: Path, tmp_path: Path) -> None:
    of, out = config(base, lanes=2), tmp_path / "run"
    children = [Child(lambda: run_search(of, out, quiet=True), tmp_path / "log") for _ in range(2)]
    assert [child.wait(120) for child in children] == [0, 0], children[0].said()
    study = load(out)
    assert [record.number for record in study.records] == list(range(TRIALS))
    check(study.records, out)
    assert study.spent["examples"] == trained(study.records), "no trial was trained by both"


def test_published_designs_run_to_their_end_and_an_end_of_examples_is_kept(base: Path, tmp_path: Path) -> None:
    most = 7 * EXAMPLES
    of = tiny(base, search=SEARCH | {"textbook": True}, budget={"examples": most}, space="lora")
    study = run_search(of, tmp_path / "run", quiet=True)
    check_states = {r.number: r.state for r in study.records if "textbook" in trials(tmp_path / "run")[r.number]}
    assert check_states
    assert set(check_states.values()) == {"complete"}
    assert trained(study.records) == study.spent["examples"] <= most
    assert study.spent["examples"] > most - EXAMPLES
    assert any(record.state == "pruned" for record in study.records)


def test_a_search_too_small_for_places_still_ends_with_a_design(base: Path, tmp_path: Path) -> None:
    study = run_search(config(base, rungs=1, budget={"trials": 1}), tmp_path / "run", quiet=True)
    assert [record.state for record in study.records] == ["complete"]
    storage = Storage(tmp_path / "run", config(base, rungs=1))
    assert storage.waiting == 0
    storage.close()
    with pytest.raises(InputError, match=r"search.rungs: was 1, is 2"):
        Storage(tmp_path / "run", config(base, rungs=2))


def test_a_training_too_short_for_its_rungs_is_refused(base: Path) -> None:
    said = "search.rungs: 8 steps are too few for 4 rungs of factor 3"
    assert any(line.startswith(said) for line in value_errors(config(base, rungs=4, factor=3)))
    with pytest.raises(InputError, match="8 steps are too few"):
        open_session(config(base, rungs=4, factor=3))
    assert value_errors(config(base, brackets=3)) == [
        "search.brackets: 3 are more than the rungs, 2, at which they begin"
    ]


def test_a_record_keeps_its_rungs(unbroken: Any) -> None:
    for record in unbroken[0]:
        assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_the_progress_says_what_was_stopped_and_what_it_saved() -> None:
    def record(number: int, state: Any, *rungs: int) -> Record:
        end = EXAMPLES if state == "complete" else rungs[-1]
        return Record(
            number=number, state=state, design={}, digest="", label="", metric="accuracy", direction="maximize",
            n_validation=20, scores=(Score(seed=0, validation=0.5),) if state == "complete" else (), costs=None,
            curve=((end, 1.0),), rungs=tuple(Rung(examples=n, validation=0.5) for n in rungs),
        )  # fmt: skip

    first, second = RUNGS
    done = record(0, "complete", first, second)
    assert stopped([done]) == ""
    found = [done, record(1, "pruned", first), record(2, "pruned", first), record(3, "pruned", first, second)]
    assert stopped(found) == "2 + 1 stopped at rungs, 50% of the work saved"  # (48 + 48 + 32) of 4 x 64
    assert stopped(found[1:]) == "2 + 1 stopped at rungs"
