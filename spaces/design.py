"""Designs: which methods sit where, with which sizes, and how they train. JSON in, canonical JSON and a digest out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from peftscape.spaces.methods import methods
from peftscape.spaces.methods.base import Method, Tensor
from peftscape.spaces.words import InputError, nearest

if TYPE_CHECKING:
    from peftscape.spaces.sites import Site, SiteMap

SCORES = ("random", "magnitude", "snip")


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A mask on a method's own matrices, drawn at initialisation and kept (SparseAdapter, arXiv:2210.04284).

    Args:
        sparsity: the zeroed fraction, 0 <= sparsity < 1 (the SparseAdapter code calls the kept fraction so).
        score: `random`, `magnitude` (of the initial draw) or `snip` (|gradient * value| on one batch).
    """

    sparsity: float
    score: str = "random"

    def kept(self, size: int) -> int:
        """How many of `size` entries stay; at least one."""
        return max(1, size - round(self.sparsity * size))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A method with its knobs on some layers and sites.

    Args:
        layers: `"all"` or layer numbers from 0. Sites outside the layers (the input, the embeddings' bias) belong to
            `"all"`; the input belongs to every choice.
    """

    method: Method
    sites: tuple[str, ...]
    layers: Literal["all"] | tuple[int, ...] = "all"
    mask: Mask | None = None

    def where(self, sites: SiteMap) -> tuple[Site, ...]:
        """The sites it adapts in this backbone."""
        chosen = range(-1, sites.layers) if self.layers == "all" else self.layers
        return tuple(
            s for s in sites.sites if s.kind in self.sites and (s.layer in chosen or s.kind in ("input", "model"))
        )

    def maskable(self, tensor: Tensor) -> bool:
        """Whether the placement's mask covers this tensor: matrices are pruned, vectors are kept."""
        return self.mask is not None and tensor.trains and len(tensor.shape) > 1

    def tensors(self, sites: SiteMap) -> Iterator[tuple[str, Site, str, Tensor]]:
        """(key, site, name, tensor) for all it declares; shared tensors come once, under their first site."""
        seen = set()
        for site in self.where(sites):
            for name, tensor in self.method.tensors(site).items():
                key = tensor_key(site, name, tensor)
                if key not in seen:
                    seen.add(key)
                    yield key, site, name, tensor

    @cached_property
    def label(self) -> str:
        """A short name: `lora r8 q,v`, `sequential_adapter m64 ffn 3-5`."""
        size = f" {self.method.letter}{getattr(self.method, self.method.size_knob)}" if self.method.size_knob else ""
        places = "" if self.method.sites == frozenset(self.sites) else " " + ",".join(self.sites)
        layers = "" if self.layers == "all" else " " + _ranges(self.layers)
        mask = f" {self.mask.sparsity:.0%} {self.mask.score}-masked" if self.mask else ""
        return f"{self.method.name}{size}{places}{layers}{mask}"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a design trains.

    Args:
        lr: peak learning rate of AdamW.
        weight_decay: decoupled.
        warmup: fraction of the steps with a rising rate.
        decay: fraction of the steps, at the end, with a falling rate; constant between.
        clip: largest gradient norm of a lane.
        epochs: passes over the training data for `peftscape train`; a search sets the length itself.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.06
    decay: float = 0.3
    clip: float = 1.0
    epochs: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():  # `lr = 1` and `lr = 1.0` are one design with one digest
            if value is not None:
                object.__setattr__(self, name, float(value))


@dataclass(frozen=True, kw_only=True)
class Design:
    """A point of the space: placements and training knobs. Placements on one site act in the order written."""

    placements: tuple[Placement, ...] = ()
    training: Training = Training()

    def json(self) -> dict[str, Any]:
        """Canonical JSON: every knob present, keys sorted, layers resolved to `"all"` or a sorted list."""
        return {
            "placements": [_placement_json(p) for p in self.placements],
            "training": {k: v for k, v in sorted(vars(self.training).items()) if v is not None},
        }

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits that name the design."""
        return hashlib.sha256(json.dumps(self.json(), sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def label(self) -> str:
        """A short name for tables and plots."""
        return " + ".join(p.label for p in self.placements) or "head_only"

    @property
    def solo(self) -> bool:
        """Whether it must train alone on the backbone."""
        return any(p.method.execution == "solo" for p in self.placements)

    def prompt_length(self) -> int:
        """Virtual tokens in the sequence."""
        return sum(p.method.prompt_length() for p in self.placements)

    def position_shift(self) -> int:
        """By how many positions the text moves behind prompts and prefixes."""
        return sum(p.method.position_shift() for p in self.placements)

    def lowest_layer(self, sites: SiteMap) -> int:
        """The lowest adapted layer (-1 below the layers; the number of layers if only the head trains)."""
        adapted = [site.layer for p in self.placements for _, site, _, _ in p.tensors(sites)]
        return min(adapted, default=sites.layers)

    def check(self, sites: SiteMap) -> list[str]:
        """What makes the design impossible on this backbone, one line each."""
        errors = []
        for i, p in enumerate(self.placements):
            at = f"placements[{i}]"
            if p.layers != "all" and (bad := [n for n in p.layers if not 0 <= n < sites.layers]):
                errors.append(f"{at}.layers: {bad} of a backbone with layers 0 to {sites.layers - 1}")
                continue
            for kind in p.sites:
                if kind in sites.refused:
                    errors.append(f"{at}.sites: {kind}: {sites.refused[kind]}")
                elif not any(s.kind == kind for s in sites.sites):
                    errors.append(f'{at}.sites: this {sites.family} has no "{kind}"{nearest(kind, sites.kinds)}')
            reasons = {reason: None for s in p.where(sites) if (reason := p.method.check(s))}
            errors += [f"{at}.{reason}" for reason in list(reasons)[:3]]
        prefixed = [s.path for p in self.placements for s in p.where(sites) if s.kind == "kv"]
        if len(prefixed) > len(set(prefixed)):
            errors.append("placements: two prefixes on one layer; use one of their joint length")
        positions = max(self.prompt_length(), self.position_shift())
        if sites.max_positions and positions > sites.max_positions // 2:
            errors.append(f"prompts and prefixes take {positions} of the backbone's {sites.max_positions} positions")
        return errors

    @classmethod
    def from_json(cls, value: Any, *, where: str = "design") -> Design:
        """A design from what people write. Raises InputError with all that is wrong."""
        errors: list[str] = []
        if not isinstance(value, Mapping):
            raise InputError(where, [f"a design is a table with placements and training, not {value!r}"])
        _unknown(value, ("placements", "training"), "", errors)
        rows = value.get("placements", [])
        if not isinstance(rows, list):
            raise InputError(where, ["placements: a list of tables was expected"])
        placements = [_placement(row, f"placements[{i}]", errors) for i, row in enumerate(rows)]
        training = _training(value.get("training", {}), errors)
        found = tuple(p for p in placements if p is not None)
        lone = [p.method.name for p in found if p.method.alone]
        if lone and len(found) > 1:
            errors.append(f"placements: {lone[0]} stands alone, it cannot be combined")
        if errors:
            raise InputError(where, errors)
        return cls(placements=found, training=training)


def tensor_key(site: Site, name: str, tensor: Tensor) -> str:
    """The name of a tensor within its placement: sites that share it give the same key."""
    if tensor.scope == "placement":
        return name
    if tensor.scope == "layer":
        return f"{site.stack}.{site.layer}/{name}"
    return f"{site.kind}/{site.path}/{name}" if site.path else f"{site.kind}/{name}"


def parse_layers(value: Any) -> Literal["all"] | tuple[int, ...]:
    """`"all"`, `[0, 1, 2]`, `"0-5"` or `"0,2,4-5"`. Raises ValueError."""
    if value == "all":
        return "all"
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, str):
        try:
            parts = [part.split("-") for part in value.replace(" ", "").split(",")]
            numbers = [n for low, *high in parts for n in range(int(low), int(high[0] if high else low) + 1)]
        except ValueError:
            raise ValueError(f'{value!r} is not "all", a list of numbers, or like "0-5"') from None
    elif isinstance(value, (list, tuple)) and all(isinstance(n, int) and not isinstance(n, bool) for n in value):
        numbers = list(value)
    else:
        raise ValueError(f'{value!r} is not "all", a list of numbers, or like "0-5"')
    if not numbers:
        raise ValueError("no layer is named")
    return tuple(sorted(set(numbers)))


def _placement(row: Any, at: str, errors: list[str]) -> Placement | None:
    if not isinstance(row, Mapping) or not isinstance(row.get("method"), str):
        errors.append(f'{at}: a table with a "method" was expected')
        return None
    if row["method"] not in methods():
        errors.append(f'{at}.method: no method "{row["method"]}"{nearest(row["method"], methods())}')
        return None
    kind = methods()[row["method"]]
    before = len(errors)
    defaults = kind().knobs()
    own = {k: v for k, v in row.items() if k not in ("method", "sites", "layers", "mask")}
    _unknown(own, (*defaults, "sites", "layers", "mask"), f"{at}.", errors)
    knobs = {k: _knob(v, defaults[k], f"{at}.{k}", errors) for k, v in own.items() if k in defaults}
    for name, domain in kind.domains().items():
        value = knobs.get(name)
        if isinstance(value, str):  # words are checked here; sizes and rates may lie outside what a search tries
            try:
                domain.param(name, value)
            except ValueError as error:
                errors.append(f"{at}.{name}: {error}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            errors.append(f"{at}.{name}: {value} is not larger than 0")
    sites = row.get("sites", list(kind.default_sites))
    sites = [sites] if isinstance(sites, str) else sites
    if not isinstance(sites, (list, tuple)) or not sites or not all(isinstance(s, str) for s in sites):
        errors.append(f"{at}.sites: a list of names was expected, not {sites!r}")
    else:
        for site in sites:
            if site not in kind.sites:
                errors.append(f'{at}.sites: {kind.name} cannot adapt "{site}"{nearest(site, kind.sites)}')
    layers: Literal["all"] | tuple[int, ...] = "all"
    try:
        layers = parse_layers(row.get("layers", "all"))
    except ValueError as error:
        errors.append(f"{at}.layers: {error}")
    mask = _mask(row["mask"], kind, f"{at}.mask", errors) if row.get("mask") is not None else None
    if len(errors) > before:
        return None
    return Placement(method=kind(**knobs), sites=tuple(dict.fromkeys(sites)), layers=layers, mask=mask)


def _knob(value: Any, default: Any, at: str, errors: list[str]) -> Any:
    """The value in the default's type, or an error."""
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        errors.append(f"{at}: {type(default).__name__} expected, not {value!r}")
        return default
    return value


def _mask(row: Any, kind: type[Method], at: str, errors: list[str]) -> Mask | None:
    if not isinstance(row, Mapping) or "sparsity" not in row:
        errors.append(f'{at}: a table like {{"sparsity": 0.5, "score": "random"}} was expected')
        return None
    _unknown(row, ("sparsity", "score"), f"{at}.", errors)
    sparsity, score = row["sparsity"], row.get("score", "random")
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        errors.append(f"{at}.sparsity: the zeroed fraction, from 0 to below 1, was expected, not {sparsity!r}")
        return None
    if score not in SCORES:
        errors.append(f'{at}.score: no score "{score}"{nearest(str(score), SCORES)}')
        return None
    if kind.size_knob is None:
        errors.append(f"{at}: {kind.name} has no matrix to mask")
        return None
    return Mask(sparsity=float(sparsity), score=score) if sparsity > 0 else None


def _training(row: Any, errors: list[str]) -> Training:
    names = tuple(vars(Training()))
    if not isinstance(row, Mapping):
        errors.append("training: a table was expected")
        return Training()
    _unknown(row, names, "training.", errors)
    values = {}
    for name, value in row.items():
        if name not in names:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or (name == "lr" and not value):
            errors.append(
                f"training.{name}: a number {'above' if name == 'lr' else 'from'} 0 was expected, not {value!r}"
            )
        elif name in ("warmup", "decay") and value > 1:
            errors.append(f"training.{name}: a fraction of the steps was expected, not {value!r}")
        else:
            values[name] = float(value)
    return Training(**values)


def _unknown(row: Mapping[str, Any], known: Iterable[str], at: str, errors: list[str]) -> None:
    errors += [f"{at}{key}: no such key{nearest(key, known)}" for key in row if key not in set(known)]


def _placement_json(p: Placement) -> dict[str, Any]:
    knobs = {k: list(v) if isinstance(v, tuple) else v for k, v in p.method.knobs().items()}
    layers = p.layers if p.layers == "all" else list(p.layers)
    row = {"method": p.method.name, "sites": list(p.sites), "layers": layers, **knobs}
    return row | ({"mask": {"sparsity": p.mask.sparsity, "score": p.mask.score}} if p.mask else {})


def _ranges(layers: Iterable[int]) -> str:
    """0,1,2,5 as `0-2,5`."""
    runs: list[list[int]] = []
    for n in layers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
