"""Fronts: which records no other beats, with ties kept and exact costs."""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftscape.analysis.measures import is_cost, measure, measured
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
        """The record's value: the mean validation score of a metric, a cost or a column; NaN where it has none."""
        return measure(record, self.name)


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
        if not is_cost(name) and (near if metrics is None else name not in metrics):
            known = f"Known: {', '.join([*(metrics or ()), *COSTS])}"
            errors.append(f'no objective "{name}". ' + (f'Did you mean "{near[0]}"?' if near else known))
        elif way not in _DIRECTIONS and (way or not is_cost(name)):
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
    compare as numbers. Computed by moocore (Fonseca et al. 2006; O(n log n) for two and three objectives).

    Raises:
        ValueError: if `values` is not two-dimensional with one column a direction.
    """
    losses = _losses(values, directions)
    mask = np.zeros(len(losses), dtype=bool)
    index = np.flatnonzero(~np.isnan(losses).any(axis=1))
    if not len(index):
        return mask
    if losses.shape[1] <= 1:  # without objectives no point is worse than another
        mask[index] = (losses[index] == losses[index].min(axis=0)).all(axis=1)
        return mask
    import moocore  # 0.2 s to import

    points = losses[index] + 0.0  # makes -0.0 equal 0.0
    if np.isinf(points).any():  # moocore 0.3 errs, or crashes, on infinities in three objectives or more
        points = np.column_stack([np.unique(column, return_inverse=True)[1] for column in points.T]).astype(float)
    mask[index] = moocore.is_nondominated(points, keep_weakly=True)
    return mask


class Front(tuple[Record, ...]):
    """The members of a front, in the order of the last objective; in a notebook it shows itself as a table."""

    objectives: tuple[Objective, ...]

    def __new__(cls, members: Iterable[Record], objectives: Sequence[Objective]) -> "Front":
        made = super().__new__(cls, members)
        made.objectives = tuple(objectives)
        return made

    def _repr_html_(self) -> str:
        from peftscape.analysis.table import front_html

        return front_html(self, self.objectives)


def front(records: Sequence[Record], objectives: Sequence[Objective]) -> Front:
    """The complete records with finite values that no other of them dominates, by the last objective's value.

    Scores are those of validation: retests on test data never form a front.

    Raises:
        ObjectiveError: if no record has an objective's metric.
    """
    able, values = finite(records, objectives)
    mask = non_dominated(values, [objective.direction for objective in objectives])
    members = [(tuple(values[i][::-1]), able[i].number, able[i]) for i in np.flatnonzero(mask)]
    return Front((record for *_, record in sorted(members, key=lambda member: member[:2])), objectives)


def finite(
    records: Sequence[Record], objectives: Sequence[Objective]
) -> tuple[tuple[Record, ...], NDArray[np.float64]]:
    """The records that a front may be formed of, complete with every value finite, and their values.

    Raises:
        ObjectiveError: if complete records exist and none has an objective's metric.
    """
    complete = [record for record in records if record.state == "complete"]
    known = measured(complete)
    for objective in objectives:
        if complete and objective.name not in known:
            raise ObjectiveError(f'no record has "{objective.name}". They have: {", ".join(known)}')
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

    Points that are not better than the reference everywhere add nothing. Computed by moocore.

    Raises:
        ValueError: if the reference is not finite or has another number of objectives.
    """
    losses, corner = _losses(values, directions), _losses([reference], directions)[0]
    if not np.isfinite(corner).all():
        raise ValueError(f"the reference must be finite, found {list(reference)}")
    losses = losses[(losses < corner).all(axis=1)]
    if not len(losses):
        return 0.0
    if losses.shape[1] == 1:
        return float(corner[0] - losses.min())
    import moocore

    return float(moocore.hypervolume(losses, ref=corner))


@dataclass(frozen=True)
class Limit:
    """A constraint: the records whose measure `name` is at most (`upper`) or at least `value`."""

    name: str
    upper: bool
    value: float

    def __str__(self) -> str:
        return f"{self.name}{'<=' if self.upper else '>='}{self.value:g}"

    def admits(self, record: Record) -> bool:
        """Whether the record keeps the limit; one without the measure does not."""
        value = measure(record, self.name)
        return value <= self.value if self.upper else value >= self.value


def parse_limits(text: str, *, known: Sequence[str]) -> tuple[Limit, ...]:
    """The limits in text such as "trainable<=1e6, accuracy>=0.8".

    Raises:
        ObjectiveError: if a part is no limit, or no record has what it names.
    """
    errors, found = [], []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\S+?)\s*(<=|>=)\s*(\S+)", part)
        try:
            if match is None or math.isnan(float(match[3])):
                raise ValueError
        except ValueError:
            errors.append(f'expected a limit such as "trainable<=1e6", found "{part}"')
            continue
        if match[1] not in known:
            near = difflib.get_close_matches(match[1], known, n=1)
            errors.append(f'no record has "{match[1]}". ' + (f'Did you mean "{near[0]}"?' if near else ""))
        found.append(Limit(match[1], match[2] == "<=", float(match[3])))
    if errors:
        raise ObjectiveError("limits: " + "; ".join(errors))
    return tuple(found)


def within(records: Sequence[Record], limits: Sequence[Limit]) -> tuple[Record, ...]:
    """The records that keep every limit (the epsilon constraint of a front)."""
    return tuple(record for record in records if all(limit.admits(record) for limit in limits))


def _losses(values: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.float64]:
    """A copy in which smaller is better everywhere."""
    array = np.array(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != len(directions):
        raise ValueError(f"expected points x {len(directions)} objectives, found shape {array.shape}")
    return array * np.where([way == "maximize" for way in directions], -1.0, 1.0)
