"""Each metric against its textbook formula written out here, and what happens at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peftscape.search.metrics import METRICS, metric

RANDOM = np.random.default_rng(5)
LOGITS = RANDOM.normal(size=(60, 3))
CLASSES = RANDOM.choice(3, size=60, p=[0.6, 0.3, 0.1])
OUTPUTS = RANDOM.normal(size=40)
NUMBERS = 0.5 * OUTPUTS + RANDOM.normal(size=40)
TEXTS = np.stack([RANDOM.gamma(20, size=30), RANDOM.integers(1, 9, size=30)], axis=1)  # nats, and tokens


def confusion(logits: np.ndarray, targets: np.ndarray) -> list[list[int]]:
    """Rows: true class; columns: predicted class."""
    table = [[0] * logits.shape[1] for _ in range(logits.shape[1])]
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        table[target][row.index(max(row))] += 1
    return table


def f1_of(table: list[list[int]], label: int) -> float:
    hits = table[label][label]
    return 2 * hits / (sum(table[label]) + sum(row[label] for row in table))


def correlation(x: list[float], y: list[float]) -> float:
    mx, my = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def ranks(values: list[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def data_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    of_kind = {"classification": (LOGITS, CLASSES), "regression": (OUTPUTS, NUMBERS), "lm": (TEXTS, np.zeros(30))}
    return of_kind[METRICS[name].kind]


def expected(name: str) -> float:
    table = confusion(LOGITS, CLASSES)
    rows, k = len(CLASSES), range(3)
    right = sum(table[i][i] for i in k)
    x, y = OUTPUTS.tolist(), NUMBERS.tolist()
    if name in ("accuracy", "micro_f1"):
        return right / rows
    if name == "macro_f1":
        return sum(f1_of(table, i) for i in k) / 3
    if name == "balanced_accuracy":
        return sum(table[i][i] / sum(table[i]) for i in k) / 3
    if name == "matthews":  # Gorodkin 2004
        true, said = [sum(table[i]) for i in k], [sum(table[j][i] for j in k) for i in k]
        over = right * rows - sum(t * s for t, s in zip(true, said, strict=True))
        return over / math.sqrt((rows**2 - sum(s * s for s in said)) * (rows**2 - sum(t * t for t in true)))
    if name == "log_loss":
        each = [math.log(sum(map(math.exp, r))) - r[t] for r, t in zip(LOGITS.tolist(), CLASSES, strict=True)]
        return sum(each) / rows
    if name == "pearson":
        return correlation(x, y)
    if name == "spearman":
        return correlation(ranks(x), ranks(y))
    if name == "mse":
        return sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x)
    if name == "mae":
        return sum(abs(a - b) for a, b in zip(x, y, strict=True)) / len(x)
    if name in ("loss", "perplexity"):
        loss = sum(nats for nats, _ in TEXTS.tolist()) / sum(tokens for _, tokens in TEXTS.tolist())
        return loss if name == "loss" else math.exp(loss)
    assert name == "r2"
    mean = sum(y) / len(y)
    return 1 - sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / sum((b - mean) ** 2 for b in y)


NUMERIC = sorted(name for name, m in METRICS.items() if m.kind not in ("generation", "token_classification"))


@pytest.mark.parametrize("name", sorted(set(NUMERIC) - {"f1"}))
def test_a_score_is_its_formula(name):
    assert metric(name).score(*data_of(name)) == pytest.approx(expected(name), rel=1e-12)


def test_f1_is_that_of_the_second_class():
    logits, targets = LOGITS[:, :2], (CLASSES > 0).astype(np.int64)
    table = confusion(logits, targets)
    assert metric("f1").score(logits, targets) == pytest.approx(f1_of(table, 1), rel=1e-12)


@pytest.mark.parametrize("name", NUMERIC)
def test_the_mean_of_the_examples_is_the_score(name):
    m = METRICS[name]
    logits, targets = data_of(name)
    if m.binary:
        logits, targets = logits[:, :2], np.minimum(targets, 1)
    values = m.per_example(logits, targets)
    if name in ("macro_f1", "f1", "matthews", "pearson", "spearman", "r2", "perplexity"):
        assert values is None
    else:
        assert values is not None
        assert values.shape == targets.shape
        assert values.mean() == pytest.approx(m.score(logits, targets), rel=1e-12)


def test_what_is_better_scores_higher_where_the_direction_says_so():
    for m in map(METRICS.get, NUMERIC):
        if m.kind == "classification":
            targets = np.array([0, 1, 1, 0, 1])
            good, bad = np.eye(2)[targets] * 4, np.eye(2)[1 - targets] * 4
        elif m.kind == "lm":
            targets = np.zeros(3)
            good, bad = (np.array([[nats, 2.0]] * 3) for nats in (4.0, 5.0))
        else:
            targets = np.array([0.0, 1.0, 2.0, 4.0])
            good, bad = targets + np.array([0.1, -0.1, 0.1, -0.1]), -targets
        assert (m.score(good, targets) > m.score(bad, targets)) == (m.direction == "maximize"), m.name


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize(("outputs", "targets"), [([2.0] * 4, [1.0, 2, 3, 4]), ([1.0, 2, 3, 4], [5.0] * 4)])
def test_a_correlation_with_a_constant_is_zero(name, outputs, targets):
    assert metric(name).score(np.array(outputs), np.array(targets)) == 0.0


@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_outputs_that_are_not_finite_have_no_score(name, broken):
    if METRICS[name].kind == "classification":
        logits, targets = np.array([[0.0, 1.0], [broken, 0.0], [0.0, 1.0]]), np.array([0, 0, 1])
    elif METRICS[name].kind == "lm":
        logits, targets = np.array([[5.0, 1.0], [broken, 2.0], [1.0, 1.0]]), np.zeros(3)
    else:
        logits, targets = np.array([0.0, broken, 3.0]), np.array([0.0, 1.0, 2.0])
    assert math.isnan(metric(name).score(logits, targets))
    values = metric(name).per_example(logits, targets)
    assert values is None or np.isnan(values).tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["macro_f1", "matthews", "balanced_accuracy", "micro_f1"])
def test_a_class_that_is_missing_on_one_side_raises_no_warning(name):
    always_two = np.tile([0.0, 0.0, 1.0], (4, 1))
    assert 0.0 <= metric(name).score(always_two, np.array([0, 1, 1, 0])) <= 0.5


def test_a_head_of_width_one_is_taken_for_numbers():
    assert metric("mse").score(OUTPUTS[:, None], NUMBERS) == metric("mse").score(OUTPUTS, NUMBERS)


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(ValueError, match=r'no metric "acuracy"\. Did you mean "accuracy"'):
        metric("acuracy")


@pytest.mark.parametrize(
    ("name", "logits", "targets", "message"),
    [
        ("accuracy", np.zeros(3), np.zeros(3, dtype=int), "shape"),
        ("accuracy", np.zeros((3, 2)), np.zeros(2, dtype=int), "one length"),
        ("accuracy", np.zeros((0, 2)), np.zeros(0, dtype=int), "not empty"),
        ("accuracy", np.zeros((2, 2)), np.array([0, 2]), "class ids from 0 to 1"),
        ("accuracy", np.zeros((2, 2)), np.array([0.0, 1.0]), "class ids"),
        ("f1", np.zeros((2, 3)), np.array([0, 1]), "needs 2 classes, not 3"),
        ("mse", np.zeros((2, 2)), np.zeros(2), "shape"),
        ("loss", np.zeros((2, 3)), np.zeros(2), r"expected \(examples, 2\)"),
    ],
)
def test_data_that_does_not_fit_is_refused(name, logits, targets, message):
    with pytest.raises(ValueError, match=message):
        metric(name).score(logits, targets)
