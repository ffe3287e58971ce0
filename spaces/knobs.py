"""Knobs: the values a hyperparameter may take, and how Optuna suggests them.

A domain has four duties: suggest a value, say whether it holds one, turn a value back into the parameter that
would have suggested it (so that any design can be enqueued), and name its cheapest and dearest ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from peftscape.spaces.words import nearest

if TYPE_CHECKING:
    import optuna

Value = str | int | float | bool | None
#: No number is larger, no size or count of a method of ours, and no width is halved more often.
LARGEST, MOST, HALVINGS = 1e300, 2**20, 64


@runtime_checkable
class Domain(Protocol):
    """The values of one knob."""

    def suggest(self, trial: optuna.Trial, name: str) -> Any: ...

    def param(self, name: str, value: Any) -> dict[str, Value]:
        """The Optuna parameter that would have suggested `value`. Raises ValueError outside the domain."""

    def ends(self) -> tuple[Any, ...]:
        """The values at which a cost can be smallest or largest."""

    def count(self) -> float:
        """How many values; infinite for a continuous knob."""


@dataclass(frozen=True)
class Range:
    """An integer or a float between `low` and `high`, uniform or uniform in the logarithm."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def suggest(self, trial: optuna.Trial, name: str) -> float:
        if self.integer:
            return int(trial.suggest_int(name, int(self.low), int(self.high), log=self.log))
        return float(trial.suggest_float(name, self.low, self.high, log=self.log))

    def param(self, name: str, value: Any) -> dict[str, Value]:
        if self.integer and isinstance(value, float) and value.is_integer():
            value = int(value)  # whole numbers for a knob that is a float
        if isinstance(value, bool) or not isinstance(value, int if self.integer else (int, float)):
            raise ValueError(f"{value!r} is not {'an integer' if self.integer else 'a number'}")
        if not self.low <= value <= self.high:
            raise ValueError(f"{value!r} is not between {self.low:g} and {self.high:g}")
        return {name: value if self.integer else float(value)}

    def ends(self) -> tuple[Any, ...]:
        return (int(self.low), int(self.high)) if self.integer else (self.low, self.high)

    def count(self) -> float:
        return self.high - self.low + 1 if self.integer else math.inf


@dataclass(frozen=True)
class Choice:
    """One of several values without order. A list is shown to Optuna as its members joined by a plus sign."""

    values: tuple[Any, ...]

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        shown = [_shown(value) for value in self.values]
        return self.values[shown.index(trial.suggest_categorical(name, shown))]

    def param(self, name: str, value: Any) -> dict[str, Value]:
        if _shown(value) not in [_shown(v) for v in self.values]:
            known = [str(_shown(v)) for v in self.values]
            raise ValueError(f"{_shown(value)!r} is not one of {', '.join(known)}{nearest(str(value), known)}")
        return {name: _shown(value)}

    def ends(self) -> tuple[Any, ...]:
        return self.values

    def count(self) -> float:
        return len(self.values)


@dataclass(frozen=True)
class Ladder:
    """Powers of two from `low` to `high`: 1, 2, 4 ... The search sees the exponent, so that order is kept."""

    low: int
    high: int

    def suggest(self, trial: optuna.Trial, name: str) -> int:
        exponent: int = trial.suggest_int(_log2(name), self.low.bit_length() - 1, self.high.bit_length() - 1)
        return 1 << exponent

    def param(self, name: str, value: Any) -> dict[str, Value]:
        if not isinstance(value, int) or not self.low <= value <= self.high or value & (value - 1):
            raise ValueError(f"{value!r} is not a power of two from {self.low} to {self.high}")
        return {_log2(name): value.bit_length() - 1}

    def ends(self) -> tuple[Any, ...]:
        return (self.low, self.high)

    def count(self) -> float:
        return self.high.bit_length() - self.low.bit_length() + 1


@dataclass(frozen=True)
class Reduction:
    """floor(width / 2^k), k from `low` to `high`: sizes as log2 reductions of a width; 0 stands for absent.

    AutoPEFT's scale (Zhou et al. 2023, arXiv:2301.12132): k = 0 is the full width; the dearer the smaller k.
    """

    low: int
    high: int
    width: int

    def suggest(self, trial: optuna.Trial, name: str) -> int:
        halvings: int = trial.suggest_int(f"{name}.reduction", self.low, self.high)
        return self.width >> halvings

    def param(self, name: str, value: Any) -> dict[str, Value]:
        for k in range(self.low, self.high + 1):
            if self.width >> k == value:
                return {f"{name}.reduction": k}
        raise ValueError(f"{value!r} is not {self.width} halved {self.low} to {self.high} times")

    def ends(self) -> tuple[Any, ...]:
        return (self.width >> self.high, self.width >> self.low)

    def count(self) -> float:
        return len({self.width >> k for k in range(self.low, self.high + 1)})


def ladder(low: int, high: int) -> Ladder:
    """1, 2, 4 ... : powers of two, both ends included."""
    if low < 1 or low & (low - 1) or high & (high - 1) or high < low:
        raise ValueError(f"a ladder runs between powers of two, not from {low} to {high}")
    return Ladder(low, high)


def choice(*values: Any) -> Choice:
    """One of `values`."""
    return Choice(tuple(values))


def uniform(low: float, high: float) -> Range:
    """A float, uniform."""
    return Range(low, high)


def log_uniform(low: float, high: float) -> Range:
    """A float, uniform in its logarithm."""
    return Range(low, high, log=True)


def integer(low: int, high: int, *, log: bool = False) -> Range:
    """An integer."""
    return Range(low, high, log=log, integer=True)


def knob(domain: Domain, *, default: Any) -> Any:
    """A field of a method that a search may turn: `rank: int = knob(ladder(1, 256), default=8)`."""
    return field(default=default, metadata={"domain": domain})


def domain_from_toml(value: Any, *, width: int) -> Domain | None:
    """The domain that a TOML value writes, or None for a constant.

    `{choice = [...]}`, `{ladder = [1, 256]}`, `{int = [1, 9]}`, `{float = [0, 1]}`, `{log = [1e-4, 1e-2]}`,
    `{reduction = [0, 10]}` (log2 reductions of the backbone's width).

    Raises:
        ValueError: on an unknown word, with the nearest one.
    """
    if not isinstance(value, Mapping):
        return None
    if len(value) != 1:
        raise ValueError(f"a domain is a table with one key, not {dict(value)!r}")
    (word, ends), *_ = value.items()
    makers: dict[str, Callable[..., Domain]] = {
        "choice": lambda *v: choice(*(tuple(x) if isinstance(x, list) else x for x in v)),
        "ladder": ladder,
        "int": integer,
        "float": uniform,
        "log": log_uniform,
        "reduction": lambda low, high: Reduction(low, high, width),
    }
    if word not in makers:
        raise ValueError(f'no domain "{word}"{nearest(str(word), makers)}')
    if not isinstance(ends, Sequence) or isinstance(ends, str) or (word != "choice" and len(ends) != 2):
        raise ValueError(f"{word} takes {'a list' if word == 'choice' else 'two ends, [low, high]'}, not {ends!r}")
    if word == "choice":
        plain = [x for e in ends for x in (e if isinstance(e, list) else [e])]
        if not ends or not all(isinstance(x, (str, int, float)) for x in plain):
            raise ValueError(f"choice takes a list of values, or of lists of them, not {list(ends)!r:.60}")
    elif not all(map(is_finite, ends)) or ends[0] > ends[1] or (word == "log" and ends[0] <= 0):
        raise ValueError(f"{word} = {list(ends)!r:.60} is not a range")
    elif word not in ("float", "log") and not all(isinstance(e, int) for e in ends):
        raise ValueError(f"{word} takes whole numbers, not {list(ends)!r:.60}")
    elif word == "reduction" and not 0 <= ends[0] <= ends[1] <= HALVINGS:
        raise ValueError(f"reduction takes two ends from 0 to {HALVINGS}, not {list(ends)!r:.60}")
    return makers[word](*ends)


def is_finite(value: Any) -> bool:
    """Whether it is a number that arithmetic can handle: neither infinite nor beyond all floats."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def _shown(value: Any) -> Value:
    return "+".join(map(str, value)) if isinstance(value, (tuple, list)) else cast(Value, value)


def _log2(name: str) -> str:
    return f"{name}.log2"
