"""A super-net: a lane that holds all modules of a space at once, each weighed by a gate that learns (arXiv:2206.07382).

Its steps take turns: the modules' tensors learn on one half of the training data, the gates' alpha on the other half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from peftscape.search.lane import Lane, generator, new_lane, stream
from peftscape.search.s3delta_gates import logits, sample
from peftscape.spaces.design import STRENGTH, Design, Placement, Weighed

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.config import S3DeltaSettings
    from peftscape.search.head import Head
    from peftscape.search.s3delta_space import Modules
    from peftscape.spaces.design import Training

ALPHA = "alpha"


@dataclass(kw_only=True)
class SuperNet(Lane):
    """A lane with all modules of a space, and what each is worth.

    Args:
        budget: expected parameters of what the gates let through.
        sizes: parameters of each module; `gate` numbers them, by placement and layer.
        temperature: of the gates that are drawn.
    """

    budget: int
    sizes: Tensor
    gate: dict[tuple[int, int], int]
    temperature: float

    @property
    def weighing(self) -> bool:
        """Whether the present step is alpha's."""
        return self.step % 2 == 1

    def examples(self, count: int, size: int) -> np.ndarray[Any, Any]:
        """Of the half of the training data that is the present step's; which it is, the seed alone says."""
        order = np.random.default_rng((self.seed, size)).permutation(size)
        half = order[size // 2 :] if self.weighing else order[: size // 2]
        found: np.ndarray[Any, Any] = half[stream(self.seed, self.step // 2 * count, count, len(half))]
        return found

    def probabilities(self) -> Tensor:
        """p of each module."""
        with torch.no_grad():
            return torch.sigmoid(logits(self.params[ALPHA], self.sizes, self.budget))

    def unfold(self, training: bool, again: int = 0) -> None:
        """Give each site its gate: drawn in training, p itself in evaluation."""
        super().unfold(training, again)
        with torch.set_grad_enabled(training and self.weighing):
            values = logits(self.params[ALPHA], self.sizes, self.budget)
            source = generator(self.seed, f"{ALPHA}/step {self.step}, {again}")
            gates = sample(values, self.temperature, source) if training else torch.sigmoid(values)
            gates = gates.to(self.params[ALPHA].dtype)
        for i, (rows, sites) in enumerate(zip(self.seen, self.sites, strict=True)):
            for row, site in zip(rows, sites, strict=True):
                if training and self.weighing:
                    row.update({name: value.detach() for name, value in row.items()})
                row[STRENGTH] = gates[self.gate[i, site.layer]].view(1)

    def gradient_norm(self) -> Tensor:
        """Of what the present half teaches; the others have no gradient, or lose it here (the head)."""
        for key, value in self.params.items():
            if (key == ALPHA) is not self.weighing:
                value.grad = None
        return super().gradient_norm()


def super_net(
    modules: Modules, settings: S3DeltaSettings, training: Training, *, budget: int, seed: int, steps: int,
    backbone: Backbone, head: Head,
) -> SuperNet:  # fmt: skip
    """A super-net at its start: all alpha are 0, so that every module is equally probable."""
    design = super_design(modules, training)
    lane = new_lane(design, seed=seed, steps=steps, backbone=backbone, head=head)
    net = SuperNet(
        **vars(lane),
        budget=budget,
        sizes=torch.tensor([m.size for m in modules.all], dtype=torch.float64, device=backbone.device),
        gate={(m.slot, m.layer): i for i, m in enumerate(modules.all)},
        temperature=settings.temperature,
    )
    alpha = torch.zeros(len(modules.all), dtype=backbone.master_dtype, device=backbone.device).requires_grad_()
    net.params[ALPHA] = alpha
    net.optimizer.add_param_group({"params": [alpha], "multiple": settings.alpha_lr / training.lr, "weight_decay": 0.0})
    return net


def super_design(modules: Modules, training: Training) -> Design:
    """All placements of a space at all layers, weighed."""
    return Design(placements=tuple(map(_weighed, modules.placements)), training=replace(training, weight_decay=0.0))


def _weighed(placement: Placement) -> Weighed:
    return Weighed(method=placement.method, sites=placement.sites, layers=placement.layers)
