"""Designs: which methods sit where, with which sizes, and how they train. JSON in, canonical JSON and a digest out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from peftscape.spaces.compositions import GATE, Mask, Share, composed, dropped_below, shared_values, top, written
from peftscape.spaces.methods.base import Method, Tensor, Tensors
from peftscape.spaces.sites import EVERYWHERE, kind_in
from peftscape.spaces.words import nearest

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Own
    from peftscape.spaces.sites import Site, SiteMap


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A method with its knobs on some layers and sites.

    Args:
        layers: `"all"` or layer numbers from 0. Sites outside the layers (the input, the embeddings' bias) belong to
            `"all"`; the input belongs to every choice.
        mask, share, gate, drop: compositions; `drop` leaves out the lowest n layers, n drawn from 0 to `drop` at each
            training step (robust AdapterDrop, arXiv:2010.11918).
    """

    method: Method
    sites: tuple[str, ...]
    layers: Literal["all"] | tuple[int, ...] = "all"
    mask: Mask | None = None
    share: Share | None = None
    gate: bool = False
    drop: int = 0

    def where(self, sites: SiteMap) -> tuple[Site, ...]:
        """The sites it adapts in this backbone."""
        chosen = range(-1, sites.layers) if self.layers == "all" else self.layers
        here = (s for s in sites.named(self.sites) if s.layer in chosen or s.kind in EVERYWHERE)
        return tuple(s for s in here if self.method.takes(s, sites))

    def maskable(self, tensor: Tensor) -> bool:
        """Whether the placement's mask covers this tensor: matrices are pruned, vectors are kept."""
        return self.mask is not None and tensor.trains and len(tensor.shape) > 1

    def declared(self, sites: SiteMap) -> list[tuple[Site, Tensors]]:
        """What it declares at each site that it adapts, compositions included."""
        places = [(site, self.method.tensors(site)) for site in self.where(sites)]
        shared = self.method.shared(tuple(site for site, _ in places))
        return [
            (site, composed(own | shared, site, share=self.share, gate=self.gate))
            for site, own in places
            if own or shared
        ]

    def tensors(self, sites: SiteMap) -> Iterator[tuple[str, Site, str, Tensor]]:
        """(key, site, name, tensor) for all it declares; shared tensors come once, under their first site."""
        seen = set()
        for site, declared in self.declared(sites):
            for name, tensor in declared.items():
                key = tensor_key(site, name, tensor)
                if key not in seen:
                    seen.add(key)
                    yield key, site, name, tensor

    @property
    def merges(self) -> bool:
        """Whether its change folds into the backbone's weights; a gated one depends on the text."""
        return self.method.merges and not self.gate

    def flops(self, site: Site, tokens: int) -> int:
        """Forward FLOPs at a site: the method's, and the gate's product with what its module reads."""
        return self.method.flops(site, tokens) + (2 * tokens * site.d_in if self.gate else 0)

    def first_flops(self, site: Site, tokens: int) -> int:
        """Of `flops` those of products with what the site reads, the gate's among them."""
        return self.method.first_flops(site, tokens) + (tokens * site.d_in if self.gate else 0)

    def keeps(self, site: Site) -> tuple[str, ...]:
        """Tensors of the site's own that autograd keeps: see `Method.keeps`."""
        own = self.method.keeps(site)
        return (*own, "x") if self.gate and "x" not in own else own

    def saved_floats(self, site: Site, tokens: int) -> int:
        """Numbers that autograd keeps besides those; a gate's, with what it weighs."""
        weighed = 2 * self.method.prefix_length() * site.d_out if site.kind == "kv" else tokens * (site.d_out + 1)
        return self.method.saved_floats(site, tokens) + (tokens + weighed if self.gate else 0)

    @property
    def expands(self) -> bool:
        """Whether sites see other tensors than those declared."""
        return self.share is not None or self.drop > 0 or type(self.method).expand is not Method.expand

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        """What each site sees; see `Method.expand`. With `drop` also `keep`, 0 in the layers left out of this step."""
        lowest = dropped_below(self.drop, source)
        rows = shared_values(own, self.share) if self.share is not None else own
        expanded = [dict(row) for row in self.method.expand(rows, sites, source)]
        for seen, row, site in zip(expanded, own, sites, strict=True):
            if self.gate:
                seen |= {name: row[name] for name in (GATE, f"{GATE}_bias")}
            if self.drop:
                one = next(iter(row.values())).new_ones(1)
                seen["keep"] = one * 0 if 0 <= site.layer < lowest else one
        return expanded

    def finish(self, own: list[Own], sites: tuple[Site, ...]) -> None:
        """Bring the tensors into the form that is kept: scores of shared tensors become the masks they name."""
        if self.share is not None:
            for row in own:
                for name, score in row.items():
                    if name.startswith("score_"):
                        score.copy_(top(score, self.share.count(score.numel())))
        self.method.finish(own, sites)

    @property
    def weighed(self) -> bool:
        """Whether each site's change is multiplied with a strength that its lane says."""
        return False

    @cached_property
    def label(self) -> str:
        """A short name: `lora r8 q,v`, `sequential_adapter m64 ffn 3-5`."""
        size = f" {self.method.letter}{getattr(self.method, self.method.size_knob)}" if self.method.size_knob else ""
        places = "" if self.method.sites == frozenset(self.sites) else " " + ",".join(self.sites)
        layers = "" if self.layers == "all" else " " + _ranges(self.layers)
        mask = f" {self.mask.sparsity:.0%} {self.mask.score}-masked" if self.mask else ""
        share = f" shared {self.share.kept:.0%}" if self.share else ""
        more = share + (" gated" if self.gate else "") + (f" drop {self.drop}" if self.drop else "")
        return f"{self.method.name}{size}{places}{layers}{mask}{more}"


#: What a weighed placement's sites see their strength as, a tensor of one number.
STRENGTH = "strength"


class Weighed(Placement):
    """A placement whose change a search weighs while it looks for places; no design that is kept has one."""

    weighed = True
    expands = True

    def saved_floats(self, site: Site, tokens: int) -> int:
        """Numbers that autograd keeps besides those of `keeps`; with the changes that are weighed."""
        side = self.method.side(site)
        width = (site.d_in if side != "output" else 0) + (site.d_out if side != "input" else 0)
        return super().saved_floats(site, tokens) + tokens * width


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
    def starts_slowly(self) -> bool:
        """Whether it is made of prompts and prefixes alone, which show little in their first steps."""
        methods = [placement.method for placement in self.placements]
        return bool(methods) and all(m.prompt_length() or m.prefix_length() for m in methods)

    @property
    def solo(self) -> bool:
        """Whether it must train alone on the backbone."""
        return any(p.method.execution == "solo" for p in self.placements)

    @property
    def full(self) -> bool:
        """Whether it trains every weight of the backbone."""
        return any("model" in p.sites and p.method.execution == "solo" for p in self.placements)

    @property
    def passes(self) -> int:
        """How often a text goes through the backbone in a training step."""
        return 1 + any(p.method.consistency() > 0 for p in self.placements)

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
            for name in p.sites:
                if (kind := kind_in(name)) in sites.refused:
                    errors.append(f"{at}.sites: {name}: {sites.refused[kind]}")
                elif not sites.named((name,)):
                    errors.append(f'{at}.sites: this {sites.family} has no "{name}"{nearest(name, sites.names)}')
            here = p.where(sites)
            if not here and sites.named(p.sites):
                errors.append(f"{at}.sites: {p.method.name} takes no {' or '.join(p.sites)} of this {sites.family}")
            reasons = {reason: None for s in here if (reason := p.method.check(s))}
            errors += [f"{at}.{reason}" for reason in list(reasons)[:3]]
            if p.mask is not None and here and not reasons and not any(p.maskable(t) for *_, t in p.tensors(sites)):
                errors.append(f"{at}.mask: {p.method.name} trains vectors alone, and has no matrix to mask")
            if p.gate:
                # The gate reads what the module of a site reads, whose width a kv site does not say.
                wide = [s for s in p.where(sites) if s.kind == "kv" and s.d_in != sites.d_model]
                errors += [f"{at}.gate: the queries of this {sites.family} are not as wide as its hidden states"] * (
                    len(wide) > 0
                )
                # A norm of single heads is called with tokens x heads, in which no text is found.
                if any(s.kind == "norm" and s.d_out != sites.d_model for s in here):
                    errors.append(f"{at}.gate: the norms of single heads of this {sites.family} see no text")
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
        from peftscape.spaces.design_file import read_design

        return read_design(value, where)


def tensor_key(site: Site, name: str, tensor: Tensor) -> str:
    """The name of a tensor within its placement: sites that share it give the same key."""
    if tensor.scope == "placement":
        return name
    if tensor.scope == "kind":
        return f"{site.kind}/{name}"
    if tensor.scope == "layer":
        return f"{site.stack}.{site.layer}/{name}"
    return f"{site.kind}/{site.path}/{name}" if site.path else f"{site.kind}/{name}"


def _placement_json(p: Placement) -> dict[str, Any]:
    knobs = {k: list(v) if isinstance(v, tuple) else v for k, v in p.method.knobs().items()}
    layers = p.layers if p.layers == "all" else list(p.layers)
    own = {"config": knobs} if p.method.name.startswith("peft:") else knobs
    row = {"method": p.method.name, "sites": list(p.sites), "layers": layers, **own}
    return row | written(p.mask, p.share, p.gate, p.drop)


def _ranges(layers: Iterable[int]) -> str:
    """0,1,2,5 as `0-2,5`."""
    runs: list[list[int]] = []
    for n in layers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
