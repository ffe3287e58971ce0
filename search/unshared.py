"""Designs whose sites share tensors, written out: each site with tensors of its own, as other tools keep them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from peftscape.spaces.compositions import shared_values
from peftscape.spaces.design import Design, Placement, tensor_key

if TYPE_CHECKING:
    from peftscape.spaces.sites import SiteMap


def unshared(design: Design, tensors: Mapping[str, Tensor], sites: SiteMap) -> tuple[Design, dict[str, Tensor]]:
    """The design without sharing, and the tensors with which it is the same map: prototypes under each site's mask."""
    plain = dataclasses.replace(
        design, placements=tuple(dataclasses.replace(placement, share=None) for placement in design.placements)
    )
    found = dict(tensors)
    for i, (before, after) in enumerate(zip(design.placements, plain.placements, strict=True)):
        if before.share is None:
            continue
        keys = _keys(i, before, sites)
        held = [{name: tensors[key] for name, key in row.items()} for row in keys]
        for key in {key for row in keys for key in row.values()}:
            del found[key]
        for row, values in zip(_keys(i, after, sites), shared_values(held, before.share), strict=True):
            found |= {key: values[name].detach().clone() for name, key in row.items()}
    return plain, found


def _keys(i: int, placement: Placement, sites: SiteMap) -> list[dict[str, str]]:
    """The keys of a placement's stored tensors, by name at each site."""
    return [
        {name: f"{i}/{tensor_key(site, name, t)}" for name, t in declared.items() if t.stored}
        for site, declared in placement.declared(sites)
    ]
