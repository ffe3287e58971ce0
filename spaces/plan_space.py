"""The plans of a whole space: designs drawn at random from it, and how their costs are spread."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peftscape.spaces.devices import Device
from peftscape.spaces.plan import Plan, Setting, plan
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.spaces.design import Design
    from peftscape.spaces.profiles import Profile
    from peftscape.spaces.sites import SiteMap
    from peftscape.spaces.space import Space

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Draw:
    """Stands for an Optuna trial and draws uniformly, in the logarithm where asked; a name keeps its first value."""

    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.params: dict[str, Any] = {}

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number from low to high."""
        if log:
            value = round(self.suggest_float(f"{name} in logs", low, high, log=True))
        else:
            value = self.source.randrange(low, high + 1, step)
        found: int = self.params.setdefault(name, value)
        return found

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number from low to high."""
        import math

        value = math.exp(self.source.uniform(math.log(low), math.log(high))) if log else self.source.uniform(low, high)
        found: float = self.params.setdefault(name, value)
        return found

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""
        return self.params.setdefault(name, self.source.choice(list(choices)))


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How costs are spread over a space.

    Args:
        designs: drawn and possible on this model; `impossible` were drawn and are not.
        quantiles: of each cost by name, at `QUANTILES`.
        excluded: the fraction that a limit on trained parameters or on the device's memory excludes.
        search_s: expected seconds for a search of that many trials, each alone; with its ends.
    """

    space: str
    designs: int
    impossible: int
    quantiles: dict[str, tuple[float, ...]]
    cheapest: str
    dearest: str
    excluded: dict[str, float]
    search_s: tuple[float, float, float] | None = None

    def json(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"at": QUANTILES}


def spread(
    space: Space, sites: SiteMap, profile: Profile, setting: Setting, *, draws: int = 200, seed: int = 0,
    limit: int | None = None, device: Device | None = None, trials: int = 30, steps: int = 1000, tied: bool = True,
) -> Spread:  # fmt: skip
    """Plans of designs drawn at random.

    Args:
        limit: trained parameters above which a design is excluded.
        trials, steps: of the search whose time is asked for, and of each training.

    Raises:
        InputError: no design of the space is possible on this model.
    """
    found: list[tuple[Design, Plan]] = []
    impossible = 0
    source = random.Random(seed)
    for _ in range(draws):
        design = space.suggest(Draw(source))
        if design.check(sites):
            impossible += 1
            continue
        found.append((design, plan(design, sites, profile, setting, tied=tied)))
    if not found:
        raise InputError("plan", [f"none of {draws} designs drawn from {space.name} is possible on this model"])
    plans = [p for _, p in found]
    names: dict[str, Sequence[float]] = {
        "trainable": [p.total for p in plans],
        "adapter_bytes": [p.adapter_bytes for p in plans],
        "peak_bytes": [p.memory.peak for p in plans],
        "train_flops": [p.train_flops for p in plans],
        "infer_extra_flops": [p.infer_extra_flops for p in plans],
    }
    excluded = {}
    if limit is not None:
        excluded["parameters"] = sum(p.total > limit for p in plans) / len(plans)
    seconds = None
    if device is not None:
        excluded["memory"] = sum(p.memory.peak > device.usable_bytes for p in plans) / len(plans)
        mean = sum(p.step_flops for p in plans) / len(plans)
        fast, middle, slow = (trials * steps * mean / (device.flops * u) for u in reversed(device.utilisation))
        seconds = (fast, middle, slow)
    order = sorted(plans, key=lambda p: p.total)
    return Spread(
        space=space.name, designs=len(plans), impossible=impossible,
        quantiles={name: _quantiles(values) for name, values in names.items()},
        cheapest=order[0].design, dearest=order[-1].design, excluded=excluded, search_s=seconds,
    )  # fmt: skip


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    ordered = sorted(values)
    return tuple(ordered[round(q * (len(ordered) - 1))] for q in QUANTILES)
