"""SNIP masks: what matters to the loss at the start (Lee et al. 2019, arXiv:1810.02340; arXiv:2210.04284)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from peftscape.search.lane import declared_tensors, generator, new_lane
from peftscape.spaces.compositions import top

if TYPE_CHECKING:
    from peftscape.search.cohort import Cohort
    from peftscape.search.lane import Lane


def snip(lane: Lane, cohort: Cohort) -> None:
    """Draw the lane's `snip` masks by |gradient * value| on its first batch, and apply them to its start.

    An up-projection that starts at zero blocks all gradients but its own, so the scoring pass has it drawn at random,
    at the size a down-projection starts with. The pass runs alone: the lane's masks do not depend on neighbours.
    """
    backbone = cohort.backbone
    wanted = {
        key: placement.mask.kept(declared.size)
        for key, placement, declared in declared_tensors(lane.design, backbone)
        if placement.mask is not None and placement.mask.score == "snip" and placement.maskable(declared)
    }
    if not wanted:
        return
    probe = new_lane(lane.design, seed=lane.seed, steps=lane.steps, backbone=backbone, head=cohort.head)
    with torch.no_grad():
        for key in wanted:
            value = probe.params[key]
            noise = torch.empty(value.shape).uniform_(-1, 1, generator=generator(lane.seed, f"snip/{key}"))
            value.copy_(noise / np.sqrt(value.shape[-1]))
    others = list(cohort.lanes)
    cohort.retire(*others)
    cohort.admit(probe)
    try:
        examples = probe.examples(cohort.batch_size, len(cohort.train.ids))
        losses = cohort.losses([examples])
        losses.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        cohort.retire(probe)
        cohort.admit(*others)
    fresh = new_lane(lane.design, seed=lane.seed, steps=lane.steps, backbone=backbone, head=cohort.head, masked=False)
    with torch.no_grad():
        for key, kept in wanted.items():
            grad, value = probe.params[key].grad, probe.params[key]
            assert grad is not None
            lane.masks[key] = top((grad * value).abs(), kept).to(value)
            lane.params[key].copy_(fresh.params[key] * lane.masks[key])
