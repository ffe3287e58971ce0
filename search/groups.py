"""Which lanes share which operation: at every adapted place, lanes with the same method form a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftscape.spaces.design import tensor_key
from peftscape.spaces.methods.base import Lanes, Method

if TYPE_CHECKING:
    from peftscape.search.lane import Lane
    from peftscape.spaces.sites import Site, SiteMap


@dataclass(frozen=True)
class Group:
    """Lanes that adapt one site with one method.

    Args:
        method: of one of them; only what all share may be read from it.
        lanes: their numbers in the cohort, ascending.
        tensors: the declared tensors of each, by name.
        numbers: numeric knobs by name, lanes x 1 x 1.
    """

    method: Method
    site: Site
    lanes: tuple[int, ...]
    tensors: dict[str, list[Tensor]]
    numbers: dict[str, Tensor]

    def values(self, dtype: torch.dtype) -> Lanes:
        """What `apply` sees, padded with zeros to the largest of the group, in the dtype of the computation."""
        stacked: dict[str, Any] = {name: stack(list_, dtype) for name, list_ in self.tensors.items()}
        return Lanes(stacked | self.numbers)


def groups_by_site(lanes: Sequence[Lane], sites: SiteMap, dtype: torch.dtype, device: torch.device) -> list[Group]:
    """All groups, those of one site in the order in which its placements act.

    A lane's second placement on a site acts on what its first gave: groups of second placements come second.
    """
    found: dict[tuple[Any, ...], list[tuple[int, Method, dict[str, Tensor]]]] = {}
    where: dict[tuple[Any, ...], Site] = {}
    for number, lane in enumerate(lanes):
        depth: dict[tuple[str, str], int] = {}
        for i, placement in enumerate(lane.design.placements):
            for site in placement.where(sites):
                declared = placement.method.tensors(site)
                if not declared:
                    continue
                place = (site.kind, site.path)
                level = depth[place] = depth.get(place, -1) + 1
                own = {**lane.params, **lane.fixed}
                tensors = {name: own[f"{i}/{tensor_key(site, name, t)}"] for name, t in declared.items()}
                key = (level, *place, placement.method.name, placement.method.group_key(site))
                where[key] = site
                found.setdefault(key, []).append((number, placement.method, tensors))
    return [
        Group(
            method=members[0][1],
            site=where[key],
            lanes=tuple(number for number, _, _ in members),
            tensors={name: [tensors[name] for _, _, tensors in members] for name in members[0][2]},
            numbers=_numbers([method for _, method, _ in members], dtype, device),
        )
        for key, members in sorted(found.items(), key=lambda item: item[0][0])
    ]


def stack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Lanes' tensors under one leading dimension, zeros where one is smaller; gradients go back in their own dtype."""
    stacked: Tensor = _Stack.apply(dtype, *tensors)  # type: ignore[no-untyped-call]
    return stacked


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.shapes = [(t.shape, t.dtype) for t in tensors]
        largest = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
        out = torch.zeros(len(tensors), *largest, dtype=dtype, device=tensors[0].device)
        for i, t in enumerate(tensors):
            _corner(out[i], t.shape).copy_(t)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        parts = [
            _corner(grad[i], shape).to(dtype) if ctx.needs_input_grad[i + 1] else None
            for i, (shape, dtype) in enumerate(ctx.shapes)
        ]
        return (None, *parts)


def _corner(x: Tensor, shape: torch.Size) -> Tensor:
    """The part of a padded tensor that is its own."""
    for dim, size in enumerate(shape):
        x = x.narrow(dim, 0, size)
    return x


def _numbers(members: Sequence[Method], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    knobs = [m.knobs() for m in members]
    return {
        name: torch.tensor([float(k[name]) for k in knobs], dtype=dtype, device=device).view(-1, 1, 1)
        for name, value in knobs[0].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def on_lanes(x: Tensor, lanes: tuple[int, ...]) -> Tensor:
    """The rows of these lanes: a view where they lie side by side."""
    if len(lanes) == len(x):
        return x
    if lanes[-1] - lanes[0] + 1 == len(lanes):
        return x[lanes[0] : lanes[-1] + 1]
    return x.index_select(0, torch.tensor(lanes, device=x.device))


def put_lanes(x: Tensor, new: Tensor, lanes: tuple[int, ...]) -> Tensor:
    """x with the rows of these lanes replaced."""
    if len(lanes) == len(x):
        return new
    new = new.to(x.dtype)
    if lanes[-1] - lanes[0] + 1 == len(lanes):
        return torch.cat([x[: lanes[0]], new, x[lanes[-1] + 1 :]])
    return x.index_copy(0, torch.tensor(lanes, device=x.device), new)
