"""The designs a search may try: slots that are empty or hold one of their options, each with its knobs.

`suggest` asks Optuna for the knobs of a design, conditional ones only where their option is taken; `params` is its
inverse, so that any design can be enqueued. Both walk the same domains.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from peftscape.spaces.compositions import Mask, Share
from peftscape.spaces.design import Design, Placement, Training
from peftscape.spaces.knobs import Choice, Domain, Value
from peftscape.spaces.layers import LayerChoice, Layers
from peftscape.spaces.methods import method as find

if TYPE_CHECKING:
    import optuna

    from peftscape.spaces.sites import SiteMap

NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Option:
    """A method with its knobs: a constant or a domain each.

    Args:
        name: how its parameters are called in the study, the method's name where that is unique.
        layers: which layers, or None where the whole space shares one choice.
        mask: (sparsity, score), each a constant or a domain; None for no mask.
        more: `share` (its kept fraction, 0 for none), `gate` and `drop`, a constant or a domain each.
    """

    name: str
    method: str
    sites: Any
    layers: LayerChoice | None
    knobs: Mapping[str, Any]
    mask: tuple[Any, Any] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def suggest(self, trial: optuna.Trial, shared: Layers | None) -> Placement | None:
        """The placement, or None where its size is zero or no layer is on."""
        knobs = {k: _ask(trial, f"{self.name}.{k}", v) for k, v in self.knobs.items()}
        sites = _ask(trial, f"{self.name}.sites", self.sites)
        layers = shared if self.layers is None else self.layers.suggest(trial, f"{self.name}.layers")
        mask = None
        if self.mask is not None:
            sparsity = _ask(trial, f"{self.name}.mask.sparsity", self.mask[0])
            if sparsity > 0:
                mask = Mask(sparsity=sparsity, score=_ask(trial, f"{self.name}.mask.score", self.mask[1]))
        more = {k: _ask(trial, f"{self.name}.{k}", v) for k, v in self.more.items()}
        kind = find(self.method)
        if not layers or knobs.get(kind.size_knob or "") == 0:
            return None
        method = kind(**knobs)
        return Placement(method=method, sites=tuple(sites), layers=layers, mask=mask, **_compositions(more))

    def params(self, placement: Placement) -> dict[str, Value]:
        """The parameters that suggest this placement. Raises ValueError where the option cannot give it."""
        found: dict[str, Value] = {}
        own = placement.method.knobs()
        defaults = find(self.method)().knobs()
        for knob, value in own.items():
            found |= _tell(f"{self.name}.{knob}", self.knobs.get(knob, defaults[knob]), value)
        found |= _tell(f"{self.name}.sites", self.sites, placement.sites)
        if self.layers is not None:
            found |= self.layers.params(f"{self.name}.layers", placement.layers)
        share = placement.share.kept if placement.share else 0.0
        for key, value in (("share", share), ("gate", placement.gate), ("drop", placement.drop)):
            if key not in self.more and value:
                raise ValueError(f"{self.name}: this space has no {key} on it")
            found |= _tell(f"{self.name}.{key}", self.more[key], value) if key in self.more else {}
        if self.mask is None:
            if placement.mask is not None:
                raise ValueError(f"{self.name}: this space has no masks on it")
            return found
        found |= _tell(f"{self.name}.mask.sparsity", self.mask[0], placement.mask.sparsity if placement.mask else 0.0)
        if placement.mask is not None:
            found |= _tell(f"{self.name}.mask.score", self.mask[1], placement.mask.score)
        return found

    def absent(self) -> dict[str, Value] | None:
        """Parameters under which it has size zero, or no layer; None if it is always there."""
        if self.layers is not None and "bits" in self.layers.words and not self._asked():
            return self.layers.params(f"{self.name}.layers", ())
        for knob, value in self.knobs.items():
            if knob == find(self.method).size_knob and isinstance(value, Domain) and 0 in value.ends():
                zero = dict(value.param(f"{self.name}.{knob}", 0))
                rest = [(k, v) for k, v in self.knobs.items() if k != knob]
                for name, other in [*rest, ("sites", self.sites), *self.more.items()]:
                    if isinstance(other, Domain):
                        zero |= other.param(f"{self.name}.{name}", other.ends()[0])
                return zero
        return None

    def _asked(self) -> bool:
        """Whether it has a choice besides its layers."""
        mask = self.mask if self.mask is not None else ()
        return any(
            isinstance(value, Domain) for value in (*self.knobs.values(), self.sites, *self.more.values(), *mask)
        )

    def ends(self) -> Iterator[Placement]:
        """Placements among which its cheapest and dearest are: every end of every domain."""
        variants: list[dict[str, Any]] = [{}]
        for knob, value in self.knobs.items():
            ends = [e for e in value.ends() if e] if isinstance(value, Domain) else [value]
            variants = [v | {knob: e} for v in variants for e in ends]
        sites = self.sites.ends() if isinstance(self.sites, Domain) else (self.sites,)
        sparsities: tuple[Any, ...] = (0,)
        if self.mask is not None:
            sparsities = self.mask[0].ends() if isinstance(self.mask[0], Domain) else (self.mask[0],)
        layers: tuple[Layers, ...] = self.layers.ends() if self.layers is not None else ("all",)
        extras: list[dict[str, Any]] = [{}]
        for key, value in self.more.items():
            ends = list(value.ends()) if isinstance(value, Domain) else [value]
            extras = [e | {key: end} for e in extras for end in ends]
        for knobs in variants:
            method = find(self.method)(**knobs)
            for where in sites:
                for which in layers:
                    for s, more in itertools.product(sparsities, extras):
                        mask = Mask(sparsity=s) if s else None
                        yield Placement(
                            method=method, sites=tuple(where), layers=which, mask=mask, **_compositions(more)
                        )

    def count(self) -> float:
        """How many settings."""
        mask = 1.0
        if self.mask is not None:
            scores = _count(self.mask[1])
            sparsities = self.mask[0].ends() if isinstance(self.mask[0], Choice) else None
            mask = math.inf if sparsities is None else sum(scores if s else 1 for s in sparsities)
        layers = self.layers.count() if self.layers is not None else 1
        return math.prod(map(_count, [*self.knobs.values(), *self.more.values(), self.sites])) * layers * mask


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Empty (if optional) or one of its options."""

    name: str
    options: tuple[Option, ...]
    optional: bool = False

    def choice(self) -> Choice | None:
        """Which option, if that is a question at all."""
        names = [o.method for o in self.options] + ([NONE] if self.optional else [])
        return Choice(tuple(names)) if len(names) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Space:
    """The designs a search may try on one backbone.

    Args:
        layers: a choice of layers that all placements share, or None where each has its own.
        training: knobs of `Training`, a constant or a domain each.
        dropped: options that this backbone refuses, and why.
    """

    name: str
    slots: tuple[Slot, ...]
    sites: SiteMap
    layers: LayerChoice | None = None
    training: Mapping[str, Any]
    dropped: tuple[str, ...] = ()

    def suggest(self, trial: optuna.Trial) -> Design:
        """Ask a trial for a design."""
        placements = []
        shared = self.layers.suggest(trial, "layers") if self.layers is not None else None
        for slot in self.slots:
            choice = slot.choice()
            taken = choice.suggest(trial, slot.name) if choice else slot.options[0].method
            placements += [o.suggest(trial, shared) for o in slot.options if o.method == taken]
        training = {k: _ask(trial, f"training.{k}", v) for k, v in self.training.items()}
        return Design(placements=tuple(p for p in placements if p is not None), training=Training(**training))

    def params(self, design: Design) -> dict[str, Value]:
        """The parameters that suggest this design; the inverse of `suggest`.

        Raises:
            ValueError: if the design is not in the space, and why.
        """
        found: dict[str, Value] = {}
        left = [p for p in design.placements if p.method.name != "head_only"]
        if self.layers is not None:
            chosen: set[Layers] = {p.layers for p in left} or {"all"}
            if len(chosen) > 1:
                raise ValueError("all placements of this space share their layers")
            found |= self.layers.params("layers", chosen.pop())
        for slot in self.slots:
            mine, told = self._taken(slot, left)
            if mine is not None:
                left.remove(mine)
                found |= told
            zero = None if mine is not None or slot.optional else self.slots_zero(slot)
            taken = mine.method.name if mine is not None else NONE if slot.optional else slot.options[0].method
            found |= (choice.param(slot.name, taken) if (choice := slot.choice()) else {}) | (zero or {})
        if left:
            raise ValueError(f"no slot of {self.name} is left for {left[0].label}")
        for name, domain in self.training.items():
            found |= _tell(f"training.{name}", domain, getattr(design.training, name))
        return found

    def _taken(self, slot: Slot, left: list[Placement]) -> tuple[Placement | None, dict[str, Value]]:
        """The first placement that the slot can hold, and the parameters that suggest it.

        Raises:
            ValueError: no slot but this one could hold a placement, and it cannot.
        """
        names = {o.method: o for o in slot.options}
        for placement in left:
            name = placement.method.name
            if name not in names:
                continue
            try:
                return placement, names[name].params(placement)
            except ValueError:
                if sum(o.method == name for s in self.slots for o in s.options) == 1:
                    raise
        return None, {}

    @staticmethod
    def slots_zero(slot: Slot) -> dict[str, Value]:
        """Parameters under which a slot that is not optional holds nothing. Raises ValueError if it always does."""
        zero = slot.options[0].absent()
        if zero is None:
            raise ValueError(f"{slot.name} cannot be empty in this space")
        return zero

    def count(self) -> tuple[float, int]:
        """How many designs, knobs with continuous domains left out of the product, and how many such knobs."""
        options = [o for slot in self.slots for o in slot.options]
        total = 1.0
        for slot in self.slots:
            total *= sum(_finite(o).count() for o in slot.options) + slot.optional
        values = [*self.training.values(), *(v for o in options for v in (*o.knobs.values(), *o.more.values()))]
        continuous = sum(math.isinf(_count(v)) for v in values)
        shared = self.layers.count() if self.layers is not None else 1
        return total * shared * math.prod(c for c in map(_count, self.training.values()) if c < math.inf), continuous

    def ends(self) -> Iterator[tuple[Slot, list[Placement | None]]]:
        """For each slot what it may hold at its cheapest and dearest."""
        for slot in self.slots:
            held: list[Placement | None] = [p for o in slot.options for p in o.ends()]
            if slot.optional or any(o.absent() is not None for o in slot.options):
                held.append(None)
            yield slot, held


def _ask(trial: optuna.Trial, name: str, value: Any) -> Any:
    return value.suggest(trial, name) if isinstance(value, Domain) else value


def _tell(name: str, domain: Any, value: Any) -> dict[str, Value]:
    if isinstance(domain, Domain):
        try:
            return domain.param(name, value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if (tuple(domain) if isinstance(domain, list) else domain) != value:
        raise ValueError(f"{name}: {value!r} is not {domain!r}, as this space has it")
    return {}


def _compositions(more: Mapping[str, Any]) -> dict[str, Any]:
    """A placement's compositions from their values: a kept fraction of 0 shares nothing."""
    share = more.get("share", 0.0)
    return {**more, "share": Share(kept=share) if share else None}


def _count(value: Any) -> float:
    return value.count() if isinstance(value, Domain) else 1


def _finite(option: Option) -> Option:
    """The option without its continuous knobs."""

    def finite(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in values.items() if not math.isinf(_count(v))}

    return replace(option, knobs=finite(option.knobs), more=finite(option.more))
