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
    """Lanes side by side that adapt one site with one method.

    Args:
        method: of one of them; only what all share may be read from it.
        first, count: the lanes' numbers in the cohort, from `first` on.
        tensors: the declared tensors of each, by name.
        numbers: numeric knobs by name, lanes x 1 x 1.
    """

    method: Method
    site: Site
    first: int
    count: int
    tensors: dict[str, list[Tensor]]
    numbers: dict[str, Tensor]

    def values(self, dtype: torch.dtype) -> Lanes:
        """What `apply` sees, padded with zeros to the largest of the group, in the dtype of the computation."""
        stacked: dict[str, Any] = {name: stack(list_, dtype) for name, list_ in self.tensors.items()}
        return Lanes(stacked | self.numbers)


@dataclass(frozen=True)
class Stage:
    """What happens at one site at once: groups with no lane in common, in the order of their lanes.

    A lane's second placement on a module acts on what its first gave: it belongs to a later stage.
    """

    site: Site
    groups: tuple[Group, ...]

    def segments(self, lanes: int) -> tuple[list[int], list[Group | None]]:
        """Sizes that cut `lanes` into groups and gaps, and who each segment is."""
        sizes: list[int] = []
        who: list[Group | None] = []
        at = 0
        for group in self.groups:
            if group.first > at:
                sizes.append(group.first - at)
                who.append(None)
            sizes.append(group.count)
            who.append(group)
            at = group.first + group.count
        if at < lanes:
            sizes.append(lanes - at)
            who.append(None)
        return sizes, who


Member = tuple[int, Method, dict[str, Tensor]]


def stages(lanes: Sequence[Lane], sites: SiteMap, dtype: torch.dtype, device: torch.device) -> list[Stage]:
    """All stages, those of one module in the order in which each lane's placements act on it.

    One module may be sites of several kinds (BERT's output.dense is `down`, `ffn` and `bias`): placements are counted
    for the module, and within a placement the model's order holds, so that neighbours change neither. A group is a
    run of neighbouring lanes with the same method, so that it is a view of the cohort's tensors and its gradients
    need no scattering.
    """
    order = {site: i for i, site in enumerate(sites.sites)}
    found: dict[tuple[Any, ...], list[Member]] = {}
    where: dict[tuple[Any, ...], Site] = {}
    for number, lane in enumerate(lanes):
        depth: dict[str, int] = {}
        for i, placement in enumerate(lane.design.placements):
            adapted = [
                (site, declared) for site in placement.where(sites) if (declared := placement.method.tensors(site))
            ]
            for site, declared in adapted:
                own = {**lane.params, **lane.fixed}
                tensors = {name: own[f"{i}/{tensor_key(site, name, t)}"] for name, t in declared.items()}
                key = (depth.get(site.path, 0), order[site], placement.method.side(site))
                where[key] = site
                found.setdefault(key, []).append((number, placement.method, tensors))
            for path in {site.path for site, _ in adapted}:
                depth[path] = depth.get(path, 0) + 1
    return [
        Stage(where[key], tuple(_group(run, where[key], dtype, device) for run in _runs(members, where[key])))
        for key, members in sorted(found.items())
    ]


def _runs(members: list[Member], site: Site) -> list[list[Member]]:
    """Neighbouring lanes with the same method and static knobs."""

    def kind(member: Member) -> tuple[Any, ...]:
        return (member[1].name, member[1].group_key(site))

    runs: list[list[Member]] = []
    for member in members:
        if runs and runs[-1][-1][0] + 1 == member[0] and kind(runs[-1][-1]) == kind(member):
            runs[-1].append(member)
        else:
            runs.append([member])
    return runs


def _group(members: list[Member], site: Site, dtype: torch.dtype, device: torch.device) -> Group:
    return Group(
        method=members[0][1],
        site=site,
        first=members[0][0],
        count=len(members),
        tensors={name: [tensors[name] for _, _, tensors in members] for name in members[0][2]},
        numbers=_numbers([method for _, method, _ in members], dtype, device),
    )


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
