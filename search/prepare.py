"""What a lane needs from the data before its first step: masks by gradients, and what its methods prepare."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftscape.search.masks import draw_masks
from peftscape.spaces.methods.base import Method

if TYPE_CHECKING:
    from peftscape.search.cohort import Cohort
    from peftscape.search.lane import Lane
    from peftscape.search.losses import Examples
    from peftscape.spaces.sites import Site


#: Examples whose gradients run in one pass.
AT_ONCE = 16


def prepare(lane: Lane, cohort: Cohort) -> None:
    """Bring a new lane to its start. It runs alone, so that nothing depends on the cohort's other lanes."""
    draw_masks(lane, cohort)
    for i, (placement, own, sites) in enumerate(zip(lane.design.placements, lane.own, lane.sites, strict=True)):
        if type(placement.method).prepare is not Method.prepare:
            placement.method.prepare(own, sites, Look(_without(lane, i), cohort, sites))


def _without(lane: Lane, i: int) -> Lane:
    """The lane but for one placement, which changes nothing before it is prepared."""

    def rest(rows: Sequence[Any]) -> list[Any]:
        return [row for n, row in enumerate(rows) if n != i]

    design = replace(lane.design, placements=tuple(rest(lane.design.placements)))
    return replace(lane, design=design, sites=rest(lane.sites), own=rest(lane.own), seen=rest(lane.seen))


class Look:
    """A `Probe`: gradients of the frozen weights of some sites at the lane's start, each example's own.

    A linear's gradient is G = sum over tokens of g x^T, from what it reads and the gradient of what it gives. Each
    example is a lane of the cohort, so one pass has the g and x of many, and no two meet.
    """

    def __init__(self, lane: Lane, cohort: Cohort, sites: tuple[Site, ...]) -> None:
        self.lane, self.cohort, self.sites = lane, cohort, sites
        self.shared = False  # whether a linear also reads what belongs to no example, so that they run one by one

    def squared_gradients(self, count: int) -> list[Tensor]:
        """See `Probe`."""
        return self._mean(count, lambda gradients: gradients.square_().sum(dim=0))

    def gradients(self, count: int) -> list[Tensor]:
        """See `Probe`."""
        return self._mean(count, lambda gradients: gradients.sum(dim=0))

    def _mean(self, count: int, summed: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The mean over the lane's first examples, d_out x d_in of each site.

        Args:
            summed: of examples x d_out x d_in the sum over examples.
        """
        model = self.cohort.backbone.model
        modules = {site.path: model.get_submodule(site.path) for site in self.sites}
        weight = {path: id(module.weight) for path, module in modules.items()}  # one for linears that share it
        order = self.lane.examples(min(count, len(self.cohort.train.ids)), len(self.cohort.train.ids))
        total: dict[int, Tensor] = {}
        done = 0
        while done < len(order):
            at_once = self._together if done else 1
            uses = self._uses(modules, order[done : done + at_once])
            done += at_once
            for key in set(weight.values()):
                each = [torch.bmm(g.mT, x) for path in modules if weight[path] == key for x, g in uses[path]]
                mine = summed(functools.reduce(Tensor.add_, each))
                total[key] = total[key].add_(mine) if key in total else mine
        found = [total[weight[site.path]] / len(order) for site in self.sites]
        return [g[slice(*site.span)].clone() if site.span else g for g, site in zip(found, self.sites, strict=True)]

    @property
    def _together(self) -> int:
        """Examples of a pass: no more than a training pass has, and one where each would bring whole weights along."""
        dense = any(placement.method.execution != "packed" for placement in self.lane.design.placements)
        cohort = self.cohort
        return 1 if self.shared or dense else max(1, min(AT_ONCE, cohort.batch_size // cohort.passes) // cohort.cuts)

    def _uses(self, modules: Mapping[str, Any], examples: Examples) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """What each linear read and the gradient of what it gave, examples x tokens x width, one pair a use."""

        def by_example(x: Tensor) -> Tensor:
            return x.detach().reshape(len(examples), -1, x.shape[-1]).float()

        uses: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in modules}

        def watch(path: str) -> Callable[..., Tensor]:
            def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                given = output if output.requires_grad else output.detach().requires_grad_(True)
                self.shared |= self.cohort.forward.is_shared(given)
                read = by_example(args[0])
                given.register_hook(lambda g: uses[path].append((read, by_example(g))))  # type: ignore[no-untyped-call]
                return given

            return hook

        # What a lane's methods change comes after the linear, so what it gave is caught before them.
        hooks = [module.register_forward_hook(watch(path), prepend=True) for path, module in modules.items()]
        try:
            with _alone([self.lane] * len(examples), self.cohort), torch.enable_grad():
                losses = self.cohort.losses([examples[i : i + 1] for i in range(len(examples))])
                losses.sum().backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()
        return uses


@contextmanager
def _alone(lanes: Sequence[Lane], cohort: Cohort) -> Iterator[None]:
    """Within, the cohort has these lanes alone, and all layers run."""
    others, cache = list(cohort.lanes), cohort.cache
    cohort.retire(*others)
    cohort.admit(*lanes)
    cohort.cache = None
    try:
        yield
    finally:
        cohort.cache = cache
        cohort.retire(*lanes)
        cohort.admit(*others)
        for lane in lanes:
            lane.optimizer.zero_grad()
