"""Child-Tuning: fine-tune a child network (Xu et al. 2021, arXiv:2109.05687)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftscape.spaces.knobs import choice, knob, uniform
from peftscape.spaces.methods.base import Tensor, Tensors
from peftscape.spaces.methods.fish_mask import FishMask

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Own, Probe
    from peftscape.spaces.sites import Site


class ChildTuning(FishMask):
    """(W + D) x with masked gradients: `F` g * Bernoulli(p) / p, drawn anew each step; `D` g * the Fisher mask.

    `density` is p, the fraction of weights whose gradient lives (sec. 2.2, 2.3). `F` changes all weights and stores
    them all; `D` is FISH Mask at a high density: weights outside its mask never move.
    """

    name, category = "child_tuning", "partial"

    density: float = knob(uniform(0.1, 0.4), default=0.3)
    variant: str = knob(choice("F", "D"), default="F")

    def shared(self, sites: tuple[Site, ...]) -> Tensors:
        return super().shared(sites) if self.variant == "D" else {}

    def tensors(self, site: Site) -> Tensors:
        return {} if self.variant == "D" else {"delta": Tensor((site.d_out, site.d_in))}

    def prepare(self, own: list[Own], sites: tuple[Site, ...], probe: Probe) -> None:
        if self.variant == "D":
            super().prepare(own, sites, probe)

    def expand(self, own: list[Own], sites: tuple[Site, ...], source: torch.Generator | None) -> list[Own]:
        if self.variant == "D":
            return super().expand(own, sites, source)
        if source is None:
            return own
        return [{"delta": _child(row["delta"], self.density, source)} for row in own]


def _child(delta: torch.Tensor, p: float, source: torch.Generator) -> torch.Tensor:
    """The same values, with a gradient of 1/p where a Bernoulli(p) draw is one and of 0 elsewhere."""
    import torch

    lives = torch.rand(delta.shape, generator=source) < p  # drawn here: backward passes have no promised order
    child = delta.view_as(delta)
    if child.requires_grad:
        child.register_hook(lambda grad: lives.to(grad).mul_(grad).div_(p))  # type: ignore[no-untyped-call]
    return child
