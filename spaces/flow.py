"""How far gradients flow down through a frozen backbone: they stop at the lowest adapted site."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from peftscape.spaces.sites import SiteMap

if TYPE_CHECKING:
    from peftscape.spaces.design import Design

#: How attention is computed, which decides what it keeps. `eager`: scores written out, as transformers does. `fused`:
#: one kernel without a mask (arXiv:2205.14135). `masked`: that kernel with a mask of padding, as transformers calls
#: it. `joint`: that kernel on a joint q-k-v tensor, as litgpt calls it. `lanes`: peftscape's own (search/attention.py).
Attention = Literal["eager", "fused", "masked", "joint", "lanes"]

QKV = frozenset("qkv")

#: How far up a layer its adapted kinds lie: gradients need not flow below. Counted along the layer's order.
STAGES = {
    "q": 0, "k": 0, "v": 0, "kv": 0, "attention": 1, "o": 1, "gate": 2, "up": 2, "ffn": 3, "down": 3,
    "block": 4,
}  # fmt: skip


def check_layer(sites: SiteMap, lowest_layer: int) -> None:
    """Raises ValueError for a layer that is not there."""
    if not -1 <= lowest_layer <= sites.layers:
        raise ValueError(f"lowest_layer: {lowest_layer} of a backbone with layers 0 to {sites.layers - 1}")


def kinds_at(design: Design, sites: SiteMap, layer: int) -> set[str]:
    """The kinds that a design adapts in a layer, each by its place in it: a last norm lies where the block ends."""
    here = [s for p in design.placements for s in p.where(sites) if s.layer == layer]
    norms = [s for s in sites.sites if s.kind == "norm" and s.layer == layer]
    ends = sites.norm_place == "post" and layer >= 0
    return {"block" if ends and [s] == norms[-1:] else s.kind for s in here}


def stage_of(sites: SiteMap, kinds: Iterable[str] | None) -> tuple[int, frozenset[str]]:
    """Where in the lowest layer gradients stop, -1 at its input; and which of q, k, v they reach."""
    if kinds is None:
        return -1, frozenset()
    adapted, stages = frozenset(kinds), []
    for kind in adapted:
        if kind in ("bias", "norm"):
            # Pre-norm layers start with a norm; post-norm ones with q, k, v (biases), their first norm
            # follows o.
            stages.append(-1 if sites.norm_place == "pre" else 0 if kind == "bias" else 1)
        else:
            stages.append(STAGES.get(kind, -1))
    reached = adapted & QKV
    # Columns of a fused linear lie in one tensor with the others', prefixes with the keys and with the values.
    fused = reached and any(s.kind == "q" and s.span for s in sites.sites)
    if "kv" in adapted:
        reached |= {"k", "v"}
    return min(stages, default=-1), adapted | (QKV if fused or "bias" in adapted else reached)


def attention_products(adapted: frozenset[str]) -> int:
    """Of the gradients of scores, queries, keys and values, those that the adapted ones of q, k, v need."""
    return bool(adapted & {"q", "k"}) + len(adapted & {"q", "k", "v"})


def is_fused(sites: SiteMap, attention: Attention) -> bool:
    """A model that computes its own attention is eager whatever is asked."""
    return attention in ("fused", "masked", "joint") and sites.attention_interface
