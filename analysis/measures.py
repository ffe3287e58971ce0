"""Measures: what a record says under a name, and records of other people's runs with columns of their own."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from peftscape.spaces.record import COSTS, Direction, Failure, Record, Score

OTHER_COSTS = ("train_s", "wall_s")
"""Names that are costs in imported runs, where no closed form gives them: minimised unless said otherwise."""


@dataclass(frozen=True, kw_only=True)
class Imported(Record):
    """A run of another tool: a record whose measures are named columns, `columns`, with one value a seed.

    `metric` is the column that counts as quality, and `scores` are its values; `costs` is None, since the
    closed forms of this package say nothing of other people's runs. `seeds` belong to the values, in order.
    """

    columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)
    seeds: tuple[int, ...] = (0,)

    def aimed(self, metric: str, direction: Direction, n: int | None = None) -> "Imported":
        """The same run with another column as its quality; failed, and said why, where it has no such value."""
        values = self.columns.get(metric, ())
        finite = [value for value in values if math.isfinite(value)]
        n = self.n_validation if n is None else n
        changes: dict[str, object] = {"metric": metric, "direction": direction, "n_validation": n}
        gone = self.failure is not None and self.failure.kind == MISSING
        if self.state == "complete" or gone:
            scores = tuple(
                Score(seed=seed, validation=value)
                for seed, value in zip(self.seeds, values, strict=False)
                if math.isfinite(value)
            )
            what = f"{metric} is {values[0]}" if values and not math.isnan(values[0]) else f"no {metric}"
            failure = None if finite else Failure(kind=MISSING, message=what)
            changes |= {"state": "complete" if finite else "failed", "scores": scores, "failure": failure}
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


_LOWER_IS_BETTER = ("loss", "error", "perplexity", "mse", "rmse", "mae", "forgetting")
MISSING = "missing value"
"""The failure's kind of a run that ended well and lacks a finite value of the metric asked for."""


def direction_of(metric: str) -> Direction:
    """Which way a metric is better, where only its name is known: losses and errors are minimised."""
    return "minimize" if any(word in metric.lower() for word in _LOWER_IS_BETTER) else "maximize"


def measure(record: Record, name: str) -> float:
    """The record's value of that name: the mean score of its metric, a cost, or a column; NaN without one."""
    if isinstance(record, Imported):
        if name == record.metric:
            return record.validation
        values = record.columns.get(name, ())
        return math.fsum(values) / len(values) if values else math.nan
    if name in COSTS:
        return math.nan if record.costs is None else float(getattr(record.costs, name))
    return record.validation if name == record.metric else math.nan


def measured(records: Iterable[Record]) -> tuple[str, ...]:
    """The names that some complete record has: metrics first, then the costs."""
    metrics: dict[str, None] = {}
    for record in records:
        if record.state == "complete":
            metrics[record.metric] = None
        names = record.columns if isinstance(record, Imported) else COSTS
        if not metrics.keys() >= set(names):
            metrics |= dict.fromkeys(names)
    costs = [name for name in (*COSTS, *OTHER_COSTS) if name in metrics]
    return (*(name for name in metrics if name not in costs), *costs)


def is_cost(name: str) -> bool:
    """Whether a name is that of a cost rather than of a metric."""
    return name in COSTS or name in OTHER_COSTS


def common_denominator(shares: Sequence[float], most: int = 100_000) -> int | None:
    """The number n of questions of which all `shares` are k / n, where at least five of them agree on one.

    Accuracies to full precision give their test set's size away: 0.3730098559514784 is 492 / 1319.
    """
    from fractions import Fraction

    n, seen = 1, set()
    for share in shares:
        if not 0 <= share <= 1:
            return None
        found = Fraction(share).limit_denominator(most)
        if abs(float(found) - share) > 1e-12:
            return None
        n = math.lcm(n, found.denominator)
        seen.add(found)
        if n > most:
            return None
    return n if len(seen) >= 5 and n >= 30 else None
