"""Fits: quality as a function of cost, on a log axis, with intervals, and marked where it extrapolates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftscape.analysis.bands import law, law_band, rising, rising_band
from peftscape.analysis.belief import Belief
from peftscape.analysis.measures import measure
from peftscape.spaces.record import Direction, Record

Floats = NDArray[np.float64]
Kind = Literal["saturating", "isotonic"]
FEWEST_SIZES = 5
BIN = 0.15
"""Costs within 0.15 decades (a factor of 1.4) count as one size."""


class FitError(ValueError):
    """A curve that the data do not support; the message says why."""


@dataclass(frozen=True)
class Expected:
    """A value of a curve: the curve's 95 % interval, where a new design would score, and whether it extrapolates."""

    value: float
    low: float
    high: float
    new_low: float
    new_high: float
    extrapolated: bool


@dataclass(frozen=True)
class CostFor:
    """The cost expected for a quality, and the least and most that the curve's interval allows; None: not reached."""

    cost: float | None
    low: float | None
    high: float | None
    extrapolated: bool


@dataclass(frozen=True, eq=False)
class Curve:
    """A fitted efficiency-accuracy curve over costs `low` to `high`.

    `kind` is the form that cross-validation chose, and `errors` the root mean squares of both forms' leave-one-out
    residuals. `law` holds a, b and g of a - b c^-g for the saturating form. `zero` is the score of the design
    that costs nothing, a point of its own. `sizes` are the distinct costs that were fitted.
    """

    kind: Kind
    direction: Direction
    low: float
    high: float
    sizes: int
    errors: Mapping[Kind, float]
    law: tuple[float, float, float] | None
    zero: float | None
    x: Floats
    y: Floats

    def at(self, cost: float) -> Expected:
        """The quality expected at a cost.

        Raises:
            ValueError: if the cost is not positive.
        """
        if not cost > 0 or not math.isfinite(cost):
            raise ValueError(f"expected a positive cost, found {cost}")
        return self._expected([cost])[0]

    def _expected(self, costs: Sequence[float]) -> list[Expected]:
        from scipy.special import stdtrit

        sign = 1.0 if self.direction == "maximize" else -1.0
        values, lows, highs = self._band(np.log(np.asarray(costs, dtype=np.float64)))
        freedom = max(self.sizes - (3 if self.kind == "saturating" else 2), 2)
        own = float(stdtrit(freedom, 0.975)) * self.errors[self.kind]
        found = []
        for cost, middle, under, over in zip(costs, values, lows, highs, strict=True):
            value, low, high = float(middle), float(under), float(over)
            outside = not self.low * (1 - 1e-9) <= cost <= self.high * (1 + 1e-9)
            # Leave-one-out residuals hold the curve's own error once; beyond the data it is vaguer and adds to them.
            reach = math.hypot(own, (high - low) / 2) if outside else own
            bounds = sorted((sign * low, sign * high))
            new = sorted((sign * (value - reach), sign * (value + reach)))
            found.append(Expected(sign * value, bounds[0], bounds[1], new[0], new[1], outside))
        return found

    def _band(self, logs: Floats) -> tuple[Floats, Floats, Floats]:
        """The curve and its band, larger being better."""
        middle = _predict(self.kind, self.x, self.y, logs)
        low, high = (law_band if self.kind == "saturating" else rising_band)(self.x, self.y, logs)
        return middle, np.minimum(low, middle), np.maximum(high, middle)

    def cost_for(self, quality: float) -> "CostFor":
        """The least cost at which the curve reaches a quality, looked for up to a hundred times beyond the data."""
        sign = 1.0 if self.direction == "maximize" else -1.0
        grid = np.linspace(math.log(self.low) - math.log(100), math.log(self.high) + math.log(100), 800)
        middle, low, high = self._band(grid)
        found = []
        for curve in (middle, high, low):
            reached = np.flatnonzero(curve >= sign * quality - 1e-12)
            found.append(float(math.exp(grid[reached[0]])) if len(reached) else None)
        cost = found[0]
        outside = cost is None or not self.low * (1 - 1e-9) <= cost <= self.high * (1 + 1e-9)
        return CostFor(cost, found[1], found[2], outside)

    def line(self, points: int = 60, beyond: float = 0.0) -> tuple[list[float], list[Expected]]:
        """The curve at costs evenly spaced in ratio, from low to high and by the factor 10^beyond further."""
        costs = np.geomspace(self.low * 10**-beyond, self.high * 10**beyond, points).tolist()
        return costs, self._expected(costs)

    def text(self) -> str:
        """The law in words."""
        if self.law is None:
            return "isotonic (no law fits better)"
        a, b, g = self.law
        if abs(b) < 1e-12:
            return f"q = {a:.3f} at every cost"
        return f"q = {a:.3f} {'-' if b >= 0 else '+'} {abs(b):.3g} c^-{g:.2f}"


def fit_curve(cost: ArrayLike, quality: ArrayLike, *, direction: Direction = "maximize") -> Curve:
    """The curve of quality against cost: isotonic or a - b c^-g, whichever predicts left-out sizes better.

    The law (b >= 0, 0.001 <= g <= 3) is fitted by least squares, for each g in closed form; the isotonic form
    is linear between sizes in log cost. The curve's interval inverts a likelihood ratio (`bands`); a new
    design's is t times the error of left-out sizes. Costs of zero are apart.

    Raises:
        FitError: with fewer than five distinct sizes.
        ValueError: if values are not finite or a cost is negative.
    """
    c, q = np.asarray(cost, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    if c.shape != q.shape or c.ndim != 1 or not np.isfinite([*c, *q]).all() or (c < 0).any():
        raise ValueError("expected one finite quality for each cost, and no negative cost")
    sign = 1.0 if direction == "maximize" else -1.0
    zero = q[c == 0]
    x, y = np.log(c[c > 0]), sign * q[c > 0]
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    sizes = len(np.unique(np.round(x, 9)))
    if sizes < FEWEST_SIZES:
        raise FitError(f"{sizes} distinct sizes; a curve needs at least {FEWEST_SIZES}")
    kinds: tuple[Kind, ...] = ("saturating", "isotonic")
    errors: dict[Kind, float] = {}
    for kind in kinds:
        left = np.array([_left_out(kind, x, y, i) for i in range(len(x))])
        errors[kind] = float(np.sqrt(np.mean((left - y) ** 2)))
    kind = min(kinds, key=lambda k: errors[k])
    found = None
    if kind == "saturating":
        a, b, g = law(x, y)
        found = (sign * a, sign * b, g)
    best = float(zero.max() if sign > 0 else zero.min()) if len(zero) else None
    return Curve(kind, direction, float(np.exp(x[0])), float(np.exp(x[-1])), sizes, errors, found, best, x, y)


def _predict(kind: Kind, x: Floats, y: Floats, at: Floats) -> Floats:
    if kind == "isotonic":
        return rising(x, y, at)
    a, b, g = law(x, y)
    return np.asarray(a - b * np.exp(-g * at))


def _left_out(kind: Kind, x: Floats, y: Floats, i: int) -> float:
    keep = np.abs(x - x[i]) > 1e-9  # the whole size is left out, not one of its repeats
    return float(_predict(kind, x[keep], y[keep], x[i : i + 1])[0])


def leaders(found: Mapping[str, Curve], points: int = 120) -> list[tuple[str, float, float]]:
    """Which curve leads where: (name, from cost, to cost) in order of cost, of the curves that reach there.

    The curve of the whole ("all methods") is left out; empty with fewer than two others.
    """
    own = {name: curve for name, curve in found.items() if name != "all methods"}
    if len(own) < 2:
        return []
    low, high = min(c.low for c in own.values()), max(c.high for c in own.values())
    spans: list[tuple[str, float, float]] = []
    for cost in np.geomspace(low, high, points).tolist():
        here = {n: c for n, c in own.items() if c.low * (1 - 1e-9) <= cost <= c.high * (1 + 1e-9)}
        if not here:
            continue
        sign = 1 if next(iter(here.values())).direction == "maximize" else -1
        best = max(here, key=lambda n: (sign * here[n].at(cost).value, n))
        if spans and spans[-1][0] == best:
            spans[-1] = (best, spans[-1][1], cost)
        else:
            spans.append((best, cost, cost))
    return spans


def best_by_size(
    records: Sequence[Record], cost: str, belief: Belief | None
) -> tuple[list[float], list[float], list[Record]]:
    """For each size the record of the best shrunken score, with that score.

    A size is 0.15 decades of cost, or a twelfth of the costs' range if that is less.

    Shrunken scores, moved to the test's scale where there are retests, are corrected for having been selected;
    without a belief (nothing is known of the error) validation scores stand, and are too rosy.
    """
    able = [v for r in records if r.state == "complete" and math.isfinite(v := measure(r, cost)) and v > 0]
    # Where all costs lie close together, as memory does, sizes do too.
    width = min(BIN, math.log10(max(able) / min(able)) / 12 or BIN) if able else BIN
    sizes: dict[int | None, tuple[float, float, Record]] = {}
    for record in records:
        value = measure(record, cost)
        if record.state != "complete" or not math.isfinite(value) or value < 0:
            continue
        known = belief.by_number.get(record.number) if belief else None
        score = known.score.mean if known else record.validation
        sign = 1 if record.direction == "maximize" else -1
        key = None if value == 0 else math.floor(math.log10(value) / width)
        if key not in sizes or sign * score > sign * sizes[key][1]:
            sizes[key] = (value, score, record)
    found = sorted(sizes.values(), key=lambda item: item[0])
    return [f[0] for f in found], [f[1] for f in found], [f[2] for f in found]


def curves(
    records: Sequence[Record], cost: str, belief: Belief | None, groups: Mapping[str, Sequence[Record]]
) -> tuple[dict[str, Curve], dict[str, str]]:
    """A curve of the best design of each size for the whole ("all methods") and each group; why others have none."""
    found: dict[str, Curve] = {}
    refused: dict[str, str] = {}
    for name, members in (("all methods", records), *groups.items()):
        costs, scores, chosen = best_by_size(members, cost, belief)
        direction = chosen[0].direction if chosen else "maximize"
        try:
            found[name] = fit_curve(costs, scores, direction=direction)
        except FitError as error:
            refused[name] = str(error)
    return found, refused
