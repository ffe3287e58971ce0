"""HF peft's form of a design, so that an adapter of ours is one of peft's.

Configuration and tensors are written directly, without peft, from what each method says of itself (`Method.in_peft`);
those of `peft:NAME` by peft itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from peftscape.search.adapter_folder import Card
from peftscape.search.peft_folder import Change, InexpressibleError, PeftFolder
from peftscape.search.peft_own import apart, with_own
from peftscape.search.peft_place import place
from peftscape.search.peft_tuner import TunerFolder
from peftscape.search.peft_virtual import refusal
from peftscape.spaces.design import tensor_key
from peftscape.spaces.heads import layer_name
from peftscape.spaces.hf_peft import HFPeft

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.head import Head
    from peftscape.spaces.design import Design
    from peftscape.spaces.sites import Site

__all__ = ["InexpressibleError", "changes_of", "peft_form"]


def peft_form(card: Card, backbone: Backbone, head: Head) -> PeftFolder | TunerFolder:
    """How HF peft expresses an adapter, so that its sequence classifier or language model gives equal logits.

    Raises:
        InexpressibleError: with the reason.
    """
    names = sorted({p.method.name for p in card.design.placements})
    named = layer_name(backbone.sites) if card.head == "token" else backbone.sites.head
    if card.head == "mean" or (card.head != "lm" and named is None):
        raise InexpressibleError(f'head = "{card.head}" is no head of transformers, which HF peft builds on')
    if len(card.design.placements) == 1 and isinstance(lone := card.design.placements[0].method, HFPeft):
        where = card.design.placements[0].where(backbone.sites)
        return TunerFolder(lone, where, backbone, head, int(card.task.get("seed", 0)))
    found = list(changes_of(card.design, backbone))
    if not found:
        raise InexpressibleError("HF peft has no adapter that trains a head alone")
    if len({c.form.kind for c in found}) > 1:
        raise InexpressibleError(f"HF peft cannot combine {' and '.join(names)} in one adapter")
    changes, own = apart(found)
    if changes[0].form.virtual and (why := refusal(card, backbone, [c.site for c in changes], changes[0].form.kind)):
        raise InexpressibleError(why)
    return with_own(place(changes, backbone, head), own, backbone, head)


def changes_of(design: Design, backbone: Backbone) -> Iterator[Change]:
    """All that the design changes, in the order in which it acts. Raises InexpressibleError."""
    reasons: dict[str, None] = {}
    for i, placement in enumerate(design.placements):
        if placement.share or placement.gate:
            raise InexpressibleError("HF peft knows neither gates nor tensors that sites share")
        for site, declared in placement.declared(backbone.sites):
            if site.path in backbone.sites.position_paths:
                raise InexpressibleError(f"HF peft changes what {site.path} makes of relative positions, lanes do not")
            form = placement.method.in_peft(site)
            if isinstance(form, str):
                reasons[form] = None
                continue
            keys = {name: f"{i}/{tensor_key(site, name, t)}" for name, t in declared.items() if t.stored}
            seen = placement.method.needs_weight or form.own
            yield Change(site, form, keys, _frozen(site, backbone) if seen else {})
    if len(names := {p.method.name for p in design.placements}) > 1 and reasons:
        raise InexpressibleError(f"HF peft cannot combine {' and '.join(sorted(names))} in one adapter")
    if reasons:
        raise InexpressibleError(next(iter(reasons)))


def _frozen(site: Site, backbone: Backbone) -> dict[str, Tensor]:
    """The site's own weights, as a lane holds them."""
    frozen = {name: value for name, value in backbone.frozen(site).items() if isinstance(value, Tensor)}
    return {name: value.to(backbone.master_dtype).cpu() for name, value in frozen.items()}
