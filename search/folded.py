"""A lane that has the backbone to itself: its changes of whole weights go into the weights before the model runs.

Beside others a lane's change is a product of its own next to the backbone's. Alone it needs one product where that
has two, and three where its gradients have five.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftscape.spaces.methods.weight_change import WeightChange

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.groups import Group, Stage
    from peftscape.search.lane import Lane


def foldable(lanes: Sequence[Lane], stages: Sequence[Stage], backbone: Backbone) -> list[Stage]:
    """The stages whose changes can go into the weights: all or none.

    None where W + D would lose what D is: weights in 4 bits, or in a coarser number format than D's; or where others
    read W too, as DeBERTa's relative positions do.
    """
    if len(lanes) != 1 or len(lanes[0].design.placements) != 1:
        return []
    (placement,) = lanes[0].design.placements
    sites = [stage.site for stage in stages]
    plain = isinstance(placement.method, WeightChange) and not (placement.gate or placement.drop or placement.weighed)
    coarse = backbone.quantised or backbone.dtype != backbone.master_dtype
    elsewhere = any(site.span is not None or site.path in backbone.sites.position_paths for site in sites)
    return list(stages) if plain and not coarse and not elsewhere else []


def folded(model: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    """W + D of each of a lone lane's sites, by the weight's name in the model."""
    found = {}
    for group in groups:
        delta = group.members[0]["delta"]
        weight = model.get_submodule(group.site.path).weight
        assert isinstance(weight, Tensor)
        found[f"{group.site.path}.weight"] = weight + (delta.mT if group.site.transposed else delta)
    return found


def changed_weights(model: nn.Module, delta: Tensor) -> dict[str, Tensor]:
    """Every weight of a model, by name, with its part of a change of them all."""
    # Cut at once: the gradient of a slice is as long as the whole, and there are as many as weights.
    parts = torch.split(delta, [weight.numel() for weight in model.parameters()])
    return {
        name: weight + part.view(weight.shape)
        for (name, weight), part in zip(model.named_parameters(), parts, strict=True)
    }
