"""Which lanes share which operation: at every adapted place, lanes with the same method form a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from peftscape.spaces.compositions import gated
from peftscape.spaces.methods.base import Lanes, Method
from peftscape.spaces.ops.choose import noting
from peftscape.spaces.ops.device import upload

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.lane import Lane
    from peftscape.search.packing import Batch
    from peftscape.spaces.design import Placement
    from peftscape.spaces.methods.base import Own
    from peftscape.spaces.sites import Site
    from peftscape.spaces.text import Text


@dataclass(frozen=True)
class Group:
    """Lanes side by side that adapt one site with one method.

    Args:
        placement: of one of them; only what all share may be read from it.
        first, count: the lanes' numbers in the cohort, from `first` on.
        members: the tensors that the site sees of each lane, by name.
        numbers: numeric knobs by name, lanes x 1 x 1.
        frozen: the site's own weights, where the method reads them.
        ran: of each lane the kernels that it ran on.
    """

    placement: Placement
    site: Site
    first: int
    count: int
    members: list[Own]
    numbers: dict[str, Tensor]
    frozen: dict[str, Any]
    ran: list[set[str]]

    @property
    def method(self) -> Method:
        return self.placement.method

    def values(self, dtype: torch.dtype, batch: Batch | None = None, side: str = "output") -> Lanes:
        """What `apply` sees: each lane's own tensors, in the dtype of the computation where they are stacked."""
        own = {name: [m[name] for m in self.members] for name in self.members[0] if name not in self.frozen}
        text = {"text": self.text(batch, side)} if self.method.needs_text and batch is not None else {}
        return Lanes(self.numbers | self.frozen | text, own, dtype)

    def output(self, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        """What the site gives, adapted."""
        p = self.values(y.dtype, batch)
        with noting(self.ran):
            return self._composed(p, x, y, self.method.apply(p, x, y), batch, "output")

    def input(self, x: Tensor, batch: Batch) -> Tensor:
        """What the site reads, adapted."""
        p = self.values(x.dtype, batch, "input")
        with noting(self.ran):
            return self._composed(p, x, x, self.method.apply_input(p, x), batch, "input")

    def gate(self, x: Tensor, dtype: torch.dtype, batch: Batch) -> Tensor:
        """lanes x texts x 1, from what the site's module reads."""
        p = self.values(dtype)
        return gated(x, p.gate, p.gate_bias, self.text(batch, "output"))

    def text(self, batch: Batch, side: str) -> Text:
        """The group's texts, for what is done on this side of the site."""
        text = batch.layout.lanes(self.first, self.count)
        return text if batch.past is None else replace(text, past=batch.past.of(self, side))

    def _composed(self, p: Lanes, x: Tensor, before: Tensor, after: Tensor, batch: Batch, side: str) -> Tensor:
        if self.placement.gate:
            text = self.text(batch, side)
            after = before + text.spread(gated(x, p.gate, p.gate_bias, text)) * (after - before)
        if self.placement.weighed:
            after = before + p.strength.unsqueeze(1) * (after - before)
        return torch.where(p.keep.unsqueeze(1) > 0, after, before) if self.placement.drop else after


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


#: A lane's number, its placement, what the site sees of it, and the kernels that it ran on.
Member: TypeAlias = "tuple[int, Placement, Own, set[str]]"


def stages(lanes: Sequence[Lane], backbone: Backbone) -> list[Stage]:
    """All stages, those of one module in the order in which each lane's placements act on it.

    One module may be sites of several kinds (BERT's output.dense is `down`, `ffn` and `bias`): placements are counted
    for the module, and within a placement the model's order holds, so that neighbours change neither. A group is a
    run of neighbouring lanes with the same method, so that it is a view of the cohort's tensors and its gradients
    need no scattering.
    """
    order = {site: i for i, site in enumerate(backbone.sites.sites)}
    found: dict[tuple[Any, ...], list[Member]] = {}
    where: dict[tuple[Any, ...], Site] = {}
    for number, lane in enumerate(lanes):
        depth: dict[str, int] = {}
        for placement, sites, seen in zip(lane.design.placements, lane.sites, lane.seen, strict=True):
            for site, own in zip(sites, seen, strict=True):
                key = (depth.get(site.path, 0), order[site], placement.method.side(site))
                where[key] = site
                found.setdefault(key, []).append((number, placement, own, lane.kernels))
            for path in {site.path for site in sites}:
                depth[path] = depth.get(path, 0) + 1
    return [
        Stage(where[key], tuple(_group(run, where[key], backbone) for run in _runs(members, where[key])))
        for key, members in sorted(found.items())
    ]


def _runs(members: list[Member], site: Site) -> list[list[Member]]:
    """Neighbouring lanes with the same method and static knobs."""

    def kind(member: Member) -> tuple[Any, ...]:
        placement = member[1]
        composed = (placement.gate, placement.drop > 0, placement.weighed)
        return (placement.method.name, *composed, placement.method.group_key(site))

    runs: list[list[Member]] = []
    for member in members:
        if runs and runs[-1][-1][0] + 1 == member[0] and kind(runs[-1][-1]) == kind(member):
            runs[-1].append(member)
        else:
            runs.append([member])
    return runs


def _group(members: list[Member], site: Site, backbone: Backbone) -> Group:
    return Group(
        placement=members[0][1],
        site=site,
        first=members[0][0],
        count=len(members),
        members=[own for _, _, own, _ in members],
        numbers=_numbers([placement.method for _, placement, *_ in members], backbone.dtype, backbone.device),
        frozen=backbone.frozen(site) if members[0][1].method.needs_weight else {},
        ran=[ran for *_, ran in members],
    )


def _numbers(members: Sequence[Method], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    knobs = [m.knobs() for m in members]
    return {
        name: upload([float(k[name]) for k in knobs], dtype, device).view(-1, 1, 1)
        for name, value in knobs[0].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
