"""Fronts: which records no other beats, with ties kept and exact costs."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftscape.spaces.record import COSTS, Direction, Record

_DIRECTIONS: dict[str, Direction] = {
    "max": "maximize",
    "maximize": "maximize",
    "min": "minimize",
    "minimize": "minimize",
}


class ObjectiveError(ValueError):
    """An objective that cannot be read or that no record has."""


@dataclass(frozen=True)
class Objective:
    """One axis of a front: the name of a metric or of a cost, and which way is better."""

    name: str
    direction: Direction

    def __str__(self) -> str:
        return f"{self.name}:{self.direction[:3]}"

    def value(self, record: Record) -> float:
        """The record's value: the mean validation score of a metric, or a cost; NaN where it has none."""
        if self.name in COSTS:
            return math.nan if record.costs is None else float(getattr(record.costs, self.name))
        return record.validation if self.name == record.metric else math.nan


def parse_objectives(text: str, *, metrics: Sequence[str] | None = None) -> tuple[Objective, ...]:
    """The objectives in text such as "accuracy:max,trainable:min"; a cost alone is minimised.

    Args:
        text: names with `:max` or `:min`, separated by commas.
        metrics: the metrics that are known. Without them any name is taken for a metric that is not nearly
            the name of a cost.

    Raises:
        ObjectiveError: if a name or direction is unknown (with the nearest one), twice there, or nothing is.
    """
    errors: list[str] = []
    found: dict[str, Objective] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, way = (piece.strip() for piece in part.partition(":"))
        near = difflib.get_close_matches(name, [*COSTS, *(metrics or ())], n=1, cutoff=0.7)
        if name not in COSTS and (near if metrics is None else name not in metrics):
            known = f"Known: {', '.join([*(metrics or ()), *COSTS])}"
            errors.append(f'no objective "{name}". ' + (f'Did you mean "{near[0]}"?' if near else known))
        elif way not in _DIRECTIONS and (way or name not in COSTS):
            errors.append(f'{name}: expected "{name}:max" or "{name}:min", found "{part}"')
        elif name in found:
            errors.append(f"{name}: named twice")
        else:
            found[name] = Objective(name, _DIRECTIONS[way or "min"])
    if errors or not found:
        raise ObjectiveError("objectives: " + ("; ".join(errors) or "none named, as in accuracy:max,trainable:min"))
    return tuple(found.values())


def non_dominated(values: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.bool_]:
    """Which rows of `values` (points x objectives) no other row dominates.

    Row a dominates b where a is nowhere worse and somewhere better. Equal rows do not dominate each other, so
    duplicates of a member are members. A row with NaN is never a member and dominates nothing; infinities
    compare as numbers. Two objectives take O(n log n), more take O(n x members).

    Raises:
        ValueError: if `values` is not two-dimensional with one column a direction.
    """
    losses = _losses(values, directions)
    mask = np.zeros(len(losses), dtype=bool)
    index = np.flatnonzero(~np.isnan(losses).any(axis=1))
    if len(index):
        losses = losses[index]
        mask[index] = _sweep(losses) if losses.shape[1] == 2 else _filter(losses)
    return mask


def front(records: Sequence[Record], objectives: Sequence[Objective]) -> tuple[Record, ...]:
    """The complete records with finite values that no other of them dominates, by the last objective's value.

    Scores are those of validation: retests on test data never form a front.

    Raises:
        ObjectiveError: if no record has an objective's metric.
    """
    able, values = finite(records, objectives)
    mask = non_dominated(values, [objective.direction for objective in objectives])
    members = [(tuple(values[i][::-1]), able[i].number, able[i]) for i in np.flatnonzero(mask)]
    return tuple(record for *_, record in sorted(members, key=lambda member: member[:2]))


def finite(
    records: Sequence[Record], objectives: Sequence[Objective]
) -> tuple[tuple[Record, ...], NDArray[np.float64]]:
    """The records that a front may be formed of, complete with every value finite, and their values.

    Raises:
        ObjectiveError: if complete records exist and none has an objective's metric.
    """
    complete = [record for record in records if record.state == "complete"]
    metrics = sorted({record.metric for record in complete})
    for objective in objectives:
        if complete and objective.name not in (*COSTS, *metrics):
            raise ObjectiveError(f'no record has "{objective.name}". They have: {", ".join([*metrics, *COSTS])}')
    values = np.array([[objective.value(record) for objective in objectives] for record in complete])
    values = values.reshape(len(complete), len(objectives))
    able = np.isfinite(values).all(axis=1)
    return tuple(record for record, ok in zip(complete, able, strict=True) if ok), values[able]


def best_under(
    records: Sequence[Record], limits: Sequence[float], *, quality: Objective, cost: str = "trainable"
) -> tuple[Record | None, ...]:
    """For each limit the best complete record that costs no more, by validation; None where there is none.

    Of equal scores the cheaper wins, then the earlier.
    """
    axes = (quality, Objective(cost, "minimize"))
    able, values = finite(records, axes)
    losses = _losses(values, [axis.direction for axis in axes])
    ranked = sorted(range(len(able)), key=lambda i: (*losses[i], able[i].number))
    return tuple(next((able[i] for i in ranked if values[i, 1] <= limit), None) for limit in limits)


def knee(members: Sequence[Record], quality: Objective, cost: str) -> Record | None:
    """The member farthest above the line from the cheapest to the dearest, with log(1 + cost).

    Both axes are scaled to 1. None with fewer than three members, or where no member lies above that line.
    """
    axes = (quality, Objective(cost, "minimize"))
    able, values = finite(members, axes)
    if len(able) < 3:
        return None
    losses = _losses(values, [axis.direction for axis in axes])
    losses[:, 1] = np.log1p(losses[:, 1])
    spread = np.ptp(losses, axis=0)
    if not spread.all():
        return None
    scaled = (losses - losses.min(axis=0)) / spread
    above = 1.0 - scaled.sum(axis=1)  # the line runs from (0, 1) to (1, 0)
    best = int(np.argmax(above))
    return able[best] if above[best] > 1e-9 else None


def hypervolume(values: ArrayLike, directions: Sequence[Direction], reference: Sequence[float]) -> float:
    """The volume between the points and `reference`, in the product of the objectives' units.

    Points that are not better than the reference everywhere add nothing. Computed by Optuna.

    Raises:
        ValueError: if the reference is not finite or has another number of objectives.
    """
    from optuna._hypervolume import compute_hypervolume

    losses, corner = _losses(values, directions), _losses([reference], directions)[0]
    if not np.isfinite(corner).all():
        raise ValueError(f"the reference must be finite, found {list(reference)}")
    losses = losses[(losses < corner).all(axis=1)]
    return float(compute_hypervolume(losses, corner)) if len(losses) else 0.0


def _losses(values: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.float64]:
    """A copy in which smaller is better everywhere."""
    array = np.array(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != len(directions):
        raise ValueError(f"expected points x {len(directions)} objectives, found shape {array.shape}")
    return array * np.where([way == "maximize" for way in directions], -1.0, 1.0)


def _sweep(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Two objectives: along the first, the second must beat all before and equal the least of its column."""
    order = np.lexsort((losses[:, 1], losses[:, 0]))
    x, y = losses[order].T
    start = np.flatnonzero(np.r_[True, x[1:] != x[:-1]])
    column = np.cumsum(np.r_[True, x[1:] != x[:-1]]) - 1
    least = y[start]
    before = np.r_[np.inf, np.minimum.accumulate(least)[:-1]]
    # An infinite loss that comes first is beaten by none, although inf < inf is false.
    mask = np.empty(len(x), dtype=bool)
    mask[order] = (y == least[column]) & ((y < before[column]) | (column == 0))
    return mask


def _filter(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Any number of objectives: the first row in lexicographic order is a member; drop what it dominates."""
    points, inverse = np.unique(losses + 0.0, axis=0, return_inverse=True)  # + 0.0 makes -0.0 equal 0.0
    member = np.zeros(len(points), dtype=bool)
    left = np.arange(len(points))
    while len(left):
        member[left[0]] = True
        left = left[1:][(points[left[1:]] < points[left[0]]).any(axis=1)]
    return member[inverse.reshape(-1)]
