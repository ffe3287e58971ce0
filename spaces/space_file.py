"""A space as TOML: read, checked against the backbone, all errors at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from peftscape.spaces.compositions import SCORES, read_compositions
from peftscape.spaces.design import Training
from peftscape.spaces.design_file import COMMON, with_config
from peftscape.spaces.hf_peft import HFPeft
from peftscape.spaces.knobs import MOST, Choice, Domain, Range, domain_from_toml, is_finite
from peftscape.spaces.layers import WORDS, LayerChoice
from peftscape.spaces.methods import method as find
from peftscape.spaces.presets import preset
from peftscape.spaces.sites import kind_in
from peftscape.spaces.space import Option, Slot, Space
from peftscape.spaces.words import InputError, nearest

if TYPE_CHECKING:
    from peftscape.spaces.methods.base import Method
    from peftscape.spaces.sites import SiteMap

SPACE_KEYS = ("name", "category", "about", "source", "preset", "layers", "training", "slots")
SLOT_KEYS = ("name", "optional", "options")


def read_space(table: str | Mapping[str, Any], sites: SiteMap) -> Space:
    """A space from a preset's name or from a table; `preset` in a table names what it starts from.

    Options whose sites this backbone refuses are dropped and listed in `Space.dropped`; a choice of sites keeps
    those that it has.

    Raises:
        InputError: with all that is wrong.
    """
    own: Mapping[str, Any] = preset(table) if isinstance(table, str) else table
    if "preset" in own:
        own = {**preset(str(own["preset"])), **{k: v for k, v in own.items() if k != "preset"}}
    return _Reader(sites).space(own)


class _Reader:
    def __init__(self, sites: SiteMap) -> None:
        self.sites = sites
        self.errors: list[str] = []
        self.dropped: list[str] = []

    def space(self, table: Mapping[str, Any]) -> Space:
        self._unknown(table, SPACE_KEYS, "")
        shared = self._layers(table["layers"], "layers") if "layers" in table else None
        training = self._training(table.get("training", {}))
        rows = table.get("slots", [])
        if not isinstance(rows, list) or not rows:
            self.errors.append("slots: a list of tables was expected")
            rows = []
        names = [
            o.get("method")
            for row in rows
            if isinstance(row, Mapping)
            for o in (row["options"] if isinstance(row.get("options"), list) else [])
            if isinstance(o, Mapping)
        ]
        slots = [self._slot(row, f"slots[{i}]", names, shared is not None) for i, row in enumerate(rows)]
        if self.errors:
            raise InputError("space", self.errors)
        return Space(
            name=str(table.get("name", "space")),
            slots=tuple(s for s in slots if s is not None and s.options),
            sites=self.sites,
            layers=shared,
            training=training,
            dropped=tuple(self.dropped),
        )

    def _slot(self, row: Any, at: str, names: list[Any], shared: bool) -> Slot | None:
        if not isinstance(row, Mapping) or not isinstance(row.get("options"), list):
            self.errors.append(f"{at}: a table with name and options was expected")
            return None
        self._unknown(row, SLOT_KEYS, f"{at}.")
        name = str(row.get("name", at))
        options = []
        for i, option in enumerate(row["options"]):
            where = f"{at}.options[{i}]"
            method = option.get("method") if isinstance(option, Mapping) else None
            try:
                find(str(method))
            except InputError as error:
                self.errors += [f"{where}.method: {line}" for line in error.errors]
                continue
            prefix = str(method) if names.count(method) == 1 else f"{name}.{method}"
            found = self._option(option, where, prefix, shared)
            options += [found] if found else []
        return Slot(name=name, options=tuple(options), optional=bool(row.get("optional", False)))

    def _option(self, row: Mapping[str, Any], at: str, name: str, shared: bool) -> Option | None:
        kind, row = find(row["method"]), with_config(row)
        defaults = kind().knobs()
        own = {k: v for k, v in row.items() if k not in COMMON}
        self._unknown(own, (*defaults, *COMMON), f"{at}.")
        knobs = {k: self._value(v, f"{at}.{k}") for k, v in own.items() if k in defaults}
        domains = kind.domains()
        for knob, value in knobs.items():
            told = value is None and row[knob] is not None
            ends = value.ends() if isinstance(value, Domain) else () if told else (value,)
            if isinstance(domains.get(knob), Choice):
                for end in ends:
                    self._inside(domains[knob], end, f"{at}.{knob}")
            elif wrong := next((why for end in ends if (why := _unfit(value, end, defaults[knob], kind, knob))), None):
                self.errors.append(f"{at}.{knob}: {wrong}")
        sites = self._sites(row.get("sites", list(kind.default_sites)), kind.name, kind.sites, at)
        layers = None
        if not shared:
            layers = self._layers(row.get("layers", "all"), f"{at}.layers")
        elif "layers" in row:
            self.errors.append(f"{at}.layers: the whole space shares its layers")
        mask = self._mask(row["mask"], f"{at}.mask") if "mask" in row else None
        if mask is not None and kind.size_knob is None:
            self.errors.append(f"{at}.mask: {kind.name} has no matrix to mask")
        others = [key for key in ("share", "gate", "drop") if key in row]
        more = {key: self._composition(row[key], key, kind, f"{at}.{key}") for key in others}
        if sites is None:
            return None
        return Option(name=name, method=kind.name, sites=sites, layers=layers, knobs=knobs, mask=mask, more=more)

    def _composition(self, value: Any, key: str, kind: type[Method], at: str) -> Any:
        """A constant or a domain; of `share` the kept fraction, 0 for none."""
        if key == "share" and isinstance(value, Mapping):
            self._unknown(value, ("kept",), f"{at}.")
            value = value.get("kept", 1.0)
        value = self._value(value, at)
        for end in value.ends() if isinstance(value, Domain) else (value,):
            given = ({"kept": end} if end else None) if key == "share" else end
            read_compositions({key: given}, kind, at.removesuffix(f".{key}"), self.errors)
        return value

    def _sites(self, value: Any, method: str, known: frozenset[str], at: str) -> Any:
        """A constant or a choice of lists of sites, without what this backbone has not; None if nothing is left."""
        value = self._value(value, f"{at}.sites")
        lists = value.values if isinstance(value, Choice) else (value,)
        kept = []
        for names in lists:
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
                lists_of_lists = isinstance(names, list) and all(isinstance(name, list) for name in names)
                hint = "; to choose among lists, write {choice = [[...], [...]]}" if lists_of_lists else ""
                self.errors.append(f"{at}.sites: a list of names was expected, not {names!r}{hint}")
                continue
            for name in names:
                if kind_in(name) not in known:
                    self.errors.append(f'{at}.sites: {method} cannot adapt "{name}"{nearest(str(name), known)}')
            there = tuple(n for n in names if any(site.named((n,)) for site in self.sites.sites))
            if there and there not in kept:
                kept.append(there)
            for name in names:
                if (of := kind_in(name)) in self.sites.refused:
                    self.dropped.append(f"{method} on {name}: {self.sites.refused[of]}")
        if not kept:
            return None
        return Choice(tuple(kept)) if isinstance(value, Choice) else kept[0]

    def _mask(self, row: Any, at: str) -> tuple[Any, Any] | None:
        if not isinstance(row, Mapping):
            self.errors.append(f"{at}: a table with sparsity and score was expected")
            return None
        self._unknown(row, ("sparsity", "score"), f"{at}.")
        sparsity = self._value(row.get("sparsity", 0.0), f"{at}.sparsity")
        score = self._value(row.get("score", "random"), f"{at}.score")
        for end in sparsity.ends() if isinstance(sparsity, Domain) else (sparsity,):
            if not isinstance(end, (int, float)) or not 0 <= end < 1:
                self.errors.append(f"{at}.sparsity: the zeroed fraction, from 0 to below 1, not {end!r}")
        for end in score.ends() if isinstance(score, Domain) else (score,):
            if end not in SCORES:
                self.errors.append(f'{at}.score: no score "{end}"{nearest(str(end), SCORES)}')
        return sparsity, score

    def _layers(self, value: Any, at: str) -> LayerChoice:
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not words:
            self.errors.append(f"{at}: some of {', '.join(WORDS)} were expected, not {value!r}")
            words = ["all"]
        for word in words:
            if word not in WORDS:
                self.errors.append(f'{at}: no choice of layers "{word}"{nearest(str(word), WORDS)}')
        return LayerChoice(tuple(map(str, words)), self.sites.layers)

    def _training(self, row: Any) -> dict[str, Any]:
        names = tuple(f.name for f in fields(Training) if f.name != "epochs")
        if not isinstance(row, Mapping):
            self.errors.append("training: a table was expected")
            return {}
        self._unknown(row, names, "training.")
        values: dict[str, Any] = {}
        for name in (n for n in row if n in names):
            before = len(self.errors)
            value = values[name] = self._value(row[name], f"training.{name}")
            ends = value.ends() if isinstance(value, Domain) else (value,)
            if len(self.errors) == before and not all(map(is_finite, ends)):
                self.errors.append(f"training.{name}: a number or a domain was expected, not {row[name]!r:.60}")
        return values

    def _value(self, value: Any, at: str) -> Any:
        """A domain, or the constant that TOML has; None where an error was told."""
        try:
            domain = domain_from_toml(value, width=self.sites.d_model)
        except ValueError as error:
            self.errors.append(f"{at}: {error}")
            return None
        return value if domain is None else domain

    def _inside(self, domain: Domain, value: Any, at: str) -> None:
        try:
            domain.param(at, value)
        except ValueError as error:
            self.errors.append(f"{at}: {error}")

    def _unknown(self, row: Mapping[str, Any], known: tuple[str, ...], at: str) -> None:
        self.errors += [f"{at}{key}: no such key{nearest(key, known)}" for key in row if key not in known]


def _unfit(value: Any, end: Any, default: Any, kind: type[Method], knob: str) -> str | None:
    """Why a number in a space does not suit a knob; sizes may lie outside what a search tries, and 0 is absent."""
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        broken = isinstance(value, Range) and not value.integer
        if isinstance(end, bool) or not isinstance(end, (int, float)) or (isinstance(default, int) and broken):
            return f"{type(default).__name__} expected, not {_written(value) if broken else repr(end)}"
        if (isinstance(default, int) and not isinstance(end, int)) or not is_finite(end):
            return f"{type(default).__name__} expected, not {end!r:.60}"
        if isinstance(default, int) and end > MOST:
            return f"more than {MOST:,}"
        return f"{end!r} is below 0" if end < 0 else None
    if issubclass(kind, HFPeft):
        try:
            kind.read_knob(knob, end)
        except ValueError as error:
            return str(error)
        return None
    if type(end) is not type(default) and not isinstance(end, (list, tuple)):
        return f"{type(default).__name__} expected, not {end!r}"
    return None


def _written(value: Range) -> str:
    return f"a float between {value.low:g} and {value.high:g}"
