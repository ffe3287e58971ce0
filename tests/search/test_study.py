"""A search from its first trial to its report, on a tiny model and a task that a keyword decides."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from searches import BATCH, EXAMPLES, make_base, tiny

from peftscape.search.cohort import Cohort
from peftscape.search.config import SearchConfig, TaskConfig
from peftscape.search.export import load
from peftscape.search.session import open_session
from peftscape.search.storage import Storage
from peftscape.search.study import run_search
from peftscape.spaces.design import Design
from peftscape.spaces.presets import textbook
from peftscape.spaces.price import costs
from peftscape.spaces.words import InputError

TRIALS, SEEDS = 8, 2
#: The space of all methods, textbook designs first.
FULL: dict[str, Any] = {"space": "unified", "search": {"textbook": True}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), width=64, rows=320)


@pytest.fixture(autouse=True)
def no_report(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have tests of their own; the first search here wrote a real one."""
    monkeypatch.setattr("peftscape.analysis.report.write_report", lambda study, path: path.write_text(study.name))


def config(base: Path, *, search: dict[str, Any] | None = None, **more: Any) -> SearchConfig:
    task = TaskConfig(path=str(base / "task.csv"), validation_size=40, test_size=60)
    return tiny(base, search={"retest_seeds": SEEDS, **(search or {})}, **{"task": task, **more})


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of the unified space; tests copy the folder."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run_search(config(base, **FULL), out, quiet=True)
    return out


def read(base: Path, out: Path, **more: Any) -> Storage:
    return Storage(out, config(base, **more))


def dominated(rows: list[tuple[float, float]], i: int) -> bool:
    """Whether another row has at least the score for at most the cost, and one of both strictly."""
    score, cost = rows[i]
    return any(s >= score and c <= cost and (s, c) != (score, cost) for s, c in rows)


def tree(folder: Path) -> set[str]:
    """What a folder shows; locks and checksums are hidden files."""
    return {p.name for p in folder.iterdir() if not p.name.startswith(".")}


# -- a finished search


def test_a_search_trains_what_was_asked_for_and_records_all_of_it(base: Path, finished: Path) -> None:
    storage = read(base, finished, **FULL)
    assert storage.trained() == len(storage.records) == TRIALS
    assert {r.state for r in storage.records} == {"complete"}
    assert [r.number for r in storage.records] == list(range(TRIALS))
    session = open_session(config(base))
    for record in storage.records:
        design = Design.from_json(dict(record.design))
        assert (record.digest, record.label) == (design.digest, design.label)
        assert (record.metric, record.n_validation) == ("accuracy", 40)
        assert [s.seed for s in record.scores] == [0]
        assert record.curve[-1][0] == EXAMPLES
        told = costs(
            design, session.backbone.sites, outputs=3, tokens=session.tokens, batch=BATCH, dtype="float32", head="mean"
        )  # fmt: skip
        assert record.costs == told
    assert max(r.validation for r in storage.records) > 0.8, "a keyword decides this task"


def test_textbook_designs_come_first_and_are_named(base: Path, finished: Path) -> None:
    storage = read(base, finished, **FULL)
    names = [r.textbook for r in storage.records]
    assert names[:2] == ["lora", "lora_all_linears"]
    for record in storage.records:
        assert record.textbook or record.label in textbook(), "a label that says it needs no second name"
    assert len({r.digest for r in storage.records}) == TRIALS


def test_the_front_is_what_nothing_dominates(base: Path, finished: Path) -> None:
    storage = read(base, finished, **FULL)
    rows = [(r.validation, float(r.costs.trainable)) for r in storage.records if r.costs]
    wanted = {r.number for i, r in enumerate(storage.records) if not dominated(rows, i)}
    assert {int(name) for name in tree(finished / "adapters")} == wanted
    assert 1 <= len(wanted) <= TRIALS


def test_every_front_design_is_retested_with_further_seeds_on_test_data(base: Path, finished: Path) -> None:
    storage = read(base, finished, **FULL)
    front = {int(name) for name in tree(finished / "adapters")}
    retested = {r.number: r.retests for r in storage.study().records if r.retests}
    assert front <= retested.keys()
    for retests in retested.values():
        assert sorted(s.seed for s in retests) == [1000, 1001]
        for score in retests:
            assert score.n_test == 60
            assert score.test is not None
            assert score.test * 60 == pytest.approx(round(score.test * 60))
    assert len(storage.retested()) == SEEDS * len(retested)


def test_adapters_of_the_front_give_the_scores_on_record(base: Path, finished: Path) -> None:
    storage = read(base, finished, **FULL)
    task = open_session(config(base)).task
    for folder in (finished / "adapters").iterdir():
        adapter = load(folder)
        labels = [row["label"] for row in adapter.predict(task.validation.texts)]
        wanted = [task.labels[int(t)] for t in task.validation.targets]
        [record] = [r for r in storage.records if r.number == int(folder.name)]
        assert np.mean([a == b for a, b in zip(labels, wanted, strict=True)]) == pytest.approx(record.validation)
        assert adapter.design.digest == record.digest


def test_a_report_lies_beside_the_study(finished: Path) -> None:
    assert tree(finished) == {"study.db", "study.db.previous", "report.html", "adapters"}
    text = (finished / "report.html").read_text()
    assert "accuracy" in text
    assert "plotly" in text.lower()


# -- going on


def test_a_finished_search_is_read_and_nothing_is_loaded(
    base: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a finished search loaded its model")

    monkeypatch.setattr("peftscape.search.session.open_session", fail)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", fail)
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    started = time.monotonic()
    study = run_search(config(base, **FULL), finished, quiet=True)
    assert time.monotonic() - started < 2.0
    assert len(study.records) == TRIALS
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C in a step of a cohort."""
    step, steps = Cohort.step, []

    def patched(self: Cohort) -> list[float]:
        steps.append(1)
        if len(steps) > after:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Cohort, "step", patched)


@pytest.mark.parametrize("more", [FULL, {}], ids=["textbook", "random"])
def test_an_interrupted_search_becomes_the_unbroken_one(
    more: dict[str, Any], base: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = config(base, **more)
    if more is not FULL:
        finished = tmp_path / "unbroken"
        run_search(of, finished, quiet=True)
    unbroken = read(base, finished, **more).records
    out = tmp_path / "broken"
    for after in (3, EXAMPLES // BATCH + 2):  # in the first row of lanes, and in a later one
        with monkeypatch.context() as patch:
            interrupt(patch, after=after)
            with pytest.raises(KeyboardInterrupt):
                run_search(of, out, quiet=True)
    halfway = {r.number: r for r in read(base, out, **more).records}
    assert 0 < len(halfway) < TRIALS
    assert not read(base, out, **more).attr("finished")

    study = run_search(of, out, quiet=True)
    found = [r for r in study.records if r.state != "running"]
    assert read(base, out, **more).trained() == TRIALS
    assert sum(r.state == "complete" for r in found) == TRIALS
    assert [(r.number, r.digest, r.textbook) for r in found] == [(r.number, r.digest, r.textbook) for r in unbroken]
    for record in found:
        if record.number in halfway:
            assert halfway[record.number].scores == record.scores, "what was done is not done again"
    for one, other in zip(found, unbroken, strict=True):
        assert [seen for seen, _ in one.curve] == [seen for seen, _ in other.curve]
        assert [loss for _, loss in one.curve] == pytest.approx([loss for _, loss in other.curve], abs=1e-5)
        if one.scores:  # beside other neighbours sums come in another order: one of 40 answers may move
            assert one.validation == pytest.approx(other.validation, abs=1 / 40 + 1e-9)
    assert (out / "report.html").exists()


def test_interrupted_retests_are_completed_and_none_is_done_twice(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = config(base, budget={"trials": 3}, search={"retest_seeds": 5})
    steps = EXAMPLES // BATCH
    with monkeypatch.context() as patch:
        interrupt(patch, after=2 * steps + 2)  # one row of trials, one of retests, and into the second
        with pytest.raises(KeyboardInterrupt):
            run_search(of, tmp_path, quiet=True)
    first = read(base, tmp_path, search={"retest_seeds": 5}).retested()
    assert first
    study = run_search(of, tmp_path, quiet=True)
    storage = read(base, tmp_path, search={"retest_seeds": 5})
    retested = [(r.number, s.seed) for r in study.records for s in r.retests]
    assert len(retested) == len(set(retested)) == len(storage.retested()) > len(first)
    assert all(len(r.retests) in (0, 5) for r in study.records)


def test_more_trials_extend_a_finished_search(base: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "more"
    shutil.copytree(finished, out)
    of = config(base, **FULL)
    study = run_search(of, out, more_trials=3, quiet=True)
    assert len([r for r in study.records if r.state == "complete"]) == TRIALS + 3
    # The extended budget stands: the same command again finds it finished.
    assert len(run_search(of, out, quiet=True).records) == len(study.records)
    front = {int(name) for name in tree(out / "adapters")}
    assert front <= {r.number for r in study.records if r.retests}


def test_another_configuration_is_refused_with_what_differs(base: Path, finished: Path) -> None:
    before = (finished / "study.db").stat().st_mtime_ns
    of = config(base, search={"textbook": True, "batch_size": 4}, space="lora")
    with pytest.raises(InputError) as error:
        run_search(of, finished, quiet=True)
    assert error.value.errors == (
        f"search.batch_size: was {BATCH}, is 4",
        "space: was 'unified', is 'lora'",
        "this folder holds another search; use another --out, or --fork for a new study that knows this one's results",
    )
    assert (finished / "study.db").stat().st_mtime_ns >= before


def test_a_search_without_an_end_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trials, time, device_time or examples have to be limited"):
        run_search(config(base, budget={"trials": None}), tmp_path, quiet=True)
