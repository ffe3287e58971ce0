"""Limits of a search, and trials of all kinds, on a tiny model and a task that a keyword decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from searches import make_base, tiny

from peftscape.analysis.belief import believe
from peftscape.analysis.front import front
from peftscape.search import account as account_module
from peftscape.search import budget as budget_module
from peftscape.search import loop as loop_module
from peftscape.search import retest as retest_module
from peftscape.search import study as study_module
from peftscape.search.cohort import Cohort
from peftscape.search.config import ModelConfig, SearchConfig, TaskConfig
from peftscape.search.session import adapter_card, open_session
from peftscape.search.storage import Storage
from peftscape.search.study import run_search
from peftscape.spaces.design import Design

SEEDS = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), width=64, rows=320)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have tests of their own."""
    monkeypatch.setattr("peftscape.analysis.report.write_report", lambda study, path: path.write_text(study.name))


def config(base: Path, *, search: dict[str, Any] | None = None, **more: Any) -> SearchConfig:
    task = TaskConfig(path=str(base / "task.csv"), validation_size=40, test_size=60)
    return tiny(base, search={"retest_seeds": SEEDS, **(search or {})}, **{"task": task, **more})


# -- limits


def test_designs_over_the_limit_are_never_trained(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, trained = 1500, set()
    admit = Cohort.admit

    def watched(self: Cohort, *lanes: Any) -> None:
        trained.update(lane.design.digest for lane in lanes)
        admit(self, *lanes)

    monkeypatch.setattr(Cohort, "admit", watched)
    of = config(base, budget={"trials": 5, "trainable": limit}, search={"retest_seeds": 0})
    study = run_search(of, tmp_path, quiet=True)
    complete = [r for r in study.records if r.state == "complete"]
    refused = [r for r in study.records if r.state == "pruned"]
    assert len(complete) == 5, "refused designs are not counted"
    assert refused
    assert len(complete) + len(refused) == len(study.records)
    for record in complete:
        assert record.costs is not None
        assert record.costs.trainable <= limit
    for record in refused:
        assert record.costs is not None
        assert record.failure is not None
        assert record.failure.kind == "limit"
        too_wide = "is larger than the linear" in record.failure.message
        assert too_wide or f"over the limit of {limit:,}" in record.failure.message
        assert record.digest not in trained
        assert not record.scores
        assert not record.curve


def test_a_space_with_no_design_under_the_limit_ends(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftscape.search.asking.REFUSED_IN_A_ROW", 12)
    of = config(base, budget={"trials": 5, "trainable": 3})
    study = run_search(of, tmp_path, quiet=True)
    assert [r.state for r in study.records] == ["pruned"] * 12


def test_what_was_enqueued_and_is_no_design_fails_and_says_so(base: Path, tmp_path: Path) -> None:
    of = config(base, budget={"trials": 2}, search={"textbook": False, "retest_seeds": 0})
    run_search(of, tmp_path, quiet=True)
    study = optuna.load_study(study_name=of.name, storage=f"sqlite:///{tmp_path / 'study.db'}")
    known = next(t for t in study.trials if any(isinstance(v, str) for v in t.params.values()))
    name = next(name for name, value in known.params.items() if isinstance(value, str))
    study.enqueue_trial({**known.params, name: "nonsense"})
    study.enqueue_trial(known.params)
    records = {r.number: r for r in run_search(of, tmp_path, more_trials=2, quiet=True).records}
    assert records[2].state == "failed"
    assert records[2].failure is not None
    assert records[2].failure.kind == "not possible"
    assert "nonsense" in records[2].failure.message
    assert records[3].digest == records[known.number].digest
    assert sum(r.state == "complete" for r in records.values()) == 4


class Clock:
    """A clock on which only cohorts take time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, lane_step_s: float, evaluation_s: float) -> None:
        self.now = 0.0
        step, predict = Cohort.step, Cohort.predict

        def slow_step(cohort: Cohort) -> list[float]:
            self.now += lane_step_s * len(cohort.lanes)
            return step(cohort)

        def slow_predict(cohort: Cohort, split: Any, *lanes: Any) -> Any:
            self.now += evaluation_s * len(lanes) * len(split) / 40
            return predict(cohort, split, *lanes)

        monkeypatch.setattr(Cohort, "step", slow_step)
        monkeypatch.setattr(Cohort, "predict", slow_predict)
        fake = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        for module in (study_module, loop_module, retest_module, budget_module, account_module):
            monkeypatch.setattr(module, "time", fake)


@pytest.mark.parametrize("time_s", [150, 300])
def test_a_search_ends_within_its_time_and_uses_it(
    time_s: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of two seconds a lane: a trial takes 16 s and its evaluation 2."""
    clock = Clock(monkeypatch, lane_step_s=2.0, evaluation_s=2.0)
    of = config(base, budget={"trials": None, "time": f"{time_s}s"})
    study = run_search(of, tmp_path, quiet=True)
    assert clock.now <= time_s - 6, "the report still fits"
    assert clock.now > 0.6 * time_s
    complete = [r for r in study.records if r.state == "complete"]
    assert len(complete) >= 2
    assert {len(r.retests) for r in study.records} <= {0, SEEDS}
    assert any(r.retests for r in study.records)
    storage = Storage(tmp_path, config(base))
    assert storage.attr("finished")
    assert storage.attr("spent_s") == pytest.approx(clock.now)

    extended = run_search(of, tmp_path, more_time_s=60, quiet=True)
    assert clock.now <= storage.attr("spent_s") + 60
    assert len([r for r in extended.records if r.state == "complete"]) >= len(complete)


# -- trials of all kinds


def test_a_diverging_trial_fails_and_the_others_go_on(base: Path, tmp_path: Path) -> None:
    space = {
        "slots": [{"name": "w", "options": [{"method": "lora", "rank": {"ladder": [1, 8]}}]}],
        "training": {"lr": {"choice": [1e-2, 1e30]}},
    }
    study = run_search(config(base, space=space, budget={"trials": 8}), tmp_path, quiet=True)
    states = {r.state for r in study.records}
    assert states == {"complete", "failed"}
    for record in study.records:
        wild = record.design["training"]["lr"] > 1
        assert (record.state == "failed") == wild
        if wild:
            assert record.failure is not None
            assert (record.failure.kind, record.scores, record.retests) == ("not finite", (), ())
    trials = Storage(tmp_path, config(base, space=space))._study.get_trials(deepcopy=False)
    assert {t.state.name for t in trials} == {"COMPLETE", "PRUNED"}, "told FAIL, TPE would ask for it again"


def test_a_search_whose_trials_all_diverge_ends(base: Path, tmp_path: Path) -> None:
    space = {"slots": [{"name": "w", "options": [{"method": "lora"}]}], "training": {"lr": 1e30}}
    study = run_search(config(base, space=space, budget={"trials": 3}), tmp_path, quiet=True)
    assert [r.state for r in study.records] == ["failed"] * 3
    assert (tmp_path / "report.html").exists()


def test_designs_that_need_the_backbone_for_themselves_train_beside_no_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = []
    step = Cohort.step

    def watched(self: Cohort) -> list[float]:
        together.append([lane.design.solo for lane in self.lanes])
        return step(self)

    monkeypatch.setattr(Cohort, "step", watched)
    slot = {"name": "w", "options": [{"method": "bitfit"}, {"method": "full_finetuning"}]}
    space = {"slots": [slot], "training": {"lr": {"log": [1e-4, 1e-3]}}}
    study = run_search(config(base, space=space, budget={"trials": 6}), tmp_path, quiet=True)
    assert {r.state for r in study.records} == {"complete"}
    assert {r.label for r in study.records} == {"bitfit", "full_finetuning"}
    assert all(len(solo) == 1 for solo in together if any(solo))
    assert any(len(solo) > 1 for solo in together)


def test_several_seeds_a_trial_are_several_lanes(base: Path, tmp_path: Path) -> None:
    of = config(base, search={"seeds": 3, "retest_seeds": 1}, budget={"trials": 2})
    study = run_search(of, tmp_path, quiet=True)
    for record in study.records:
        assert [s.seed for s in record.scores] == [0, 1, 2]
        assert record.validation == pytest.approx(np.mean([s.validation for s in record.scores]))


def test_an_adapters_texts_are_cut_where_the_searchs_were(base: Path) -> None:
    session = open_session(config(base, model=ModelConfig(source=str(base), dtype="float32", max_length=9999)))
    card = adapter_card(session, Design.from_json({"placements": []}), 0)
    assert card.max_length == session.backbone.sites.max_positions < 9999


def test_a_seed_that_fails_ends_its_trial(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others say nothing of the design then, and leave their places to the next."""
    step, steps = Cohort.step, dict[tuple[str, int], int]()

    def sick(self: Cohort) -> list[float]:
        for lane in self.lanes:
            steps[lane.name, lane.seed] = lane.step + 1
            if (lane.name, lane.seed, lane.step) == ("0", 1, 2):
                with torch.no_grad():
                    next(iter(lane.params.values())).fill_(np.nan)
        return step(self)

    monkeypatch.setattr(Cohort, "step", sick)
    of = config(base, search={"seeds": 3, "retest_seeds": 0}, budget={"trials": 2})
    study = run_search(of, tmp_path, quiet=True)
    assert [r.state for r in study.records] == ["failed", "complete"]
    assert [steps["0", seed] for seed in range(3)] == [3, 3, 3]


def test_time_that_is_left_after_all_goes_to_intervals_of_more_designs(base: Path, tmp_path: Path) -> None:
    of = config(base, search={"retest_seeds": 0}, budget={"trials": 8})
    run_search(of, tmp_path, quiet=True)
    storage = Storage(tmp_path, of)
    storage.refresh()
    seconds: list[float] = [4.0]  # no more than for one design's three
    budget: Any = SimpleNamespace(retests_that_fit=lambda steps: seconds[-1])
    settings = replace(of.search, retest_seeds=5)
    session: Any = SimpleNamespace(config=SimpleNamespace(search=settings), steps=8)
    plan = retest_module._Plan(session, storage, budget)
    first, second = list(plan.designs)[:2]
    given: list[tuple[int, int]] = []
    for left, running in [*[(4.0, 0)] * 3, (2.0, 0), (3.0, 1), *[(4.0, 1)] * 3]:
        seconds.append(left)
        job = plan.next(running)
        assert job is not None
        plan.begin(job)
        given.append(job)
    assert given[:5] == [(first, 1000 + i) for i in range(5)], "no time for three of another"
    assert given[5:] == [(second, 1000 + i) for i in range(3)], "until there is"
    storage.close()


def test_further_seeds_go_to_open_places_on_the_front(base: Path, tmp_path: Path) -> None:
    of = config(base, search={"retest_seeds": 3, "further_seeds": 4, "lanes": 2}, budget={"trials": 6})
    study = run_search(of, tmp_path, quiet=True)
    again = {r.number: [s.seed - 1000 for s in r.retests] for r in study.records if r.retests}
    assert {r.number for r in front(study.records, study.objectives)} <= again.keys()
    assert all(sorted(seeds) == list(range(len(seeds))) and len(seeds) >= 3 for seeds in again.values())
    assert sum(len(seeds) - 3 for seeds in again.values()) == 4
    # The first of them goes where the place is most open after three seeds each, by validation alone.
    complete = [r for r in study.records if r.state == "complete"]
    first = {r.number: [s for s in r.retests if s.seed < 1003] for r in complete}
    belief = believe([replace(r, scores=(*r.scores, *first[r.number]), retests=()) for r in complete], study.objectives)
    assert belief is not None
    chance = {number: belief.by_number[number].on_front for number in again}
    most = max(chance, key=lambda number: chance[number] * (1 - chance[number]))
    assert 0 < chance[most] < 1
    assert len(again[most]) > 3


def test_regression_with_a_mean_head_and_a_cost_of_bytes(base: Path, tmp_path: Path) -> None:
    rows = (base / "task.csv").read_text().splitlines()[1:]
    numbers = {"person": "0.5", "place": "1.5", "time": "2.75"}
    rows = [f"{text},{numbers[label]}" for text, _, label in (row.rpartition(",") for row in rows)]
    (tmp_path / "numbers.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    of = config(
        base,
        task=TaskConfig(path=str(tmp_path / "numbers.csv"), validation_size=40, test_size=60, metric="spearman"),
        model=ModelConfig(source=str(base), dtype="bfloat16", head="mean"),
        search={"objectives": "spearman:max,peak_bytes:min", "sampler": "tpe"},
        budget={"trials": 4},
    )
    study = run_search(of, tmp_path / "run", quiet=True)
    complete = [r for r in study.records if r.state == "complete"]
    assert len(complete) == 4
    for record in complete:
        assert record.metric == "spearman"
        assert record.costs is not None
        assert record.costs.head == 65


def test_the_same_configuration_gives_the_same_search(base: Path, tmp_path: Path) -> None:
    of = config(base, search={"sampler": "tpe"}, budget={"trials": 5})
    one, other = (run_search(of, tmp_path / name, quiet=True).records for name in ("one", "other"))
    assert [r.design for r in one] == [r.design for r in other]
    for first, second in zip(one, other, strict=True):
        assert (first.state, first.costs, first.curve) == (second.state, second.costs, second.curve)
        assert [(s.seed, s.validation) for s in first.scores] == [(s.seed, s.validation) for s in second.scores]
        assert sorted((s.seed, s.test) for s in first.retests) == sorted((s.seed, s.test) for s in second.retests)
