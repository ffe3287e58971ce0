"""A lane: one training run, a design with one seed. It owns its parameters, optimiser, schedule and random streams.

Nothing here depends on which other lanes share the step; that is why a packed lane equals the same lane alone.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from peftscape.spaces.compositions import top
from peftscape.spaces.design import tensor_key
from peftscape.spaces.hf_peft import HFPeft, inject, set_training
from peftscape.spaces.methods.base import Tensor as Declared
from peftscape.spaces.record import Failure

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.head import Head
    from peftscape.spaces.design import Design, Placement
    from peftscape.spaces.methods.base import Own, Tensors
    from peftscape.spaces.sites import Site

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
        model: the backbone with another library's tuner in it; None where lanes share the backbone itself.
        passing: names of fixed tensors that no file keeps.
        sites, own, seen: for each placement its sites; at each what the lane holds by name (one tensor under several
            names or sites where it is shared); and what the site sees of it, which `unfold` makes.
        score: on the validation data, once the lane is done; saved with it.
        kernels: of `spaces/ops`, those that it ran on; none where plain torch ran.
        taken: steps that the optimiser's moments have seen, where they are counted without asking the device.
    """

    design: Design
    seed: int
    steps: int
    params: dict[str, Tensor]
    fixed: dict[str, Tensor]
    masks: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    sites: list[tuple[Site, ...]]
    own: list[list[Own]]
    seen: list[list[Own]]
    model: nn.Module | None = None
    passing: set[str] = field(default_factory=set)
    name: str = ""
    step: int = 0
    losses: list[float] = field(default_factory=list)
    failure: Failure | None = None
    wall_s: float = 0.0
    score: float | None = None
    kernels: set[str] = field(default_factory=set)
    taken: int | None = None

    @property
    def done(self) -> bool:
        """Whether nothing is left to train."""
        return self.step >= self.steps or self.failure is not None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, trained and fixed."""
        return {**self.params, **self.fixed}

    def rate(self, step: int | None = None) -> float:
        """The learning rate of a step: rising over the warm-up, constant, falling to zero in the last part."""
        t, training = self.step if step is None else step, self.design.training
        rise, fall = math.ceil(training.warmup * self.steps), math.ceil(training.decay * self.steps)
        return training.lr * min(1.0, (t + 1) / max(rise, 1), (self.steps - t) / max(fall, 1))

    def examples(self, count: int, size: int) -> np.ndarray[Any, Any]:
        """The training examples of the present step: an endless stream of permutations, by the lane's seed alone."""
        return stream(self.seed, self.step * count, count, size)

    def update(self) -> None:
        """Clip the lane's gradient and take an AdamW step; a gradient that is not finite stops the lane instead."""
        norm = self.gradient_norm()
        self.move(norm, finite=bool(torch.isfinite(norm)))

    def gradient_norm(self) -> Tensor:
        """The norm of the lane's gradient, from which goes what its masks hide."""
        for key, mask in self.masks.items():
            grad = self.params[key].grad
            if grad is not None:
                grad.mul_(mask)
        return torch.nn.utils.get_total_norm([p.grad for p in self.params.values() if p.grad is not None])

    def move(self, norm: Tensor, *, finite: bool) -> None:
        """Take the step of `update` with a gradient of this norm."""
        if not finite:
            self.failure = Failure(kind="not finite", message="the gradient is not finite", step=self.step)
        else:
            torch.nn.utils.clip_grads_with_norm_(self.params.values(), self.design.training.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate() * group["multiple"]
            self.optimizer.step()
            self.taken = None
            self.advance()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def advance(self) -> None:
        """Count a step that the tensors have taken, and let the methods do what follows it."""
        self.step += 1
        for placement, own, sites in zip(self.design.placements, self.own, self.sites, strict=True):
            if placement.method.after_step(own, self.step, self.steps):
                self.optimizer.state.clear()
            if self.step == self.steps:
                placement.finish(own, sites)

    def unfold(self, training: bool, again: int = 0) -> None:
        """Make what the sites see of this step's tensors; `again` draws anew."""
        if self.model is not None:
            set_training(self.model, training)
            if training:  # peft's layers draw of the process's own stream
                torch.manual_seed(generator(self.seed, f"step {self.step}, {again}").initial_seed())
        for i, (placement, own, sites) in enumerate(zip(self.design.placements, self.own, self.sites, strict=True)):
            if not placement.expands:
                continue
            source = generator(self.seed, f"{i}/step {self.step}, {again}") if training else None
            for seen, row in zip(self.seen[i], placement.expand(own, sites, source), strict=True):
                seen.clear()
                seen.update(row)

    def penalty(self) -> Tensor | None:
        """What the methods add to the loss, if anything."""
        found = [p.method.penalty(own) for p, own in zip(self.design.placements, self.own, strict=True)]
        terms = [term for term in found if term is not None]
        return torch.stack(terms).sum() if terms else None

    @property
    def consistency(self) -> float:
        """The weight of the divergence between two passes; 0 for one pass."""
        return sum(p.method.consistency() for p in self.design.placements)

    def adapter(self) -> dict[str, Tensor]:
        """The tensors to keep, head included, detached."""
        return {key: value.detach().clone() for key, value in self.tensors.items() if key not in self.passing}


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
    """A lane at its start: tensors drawn by its seed, masks by their scores (those from data later, by `prepare`)."""
    lane = Lane(design, seed, steps, {}, {}, {}, None, [], [], [], name=name)  # type: ignore[arg-type]
    rates: dict[float, list[Tensor]] = {1.0: []}
    for i, placement in enumerate(design.placements):
        made = placement.declared(backbone.sites)
        if isinstance(placement.method, HFPeft):
            adopt(lane, i, placement.method, tuple(site for site, _ in made), backbone, rates)
            made = []
        lane.sites.append(tuple(site for site, _ in made))
        lane.own.append([_hold(lane, i, placement, site, d, backbone, masked, rates) for site, d in made])
        lane.seen.append([{} for _ in made] if placement.expands else lane.own[-1])
    for tensor_name, value in head.start(generator(seed, HEAD)).items():
        lane.params[f"{HEAD}/{tensor_name}"] = value.to(backbone.master_dtype).to(backbone.device).requires_grad_()
        rates[1.0].append(lane.params[f"{HEAD}/{tensor_name}"])
    if not lane.params:  # nothing trains behind a language model's own head, and AdamW wants something
        rates[1.0].append(torch.zeros(1, requires_grad=True))
    lane.optimizer = torch.optim.AdamW(
        [{"params": tensors, "multiple": rate} for rate, tensors in rates.items() if tensors],
        lr=design.training.lr, weight_decay=design.training.weight_decay, fused=True,
    )  # fmt: skip
    return lane


def _hold(
    lane: Lane, number: int, placement: Placement, site: Site, declared: Tensors, backbone: Backbone, masked: bool,
    rates: dict[float, list[Tensor]],
) -> Own:  # fmt: skip
    """The tensors of one site, made unless another site that shares them has made them."""
    keys = {name: f"{number}/{tensor_key(site, name, tensor)}" for name, tensor in declared.items()}
    held = lane.tensors
    frozen = backbone.frozen(site) if placement.method.needs_weight else {}
    own_start: Own = {}
    if any(d.init == "own" and keys[name] not in held for name, d in declared.items()):
        source = generator(lane.seed, f"{number}/{tensor_key(site, 'start', Declared(()))}")
        wide = {n: v.to(backbone.master_dtype) if isinstance(v, Tensor) else v for n, v in frozen.items()}
        own_start = placement.method.start(site, wide, source)
    for name, tensor in declared.items():
        key = keys[name]
        if key in held:
            continue
        value = own_start[name] if tensor.init == "own" else draw(tensor, generator(lane.seed, key), backbone)
        value = value.long() if tensor.integer else value.to(backbone.master_dtype)
        if masked and placement.mask is not None and placement.maskable(tensor):
            score = mask_score(placement.mask.score, tensor, generator(lane.seed, f"mask/{key}"), value)
            mask = top(score, placement.mask.kept(value.numel())).to(value)
            value = value * mask
            lane.masks[key] = mask.to(backbone.device)
        value = value.to(backbone.device)
        (lane.params if tensor.trains else lane.fixed)[key] = value
        if not tensor.stored:
            lane.passing.add(key)
        if tensor.trains:
            rates.setdefault(tensor.rate, []).append(value.requires_grad_())
    held = lane.tensors
    weights = {name: value for name, value in frozen.items() if isinstance(value, Tensor)}
    return weights | {name: held[key] for name, key in keys.items()}


def adopt(
    lane: Lane,
    number: int,
    method: HFPeft,
    sites: tuple[Site, ...],
    backbone: Backbone,
    rates: dict[float, list[Tensor]],
) -> None:
    """Give a lane a model of its own around the shared weights, with the tuner's tensors as the lane's."""
    model = own_model(backbone)
    with torch.random.fork_rng():
        torch.manual_seed(lane.seed)
        _, added = inject(method, model, sites)
    for name, value in added.items():
        if value.is_floating_point():
            value.data = value.data.to(backbone.master_dtype)
        trains = value.requires_grad
        (lane.params if trains else lane.fixed)[f"{number}/{name}"] = value
        if trains:
            rates[1.0].append(value)
    lane.model = model


def own_model(backbone: Backbone) -> nn.Module:
    """A model around the shared weights, whose modules can be replaced."""
    shared = {id(p): p for p in (*backbone.model.parameters(), *backbone.model.buffers())}
    known: dict[int, Any] = {**shared, id(backbone.attending): backbone.attending}
    for module in backbone.model.modules():  # hooks of lanes that train just now: with them all lanes would be copied
        known |= {id(hooks): OrderedDict() for hooks in (module._forward_hooks, module._forward_pre_hooks)}
    return copy.deepcopy(backbone.model, known)


def declared_tensors(design: Design, backbone: Backbone) -> Iterator[tuple[str, Placement, Declared]]:
    """Every tensor of a design: its key in a lane, its placement, its declaration."""
    for i, placement in enumerate(design.placements):
        for key, _, _, declared in placement.tensors(backbone.sites):
            yield f"{i}/{key}", placement, declared


def stream(seed: int, first: int, count: int, size: int) -> np.ndarray[Any, Any]:
    """`count` numbers from place `first` on of an endless stream of permutations of `size`."""
    wanted = np.arange(first, first + count)
    epochs = range(first // size, (first + count - 1) // size + 1)
    orders = {e: np.random.default_rng((seed, e)).permutation(size) for e in epochs}
    return np.array([orders[i // size][i % size] for i in wanted.tolist()])


def generator(seed: int, key: str) -> torch.Generator:
    """A random stream of its own for each tensor of each seed."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw(declared: Declared, source: torch.Generator, backbone: Backbone) -> Tensor:
    """The start of a declared tensor, in float32."""
    shape = declared.shape
    if declared.init == "ones":
        return torch.ones(shape)
    if declared.init in ("kaiming", "he"):
        size = shape[-1] / 6 if declared.init == "he" else shape[-1]
        return torch.empty(shape).uniform_(-1, 1, generator=source) / math.sqrt(size)
    if declared.init == "normal":
        return torch.empty(shape).normal_(0, 0.02, generator=source)
    if declared.init == "vocabulary":
        table = backbone.embedding.weight
        rows = torch.randint(len(table), (shape[0],), generator=source)
        with torch.no_grad():  # through the module, which scales what it gives in some families
            found: Tensor = backbone.embedding(rows.to(table.device))
        return found.float().cpu()
    return torch.zeros(shape)


def mask_score(score: str, declared: Declared, source: torch.Generator, value: Tensor) -> Tensor:
    """What a mask keeps the largest of. A tensor that starts at zero is scored by a random draw of its own."""
    if score == "magnitude" and declared.init != "zeros":
        return value.abs()
    return torch.rand(declared.shape, generator=source)
