"""Outcomes of test examples: packed, read from a study, and paired by example first and by seed second."""

import dataclasses

import numpy as np
import optuna
import pytest
import synthetic
from simulated import answers, searched

from peftscape.analysis.belief import believe
from peftscape.analysis.compare import better_than
from peftscape.analysis.front import parse_objectives
from peftscape.analysis.outcomes import likeness, of_record
from peftscape.analysis.sources import from_optuna
from peftscape.spaces.outcomes import pack
from peftscape.spaces.record import Record, Score

AXES = parse_objectives("accuracy:max,trainable:min")


def retested(number: int, given: np.ndarray, *, kept: bool = True) -> Record:
    scores = tuple(
        Score(seed=s, validation=0.9, test=float(row.mean()), n_test=len(row), outcomes=pack(row) if kept else None)
        for s, row in enumerate(given)
    )
    return synthetic.record(number, 0.9, retests=scores)


def test_outcomes_of_a_study_are_those_of_its_retests() -> None:
    rng = np.random.default_rng(0)
    study, retests = synthetic.store(synthetic.records(3), optuna.storages.InMemoryStorage(), retested=(0,), seeds=1)
    assert retests is not None
    row = (rng.random(500) < 0.8).astype(float)
    other = {"of": 0, "validation": 0.8, "n_test": 500}
    for retest in (
        {**other, "seed": 7, "test": float(row.mean()), "outcomes": pack(row)},
        {**other, "seed": 8, "test": 0.1, "outcomes": pack(row)},
        {**other, "seed": 9, "test": 0.1, "outcomes": "bits:3:?"},
    ):
        retests.add_trial(optuna.trial.create_trial(value=0.0, user_attrs={"retest": retest}))
    loaded = from_optuna(study, retests)
    found = of_record(loaded.records[0])
    assert found.keys() == {7}
    assert (found[7] == row).all()
    assert sum("cannot be read" in note for note in loaded.notes) == 2
    assert len(loaded.records[0].retests) == 4


def test_pairing_by_example_sees_what_pairing_by_seed_cannot() -> None:
    rng = np.random.default_rng(1)
    given = answers(rng, np.array([0.9, 0.9]), 3, 500, 0.0)
    better = given[0].copy()
    better[:, rng.choice(500, 40, replace=False)] = 1  # right wherever A is, and on some more
    pair = [retested(0, better), retested(1, given[0])]
    (by_example,) = better_than(pair)
    (by_seed,) = better_than([retested(r.number, g, kept=False) for r, g in zip(pair, (better, given[0]), strict=True)])
    assert (by_example.by_example, by_seed.by_example) == (True, False)
    assert by_example.interval.mean == pytest.approx(by_seed.interval.mean)
    assert by_example.p < by_seed.p
    assert by_example.probability > 0.95


def test_one_seed_or_other_examples_are_not_paired_by_example() -> None:
    rng = np.random.default_rng(2)
    a, b = answers(rng, np.array([0.9, 0.8]), 3, 400, 0.01)
    assert better_than([retested(0, a[:1]), retested(1, b[:1])]) == ()
    (found,) = better_than([retested(0, a), retested(1, b[:, :300])])
    assert not found.by_example


@pytest.mark.parametrize("kept", [True, False])
def test_two_seeds_of_much_luck_keep_the_level(kept: bool) -> None:
    rng = np.random.default_rng(5)
    false = 0
    for _ in range(120):
        alike = answers(rng, np.full(6, 0.8), 2, 300, 0.03)
        false += any(d.corrected < 0.05 for d in better_than([retested(i, g, kept=kept) for i, g in enumerate(alike)]))
    assert false / 120 <= 0.05 + 1.96 * (0.05 * 0.95 / 120) ** 0.5


@pytest.mark.parametrize("seeds", [3, 10])
def test_better_than_by_example_keeps_its_level_and_covers(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    false, held = 0, []
    for _ in range(120):
        alike = answers(rng, np.full(4, 0.9), seeds, 300, 0.006)
        false += any(d.corrected < 0.05 for d in better_than([retested(i, g) for i, g in enumerate(alike)]))
        apart = answers(rng, np.array([0.92, 0.9]), seeds, 300, 0.006)
        (found,) = better_than([retested(i, g) for i, g in enumerate(apart)])
        held.append(found.interval.low <= 0.02 <= found.interval.high)
    assert false / 120 <= 0.05 + 1.96 * (0.05 * 0.95 / 120) ** 0.5
    assert 0.90 <= np.mean(held) <= 0.99


def test_how_alike_designs_err_is_measured() -> None:
    rng = np.random.default_rng(3)
    n = 4000
    shared = rng.random(n) < 0.6
    base = rng.random(n)
    rows = [(np.where(shared, base, rng.random(n)) < 0.8).astype(float)[None] for _ in range(4)]
    assert likeness([retested(i, row) for i, row in enumerate(rows)]) == pytest.approx(0.6, abs=0.05)
    assert likeness([retested(0, rows[0])]) is None
    assert likeness([retested(i, row, kept=False) for i, row in enumerate(rows)]) is None
    records = [dataclasses.replace(retested(i, row), number=i, digest=str(i)) for i, row in enumerate(rows)]
    belief = believe(records + synthetic.records(20)[10:], AXES)
    assert belief is not None
    assert belief.measured
    assert belief.correlation == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("seeds", [3, 10])
def test_shrunken_intervals_of_whole_searches_cover(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    held, again = [], []
    for _ in range(24):
        records, truth = searched(rng, seeds=seeds)
        belief = believe(records, AXES, draws=200)
        assert belief is not None
        inside = np.array([b.score.low <= t <= b.score.high for b, t in zip(belief.designs, truth, strict=True)])
        held.append(inside.mean())
        again.append(inside[[bool(r.retests) for r in records]].mean())
    # The designs of one search share its test examples: 24 searches say little more than 24 intervals would.
    assert 0.88 <= np.mean(held) <= 0.99
    assert 0.86 <= np.mean(again) <= 1.0
