"""What a lane needs from the data before its first step: masks by gradients, and what its methods prepare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftscape.search.masks import draw_masks
from peftscape.search.quantised import held, is_packed
from peftscape.spaces.methods.base import Method

if TYPE_CHECKING:
    from peftscape.search.cohort import Cohort
    from peftscape.search.lane import Lane
    from peftscape.spaces.sites import Site


def prepare(lane: Lane, cohort: Cohort) -> None:
    """Bring a new lane to its start. It runs alone, so that nothing depends on the cohort's other lanes."""
    draw_masks(lane, cohort)
    for placement, own, sites in zip(lane.design.placements, lane.own, lane.sites, strict=True):
        if type(placement.method).prepare is Method.prepare:
            continue
        with _alone(lane, cohort):
            placement.method.prepare(own, sites, _Look(lane, cohort, sites))


@contextmanager
def _alone(lane: Lane, cohort: Cohort) -> Iterator[None]:
    others = list(cohort.lanes)
    cohort.retire(*others)
    cohort.admit(lane)
    try:
        yield
    finally:
        cohort.retire(lane)
        cohort.admit(*others)
        lane.optimizer.zero_grad()


class _Look:
    """A `Probe`: gradients of the frozen weights of some sites at the lane's start, an example at a time."""

    def __init__(self, lane: Lane, cohort: Cohort, sites: tuple[Site, ...]) -> None:
        self.lane, self.cohort, self.sites = lane, cohort, sites

    def squared_gradients(self, count: int) -> list[Tensor]:
        """See `Probe`."""
        total: list[Tensor] = []
        for gradients in self._each(count):
            squares = [g.square() for g in gradients]
            total = [t + s for t, s in zip(total, squares, strict=True)] if total else squares
        return [t / self._count(count) for t in total]

    def gradients(self, count: int) -> list[Tensor]:
        """See `Probe`."""
        total: list[Tensor] = []
        for gradients in self._each(count):
            total = [t + g for t, g in zip(total, gradients, strict=True)] if total else gradients
        return [t / self._count(count) for t in total]

    def _count(self, count: int) -> int:
        return min(count, len(self.cohort.train.ids))

    def _each(self, count: int) -> Iterator[list[Tensor]]:
        """For each of the lane's first examples the gradient of every site's weight, d_out x d_in."""
        backbone = self.cohort.backbone
        modules: list[Any] = [backbone.model.get_submodule(site.path) for site in self.sites]
        packed = {id(m): m for m in modules if is_packed(m)}.values()
        restored = {id(m): _restore(m) for m in packed}
        weights = list({id(w): w for m in modules for w in [restored.get(id(m), m.weight)]}.values())
        order = self.lane.examples(self._count(count), len(self.cohort.train.ids))
        try:
            for weight in weights:
                weight.requires_grad_(True)
            with torch.enable_grad():
                for i in range(len(order)):
                    self.cohort.losses([order[i : i + 1]]).sum().backward()  # type: ignore[no-untyped-call]
                    yield [
                        _gradient(restored.get(id(m), m.weight), site, id(m) in restored)
                        for m, site in zip(modules, self.sites, strict=True)
                    ]
                    for weight in weights:
                        weight.grad = None
                    self.lane.optimizer.zero_grad()
        finally:
            for weight in weights:
                weight.requires_grad_(False)
                weight.grad = None
            for module in packed:
                del module.forward


def _restore(module: Any) -> Tensor:
    """The weight of a linear in 4 bits in numbers, with which it runs until its `forward` is deleted."""
    weight = held(module)
    assert weight is not None
    module.forward = lambda x: torch.nn.functional.linear(x, weight, module.bias)
    return weight


def _gradient(weight: Tensor, site: Site, straight: bool) -> Tensor:
    """d_out x d_in of the site; `straight` if the weight lies so whatever the site says."""
    assert weight.grad is not None
    gradient = (weight.grad.T if site.transposed and not straight else weight.grad).float()
    return (gradient[slice(*site.span)] if site.span else gradient).clone()
