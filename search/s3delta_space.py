"""What S3Delta chooses among: the modules of a space, each of them a slot's method at one layer.

A module is kept or left out; sizes are given. No torch here: `check` reads this too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from peftscape.search.budget import parameter_limit
from peftscape.spaces.compositions import NO_OUTPUT
from peftscape.spaces.design import Design, Placement
from peftscape.spaces.knobs import Domain
from peftscape.spaces.methods import method as find
from peftscape.spaces.methods.base import Method
from peftscape.spaces.sites import kind_in
from peftscape.spaces.words import InputError

if TYPE_CHECKING:
    from peftscape.spaces.knobs import Value
    from peftscape.spaces.space import Option, Slot, Space

#: The study's attribute that keeps the structures that were found.
STRUCTURES = "s3delta"
#: What a method may do beside changing its sites' outputs or inputs by tensors of their own: nothing of this.
HOOKS = ("prepare", "expand", "penalty", "consistency", "after_step", "finish", "shared")


@dataclass(frozen=True)
class Module:
    """A slot's method at one layer, with the number of parameters that it trains there."""

    slot: int
    layer: int
    size: int


@dataclass(frozen=True)
class Modules:
    """The modules of a space that `space_errors` finds nothing wrong with."""

    space: Space

    @cached_property
    def placements(self) -> tuple[Placement, ...]:
        """Of each slot its method at all layers, without what lies outside them."""
        return tuple(_placement(slot.options[0], tuple(range(self.space.sites.layers))) for slot in self.space.slots)

    @cached_property
    def all(self) -> tuple[Module, ...]:
        """All modules, slot by slot and up the layers."""
        found: dict[tuple[int, int], int] = {}
        for slot, placement in enumerate(self.placements):
            for layer, size in _sizes(placement, self.space):
                found[slot, layer] = found.get((slot, layer), 0) + size
        return tuple(Module(slot, layer, size) for (slot, layer), size in found.items())

    @cached_property
    def outside(self) -> tuple[int, ...]:
        """Of each slot the parameters outside the layers, which come with all of its layers together."""
        whole = (_placement(slot.options[0], "all") for slot in self.space.slots)
        return tuple(sum(size for layer, size in _sizes(p, self.space) if layer < 0) for p in whole)

    def parameters(self, kept: Collection[int]) -> int:
        """Trained parameters of a structure, the head left out; `kept` numbers modules."""
        total = sum(self.all[i].size for i in kept)
        layers = self._layers(kept)
        whole = (i for i in range(len(self.outside)) if len(layers[i]) == self.space.sites.layers)
        return total + sum(self.outside[i] for i in whole)

    def chosen(self, probabilities: Sequence[float], budget: int) -> tuple[int, ...]:
        """The modules that are kept: from the most probable on, each that still fits in the budget."""
        kept: list[int] = []
        for i in sorted(range(len(self.all)), key=lambda i: (-probabilities[i], i)):
            if self.parameters([*kept, i]) <= budget:
                kept.append(i)
        return tuple(sorted(kept))

    def by_slot(self, kept: Collection[int]) -> dict[str, list[int]]:
        """The layers that a structure keeps, by the slot's name."""
        return {slot.name: row for slot, row in zip(self.space.slots, self._layers(kept), strict=True)}

    def _layers(self, kept: Collection[int]) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in self.space.slots]
        for i in sorted(kept):
            rows[self.all[i].slot].append(self.all[i].layer)
        return rows


def params_of(structures: Sequence[Mapping[str, Any]] | None, space: Space, number: int) -> dict[str, Value]:
    """The parameters that suggest the structure of trial `number`: each in its turn. None where none were found."""
    if not structures:
        return {}
    layers = structures[number % len(structures)]["layers"]
    found: dict[str, Value] = {}
    for slot in space.slots:
        option, choice = slot.options[0], slot.choice()
        assert option.layers is not None
        found |= option.layers.params(f"{option.name}.layers", tuple(layers[slot.name]))
        found |= choice.param(slot.name, option.method) if choice else {}
    return found


def budgets(text: str, backbone: int) -> tuple[int, ...]:
    """Numbers of parameters from `"0.01%, 0.1%"`, shares of the backbone's, or `"2000, 20000"`, ascending.

    Raises:
        ValueError: what cannot be one.
    """
    found = set()
    for part in text.split(","):
        word = part.strip()
        try:
            value = parameter_limit(word if word.endswith("%") else int(word), backbone)
        except (ValueError, OverflowError):
            value = None
        if not value or value < 0:
            raise ValueError(f'a list such as "0.01%, 0.1%" or "2000, 20000" was expected, not "{word:.40}"')
        found.add(value)
    return tuple(sorted(found))


def within(modules: Modules, wanted: Sequence[int], room: float = math.inf) -> tuple[list[int], list[str]]:
    """The budgets that leave something to choose, none above `room`, ascending; and a line on those that do not.

    Args:
        room: parameters that `budget.trainable` leaves beside the head.

    Raises:
        InputError: none does.
    """
    least = min((module.size for module in modules.all), default=0)
    most = sum(module.size for module in modules.all)
    if room < least:
        said = f"it leaves {max(room, 0):,} parameters beside the head; the least module of the space has {least:,}"
        raise InputError("budget.trainable", [said])
    found = sorted({int(min(limit, room)) for limit in wanted if least <= min(limit, room) < most})
    useless = ", ".join(f"{limit:,}" for limit in wanted if not least <= min(limit, room) < most)
    said = f"{least:,} to below {most:,} parameters were expected, which some of the space's modules have"
    if not found:
        raise InputError("search.s3delta.budgets", [f"{said}, not {useless}"])
    return found, [f"search.s3delta.budgets: {said}: {useless} left out"] if useless else []


def space_errors(space: Space) -> list[str]:
    """Why S3Delta cannot choose among the modules of a space, one line each."""
    if space.layers is not None:
        return ['layers: S3Delta chooses the layers of each slot by themselves; write layers = ["bits"] in each option']
    names = [slot.name for slot in space.slots]
    errors = [f'slots: two are called "{name}"' for name in dict.fromkeys(names) if names.count(name) > 1]
    errors += [f'slot "{slot.name}": {why}' for slot in space.slots for why in _slot_errors(slot)]
    if not any(isinstance(value, Domain) for value in space.training.values()):
        errors.append("training: S3Delta finds places alone; a domain was expected, such as lr = {log = [2e-4, 2e-3]}")
    if not errors:
        errors = Design(placements=Modules(space).placements).check(space.sites)
    return errors


def _slot_errors(slot: Slot) -> list[str]:
    if len(slot.options) != 1:
        return [f"{len(slot.options)} options, of which S3Delta would keep several; give each a slot of its own"]
    option = slot.options[0]
    errors = []
    if option.layers is None or option.layers.words != ("bits",):
        errors.append('layers = ["bits"] was expected: S3Delta keeps or leaves out each layer')
    searched = [name for name, value in {**option.knobs, "sites": option.sites}.items() if isinstance(value, Domain)]
    errors += [f"{name}: one value was expected: S3Delta chooses places, not sizes" for name in searched]
    composed = [*(["mask"] if option.mask is not None else []), *option.more]
    errors += [f"{key}: S3Delta weighs methods as they are, without compositions" for key in composed]
    kind = find(option.method)
    names = set() if "sites" in searched else {kind_in(name) for name in option.sites}
    if names & {"kv", *NO_OUTPUT}:
        errors.append(f"{kind.name} changes no output of a module, which is what S3Delta weighs")
    elif kind.execution == "solo" or any(getattr(kind, hook) is not getattr(Method, hook) for hook in HOOKS):
        errors.append(f"{kind.name} does more than S3Delta can weigh: it sets, draws or shares its tensors itself")
    return errors


def _placement(option: Option, layers: Any) -> Placement:
    return Placement(method=find(option.method)(**option.knobs), sites=tuple(option.sites), layers=layers)


def _sizes(placement: Placement, space: Space) -> list[tuple[int, int]]:
    """(layer, trained parameters) of each site."""
    rows = placement.declared(space.sites)
    return [(site.layer, sum(t.size for t in own.values() if t.trains)) for site, own in rows]
