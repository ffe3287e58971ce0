"""What matters: importances by Optuna, interactions of two knobs, and marginal means."""

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftscape.analysis.designs import Value, features, is_number, knobs
from peftscape.analysis.front import Objective, finite
from peftscape.analysis.measures import is_cost
from peftscape.analysis.noise import Interval, t_interval
from peftscape.spaces.record import Record

FEWEST = 20
"""With fewer complete designs no importance is given: a forest on them would describe noise."""

MOST, MARGINAL = 400, 2000
"""Importances and interactions are computed on so many designs at most, marginal means on so many: the last."""

LEVELS = 6
"""Importances tell so many levels of a choice apart; rarer ones count as one."""


@dataclass(frozen=True)
class Importance:
    """A knob's share of what decides a target: of its variance (fANOVA), of reaching the best tenth (PED-ANOVA)."""

    knob: str
    variance: float
    best: float


def importances(
    records: Sequence[Record],
    target: Objective | str,
    *,
    cost: str = "trainable",
    method: str | None = None,
    most: int = MOST,
) -> tuple[Importance, ...]:
    """The knobs by importance for a target, computed by Optuna (Hutter et al. 2014; Watanabe et al. 2023).

    Args:
        records: those that are complete count, the last `most` of them.
        target: an objective, or "front": the gap to the best score at no more `cost`.
        method: only designs with this method, and its own knobs; without, what all designs have.

    Returns the empty tuple with fewer than 20 designs or no knob that varies.
    """
    table = _rows(records, method, most)
    name = target.name if isinstance(target, Objective) else target
    goal = front_gap(records, cost) if target == "front" else None
    values = [goal.get(r.number, math.nan) if goal is not None else target.value(r) for r, _ in table]  # type: ignore[union-attr]
    rows = [(row, v) for (_, row), v in zip(table, values, strict=True) if math.isfinite(v)]
    shared = [k for k in (rows[0][0] if rows else ()) if all(k in row for row, _ in rows)]
    if is_cost(name):  # parameters are a cost themselves
        shared = [k for k in shared if not k.endswith("parameters")]
    shared = [k for k in shared if len({row[k] for row, _ in rows}) > 1]
    if len(rows) < FEWEST or not shared or np.ptp([v for _, v in rows]) == 0:
        return ()
    maximize = isinstance(target, Objective) and target.direction == "maximize"
    study = _study([{k: row[k] for k in shared} for row, _ in rows], [v for _, v in rows], maximize)
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

    found: list[Mapping[str, float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls one of them experimental
        for evaluator in (FanovaImportanceEvaluator(n_trees=10, max_depth=8, seed=0), PedAnovaImportanceEvaluator()):
            try:
                found.append(get_param_importances(study, evaluator=evaluator))
            except (ValueError, RuntimeError, ZeroDivisionError):  # too few distinct values for this evaluator
                found.append({})
    made = [Importance(k, found[0].get(k, math.nan), found[1].get(k, math.nan)) for k in shared]
    return tuple(sorted(made, key=lambda i: (-i.variance if math.isfinite(i.variance) else 0, i.knob)))


def _study(rows: Sequence[Mapping[str, Value]], values: Sequence[float], maximize: bool) -> Any:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    spaces: dict[str, BaseDistribution] = {}
    for key in rows[0]:
        seen = [row[key] for row in rows]
        numbers = [v for v in seen if isinstance(v, float)]
        if is_number(seen):
            spaces[key] = FloatDistribution(min(numbers), max(numbers), log=_wide(numbers))
        else:
            # fANOVA takes minutes with dozens of choices: the rare ones become one.
            common = {name for name, _ in Counter(str(v) for v in seen).most_common(LEVELS - 1)}
            rows = [{**row, key: str(row[key]) if str(row[key]) in common else "other"} for row in rows]
            spaces[key] = CategoricalDistribution(sorted({str(row[key]) for row in rows}))
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize" if maximize else "minimize")
    finally:
        optuna.logging.set_verbosity(before)
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={k: v if isinstance(spaces[k], FloatDistribution) else str(v) for k, v in row.items()},
                distributions=spaces,
                value=value,
            )
            for row, value in zip(rows, values, strict=True)
        ]
    )
    return study


def front_gap(records: Sequence[Record], cost: str) -> dict[int, float]:
    """How far each complete record's score is below the best at no more cost; 0 on the front."""
    complete = [r for r in records if r.state == "complete"]
    if not complete:
        return {}
    quality = Objective(complete[0].metric, complete[0].direction)
    able, values = finite(complete, (quality, Objective(cost, "minimize")))
    if not able:
        return {}
    score = values[:, 0] if quality.direction == "maximize" else -values[:, 0]
    order = np.lexsort((-score, values[:, 1]))
    best = np.maximum.accumulate(score[order])
    return {able[i].number: float(b - score[i]) for i, b in zip(order, best, strict=True)}


@dataclass(frozen=True, eq=False)
class Interaction:
    """What two knobs explain together beyond each alone, as a share of what a forest sees in the scores."""

    knobs: tuple[str, str]
    share: float


def interactions(
    records: Sequence[Record], knobs_: Sequence[str], *, grid: int = 30, background: int = 50, seed: int = 0
) -> tuple[Interaction, ...]:
    """The pairs of the knobs by how far the scores depend on both together, the strongest first.

    share = mean((F_jk - F_j - F_k)^2) / var(F), with F a random forest (scikit-learn) of the validation scores
    and F_j its centred partial dependence at designs drawn from the records: the numerator of Friedman and
    Popescu's H^2 (2008, eq. 44) over the whole variance. (Optuna's fANOVA gives no pairs.) Below about 0.02 it
    is the forest's own noise. Empty with fewer than 20 designs.
    """
    rows = _rows(records, None)
    names = [k for k in knobs_ if rows and all(k in row for _, row in rows)]
    if len(rows) < FEWEST or len(names) < 2:
        return ()
    scores = np.array([record.validation for record, _ in rows])
    if np.ptp(scores) == 0:
        return ()
    from sklearn.ensemble import RandomForestRegressor

    shared = [k for k in rows[0][1] if all(k in row for _, row in rows)]
    columns = {k: _columns([row[k] for _, row in rows]) for k in shared}
    table = np.concatenate([columns[k] for k in shared], axis=1)
    ends = np.cumsum([columns[k].shape[1] for k in shared])
    where = {k: slice(end - columns[k].shape[1], end) for k, end in zip(shared, ends, strict=True)}
    forest = RandomForestRegressor(n_estimators=40, min_samples_leaf=3, max_features=0.6, random_state=seed)
    forest.fit(table, scores)
    rng = np.random.default_rng(seed)
    at = table[rng.choice(len(table), min(grid, len(table)), replace=False)]
    behind = table[rng.choice(len(table), min(background, len(table)), replace=False)]
    sets = [(k,) for k in names] + list(itertools.combinations(names, 2))
    blocks = []
    for chosen in sets:
        block = np.repeat(behind[None], len(at), axis=0)
        for k in chosen:
            block[:, :, where[k]] = at[:, None, where[k]]
        blocks.append(block.reshape(-1, table.shape[1]))
    answers = forest.predict(np.concatenate(blocks)).reshape(len(sets), len(at), len(behind)).mean(axis=2)
    effects = {chosen: effect - effect.mean() for chosen, effect in zip(sets, answers, strict=True)}
    total = float(forest.predict(table).var())
    if not total > 0:
        return ()
    found = [
        Interaction((a, b), float(np.mean((effects[a, b] - effects[(a,)] - effects[(b,)]) ** 2)) / total)
        for a, b in itertools.combinations(names, 2)
    ]
    return tuple(sorted(found, key=lambda i: (-i.share, i.knobs)))


def _columns(values: Sequence[Value]) -> NDArray[np.float64]:
    """A knob as columns: a number (its log where it spans a factor of ten) or one column a level."""
    if is_number(values):
        numbers = np.array([float(v) for v in values])
        return (np.log(numbers) if _wide(numbers.tolist()) else numbers)[:, None]
    common = [name for name, _ in Counter(map(str, values)).most_common(LEVELS - 1)]
    return np.array([[float(str(v) == name) for name in common] + [float(str(v) not in common)] for v in values])


def _wide(numbers: Sequence[float]) -> bool:
    return min(numbers) > 0 and max(numbers) / min(numbers) >= 10


@dataclass(frozen=True)
class Level:
    """One level of a knob: its name, the mean score of the designs that have it with a t-interval.

    `at` is the middle of a number's bin, None for a choice.
    """

    name: str
    interval: Interval
    at: float | None = None


def marginal(records: Sequence[Record], knob: str, *, method: str | None = None, bins: int = 6) -> tuple[Level, ...]:
    """The mean validation score at each level of a knob, whatever else the designs had; numbers in bins of like counts.

    A plain average: where a search tried a level mostly beside good others, it shows their worth too.
    """
    pairs = [(row[knob], record.validation) for record, row in _rows(records, method, MARGINAL) if knob in row]
    if not pairs:
        return ()
    seen = [v for v, _ in pairs]
    if is_number(seen) and len(set(seen)) > bins:
        numbers, scores = np.array([float(v) for v in seen]), np.array([score for _, score in pairs])
        edges = np.unique(np.quantile(numbers, np.linspace(0, 1, bins + 1)))
        place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
        return tuple(
            Level(
                f"{edges[i]:.3g} to {edges[i + 1]:.3g}",
                t_interval(scores[place == i].tolist()),
                float(np.median(numbers[place == i])),
            )
            for i in range(len(edges) - 1)
            if (place == i).any()
        )
    levels: dict[Value, list[float]] = {}
    for value, score in sorted(pairs, key=lambda pair: (str(type(pair[0])), pair[0])):
        levels.setdefault(value, []).append(score)
    return tuple(
        Level(f"{value:g}", t_interval(scores), value) if isinstance(value, float) else Level(value, t_interval(scores))
        for value, scores in levels.items()
    )


def _rows(records: Sequence[Record], method: str | None, most: int = MOST) -> list[tuple[Record, dict[str, Value]]]:
    """The last `most` complete records with what their designs have, or one method's knobs."""
    complete = [r for r in records if r.state == "complete"]
    if method is None:
        return [(r, features(r)) for r in complete[-most:]]
    return [(r, row) for r in complete if (row := knobs(r, method))][-most:]
