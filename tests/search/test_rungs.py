"""Which lanes go on: against brute force on random data, and on a plain Optuna study."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peftscape.search.config import SearchSettings
from peftscape.search.rung_rules import FEWEST_PEERS, RULES, crowding, epsilon_net, expected, like_cost, logs
from peftscape.search.rung_study import StudyRungs
from peftscape.search.rungs import WAITING, Entry, Rungs, Verdict, after, rungs_of

SEEDS = range(20)
GO_ON, WAIT, STOP = Verdict.GO_ON, Verdict.WAIT, Verdict.STOP


def data(seed: int, costs: int = 1) -> tuple[Any, Any, Any]:
    """Scores with ties, costs over several decades with ties, errors."""
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 40))
    scores = np.round(random.uniform(0, 1, n), int(random.integers(1, 4)))
    return scores, np.round(10 ** random.uniform(1, 6, (n, costs)), -1), np.full(n, 0.02)


def cohort(seed: int, rungs: int = 1, **more: Any) -> list[Entry]:
    scores, costs, errors = data(seed)
    random = np.random.default_rng(seed)
    return [
        Entry(
            key=i,
            costs=(float(costs[i, 0]),),
            scores=(float(scores[i]), *random.uniform(0, 1, rungs - 1).tolist()),
            error=float(errors[i]),
            **more,
        )
        for i in range(len(scores))
    ]


def beats(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)


def ranks(scores: Any, costs: Any) -> list[int]:
    """Non-dominated ranks, peeled one by one."""
    rows = [(-s, *c) for s, c in zip(scores.tolist(), costs.tolist(), strict=True)]
    found: dict[int, int] = {}
    for rank in itertools.count():
        left = [i for i in range(len(rows)) if i not in found]
        if not left:
            return [found[i] for i in range(len(rows))]
        found |= dict.fromkeys((i for i in left if not any(beats(rows[j], rows[i]) for j in left)), rank)
    raise AssertionError


# -- rules


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("costs", [1, 2])
def test_a_rule_orders_every_lane_once(name: str, costs: int) -> None:
    for seed in SEEDS:
        rows = data(seed, costs)
        assert sorted(RULES[name](*rows).tolist()) == list(range(len(rows[0])))


@pytest.mark.parametrize("rule", [crowding, epsilon_net])
@pytest.mark.parametrize("costs", [1, 2])
def test_plain_rank_agrees_with_brute_force(rule: Any, costs: int) -> None:
    for seed in SEEDS:
        rows = data(seed, costs)
        wanted = ranks(*rows[:2])
        assert [wanted[i] for i in rule(*rows)] == sorted(wanted)


def test_crowding_takes_the_ends_of_a_front_first_and_then_the_loneliest() -> None:
    scores, costs = np.array([0.1, 0.2, 0.6, 0.65, 0.9]), np.array([[10.0], [1e2], [1e3], [1e4], [1e5]])
    order = crowding(scores, costs, np.zeros(5)).tolist()
    assert set(order[:2]) == {0, 4}
    size = np.arange(1, 6)
    distance = {i: (scores[i + 1] - scores[i - 1]) / 0.8 + (size[i + 1] - size[i - 1]) / 4 for i in (1, 2, 3)}
    assert order[2:] == sorted(distance, key=lambda i: -distance[i])


def test_an_epsilon_net_goes_where_nobody_is_yet() -> None:
    for seed in SEEDS:
        scores, costs, errors = data(seed)
        order, rank = epsilon_net(scores, costs, errors).tolist(), ranks(scores, costs)
        losses = np.column_stack([-scores, np.log(costs[:, 0])])
        span = np.ptp(losses, axis=0)
        points = losses / np.where(span > 0, span, 1)
        first = [i for i in order if rank[i] == 0]
        assert scores[first[0]] == scores[np.array(rank) == 0].max()
        for k in range(1, len(first)):
            far = {i: min(np.linalg.norm(points[i] - points[j]) for j in first[:k]) for i in first[k:]}
            assert far[first[k]] == pytest.approx(max(far.values()))


def peers(reach: Any, i: int) -> list[int]:
    """Lanes a lane is compared with: no dearer than it and a width, and the nearest on the dear side if need be."""
    spread = np.minimum(reach.std(axis=0), np.subtract(*np.quantile(reach, [0.75, 0.25], axis=0)) / 1.34)
    width = np.maximum(0.45 * spread * len(reach) ** -0.2, math.log(1.1))
    others = [j for j in range(len(reach)) if j != i]
    beyond = {j: float(((reach[j] - reach[i]) / width).max()) for j in others}
    nearest = sorted(beyond.values())[: min(FEWEST_PEERS, len(others))]
    return [j for j in others if beyond[j] <= max(1.0, *nearest) + 1e-12]


@pytest.mark.parametrize("costs", [1, 2])
def test_what_is_expected_is_the_best_of_its_like_cost_peers(costs: int) -> None:
    for seed in SEEDS:
        scores, cost, _ = data(seed, costs)
        if len(scores) < 2:
            continue
        reach = logs(cost)
        wanted = [max(scores[j] for j in peers(reach, i)) for i in range(len(scores))]
        np.testing.assert_array_equal(expected(scores, reach), wanted)


def test_an_exact_cost_axis_does_not_save_a_bad_cheap_lane() -> None:
    random = np.random.default_rng(0)
    costs = 10 ** random.uniform(3, 6, 30)
    scores = 0.5 + 0.08 * (np.log10(costs) - 3) + random.normal(0, 0.02, 30)
    costs, scores = np.append(costs, 900.0), np.append(scores, 0.1)
    places, errors = 10, np.full(31, 0.02)
    assert 30 in crowding(scores, costs[:, None], errors)[:places], "it is the cheapest, so nothing dominates it"
    assert 30 not in like_cost(scores, costs[:, None], errors)[: 2 * places]


def test_every_region_of_the_costs_keeps_a_contender() -> None:
    """Three regions, each with a clear best; two thirds of all lanes, and the best scores, are in the dear one."""
    random = np.random.default_rng(1)
    centres = np.repeat([2.0, 4.0, 6.0], [10, 10, 40])
    costs = 10 ** (centres + random.uniform(-0.3, 0.3, 60))
    scores = 0.1 * centres + random.uniform(-0.05, 0, 60)
    best = [int(np.flatnonzero(centres == c)[np.argmax(scores[centres == c])]) for c in (2, 4, 6)]
    order = like_cost(scores, costs[:, None], np.full(60, 0.01)).tolist()
    assert set(best) <= set(order[:12])
    assert order.index(int(np.argmax(scores))) <= 6


def test_an_order_does_not_depend_on_units() -> None:
    for name, rule in RULES.items():
        for seed in SEEDS:
            scores, costs, errors = data(seed)
            costs = np.maximum(costs, 10.0)
            scores = scores + np.arange(len(scores)) * 1e-6  # no ties: they fall as rounding has it
            costs = costs * (1 + np.arange(len(scores)) * 1e-6)[:, None]
            assert rule(scores, costs, errors).tolist() == rule(scores, costs * 2.0**-20, errors).tolist(), name


# -- rungs


def test_one_of_factor_goes_on_and_the_first_of_the_order() -> None:
    for seed, name in itertools.product(SEEDS, RULES):
        entries, rungs = cohort(seed), Rungs(factor=3, rule=name)
        order = RULES[name](*data(seed)).tolist()
        verdicts = rungs.decide(0, entries)
        gone = [key for key, verdict in verdicts.items() if verdict is GO_ON]
        assert gone == order[: len(entries) // 3]
        assert all(verdict is WAIT for key, verdict in verdicts.items() if key not in gone)


def test_a_lane_that_goes_on_is_among_the_best_of_its_like_cost_peers() -> None:
    """Beaten by hardly any peer beyond the scores' error, or the best of its score whatever it costs."""
    for seed in SEEDS:
        entries = cohort(seed)
        reach = logs(np.array([e.costs for e in entries]))
        gaps = [
            e.scores[0] - max((entries[j].scores[0] for j in peers(reach, i)), default=e.scores[0])
            for i, e in enumerate(entries)
        ]
        places = len(entries) // 3
        gone = [k for k, v in Rungs(rule="like-cost").decide(0, entries).items() if v is GO_ON]
        by_gap = sorted(range(len(entries)), key=lambda i: -gaps[i])[: max(places, 1)]
        by_score = sorted((e.scores[0] for e in entries), reverse=True)[: places // 3 + 1]
        least = min(gaps[i] for i in by_gap)
        for k in gone:
            assert gaps[k] >= min(least, -math.sqrt(2) * 0.02) or entries[k].scores[0] >= by_score[-1]


def test_records_in_any_order_give_the_same_verdicts() -> None:
    for seed, name in itertools.product(SEEDS, RULES):
        entries, rungs = cohort(seed, rungs=2), Rungs(rule=name)
        shuffled = np.random.default_rng(seed).permutation(np.array(entries, dtype=object)).tolist()
        for rung in (0, 1):
            assert list(rungs.decide(rung, shuffled).items()) == list(rungs.decide(rung, entries).items())
        assert rungs.next(shuffled) == rungs.next(entries)


def test_other_rungs_and_other_brackets_are_not_compared_with() -> None:
    for seed in SEEDS:
        entries, rungs = cohort(seed), Rungs(count=2)
        alone = rungs.decide(0, entries)
        further = [replace(e, scores=(*e.scores, 1.0)) for e in cohort(seed + 1, bracket=1)]
        strangers = [replace(e, key=e.key + 100) for e in further]
        together = rungs.decide(0, [*entries, *strangers])
        assert {k: v for k, v in together.items() if k < 100} == alone
        assert {v for k, v in together.items() if k >= 100} == {GO_ON}, "they pass the rungs before their bracket's"


def test_protected_lanes_never_stop_and_take_no_place() -> None:
    for seed in SEEDS:
        entries = cohort(seed)
        bad = [Entry(key=100 + i, costs=(50.0 + i,), scores=(-1.0,), protected=True) for i in range(5)]
        verdicts = Rungs(waiting=0).decide(0, [*entries, *bad])
        assert all(verdicts[e.key] is GO_ON for e in bad)
        assert sum(v is GO_ON for v in verdicts.values()) == len(bad) + len(entries) // 3


@pytest.mark.parametrize("error", [0.0, 0.05])
def test_nothing_below_the_floor_goes_on_but_for_the_scores_noise(error: float) -> None:
    for seed in SEEDS:
        entries = [replace(e, error=error) for e in cohort(seed)]
        floor = Entry(key=100, costs=(5.0,), scores=(0.6,), floor=True)
        verdicts = Rungs().decide(0, [*entries, floor])
        assert verdicts[100] is GO_ON
        low = {e.key for e in entries if 0.6 - e.scores[0] > math.sqrt(2) * error}
        assert low == {k for k, v in verdicts.items() if v is STOP}


def test_a_score_that_is_no_number_stops_its_lane_alone() -> None:
    entries = [Entry(key=i, costs=(10.0 + i,), scores=(math.nan if i == 2 else 0.5 + i / 10,)) for i in range(6)]
    verdicts = Rungs().decide(0, entries)
    assert [k for k, v in verdicts.items() if v is STOP] == [2]
    assert sum(v is GO_ON for v in verdicts.values()) == 2


def test_so_many_wait_and_the_rest_stop() -> None:
    entries = cohort(3)
    ranked = crowding(*data(3)).tolist()
    places = len(entries) // 3
    verdicts = Rungs(waiting=4).decide(0, entries)
    assert {k for k, v in verdicts.items() if v is WAIT} == set(ranked[places : places + 4])
    assert {k for k, v in verdicts.items() if v is STOP} == set(ranked[places + 4 :])


def test_a_lane_that_waits_goes_on_when_more_have_come() -> None:
    rungs, entries = Rungs(rule="quality"), {}
    for key, score in enumerate([0.9, 0.5, 0.4]):
        entries[key] = Entry(key=key, costs=(100.0,), scores=(score,))
        assert rungs.verdict(key, entries.values()) is WAIT
        assert rungs.next(entries.values()) == (0 if key == 2 else None), "three lanes make the first place"
    entries[0] = after(entries[0], GO_ON)
    assert rungs.next(entries.values()) is None
    entries[0] = replace(entries[0], scores=(0.9, 0.95))
    assert rungs.verdict(0, entries.values()) is WAIT, "it is alone at the second rung"
    entries[3] = Entry(key=3, costs=(100.0,), scores=(0.95,))
    assert rungs.verdict(3, entries.values()) is GO_ON


def test_one_goes_on_without_a_place_where_it_is_needed() -> None:
    entries = [Entry(key=i, costs=(100.0,), scores=(0.4 + i / 10,)) for i in range(2)]
    assert Rungs(rule="quality").next(entries) is None
    assert Rungs(rule="quality").next(entries, needed=True) == 1
    assert Rungs(rule="quality").next([], needed=True) is None


def test_what_waits_behind_too_many_or_below_a_floor_that_came_later_is_stopped() -> None:
    for seed in SEEDS:
        entries = cohort(seed)
        ranked = crowding(*data(seed)).tolist()
        last = len(entries) // 3 + 4
        assert set(Rungs(waiting=4).stopped(entries)) == set(ranked[last:])
        floor = Entry(key=100, costs=(5.0,), scores=(0.6,), floor=True)
        low = {e.key for e in entries if 0.6 - e.scores[0] > math.sqrt(2) * e.error}
        assert set(Rungs().stopped([*entries, floor])) == low
        assert Rungs().stopped([replace(e, ended=True) for e in entries]) == []


def test_the_rungs_of_a_search_are_those_of_its_settings() -> None:
    assert rungs_of(SearchSettings(), 90) is None
    found = rungs_of(SearchSettings(rungs=2, factor=3, brackets=2), 90)
    assert found is not None
    assert (found.steps(90), found.brackets, found.waiting) == ((10, 30), 2, WAITING)
    with pytest.raises(ValueError, match="3 steps are too few"):
        rungs_of(SearchSettings(rungs=2), 3)


def test_an_error_may_depend_on_the_quality() -> None:
    study = study_of(3)
    rungs = StudyRungs(study, Rungs(), error=lambda quality: quality / 10)
    rungs.tell(study.ask(), (0.5, 10.0))
    assert [entry.error for entry in rungs.entries()] == [0.05]


def test_the_highest_rung_goes_first() -> None:
    low = [Entry(key=i, costs=(9.0,), scores=(0.9,)) for i in range(6)]
    high = [Entry(key=10 + i, costs=(9.0,), scores=(0.1, i / 10), promoted=1) for i in range(3)]
    assert Rungs(rule="quality").next([*low, *high]) == 12


def test_what_was_promoted_stays_promoted() -> None:
    for seed in SEEDS:
        entries = [replace(e, promoted=1) for e in cohort(seed)]
        assert set(Rungs().decide(0, entries).values()) == {GO_ON}


def test_rungs_lie_at_fractions_of_the_training() -> None:
    assert Rungs(count=3, factor=3).steps(270) == (10, 30, 90)
    assert Rungs(count=2, factor=4).fractions == (1 / 16, 1 / 4)
    assert Rungs(count=2, factor=3).steps(10) == (2, 4)
    with pytest.raises(ValueError, match="3 steps are too few"):
        Rungs(count=2).steps(3)


def test_brackets_get_the_same_work() -> None:
    rungs = Rungs(count=3, factor=3, brackets=3)
    chosen = [rungs.bracket(i) for i in range(200)]
    # Of bracket b all train to rung b, a third of those to the next rung, a ninth of them to the one after.
    lengths = [1 / 27, 1 / 9, 1 / 3, 1]
    work = [
        chosen.count(b) * sum(3.0 ** (b - r) * (lengths[r] - (lengths[r - 1] if r > b else 0)) for r in range(b, 4))
        for b in range(3)
    ]
    assert max(work) - min(work) < 1
    assert rungs.bracket(0, slow=True) == 1
    assert Rungs(count=2).bracket(7) == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"count": 0}, "count"), ({"factor": 1}, "factor"), ({"brackets": 3}, "brackets"), ({"waiting": -1}, "waiting"),
     ({"rule": "like-costs"}, "like-cost")],
)  # fmt: skip
def test_wrong_settings_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Rungs(**wrong)


def test_wrong_entries_are_named() -> None:
    with pytest.raises(ValueError, match="trial 7: expected costs"):
        Entry(key=7, costs=(-1.0,))
    with pytest.raises(ValueError, match="twice"):
        Rungs().decide(0, [Entry(key=1, costs=(1.0,), scores=(0.5,))] * 2)
    with pytest.raises(KeyError):
        Rungs().verdict(1, [Entry(key=1, costs=(1.0,))])


# -- any Optuna study


def made_up(trial: Any, part: float) -> tuple[float, float]:
    """A quality that rises while training, and an exact cost."""
    size, rate = trial.suggest_float("size", 1, 5), trial.suggest_float("rate", 0, 1)
    return (0.5 + 0.1 * size - abs(rate - 0.4)) * (1 - math.exp(-5 * part)), 10.0**size


def search(study: Any, trials: int, *, stop_at: int | None = None) -> tuple[StudyRungs, list[tuple[int, float]]]:
    """The loop of the module's docstring; a trial trains from where it was, never a part twice."""
    rungs, trained = StudyRungs(study, Rungs(count=2, factor=3), error=0.01), []
    while len(study.trials) < trials:
        trial = rungs.next() or study.ask()
        for part in rungs.left(trial):
            trained.append((trial.number, part))
            if rungs.tell(trial, made_up(trial, part)) is not GO_ON:
                break
    return rungs, trained


def study_of(seed: int) -> Any:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.RandomSampler(seed=seed)
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)


def test_a_plain_optuna_study_with_two_objectives() -> None:
    study = study_of(0)
    rungs, trained = search(study, 40)
    rungs.close()
    assert len(trained) == len(set(trained)), "a promoted trial goes on from where it was"
    states = [t.state.name for t in study.trials]
    assert set(states) == {"COMPLETE", "PRUNED"}
    done = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert 2 <= len(done) <= 10
    assert {t.number for t in study.best_trials} <= {t.number for t in done}
    for trial in done:
        assert trial.values == list(made_up(trial, 1.0))
        assert [n for n, _ in trained].count(trial.number) == 3
    ends = {1 / 9: 1 / 9, 1 / 3: 2 / 9, 1.0: 2 / 3}
    assert sum(ends[part] for _, part in trained) < 0.5 * len(study.trials)


def test_another_process_decides_alike() -> None:
    one, two = study_of(1), study_of(1)
    first, _ = search(one, 25)
    second, _ = search(two, 25)
    assert first.entries() == second.entries()
    again = StudyRungs(one, Rungs(count=2, factor=3), error=0.01)
    assert again.entries() == first.entries()
    assert again.next() is None, "what waits in another process is not its to train"


def test_marked_trials_of_a_study_run_to_the_end() -> None:
    study = study_of(2)
    rungs = StudyRungs(study, Rungs(count=2), quality=0)
    trial = study.ask()
    rungs.mark(trial, protected=True)
    assert [rungs.tell(trial, (0.0, 10.0)) for _ in rungs.left(trial)] == [GO_ON, GO_ON, STOP]
    assert study.trials[0].state.name == "COMPLETE"
    with pytest.raises(ValueError, match="expected 2 values"):
        rungs.tell(study.ask(), (0.1,))
    with pytest.raises(ValueError, match="quality"):
        StudyRungs(study, Rungs(), quality=2)


def test_a_loss_and_a_speed_are_turned_around() -> None:
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(directions=["maximize", "minimize"])
    rungs = StudyRungs(study, Rungs(), quality=1)
    rungs.tell(study.ask(), (50.0, 0.7))
    [entry] = rungs.entries()
    assert (entry.costs, entry.scores) == ((0.02,), (-0.7,))


def test_rungs_load_neither_torch_nor_optuna() -> None:
    code = "import sys, peftscape.search.rung_study; print({'torch', 'optuna', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
