"""Lanes whose changes are folded into weights, and what plain models with those weights give."""

from __future__ import annotations

import functools
from typing import Any

import torch
from contract import HEAD_ONLY, backbone, cohort, lane, logits, move, split
from plain import plain_model
from torch import Tensor

from peftscape.search.backbone import Backbone
from peftscape.search.lane import Lane
from peftscape.search.merge import merged_weights
from peftscape.search.prepare import prepare
from peftscape.spaces.design import Design

#: The tensors of methods that shift what a site gives, which a module without a bias cannot hold.
SHIFTS = {"ssf": "shift", "hadamard_adapter": "b"}


def frozen(family: str) -> Backbone:
    """The very model that the suite's cohorts run on."""
    return backbone(family, "float64")


def anywhere(design: Design, family: str) -> Lane:
    """A lane whose tensors, those that do not train but are kept among them, are far from their start."""
    own = lane(design, 3, family)
    prepare(own, cohort(family))
    move([own])
    source = torch.Generator().manual_seed(6)
    for key, value in own.fixed.items():
        if value.is_floating_point() and key not in own.passing:
            value.add_(torch.empty_like(value).normal_(0, 0.2, generator=source))
    return own


def homeless_shifts(own: Lane, family: str) -> list[Tensor]:
    """What shifts the output of a module that has no bias."""
    name = SHIFTS.get(own.design.placements[0].method.name)
    return [
        row[name]
        for site, row in zip(own.sites[0], own.own[0], strict=True)
        if name and getattr(frozen(family).model.get_submodule(site.path), "bias", None) is None
    ]


def with_head(own: Lane, family: str) -> Lane:
    """A lane that adapts nothing, with the head of another."""
    bare = lane(HEAD_ONLY, 3, family)
    for key, value in bare.params.items():
        value.data.copy_(own.params[key])
    return bare


@functools.cache
def _plain(family: str) -> Any:
    return plain_model(family)


def by_transformers(own: Lane, family: str) -> Tensor:
    """What transformers' own classifier gives for the texts of `contract.logits`, padded, the lane in its weights."""
    model = _plain(family)
    model.base_model.load_state_dict({**frozen(family).model.state_dict(), **merged_weights(own, frozen(family))})
    for key, value in own.params.items():
        if key.startswith("head/"):
            model.get_parameter(key.removeprefix("head/")).data.copy_(value)
    ids = [torch.from_numpy(row) for row in split().ids[:12]]
    mask = [torch.ones(len(row), dtype=torch.long) for row in ids]
    padded = [torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (ids, mask)]
    with torch.no_grad():
        out: Tensor = model(input_ids=padded[0], attention_mask=padded[1]).logits
    return out


def by_weights(own: Lane, family: str) -> Tensor:
    """What the backbone gives for them with the lane in its weights, and no hooks."""
    model = frozen(family).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changed = merged_weights(own, frozen(family))
    assert set(changed) <= set(before)
    try:
        model.load_state_dict({**before, **changed})
        return logits(with_head(own, family), family)
    finally:
        model.load_state_dict(before)


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())
