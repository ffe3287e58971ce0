"""A lane: one training run, a design with one seed. It owns its parameters, optimiser, schedule and random streams.

Nothing here depends on which other lanes share the step; that is why a packed lane equals the same lane alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from peftscape.spaces.record import Failure

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.head import Head
    from peftscape.spaces.design import Design, Placement
    from peftscape.spaces.methods.base import Tensor as Declared

HEAD = "head"


@dataclass
class Lane:
    """One training run.

    Args:
        design, seed: what is trained, and the seed of its start, masks and data order.
        steps: the length of the whole training; the schedule spans it.
        params: trained tensors by key, `0/q/<path>/A` or `head/<name>`; float32 (float64 on a float64 backbone).
        fixed: declared tensors that do not train.
        masks: of masked tensors; gradients outside are dropped, values there are zero.
    """

    design: Design
    seed: int
    steps: int
    params: dict[str, Tensor]
    fixed: dict[str, Tensor]
    masks: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    name: str = ""
    step: int = 0
    losses: list[float] = field(default_factory=list)
    failure: Failure | None = None
    wall_s: float = 0.0

    @property
    def done(self) -> bool:
        """Whether nothing is left to train."""
        return self.step >= self.steps or self.failure is not None

    def rate(self, step: int | None = None) -> float:
        """The learning rate of a step: rising over the warm-up, constant, falling to zero in the last part."""
        t, training = self.step if step is None else step, self.design.training
        rise, fall = math.ceil(training.warmup * self.steps), math.ceil(training.decay * self.steps)
        return training.lr * min(1.0, (t + 1) / max(rise, 1), (self.steps - t) / max(fall, 1))

    def examples(self, count: int, size: int) -> np.ndarray[Any, Any]:
        """The training examples of the present step: an endless stream of permutations, by the lane's seed alone."""
        first = self.step * count
        wanted = np.arange(first, first + count)
        epochs = range(first // size, (first + count - 1) // size + 1)
        orders = {e: np.random.default_rng((self.seed, e)).permutation(size) for e in epochs}
        return np.array([orders[i // size][i % size] for i in wanted.tolist()])

    def update(self) -> None:
        """Clip the lane's gradient and take an AdamW step; a gradient that is not finite stops the lane instead."""
        for key, mask in self.masks.items():
            grad = self.params[key].grad
            if grad is not None:
                grad.mul_(mask)
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), self.design.training.clip)
        if not bool(torch.isfinite(norm)):
            self.failure = Failure(kind="not finite", message="the gradient is not finite", step=self.step)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            self.optimizer.step()
            self.step += 1
        self.optimizer.zero_grad()

    def adapter(self) -> dict[str, Tensor]:
        """The trained tensors to keep, head included, detached."""
        return {key: value.detach().clone() for key, value in {**self.fixed, **self.params}.items()}


def new_lane(
    design: Design,
    *,
    seed: int,
    steps: int,
    backbone: Backbone,
    head: Head,
    name: str = "",
    masked: bool = True,
) -> Lane:
    """A lane at its start: tensors drawn by its seed, masks by their scores (`snip` ones later, by `masks.snip`)."""
    params: dict[str, Tensor] = {}
    fixed: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    dtype = backbone.master_dtype
    for key, placement, declared in declared_tensors(design, backbone):
        value = draw(declared, generator(seed, key), backbone).to(dtype)
        if masked and placement.mask is not None and placement.maskable(declared):
            score = mask_score(placement.mask.score, declared, generator(seed, f"mask/{key}"), value)
            masks[key] = keep_largest(score, placement.mask.kept(value.numel())).to(dtype)
            value *= masks[key]
            masks[key] = masks[key].to(backbone.device)
        (params if declared.trains else fixed)[key] = value.to(backbone.device)
    for tensor_name, value in head.start(generator(seed, HEAD)).items():
        params[f"{HEAD}/{tensor_name}"] = value.to(dtype).to(backbone.device)
    for value in params.values():
        value.requires_grad_()
    optimizer = torch.optim.AdamW(
        list(params.values()), lr=design.training.lr, weight_decay=design.training.weight_decay, fused=True
    )
    return Lane(design, seed, steps, params, fixed, masks, optimizer, name)


def declared_tensors(design: Design, backbone: Backbone) -> Iterator[tuple[str, Placement, Declared]]:
    """Every tensor of a design: its key in a lane, its placement, its declaration."""
    for i, placement in enumerate(design.placements):
        for key, _, _, declared in placement.tensors(backbone.sites):
            yield f"{i}/{key}", placement, declared


def generator(seed: int, key: str) -> torch.Generator:
    """A random stream of its own for each tensor of each seed."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw(declared: Declared, source: torch.Generator, backbone: Backbone) -> Tensor:
    """The start of a declared tensor, in float32."""
    shape = declared.shape
    if declared.init == "ones":
        return torch.ones(shape)
    if declared.init == "kaiming":
        return torch.empty(shape).uniform_(-1, 1, generator=source) / math.sqrt(shape[-1])
    if declared.init == "normal":
        return torch.empty(shape).normal_(0, 0.02, generator=source)
    if declared.init == "vocabulary":
        table = backbone.embedding.weight
        rows = torch.randint(len(table), (shape[0],), generator=source)
        return table[rows.to(table.device)].float().cpu()
    return torch.zeros(shape)


def mask_score(score: str, declared: Declared, source: torch.Generator, value: Tensor) -> Tensor:
    """What a mask keeps the largest of. A tensor that starts at zero is scored by a random draw of its own."""
    if score == "magnitude" and declared.init != "zeros":
        return value.abs()
    return torch.rand(declared.shape, generator=source)


def keep_largest(score: Tensor, kept: int) -> Tensor:
    """True at the `kept` largest scores."""
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[torch.topk(score.reshape(-1), kept).indices.cpu()] = True
    return mask.view(score.shape)
