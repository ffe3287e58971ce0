"""What matters: importances by Optuna, marginal means, layers and sites, and the path from one design to another."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftscape.analysis.designs import Value, features, is_number, knobs, layer_count, layer_list, parts
from peftscape.analysis.front import Objective, finite
from peftscape.analysis.measures import is_cost
from peftscape.analysis.noise import Interval, t_interval
from peftscape.spaces.record import Record

FEWEST = 20
"""With fewer complete designs no importance is given: a forest on them would describe noise."""

LEVELS = 6
"""Importances tell so many levels of a choice apart; rarer ones count as one."""


@dataclass(frozen=True)
class Importance:
    """A knob's share of what decides a target: of its variance (fANOVA), of reaching the best tenth (PED-ANOVA)."""

    knob: str
    variance: float
    best: float


def importances(
    records: Sequence[Record], target: Objective | str, *, method: str | None = None, most: int = 500
) -> tuple[Importance, ...]:
    """The knobs by importance for a target, computed by Optuna (Hutter et al. 2014; Watanabe et al. 2023).

    Args:
        records: those that are complete count, the last `most` of them.
        target: an objective, or "front": the gap to the best score at no more cost.
        method: only designs with this method, and its own knobs; without, what all designs have.

    Returns the empty tuple with fewer than 20 designs or no knob that varies.
    """
    table = [(r, knobs(r, method) if method else features(r)) for r in records if r.state == "complete"]
    table = [(r, row) for r, row in table if row][-most:]
    name = target.name if isinstance(target, Objective) else target
    goal = front_gap([r for r, _ in table]) if target == "front" else None
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
            wide = min(numbers) > 0 and max(numbers) / min(numbers) >= 10
            spaces[key] = FloatDistribution(min(numbers), max(numbers), log=wide)
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


def front_gap(records: Sequence[Record], cost: str = "trainable") -> dict[int, float]:
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


@dataclass(frozen=True)
class Level:
    """One level of a knob: its name, and the mean score of the designs that have it with a t-interval."""

    name: str
    interval: Interval


def marginal(records: Sequence[Record], knob: str, *, method: str | None = None, bins: int = 5) -> tuple[Level, ...]:
    """The mean validation score at each level of a knob, whatever else the designs had; numbers in bins of like counts.

    A plain average: where a search tried a level mostly beside good others, it shows their worth too.
    """
    pairs = []
    for record in records:
        if record.state == "complete":
            row = knobs(record, method) if method else features(record)
            if knob in row:
                pairs.append((row[knob], record.validation))
    if not pairs:
        return ()
    levels: dict[str, list[float]] = {}
    seen = [v for v, _ in pairs]
    if is_number(seen) and len(set(seen)) > bins:
        numbers = np.array([float(v) for v in seen])
        edges = np.unique(np.quantile(numbers, np.linspace(0, 1, bins + 1)))
        place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
        for i in range(len(edges) - 1):
            name = f"{edges[i]:.3g} to {edges[i + 1]:.3g}"
            levels[name] = [score for (_, score), p in zip(pairs, place, strict=True) if p == i]
    else:
        for value, score in sorted(pairs, key=lambda pair: (str(type(pair[0])), pair[0])):
            levels.setdefault(f"{value:g}" if isinstance(value, float) else value, []).append(score)
    return tuple(Level(name, t_interval(scores)) for name, scores in levels.items() if scores)


@dataclass(frozen=True, eq=False)
class Heat:
    """Layers by sites: how much better than expected at their cost designs are that adapt there (NaN: unknown)."""

    layers: tuple[str, ...]
    sites: tuple[str, ...]
    gain: NDArray[np.float64]
    error: NDArray[np.float64]
    count: NDArray[np.int64]


def heat_map(records: Sequence[Record], cost: str = "trainable", fewest: int = 4) -> Heat | None:
    """Where parameters pay: at each layer and site, the mean gain of designs that adapt it minus that of the rest.

    A design's gain is its score minus a parabola in log cost fitted to all designs. Cells with fewer than
    `fewest` designs on either side are NaN; None where no cell is left. An association, not an experiment:
    sites that are adapted together share their gain.
    """
    placed = [r for r in records if r.state == "complete" and r.design.get("placements")]
    if len(placed) < 2 * fewest:
        return None
    quality = Objective(placed[0].metric, placed[0].direction)
    able, values = finite(placed, (quality, Objective(cost, "minimize")))
    if len(able) < 2 * fewest:
        return None
    x = np.log1p(values[:, 1])
    rest = values[:, 0].copy()
    if np.ptp(x) > 0:
        x = (x - x.mean()) / x.std()
        basis = np.column_stack([np.ones(len(x)), x, x * x])
        rest = rest - basis @ np.linalg.lstsq(basis, rest, rcond=None)[0]
    if quality.direction == "minimize":
        rest = -rest
    count = layer_count(able)
    cells: dict[tuple[int, str], set[int]] = {}
    for i, record in enumerate(able):
        for placement in record.design["placements"]:
            if isinstance(placement, Mapping) and isinstance(placement.get("sites"), (list, tuple)):
                for layer in layer_list(placement.get("layers", "all"), count):
                    for site in placement["sites"]:
                        cells.setdefault((layer, str(site)), set()).add(i)
    sites = sorted({site for _, site in cells})
    shape = (count, len(sites))
    gain, error, counts = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape, dtype=np.int64)
    for (layer, site), inside in cells.items():
        mask = np.zeros(len(able), dtype=bool)
        mask[list(inside)] = True
        at = (layer, sites.index(site))
        counts[at] = mask.sum()
        if min(mask.sum(), (~mask).sum()) >= fewest:
            gain[at] = rest[mask].mean() - rest[~mask].mean()
            error[at] = math.sqrt(rest[mask].var(ddof=1) / mask.sum() + rest[~mask].var(ddof=1) / (~mask).sum())
    if not np.isfinite(gain).any():
        return None
    names = ("all",) if count == 1 else tuple(str(i) for i in range(count))
    return Heat(names, tuple(sites), gain, error, counts)


@dataclass(frozen=True)
class Step:
    """A step of an ablation path: what changed, the score after it, and its record's number, None if predicted."""

    change: str
    score: float
    number: int | None


def ablation(records: Sequence[Record], start: Record, goal: Record) -> tuple[Step, ...]:
    """From one design to another, one change at a time, each time the change that scores best next.

    A change adds or drops a method, or sets one knob. A step's score is that of a record of exactly this
    design where one is complete, else predicted by a random forest (scikit-learn) fitted to all complete
    designs. The first step is `start`, the last `goal`.
    """
    known = {_frozen(parts(r)): r for r in reversed(records) if r.state == "complete"}
    here, there = parts(start), parts(goal)
    steps = [Step("start", start.validation, start.number)]
    predict = None
    sign = 1 if goal.direction == "maximize" else -1
    while _frozen(here) != _frozen(there):
        options = _changes(here, there)
        scored = []
        for change, design in options:
            record = goal if _frozen(design) == _frozen(there) else known.get(_frozen(design))
            if record is None and predict is None:
                predict = _forest([r for r in records if r.state == "complete"])
            score = record.validation if record else predict(design)  # type: ignore[misc]
            scored.append((sign * score, Step(change, score, record.number if record else None), design))
        _, step, here = max(scored, key=lambda item: (item[0], item[1].change))
        steps.append(step)
    return tuple(steps)


Design = dict[str, dict[str, Value]]


def _changes(here: Design, there: Design) -> list[tuple[str, Design]]:
    found = []
    for method in sorted({*here, *there}):
        if method not in there:
            found.append((f"without {method}", {m: k for m, k in here.items() if m != method}))
        elif method not in here:
            found.append((f"with {method}", {**here, method: there[method]}))
        else:
            for key in sorted({*here[method], *there[method]}):
                old, new = here[method].get(key), there[method].get(key)
                if old != new:
                    own = {k: v for k, v in here[method].items() if k != key}
                    own |= {key: new} if new is not None else {}
                    said = f"{new:.4g}" if isinstance(new, float) else "default" if new is None else new
                    found.append((f"{method} {key} {said}", {**here, method: own}))
    return found


def _frozen(design: Design) -> Any:
    return frozenset((m, frozenset(k.items())) for m, k in design.items())


def _forest(records: Sequence[Record]) -> Any:
    """A function from a design to its predicted score."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.feature_extraction import DictVectorizer

    def row(design: Design) -> dict[str, Value]:
        flat: dict[str, Value] = {f"has {m}": 1.0 for m in design}
        return flat | {f"{m}.{k}": v for m, own in design.items() for k, v in own.items()}

    encode = DictVectorizer(sparse=False)
    table = encode.fit_transform([row(parts(r)) for r in records])
    forest = RandomForestRegressor(n_estimators=100, min_samples_leaf=2, random_state=0)
    forest.fit(table, [r.validation for r in records])
    return lambda design: float(forest.predict(encode.transform([row(design)]))[0])
