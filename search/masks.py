"""Masks drawn at the start by what a method's tensors mean to the loss or to the flow (arXiv:2210.04284).

A mask keeps its share of each tensor. SNIP (Lee et al. 2019, arXiv:1810.02340), GraSP (Wang et al. 2020,
arXiv:2002.07376) and SynFlow (Tanaka et al. 2020, arXiv:2006.05467) stand here; random and magnitude need no pass and
are drawn with the lane.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from peftscape.search.groups import Group, stages
from peftscape.search.lane import declared_tensors, generator, new_lane
from peftscape.spaces.compositions import top
from peftscape.spaces.ops.choose import without_kernels
from peftscape.spaces.text import Text

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.cohort import Cohort
    from peftscape.search.lane import Lane
    from peftscape.search.losses import Examples

#: Rounds in which SynFlow prunes, exponentially, as its authors do.
ROUNDS = 100


def draw_masks(lane: Lane, cohort: Cohort) -> None:
    """Draw the lane's masks that are scored by a pass, on its first batch, and apply them to its start.

    An up-projection that starts at zero blocks all gradients but its own, so the scoring pass has it drawn at random,
    at the size a down-projection starts with. The pass runs alone: the lane's masks do not depend on neighbours.
    """
    backbone = cohort.backbone
    wanted: dict[str, dict[str, int]] = {"snip": {}, "grasp": {}, "synflow": {}}
    for key, placement, declared in declared_tensors(lane.design, backbone):
        if placement.mask is not None and placement.mask.score in wanted and placement.maskable(declared):
            wanted[placement.mask.score][key] = placement.mask.kept(declared.size)
    if not any(wanted.values()):
        return
    probe = new_lane(lane.design, seed=lane.seed, steps=lane.steps, backbone=backbone, head=cohort.head)
    with torch.no_grad():
        for key in (key for kept in wanted.values() for key in kept):
            value = probe.params[key]
            noise = torch.empty(value.shape).uniform_(-1, 1, generator=generator(lane.seed, f"snip/{key}"))
            value.copy_(noise / np.sqrt(value.shape[-1]))
    masks: dict[str, Tensor] = {}
    if wanted["snip"] or wanted["grasp"]:
        others = list(cohort.lanes)
        cohort.retire(*others)
        cohort.admit(probe)
        try:
            rows = [probe.examples(cohort.batch_size, len(cohort.train.ids))]
            # GraSP's Hessian takes second derivatives, which fused operations have not.
            with without_kernels(), sdpa_kernel(SDPBackend.MATH):
                masks |= _snip(probe, cohort, rows, wanted["snip"]) | _grasp(probe, cohort, rows, wanted["grasp"])
        finally:
            cohort.retire(probe)
            cohort.admit(*others)
    masks |= _synflow(probe, backbone, wanted["synflow"])
    fresh = new_lane(lane.design, seed=lane.seed, steps=lane.steps, backbone=backbone, head=cohort.head, masked=False)
    with torch.no_grad():
        for key, mask in masks.items():
            lane.masks[key] = mask.to(lane.params[key])
            lane.params[key].copy_(fresh.params[key] * lane.masks[key])


def _snip(lane: Lane, cohort: Cohort, rows: Sequence[Examples], kept: dict[str, int]) -> dict[str, Tensor]:
    """The largest |gradient * value|: how much the loss changes when a connection goes (arXiv:1810.02340, eq. 4)."""
    values = [lane.params[key] for key in kept]
    if not values:
        return {}
    gradients = _summed(torch.autograd.grad(loss, values) for loss in cohort.parts(rows))
    scores = [(g * v.detach()).abs() for g, v in zip(gradients, values, strict=True)]
    return {key: top(score, count) for (key, count), score in zip(kept.items(), scores, strict=True)}


def _grasp(lane: Lane, cohort: Cohort, rows: Sequence[Examples], kept: dict[str, int]) -> dict[str, Tensor]:
    """The lowest -value * (H g), whose removal would cost gradient norm (arXiv:2002.07376, eq. 8).

    H is the loss's Hessian, g its gradient, in all the tensors that are scored. Those go whose removal costs the least.
    """
    values = [lane.params[key] for key in kept]
    if not values:
        return {}

    def product(loss: Tensor) -> tuple[Tensor, ...]:
        own = torch.autograd.grad(loss, values, create_graph=True)
        return torch.autograd.grad(torch.stack([(w * g).sum() for w, g in zip(whole, own, strict=True)]).sum(), values)

    whole = _summed(torch.autograd.grad(loss, values) for loss in cohort.parts(rows))
    products = _summed(product(loss) for loss in cohort.parts(rows))
    scores = [v.detach() * hg for v, hg in zip(values, products, strict=True)]
    return {key: top(score, count) for (key, count), score in zip(kept.items(), scores, strict=True)}


def _summed(parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The sums of tensors that come in parts, of which one is there at a time."""
    total: list[Tensor] = []
    for part in parts:
        total = [t + p for t, p in zip(total, part, strict=True)] if total else list(part)
    return total


def _synflow(lane: Lane, backbone: Backbone, kept: dict[str, int]) -> dict[str, Tensor]:
    """The largest |w| dR/d|w|, R what flows through the methods where ones flow in (arXiv:2006.05467, sec. 5).

    All tensors are taken by their absolute values and no data is read. The share kept falls exponentially over
    `ROUNDS` rounds, each scored with what the round before has left.
    """
    if not kept:
        return {}
    with torch.no_grad():
        for value in lane.params.values():
            value.abs_()
    size = {key: lane.params[key].numel() for key in kept}
    masks = {key: torch.ones_like(lane.params[key], dtype=torch.bool) for key in kept}
    values = [lane.params[key] for key in kept]
    for turn in range(1, ROUNDS + 1):
        gradients = torch.autograd.grad(_flow(lane, backbone), values)
        for key, value, gradient in zip(kept, values, gradients, strict=True):
            score = torch.where(masks[key], gradient * value.detach(), -1.0)
            left = max(kept[key], round(size[key] * (kept[key] / size[key]) ** (turn / ROUNDS)))
            masks[key] = top(score, left)
            value.detach().mul_(masks[key])
    return masks


def _flow(lane: Lane, backbone: Backbone) -> Tensor:
    """The sum of what the lane's methods give at all sites where ones come in."""
    lane.unfold(training=False)
    groups = [group for stage in stages([lane], backbone) for group in stage.groups]
    return torch.stack([_through(group, backbone) for group in groups]).sum()


def _through(group: Group, backbone: Backbone) -> Tensor:
    # A frozen norm would undo the flow; a text of one token is enough for it.
    none = torch.zeros(1, 1, dtype=torch.long, device=backbone.device)
    text = Text(row=none, place=none, length=none + 1, texts=1)
    p = group.values(backbone.dtype).given({"text": text}, without=("norm", "normalise"))
    site, method = group.site, group.method
    if site.kind == "kv":
        return torch.cat([own.abs().flatten() for part in method.prefix(p) for own in part]).sum().float()
    if site.kind == "input":
        return method.virtual_tokens(p).abs().sum().float()
    if site.kind == "ladder":
        ones = torch.ones(1, 1, site.d_in, dtype=backbone.dtype, device=backbone.device)
        return method.ladder(p, [ones] * len(method.rungs(site)), causal=False).sum().float()
    x, y = (torch.ones(1, 1, width, dtype=backbone.dtype, device=backbone.device) for width in (site.d_in, site.d_out))
    side = method.side(site)
    given = [method.apply(p, x, y)] if side != "input" else []
    given += [method.apply_input(p, x)] if side != "output" else []
    return torch.cat([part.flatten() for part in given]).sum().float()
