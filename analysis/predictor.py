"""Predictor: the score that a design would get, from those of other designs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftscape.analysis.designs import Value, parts
from peftscape.spaces.record import Record

FEWEST = 20
"""With fewer designs a forest's trees would be stumps; a ridge regression says as much, and at once."""

Predict = Callable[[Sequence[Mapping[str, Any]]], list[float]]


def predictor(records: Sequence[Record]) -> tuple[Predict, float]:
    """A function from designs to their predicted scores, and the root mean square of its errors on left-out designs.

    A ridge regression on standardised features (penalty 1), and with 20 records or more a random forest (scikit-learn).
    """
    rows = [_features(record.design) for record in records]
    names = sorted({name for row in rows for name in row})
    table = _table(rows, names)
    scores = np.array([record.validation for record in records])
    model, error = (_forest if len(records) >= FEWEST else _ridge)(table, scores)

    def predict(designs: Sequence[Mapping[str, Any]]) -> list[float]:
        return [float(value) for value in model(_table([_features(design) for design in designs], names))]

    return predict, error


def _features(design: Mapping[str, Any]) -> dict[str, float]:
    own = parts(design)
    flat: dict[str, Value] = {f"has {method}": 1.0 for method in own}
    flat |= {f"{method}.{knob}": value for method, knobs in own.items() for knob, value in knobs.items()}
    return {f"{k}={v}" if isinstance(v, str) else k: 1.0 if isinstance(v, str) else float(v) for k, v in flat.items()}


def _table(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[row.get(name, 0.0) for name in names] for row in rows]).reshape(len(rows), len(names))


_Model = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def _ridge(table: NDArray[np.float64], scores: NDArray[np.float64]) -> tuple[_Model, float]:
    mean, scale, middle = table.mean(axis=0), table.std(axis=0), scores.mean()
    scale[scale == 0] = 1.0
    x = (table - mean) / scale
    inverse = np.linalg.inv(x.T @ x + np.eye(x.shape[1]))
    weights = inverse @ x.T @ (scores - middle)
    leverage = np.clip(1 / len(x) + ((x @ inverse) * x).sum(axis=1), 0.0, 0.99)
    left_out = (scores - middle - x @ weights) / (1 - leverage)
    return lambda other: middle + (other - mean) / scale @ weights, float(np.sqrt(np.mean(left_out**2)))


def _forest(table: NDArray[np.float64], scores: NDArray[np.float64]) -> tuple[_Model, float]:
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(n_estimators=60, min_samples_leaf=2, random_state=0, oob_score=True)
    forest.fit(table, scores)
    return forest.predict, float(np.sqrt(np.mean((forest.oob_prediction_ - scores) ** 2)))
