"""Fronts equal brute force, with ties, duplicates, infinities and missing values."""

import math

import numpy as np
import pytest
import synthetic

from peftscape.analysis.front import (
    Objective,
    ObjectiveError,
    best_under,
    finite,
    front,
    hypervolume,
    knee,
    non_dominated,
    parse_objectives,
)

ACCURACY, TRAINABLE = parse_objectives("accuracy:max,trainable:min")


def brute_force(values: np.ndarray, directions: list[str]) -> list[bool]:
    sign = [-1 if way == "maximize" else 1 for way in directions]
    rows = [[s * v for s, v in zip(sign, row, strict=True)] for row in values.tolist()]

    def beats(a: list[float], b: list[float]) -> bool:
        no_worse = all(x <= y for x, y in zip(a, b, strict=True))
        return no_worse and any(x < y for x, y in zip(a, b, strict=True))

    return [not any(map(math.isnan, row)) and not any(beats(other, row) for other in rows) for row in rows]


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_non_dominated_equals_brute_force_with_ties(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    for case in range(300):
        values = rng.integers(-2, 3, size=(rng.integers(0, 14), objectives)).astype(float)
        values[values == 0] *= rng.choice([-1.0, 1.0])  # both zeros
        for odd in (np.nan, np.inf, -np.inf) if case % 3 == 0 else ():
            values[rng.random(values.shape) < 0.05] = odd
        directions = list(rng.choice(["maximize", "minimize"], size=objectives))
        assert non_dominated(values, directions).tolist() == brute_force(values, directions)


def test_100_000_points_take_a_moment() -> None:
    values = np.random.default_rng(0).random((100_000, 2))
    mask = non_dominated(values, ["minimize", "maximize"])
    order = np.argsort(values[:, 0])
    best = np.maximum.accumulate(values[order, 1])
    assert mask.sum() == len(np.unique(best))


def test_the_shape_must_fit_the_directions() -> None:
    with pytest.raises(ValueError, match="points x 2 objectives"):
        non_dominated([[1.0]], ["minimize", "minimize"])


def test_only_complete_records_are_members_and_duplicates_stay() -> None:
    records = [
        synthetic.record(0, 0.9, 100),
        synthetic.record(1, 0.9, 100),
        synthetic.record(2, 0.99, 10, state="pruned"),
        synthetic.record(3, None),
        synthetic.record(4, 0.99, 10, costs=None),
        synthetic.record(5, 0.8, 100),
        synthetic.record(6, 0.95, 900),
    ]
    assert [r.number for r in front(records, (ACCURACY, TRAINABLE))] == [0, 1, 6]
    assert front([], (ACCURACY, TRAINABLE)) == ()


def test_a_metric_that_no_record_has_is_an_error() -> None:
    with pytest.raises(ObjectiveError, match="They have: accuracy, adapter"):
        front([synthetic.record(0)], (Objective("f1", "maximize"),))


def test_best_under_is_the_best_within_each_limit() -> None:
    records = synthetic.records(200)
    able, values = finite(records, (ACCURACY, TRAINABLE))
    limits = [2_000, 2_310, 10_000, 100_000, 10**9]
    for limit, found in zip(limits, best_under(records, limits, quality=ACCURACY), strict=True):
        within = values[values[:, 1] <= limit, 0]
        assert (found is None) == (not len(within))
        assert found is None or found.validation == within.max()
    assert len(able) == len(values)


def test_best_under_takes_the_cheaper_of_equals() -> None:
    records = [synthetic.record(0, 0.9, 500), synthetic.record(1, 0.9, 400), synthetic.record(2, 0.9, 400)]
    (found,) = best_under(records, [10_000], quality=ACCURACY)
    assert found is not None
    assert found.number == 1


def test_the_knee_is_where_the_curve_bends() -> None:
    bend = [synthetic.record(i, q, 10**c) for i, (q, c) in enumerate([(0.5, 3), (0.9, 4), (0.92, 5), (0.94, 6)])]
    found = knee(bend, ACCURACY, "trainable")
    assert found is not None
    assert found.number == 1
    assert knee(bend[:2], ACCURACY, "trainable") is None


def test_hypervolume_is_the_area_up_to_the_reference() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = rng.integers(0, 6, size=(5, 2)).astype(float)  # maximise the first, minimise the second
        cells = sum(any(q >= i + 1 and c <= j for q, c in points.tolist()) for i in range(6) for j in range(5))
        assert hypervolume(points, ["maximize", "minimize"], [0, 5]) == pytest.approx(cells)
    with pytest.raises(ValueError, match="finite"):
        hypervolume([[1.0, 1.0]], ["maximize", "minimize"], [0, math.inf])


def test_objectives_are_read_with_defaults_for_costs() -> None:
    assert parse_objectives(" accuracy:max , peak_bytes") == (
        Objective("accuracy", "maximize"),
        Objective("peak_bytes", "minimize"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accuracy:max,trainble:min", 'Did you mean "trainable"'),
        ("accuracy", 'expected "accuracy:max" or "accuracy:min"'),
        ("accuracy:up", 'found "accuracy:up"'),
        ("trainable,trainable:min", "named twice"),
        (" , ", "none named"),
    ],
)
def test_what_is_wrong_with_objectives_is_said(text: str, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        parse_objectives(text)


def test_known_metrics_are_enforced_where_given() -> None:
    with pytest.raises(ObjectiveError, match='Did you mean "accuracy"'):
        parse_objectives("acuracy:max", metrics=["accuracy", "macro_f1"])
