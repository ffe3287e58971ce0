"""What a design's training keeps for its backward: the backbone's share and what each method declares.

kept = backbone(lowest adapted site) + sum over placements of (inputs or outputs they read + numbers of their own)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftscape.spaces.activations import activation_bytes
from peftscape.spaces.cost import QUANTISED
from peftscape.spaces.flow import Attention, is_fused, kinds_at
from peftscape.spaces.profiles import WIDTH, Profile
from peftscape.spaces.two_stacks import Walk, is_two_stacks, tokens_at

if TYPE_CHECKING:
    from peftscape.spaces.design import Design
    from peftscape.spaces.methods.base import Method
    from peftscape.spaces.sites import Site, SiteMap

#: Kinds whose methods read the same tensor: the input of q, k and v, and that of gate and up. An attention computed
#: by a fused kernel keeps its output anyway, which is what `o` reads.
READS = {"q": "in", "k": "in", "v": "in", "attention": "in", "gate": "mid", "up": "mid", "ffn": "mid"}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes kept from the forward for the backward.

    Args:
        backbone: of the frozen backbone.
        adapters: what methods read and make.
        copies: trained values once more, in the precision of the computation.
        held: not for the backward, but alive beside it: a cache of keys and values, weights that were made anew.
        states: of `adapters` those of the backbone that a ladder reads, none of which has a gradient.
    """

    backbone: int
    adapters: int
    copies: int = 0
    held: int = 0
    states: int = 0

    @property
    def total(self) -> int:
        return self.backbone + self.adapters + self.copies + self.held

    def beyond(self, working: int) -> int:
        """Of the bytes of a layer's widest step those that come on top; beside a ladder the layers went before."""
        return max(0, self.states + working - self.total) if self.states else working


def kept(
    design: Design,
    sites: SiteMap,
    profile: Profile,
    *,
    tokens: int,
    batch: int,
    dtype: str,
    compute: str | None = None,
    attention: Attention | None = None,
    checkpointing: bool = False,
    dropout: float | None = None,
    target: int | None = None,
) -> Kept:
    """Bytes kept by one training step of a design alone.

    Args:
        tokens: of each text, its padding included, virtual tokens not; of an encoder-decoder's source.
        target: of an encoder-decoder's target; None for as many.
        dtype: of the backbone.
        compute: precision of the computation with quantised weights; None for bfloat16.
        attention: None for the profile's own.
        checkpointing: each layer's input alone is kept, and one layer is run again at a time (arXiv:1604.06174).
        dropout: of the adapters; None for the profile's own.
    """
    attention = attention or profile.attention
    length, width = tokens + design.prompt_length(), WIDTH[compute or dtype]
    lowest = design.lowest_layer(sites)
    if is_two_stacks(sites):
        return _of_two_stacks(
            design, sites, profile, source=length, target=target or tokens, batch=batch, dtype=dtype, width=width,
            attention=attention, checkpointing=checkpointing, dropout=profile.dropout if dropout is None else dropout,
        )  # fmt: skip
    at_lowest = kinds_at(design, sites, lowest)
    backbone = activation_bytes(
        sites, length, batch, lowest, width, kinds=at_lowest or None, full=design.full, attention=attention
    )
    if not design.full and profile.quantised_inputs and dtype in QUANTISED and lowest < sites.layers:
        backbone += batch * length * width * (sites.layers - max(lowest, 0)) * _linear_inputs(sites, attention)
    adapters = _adapters(
        design, sites, profile, at=lambda _: length,
        has_kept=lambda site: site.kind == "o" and is_fused(sites, attention), batch=batch, width=width,
        dtype=dtype, attention=attention, dropout=profile.dropout if dropout is None else dropout,
    )  # fmt: skip
    copies = width * _copied(design, sites, profile, lowest)
    held = _whole(design, sites, profile, width) - copies if design.full and profile.whole_copies else 0
    if checkpointing and lowest < sites.layers:
        first = -1 if profile.checkpoints_from_input or design.full else lowest
        layers = sites.layers - max(first, 0)
        # The inputs of all layers, and all that the one layer keeps which is being run again.
        inputs = layers * batch * length * sites.d_model * width
        spread = max(1, sites.layers - max(lowest, 0))
        backbone, adapters = inputs + backbone // spread, adapters // spread
    if profile.cache and sites.causal and not checkpointing:
        prefix = sum(p.method.prefix_length() for p in design.placements)
        held += sites.layers * batch * (length + prefix) * 2 * sites.d_kv * width
    ladders = [(p.method, site) for p in design.placements for site in p.where(sites) if site.kind == "ladder"]
    states = sum(batch * length * site.d_in * width * len(method.rungs(site)) for method, site in ladders)
    passes = design.passes
    return Kept(
        backbone=passes * backbone, adapters=passes * adapters, copies=passes * copies, held=held, states=states
    )  # fmt: skip


def _whole(design: Design, sites: SiteMap, profile: Profile, width: int) -> int:
    """Bytes of the whole weights made anew; a change in the computation's precision need not be cast."""
    return (profile.whole_copies - (width == 4)) * sites.parameters * width


def _adapters(
    design: Design, sites: SiteMap, profile: Profile, *, at: Callable[[Site], int], has_kept: Callable[[Site], bool],
    batch: int, width: int, dtype: str, attention: Attention, dropout: float,
) -> int:  # fmt: skip
    """Bytes that methods keep. A tensor of the backbone's is counted once for each tensor there is.

    Args:
        at: how many tokens a site sees.
        has_kept: whether the backbone keeps what a site reads anyway.
    """
    own = max(width, profile.trained_width(dtype, full=False)) if profile.casts_inputs else width
    total = 0
    seen: set[tuple[object, ...]] = set()
    fused_width = _fused_widths(sites)
    for placement in design.placements:
        for site in placement.where(sites):
            method, length = placement.method, at(site)
            total += batch * placement.saved_floats(site, length) * own
            total += batch * _prefix_bytes(method, site, sites, length, width, attention)
            for which in placement.keeps(site):
                if (
                    which == "y"
                ):  # each change of a site's output makes a new tensor, of all of a fused linear's columns
                    total += batch * length * fused_width.get((site.layer, site.path), site.d_out) * width
                    continue
                dropped = dropout > 0 and method.size_knob == "rank"
                alone = (profile.casts_inputs and own > width) or (dropped and not profile.shared_dropout)
                key = (site.layer, site.path, site.kind, method.name) if alone else _what_it_reads(site)
                if key in seen:
                    continue
                seen.add(key)
                if has_kept(site) and not dropped and not alone:
                    continue
                total += batch * length * site.d_in * (own + dropped)
    return total


def _what_it_reads(site: Site) -> tuple[object, ...]:
    """The tensor that a site reads: q, k and v read one, gate and up one, all of cross-attention the encoder's."""
    if site.stack == "cross" and site.kind in ("k", "v"):
        return ("encoder",)
    return (site.layer, site.stack, READS[site.kind]) if site.kind in READS else (site.layer, site.path)


def _of_two_stacks(
    design: Design, sites: SiteMap, profile: Profile, *, source: int, target: int, batch: int, dtype: str, width: int,
    attention: Attention, checkpointing: bool, dropout: float,
) -> Kept:  # fmt: skip
    """`kept` of an encoder-decoder."""
    walk = Walk(
        design, sites, source, target, width, fused=attention not in ("eager", "lanes"),
        cache=profile.cache and not checkpointing,
    )  # fmt: skip
    adapters = _adapters(
        design, sites, profile, at=lambda site: tokens_at(site, source, target), has_kept=walk.has_kept,
        batch=batch, width=width, dtype=dtype, attention=attention, dropout=dropout,
    )  # fmt: skip
    backbone = batch * walk.kept + walk.once
    if checkpointing and backbone:
        inputs = batch * sites.d_model * width * sum(
            tokens_at(s, source, target) for s in sites.sites if s.kind == "up"
        )  # fmt: skip
        backbone, adapters = inputs + backbone // sites.layers, adapters // sites.layers
    copies = width * _copied(design, sites, profile, 0)
    held = batch * walk.held
    held += _whole(design, sites, profile, width) - copies if design.full and profile.whole_copies else 0
    passes = design.passes
    return Kept(backbone=passes * backbone, adapters=passes * adapters, copies=passes * copies, held=held)


def _prefix_bytes(method: Method, site: Site, sites: SiteMap, length: int, width: int, attention: Attention) -> int:
    """A prefix makes the kept keys, values and scores longer."""
    longer = method.prefix_length()
    if not longer:
        return 0
    keys = site.d_in if attention in ("lanes", "masked", "joint", "eager") else site.d_out
    kept = 2 * longer * keys * width
    if attention == "lanes":
        return kept + sites.heads * length * longer * width
    upcast = 4 if sites.norm_kind == "rmsnorm" and width < 4 else 0
    scores = width if is_fused(sites, attention) else sites.heads * (width + upcast)  # fused: the mask alone
    return kept + length * longer * scores


def _fused_widths(sites: SiteMap) -> dict[tuple[int, str], int]:
    widths: dict[tuple[int, str], int] = {}
    for site in sites.sites:
        if site.span is not None:
            widths[site.layer, site.path] = widths.get((site.layer, site.path), 0) + site.d_out
    return widths


def _linear_inputs(sites: SiteMap, attention: Attention) -> int:
    """Numbers a token that the linears of a layer read: q-k-v, o (kept anyway by a fused kernel), gate and up, down."""
    out = 0 if is_fused(sites, attention) else sites.heads * sites.head_dim
    return 2 * sites.d_model + out + sites.d_ff


def _copied(design: Design, sites: SiteMap, profile: Profile, lowest: int) -> int:
    """Values that are kept in the precision of the computation besides their own."""
    if design.full:
        return (sites.layers * sites.layer_products + sites.outer_products) if profile.whole_copies else 0
    if not profile.copies:
        return 0
    return sum(
        tensor.size
        for p in design.placements
        for _, site, _, tensor in p.tensors(sites)
        if len(tensor.shape) > 1 and tensor.deployed and site.kind not in ("kv", "input") and site.layer >= lowest
    )
